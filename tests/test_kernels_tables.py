"""Windows with sinks out of kernels that know sliding windows only: block tables in another order, rows in parts; no engine."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import backends, device_of
from torch import Tensor

from headpatch.kernels.tables import Window, arrange, arrange_steps, cut

NOWHERE = 10**6
"""In a block table: a block that was given back. Whoever reads it, reads positions that nothing may see."""


def seen(window: Window, table: Tensor, length: int, queries: int) -> list[set[int]]:
    """Positions that each query sees if a kernel with a causal sliding window walks this table; a block's number is its position."""
    keys = [int(block) * window.size + i for block in table for i in range(window.size)][:length]
    first = length - queries
    return [set(keys[max(0, first + q + 1 - window.span) : first + q + 1]) for q in range(queries)]


def wanted(window: Window, position: int) -> set[int]:
    return {p for p in range(position + 1) if p < window.sink or p > position - window.recent}


def held(window: Window, blocks: int, begin: int) -> Tensor:
    """A row's table as the engine keeps it once it gave back all that queries from `begin` on do not need."""
    sinks, first = window.sink // window.size, max(0, begin - window.recent + 1) // window.size
    return torch.tensor([b if b < sinks or b >= first else NOWHERE for b in range(blocks)], dtype=torch.int32)


@pytest.mark.parametrize(
    ("sink", "recent", "size"), [(4, 4, 4), (4, 7, 4), (8, 9, 4), (2, 16, 2), (16, 5, 4), (3, 11, 1), (6, 8, 3)]
)
def test_every_query_sees_its_window(sink: int, recent: int, size: int) -> None:
    """All positions and chunk lengths of a row, with everything outside the window given back."""
    window = Window(sink, recent, size)
    for begin in range(3 * window.span):
        for queries in {1, 2, window.limit, window.limit + 1, 3 * window.limit + 2}:
            end = begin + queries
            table = held(window, -(-end // size), begin)
            parts = cut(torch.tensor([0, queries], dtype=torch.int32), window.limit)
            start = begin + parts.offset
            columns = min(-(-window.most_keys(parts.longest) // size), len(table))
            new, lengths = arrange(window, table[None][parts.row], start, start + parts.count, columns)
            for r in range(len(parts.row)):
                assert int(lengths[r]) <= window.most_keys(parts.longest)
                assert -(-int(lengths[r]) // size) <= columns
                found = seen(window, new[r], int(lengths[r]), int(parts.count[r]))
                assert found == [wanted(window, int(start[r]) + q) for q in range(len(found))]


def test_short_rows_keep_their_tables() -> None:
    """Nothing is rearranged in a row that begins inside its sinks, and rows without queries, which pad a batch, stay empty."""
    window = Window(32, 64, 16)
    table = torch.arange(100, 132, dtype=torch.int32).view(2, 16)
    begin, end = torch.tensor([20, 0], dtype=torch.int32), torch.tensor([30, 0], dtype=torch.int32)
    new, lengths = arrange(window, table, begin, end, 8)
    assert new.tolist() == table[:, :8].tolist()
    assert lengths.tolist() == [30, 0]


def test_results_go_where_they_are_wanted() -> None:
    """Captured graphs read fixed addresses."""
    window = Window(4, 8, 4)
    table = torch.arange(24, dtype=torch.int32).view(2, 12)
    begin, end = torch.tensor([40, 3], dtype=torch.int32), torch.tensor([41, 4], dtype=torch.int32)
    room, lengths = torch.full((5, 9), -1, dtype=torch.int32), torch.full((5,), -1, dtype=torch.int32)
    arrange(window, table, begin, end, 6, (room[:2, :6], lengths[:2]))
    plain = arrange(window, table, begin, end, 6)
    assert torch.equal(room[:2, :6], plain[0])
    assert lengths.tolist() == [*plain[1].tolist(), -1, -1, -1]
    assert int(room[2:].max()) == int(room[:, 6:].max()) == -1


def test_cutting() -> None:
    rng = random.Random(1)
    for _ in range(50):
        counts = [rng.choice([0, 1, 2, 7, 30]) for _ in range(rng.randrange(1, 6))]
        limit = rng.randrange(1, 12)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        parts = cut(starts, limit)
        assert parts.longest == int(parts.count.max()) <= limit
        assert parts.starts[0] == 0
        assert int(parts.starts[-1]) == sum(counts)
        assert torch.equal(parts.starts[1:] - parts.starts[:-1], parts.count)
        for r, count in enumerate(counts):
            mine = parts.row == r
            assert int(parts.count[mine].sum()) == count
            assert parts.offset[mine].tolist() == [i * limit for i in range(int(mine.sum()))]


@backends
@pytest.mark.parametrize("columns", [9, 40, 1500])
def test_a_step_in_one_launch(backend: str, columns: int) -> None:
    """The same as row by row, whatever lies around the tables; rows of padding too."""
    rng = random.Random(columns)
    window, rows, blocks = Window(8, 21, 4), 12, 1600
    generator = torch.Generator().manual_seed(columns)
    table = torch.randint(0, 10**6, (rows, blocks + 7), generator=generator, dtype=torch.int32)[:, :blocks]
    counts = [rng.randrange(1, window.limit + 1) for _ in range(rows - 2)] + [0, 0]
    lengths = [rng.randrange(count, 6000) for count in counts[:-2]] + [0, 0]
    starts, ends = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(lengths, dtype=torch.int32)
    device = device_of(backend)
    room, got = (
        torch.zeros(rows + 1, columns + 3, dtype=torch.int32, device=device),
        torch.zeros(rows + 1, dtype=torch.int32, device=device),
    )
    arrange_steps(
        window, table.to(device), starts.to(device), ends.to(device), (room[:rows, :columns], got[:rows]), backend
    )
    new, wanted_lengths = arrange(window, table, ends - torch.tensor(counts, dtype=torch.int32), ends, columns)
    assert torch.equal(room[:rows, :columns].cpu(), new)
    assert torch.equal(got[:rows].cpu(), wanted_lengths)
    assert int(room[rows:].abs().max()) == int(room[:, columns:].abs().max()) == int(got[rows:].abs().max()) == 0
