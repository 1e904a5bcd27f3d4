"""The search that calibrations share: which of many small edits help, and which of them together.

1. :func:`profile` measures every candidate by itself, drops hopeless ones early, and counts a candidate as helping or hurting only
   if a paired test says so after correction for the number of candidates.
2. :func:`combine` (:mod:`headpatch.find.combine`) puts helping candidates together under constraints.

A method brings candidates (:class:`Candidate`): a recipe's patches come from them. Everything measured goes through an
:class:`Evaluator`, which keeps it in the work file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.find import stats
from headpatch.find.engine import Bench, Outcome, Passage
from headpatch.find.journal import Journal
from headpatch.find.measure import Goal, Sample, join
from headpatch.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Candidate", "Combo", "Effect", "Evaluator", "Progress", "patches_of", "profile", "slopes"]

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that tells nobody."""


@dataclass(frozen=True)
class Candidate:
    """One edit: a method on one selector, at one strength.

    Attributes
    ----------
    method, selector, strength
        As in a recipe.
    params
        Other keys of the patch, as sorted pairs.
    """

    method: str
    selector: str
    strength: float
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def place(self) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
        """What two candidates must not share in one combination."""
        return self.method, self.selector, self.params

    def at(self, strength: float) -> Candidate:
        """The same edit at another strength."""
        return dataclasses.replace(self, strength=strength)

    def __str__(self) -> str:
        return f"{self.selector}={self.strength:g}"


Combo = tuple[Candidate, ...]
"""Edits that are made together. Later ones override earlier ones where selectors overlap."""


