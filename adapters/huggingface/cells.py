"""Attention with edited masses of any segments: a kernel pass per cell of keys, or weights in the keys.

* :func:`by_key_bias`: constant weights on one set of keys where there is no mask, as extra head dimensions.
* :func:`by_cells`: anything else in the mass family. One kernel pass per cell of intersected segments, merged by log-sum-exp; or,
  where there is no mask, one pass for the cells' shares and one with each row's weights in the keys.

On a GPU it is the host's launches that take time here: tensors are small, and what can be said in one call is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import repeat_kv, score_dtype
from headpatch.adapters.huggingface.mass import BLOCK, Call, of_heads, unedited
from headpatch.adapters.huggingface.plan import Edit
from headpatch.scores import on_heads
from headpatch.segments import cell_log_weights, cells, in_numbers, merge, new_shares, numbers_for, partition

__all__ = ["OperandsAt", "Owned", "Segments", "biased_keys_suit", "by_cells", "by_key_bias"]

Segments = Callable[[int, int], list[Tensor]]
"""Masks of the segments that a plan's edits name, for queries start..stop, each broadcastable to [b, H, q, n]."""
Owned = tuple[tuple[int, ...], ...]
"""Per edit, its segments' places in what a :data:`Segments` returns."""
OperandsAt = Callable[[Edit, int, int], dict[str, Any]]
"""What an edit's method asked for, for queries start..stop."""

SEGMENTS = 4
"""So many have 16 cells at most, and kernels do not become too wide."""


