"""Attention of a layer whose KV heads keep different tokens: each group with a fused kernel, results put back in head order.

A prompt's streaming queries are cut into blocks: a block of B queries sees the sinks and a window of ``recent - 1 + B`` keys, the
same band in every block, so that many blocks are one kernel call over a longer batch. Cost is linear in the prompt, and nothing
of the size queries x keys is stored. In a decoding step every slot is visible: no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface import kvring, mass
from headpatch.adapters.huggingface.kvparts import Kept, Part, Window, pick, tail
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import FirstKey

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.kvplan import Policy

__all__ = ["attend_groups", "attend_slices", "plain"]

QUERIES = (128, 512)
"""Least and most queries in a block of a streaming prompt."""
FOLDED = 8192
"""Queries whose blocks run in one kernel call: bounds the copies of their windows."""

Run = Callable[[mass.Call], Tensor]
"""From one attention call to outputs [b, q, h, d]."""


Group = Callable[[Tensor, Tensor, Tensor, Visible, FirstKey], Tensor]
"""Attention of one group's queries, [b, q, h, d]."""


def _group(run: Run, scale: float, softcap: float | None, sinks: Tensor | None) -> Group:
    """What all calls of one group share: how to run them, and their scale, soft-capping and learned sinks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, first: FirstKey) -> Tensor:
        return run(mass.Call(q, k, v, seen, scale, softcap, sinks, first))

    return attend


def attend_groups(
    policy: Policy, query: Tensor, kept: Kept, scale: float, softcap: float | None, sinks: Tensor | None,
    runs: tuple[Run, Run],
) -> Tensor:  # fmt: skip
    """Attention over what each group keeps.

    Parameters
    ----------
    query
        [b, H, q, d].
    sinks
        [H] learned sink logits, where the model has them.
    runs
        How calls of the full and of the streaming group are run.

    Returns
    -------
    Tensor
        [b, q, H, d]; zeros for padding.
    """
    order = policy.query_order(query.device)
    if order is not None:
        query, sinks = query.index_select(1, order), None if sinks is None else sinks.index_select(0, order)
    middle = len(policy.full) * policy.groups
    groups = [
        _group(run, scale, softcap, None if sinks is None else sinks[at])
        for run, at in zip(runs, (slice(0, middle), slice(middle, None)), strict=True)
    ]
    out: Any = None
    for bundle in kept.bundles:
        q = query if bundle.row is None else query[bundle.row : bundle.row + 1, :, bundle.queries]
        pieces = []
        if bundle.full is not None:
            pieces.append(_part(groups[0], q[:, :middle], bundle.full))
        if isinstance(bundle.streaming, Part):
            pieces.append(_part(groups[1], q[:, middle:], bundle.streaming))
        elif bundle.streaming is not None:
            pieces.append(_window(groups[1], policy, q[:, middle:], bundle.streaming))
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        if bundle.row is None:
            out = found
            continue
        if out is None:
            out = found.new_zeros(query.shape[0], query.shape[2], *found.shape[2:])
        out[bundle.row, bundle.queries] = found[0]
    if out is None:  # a call of nothing but padding
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], kept.v.shape[-1])
    back = policy.output_order(query.device)
    return out if back is None else out.index_select(2, back)


def attend_slices(
    query: Tensor, kept: Kept, scale: float, softcap: float | None, sinks: Tensor | None,
    run_of: Callable[[tuple[int, ...]], Run],
) -> Tensor:  # fmt: skip
    """As :func:`attend_groups`, where each row's heads have been chosen for; `run_of` says how calls of some query heads are run."""
    b, heads, n_q = query.shape[:3]
    out: Any = None
    for piece in kept.slices:
        q = pick(pick(query, 0, piece.rows), 1, piece.queries)
        its_sinks = None if sinks is None else pick(sinks, 0, piece.queries)
        found = _part(_group(run_of(piece.heads), scale, softcap, its_sinks), q, piece.part)
        if piece.rows is None and piece.queries is None:
            return found
        if out is None:
            out = found.new_empty(b, n_q, heads, found.shape[-1])
        rows, queries = piece.rows, piece.queries
        if isinstance(rows, Tensor) and isinstance(queries, Tensor):
            out[rows[:, None], :, queries] = found.transpose(1, 2)
        elif isinstance(rows, Tensor):
            pick(out, 2, queries).index_copy_(0, rows, found)
        elif isinstance(queries, Tensor):
            pick(out, 0, rows).index_copy_(2, queries, found)
        else:
            pick(pick(out, 0, rows), 2, queries).copy_(found)
    return out


def _part(group: Group, q: Tensor, part: Part) -> Tensor:
    return group(q, part.k, part.v, part.seen, part.first)


def _window(group: Group, policy: Policy, q: Tensor, window: Window) -> Tensor:
    """A streaming group's queries at positions past..stop."""
    head = min(max(policy.window - window.past, 0), q.shape[2])
    pieces = []
    if head:
        # Positions below sink + recent: nothing has been dropped yet, these see all that is before them.
        stop = window.past + head
        k, v = (
            x[:, :, : stop - window.start] if window.start == 0
            else torch.cat([sinks[:, :, : window.start], x[:, :, : stop - window.start]], 2)
            for sinks, x in ((window.sink_k, window.k), (window.sink_v, window.v))
        )  # fmt: skip
        pieces.append(group(q[:, :, :head], k, v, tail(window.past, head, q.device), FirstKey()))
    at, left = window.past + head, q.shape[2] - head
    size = min(max(QUERIES[0], 1 << max(policy.recent - 1, 0).bit_length()), QUERIES[1])
    blocks = left // size
    for first in range(0, blocks, max(1, FOLDED // size)):
        count = min(blocks - first, max(1, FOLDED // size))
        pieces.append(_blocks(group, policy, q, window, at + first * size, size, count))
    if left % size:
        pieces.append(_blocks(group, policy, q, window, at + blocks * size, left % size, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _blocks(group: Group, policy: Policy, q: Tensor, window: Window, at: int, size: int, count: int) -> Tensor:
    """`count` blocks of `size` queries from position `at` on, one row of a longer batch each; [b, count * size, h, d]."""
    b = q.shape[0]
    length = policy.recent - 1 + size
    start = at - policy.recent + 1 - window.start
    keys = []
    for sinks, x in ((window.sink_k, window.k), (window.sink_v, window.v)):
        span = x[:, :, start : start + (count - 1) * size + length]
        views = span.unfold(2, length, size).permute(0, 2, 1, 4, 3)  # [b, count, h, length, d]
        sink = sinks[:, None].expand(-1, count, -1, -1, -1)
        keys.append(torch.cat([sink, views], 3).flatten(0, 1))
    mine = q[:, :, at - window.past : at - window.past + count * size]
    mine = mine.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    band = kvring.band(size, policy.sink, policy.recent, q.device)
    seen = Visible("blocks", size, band.shape[-1], q.device, lambda i, j: band[:, :, i:j])
    first = FirstKey(torch.zeros(b * count, dtype=torch.long, device=q.device))
    out = group(mine, keys[0], keys[1], seen, first)
    return out.unflatten(0, (b, count)).flatten(1, 2)


def plain(call: mass.Call) -> Tensor:
    """Attention without an edit, [b, q, h, d]."""
    if call.seen.kind == "causal":
        call = replace(call, k=call.k[:, :, : call.q.shape[2]], v=call.v[:, :, : call.q.shape[2]])
    return mass.unedited(call).transpose(1, 2)
