"""Attention with edited masses, on fused kernels.

Three forms, all exact (see :mod:`headpatch.segments` for the algebra):

* :func:`first_token`: constant weights on the first token. The kernel runs on the complement (all keys but that one), then one
  fused pass puts the key back with its weight.
* :func:`by_cells`: anything else in the mass family. One kernel pass per cell of intersected segments, merged by log-sum-exp.
* :func:`differentiable`: constant weights with gradients, as extra head dimensions under the ordinary kernel.

Layers with a scores edit go through :func:`explicit`, which holds the scores of one block of queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import attend, attend_tiled, repeat_kv, score_dtype
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.plan import Edit
from headpatch.kernels.first_token import merge_first_token
from headpatch.segments import augment, cell_log_weights, cells, include_sink, merge

__all__ = ["Call", "FirstKey", "by_cells", "differentiable", "explicit", "first_token"]

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

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(o, L) with this call's scale and soft-capping, learned sinks not yet included."""
        return attend(q, k, v, mask=mask, causal=causal, scale=self.scale, softcap=self.softcap)


def first_token(call: Call, weight: Tensor, head_scale: Tensor | None = None, gentle: bool = False) -> Tensor:
    """Attention with the first token's weight multiplied by `weight` [H], and outputs by `head_scale` [H]; [b, q, H, d].

    The kernel runs on all keys but the first; one fused pass puts the first back with its weight. Where no weight is small
    (`gentle`), a decoding step on CUDA instead corrects the whole kernel's output in place: fewer launches, no copy.
    """
    q, k, v = call.q, call.k, call.v
    b, heads, n_q = q.shape[:3]
    if call.seen.kind == "blocks":
        blocks = [_masked_block(call, weight, head_scale, *block) for block in _blocks(n_q, BLOCK)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    causal = call.seen.kind == "causal"
    if causal:
        k, v = k[:, :, :n_q], v[:, :, :n_q]
    if k.shape[2] == 1:  # the kernel must not be called without keys
        rest = v.new_zeros(b, heads, n_q, v.shape[-1])
        lse = torch.full((b, heads, n_q), -math.inf, dtype=score_dtype(q), device=q.device)
    elif gentle and n_q == 1 and q.device.type == "cuda" and call.sinks is None and not torch.compiler.is_compiling():
        whole, lse = call.attend(q, k, v, None)
        return merge_first_token(
            q, k, v, whole, lse, weight, scale=call.scale, complement=False, head_scale=head_scale,
            softcap=call.softcap or 0.0, inplace=True,
        )  # fmt: skip
    elif causal:  # query 0 sees nothing but the first token; the merge knows that from the missing row
        rest, lse = call.attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, causal=True)
    else:
        rest, lse = call.attend(q, k[:, :, 1:], v[:, :, 1:], None)
    return merge_first_token(
        q, k, v, rest, lse, weight, scale=call.scale, complement=True, head_scale=head_scale,
        softcap=call.softcap or 0.0, sink=call.sinks,
    )  # fmt: skip


def _blocks(total: int, size: int) -> list[tuple[int, int]]:
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
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, False, attn_mask=bias, scale=call.scale
    )
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


Segments = Callable[[int, int], list[Tensor]]
"""Masks of the segments that a plan's edits name, for queries start..stop, each broadcastable to [b, H, q, n]."""
Owned = tuple[tuple[int, ...], ...]
"""Per edit, its segments' places in what a :data:`Segments` returns."""
OperandsAt = Callable[[Edit, int, int], dict[str, Any]]
"""What an edit's method asked for, for queries start..stop."""


def by_cells(call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt) -> Tensor:
    """Attention with any mass edits; `owned` lists, per edit, its segments' places in what `segments` returns."""
    n_q, n_k = call.q.shape[2], call.seen.keys
    k, v = call.k[:, :, :n_k], call.v[:, :, :n_k]  # what is behind are unwritten slots of a static cache
    blocks = []
    for start, stop in _blocks(n_q, BLOCK):
        q, mask = call.q[:, :, start:stop], call.seen.block(start, stop)
        outputs, lses, inside = [], [], []
        for names, cell in cells([s[..., :n_k] for s in segments(start, stop)]):
            o, lse = call.attend(q, k, v, _and(mask, cell))
            outputs.append(o)
            lses.append(lse)
            inside.append(names)
        if call.sinks is not None:  # a key of value zero, in no segment
            outputs.append(torch.zeros_like(outputs[0]))
            lses.append(call.sinks.to(lses[0])[:, None].expand_as(lses[0]))
            inside.append(())
        patches = [(owned[i], _on_heads(edit, operands(edit, start, stop))) for i, edit in enumerate(edits)]
        blocks.append(merge(outputs, lses, cell_log_weights(lses, inside, patches)))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()


