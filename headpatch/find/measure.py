"""From what a model says to figures: accuracy over labels, unrestricted accuracy, valid answers, entropy, perplexity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headpatch.find import stats
from headpatch.find.engine import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.find.data import Row, Task
    from headpatch.find.engine import Bench, Questions

__all__ = ["FIGURES", "Figures", "Goal", "Sample", "compare", "figures", "join", "per_row", "sample"]

FIGURES = {
    "accuracy": "accuracy over labels: the right label is the likeliest of the labels",
    "unrestricted": "unrestricted accuracy: the right label's first token is the likeliest of the whole vocabulary",
    "valid": "valid answers: the likeliest token of the whole vocabulary begins a label",
    "entropy": "entropy of the next token, in nats",
    "perplexity": "perplexity of a neutral text",
}
"""What is reported before and after, with what it means."""


@dataclass(frozen=True)
class Sample:
    """Rows to measure on.

    Attributes
    ----------
    name
        Unique within a search; measurements are kept under it.
    questions
        The prompts of all templates, the first template's first: T x R rows.
    gold
        [T x R] int64, the right label's place; -1 where a row has none.
    templates
        T.
    """

    name: str
    questions: Questions
    gold: Tensor
    templates: int = 1

    @property
    def rows(self) -> int:
        """R, rows of data."""
        return len(self.gold) // self.templates


def sample(bench: Bench, name: str, rows: Sequence[Row], task: Task, required: bool = True) -> Sample:
    """Rows as a sample; `required` as in :meth:`headpatch.find.data.Task.gold`."""
    import torch

    prompts = task.prompts(rows)
    if task.chat:
        prompts = [bench.chat(p) for p in prompts]
    labels = list(task.labels.values())
    questions = bench.questions(prompts, labels, special_tokens=not task.chat, spans=task.spans(rows))
    gold = torch.tensor(task.gold(rows, required) * len(task.templates), dtype=torch.long)
    return Sample(name, questions, gold, len(task.templates))


@dataclass(frozen=True)
class Goal:
    """What a search maximises, and what it must keep.

    Attributes
    ----------
    metric
        ``accuracy``: the share of rows whose likeliest label is right. ``probability``: the right label's probability among the
        labels at a temperature, a smoother form of the same that needs fewer rows. ``entropy``: minus the next token's entropy; needs
        no labels.
    keep
        How far unrestricted accuracy and the share of valid answers may fall, as a fraction.
    perplexity
        How far the perplexity of neutral texts may rise, as a fraction.
    temperature
        Of ``probability``, in nats.
    """

    metric: str = "probability"
    keep: float = 0.01
    perplexity: float = 0.02
    temperature: float = 1.0

    def rows(self, outcome: Outcome, gold: Tensor) -> Tensor:
        """[..., R] what is maximised, per row; higher is better."""
        if self.metric == "entropy":
            return -outcome.entropy
        if self.metric == "accuracy":
            return _right(outcome.whole, gold)
        p = (outcome.whole / self.temperature).softmax(-1)
        return _take(p, gold)

    def agreement(self, outcome: Outcome, gold: Tensor) -> Tensor:
        """[R] what tests compare, per row: as :meth:`rows`, for ``probability`` less what agreement by chance would give.

        The mean probability of a label over all rows is taken off each row that has this label (as in Cohen's kappa). An edit that
        makes one label likelier everywhere then gains nothing by itself and adds little noise: only what goes with the right labels
        counts. Under labels in random order the expected change is zero.
        """
        if self.metric != "probability":
            return self.rows(outcome, gold)
        p = (outcome.whole / self.temperature).softmax(-1).double()
        labelled = gold >= 0
        return _take(p - p[labelled].mean(0), gold)

    def smooth(self, outcome: Outcome, gold: Tensor, shares: Tensor) -> Tensor:
        """[R] a differentiable value per row whose sum over all rows rises with :meth:`agreement`; 0 for rows without a label.

        `shares` [K]: how often each label is the right one, among all rows; what agreement by chance would gain is taken off.
        """
        if self.metric == "entropy":
            return -outcome.entropy
        p = (outcome.whole / self.temperature).softmax(-1)
        return (_take(p, gold) - (p * shares.to(p)).sum(-1)) * (gold >= 0)


def per_row(outcome: Outcome, gold: Tensor, templates: int = 1) -> dict[str, Tensor]:
    """Accuracy, unrestricted accuracy, valid answers and entropy of each row [R], templates averaged.

    Rows without a label (-1) are left out of the two accuracies.
    """
    best = outcome.first.amax(-1)
    valid = (best > outcome.other).double()
    unrestricted = valid * (_take(outcome.first, gold) >= best).double()
    labelled = (gold >= 0).view(templates, -1)[0]

    def mean(values: Tensor) -> Tensor:
        return values.double().view(templates, -1).mean(0)

    return {
        "accuracy": mean(_right(outcome.whole, gold))[labelled], "unrestricted": mean(unrestricted)[labelled],
        "valid": mean(valid), "entropy": mean(outcome.entropy),
    }  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """The figures of :data:`FIGURES` with 95 % intervals, by name; those that could not be measured are missing."""

    values: Mapping[str, stats.Estimate]

    def plain(self) -> dict[str, float]:
        """Rounded values for a recipe's provenance: shares in percent."""
        return {name: _rounded(name, e.value) for name, e in self.values.items()}

    def intervals(self) -> dict[str, list[float]]:
        """Rounded intervals, likewise."""
        return {name: [_rounded(name, e.low), _rounded(name, e.high)] for name, e in self.values.items()}


def figures(outcome: Outcome, sample: Sample) -> Figures:
    """All figures of one outcome."""
    found = {
        name: stats.estimate(values)
        for name, values in per_row(outcome, sample.gold, sample.templates).items()
        if values.numel()
    }
    if outcome.text.numel():
        nats = stats.estimate(-outcome.text)
        found["perplexity"] = _through(math.exp, nats)
    return Figures(found)


def compare(after: Outcome, before: Outcome, sample: Sample) -> Figures:
    """Paired differences with 95 % intervals; of perplexity, the ratio minus one."""
    new, old = (per_row(o, sample.gold, sample.templates) for o in (after, before))
    found = {name: stats.paired(new[name], old[name]) for name in new if new[name].numel()}
    if after.text.numel() and before.text.numel():
        nats = stats.paired(-after.text, -before.text)
        found["perplexity"] = _through(math.expm1, nats)
    return Figures(found)


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of several samples as one; the texts' are those of the last that has any."""
    import torch

    fields = {f.name: [getattr(o, f.name) for o in outcomes] for f in dataclasses.fields(Outcome) if f.name != "text"}
    text = next((o.text for o in reversed(outcomes) if o.text.numel()), outcomes[-1].text)
    return Outcome(**{name: torch.cat(parts) for name, parts in fields.items()}, text=text)


def stack(outcomes: Iterable[Outcome]) -> Outcome:
    """Outcomes of C recipes on the same rows, with a leading dimension C."""
    import torch

    outcomes = list(outcomes)
    return Outcome(
        **{f.name: torch.stack([getattr(o, f.name) for o in outcomes]) for f in dataclasses.fields(Outcome)}
    )


def _through(function: Callable[[float], float], e: stats.Estimate) -> stats.Estimate:
    """An estimate and its interval through a rising function."""
    return stats.Estimate(function(e.value), function(e.low), function(e.high), e.rows)


def _right(whole: Tensor, gold: Tensor) -> Tensor:
    return (_take(whole, gold) >= whole.amax(-1)).double()


def _take(values: Tensor, gold: Tensor) -> Tensor:
    """Values [..., R, K] at gold [R]: [..., R]. Rows without a label give their first entry; nobody may look at it."""
    index = gold.clamp_min(0)[:, None].expand(*values.shape[:-1], 1)
    return values.gather(-1, index)[..., 0]


def _rounded(name: str, value: float) -> float:
    if math.isnan(value):
        return value
    return (
        round(value, 3 if name in ("entropy", "perplexity") else 5)
        if name in ("entropy", "perplexity")
        else round(100 * value, 2)
    )
