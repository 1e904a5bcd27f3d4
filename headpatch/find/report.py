"""Before and after, with intervals, and beside it what controls would have given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headpatch.find import stats
from headpatch.find.controls import calibrated, contextual_bias, fit_bias, random_combos
from headpatch.find.data import Task
from headpatch.find.engine import Outcome
from headpatch.find.measure import FIGURES, Figures, Sample, compare, figures, join
from headpatch.find.search import Combo, Evaluator

__all__ = ["Report", "percent", "report", "table"]


@dataclass(frozen=True)
class Report:
    """Figures on the evaluation rows.

    Attributes
    ----------
    rows
        Evaluation rows.
    before, after, difference
        Figures of the untouched and of the patched model, and their paired differences; the latter two None without a recipe.
    random
        The same edits on heads drawn at random: paired differences of each draw.
    bias
        Per control that only shifts label probabilities (``fitted logit bias``, ``contextual calibration``): accuracy over labels.
        Such a shift cannot change the other figures.
    """

    rows: int
    before: Figures
    after: Figures | None = None
    difference: Figures | None = None
    random: tuple[Figures, ...] = ()
    bias: dict[str, stats.Estimate] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For a recipe's provenance: shares in percent, with 95 % intervals."""
        found: dict[str, Any] = {
            "metric": "percent of rows, with 95 % intervals: " + "; ".join(FIGURES[n] for n in self.before.values),
            "rows_evaluated": self.rows, "baseline": self.before.plain(), "baseline_intervals": self.before.intervals(),
        }  # fmt: skip
        if self.after is not None and self.difference is not None:
            found |= {
                "patched": self.after.plain(), "patched_intervals": self.after.intervals(),
                "difference": self.difference_plain(), "difference_intervals": self._difference_intervals(),
            }  # fmt: skip
        controls: dict[str, Any] = {
            name: {"accuracy": round(100 * e.value, 2), "interval": [round(100 * e.low, 2), round(100 * e.high, 2)]}
            for name, e in self.bias.items()
        }
        if self.random:
            controls["random heads, difference"] = {n: self._random(n) for n in self.random[0].values}
        return found | {"controls": controls}

    def difference_plain(self) -> dict[str, float]:
        """Differences: points for shares, nats for entropy, percent for perplexity."""
        assert self.difference is not None
        return {n: _difference(n, e.value) for n, e in self.difference.values.items()}

    def _difference_intervals(self) -> dict[str, list[float]]:
        assert self.difference is not None
        return {n: [_difference(n, e.low), _difference(n, e.high)] for n, e in self.difference.values.items()}

    def _random(self, name: str) -> dict[str, Any]:
        values = [_difference(name, f.values[name].value) for f in self.random]
        return {
            "mean": round(sum(values) / len(values), 3),
            "lowest": min(values),
            "highest": max(values),
            "draws": len(values),
        }

    def lines(self) -> list[str]:
        """The report as a table in plain text."""
        columns: list[tuple[str, Figures | None]] = [("before", self.before), ("after", self.after)]
        made = table(columns, self.difference)
        if self.bias or self.random:
            made += ["", f"controls ({self.rows} rows)"]
        for name, e in self.bias.items():
            made.append(f"  {name:<24} accuracy {percent(e)}")
        if self.random:
            for name in self.random[0].values:
                r = self._random(name)
                made.append(
                    f"  random heads, {r['draws']} draws  {name} {r['mean']:+.2f} on average, "
                    f"{r['lowest']:+.2f} to {r['highest']:+.2f}"
                )
        return made


def report(
    evaluator: Evaluator, combo: Combo, sample: Sample, fitted_on: Sequence[Sample], task: Task, draws: int, seed: int,
    heads: Sequence[str] | None = None,
) -> Report:  # fmt: skip
    """Measure a combination and its controls on a sample.

    Parameters
    ----------
    fitted_on
        Training samples on which the logit bias is fitted; empty without training labels.
    draws
        Draws of random heads.
    heads
        Heads to draw from; default: all.
    """
    import torch

    base = evaluator.one((), sample, "untouched model on evaluation rows")
    bias: dict[str, stats.Estimate] = {}
    if bool((sample.gold >= 0).any()):
        shifts = {}
        if fitted_on:
            train = join([evaluator.one((), s, "untouched model") for s in fitted_on])
            shifts["fitted logit bias"] = fit_bias(train, torch.cat([s.gold for s in fitted_on]).tolist())
        shifts["contextual calibration"] = _contextual(evaluator, task)
        for name, shift in shifts.items():
            bias[name] = figures(calibrated(base, shift), sample).values["accuracy"]
    before = figures(base, sample)
    if not combo:
        return Report(sample.rows, before, bias=bias)
    after = evaluator.one(combo, sample, "the recipe on evaluation rows")
    shape = evaluator.bench.shape
    drawn = random_combos(combo, shape.parts[shape.main], draws, seed, heads)
    others = evaluator.many(drawn, sample, "random heads on evaluation rows")
    return Report(
        sample.rows, before, figures(after, sample), compare(after, base, sample),
        tuple(compare(o, base, sample) for o in others), bias,
    )  # fmt: skip


def _contextual(evaluator: Evaluator, task: Task) -> Any:
    import torch

    prompts = task.content_free()
    if task.chat:
        prompts = [evaluator.bench.chat(p) for p in prompts]
    questions = evaluator.bench.questions(prompts, list(task.labels.values()), special_tokens=not task.chat)
    sample = Sample("content-free", questions, torch.full((len(prompts),), -1))
    outcome: Outcome = evaluator.one((), sample, "content-free prompts", texts=False)
    return contextual_bias(outcome)


def percent(e: stats.Estimate) -> str:
    """``81.2 % [79.3, 82.9]``."""
    return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def table(columns: Sequence[tuple[str, Figures | None]], difference: Figures | None) -> list[str]:
    """Figures side by side, and their paired difference, in lines of plain text."""
    shown = [(head, f) for head, f in columns if f is not None]
    names = [n for n in FIGURES if any(n in f.values for _, f in shown)]
    rows = [["", *(head for head, _ in shown), *(["difference"] if difference else [])]]
    for name in names:
        cells = [_cell(name, f.values.get(name)) for _, f in shown]
        if difference:
            cells.append(_difference_cell(name, difference.values.get(name)))
        rows.append([name, *cells])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _cell(name: str, e: stats.Estimate | None) -> str:
    if e is None:
        return ""
    return percent(e) if name not in ("entropy", "perplexity") else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def _difference(name: str, value: float) -> float:
    return value if math.isnan(value) else round(value, 4) if name == "entropy" else round(100 * value, 2)


def _difference_cell(name: str, e: stats.Estimate | None) -> str:
    if e is None:
        return ""
    low, high, value = (_difference(name, x) for x in (e.low, e.high, e.value))
    unit = {"entropy": " nats", "perplexity": " %"}.get(name, " points")
    return f"{value:+.2f}{unit} [{low:+.2f}, {high:+.2f}]"
