"""What a method brings to its calibration, and how a calibration searches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.find.data import Task
from headpatch.find.measure import Sample
from headpatch.find.search import Candidate
from headpatch.heads import select_heads
from headpatch.registry import get_method

if TYPE_CHECKING:
    from headpatch.find.engine import Bench
    from headpatch.heads import PartShape

__all__ = ["Settings", "Subject", "efforts"]


@dataclass(frozen=True)
class Settings:
    """How a calibration searches.

    Attributes
    ----------
    strengths
        Strengths that every candidate is tried at.
    metric, keep, perplexity
        As in :class:`headpatch.find.measure.Goal`.
    screen
        Rows that candidates are measured on, in stages; after each but the last only the most promising third goes on. The
        combination is searched on the same rows.
    held_out
        Training rows that the search does not see and that decide between its results; the rest of the training rows at most.
    indices
        Whether one head index in all layers is a candidate, too.
    layers
        Layers whose heads are candidates, as in a selector.
    top
        Sizes of lists of the best single edits that are combined as they are, whatever a test says of each of them.
    slopes
        Share of the candidates that are measured at all: those that promise the most by the slope of the metric in their strength,
        which one backward pass gives for all heads. 1 measures all.
    pool
        Candidates that may be combined, at most.
    width, rounds, fresh, max_steps
        As in :func:`headpatch.find.combine.combine`.
    random_draws
        Draws of random heads for the control.
    anyway
        Give the best combination even where held-out rows do not confirm it; it then says so.
    alpha
        Level of the tests.
    seed
        Of the split and the random heads.
    """

    strengths: tuple[float, ...]
    metric: str = "probability"
    keep: float = 0.01
    perplexity: float = 0.02
    screen: tuple[int, ...] = (300,)
    held_out: int = 1000
    indices: bool = True
    layers: str = "*"
    top: tuple[int, ...] = ()
    slopes: float = 1.0
    pool: int = 400
    width: int = 16
    rounds: int = 2
    fresh: int = 64
    max_steps: int = 40
    random_draws: int = 10
    anyway: bool = False
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in ("accuracy", "probability", "entropy"):
            raise HeadpatchError(f"no metric {self.metric!r}; choose accuracy, probability or entropy")
        if not self.screen or min(self.screen) < 1:
            raise HeadpatchError("screen needs at least one stage of at least one row")
        if not 0 < self.slopes <= 1:
            raise HeadpatchError(f"slopes is a share of the candidates, above 0 and at most 1; got {self.slopes}")
        if any(k < 1 for k in self.top):
            raise HeadpatchError(f"top takes numbers of edits, at least 1; got {list(self.top)}")


@dataclass(frozen=True)
class Subject:
    """What a method brings to its calibration.

    Attributes
    ----------
    method
        Its name.
    params
        Keys of the patch beside heads and strengths, as sorted pairs.
    """

    method: str
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def identity(self) -> float:
        """The strength that changes nothing."""
        return get_method(self.method).identity()

    @property
    def words(self) -> str:
        """What it is called in a recipe's description."""
        return self.method

    @property
    def directions(self) -> tuple[str, str]:
        """When heads help, in words, whose strength should be raised above the identity, and lowered below it."""
        return "help when it is raised", "help when it is lowered"

    def check(self, settings: Settings, task: Task) -> None:
        """Raise HeadpatchError where settings or task do not suit the method."""
        field = get_method(self.method).strength_field()
        assert field is not None
        low, high = (field.metadata[k] for k in ("ge", "le"))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        wrong = [s for s in settings.strengths if not (math.isfinite(s) and low <= s <= high) or s == self.identity]
        if wrong or not settings.strengths:
            raise HeadpatchError(
                f"{field.name} takes numbers of at least {low:g} and at most {high:g} other than {self.identity:g}, which changes "
                f"nothing; got {list(settings.strengths)}"
            )

    def candidates(self, part: PartShape, settings: Settings) -> list[Candidate]:
        """Edits to try: every head of the layers and, where settings say so, one head index in all layers."""
        chosen = select_heads([f"{settings.layers}.*"], part)
        selectors = [f"{layer}.{h}" for layer, heads in sorted(chosen.items()) for h in heads]
        if (
            settings.indices
            and settings.layers == "*"
            and len({part.num_heads[layer] for layer in part.softmax_layers()}) == 1
        ):
            selectors += [f"*.{h}" for h in range(max(part.num_heads))]
        return [Candidate(self.method, s, g, self.params) for s in selectors for g in settings.strengths]

    def prune(self, candidates: list[Candidate], bench: Bench, samples: Sequence[Sample]) -> list[Candidate]:
        """Those of the candidates that can change anything on the rows to search on; all of them where nobody can say."""
        return candidates

    def step(self, strength: float) -> float:
        """How far a strength is from the identity, on the scale on which effects are nearest to a straight line."""
        return strength - self.identity

    def vary(self, candidate: Candidate) -> list[Candidate]:
        """The same edit weaker and stronger, for a combination that has it already."""
        return []


def efforts(
    strengths: tuple[float, ...], thorough: tuple[float, ...] | None = None, slopes: float = 1.0, **more: Any
) -> Mapping[str, Settings]:
    """Settings by how long one is willing to wait: ``quick`` and ``standard`` are meant for a CPU, ``thorough`` is for a GPU.

    Parameters
    ----------
    strengths, thorough
        Strengths to try; more of them where there is a GPU.
    slopes
        Share of the candidates that are measured, by their slopes, where there is no GPU.
    more
        Other settings that the method wants otherwise than they are.
    """
    small = {"rounds": 1, "slopes": slopes, **more}
    return {
        "quick": Settings(strengths, screen=(24, 72), held_out=150, width=4, max_steps=8, random_draws=3, **small),
        "standard": Settings(
            strengths, screen=(60, 180), held_out=400, width=6, max_steps=16, random_draws=5, **small
        ),
        "thorough": Settings(thorough or strengths, screen=(600,), held_out=1400, **more),
    }
