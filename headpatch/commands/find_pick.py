"""``headpatch find pick``: a recipe from scores that were measured before, at another sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headpatch.find.ranking import HeadScores
    from headpatch.heads import PartShape

__all__ = ["part_of", "register"]


def register(group: typer.Typer) -> None:
    """Add the subcommand."""

    @group.command()
    def pick(
        context: typer.Context,
        scores: Annotated[Path, typer.Argument(help="Scores that `headpatch find ... --scores` wrote.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The recipe.")],
        sparsity: Annotated[
            float | None,
            typer.Option(
                help="Share of KV heads that stream. Default: 0.5, or 0.75 where every query head has its own.",
                show_default=False,
            ),
        ] = None,
        threshold: Annotated[
            float | None,
            typer.Option(help="Instead: heads with at least this score keep everything.", show_default=False),
        ] = None,
        sink: Annotated[int, typer.Option(help="First tokens that streaming heads keep.", min=0)] = 64,
        recent: Annotated[int, typer.Option(help="Last tokens that streaming heads keep.", min=1)] = 256,
        name: Annotated[
            str | None, typer.Option(help="Name of the recipe. Default: of its file.", show_default=False)
        ] = None,
    ) -> None:
        """Make a recipe of scores that were measured before."""
        from headpatch.commands.find_heads import write_recipe
        from headpatch.commands.options import again
        from headpatch.find.ranking import HeadScores

        found = HeadScores.load(scores)
        write_recipe(
            found, part_of(found), output, sparsity=sparsity, threshold=threshold, sink=sink, recent=recent, name=name,
            command=again(context),
        )  # fmt: skip


def part_of(scores: HeadScores) -> PartShape:
    """The attention stack that scores are of, from their ``model:`` block."""
    from headpatch.errors import HeadpatchError
    from headpatch.heads import PartShape

    try:
        layers = int(scores.model["num_layers"])
        rows = [scores.model[key] for key in ("num_heads", "num_kv_heads", "head_dim")]
    except KeyError as error:
        raise HeadpatchError(f"these scores do not say the model's {error.args[0]}") from None
    return PartShape(*(tuple(row) if isinstance(row, list | tuple) else (int(row),) * layers for row in rows))
