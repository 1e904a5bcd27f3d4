"""The self-check's part about edits of attention to segments: one of two rows has a marked span, in all heads but one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headpatch.adapters.vllm.plan import RowEdit
from headpatch.adapters.vllm.running import Running
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
        self.weight[0] = 1.0
        heads = torch.arange(1, patch.num_heads)
        self.edits = [RowEdit(_Weighted(), heads, self.weight[1:])] if len(heads) else []

    def __enter__(self) -> None:
        tables = self.worker.tables
        assert tables is not None
        tables.slots[self.spare] = Slot(
            "self-check", True, segments={(self.patch.index, self.patch.start): self.edits}
        )
        # Of the prompt's length nothing here depends.
        self.worker.batch = [Running(self.spare, 1, (self.span,)), Running(NOBODY, 1)]

    def __exit__(self, *_: object) -> None:
        tables = self.worker.tables
        assert tables is not None
        tables.slots[self.spare] = None
        self.worker.batch = []

    def check_bits(self, untouched: Tensor, edited: Tensor, rows: int) -> None:
        """The head and the row that are not edited keep every bit, and the others do not."""
        same = torch.equal(untouched[:, 0], edited[:, 0]) and torch.equal(untouched[rows:], edited[rows:])
        if not same or (self.edits and torch.equal(untouched, edited)):
            raise EngineError(
                f"headpatch's self-check failed in layer {self.patch.index}: an edit of a span "
                f"{'changes nothing' if same else 'changes other rows or heads'}"
            )