def _on_heads(edit: Edit, operands: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def reshare(shares: Tensor) -> Tensor:
        chosen = shares.index_select(2, edit.heads)
        new = edit.method.reshare(chosen, edit.strength.to(shares.dtype), operands)  # type: ignore[attr-defined]
        return shares.index_copy(2, edit.heads, new.to(shares.dtype))

    return reshare


def _and(mask: Tensor | None, cell: Tensor) -> Tensor:
    if mask is None:
        return cell
    if mask.dtype == torch.bool:
        return mask & cell
    return torch.where(cell, mask, torch.finfo(mask.dtype).min)


def explicit(call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt) -> Tensor:
    """Attention with scores edits (and any mass edits beside them), a block of queries' scores at a time."""
    step = 256
    n_q, n_k, dtype = call.q.shape[2], call.seen.keys, score_dtype(call.q)
    k = repeat_kv(call.k[:, :, :n_k], call.groups).to(dtype)
    v = repeat_kv(call.v[:, :, :n_k], call.groups).to(dtype)
    blocks = []
    for start, stop in _blocks(n_q, step):
        scores = torch.matmul(call.q[:, :, start:stop].to(dtype), k.transpose(2, 3)) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        mask = call.seen.block(start, stop)
        if mask is not None:
            low = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
            scores = scores.masked_fill(~mask if low is None else mask < low, -math.inf)
            scores = scores if low is None else scores + mask.clamp_min(low).to(dtype)
        masks = [s[..., :n_k] for s in segments(start, stop)]
        for i, edit in enumerate(edits):
            given = operands(edit, start, stop)
            if edit.method.family == "scores":
                inside = masks[owned[i][0]].expand_as(scores).index_select(1, edit.heads)
                old = scores.index_select(1, edit.heads)
                new = edit.method.transform(  # type: ignore[attr-defined]
                    old.masked_fill(~inside, -math.inf), edit.strength.to(dtype), given
                )
                scores = scores.index_copy(
                    1, edit.heads, torch.where(inside & ~torch.isneginf(old), new.to(dtype), old)
                )
                continue
            parts, rest, inside_of = [], scores, []
            for s in owned[i]:  # a key that lies in two of a method's segments belongs to the first
                inside_of.append(masks[s] & ~torch.isneginf(rest))
                parts.append(rest.masked_fill(~masks[s], -math.inf).logsumexp(-1))
                rest = rest.masked_fill(masks[s], -math.inf)
            lses = [*parts, rest.logsumexp(-1)]
            log_w = cell_log_weights(lses, [*((s,) for s in owned[i]), ()], [(owned[i], _on_heads(edit, given))])
            total = log_w[-1].unsqueeze(-1).expand_as(scores)
            for place, inside in enumerate(inside_of):
                total = torch.where(inside, log_w[place].unsqueeze(-1), total)
            scores = scores + total
        if call.sinks is not None:
            sink = call.sinks.to(dtype)[None, :, None, None].expand(scores.shape[0], -1, stop - start, 1)
            p = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
        else:
            p = torch.softmax(scores.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0), -1)
        blocks.append(torch.matmul(p, v).to(call.q.dtype))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()


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
        mask = call.seen.block(0, n_q) if call.seen.kind == "blocks" else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=call.seen.kind == "causal", scale=call.scale, enable_gqa=call.groups > 1
        )
        return out[..., :width].transpose(1, 2).contiguous()
    bias = log_w[None, :, :, None].to(score_dtype(q)) * members.to(score_dtype(q)).transpose(1, 2)[:, None]
    out, lse = attend_tiled(
        q, k, v, mask=call.seen.block(0, n_q) if call.seen.kind == "blocks" else None,
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
