"""``headpatch check``: what a recipe would patch in a model. Reads the model's config, builds nothing, touches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe
    from headpatch.resolve import RecipeCheck

__all__ = ["config_shape", "model_shape", "register", "windowed_layers"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def check(
        recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, a file, or hf://owner/repo.")],
        model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
        json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
    ) -> None:
        """Say what a recipe would patch in a model; nothing is loaded and nothing touched."""
        from headpatch.keeping import keepings
        from headpatch.resolve import resolve
        from headpatch.sources import load_recipe
        from headpatch.terminal import console, plain_table, print_json

        loaded = load_recipe(recipe)
        shape, found = config_shape(model, loaded)
        kept = keepings(resolve(loaded, shape), windowed_layers(model, loaded))
        if json:
            more = {"cache": [keeping.to_dict() for keeping in kept]} if kept else {}
            print_json({**as_values(loaded, found), **more})
            return
        target = console()
        stack = shape.parts[shape.main]
        target.print(f"{loaded.name or recipe} fits {model}", style="bold", markup=False)
        target.print(
            f"{shape.model_type}: {stack.num_layers} layers, {max(stack.num_heads)} query heads, {max(stack.num_kv_heads)} KV heads",
            style="dim", markup=False,
        )  # fmt: skip
        table = plain_table("patch", "method", "part", "heads", "layers")
        listed = {k.index: f"{k.num_full} of {k.num_full + k.num_rest} KV" for k in kept}
        for patch in found.patches:
            kind = {"query": "query", "kv": "KV"}[patch.kind]
            layers = spans(patch.heads)
            table.add_row(
                str(patch.index),
                patch.method,
                patch.part,
                listed.get(patch.index, f"{patch.num_heads} {kind}"),
                layers,
            )
        target.print(table)
        for line in (line for keeping in kept for line in keeping.lines()):
            target.print(line, markup=False)
        needs = ", ".join(found.needs) or "nothing"
        target.print(
            f"needs of the engine: {needs}; prefix caches are shared per {found.scope}", style="dim", markup=False
        )


def config_shape(model: str, recipe: Recipe) -> tuple[ModelShape, RecipeCheck]:
    """The shape of a model known by name, and what `recipe` would patch in it.

    Raises
    ------
    HeadpatchError
        No adapter can read the model's config, or the recipe does not fit.
    """
    reader, config = _config(model)
    return reader.shape(config), recipe.check(config)


def model_shape(model: str) -> ModelShape:
    """The shape of a model known by name, from its config alone; HeadpatchError where no adapter can read that."""
    reader, config = _config(model)
    shape: ModelShape = reader.shape(config)
    return shape


def windowed_layers(model: str, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """By part, layers with a sliding window of their own, of a model known by name; empty for a recipe without a cache policy."""
    if all(patch.method.family != "cache" for patch in recipe.patches):
        return {}
    reader, config = _config(model)
    found: dict[str, tuple[int, ...]] = reader.windowed_layers(config)
    return found


def _config(model: str) -> tuple[Any, Any]:
    """An adapter that reads configs, and the model's."""
    from headpatch.demo_model import locate
    from headpatch.errors import EngineError
    from headpatch.registry import adapters

    reader: Any = next((adapter for adapter in adapters() if hasattr(adapter, "load_config")), None)
    if reader is None:
        raise EngineError("no engine that is installed reads configs of models; pip install 'headpatch[hf]'")
    return reader, reader.load_config(locate(model))


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers, neighbours as a range: ``0-3, 7``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)


def as_values(recipe: Recipe, found: RecipeCheck) -> dict[str, Any]:
    """A check as plain values, for JSON."""
    return {
        "recipe": recipe.name, "digest": recipe.digest, "scope": found.scope, "needs": list(found.needs),
        "num_heads": found.num_heads,
        "patches": [
            {"index": p.index, "method": p.method, "part": p.part, "kind": p.kind, "heads": {n: list(h) for n, h in p.heads.items()}}
            for p in found.patches
        ],
    }  # fmt: skip
