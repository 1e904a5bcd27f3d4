"""What a caller gives per row: spans, as token ranges of that row's unpadded prompt, numbers, and which rows a recipe is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError
from headpatch.spans import token_spans

__all__ = ["ChosenRows", "Spans", "row_numbers", "token_spans"]


@dataclass
class Spans:
    """Spans of one call: `ranges` per row, and [rows, width] bool that says which of a row's tokens lie in one."""

    ranges: list[list[tuple[int, int]]]
    inside: Tensor = field(repr=False)

    @classmethod
    def of(cls, ranges: list[list[tuple[int, int]]]) -> Spans:
        """The table of these ranges; its width is rounded up, so that compiled models see few of them."""
        widest = max((stop for row in ranges for _, stop in row), default=1)
        inside = torch.zeros(len(ranges), -(-widest // 128) * 128, dtype=torch.bool)
        for row, found in enumerate(ranges):
            for start, stop in found:
                inside[row, start:stop] = True
        return cls(ranges, inside)

    def on(self, device: torch.device) -> Tensor:
        """`inside` on a device, moved there once: every layer of every step asks, and CUDA graphs take no CPU tensor."""
        if torch.compiler.is_compiling():
            return self.inside.to(device)
        if self.inside.device != device:
            self.inside = self.inside.to(device)
        return self.inside


@dataclass
class ChosenRows:
    """Rows of one call that a recipe is for: `rows` as given, and the same as a [b] bool tensor."""

    rows: tuple[bool, ...]
    mask: Tensor = field(repr=False)

    @classmethod
    def of(cls, rows: Any) -> ChosenRows:
        """Raises HeadpatchError unless there is one boolean per row."""
        if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or not len(rows):
            raise HeadpatchError("rows: give a list with one entry per row, True where the recipe is to act")
        for row, value in enumerate(rows):
            if not isinstance(value, bool):
                raise HeadpatchError(f"rows[{row}] is {value!r}; give True or False for each row of the batch")
        return cls(tuple(rows), torch.tensor(rows))


def row_numbers(name: str, values: Any, least: int, or_none: bool = False) -> list[Any]:
    """One whole number per row, at least `least`, or None where that may be. Raises HeadpatchError that names the row."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise HeadpatchError(f"{name}: give a list with one number per row of the batch, as in [12, 7]")
    for row, value in enumerate(values):
        if not (
            (value is None and or_none) or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
        ):
            wanted = f"a whole number, at least {least}" + (", or None" if or_none else "")
            raise HeadpatchError(f"{name}[{row}] is {value!r}; give {wanted}")
    return list(values)
