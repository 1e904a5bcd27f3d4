"""Which heads to tune: everything that can say so, as ``{layer: (head, ...)}``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from headpatch.errors import HeadpatchError, RecipeError
from headpatch.heads import SELECTOR_PATTERN, ModelShape, PartShape, query_heads_of, select_heads
from headpatch.recipe import Recipe
from headpatch.resolve import resolve

__all__ = ["chosen_heads"]


def chosen_heads(
    heads: Any, shape: ModelShape, part: str | None = None, top: int | None = None
) -> dict[int, tuple[int, ...]]:
    """Query heads of one attention stack.

    Parameters
    ----------
    heads
        A selector (``"12.*"``) or a list of them; a recipe in any form that :func:`headpatch.load_recipe` takes, which stands for
        all heads that it patches; ``{layer: [head, ...]}``; pairs of layer and head; or a ranking: scores by head
        (``{"12.3": 0.8, ...}``) or pairs of head and score, the highest being the best.
    shape
        Heads of the model.
    part
        The attention stack; default: the model's main one.
    top
        How many heads of a ranking to take. A list of single heads counts as a ranking in its order.

    Returns
    -------
    dict
        Ascending.

    Raises
    ------
    RecipeError
        A head that the model does not have, no selector, no heads at all; a recipe that does not fit.
    HeadpatchError
        A ranking without `top`, or scores that are no numbers.
    """
    name = part or shape.main
    if name not in shape.parts:
        raise RecipeError(f"this model has no part {name!r}", remedy=f"its parts: {', '.join(shape.parts)}")
    stack = shape.parts[name]
    if isinstance(heads, Recipe) or (isinstance(heads, str) and re.fullmatch(SELECTOR_PATTERN, heads) is None) or (
        isinstance(heads, Mapping) and "patches" in heads
    ):  # fmt: skip
        return _of_recipe(heads, shape, name)
    if isinstance(heads, str):
        return select_heads(heads, stack)
    if isinstance(heads, Mapping) and all(isinstance(key, int) for key in heads):
        return _union(((layer, head) for layer, chosen in heads.items() for head in chosen), stack)
    entries = list(heads.items() if isinstance(heads, Mapping) else heads)
    if all(isinstance(entry, str) for entry in entries):
        return select_heads(entries if top is None else _first(entries, top), stack)
    if all(len(entry) == 2 and isinstance(entry[0], str) for entry in entries):
        return select_heads(_best(entries, top), stack)
    pairs = entries if top is None else _first(entries, top)
    return _union(pairs, stack)


def _of_recipe(recipe: Any, shape: ModelShape, part: str) -> dict[int, tuple[int, ...]]:
    from headpatch.sources import load_recipe

    loaded = load_recipe(recipe)
    stack, pairs = shape.parts[part], []
    for patch in resolve(loaded, shape):
        if patch.part != part:
            continue
        for layer, chosen in patch.heads.items():
            for head in chosen:
                mine: Iterable[int] = (head,)
                if patch.method.head_kind == "kv":
                    mine = query_heads_of(head, stack.num_heads[layer], stack.num_kv_heads[layer])
                pairs += [(layer, query) for query in mine]
    if not pairs:
        raise RecipeError(f"patches no heads of the part {part!r}", source=loaded.source, remedy="choose another part")
    return _union(pairs, stack)


def _first(entries: list[Any], top: int) -> list[Any]:
    if not 1 <= top <= len(entries):
        raise HeadpatchError(f"top={top} of {len(entries)} ranked heads; choose 1 to {len(entries)}")
    return entries[:top]


def _best(entries: list[tuple[str, Any]], top: int | None) -> list[str]:
    if top is None:
        raise HeadpatchError("a ranking gives every head a score; say with top= how many of the best to take")
    for head, score in entries:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise HeadpatchError(f"the score of head {head} is {score!r}; a ranking needs finite numbers")
    return [head for head, _ in _first(sorted(entries, key=lambda entry: -entry[1]), top)]


def _union(pairs: Iterable[tuple[Any, Any]], stack: PartShape) -> dict[int, tuple[int, ...]]:
    texts = []
    for pair in pairs:
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in pair):
            raise RecipeError(f"{pair!r} is no pair of layer and head", remedy="both count from 0, as in (12, 3)")
        texts.append("{}.{}".format(*pair))
    return select_heads(texts, stack)
