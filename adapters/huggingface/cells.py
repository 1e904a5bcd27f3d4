"""Attention with edited masses of any segments: a kernel pass per cell of keys, or weights in the keys.

* :func:`by_key_bias`: constant weights on one set of keys where there is no mask, as extra head dimensions.
* :func:`by_cells`: anything else in the mass family. One kernel pass per cell of intersected segments, merged by log-sum-exp; or,
  where there is no mask, one pass for the cells' shares and one with each row's weights in the keys; or, where the segments were
  found on the heads' attention itself, what is left of it.

On a GPU it is the host's launches that take time here: tensors are small, and what can be said in one call is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import attend_last, repeat_kv, score_dtype
from headpatch.adapters.huggingface.mass import BLOCK, Call, of_heads, unedited
from headpatch.adapters.huggingface.plan import Edit
from headpatch.methods.base import MassMethod
from headpatch.scores import edit_attention, on_heads
from headpatch.segments import cell_log_weights, cells, in_numbers, merge, new_shares, numbers_for, partition

__all__ = ["OperandsAt", "Owned", "Segments", "biased_keys_suit", "by_cells", "by_key_bias", "few_suit",
           "is_small", "plainly", "spares_queries"]  # fmt: skip

Segments = Callable[[int, int], list[Tensor]]
"""Masks of the segments that a plan's edits name, for queries start..stop, each broadcastable to [b, H, q, n]."""
Owned = tuple[tuple[int, ...], ...]
"""Per edit, its segments' places in what a :data:`Segments` returns."""
OperandsAt = Callable[[Edit, int, int], dict[str, Any]]
"""What an edit's method asked for, for queries start..stop."""

SEGMENTS = 4
"""So many have 16 cells at most, and kernels do not become too wide."""
SMALL = 1 << 25
"""Up to so many numbers of attention a GPU waits for the host: fewer launches are then better than less work."""


def by_cells(
    call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt, since: int = 0
) -> Tensor:
    """Attention with any mass edits; `owned` lists, per edit, its segments' places in what `segments` returns.

    No edit acts on queries before `since`: those need no more than the ordinary kernel. Where one edit names few of the heads, all
    heads take that once, and its cells run for those heads alone.
    """
    few = len(edits) == 1 and (len(owned[0]) + 1) * len(edits[0].heads) <= len(owned[0]) * call.q.shape[1]
    heads = edits[0].heads if few else None
    some = call if heads is None else of_heads(call, heads)
    n_q, n_k, sinks = call.q.shape[2], call.seen.keys, some.sinks
    if since >= n_q:
        return unedited(call).transpose(1, 2).contiguous()
    if len(edits) == 1 and (p := call.attention_of(edits[0].heads)) is not None:
        return _on_attention(call, edits[0], p, segments(0, n_q), operands(edits[0], 0, n_q))
    k, v = some.k[:, :, :n_k], some.v[:, :, :n_k]  # what is behind are unwritten slots of a static cache
    everywhere = len(edits[0].heads) == some.q.shape[1]
    conserves = len(edits) == 1 and isinstance(edits[0].method, MassMethod) and edits[0].method.conserves
    if _ones_suit(some, masks := [_rows_of(s, heads) for s in segments(0, 1)]):
        since = 0 if heads is not None else since
        given = [on_heads(e, operands(e, since, n_q), everywhere) for e in edits]
        out = _in_two_passes(some, masks, owned, given, conserves, since)
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
            blocks.append(_reshared(outputs, torch.stack(lses), given[0], conserves))
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
    every = plainly(call)
    return every.index_copy(1, heads, out) if torch.is_grad_enabled() else every.index_copy_(1, heads, out)


def plainly(call: Call) -> Tensor:
    """[b, H, q, d] of the ordinary kernel, by the shortest way to it."""
    n = call.seen.keys
    return (
        _attend(call.q, call.k[:, :, :n], call.v[:, :, :n], call.scale) if biased_keys_suit(call) else unedited(call)
    )


