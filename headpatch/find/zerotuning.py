"""Calibration of ZeroTuning: which heads should read more or less context for a task, and how strongly.

Two kinds of candidates are profiled: single heads (``12.3``), and one head index in all layers (``*.3``), the paper's form. Each
is tried at several gammas. The rest is the shared search (:mod:`headpatch.find.calibration`).

Source: Han et al., arXiv 2505.11739. The paper profiles head indices by the sign of an accuracy difference and edits the dominant
type; here a head counts only if a paired test says so, and both directions may be combined, under constraints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headpatch.find import calibration
from headpatch.find.calibration import Calibration
from headpatch.find.data import Row, Task
from headpatch.find.search import Candidate
from headpatch.find.subject import Settings, Subject, efforts

__all__ = ["EFFORTS", "SUBJECT", "Calibration", "Settings", "calibrate"]


@dataclass(frozen=True)
class _ZeroTuning(Subject):
    method: str = "zerotuning"

    @property
    def words(self) -> str:
        return "ZeroTuning"

    @property
    def directions(self) -> tuple[str, str]:
        return "help when they read less context", "help when they read more"

    def step(self, strength: float) -> float:
        """Gammas act by their logarithm; below 0.05 nothing much changes any more."""
        return math.log(max(strength, 0.05))

    def vary(self, candidate: Candidate) -> list[Candidate]:
        """The same head at a weaker and a stronger gamma, in the same direction."""
        if candidate.strength <= 0:
            return [candidate.at(0.1), candidate.at(0.2)]
        return [candidate.at(round(min(20.0, max(0.05, candidate.strength**power)), 3)) for power in (0.6, 1.5)]


SUBJECT = _ZeroTuning()
EFFORTS = efforts((0.4, 3.0), (0.3, 0.5, 2.0, 3.0, 5.0))


def calibrate(
    model: Any, tokenizer: Any, train: Sequence[Row], evaluation: Sequence[Row], task: Task, settings: Settings | None = None,
    **options: Any,
) -> Calibration:  # fmt: skip
    """Choose heads and gammas: :func:`headpatch.find.calibration.calibrate` for this method, by default with standard effort."""
    return calibration.calibrate(
        SUBJECT, model, tokenizer, train, evaluation, task, settings or EFFORTS["standard"], **options
    )
