"""Measuring what a recipe does on labelled or on generated answers: with it, without it, and the paired difference.

Labelled rows are compared by the probabilities of their labels (:class:`headpatch.find.data.Task`), rows with an ``answer`` by
what the model writes. Nothing is chosen here; :mod:`headpatch.find` does that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.find import stats
from headpatch.find.data import Row, Task, fill, spans_of
from headpatch.find.engine import open_bench
from headpatch.find.measure import Figures, compare, figures, sample
from headpatch.find.neutral import PASSAGES
from headpatch.find.report import table
from headpatch.show import short
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["Evaluation", "Generated", "evaluate_answers", "evaluate_labels", "matches"]


@dataclass(frozen=True)
class Generated:
    """One row of :func:`evaluate_answers`: the prompt, accepted answers, and what the model wrote without and with the recipe."""

    prompt: str
    answers: tuple[str, ...]
    before: str
    after: str | None


@dataclass(frozen=True)
class Evaluation:
    """Figures without a recipe, with it, and their paired differences, all with 95 % intervals; the latter two None without a recipe.

    Attributes
    ----------
    rows
        Rows of data.
    generated
        What was written, for generated answers.
    p
        Exact McNemar p-value of the accuracy difference; None without a recipe, or with several templates, whose rows are means.
    """

    rows: int
    before: Figures
    after: Figures | None
    difference: Figures | None
    p: float | None = None
    generated: tuple[Generated, ...] = ()

    def lines(self) -> list[str]:
        """As a table in plain text."""
        made = [f"{self.rows} rows; 95 % intervals, differences paired by row"]
        made += table([("untouched", self.before), ("patched", self.after)], self.difference)
        return made if self.p is None else [*made, f"accuracy: exact McNemar p = {self.p:.2g}"]

    def plain(self) -> dict[str, Any]:
        """For JSON: values as fractions, not percent."""

        def of(found: Figures | None) -> Any:
            if found is None:
                return None
            return {
                n: {"value": e.value, "low": e.low, "high": e.high, "rows": e.rows} for n, e in found.values.items()
            }

        made: dict[str, Any] = {
            "rows": self.rows, "confidence": 0.95, "untouched": of(self.before), "patched": of(self.after),
            "difference": of(self.difference), "mcnemar_p": self.p,
        }  # fmt: skip
        if self.generated:
            made["generated"] = [
                {"prompt": g.prompt, "answers": list(g.answers), "untouched": g.before, "patched": g.after}
                for g in self.generated
            ]
        return made


def evaluate_labels(
    model: Any, tokenizer: Any, recipe: Recipe | Mapping[str, Any] | str | None, rows: Sequence[Row], task: Task
) -> Evaluation:
    """Accuracy over labels, unrestricted accuracy, valid answers, entropy, and perplexity of the shipped neutral text.

    Parameters
    ----------
    recipe
        Anything that :func:`headpatch.load_recipe` takes; None measures the untouched model alone.

    Raises
    ------
    HeadpatchError
        A row or the recipe does not fit; the message names file and line, or the recipe's key.
    """
    bench, recipes = open_bench(model, tokenizer), [None] if recipe is None else [None, load_recipe(recipe)]
    asked = sample(bench, "evaluation", rows, task)
    gold = asked.gold
    found = dict(bench.run(recipes, asked.questions, bench.texts(PASSAGES)))
    before = figures(found[0], asked)
    if recipe is None:
        return Evaluation(asked.rows, before, None, None)
    right = [(o.whole.gather(1, gold[:, None])[:, 0] >= o.whole.amax(1)).double() for o in (found[1], found[0])]
    p = stats.normal_p(*right) if asked.templates == 1 else None
    return Evaluation(asked.rows, before, figures(found[1], asked), compare(found[1], found[0], asked), p)


def evaluate_answers(
    model: Any, tokenizer: Any, recipe: Recipe | Mapping[str, Any] | str | None, rows: Sequence[Row], template: str, *,
    answer_field: str = "answer", match: str = "contains", max_new_tokens: int = 32, chat: bool = False,
    span_fields: Sequence[str] = (),
) -> Evaluation:  # fmt: skip
    """Share of rows whose greedy continuation matches the row's answer.

    Parameters
    ----------
    template
        The prompt, with ``{field}`` for a row's field.
    answer_field
        The field that holds the answer: a text, a number, or a list of texts, any of which counts.
    match
        As in :func:`matches`.
    span_fields
        As in :class:`headpatch.find.data.Task`.

    Raises
    ------
    HeadpatchError
        A row has no answer, or the template names a field that it lacks; the message names file and line.
    """
    import torch

    bench = open_bench(model, tokenizer)
    answers = [_answers(row, answer_field) for row in rows]
    prompts = [fill(template, row) for row in rows]
    if chat:
        prompts = [bench.chat(p) for p in prompts]
    marked = spans_of(rows, (template,), span_fields)
    written = [bench.generate(prompts, None, max_new_tokens, not chat, marked)]
    if recipe is not None:
        written.append(bench.generate(prompts, load_recipe(recipe), max_new_tokens, not chat, marked))
    hits = [
        torch.tensor(
            [
                float(any(matches(text, a, match) for a in accepted))
                for text, accepted in zip(texts, answers, strict=True)
            ]
        )
        for texts in written
    ]
    found = [Figures({"accuracy": stats.estimate(h)}) for h in hits]
    after = written[1] if recipe is not None else [None] * len(rows)
    generated = tuple(map(Generated, prompts, answers, written[0], after))
    if recipe is None:
        return Evaluation(len(rows), found[0], None, None, generated=generated)
    difference = Figures({"accuracy": stats.paired(hits[1], hits[0])})
    return Evaluation(len(rows), found[0], found[1], difference, stats.normal_p(hits[1], hits[0]), generated)


def matches(text: str, answer: str, how: str = "contains") -> bool:
    """Whether a continuation gives an answer; case and repeated white space do not matter.

    ``contains``: the answer's words stand in the text, not inside other words. ``exact``: the text's first line that is not empty is
    the answer, a full stop at its end aside. HeadpatchError for another `how`.
    """
    wanted = _plain(answer)
    if how == "contains":
        return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", _plain(text)) is not None
    if how == "exact":
        first = next((line for line in text.splitlines() if line.strip()), "")
        return _plain(first).removesuffix(".") == wanted.removesuffix(".")
    raise HeadpatchError(f"no match {short(how)}; choose contains or exact")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _answers(row: Row, field: str) -> tuple[str, ...]:
    value = row.fields.get(field)
    several = value if isinstance(value, list) else [value]
    good = [v for v in several if isinstance(v, str | int | float) and not isinstance(v, bool) and str(v).strip()]
    if not good or len(good) < len(several):
        raise HeadpatchError(
            f"{row.place}: field {short(field)} must hold the answer: a text, a number, or a list of them"
        )
    return tuple(map(str, good))
