"""``headpatch eval``: what a recipe does on labelled or generated answers, with and without it."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("eval")
    def evaluate(
        model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
        data: Annotated[Path, typer.Option("--data", "-d", help="JSON lines, one row each.")],
        recipe: Annotated[
            str | None,
            typer.Option("--recipe", "-r", help="Shipped name, file or hf://owner/repo.", show_default=False),
        ] = None,
        template: Annotated[
            list[str] | None,
            typer.Option(
                help=r"Prompt with {field} for a row's field; \n is a line break. Default: the recipe's own.",
                show_default=False,
            ),
        ] = None,
        labels: Annotated[
            str | None,
            typer.Option(
                help='"negative, positive", "NUM= number, LOC= place", or JSON. Default: the recipe\'s own.',
                show_default=False,
            ),
        ] = None,
        label_field: Annotated[str, typer.Option(help="Field with the label.")] = "label",
        span_field: Annotated[
            list[str] | None,
            typer.Option(
                help="Field with the marked piece of the row's prompt (or a list of pieces). Default: the recipe's own.",
                show_default=False,
            ),
        ] = None,
        answer_field: Annotated[str, typer.Option(help="Field with the answer, for generated answers.")] = "answer",
        match: Annotated[str, typer.Option(help="How a generated answer must match: contains or exact.")] = "contains",
        max_new_tokens: Annotated[int, typer.Option(help="Tokens of a generated answer.", min=1)] = 32,
        limit: Annotated[int, typer.Option(help="Take so many rows, drawn with --seed; 0 takes all.", min=0)] = 0,
        seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
        chat: Annotated[
            bool | None,
            typer.Option(help="Whether to use the chat template. Default: as the recipe, or no.", show_default=False),
        ] = None,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
        ] = "auto",
        dtype: Annotated[
            str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")
        ] = "float32",
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        """Measure a recipe on labelled or generated answers, against the untouched model."""
        from headpatch.commands.calibrate import load
        from headpatch.errors import HeadpatchError
        from headpatch.evaluate import evaluate_answers, evaluate_labels
        from headpatch.find.data import Task, load_rows, parse_labels, unescape
        from headpatch.sources import load_recipe
        from headpatch.terminal import print_json

        loaded = None if recipe is None else load_recipe(recipe)
        rows = load_rows(data)
        if limit and limit < len(rows):
            rows = random.Random(seed).sample(rows, limit)  # noqa: S311
        said = _recipe_task(loaded)
        answers = parse_labels(labels) if labels else None
        if answers is None and label_field in rows[0].fields:
            answers = said.get("labels")
        templates = [unescape(t) for t in template or ()] or list(said.get("templates", ()))
        if not templates:
            raise HeadpatchError('no template: give --template "... {text} ..."; this recipe names none')
        in_chat = bool(said.get("chat", False)) if chat is None else chat
        if answers is None and answer_field not in rows[0].fields:
            raise HeadpatchError(
                f"{rows[0].place}: neither labels (give --labels) nor an answer in field {answer_field!r} to compare with"
            )
        if answers is None and len(templates) > 1:
            raise HeadpatchError("generated answers take one --template")
        spans = tuple(span_field or said.get("span_fields", ()))
        model_, tokenizer = load(model, device, dtype)
        if answers is not None:
            task = Task(tuple(templates), answers, label_field, in_chat, spans)
            found = evaluate_labels(model_, tokenizer, loaded, rows, task)
        else:
            found = evaluate_answers(
                model_, tokenizer, loaded, rows, templates[0], answer_field=answer_field, match=match,
                max_new_tokens=max_new_tokens, chat=in_chat, span_fields=spans,
            )  # fmt: skip
        if json:
            print_json({"model": model, "recipe": recipe, "data": str(data), **found.plain()})
        else:
            sys.stdout.write("\n".join(found.lines()) + "\n")


def _recipe_task(recipe: Recipe | None) -> Mapping[str, Any]:
    """Templates, labels, chat and span fields that a calibrated recipe was made for, from its provenance, where it says so."""
    provenance = recipe.provenance if recipe is not None else {}
    found: dict[str, Any] = {}
    labels = provenance.get("labels")
    for key in ("templates", "span_fields"):
        words = provenance.get(key)
        if isinstance(words, tuple) and all(isinstance(t, str) for t in words):
            found[key] = words
    if isinstance(labels, Mapping) and len(labels) > 1 and all(isinstance(v, str) for v in labels.values()):
        found["labels"] = dict(labels)
    if isinstance(provenance.get("chat"), bool):
        found["chat"] = provenance["chat"]
    return found
