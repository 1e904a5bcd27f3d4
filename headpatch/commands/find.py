"""``headpatch find``: which heads retrieve, which only stream, and where sinks are. One subcommand per finder."""

from __future__ import annotations

import typer

from headpatch.commands import find_heads, find_pick, find_sinks

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command and its subcommands."""
    group = typer.Typer(no_args_is_help=True, help="Find heads of a kind, and write a recipe that uses them.")
    app.add_typer(group, name="find")

    @group.callback()
    def common() -> None:
        """Find heads of a kind, and write a recipe that uses them."""

    for module in (find_heads, find_pick, find_sinks):
        module.register(group)