def patches_of(combo: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A recipe's patches: one per method and parameters, selectors in the combo's order."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for c in combo:
        patch = found.setdefault((c.method, c.params), {"method": c.method, **dict(c.params), "heads": {}})
        patch["heads"].pop(c.selector, None)  # a selector that comes again is written where it comes last
        patch["heads"][c.selector] = c.strength
    return list(found.values())


@dataclass
class Evaluator:
    """Measures combinations, each once.

    Attributes
    ----------
    bench
        The model.
    texts
        Neutral texts, whose perplexity must be kept.
    journal
        Where measurements are kept.
    progress
        Told after each measurement.
    """

    bench: Bench
    texts: tuple[Passage, ...]
    journal: Journal
    progress: Progress = silent

    def many(self, combos: Sequence[Combo], sample: Sample, what: str, texts: bool = True) -> list[Outcome]:
        """Outcomes of combinations on a sample, in order; the empty combination is the model as it is."""
        recipes = [Recipe.from_dict({"headpatch": 1, "patches": patches_of(c)}) if c else None for c in combos]
        keys = [f"{sample.name}{'+texts' if texts else ''}|{r.digest if r else ''}" for r in recipes]
        open_ = [i for i, key in enumerate(keys) if self.journal.get(key) is None and key not in keys[:i]]
        done = len(combos) - len(open_)
        self.progress(what, done, len(combos))
        run = (
            self.bench.run([recipes[i] for i in open_], sample.questions, self.texts if texts else ()) if open_ else ()
        )
        for place, outcome in run:
            self.journal.put(keys[open_[place]], outcome)
            done += 1
            self.progress(what, done, len(combos))
        return [self._known(key) for key in keys]

    def one(self, combo: Combo, sample: Sample, what: str, texts: bool = True) -> Outcome:
        """The outcome of one combination."""
        return self.many([combo], sample, what, texts)[0]

    def confirm(self, sample: Sample) -> None:
        """Measure the untouched model once more, if it was measured in an earlier run: its weights must still be the same.

        Raises HeadpatchError where it gives something else.
        """
        known = self.journal.get(f"{sample.name}+texts|") if self.journal.reused else None
        if known is None:
            return
        _, now = next(iter(self.bench.run([None], sample.questions, self.texts)))
        if float((now.first - known.first).abs().max()) > 1e-3:
            raise HeadpatchError(
                f"{self.journal.path}: was made with another model (or other weights) than this one; start afresh with another "
                "work file, or with --restart"
            )

    def _known(self, key: str) -> Outcome:
        found = self.journal.get(key)
        assert found is not None
        return found


@dataclass(frozen=True)
class Effect:
    """What one candidate does by itself.

    Attributes
    ----------
    candidate
        The edit.
    gain
        Change of the goal's metric with its 95 % interval, paired by row.
    accuracy
        Change of accuracy over labels, likewise; None where no row has a label.
    valid
        Change of the share of valid answers.
    log_perplexity
        Change of the neutral texts' log perplexity; 0 if it was not measured.
    p
        Of the gain being zero, corrected for the number of candidates.
    verdict
        +1 helps, -1 hurts, 0 nothing can be said.
    """

    candidate: Candidate
    gain: stats.Estimate
    accuracy: stats.Estimate | None
    valid: stats.Estimate
    log_perplexity: float
    p: float
    verdict: int


def profile(
    evaluator: Evaluator, candidates: Sequence[Candidate], samples: Sequence[Sample], goal: Goal, *, alpha: float = 0.05,
    shrink: float = 0.33, total: int | None = None,
) -> tuple[list[Effect], list[Outcome], Outcome]:  # fmt: skip
    """Measure every candidate by itself.

    Parameters
    ----------
    samples
        Successive samples: all candidates are measured on the first, and only the most promising share `shrink` of them on each next
        one. One sample means no halving.
    alpha
        Level of the test, after Benjamini and Hochberg's correction for *all* candidates, those that were dropped included.
    total
        How many candidates there were; more than `candidates` where some were dropped before.

    Returns
    -------
    tuple
        Effects of the candidates that were measured on all samples, their outcomes on all samples joined, and the untouched model's.
    """
    bases = [evaluator.one((), s, "untouched model") for s in samples]
    alive = list(range(len(candidates)))
    found: dict[int, list[Outcome]] = {i: [] for i in alive}
    for number, sample in enumerate(samples):
        last = number == len(samples) - 1
        what = f"single edits on {sample.rows} rows"
        # The texts do not depend on the sample: measured once, for those that are left at the end.
        for i, outcome in zip(
            alive, evaluator.many([(candidates[i],) for i in alive], sample, what, texts=last), strict=True
        ):
            found[i].append(outcome)
        if not last:
            base = join(bases[: number + 1])
            gold = _gold(samples[: number + 1])
            rank = {i: _promise(join(found[i]), base, gold, goal) for i in alive}
            keep = max(1, round(len(alive) * shrink))
            alive = sorted(sorted(alive, key=lambda i: -rank[i])[:keep])
    base, gold = join(bases), _gold(samples)
    outcomes = [join(found[i]) for i in alive]
    effects = _effects(
        [candidates[i] for i in alive], outcomes, base, samples, gold, goal, alpha, total or len(candidates)
    )
    return effects, outcomes, base


@dataclass(frozen=True)
class _Smooth:
    """The goal's differentiable form for some of a sample's rows."""

    goal: Goal
    gold: Tensor
    shares: Tensor

    def __call__(self, outcome: Outcome, rows: Sequence[int]) -> Tensor:
        return self.goal.smooth(outcome, self.gold[list(rows)], self.shares)


def slopes(
    evaluator: Evaluator, template: Candidate, selectors: Sequence[str], samples: Sequence[Sample], goal: Goal
) -> dict[str, float]:
    """How the goal's metric changes with each head's strength at the identity, per row: backward passes for all heads at once.

    Parameters
    ----------
    template
        The edit at its identity strength.
    selectors
        Single heads, ``layer.head``.
    """
    import torch

    every = [dataclasses.replace(template, selector=s) for s in selectors]
    recipe = Recipe.from_dict({"headpatch": 1, "patches": patches_of(every)})
    gold = _gold(samples)
    counts = torch.bincount(gold[gold >= 0], minlength=len(samples[0].questions.starts)).double()
    shares, total = counts / counts.sum().clamp_min(1), torch.zeros(len(selectors))
    for number, sample in enumerate(samples):
        evaluator.progress("slopes of all heads", number, len(samples))
        key = f"slopes|{sample.name}|{recipe.digest}"
        found = evaluator.journal.vector(key)
        if found is None:
            slope = evaluator.bench.slopes(recipe, sample.questions, _Smooth(goal, sample.gold, shares))
            found = torch.tensor([slope.get(s, 0.0) for s in selectors])
            evaluator.journal.keep(key, found)
        total += found
    return dict(zip(selectors, (total / max(1, len(gold))).tolist(), strict=True))


def _gold(samples: Sequence[Sample]) -> Tensor:
    import torch

    return torch.cat([s.gold for s in samples])


def _promise(outcome: Outcome, base: Outcome, gold: Tensor, goal: Goal) -> float:
    """Standardised gain: how sure an effect looks after few rows. Candidates that hurt are as hopeless as those that do nothing."""
    chosen = gold >= 0 if goal.metric != "entropy" else gold >= -1
    d = (goal.agreement(outcome, gold) - goal.agreement(base, gold)).double()[chosen]
    return float(d.mean() / (d.std() / max(d.numel(), 2) ** 0.5 + 1e-9)) if d.numel() > 1 else float(d.sum())


def _effects(
    candidates: Sequence[Candidate], outcomes: Sequence[Outcome], base: Outcome, samples: Sequence[Sample], gold: Tensor,
    goal: Goal, alpha: float, total: int,
) -> list[Effect]:  # fmt: skip
    groups = _templates(samples)
    labelled = _mean_rows(gold.double(), groups) >= 0 if goal.metric != "entropy" else None

    def rows(values: Tensor) -> Tensor:
        averaged = _mean_rows(values.double(), groups)
        return averaged if labelled is None else averaged[labelled]

    before = rows(goal.agreement(base, gold))
    valid = [_mean_rows(_valid(o), groups) for o in (base, *outcomes)]
    known = (_mean_rows(gold.double(), groups) >= 0).any()
    right = Goal("accuracy")
    gains = [rows(goal.agreement(o, gold)) for o in outcomes]
    p = stats.benjamini_hochberg([stats.normal_p(g, before) for g in gains], total)
    text = float(-base.text.double().mean()) if base.text.numel() else 0.0
    effects = []
    for i, (candidate, outcome) in enumerate(zip(candidates, outcomes, strict=True)):
        gain = stats.paired(gains[i], before)
        accuracy = None
        if known:
            mask = _mean_rows(gold.double(), groups) >= 0
            new, old = (_mean_rows(right.rows(o, gold), groups)[mask] for o in (outcome, base))
            accuracy = stats.paired(new, old)
        verdict = 0 if p[i] > alpha else (1 if gain.value > 0 else -1)
        nats = float(-outcome.text.double().mean()) - text if outcome.text.numel() else 0.0
        effects.append(Effect(candidate, gain, accuracy, stats.paired(valid[i + 1], valid[0]), nats, p[i], verdict))
    return effects


def _templates(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """(templates, flat rows) of each sample."""
    return [(s.templates, len(s.gold)) for s in samples]


def _mean_rows(values: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Flat values of several samples -> one value per row of data, templates averaged."""
    import torch

    parts = values.split([n for _, n in groups])
    return torch.cat([p.view(t, -1).mean(0) for p, (t, _) in zip(parts, groups, strict=True)])


def _valid(outcome: Outcome) -> Tensor:
    return (outcome.first.amax(-1) > outcome.other).double()


def strongest(effects: Iterable[Effect]) -> dict[str, Effect]:
    """Per selector, the effect with the smallest p-value."""
    best: dict[str, Effect] = {}
    for e in effects:
        if e.candidate.selector not in best or e.p < best[e.candidate.selector].p:
            best[e.candidate.selector] = e
    return best


def directions(effects: Iterable[Effect], identity: float) -> Mapping[str, str]:
    """Selectors that are effective, by what helps: ``up`` if a strength above the identity does, ``down`` if one below; ``both``."""
    found: dict[str, set[str]] = {}
    for e in effects:
        if e.verdict > 0:
            found.setdefault(e.candidate.selector, set()).add("up" if e.candidate.strength > identity else "down")
    return {s: "both" if len(d) == 2 else next(iter(d)) for s, d in found.items()}
