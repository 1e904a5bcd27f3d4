"""Recipes by request, on servers: what a request says, and which names it may say it with.

Nothing here knows an engine: the adapter of the given engine does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headpatch.errors import UnsupportedModelError
from headpatch.registry import adapters, find_adapter
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["add_recipe", "remove_recipe", "sampling_params"]


def sampling_params(
    recipe: str | Mapping[str, Any] | Recipe | None = None, *, spans: Sequence[Any] | None = None, engine: str = "vllm",
    **options: Any,
) -> Any:  # fmt: skip
    """The engine's sampling parameters, with the recipe that this request wants.

    Parameters
    ----------
    recipe
        A name that the server serves, ``"none"`` for no recipe, a whole recipe where the server's flag allows that, or None for the
        server's default.
    spans
        Token spans of the prompt, for recipes that need them.
    engine
        The adapter's name.
    options
        The engine's own, as in ``temperature=0, max_tokens=64``.

    Raises
    ------
    EngineError
        The engine is not installed.
    UnsupportedModelError
        The adapter of that name serves no requests.
    """
    from headpatch.recipe import Recipe

    wanted: Any = recipe.to_dict() if isinstance(recipe, Recipe) else recipe
    if spans is not None:
        wanted = {"recipe": wanted, "spans": list(spans)}
    adapter = next((a for a in adapters() if a.name == engine), None)
    return _verb(adapter, "sampling_params", engine)(wanted, **options)


def add_recipe(engine: Any, name: str, recipe: Recipe | Mapping[str, Any] | str) -> None:
    """Let requests to a running engine name one more recipe.

    A name that is served already means the new recipe from now on; requests that run are finished under the old one.

    Parameters
    ----------
    engine
        A ``vllm.LLM`` or ``AsyncLLM`` that was started with the headpatch flag.
    name
        What requests say.
    recipe
        Anything that :func:`headpatch.load_recipe` takes.

    Raises
    ------
    RecipeError, UnsupportedModelError
        As for :func:`headpatch.apply`; nothing is changed.
    EngineError
        The engine was not started for headpatch, or not for what the recipe edits.
    """
    _verb(find_adapter(engine), "add_recipe", type(engine).__name__)(engine, name, load_recipe(recipe))


def remove_recipe(engine: Any, name: str) -> None:
    """Requests to a running engine can no longer name a recipe; those that run are finished under it.

    Raises
    ------
    HeadpatchError
        No recipe has that name, or it is the server's default.
    EngineError
        The engine was not started for headpatch.
    """
    _verb(find_adapter(engine), "remove_recipe", type(engine).__name__)(engine, name)


def _verb(adapter: Any, verb: str, what: str) -> Any:
    found = getattr(adapter, verb, None)
    if found is None:
        raise UnsupportedModelError(f"{what} serves no requests: use headpatch.apply on the model itself")
    return found
