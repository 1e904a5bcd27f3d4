"""Profiling for PASTA: which heads make a model follow the spans that a caller marks, when they are steered towards them.

The paper steers one head at a time, ranks heads by the task's accuracy, and takes the best k: of one task (task-specific), or those
that are among the best k of every task (multi-task, :func:`common`). Here the ranking is the shared profile, with its tests; lists
of the best k are measured as they are, beside the combinations of the shared search, and rows that took no part decide.

Every row needs its marked spans: a field of the data with a piece of the prompt, or a list of pieces.

Source: Zhang et al., arXiv 2311.02262.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headpatch.errors import HeadpatchError
from headpatch.find.calibration import top
from headpatch.find.data import Task
from headpatch.find.search import Candidate, Effect
from headpatch.find.subject import Settings, Subject, efforts

__all__ = ["EFFORTS", "Pasta", "common"]

TOP = (5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Pasta(Subject):
    """PASTA with the parameters that its patch will have (target_mass, keep_first)."""

    method: str = "pasta"

    @property
    def words(self) -> str:
        return "PASTA"

    @property
    def directions(self) -> tuple[str, str]:
        return "", "help when they are steered towards the marked spans"

    def check(self, settings: Settings, task: Task) -> None:
        super().check(settings, task)
        if not task.span_fields:
            raise HeadpatchError(
                "this method steers towards marked spans: say which field of the rows holds them (span field)"
            )

    def vary(self, candidate: Candidate) -> list[Candidate]:
        """The same head steered less and more."""
        if candidate.strength <= 0:
            return [candidate.at(0.01), candidate.at(0.1)]
        return [candidate.at(round(candidate.strength**power, 5)) for power in (0.5, 2.0)]


def common(profiles: Iterable[Sequence[Effect]], size: int) -> list[str]:
    """Heads among the best `size` of every profile, one profile per task: the paper's multi-task list, in layer order."""
    lists = [{c.selector for c in top(effects, size)} for effects in profiles]
    if not lists:
        raise HeadpatchError("no profiles were given")
    return sorted(set.intersection(*lists), key=lambda s: tuple(map(int, s.split("."))))


EFFORTS = efforts((0.01,), (0.0, 0.01, 0.1, 0.3), slopes=0.25, indices=False, top=TOP)
"""Alpha 0.01 is the published one."""
