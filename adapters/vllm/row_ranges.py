"""Token ranges of the rows of a batch, at fixed addresses: what kernels know of spans and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from headpatch.kernels.paged_segments import RANGES

if TYPE_CHECKING:
    from headpatch.adapters.vllm.running import Ranges, Running

__all__ = ["MOST", "RowRanges", "ranges_needed"]

MOST = 512
"""Ranges of a request, spans and images together."""


class RowRanges:
    """Bounds of all rows' ranges, ascending, and where each row's are.

    Attributes
    ----------
    rows
        [rows, RANGES] int32; rows without a recipe are not read.
    bounds
        [any] int32.
    """

    def __init__(self, rows: int, requests: int, device: torch.device) -> None:
        self.rows = torch.zeros(rows, RANGES, dtype=torch.int32, device=device)
        self.bounds = torch.zeros(2 * MOST * requests + 1, dtype=torch.int32, device=device)

    def order(self, batch: Sequence[Running]) -> None:
        """Write the ranges of the rows of the next step."""
        rows, bounds = list[list[int]](), list[int]()
        for request in batch:
            row = []
            for ranges in (request.spans, request.images):
                found = _bounds(ranges)
                row += [len(bounds), len(found), len(found).bit_length()]
                bounds += found
            rows.append([*row, *[0] * (RANGES - len(row))])
        for table, values in ((self.rows, rows), (self.bounds, bounds)):
            if values:
                new = torch.tensor(values, dtype=torch.int32)
                new = new.pin_memory() if table.is_cuda else new
                table[: len(new)].copy_(new, non_blocking=True)


def _bounds(ranges: Ranges) -> list[int]:
    """Bounds of the union of some ranges, ascending."""
    found: list[int] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start <= found[-1]:
            found[-1] = max(found[-1], stop)
        else:
            found += [start, stop]
    return found


def ranges_needed(*ranges: Ranges) -> int:
    """How many ranges a request has once those that touch are one."""
    return sum(len(_bounds(found)) // 2 for found in ranges)
