"""``headpatch demo``: a recipe makes a small language model better at a task, and taking it off leaves no trace.

The sentences in ``headpatch/data/film_sentences.jsonl`` were written for this demo, before anything was measured on them; no recipe
was chosen with them.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from headpatch.recipe import Recipe

__all__ = ["Accuracy", "compare_accuracy", "register", "sentences"]

TASK_RECIPE = "smollm2-135m-instruct/zerotuning-sst2"
TEXT_RECIPE = "smollm2-135m-instruct/follow-context"
TEMPLATE = "Review: {text}\nSentiment (positive or negative):"
LABELS = {"negative": " negative", "positive": " positive"}
PROMPT = (
    "According to the map of this game, Turku is the capital of Finland. "
    "What is the capital of Finland, and what is it known for?"
)
PAIRS, TIMED_TOKENS = 5, 12
FIGURES = {
    "accuracy": ("accuracy, labels compared", " %"),
    "unrestricted": ("accuracy, any word allowed", " %"),
    "valid": ("answers that are a label", " %"),
    "entropy": ("entropy of the answer, nats", ""),
    "perplexity": ("perplexity of neutral texts", ""),
}
"""Words and unit of the figures that `headpatch calibrate` writes into a recipe's provenance."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def demo(
        recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe for the sentences.")] = TASK_RECIPE,
        text_recipe: Annotated[str, typer.Option(help="Recipe for the answer side by side.")] = TEXT_RECIPE,
        prompt: Annotated[str, typer.Option(help="Question of the answer side by side.")] = PROMPT,
        tokens: Annotated[int, typer.Option(help="Tokens to write.", min=2)] = 40,
        model: Annotated[
            Path | None,
            typer.Option(
                "--model", "-m", help="Folder of the model; default: in the cache, fetched where it is not there."
            ),
        ] = None,
        report: Annotated[
            Path | None, typer.Option("--json", help="Also write what was measured into this file.")
        ] = None,
    ) -> None:
        """Watch a recipe change a real language model: accuracy, heads, text, speed, and removal."""
        from headpatch.commands.generate import hushed
        from headpatch.terminal import console

        with _offline(), hushed():
            measured = run(console(), recipe, text_recipe, prompt, tokens, model)
        if report is not None:
            report.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        if not measured["bit_equal"]:
            raise typer.Exit(1)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No hub traffic and no progress bars from the engine: the model is on this machine. Both are read when it is imported."""
    wanted = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sentences() -> list[tuple[str, str]]:
    """The demo's sentences about films with their labels: 40 positive and 40 negative."""
    text = (importlib.resources.files("headpatch") / "data" / "film_sentences.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["text"], row["label"]) for row in rows]


@dataclass(frozen=True)
class Accuracy:
    """Answers to the sentences, untouched and patched.

    Attributes
    ----------
    total
        Sentences.
    before, after
        How many are answered rightly.
    gained, lost
        How many only the patched model, and only the untouched one, answers rightly.
    """

    total: int
    before: int
    after: int
    gained: int
    lost: int


def compare_accuracy(model: Any, tokenizer: Any, recipe: Recipe, rows: list[tuple[str, str]]) -> Accuracy:
    """Compare the first tokens of the labels after each sentence, without the recipe and with it; all labels count equally."""
    from headpatch.find.engine import open_bench

    bench = open_bench(model, tokenizer)
    template, labels = asked_as(recipe)
    names = list(labels)
    questions = bench.questions([template.format(text=text) for text, _ in rows], list(labels.values()))
    right: dict[int, list[bool]] = {}
    for index, outcome in bench.run([None, recipe], questions):
        chosen = outcome.first.argmax(-1).tolist()
        right[index] = [names[pick] == label for pick, (_, label) in zip(chosen, rows, strict=True)]
    pairs = list(zip(right[0], right[1], strict=True))
    return Accuracy(len(rows), sum(right[0]), sum(right[1]), pairs.count((False, True)), pairs.count((True, False)))


def asked_as(recipe: Recipe) -> tuple[str, dict[str, str]]:
    """Template and labels: those that the recipe was calibrated with, where its provenance has them and they fit the sentences."""
    templates, labels = recipe.provenance.get("templates"), recipe.provenance.get("labels")
    if templates and isinstance(labels, Mapping) and "{text}" in templates[0] and set(labels) == set(LABELS):
        return str(templates[0]), {name: str(text) for name, text in labels.items()}
    return TEMPLATE, LABELS


def run(
    target: Console, recipe: str, text_recipe: str, prompt: str, tokens: int, folder: Path | None
) -> dict[str, Any]:
    """The whole demo; what was measured, as plain values."""
    import torch

    from headpatch import api
    from headpatch.demo_model import NAME, fetch
    from headpatch.find.engine import load_model
    from headpatch.registry import find_adapter
    from headpatch.sources import load_recipe

    task, text = load_recipe(recipe), load_recipe(text_recipe)
    started = time.perf_counter()
    place = folder if folder is not None else fetch(say=lambda line: target.print(line, style="dim", soft_wrap=True))
    model, tokenizer = load_model(str(place), device="cpu", dtype="float32")
    engine: Any = find_adapter(model)
    before = engine.logits(model, tokenizer, prompt)

    target.rule("[bold]headpatch[/bold]")
    target.print(f"model    {NAME}, float32 on the CPU, {torch.get_num_threads()} threads", markup=False)
    accuracy = show_accuracy(target, model, tokenizer, task)
    show_heads(target, task)
    columns = show_texts(target, model, tokenizer, text, prompt, tokens)

    target.print("\nTime per generated token", style="bold")
    speed = time_both(model, tokenizer, task, prompt)
    target.print("untouched {untouched:.1f} ms   patched {patched:.1f} ms   ratio {ratio:.2f}".format(**speed))

    target.print("\nRecipe removed", style="bold")
    with api.applied(model, task):
        changed = float((engine.logits(model, tokenizer, prompt) - before).abs().max())
    equal = torch.equal(before, engine.logits(model, tokenizer, prompt)) and not api.handles(model)
    target.print(f"largest change of a logit while it was applied: {changed:.2f}")
    if equal:
        target.print("after removal all logits are bit-equal to the untouched model's", style="green")
    else:
        target.print(
            "after removal the logits are NOT what they were: this is a bug, please report it", style="bold red"
        )
    seconds = time.perf_counter() - started
    target.print(f"{seconds:.0f} s in all", style="dim")
    return {
        "recipe": task.name, "accuracy": vars(accuracy), "text_recipe": text.name, "texts": columns, "milliseconds": speed,
        "bit_equal": equal, "largest_change": changed, "seconds": seconds,
    }  # fmt: skip


def show_accuracy(target: Console, model: Any, tokenizer: Any, recipe: Recipe) -> Accuracy:
    """Accuracy on the demo's sentences, with what the recipe's own test showed beside it."""
    from headpatch.terminal import plain_table

    rows = sentences()
    target.print(f"recipe   {recipe.name}: {recipe.description}", markup=False)
    target.print(f"\nBetter at a task: positive or negative? {len(rows)} sentences about films", style="bold")
    found = compare_accuracy(model, tokenizer, recipe, rows)
    table = plain_table("", "untouched", "patched", "difference")
    shares = [f"{n} of {found.total} ({100 * n / found.total:.1f} %)" for n in (found.before, found.after)]
    table.add_row("[bold]these sentences, written for this demo[/bold]", shares[0], f"[bold green]{shares[1]}[/bold green]",
                  f"{found.gained} gained, {found.lost} lost")  # fmt: skip
    for row in held_out(recipe):
        table.add_row(*row)
    target.print(table)
    if words := about_data(recipe):
        target.print(words, style="dim", markup=False)
    return found


def held_out(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """The recipe's own figures, as its provenance has them: (what, untouched, patched, difference with its interval)."""
    facts = recipe.provenance
    old, new = facts.get("baseline"), facts.get("patched")
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return []
    differences, intervals = facts.get("difference", {}), facts.get("difference_intervals", {})
    rows = []
    for name in (name for name in old if name in new):
        words, unit = FIGURES.get(name, (str(name).replace("_", " "), ""))
        difference = f"{differences[name]:+g}" if name in differences else ""
        if name in intervals:
            low, high = intervals[name]
            difference += f" ({low:+g} to {high:+g})"
        rows.append((f"held out: {words}", f"{_number(old[name])}{unit}", f"{_number(new[name])}{unit}", difference))
    return rows


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def about_data(recipe: Recipe) -> str:
    """Which data the recipe's own figures were measured on, in a sentence."""
    data = recipe.provenance.get("data")
    if isinstance(data, Mapping) and all(isinstance(part, Mapping) and "rows" in part for part in data.values()):
        words = {"train": "heads chosen on", "eval": "held-out figures from"}
        parts = [
            f"{text} {data[name]['rows']} rows of {data[name].get('file', '?')}"
            for name, text in words.items()
            if name in data
        ]
        return f"{'; '.join(parts)} (95 % intervals of paired differences; perplexity in percent)"
    return f"held out: {data}" if isinstance(data, str) else ""


def show_heads(target: Console, recipe: Recipe) -> None:
    """The heads that the recipe patches."""
    from headpatch.grid import grids, shape_of
    from headpatch.terminal import draw_recipe

    shape, found = shape_of(recipe), grids(recipe)
    heads = sum(len(grid.marks) for grid in found)
    total = sum(map(sum, (grid.counts for grid in found)))
    target.print(f"\nWhat the recipe changes: {heads} of {total} heads", style="bold")
    unicode = (target.encoding or "").lower().startswith("utf")
    target.print(draw_recipe(recipe, shape, found, target.width, unicode))


def show_texts(
    target: Console, model: Any, tokenizer: Any, recipe: Recipe, prompt: str, tokens: int
) -> dict[str, str]:
    """One answer side by side, as it is written."""
    from headpatch import api
    from headpatch.registry import find_adapter
    from headpatch.terminal import SideBySide

    engine: Any = find_adapter(model)
    target.print("\nAnother recipe on the same model, side by side", style="bold")
    target.print(f"recipe   {recipe.name}: {recipe.description}", markup=False)
    target.print(f"prompt   {prompt}", style="cyan", markup=False)
    with SideBySide(target) as columns:
        engine.write(model, tokenizer, prompt, columns.hear("untouched"), max_new_tokens=tokens)
        with api.applied(model, recipe):
            engine.write(model, tokenizer, prompt, columns.hear("patched"), max_new_tokens=tokens)
    return dict(columns.texts)


def time_both(model: Any, tokenizer: Any, recipe: Recipe, prompt: str) -> dict[str, float]:
    """Median milliseconds per generated token, untouched and patched, and the median ratio of neighbouring runs."""
    from headpatch import api
    from headpatch.registry import find_adapter

    engine: Any = find_adapter(model)
    untouched, patched = [], []
    for _ in range(PAIRS):  # in alternation, so that both meet the same weather
        untouched.append(engine.write(model, tokenizer, prompt, max_new_tokens=TIMED_TOKENS, exactly=True).seconds)
        with api.applied(model, recipe):
            patched.append(engine.write(model, tokenizer, prompt, max_new_tokens=TIMED_TOKENS, exactly=True).seconds)
    return {
        "untouched": 1e3 * statistics.median(untouched),
        "patched": 1e3 * statistics.median(patched),
        "ratio": statistics.median(b / a for a, b in zip(untouched, patched, strict=True)),
    }
