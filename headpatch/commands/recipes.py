"""``headpatch recipes``: the recipes that come with the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def recipes(json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False) -> None:
        """List the shipped recipes."""
        from headpatch.terminal import console, plain_table, print_json

        rows = shipped()
        if json:
            print_json(rows)
            return
        table = plain_table("recipe", "heads", "methods", "what it is for")
        for row in rows:
            table.add_row(row["name"], str(row["heads"] or "?"), ", ".join(row["methods"]), row["description"])
        console().print(table)


def shipped() -> list[dict[str, Any]]:
    """The shipped recipes: name, description, model, methods, and how many heads they patch (None where only a model can say)."""
    from headpatch.errors import RecipeError
    from headpatch.grid import grids
    from headpatch.sources import list_recipes, load_recipe

    found = []
    for name in list_recipes():
        recipe = load_recipe(name)
        try:
            heads = sum(len(grid.marks) for grid in grids(recipe))
        except RecipeError:
            heads = None
        found.append({
            "name": name, "description": recipe.description, "model": recipe.model.get("name"), "heads": heads,
            "methods": list(dict.fromkeys(patch.method.name for patch in recipe.patches)),
        })  # fmt: skip
    return found
