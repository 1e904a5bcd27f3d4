"""``headpatch show``: a recipe's heads, as a grid in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def show(
        recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, a file, or hf://owner/repo.")],
        model: Annotated[
            str | None,
            typer.Option("--model", "-m", help="Folder or hub name; only where the recipe does not give the shape."),
        ] = None,
        png: Annotated[Path | None, typer.Option("--png", help="Also draw the heads into this PNG file.")] = None,
        attention: Annotated[
            bool,
            typer.Option("--attention", help="Show where heads look in a prompt, before and after; runs --model."),
        ] = False,
        prompt: Annotated[
            str | None, typer.Option("--prompt", "-p", help="With --attention: the prompt.", show_default=False)
        ] = None,
        image: Annotated[
            Path | None, typer.Option(help="With --attention: a picture for the prompt.", show_default=False)
        ] = None,
        heads: Annotated[
            list[str] | None,
            typer.Option(
                help='With --attention: heads, as in a recipe ("12.3"). Default: the recipe\'s that change most.',
                show_default=False,
            ),
        ] = None,
        query: Annotated[
            list[str] | None,
            typer.Option(help="With --attention: positions that look; last, or numbers from 0.", show_default="last"),
        ] = None,
        span: Annotated[
            list[str] | None,
            typer.Option(help="With --attention: a marked piece of the prompt.", show_default=False),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option("--output", "-o", help="With --attention: draw into this file.", show_default=False),
        ] = None,
        chat: Annotated[
            bool | None,
            typer.Option(
                help="With --attention: whether to use the chat template. Default: where there is one.",
                show_default=False,
            ),
        ] = None,
        ascii: Annotated[bool, typer.Option("--ascii", help="Letters instead of symbols.")] = False,
        json: Annotated[bool, typer.Option("--json", help="JSON instead of a picture.")] = False,
    ) -> None:
        """Show which heads a recipe patches, and how strongly; with --attention, where they look before and after."""
        if attention:
            show_attention(
                recipe, model, prompt, image, heads, query or ["last"], span or [], output, chat, ascii, json
            )
            return
        from headpatch.commands.check import config_shape, windowed_layers
        from headpatch.grid import grids, shape_of
        from headpatch.keeping import keepings
        from headpatch.resolve import resolve
        from headpatch.sources import load_recipe
        from headpatch.terminal import console, draw_recipe, print_json

        loaded = load_recipe(recipe)
        shape = shape_of(loaded) if model is None else config_shape(model, loaded)[0]
        windowed = {} if model is None else windowed_layers(model, loaded)
        found = grids(loaded, shape, windowed)
        if png is not None:
            from headpatch import plots

            plots.save(loaded, png, shape, windowed=windowed)
        if json:
            kept = [keeping.to_dict() for keeping in keepings(resolve(loaded, shape), windowed)]
            print_json({**loaded.to_dict(), "resolved": resolved(loaded, shape), **({"cache": kept} if kept else {})})
            return
        target = console()
        unicode = not ascii and (target.encoding or "").lower().startswith("utf")
        target.print(loaded.name or recipe, style="bold", markup=False)
        if loaded.description:
            target.print(loaded.description, markup=False)
        if about := loaded.model.get("name") or loaded.model.get("model_type"):
            target.print(f"for {about}", style="dim", markup=False)
        target.print()
        target.print(draw_recipe(loaded, shape, found, target.width, unicode, windowed))
        if loaded.provenance:
            facts = ", ".join(str(key) for key in loaded.provenance)
            target.print(f"provenance: {facts} (--json shows all of it)", style="dim", markup=False)
        if png is not None:
            target.print(f"drawn into {png}", style="dim", markup=False)


def show_attention(
    recipe: str, model: str | None, prompt: str | None, image: Path | None, heads: list[str] | None, query: list[str],
    span: list[str], output: Path | None, chat: bool | None, ascii: bool, json: bool,
) -> None:  # fmt: skip
    """The rows of attention that were asked for: in words, as JSON, or as a figure."""
    from headpatch.commands.generate import hushed, load
    from headpatch.errors import HeadpatchError
    from headpatch.looks import look
    from headpatch.sources import load_recipe
    from headpatch.terminal import console, draw_look, print_json

    if model is None or prompt is None:
        raise HeadpatchError("--attention runs a model on a prompt: give --model and --prompt")
    queries = [_position(text) for text in query]
    loaded = load_recipe(recipe)
    picture = None if image is None else _open(image)
    weights, reader = load(model, vision=image is not None)
    with hushed():
        found = look(
            weights, reader, prompt, loaded, heads=heads, queries=queries, image=picture, spans=span, chat=chat
        )
    if output is not None:
        from headpatch import plots

        plots.save_figure(plots.draw_look(found), output)
    if json:
        print_json({
            "recipe": loaded.name or recipe, "tokens": found.pieces, "queries": found.queries, "heads": found.heads,
            "before": found.before.tolist(), "after": None if found.after is None else found.after.tolist(),
        })  # fmt: skip
        return
    target = console()
    target.print(draw_look(found, not ascii and (target.encoding or "").lower().startswith("utf")))
    if output is not None:
        target.print(f"drawn into {output}", style="dim", markup=False)


def _position(text: str) -> int:
    from headpatch.errors import HeadpatchError

    if text == "last":
        return -1
    try:
        return int(text)
    except ValueError:
        raise HeadpatchError(f"--query takes last or a number, counted from 0; got {text!r}") from None


def _open(path: Path) -> Any:
    from headpatch.errors import EngineError, HeadpatchError

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise EngineError("pictures are read with pillow; pip install 'headpatch[vision]'") from error
    try:
        with Image.open(path) as found:
            return found.convert("RGB")
    except UnidentifiedImageError:
        raise HeadpatchError(f"{path}: is no picture that pillow reads") from None


def resolved(recipe: Recipe, shape: ModelShape) -> list[dict[str, Any]]:
    """Each patch with the heads it means, ``{"12": {"5": 0.3}}``; null where a method has no strength."""
    from headpatch.resolve import resolve

    return [
        {
            "method": patch.method.name, "part": patch.part, "kind": patch.method.head_kind,
            "heads": {
                layer: dict(heads) if isinstance(heads, dict) else dict.fromkeys(heads)
                for layer, heads in patch.heads.items()
            },
        }
        for patch in resolve(recipe, shape)
    ]  # fmt: skip
