"""Edits of attention to segments of keys, row by row of the batch: on CPUs.

The kernel attends for all rows as if there were no edit. For each row whose recipe has such an edit in the layer, its keys and values
are read back from the paged cache, the named heads attend again with their scores in the open, a block of queries at a time, and what
comes out takes the place of what the kernel wrote. All other rows and heads keep their bits, and pay nothing.

What segments are made of is known to the row alone: positions (spans, image placeholders, the prompt's length) came with the request;
column sinks are found when the prompt comes, which must then come in one step, and stay with the request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.errors import EngineError
from headpatch.scores import attention_of, edit_scores

if TYPE_CHECKING:
    from headpatch.adapters.vllm.cpu_keys import CpuKeys
    from headpatch.adapters.vllm.hook import LayerPatch
    from headpatch.adapters.vllm.plan import RowEdit
    from headpatch.adapters.vllm.running import Ranges, Running
    from headpatch.operands import Segment

__all__ = ["Row", "edit_segments"]

BLOCK = 256
"""Queries whose scores are held at once."""


def edit_segments(
    patch: LayerPatch, keys: CpuKeys, out: Tensor, query: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor
) -> None:  # fmt: skip
    """Put edited outputs in place of those that the kernel wrote, for rows and heads that have an edit.

    Parameters
    ----------
    out, query
        [T, H, d].
    cache, table
        [blocks, K, size, 2 d] and [rows, blocks of a row].
    starts, lengths
        [rows + 1] where each row's tokens begin, [rows] tokens of the row with this call's.
    """
    tables, place = patch.worker.tables, (patch.index, patch.start)
    assert tables is not None
    size = cache.shape[2]
    bounds, totals = starts.tolist(), lengths.tolist()
    for r, request in enumerate(patch.worker.batch[: len(totals)]):
        slot = tables.slots[request.slot] if request.slot >= 0 else None
        edits = slot.segments.get(place) if slot is not None else None
        here = slice(bounds[r], bounds[r + 1])
        if not edits or here.start == here.stop:
            continue
        heads = torch.cat([edit.heads for edit in edits]).unique()
        begin = totals[r] - (here.stop - here.start)
        # Blocks before the window belong to somebody else by now.
        low = max(0, begin - patch.window + 1) // size if patch.window else 0
        blocks = table[r, low : -(-totals[r] // size)].long()
        k, v = keys.read(cache, blocks, heads // (patch.num_heads // patch.num_kv_heads))
        n = totals[r] - low * size
        row = Row(patch, request, heads, query[here].index_select(1, heads), k[:, :n], v[:, :n], begin, low * size)
        out[here].index_copy_(1, heads, row.attend(edits).to(out.dtype))


@dataclass(frozen=True)
class _On:
    """An edit on heads that are numbered as a row has them."""

    method: Any
    heads: Tensor
    strength: Tensor


class Row:
    """One row of one layer: the heads that are edited, their queries, and what the row sees.

    Parameters
    ----------
    heads
        This rank's query heads that are edited, int64 [h], ascending.
    q, k, v
        [q, h, d], [h, n, d] and [h, n, d].
    begin, low
        Position of the first query and of the first key.
    """

    def __init__(
        self, patch: LayerPatch, request: Running, heads: Tensor, q: Tensor, k: Tensor, v: Tensor, begin: int, low: int
    ) -> None:  # fmt: skip
        self.patch, self.request, self.heads = patch, request, heads
        work = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = q.transpose(0, 1)[None].to(work), k[None].to(work), v[None].to(work)
        self.begin, self.low = begin, low
        self.keys = torch.arange(low, low + k.shape[1])
        sinks = getattr(patch.impl, "sinks", None)
        self.sinks = None if sinks is None else sinks.index_select(0, heads)

    def attend(self, edits: Sequence[RowEdit]) -> Tensor:
        """[q, h, d] of all queries under these edits."""
        segments = [[self.segment(s, edits) for s in edit.method.segments()] for edit in edits]
        local = [_On(e.method, torch.searchsorted(self.heads, e.heads), e.strength) for e in edits]
        blocks = []
        for start in range(0, self.q.shape[2], BLOCK):
            stop = min(self.q.shape[2], start + BLOCK)
            scores, _ = self.scores(start, stop)
            given = [
                (on, masks, self.operands(edit, start, stop))
                for on, masks, edit in zip(local, segments, edits, strict=True)
            ]
            blocks.append(torch.matmul(attention_of(edit_scores(scores, given), self.sinks), self.v))
        return torch.cat(blocks, 2)[0].transpose(0, 1)

    def scores(self, start: int, stop: int, heads: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of some queries, [1, h, q, n], -inf where a key is not seen; and which are, [q, n] bool."""
        q, k = self.q[:, :, start:stop], self.k
        if heads is not None:
            q, k = q.index_select(1, heads), k.index_select(1, heads)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.patch.scale
        if self.patch.softcap:
            scores = self.patch.softcap * torch.tanh(scores / self.patch.softcap)
        at = torch.arange(self.begin + start, self.begin + stop)[:, None]
        seen = self.keys <= at
        if self.patch.window:
            seen = seen & (at - self.keys < self.patch.window)
        return scores.masked_fill(~seen, -math.inf), seen

    def operands(self, edit: RowEdit, start: int, stop: int) -> dict[str, Any]:
        """What the edit's method asked for beside its segments, for queries start..stop."""
        position = torch.arange(self.begin + start, self.begin + stop)
        every = {
            "heads": edit.heads, "arrays": edit.arrays, "position": position[None],
            "prompt_len": torch.tensor([self.request.prompt]),
            "image_queries": _inside(position, self.request.images)[None],
        }  # fmt: skip
        return {name: every[name] for name in ("heads", *edit.method.needs)}

    def segment(self, segment: Segment, edits: Sequence[RowEdit]) -> Tensor:
        """Keys of a segment, [1, 1 or h, 1, n] bool."""
        kind, request = segment.kind, self.request
        if kind == "first_token":
            mask = self.keys == 0
        elif kind == "spans":
            mask = _inside(self.keys, request.spans)
        elif kind == "beside_spans":
            mask = (self.keys < request.prompt) & ~_inside(self.keys, request.spans) & bool(request.spans)
        elif kind == "image_tokens":
            mask = _inside(self.keys, request.images)
        elif kind == "column_sinks":
            mask = self.column_sinks(segment, edits)
        else:
            raise EngineError(f"layer {self.patch.index}: segment {kind!r} is not supplied")
        mask = mask.view(1, -1, 1, mask.shape[-1])
        for other in segment.minus:
            mask = mask & ~self.segment(other, edits)
        return mask

    def column_sinks(self, segment: Segment, edits: Sequence[RowEdit]) -> Tensor:
        """[h, n] keys of the prompt with a high mean attention, in the heads whose edits name the segment."""
        key = (self.patch.index, self.patch.start, segment.kind, *segment.options)
        if key not in self.request.kept:
            naming = [e.heads for e in edits if any(s.mentions(segment) for s in e.method.segments())]
            chosen = torch.searchsorted(self.heads, torch.cat(naming).unique())
            found = torch.zeros(len(self.heads), self.request.prompt, dtype=torch.bool)
            self.request.kept[key] = found.index_copy(0, chosen, self._high_columns(dict(segment.options), chosen))
        found = torch.nn.functional.pad(
            self.request.kept[key], (0, max(0, self.low + len(self.keys) - self.request.prompt))
        )
        return found[:, self.low : self.low + len(self.keys)]

    def _high_columns(self, options: dict[str, Any], heads: Tensor) -> Tensor:
        """[h, prompt] for these of the row's heads."""
        n = self.request.prompt
        if self.begin or self.q.shape[2] < n:
            raise EngineError(
                f"layer {self.patch.index}: operand 'column_sinks' needs the whole prompt in one step, and it came in chunks; "
                "this is a bug in headpatch, please report it"
            )
        total, count = torch.zeros(len(heads), n, dtype=self.q.dtype), torch.zeros(n, dtype=torch.long)
        sinks = None if self.sinks is None else self.sinks.index_select(0, heads)
        for start in range(0, n, BLOCK):  # queries of the prompt only: a step may hold more
            scores, seen = self.scores(start, min(n, start + BLOCK), heads)
            total += attention_of(scores, sinks)[0].sum(1)[:, :n]
            count += seen.sum(0)[:n]
        threshold = float(options["threshold"]) / (n if options.get("per_length") else 1)
        return (total / count.clamp_min(1) > threshold) & (count >= int(options.get("min_queries", 1)))


def _inside(positions: Tensor, ranges: Ranges) -> Tensor:
    found = torch.zeros(positions.shape, dtype=torch.bool)
    for start, stop in ranges:
        found |= (positions >= start) & (positions < stop)
    return found
