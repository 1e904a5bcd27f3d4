"""What one forward call adds to a cache that holds head groups: how many real tokens each row had and gets.

Worked out once a call, for all layers, from the model-level mask. Rows without padding (*even* rows) are treated together; with
padding, a prompt is treated row by row and a decoding step under masks. A cache keeps a :class:`Ledger` of what it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.kvplan import Policy
    from headpatch.adapters.huggingface.rows import Rows

__all__ = ["Chunk", "Ledger", "Span", "read_chunk"]

Columns = slice | Tensor


@dataclass(frozen=True)
class Span:
    """One row's real tokens in a call of several queries.

    Attributes
    ----------
    row
        The row.
    past, new
        Real tokens before this call, and in it.
    keys
        Their columns, those of earlier calls included: a slice, or int64 indices.
    queries
        Those of this call, counted from its first column.
    """

    row: int
    past: int
    new: int
    keys: Columns
    queries: Columns


@dataclass(frozen=True)
class Chunk:
    """One forward call.

    Attributes
    ----------
    past, queries
        Columns before this call, and in it; `past` is a tensor in a traced call.
    even
        Whether all columns of all rows are real tokens.
    spans
        Per row, for uneven rows, unless the call brings one token to each.
    real
        [b, past + queries] bool, for uneven rows.
    lengths
        Real tokens of each row before this call, int64 [b]; None for even rows.
    counts
        The same on the host; empty in a traced call.
    pads
        Columns in front of each row's first real token, [b]; None for even rows.
    """

    past: Any
    queries: int
    even: bool = True
    spans: tuple[Span, ...] = ()
    real: Tensor | None = None
    lengths: Tensor | None = None
    counts: tuple[int, ...] = ()
    pads: Tensor | None = None


@dataclass
class Ledger:
    """What the layers of one cache share.

    Attributes
    ----------
    policies
        Of its layers, by cache layer.
    chunk
        The call that is running.
    counts
        Real tokens of each row so far; empty while all rows are even.
    columns
        Columns so far.
    held, per_column
        Bytes that each layer has allocated, and bytes that an untouched layer would take for a column; by cache layer.
    """

    policies: dict[int, Policy] = field(default_factory=dict)
    chunk: Chunk | None = None
    counts: tuple[int, ...] = ()
    columns: int = 0
    held: dict[int, int] = field(default_factory=dict)
    per_column: dict[int, int] = field(default_factory=dict)

    def begin(self, chunk: Chunk) -> None:
        """A call starts."""
        self.chunk = chunk
        if isinstance(chunk.past, int):
            self.columns = chunk.past + chunk.queries
        if chunk.counts:
            fresh = [span.new for span in chunk.spans] or [1] * len(chunk.counts)
            self.counts = tuple(a + b for a, b in zip(chunk.counts, fresh, strict=True))

    def crop(self, columns: int) -> None:
        """The last `columns` were taken back."""
        self.columns -= columns
        self.counts = tuple(n - columns for n in self.counts)

    def choose(self, rows: Tensor) -> None:
        """The rows are now these of before."""
        if self.counts:
            self.counts = tuple(self.counts[i] for i in rows.tolist())

    def reset(self) -> None:
        """Nothing has been seen."""
        self.chunk, self.counts, self.columns = None, (), 0
        self.held.clear()

    @property
    def stored(self) -> int:
        """Bytes allocated for keys and values, spare slots included."""
        return sum(self.held.values())

    @property
    def untouched(self) -> int:
        """Bytes that the same tokens would take in an untouched cache, without spare slots."""
        return self.columns * sum(self.per_column.values())


def read_chunk(rows: Rows, mask: Any, counts: tuple[int, ...] = ()) -> Chunk:
    """Work out what a call adds.

    Parameters
    ----------
    mask
        The model-level mask of the call, as it was given.
    counts
        Real tokens of each row that the cache holds, where it holds padded rows.

    Raises
    ------
    EngineError
        The mask is not one of padding, or does not fit what the cache holds.
    """
    if torch.compiler.is_compiling():
        return _traced(rows)
    past, new = int(rows.past), rows.length
    real = rows.real
    if real is None:
        real = _from_dense(mask, past + new, bool(getattr(rows.cache, "is_compileable", False)))
    if real is None:
        if rows.first is not None and bool(rows.first.any()):
            raise EngineError(
                "position_ids pack several sequences into a row, which a cache policy cannot keep apart; give a batch with a mask"
            )
        if counts:
            raise EngineError("this cache was filled with padded rows: give their attention_mask in every call")
        return Chunk(past, new)
    if real.shape[1] != past + new:
        raise EngineError(
            f"attention_mask has {real.shape[1]} columns; the cache holds {past} and the call brings {new}: a cache policy needs "
            "the mask of all of them"
        )
    totals, fresh = torch.stack([real.sum(-1), real[:, past:].sum(-1)]).tolist()
    before = tuple(t - f for t, f in zip(totals, fresh, strict=True))
    if before != (counts or (past,) * len(before)):
        raise EngineError(
            "attention_mask names other tokens of earlier calls as real than it did then; what heads have dropped cannot come back"
        )
    if all(t == past + new for t in totals):
        return Chunk(past, new)
    pads = real.to(torch.uint8).argmax(-1)
    by_row = new > 1 or not all(fresh)
    spans = tuple(_span(real, row, past, before[row], fresh[row]) for row in range(len(real))) if by_row else ()
    return Chunk(past, new, False, spans, real, real[:, :past].sum(-1), before, pads)


def _traced(rows: Rows) -> Chunk:
    """In a traced call nothing is known on the host: what masks say becomes part of the graph."""
    if rows.first is not None and rows.first.ndim == 2:
        raise EngineError("packed rows under torch.compile do not go with a cache policy")
    if rows.real is None:
        return Chunk(rows.past, rows.length, even=rows.first is None, pads=rows.first)
    if rows.cache is not None and rows.length > 1:
        raise EngineError(
            "several tokens at once, a 2-D attention_mask, a static cache and torch.compile do not go together under a cache policy; "
            "prefill in an eager call, or let generate() make the masks"
        )
    before = torch.arange(rows.real.shape[1], device=rows.real.device) < rows.past
    return Chunk(rows.past, rows.length, False, (), rows.real, (rows.real & before).sum(-1), (), rows.first)


def _span(real: Tensor, row: int, past: int, before: int, new: int) -> Span:
    columns = real[row].nonzero().squeeze(-1)
    queries = columns[before:] - past
    return Span(row, before, new, _as_slice(columns), _as_slice(queries))


def _as_slice(index: Tensor) -> Columns:
    """Neighbouring columns as a slice, which needs no copy."""
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _from_dense(mask: Any, columns: int, static: bool) -> Tensor | None:
    """Real columns [b, columns] from the 4-D mask that generate() makes for static caches: those that the last query sees."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    if not static:
        raise EngineError(
            "a ready-made 4-D attention_mask does not say which tokens are real; under a cache policy give the 2-D mask"
        )
    last = mask[:, 0, -1, :columns]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
