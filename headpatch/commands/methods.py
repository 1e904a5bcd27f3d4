"""``headpatch methods``: what recipes can do to heads, with parameters and their ranges."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def methods(
        name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
        json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    ) -> None:
        """List the methods that recipes can use, with their parameters."""
        from headpatch.errors import HeadpatchError
        from headpatch.registry import closest, method_names
        from headpatch.terminal import console, plain_table, print_json

        if name is not None and name not in method_names():
            raise HeadpatchError(f"there is no method {name!r}; {closest(name, method_names())}")
        rows = [describe(given) for given in method_names() if name in (None, given)]
        if json:
            print_json(rows)
            return
        table = plain_table("method", "parameter", "values", "meaning")
        for row in rows:
            table.add_row(
                f"[bold]{row['name']}[/bold]", "", f"[dim]{row['family']}[/dim]", f"[dim]{row['summary']}[/dim]"
            )
            for parameter in row["parameters"]:
                table.add_row("", parameter["name"], parameter["values"], parameter["meaning"])
        console().print(table)


def describe(name: str) -> dict[str, Any]:
    """A method as plain values: name, summary, family, scope of its defaults, needs, and its parameters."""
    from headpatch.registry import get_method
    from headpatch.show import parameter_words

    cls = get_method(name)
    return {
        "name": name, "family": cls.family, "version": cls.version, "heads": cls.head_kind, "key": cls.heads_key,
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "parameters": [dict(zip(("name", "meaning", "values"), row, strict=True)) for row in parameter_words(cls)],
    }  # fmt: skip
