"""Block tables for heads that keep the first `sink` and the last `recent` tokens, for attention kernels that know neither.

The query at position i sees key p if p < sink or i - recent < p <= i. Kernels know sliding windows: the last w keys before a query,
as they come in its row. With w = sink + recent and the row's blocks in the order

    blocks of the window that end before the first query's own | sink blocks | the first query's block and all after it

that is the same set: between a query and the first key of its window lie the `sink` keys and `recent` of the window's. Attention does
not care about the order of keys (the rotary embedding is already in them), only that none comes after its query. Blocks between sinks
and window are left out, which is what lets the engine free them. The order holds for as many queries as fit before the window's first
key reaches the first query's block, ``recent - size + 1``; a longer chunk becomes several rows. So windows are exact for every query,
whatever chunks a prompt comes in, and keys in cached blocks do not depend on them either.

Rows that do not reach beyond ``sink + recent`` keep their tables as they are. Everything happens on the device, from lengths that are
there; cutting needs the numbers of queries, which the host has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headpatch.kernels.first_token import triton_available

__all__ = ["Cut", "Window", "arrange", "arrange_steps", "cut"]


@dataclass(frozen=True)
class Window:
    """What heads keep, in blocks of a kernel.

    Attributes
    ----------
    sink, recent
        Tokens; `sink` is a whole number of blocks, `recent` at least one block.
    size
        Tokens of a block.
    """

    sink: int
    recent: int
    size: int

    @property
    def span(self) -> int:
        """The sliding window that a kernel is given."""
        return self.sink + self.recent

    @property
    def limit(self) -> int:
        """Most queries of one row."""
        return self.recent - self.size + 1

    def most_keys(self, queries: int) -> int:
        """Upper bound of a row's keys, after rearrangement."""
        return self.span + self.size - 2 + min(queries, self.limit)


@dataclass(frozen=True)
class Cut:
    """A batch whose long rows became several.

    Attributes
    ----------
    row
        [v] int64, the row of the batch that each new row is a part of.
    offset, count
        [v] int32, where in that row's queries it begins, and how many it has.
    starts
        [v + 1] int32, where its queries begin in the batch.
    longest
        Most queries of a new row.
    """

    row: Tensor
    offset: Tensor
    count: Tensor
    starts: Tensor
    longest: int


def cut(starts: Tensor, limit: int) -> Cut:
    """Cut rows into parts of at most `limit` queries.

    Parameters
    ----------
    starts
        [rows + 1] on the host: where each row's queries begin.
    """
    counts = (starts[1:] - starts[:-1]).long()
    parts = ((counts + limit - 1) // limit).clamp(min=1)  # rows without queries stay: they pad a batch
    row = torch.repeat_interleave(torch.arange(len(counts)), parts)
    before = parts.cumsum(0) - parts
    offset = (torch.arange(len(row)) - before[row]) * limit
    count = torch.minimum(counts[row] - offset, torch.tensor(limit))
    begins = torch.cat([starts[:1].long(), starts[:1].long() + count.cumsum(0)])
    return Cut(row, offset.int(), count.int(), begins.int(), int(count.max()) if len(count) else 0)


def arrange(
    window: Window, table: Tensor, begin: Tensor, end: Tensor, columns: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Block table and lengths that a kernel with the sliding window ``window.span`` is given.

    Parameters
    ----------
    table
        [rows, blocks] by position, as the engine keeps it; entries between sinks and window may be anything.
    begin, end
        [rows] position of the first query, and one beyond the last query's.
    columns
        Blocks of the new table.
    out
        Where the result goes, [rows, columns] and [rows]; new tensors otherwise.

    Returns
    -------
    tuple
        Table [rows, columns] and lengths [rows]; entries beyond a row's length are some block of its own table.
    """
    sinks = window.sink // window.size
    first = ((begin - (window.recent - 1)).clamp(min=0) // window.size).clamp(min=sinks)  # the window's first block
    own = (begin // window.size).clamp(min=sinks)  # the first query's block
    before, gap = (own - first)[:, None], first - sinks
    j = torch.arange(columns, device=table.device, dtype=begin.dtype)
    at = torch.where(j < before, j + first[:, None], torch.where(j < before + sinks, j - before, j + gap[:, None]))
    at = at.clamp(max=table.shape[1] - 1).long()
    lengths = end - gap * window.size
    if out is None:
        return table.gather(1, at), lengths
    torch.gather(table, 1, at, out=out[0])
    out[1].copy_(lengths)
    return out


def arrange_steps(
    window: Window,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: tuple[Tensor, Tensor],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`arrange` for a batch of which no row is cut: one launch on a GPU.

    Parameters
    ----------
    starts, lengths
        [rows + 1] where each row's queries begin in the batch, and [rows] its keys, those of this step included; int32.
    out
        As in :func:`arrange`; how wide the table is says how many blocks are wanted.
    backend
        "triton" or "torch"; None picks.
    """
    rows, columns = out[0].shape
    if backend == "torch" or (backend is None and not triton_available(table.device)):
        begin = lengths - (starts[1 : rows + 1] - starts[:rows])
        return arrange(window, table, begin, lengths, columns, out)
    from headpatch.kernels import _triton_tables

    width = min(1024, max(32, 1 << (columns - 1).bit_length()))
    _triton_tables.arrange[rows, -(-columns // width)](
        table, starts, lengths, *out, table.shape[1], columns, window.sink // window.size, window.recent, window.size,
        table.stride(0), out[0].stride(0), BLOCK=width,
    )  # fmt: skip
    return out
