"""Attention with edited masses of any segments: a kernel pass per cell of keys, or one with weights in the keys.

* :func:`by_key_bias`: constant weights on one set of keys where there is no mask, as extra head dimensions.
* :func:`by_cells`: anything else in the mass family. One kernel pass per cell of intersected segments, merged by log-sum-exp.

On a GPU it is the host's launches that take time here: tensors are small, and what can be said in one call is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import queries_at_once
from headpatch.adapters.huggingface.mass import BLOCK, Call, of_heads, unedited
from headpatch.adapters.huggingface.plan import Edit
from headpatch.scores import on_heads
from headpatch.segments import cell_log_weights, cells, merge

__all__ = ["OperandsAt", "Owned", "Segments", "biased_keys_suit", "by_cells", "by_key_bias"]

Segments = Callable[[int, int], list[Tensor]]
"""Masks of the segments that a plan's edits name, for queries start..stop, each broadcastable to [b, H, q, n]."""
Owned = tuple[tuple[int, ...], ...]
"""Per edit, its segments' places in what a :data:`Segments` returns."""
OperandsAt = Callable[[Edit, int, int], dict[str, Any]]
"""What an edit's method asked for, for queries start..stop."""


def by_cells(call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt) -> Tensor:
    """Attention with any mass edits; `owned` lists, per edit, its segments' places in what `segments` returns.

    Where one edit names few of the heads, all heads take the ordinary kernel once, and its cells run for those heads alone.
    """
    few = len(edits) == 1 and (len(owned[0]) + 1) * len(edits[0].heads) <= len(owned[0]) * call.q.shape[1]
    heads = edits[0].heads if few else None
    some = call if heads is None else of_heads(call, heads)
    n_q, n_k, sinks = call.q.shape[2], call.seen.keys, some.sinks
    k, v = some.k[:, :, :n_k], some.v[:, :, :n_k]  # what is behind are unwritten slots of a static cache
    blocks, start = [], 0
    hiding = _Hiding.of(some, [_rows_of(s, heads) for s in segments(0, 1)], owned)
    at_once = queries_at_once(call.q, BLOCK, some.q[:, :, 0].numel())
    while start < n_q:
        if hiding is not None:
            stop = min(n_q, start + at_once)
            inside, outputs, lses = hiding.rows(start, stop)
        else:
            masks = [_rows_of(s, heads) for s in segments(start, min(n_q, start + BLOCK))]
            per_head = max(m.shape[1] for m in masks)
            stop = min(n_q, start + max(64, BLOCK // per_head))  # a mask per head takes that many times the memory
            masks = [s[..., : stop - start, :n_k] for s in masks]
            mask = _rows_of(call.seen.block(start, stop), heads)
            found = _partition(masks, owned[0]) if len(edits) == 1 else cells(masks)
            inside = [names for names, _ in found]
            pairs = [call.attend(some.q[:, :, start:stop], k, v, _and(mask, cell)) for _, cell in found]
            outputs, lses = [o for o, _ in pairs], torch.stack([lse for _, lse in pairs])
        given = [on_heads(e, operands(e, start, stop), everywhere=len(e.heads) == some.q.shape[1]) for e in edits]
        if len(edits) == 1 and sinks is None:
            blocks.append(_reshared(outputs, lses, given[0], blind=hiding is None))
        else:
            parts = list(lses if hiding is None else lses.masked_fill(lses < hiding.limit, -math.inf))
            if sinks is not None:  # a key of value zero, in no segment
                outputs = [*outputs, torch.zeros_like(outputs[0])]
                parts.append(sinks.to(lses)[:, None].expand_as(parts[0]))
                inside = [*inside, ()]
            log_w = cell_log_weights(parts, inside, list(zip(owned, given, strict=True)))
            blocks.append(merge(outputs, parts, log_w))
        start = stop
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return _among(call, heads, out).transpose(1, 2).contiguous()


def _among(call: Call, heads: Tensor | None, out: Tensor) -> Tensor:
    """Outputs of some heads among those of the ordinary kernel; of all where `heads` is None."""
    if heads is None:
        return out
    every = unedited(call)
    return every.index_copy(1, heads, out) if torch.is_grad_enabled() else every.index_copy_(1, heads, out)


def _reshared(outputs: list[Tensor], lses: Tensor, reshare: Callable[[Tensor], Tensor], blind: bool) -> Tensor:
    """Cells merged with the shares that a single edit gives them: what :func:`headpatch.segments.merge` does, with fewer calls.

    `lses` is [C, b, H, q], the cells in the order in which the edit's method gets its shares; `blind` where a row may see no key.
    """
    if blind:
        lses = lses.masked_fill(torch.isneginf(lses).all(0), 0.0)
    before = torch.softmax(lses, 0)
    # A segment without mass has no proportions to keep: nothing can be given to it. A row that sees nothing but emptied segments
    # stays as it is.
    after = reshare(before).masked_fill(before <= 0, 0.0)
    total = after.sum(0)
    tiny = torch.finfo(total.dtype).tiny
    shares = torch.where(total > 0, after / total.clamp_min(tiny), before).unsqueeze(-1)
    merged = outputs[0] * shares[0]  # mixed dtypes are cast inside the kernels
    for o, share in zip(outputs[1:], shares[1:], strict=True):
        merged = torch.addcmul(merged, o, share)
    return merged.to(outputs[0].dtype)


def biased_keys_suit(call: Call) -> bool:
    """Whether keys can be hidden or weighted in head dimensions of their own: no mask, and nothing that a wider kernel lacks."""
    grad = torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad or call.v.requires_grad)
    unmasked = (call.seen.kind == "causal" and call.q.shape[2] > 1) or (
        call.seen.kind == "all" and call.q.shape[2] == 1
    )
    return (
        unmasked and call.softcap is None and call.sinks is None and not grad and call.q.shape[-1] == call.v.shape[-1]
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
    out = torch.nn.functional.scaled_dot_product_attention(
        _wider(some.q, columns[:, None], more), _wider(some.k[:, :, :n], keys[:, :, :n], more),
        _wider(some.v[:, :, :n], some.v[:, :, :n, :1], more),  # (what comes of these is cut off)
        is_causal=call.q.shape[2] > 1, scale=call.scale, enable_gqa=some.groups > 1,
    )[..., :width]  # fmt: skip
    return _among(call, heads if few else None, out).transpose(1, 2).contiguous()


class _Hiding:
    """Cells of a call without a mask, each by one pass of the ordinary kernel over all queries: keys outside the cell get numbers
    in head dimensions of their own that no softmax sees through. A mask would cost the kernel its speed.
    """

    def __init__(self, call: Call, inside: list[tuple[int, ...]], hidden: Tensor) -> None:
        """`hidden` [C, b, K or 1, n, 1] bool: keys outside of each cell; `inside` the segments that it lies in."""
        self.call, self.inside, n = call, inside, call.seen.keys
        far = -float(2 ** (15 if call.q.dtype == torch.float16 else 30))
        width = call.q.shape[-1]
        more = 8 - width % 8  # kernels like aligned heads
        causal = call.q.shape[2] > 1
        q = _wider(call.q, call.q.new_full((), far), more)
        v = _wider(call.v[:, :, :n], call.v[:, :, :n, :1], more)  # (what comes of these is cut off)
        k, flags = call.k[:, :, :n], hidden.to(call.k.dtype)
        pairs = [call.attend(q, _wider(k, f, more), v, None, causal=causal) for f in flags]
        self.outputs = [o[..., :width] for o, _ in pairs]
        self.lses = torch.stack([lse for _, lse in pairs])
        self.limit = far * call.scale / 2
        """Log-sum-exps below it stand for -inf. (To a softmax that sees a greater one they are that anyway.)"""

    @classmethod
    def of(cls, call: Call, masks: list[Tensor], owned: Owned) -> _Hiding | None:
        """None where a cell is not the same for all queries and for all query heads of a KV head."""
        alike = all(m.shape[2] == 1 and m.shape[1] in (1, call.k.shape[1]) for m in masks)
        if not alike or not biased_keys_suit(call):
            return None
        if len(owned) > 1:
            found = cells(masks)
            inside, hidden = (
                [names for names, _ in found],
                ~torch.stack(torch.broadcast_tensors(*[c for _, c in found])),
            )
        else:
            mine = torch.broadcast_tensors(*[masks[i] for i in owned[0]])
            inside = [*((i,) for i in owned[0]), ()]
            if len(mine) == 1:
                hidden = torch.stack([~mine[0], mine[0]])
            else:  # a key that lies in two belongs to the first; in none, to the rest
                of_cell = torch.stack([*mine, torch.ones_like(mine[0])]).to(torch.uint8).argmax(0)
                places = torch.arange(len(inside), device=of_cell.device).view(-1, 1, 1, 1, 1)
                hidden = of_cell != places
        b, n = call.q.shape[0], call.seen.keys
        hidden = hidden[..., :n].transpose(-1, -2)
        return cls(call, inside, hidden.expand(-1, b, -1, -1, -1))

    def rows(self, start: int, stop: int) -> tuple[list[tuple[int, ...]], list[Tensor], Tensor]:
        """(names of the cells, their outputs, their log-sum-exps) for some queries."""
        return self.inside, [o[:, :, start:stop] for o in self.outputs], self.lses[..., start:stop]


def _rows_of(mask: Any, heads: Tensor | None) -> Any:
    """A mask [b, 1 or H, ...] of these heads."""
    return mask if mask is None or heads is None or mask.shape[1] == 1 else mask.index_select(1, heads)


def _partition(masks: list[Tensor], named: tuple[int, ...]) -> list[tuple[tuple[int, ...], Tensor]]:
    """One cell per segment of a single edit, and the rest; a key that lies in two belongs to the first."""
    found, free = [], torch.ones((), dtype=torch.bool, device=masks[0].device)
    for i in named:
        found.append(((i,), masks[i] & free))
        free = free & ~masks[i]
    return [*found, ((), free)]


def _and(mask: Tensor | None, cell: Tensor) -> Tensor:
    if mask is None:
        return cell
    if mask.dtype == torch.bool:
        return mask & cell
    return torch.where(cell, mask, torch.finfo(mask.dtype).min)