def by_cells(call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt) -> Tensor:
    """Attention with any mass edits; `owned` lists, per edit, its segments' places in what `segments` returns.

    Where one edit names few of the heads, all heads take the ordinary kernel once, and its cells run for those heads alone.
    """
    few = len(edits) == 1 and (len(owned[0]) + 1) * len(edits[0].heads) <= len(owned[0]) * call.q.shape[1]
    heads = edits[0].heads if few else None
    some = call if heads is None else of_heads(call, heads)
    n_q, n_k, sinks = call.q.shape[2], call.seen.keys, some.sinks
    k, v = some.k[:, :, :n_k], some.v[:, :, :n_k]  # what is behind are unwritten slots of a static cache
    everywhere = len(edits[0].heads) == some.q.shape[1]
    if _ones_suit(some, masks := [_rows_of(s, heads) for s in segments(0, 1)]):
        given = [on_heads(e, operands(e, 0, n_q), everywhere) for e in edits]
        out = _in_two_passes(some, masks, owned, given)
        return _among(call, heads, out).transpose(1, 2).contiguous()
    blocks, start = [], 0
    while start < n_q:
        masks = [_rows_of(s, heads) for s in segments(start, min(n_q, start + BLOCK))]
        per_head = max(m.shape[1] for m in masks)
        stop = min(n_q, start + max(64, BLOCK // per_head))  # a mask per head takes that many times the memory
        masks = [s[..., : stop - start, :n_k] for s in masks]
        mask = _rows_of(call.seen.block(start, stop), heads)
        if len(edits) == 1:
            inside, members = [*((i,) for i in owned[0]), ()], partition([masks[i] for i in owned[0]])
        else:
            inside, members = (list(x) for x in zip(*cells(masks), strict=True))
        pairs = [call.attend(some.q[:, :, start:stop], k, v, _and(mask, cell)) for cell in members]
        outputs, lses = [o for o, _ in pairs], [lse for _, lse in pairs]
        given = [on_heads(e, operands(e, start, stop), everywhere) for e in edits]
        if len(edits) == 1 and sinks is None:
            blocks.append(_reshared(outputs, torch.stack(lses), given[0]))
        else:
            if sinks is not None:  # a key of value zero, in no segment
                outputs.append(torch.zeros_like(outputs[0]))
                lses.append(sinks.to(lses[0])[:, None].expand_as(lses[0]))
                inside.append(())
            blocks.append(merge(outputs, lses, cell_log_weights(lses, inside, list(zip(owned, given, strict=True)))))
        start = stop
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return _among(call, heads, out).transpose(1, 2).contiguous()


def _among(call: Call, heads: Tensor | None, out: Tensor) -> Tensor:
    """Outputs of some heads among those of the ordinary kernel; of all where `heads` is None."""
    if heads is None:
        return out
    every = unedited(call)
    return every.index_copy(1, heads, out) if torch.is_grad_enabled() else every.index_copy_(1, heads, out)


def _reshared(outputs: list[Tensor], lses: Tensor, reshare: Callable[[Tensor], Tensor]) -> Tensor:
    """Cells merged with the shares that a single edit gives them: what :func:`headpatch.segments.merge` does, with fewer calls.

    `lses` is [C, b, H, q], the cells in the order in which the edit's method gets its shares.
    """
    lses = lses.masked_fill(torch.isneginf(lses).all(0), 0.0)  # rows that see no key
    shares = new_shares(torch.softmax(lses, 0), reshare).unsqueeze(-1)
    merged = outputs[0] * shares[0]  # mixed dtypes are cast inside the kernels
    for o, share in zip(outputs[1:], shares[1:], strict=True):
        merged = torch.addcmul(merged, o, share)
    return merged.to(outputs[0].dtype)


def _ones_suit(call: Call, masks: list[Tensor]) -> bool:
    """Whether :func:`_in_two_passes` can take these segments: the same for all queries, and for all query heads of a KV head."""
    alike = all(m.shape[2] == 1 and m.shape[1] in (1, call.k.shape[1]) for m in masks)
    return alike and len(masks) <= SEGMENTS and 2 ** len(masks) <= call.v.shape[-1] and biased_keys_suit(call)


def _in_two_passes(call: Call, masks: list[Tensor], owned: Owned, given: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """[b, H, q, d] under edits of segments for which :func:`_ones_suit` holds.

    The first pass is for the cells' shares: they are what ones add up to that stand for a cell's keys in place of values. The second
    has the logarithms of each row's weights in head dimensions of their own, so that nothing is left to be merged.
    """
    n, width, dtype = call.seen.keys, call.q.shape[-1], score_dtype(call.q)
    tiny = torch.finfo(dtype).tiny  # stands for a weight of zero, whose logarithm no kernel takes
    inside: list[tuple[int, ...]] = []
    if len(given) > 1:
        inside, members = (list(x) for x in zip(*cells(masks), strict=True))
    else:
        members = [masks[i] for i in owned[0]]
        members.append(~members[0] if len(members) == 1 else torch.ones_like(members[0]))  # the rest: in none of them
    count = len(members)
    # A key that lies in two segments of one edit belongs to the first.
    one_only = len(given) == 1 and count == 2
    of_key = members[1] if one_only else torch.stack(torch.broadcast_tensors(*members)).to(torch.uint8).argmax(0)
    of_key = of_key[..., :n].transpose(-1, -2)
    parts = numbers_for(call.q.dtype)
    more = count * parts + -(width + count * parts) % 8  # kernels like aligned heads
    k, v, zero = call.k[:, :, :n], call.v[:, :, :n], call.q.new_zeros(())
    # Kernels like values that lie one after the other.
    ones = (of_key == torch.arange(width, device=of_key.device)).to(v.dtype).expand_as(v).contiguous()

    masses = _attend(call.q, k, ones, call.scale)[..., :count].to(dtype).movedim(-1, 0)
    before = masses / masses.sum(0)
    flags = (of_key == torch.arange(more, device=of_key.device) % count).to(k.dtype)
    k, v = _wider(k, flags, more), _wider(v, zero, more)
    if len(given) == 1:
        log_w = (new_shares(before, given[0]) / before.clamp_min(tiny)).clamp_min(tiny).log()
    else:
        log_w = cell_log_weights(list(before.log()), inside, list(zip(owned, given, strict=True)))
        log_w = log_w.masked_fill(torch.isneginf(log_w + before.log()).all(0), 0.0)  # such a row stays as it is
        log_w = log_w.clamp_min(math.log(tiny))
    found = in_numbers((log_w / call.scale).movedim(0, -1), call.q.dtype)
    pad = zero.expand(*call.q.shape[:-1], more - count * parts)
    return _attend(torch.cat([call.q, *found, pad], -1), k, v, call.scale)[..., :width]


def biased_keys_suit(call: Call) -> bool:
    """Whether keys can be hidden or weighted in head dimensions of their own: no mask, and nothing that a wider kernel lacks."""
    grad = torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad or call.v.requires_grad)
    unmasked = (call.seen.kind == "causal" and call.q.shape[2] > 1) or (
        call.seen.kind == "all" and call.q.shape[2] == 1
    )
    stores_scores = call.q.is_cuda and call.q.dtype == torch.float64
    return (
        unmasked
        and not stores_scores
        and call.softcap is None
        and call.sinks is None
        and not grad
        and call.q.shape[-1] == call.v.shape[-1]
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The ordinary kernel, for all queries of a causal prompt or for one that sees every key."""
    groups = q.shape[1] // k.shape[1]
    # CUDA's kernel for it knows no groups; what is left stores all scores.
    if groups > 1 and q.is_cuda and q.dtype == torch.float32:
        k, v, groups = repeat_kv(k, groups), repeat_kv(v, groups), 1
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=groups > 1
    )


def _wider(x: Tensor, columns: Tensor, more: int) -> Tensor:
    """Append so many columns to x, [..., n, d], which `columns` is broadcast to."""
    return torch.cat([x, columns.expand(*x.shape[:-1], more)], -1)


def by_key_bias(call: Call, heads: Tensor, columns: Tensor, keys: Tensor) -> Tensor:
    """Attention with constant weights of these heads on some keys, where :func:`biased_keys_suit` holds.

    One pass of the ordinary kernel over queries and keys that are some numbers wider, instead of a masked one for each cell.

    Parameters
    ----------
    columns
        [h, e] from :meth:`LayerPlan.bias_columns`.
    keys
        [b or 1, 1, n, 1], ones and zeros in the keys' dtype.
    """
    few, width, n, more = 2 * len(heads) <= call.q.shape[1], call.q.shape[-1], call.seen.keys, columns.shape[1]
    some = of_heads(call, heads) if few else call
    if len(heads) < some.q.shape[1]:
        columns = columns.new_zeros(some.q.shape[1], more).index_copy(0, heads, columns)
    q, k, v = some.q, some.k[:, :, :n], some.v[:, :, :n]
    q, k = _wider(q, columns[:, None], more), _wider(k, keys[:, :, :n], more)
    # What comes of v's additions is cut off.
    out = _attend(q, k, _wider(v, v[..., :1], more), call.scale)[..., :width]
    return _among(call, heads if few else None, out).transpose(1, 2).contiguous()


def _rows_of(mask: Any, heads: Tensor | None) -> Any:
    """A mask [b, 1 or H, ...] of these heads."""
    return mask if mask is None or heads is None or mask.shape[1] == 1 else mask.index_select(1, heads)


def _and(mask: Tensor | None, cell: Tensor) -> Tensor:
    if mask is None:
        return cell
    if mask.dtype == torch.bool:
        return mask & cell
    return torch.where(cell, mask, torch.finfo(mask.dtype).min)
