"""``headpatch import``: recipes from what other projects publish. One subcommand per format."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headpatch.find.patterns import Pattern
    from headpatch.heads import PartShape

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command and its subcommands."""
    group = typer.Typer(no_args_is_help=True, help="Turn what other projects publish into a recipe.")
    app.add_typer(group, name="import")

    @group.callback()
    def common() -> None:
        """Turn what other projects publish into a recipe."""

    @group.command("duo-attention")
    def duo_attention(
        context: typer.Context,
        path: Annotated[Path, typer.Argument(help="Folder with full_attention_heads.tsv and config.json.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The recipe.")],
        model: Annotated[
            str | None,
            typer.Option(
                "--model", "-m", help="Folder or hub name, to check against; its config is read.", show_default=False
            ),
        ] = None,
        sparsity: Annotated[
            float | None,
            typer.Option(
                help="Share of KV heads that stream. With --model, default 0.5, or 0.75 where every query head has its own.",
                show_default=False,
            ),
        ] = None,
        threshold: Annotated[
            float | None,
            typer.Option(help="Instead: heads with at least this gate keep everything.", show_default=False),
        ] = None,
        sink: Annotated[
            int | None, typer.Option(help="First tokens that streaming heads keep.", show_default="as trained", min=0)
        ] = None,
        recent: Annotated[
            int | None, typer.Option(help="Last tokens that streaming heads keep.", show_default="as trained", min=1)
        ] = None,
        name: Annotated[
            str | None, typer.Option(help="Name of the recipe. Default: of its file.", show_default=False)
        ] = None,
    ) -> None:
        """Convert a published attention pattern of DuoAttention."""
        from headpatch.commands.find_heads import write_recipe
        from headpatch.commands.options import again
        from headpatch.errors import HeadpatchError
        from headpatch.find.patterns import load_pattern

        pattern = load_pattern(path)
        if model is None and sparsity is None and threshold is None:
            raise HeadpatchError(
                "say how many heads stream with --sparsity or --threshold, or name the --model; 0.5 is what the authors use where "
                "query heads share KV heads, 0.75 elsewhere"
            )
        part, scores = _part(pattern), pattern.scores
        if model is not None:
            part, block = _checked(pattern, model)
            scores = dataclasses.replace(scores, model=block)
        write_recipe(
            scores, part, output, sparsity=sparsity, threshold=threshold, sink=pattern.sink if sink is None else sink,
            recent=pattern.recent if recent is None else recent, name=name, command=again(context),
        )  # fmt: skip
        if model is None:
            sys.stdout.write(f"the shape was not compared with {pattern.name}: --model does that\n")


def _part(pattern: Pattern) -> PartShape:
    """As much of the model's shape as a pattern tells; nothing below asks for more."""
    from headpatch.heads import PartShape

    kv = (pattern.kv_heads,) * pattern.layers
    return PartShape(kv, kv, (0,) * pattern.layers)


def _checked(pattern: Pattern, model: str) -> tuple[PartShape, dict[str, object]]:
    """Shape and ``model:`` block of the model; HeadpatchError where the pattern is for another one."""
    from headpatch.commands.check import model_shape
    from headpatch.errors import HeadpatchError

    shape = model_shape(model)
    part = shape.parts[shape.main]
    if part.num_layers != pattern.layers or set(part.num_kv_heads) != {pattern.kv_heads}:
        raise HeadpatchError(
            f"the pattern has {pattern.layers} layers of {pattern.kv_heads} KV heads, {model} has {part.num_layers} layers of "
            f"{', '.join(map(str, sorted(set(part.num_kv_heads))))}; it is for {pattern.name}"
        )
    return part, shape.to_block(Path(model).name if Path(model).exists() else model)
