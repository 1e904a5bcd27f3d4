"""Attention with edited masses, on fused kernels.

Forms, all exact (see :mod:`headpatch.segments` for the algebra):

* :func:`first_token`: constant weights on the first token. The kernel runs on the complement (all keys but that one), then one
  fused pass puts the key back with its weight.
* :func:`differentiable`: constant weights with gradients, as extra head dimensions under the ordinary kernel.
* Segments other than the first token: :mod:`headpatch.adapters.huggingface.cells`.

Layers with a scores edit go another way: :mod:`headpatch.adapters.huggingface.scores`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import attend, attend_last, attend_tiled, flash_for_cpu, score_dtype
from headpatch.adapters.huggingface.masks import Visible
from headpatch.kernels.first_token import merge_first_token
from headpatch.kernels.step import can_merge_step, merge_step
from headpatch.segments import augment, include_sink

__all__ = ["Call", "FirstKey", "differentiable", "first_token", "of_heads", "step", "unedited"]

BLOCK = 1024
"""Queries per kernel call where a mask has to be edited: bounds memory to one block of it."""


@dataclass(frozen=True)
class FirstKey:
    """Key index of the first real token in a layer's keys: [b], [b, q], or None for key 0 in every row.

    `gone` (same shape) says where it has left the layer's window; None where it cannot have.
    """

    index: Tensor | None = None
    gone: Tensor | None = None

    def columns(self, start: int, stop: int, batch: int) -> Tensor:
        """Index for queries start..stop, shaped [b, 1, q or 1, 1] for gather and scatter."""
        if self.index is None:
            raise ValueError("key 0 needs no columns")
        index = self.index if self.index.ndim == 1 else self.index[:, start:stop]
        return index.view(batch, 1, -1, 1)

    def left(self, start: int, stop: int, batch: int) -> Tensor | None:
        """`gone` for queries start..stop, [b, 1, q or 1]."""
        if self.gone is None:
            return None
        gone = self.gone if self.gone.ndim == 1 else self.gone[:, start:stop]
        return gone.view(batch, 1, -1)


@dataclass(frozen=True)
class Call:
    """One attention call: q [b, H, q, d], k and v [b, K, n, d], as the kernel would get them."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Visible
    scale: float
    softcap: float | None
    sinks: Tensor | None
    first: FirstKey
    ranges: list[tuple[int, int]] | None = None
    """Each row's tokens, where padding is all that `seen` holds beside causality."""
    _of_heads: list[tuple[Tensor, Call]] = field(init=False, repr=False, default_factory=list)
    _attention: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def keep_attention(self, p: Tensor) -> None:
        """Say what the attention of this call is, [b, H, q, n], for whoever works on it next."""
        self._attention[:] = [p]

    def attention_of(self, heads: Tensor) -> Tensor | None:
        """[b, h, q, n] attention of these heads, if somebody has said what it is."""
        found = [some for known, some in self._of_heads if known is heads]
        return found[0]._attention[0] if found and found[0]._attention else None

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(o, L) with this call's scale and soft-capping, learned sinks not yet included."""
        return attend(q, k, v, mask=mask, causal=causal, scale=self.scale, softcap=self.softcap)

    def attend_tail(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(o, L) where the queries are the last of the keys' tokens."""
        return attend_last(q, k, v, self.scale, self.softcap)


def of_heads(call: Call, heads: Tensor) -> Call:
    """The call of these query heads alone, each with a copy of its keys and values; kept, because several ask for the same."""
    for known, found in call._of_heads:
        if known is heads:
            return found
    kv = heads if call.groups == 1 else heads // call.groups
    sinks = None if call.sinks is None else call.sinks.index_select(0, heads)
    q, k, v = call.q.index_select(1, heads), call.k.index_select(1, kv), call.v.index_select(1, kv)
    found = Call(q, k, v, call.seen, call.scale, call.softcap, sinks, call.first, call.ranges)
    call._of_heads.append((heads, found))
    return found


def first_token(call: Call, weight: Tensor, head_scale: Tensor | None = None, gentle: bool = False) -> Tensor:
    """Attention with the first token's weight multiplied by `weight` [H], and outputs by `head_scale` [H]; [b, q, H, d].

    The kernel runs on all keys but the first; one fused pass puts the first back with its weight. `gentle` as in :func:`step`.
    """
    q, k, v = call.q, call.k, call.v
    b, heads, n_q = q.shape[:3]
    if call.ranges is not None:
        return _row_by_row(call, call.ranges, weight, head_scale)
    if call.seen.kind == "blocks":
        blocks = [_masked_block(call, weight, head_scale, *block) for block in blocks_of(n_q, BLOCK)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    causal = call.seen.kind == "causal"
    if causal:
        k, v = k[:, :, :n_q], v[:, :, :n_q]
    if k.shape[2] == 1:  # the kernel must not be called without keys
        rest = v.new_zeros(b, heads, n_q, v.shape[-1])
        lse = torch.full((b, heads, n_q), -math.inf, dtype=score_dtype(q), device=q.device)
    elif n_q == 1 and call.sinks is None and call.softcap is None and can_merge_step(q):
        return step(q, k, v, weight, head_scale, call.scale, gentle)
    elif causal:  # query 0 sees nothing but the first token; the merge knows that from the missing row
        rest, lse = call.attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, causal=True)
    elif call.seen.kind == "tail":
        rest, lse = call.attend_tail(q, k[:, :, 1:], v[:, :, 1:])
    else:
        rest, lse = call.attend(q, k[:, :, 1:], v[:, :, 1:], None)
    return merge_first_token(
        q, k, v, rest, lse, weight, scale=call.scale, complement=True, head_scale=head_scale,
        softcap=call.softcap or 0.0, sink=call.sinks,
    )  # fmt: skip


def _row_by_row(call: Call, ranges: list[tuple[int, int]], weight: Tensor, head_scale: Tensor | None) -> Tensor:
    """:func:`first_token` of a padded batch, each row's tokens by themselves: no mask, and nothing done for padding (zeros)."""
    b, heads, n_q = call.q.shape[:3]
    out = call.q.new_zeros(b, n_q, heads, call.v.shape[-1])
    for i, (start, stop) in enumerate(ranges):
        q, k, v = (x[i : i + 1, :, start:stop] for x in (call.q, call.k, call.v))
        seen = Visible("causal", stop - start, stop - start, q.device)
        row = replace(call, q=q, k=k, v=v, seen=seen, first=FirstKey(), ranges=None)
        out[i : i + 1, start:stop] = first_token(row, weight, head_scale)
    return out


def step(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, head_scale: Tensor | None, scale: float, gentle: bool
) -> Tensor:
    """:func:`first_token` for one query a row that sees every key, on a device where :func:`can_merge_step` holds.

    Where no weight is small (`gentle`) the whole kernel's output is corrected; where one is, that loses digits, and the kernel
    runs without the first key.
    """
    keys, values = (k, v) if gentle else (k[:, :, 1:], v[:, :, 1:])
    o, lse = attend(q, keys, values, scale=scale)
    return merge_step(q, k, v, o, lse.contiguous(), weight, scale, not gentle, head_scale)


def blocks_of(total: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` that cover `total`. (A compiler with dynamic shapes is tied to their number, not to `total`.)"""
    if total <= size:
        return [(0, total)]
    return [(i * size, min(total, (i + 1) * size)) for i in range((total + size - 1) // size)]


BIAS_KEYS = 8192
"""Up to so many keys the CPU kernel is quicker with a bias per key than without one and with a merge after it (measured)."""


def biased_suits(call: Call) -> bool:
    """Whether :func:`biased` can take this call: an eager decoding step on a CPU over a moderate number of unmasked keys."""
    q, n_k = call.q, call.k.shape[2]
    return (
        q.device.type == "cpu" and q.shape[2] == 1 and call.seen.kind == "all" and 1 < n_k <= BIAS_KEYS
        and call.softcap is None and call.sinks is None and q.dtype != torch.float16 and q.shape[-1] == call.v.shape[-1]
        and not torch.compiler.is_compiling()
    )  # fmt: skip


def biased(call: Call, bias: Tensor) -> Tensor:
    """As :func:`first_token`, the weights added to the first key's score as `bias` [1, H, 1, n]: one kernel, nothing after it."""
    out, _ = flash_for_cpu(call.q, call.k, call.v, 0.0, False, attn_mask=bias, scale=call.scale)
    return out.transpose(1, 2).contiguous()


def _masked_block(call: Call, weight: Tensor, head_scale: Tensor | None, start: int, stop: int) -> Tensor:
    q = call.q[:, :, start:stop]
    b = q.shape[0]
    mask = call.seen.block(start, stop)
    assert mask is not None
    at = call.first.columns(start, stop, b)
    mask = mask.expand(b, -1, -1, mask.shape[-1])
    cols = at.expand(b, mask.shape[1], mask.shape[2], 1)
    low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    hidden: Tensor | float = low
    first = at.view(b, -1)
    left = call.first.left(start, stop, b)
    if left is not None:
        # The first token has left this layer's window: what stands at the clamped index is another key, and stays.
        column = torch.gather(mask, -1, cols)
        hidden = torch.where(left.unsqueeze(-1), column, torch.full_like(column, low))
        first = torch.where(left.view(b, -1), -1, first)
    rest, lse = call.attend(q, call.k, call.v, mask.scatter(-1, cols, hidden))
    return merge_first_token(
        q, call.k, call.v, rest, lse, weight, scale=call.scale, complement=True, head_scale=head_scale,
        first=first if first.shape[1] > 1 else first[:, 0], mask=mask, softcap=call.softcap or 0.0, sink=call.sinks,
    )  # fmt: skip


def unedited(call: Call) -> Tensor:
    """[b, H, q, d] of the ordinary kernel."""
    n_q, n_k = call.q.shape[2], call.seen.keys
    k, v = call.k[:, :, :n_k], call.v[:, :, :n_k]
    if call.seen.kind == "blocks":
        pairs = [call.attend(call.q[:, :, i:j], k, v, call.seen.block(i, j)) for i, j in blocks_of(n_q, BLOCK)]
        out, lse = (torch.cat(x, 2) for x in zip(*pairs, strict=True))
    elif call.seen.kind == "tail":
        out, lse = call.attend_tail(call.q, k, v)
    else:
        out, lse = call.attend(call.q, k, v, None, causal=call.seen.kind == "causal")
    return out if call.sinks is None else include_sink(out, lse, call.sinks)[0]


def differentiable(call: Call, weight: Tensor) -> Tensor:
    """:func:`first_token` with gradients, of the weights too; stores nothing of the size queries x keys."""
    q, k, v = call.q, call.k, call.v
    n_q = q.shape[2]
    if call.seen.kind == "causal":
        k, v = k[:, :, :n_q], v[:, :, :n_q]
    n_k, width = k.shape[2], v.shape[-1]
    members = _first_members(call, n_k)
    log_w = torch.log(weight.clamp_min(torch.finfo(weight.dtype).tiny))[:, None]
    plain = call.softcap is None and call.sinks is None and k.shape[-1] == width
    if plain:
        q, k, v = augment(q, k, v, log_w, members, call.scale)
        mask = call.seen.block(0, n_q) if call.seen.kind in ("blocks", "tail") else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=call.seen.kind == "causal", scale=call.scale, enable_gqa=call.groups > 1
        )
        return out[..., :width].transpose(1, 2).contiguous()
    bias = log_w[None, :, :, None].to(score_dtype(q)) * members.to(score_dtype(q)).transpose(1, 2)[:, None]
    out, lse = attend_tiled(
        q, k, v, mask=call.seen.block(0, n_q) if call.seen.kind in ("blocks", "tail") else None,
        causal=call.seen.kind == "causal", scale=call.scale, softcap=call.softcap, bias=bias,
    )  # fmt: skip
    if call.sinks is not None:
        out, lse = include_sink(out, lse, call.sinks)
    return out.transpose(1, 2).contiguous()


def _first_members(call: Call, n_k: int) -> Tensor:
    """[b, n, 1] 1 where a key is the first real token of a sequence of its row."""
    b = call.q.shape[0]
    flags = torch.zeros(b, n_k, dtype=torch.bool, device=call.q.device)
    if call.first.index is None:
        flags[:, 0] = True
    else:
        index = call.first.index.view(b, -1)
        here = torch.ones_like(index, dtype=torch.bool) if call.first.gone is None else ~call.first.gone.view(b, -1)
        flags = flags.scatter(1, index, here)
    return flags.unsqueeze(-1)