def _on_attention(call: Call, edit: Edit, p: Tensor, masks: list[Tensor], operands: dict[str, Any]) -> Tensor:
    """[b, q, H, d] from the attention `p` of the edit's heads, [b, h, q, n]."""
    masks = [_rows_of(mask, edit.heads)[..., : p.shape[-1]] for mask in masks]
    v = of_heads(call, edit.heads).v[:, :, : p.shape[-1]]
    out = torch.matmul(edit_attention(p, [(edit, masks, operands)], dtype=v.dtype), v)
    return _among(call, edit.heads if len(edit.heads) < call.q.shape[1] else None, out).transpose(1, 2).contiguous()


def spares_queries(call: Call) -> bool:
    """Whether it is worth asking the device which queries of a prompt are edited at all."""
    return call.q.is_cuda and not is_small(call) and biased_keys_suit(call)


def is_small(call: Call) -> bool:
    """Whether the host takes longer to launch this call's work than a GPU to do it."""
    b, heads, n_q = call.q.shape[:3]
    return call.q.is_cuda and b * heads * n_q * call.seen.keys <= SMALL


def _reshared(outputs: list[Tensor], lses: Tensor, reshare: Callable[[Tensor], Tensor], conserves: bool) -> Tensor:
    """Cells merged with the shares that a single edit gives them: what :func:`headpatch.segments.merge` does, with fewer calls.

    `lses` is [C, b, H, q], the cells in the order in which the edit's method gets its shares.
    """
    lses = lses.masked_fill(torch.isneginf(lses).all(0), 0.0)  # rows that see no key
    shares = new_shares(torch.softmax(lses, 0), reshare, conserves).unsqueeze(-1)
    merged = outputs[0] * shares[0]  # mixed dtypes are cast inside the kernels
    for o, share in zip(outputs[1:], shares[1:], strict=True):
        merged = torch.addcmul(merged, o, share)
    return merged.to(outputs[0].dtype)


def _ones_suit(call: Call, masks: list[Tensor]) -> bool:
    """Whether :func:`_in_two_passes` can take these segments: the same for all queries, and for all query heads of a KV head."""
    alike = all(m.shape[2] == 1 and m.shape[1] in (1, call.k.shape[1]) for m in masks)
    return alike and len(masks) <= SEGMENTS and 2 ** len(masks) <= call.v.shape[-1] and biased_keys_suit(call)


