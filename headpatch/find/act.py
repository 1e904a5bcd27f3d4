"""Calibration of ACT: in which heads the sinks of a prompt should get less attention.

The paper tries one head at a time at beta 0.4 and keeps every head with which accuracy rises: hundreds of heads, thousands of
prompts each, and no test. Here the heads that show no sink on any row are left out first (the edit could not change them), the rest
is screened on few rows and the promising third goes on to more; the best heads are then combined, both as lists (the paper's way)
and by the shared search, and rows that took no part decide.

Source: Yu et al., arXiv 2406.15765. The paper leaves out the first two layers and the last; give ``layers`` for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headpatch.find.engine import Bench
from headpatch.find.measure import Sample
from headpatch.find.search import Candidate
from headpatch.find.subject import Subject, efforts
from headpatch.registry import get_method

__all__ = ["EFFORTS", "Act", "sink_heads"]

TOP = (5, 10, 20, 40)


@dataclass(frozen=True)
class Act(Subject):
    """ACT with the parameters that its patch will have (threshold, threshold_per, keep_first, min_queries)."""

    method: str = "act"

    @property
    def words(self) -> str:
        return "ACT"

    @property
    def directions(self) -> tuple[str, str]:
        return "", "help when their sinks get less attention"

    def prune(self, candidates: list[Candidate], bench: Bench, samples: Sequence[Sample]) -> list[Candidate]:
        """Without the heads that have no sink on any of the rows."""
        found = sink_heads(bench, samples, dict(self.params))
        return [c for c in candidates if "*" in c.selector or c.selector in found]

    def vary(self, candidate: Candidate) -> list[Candidate]:
        """The same head at a weaker and a stronger beta."""
        if candidate.strength <= 0:
            return [candidate.at(0.2)]
        return [candidate.at(round(candidate.strength**power, 3)) for power in (0.5, 2.0)]


def sink_heads(bench: Bench, samples: Sequence[Sample], params: dict[str, Any] | None = None) -> dict[str, float]:
    """Heads with a sink, by the rule that the method applies, on at least one row: the share of rows on which they have one.

    Parameters
    ----------
    params
        Parameters of the method that are not at their defaults.
    """
    method: Any = get_method("act")(**(params or {}))
    passages = list({p.ids[: p.prompt]: p for s in samples for p in s.questions.passages}.values())
    count: dict[str, int] = {}
    for passage, means in zip(passages, bench.observed("column_means", passages), strict=True):
        tokens = len(passage.ids[: passage.prompt])
        bound = method.threshold / tokens if method.threshold_per == "prompt_length" else method.threshold
        first, last = int(method.keep_first), tokens - method.min_queries + 1  # key k is seen by tokens - k queries
        for head, values in means.items():
            if bool((values[first : max(first, last)] > bound).any()):
                count[head] = count.get(head, 0) + 1
    return {head: n / len(passages) for head, n in count.items()}


EFFORTS = efforts((0.4,), (0.0, 0.2, 0.4, 0.7), slopes=0.25, indices=False, top=TOP)
"""Beta 0.4 is the published one."""
