"""The field ``headpatch`` of a request: what clients may write, and what travels to the workers in its place."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headpatch.recipe import Recipe

__all__ = ["FIELD", "PREFIX", "Wish", "pack", "read_wish", "salted", "unpack"]

FIELD = "headpatch"
PREFIX = "headpatch:"
"""Prefix-cache salts of patched requests begin with it; no client's own salt may."""
DATA: tuple[str, ...] = ("spans",)
"""Data that a request may give beside its recipe."""


@dataclass(frozen=True)
class Wish:
    """What a request asks for.

    Attributes
    ----------
    recipe
        A served name, a recipe as a mapping, ``none``, or None where the request leaves it to the server.
    data
        Per-call data by name.
    """

    recipe: str | Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None


def read_wish(value: Any) -> Wish:
    """Read the field.

    Parameters
    ----------
    value
        A served name or ``none``; a mapping ``{"recipe": ..., "spans": ...}``; a whole recipe; or any of these as JSON text.

    Raises
    ------
    ValueError
        It is none of them.
    """
    if value is None:
        return Wish()
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the field is not valid JSON: {error}") from None
    if isinstance(value, str):
        return Wish(value.strip())
    if not isinstance(value, Mapping):
        raise ValueError(  # noqa: TRY004  (one kind of error for whatever a request says)
            f'the field is a {type(value).__name__}; give a served name, "none", or {{"recipe": ...}}'
        )
    if "patches" in value or "headpatch" in value:
        return Wish(dict(value))
    if unknown := sorted(map(str, set(value) - {"recipe", *DATA})):
        raise ValueError(f"the field has no key {unknown[0]!r}; it has recipe, {', '.join(DATA)}")
    recipe = value.get("recipe")
    if recipe is not None and not isinstance(recipe, str | Mapping):
        raise ValueError(f"recipe is a {type(recipe).__name__}; give a served name or a recipe")
    data = {name: value[name] for name in DATA if value.get(name) is not None}
    return Wish(recipe.strip() if isinstance(recipe, str) else recipe, data or None)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def pack(recipe: Recipe) -> bytes:
    """A recipe as it travels with a request: its text, and its safetensors file behind it."""
    text = json.dumps(recipe.to_dict()).encode()
    arrays = b"" if recipe.tensors is None else recipe.tensors.read()
    return zlib.compress(len(text).to_bytes(8, "little") + text + arrays, 1)


def unpack(body: bytes) -> Recipe:
    """The recipe that :func:`pack` packed; it was checked in the front end."""
    data = zlib.decompress(body)
    end = 8 + int.from_bytes(data[:8], "little")
    return Recipe.from_dict(json.loads(data[8:end]), source="a request", arrays=data[end:] or None)


def salted(user: str | None, salt: str) -> str:
    """The prefix-cache salt of a patched request, from the client's own and the recipe's."""
    text = json.dumps([user, salt])
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()