def _in_two_passes(
    call: Call, masks: list[Tensor], owned: Owned, given: list[Callable[[Tensor], Tensor]], conserves: bool, since: int
) -> Tensor:
    """[b, H, q, d] under edits of segments for which :func:`_ones_suit` holds, none of which acts on queries before `since`.

    `conserves` is what a single edit's method says of itself.

    The first pass is for the cells' shares: they are what ones add up to that stand for a cell's keys in place of values. The second
    has the logarithms of each row's weights in head dimensions of their own, so that nothing is left to be merged.
    """
    n, width, dtype = call.seen.keys, call.q.shape[-1], score_dtype(call.q)
    inside: list[tuple[int, ...]] = []
    if len(given) > 1:
        inside, members = (list(x) for x in zip(*cells(masks), strict=True))
    else:
        members = [masks[i] for i in owned[0]]
        members.append(~members[0] if len(members) == 1 else torch.ones_like(members[0]))  # the rest: in none of them
    count = len(members)
    # A key that lies in two segments of one edit belongs to the first.
    if len(given) == 1 and count == 2:
        of_key = members[1].long()
    else:
        of_key = torch.stack(torch.broadcast_tensors(*members)).view(torch.uint8).argmax(0)
    of_key = of_key[..., :n].transpose(-1, -2)
    parts = numbers_for(call.q.dtype)
    more = count * parts + -(width + count * parts) % 8  # kernels like aligned heads
    q, k, v = call.q[:, :, since:], call.k[:, :, :n], call.v[:, :, :n]
    # Kernels like values that lie one after the other.
    ones = torch.zeros_like(v, memory_format=torch.contiguous_format)
    ones.scatter_(-1, of_key.expand(*v.shape[:3], 1), 1.0)
    rest = more - count * parts
    flags, blank = ones[..., :count], ones[..., count : count + rest]
    if blank.shape[-1] < rest:  # very narrow heads
        blank = ones.new_zeros(()).expand(*ones.shape[:-1], rest)

    masses = _attend(q, k, ones, call.scale)[..., :count].to(dtype).movedim(-1, 0)
    before = masses / masses.sum(0)
    least = math.log(torch.finfo(dtype).tiny) / call.scale  # stands for the logarithm of zero, which no kernel takes
    if len(given) == 1:
        ratio = new_shares(before, given[0], conserves) / before
        log_w = torch.xlogy(1 / call.scale, ratio).nan_to_num_(0.0, 0.0, least)
    else:
        log_w = cell_log_weights(list(before.log()), inside, list(zip(owned, given, strict=True)))
        log_w = log_w.masked_fill(torch.isneginf(log_w + before.log()).all(0), 0.0)  # such a row stays as it is
        log_w = (log_w / call.scale).clamp_min(least)
    found = in_numbers(log_w.movedim(0, -1), q.dtype)
    q = torch.cat([q, *found, q[..., :1].expand(*q.shape[:-1], rest)], -1)  # the last columns meet zeros
    # By itself first: copies of whole keys are quick where all parts lie one after the other. What comes of v's additions is cut off.
    extra = torch.cat([*[flags] * parts, blank], -1)
    k, v = torch.cat([k, extra], -1), torch.cat([v, extra], -1)
    out = _attend(q, k, v, call.scale)[..., :width]
    if not since:
        return out
    before_it = _attend(call.q[:, :, :since], call.k[:, :, :since], call.v[:, :, :since], call.scale)
    return torch.cat([before_it, out], 2)


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
    """The ordinary kernel, for all queries of a causal prompt, the last of them, or for one that sees every key."""
    if 1 < q.shape[2] < k.shape[2]:
        return attend_last(q, k, v, scale)[0]
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


def few_suit(call: Call, heads: Tensor) -> bool:
    """Whether :func:`by_key_bias` does better by these heads alone, beside the ordinary kernel for all, than by all heads."""
    return 2 * len(heads) <= call.q.shape[1] and not is_small(call)


def by_key_bias(call: Call, heads: Tensor | None, columns: Tensor, keys: Tensor) -> Tensor:
    """Attention with constant weights of these heads (None: all) on some keys, where :func:`biased_keys_suit` holds.

    One pass of the ordinary kernel over queries and keys that are some numbers wider, instead of a masked one for each cell.

    Parameters
    ----------
    columns
        [h, e] from :meth:`LayerPlan.bias_columns`.
    keys
        [b or 1, 1, n, 1], ones and zeros in the keys' dtype.
    """
    some = call if heads is None else of_heads(call, heads)
    width, n, more = call.q.shape[-1], call.seen.keys, columns.shape[1]
    q, k, v = some.q, some.k[:, :, :n], some.v[:, :, :n]
    q, k = _wider(q, columns[:, None], more), _wider(k, keys[:, :, :n], more)
    # What comes of v's additions is cut off.
    out = _attend(q, k, _wider(v, v[..., :1], more), call.scale)[..., :width]
    return _among(call, heads, out).transpose(1, 2).contiguous()


def _rows_of(mask: Any, heads: Tensor | None) -> Any:
    """A mask [b, 1 or H, ...] of these heads."""
    return mask if mask is None or heads is None or mask.shape[1] == 1 else mask.index_select(1, heads)


def _and(mask: Tensor | None, cell: Tensor) -> Tensor:
    if mask is None:
        return cell
    if mask.dtype == torch.bool:
        return mask & cell
    return torch.where(cell, mask, torch.finfo(mask.dtype).min)
