"""Where recipes come from: files, the package itself, the hub, dicts."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headpatch import yamlio
from headpatch.errors import RecipeError
from headpatch.recipe import Recipe
from headpatch.registry import closest
from headpatch.show import kind_of, short

__all__ = ["list_recipes", "load_recipe"]

_SUFFIXES = (".yaml", ".yml", ".json")


def load_recipe(source: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """Load a recipe and check all that can be checked without a model.

    Parameters
    ----------
    source
        A path of a YAML file; the name of a shipped recipe (:func:`list_recipes`), as in
        ``smollm2-135m-instruct/zerotuning-sst2``; ``hf://owner/repo[/path][@revision]``; a dict; or a Recipe, which is returned
        as it is. A string that is a shipped name means that recipe; write ``./name`` for a file of that name.

    Raises
    ------
    RecipeError
        There is no such recipe, or something is wrong with it; the message names file, key and what would be right.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return Recipe.from_dict(source)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(
            f"a {kind_of(source)} is no recipe",
            remedy="give a path, a shipped name, hf://owner/repo, a dict or a Recipe",
        )
    text = os.fspath(source)
    if not isinstance(text, str):
        raise RecipeError("a path of bytes", remedy="give the path as a string")
    if isinstance(source, str) and text.startswith("hf:"):
        from headpatch import hub

        data, folder = hub.fetch(text)
        return Recipe.from_dict(data, source=text, folder=folder)
    # Looked up among what is there, never joined to a path: a name cannot lead elsewhere.
    shipped = _shipped_files().get(text) if isinstance(source, str) else None
    if shipped is not None:
        return _from_file(shipped, text)
    if isinstance(source, str) and not _is_path(text):
        raise RecipeError(
            "there is no shipped recipe and no file of that name", source=short(text, 120)[1:-1],
            remedy=closest(text[:200], _shipped_files(), most=4) + "; `headpatch recipes` lists them all",
        )  # fmt: skip
    return _from_file(Path(text), text)


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes, sorted, each with its description."""
    return {name: _description(path) for name, path in _shipped_files().items()}


def _from_file(path: Path, source: str) -> Recipe:
    return Recipe.from_dict(yamlio.load(path, source), source=source, folder=path.parent)


def _is_path(text: str) -> bool:
    """Whether a string can only mean a file: it exists, or is written like one."""
    if text.endswith(_SUFFIXES) or text.startswith((".", "~")) or Path(text).is_absolute():
        return True
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("headpatch.recipes")))


def _shipped_files() -> dict[str, Path]:
    """Files of the shipped recipes by name; one folder per model."""
    files = {f"{path.parent.name}/{path.stem}": path for path in _shipped_folder().glob("*/*.yaml")}
    return dict(sorted(files.items()))


def _description(path: Path) -> str:
    data = yamlio.load(path)
    return str(data.get("description", "")) if isinstance(data, dict) else ""
