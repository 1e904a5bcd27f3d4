"""The self-check's part about edits of attention to segments: one of two rows has a marked span, in all heads that may be edited, or
all but one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headpatch.adapters.vllm.plan import RowEdit
from headpatch.adapters.vllm.running import Running
from headpatch.adapters.vllm.segment_numbers import numbers
from headpatch.adapters.vllm.tables import NOBODY, Slot
from headpatch.errors import EngineError
from headpatch.methods.base import MassMethod, strength
from headpatch.operands import Segment

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch
    from headpatch.adapters.vllm.worker import Worker

__all__ = ["Marked"]


@dataclass(frozen=True)
class _Weighted(MassMethod):
    """Multiply attention to the spans by `weight`."""

    weight: float = strength(1.0, help="factor")

    constant: ClassVar[bool] = True

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("spans"),)

    def weights(self, strength: Tensor) -> Tensor:
        return strength[:, None]


class Marked:
    """An edit of the first row's attention to `span`, in the spare slot while the context is open."""

    span = (2, 7)

    def __init__(self, worker: Worker, patch: LayerPatch, spare: int, generator: torch.Generator) -> None:
        self.worker, self.patch, self.spare = worker, patch, spare
        self.weight = torch.rand(patch.num_heads, generator=generator) * 2.5 + 0.3
        heads = patch.segment_heads()
        heads = heads[1:] if len(heads) == patch.num_heads else heads  # one stays as it is
        beside = torch.ones(patch.num_heads, dtype=torch.bool)
        beside[heads] = False
        self.weight[beside] = 1.0
        self.beside = beside
        self.edits = [RowEdit(_Weighted(), heads, self.weight[heads])] if len(heads) else []

    def __enter__(self) -> None:
        tables = self.worker.tables
        assert tables is not None
        tables.slots[self.spare] = Slot(
            "self-check", True, segments={(self.patch.index, self.patch.start): self.edits}
        )
        # Of the prompt's length nothing here depends.
        self.worker.batch = [Running(self.spare, 1, (self.span,)), Running(NOBODY, 1)]
        if tables.numbers is not None and self.worker.ranges is not None:
            self._mine(tables.numbers).copy_(numbers(self.edits, self.patch.num_heads))
            self.worker.ranges.order(self.worker.batch)

    def __exit__(self, *_: object) -> None:
        tables = self.worker.tables
        assert tables is not None
        tables.slots[self.spare] = None
        if tables.numbers is not None:
            self._mine(tables.numbers).zero_()
        self.worker.batch = []

    def _mine(self, table: Tensor) -> Tensor:
        start = self.patch.start
        return table[self.patch.index, self.spare, start : start + self.patch.num_heads]

    def check_bits(self, untouched: Tensor, edited: Tensor, rows: int) -> None:
        """The heads and the row that are not edited keep every bit, and the others do not."""
        beside = self.beside.to(edited.device)
        same = torch.equal(untouched[:, beside], edited[:, beside]) and torch.equal(untouched[rows:], edited[rows:])
        if not same or (self.edits and torch.equal(untouched, edited)):
            raise EngineError(
                f"headpatch's self-check failed in layer {self.patch.index}: an edit of a span "
                f"{'changes nothing' if same else 'changes other rows or heads'}"
            )
