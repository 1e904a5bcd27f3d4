"""Where a recipe's heads are, as a grid of layers and heads: what `headpatch show` and :mod:`headpatch.plots` draw."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headpatch.errors import RecipeError
from headpatch.heads import ModelShape, PartShape, parse_selector, to_selectors
from headpatch.keeping import keepings
from headpatch.resolve import resolve

if TYPE_CHECKING:
    from headpatch.recipe import Recipe
    from headpatch.resolve import ResolvedPatch

__all__ = ["Grid", "Mark", "grids", "shape_of", "strength_words"]

NAMED = 12
"""Heads of one patch up to which :func:`strength_words` names them all."""


@dataclass(frozen=True)
class Mark:
    """What one patch does to one head.

    Attributes
    ----------
    patch
        Index of the patch in the recipe.
    strength
        Its strength on this head; None for a method without a strength.
    direction
        1 above the method's identity strength, -1 below it, 0 at it: there the head is not touched. Under a cache policy 1 where
        the KV head keeps every token, -1 where it does not.
    """

    patch: int
    strength: float | None
    direction: int


@dataclass(frozen=True)
class Grid:
    """One attention stack with the heads that a recipe names in it.

    Attributes
    ----------
    part, kind
        The stack, and whether its rows are ``query`` or ``kv`` heads.
    counts
        Heads of each layer; 0 where a layer has no softmax attention.
    marks
        ``(layer, head)`` to what is done there, in the recipe's order.
    """

    part: str
    kind: str
    counts: tuple[int, ...]
    marks: Mapping[tuple[int, int], tuple[Mark, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``30 layers, 9 query heads``, with the part in front where it is not the language model."""
        heads = max(self.counts)
        words = {"query": "query heads", "kv": "KV heads"}[self.kind]
        stack = "" if self.part == "text" else f"{self.part}: "
        return f"{stack}{len(self.counts)} layers, {heads if min(self.counts) == heads else f'up to {heads}'} {words}"


def grids(
    recipe: Recipe, shape: ModelShape | None = None, windowed: Mapping[str, Collection[int]] | None = None
) -> list[Grid]:  # fmt: skip
    """The grids of a recipe, one for each stack and kind of head that it names.

    Parameters
    ----------
    shape
        The model; None takes the shape that the recipe itself gives (:func:`shape_of`).
    windowed
        By part, layers with a sliding window of their own: a cache policy does nothing there.

    Raises
    ------
    RecipeError
        The recipe does not fit the shape, or gives none and needs one.
    """
    shape = shape or shape_of(recipe)
    found: dict[tuple[str, str], dict[tuple[int, int], list[Mark]]] = {}
    patches = resolve(recipe, shape)
    kept = {keeping.index: keeping for keeping in keepings(patches, windowed)}
    for patch in patches:
        marks = found.setdefault((patch.part, patch.method.head_kind), {})
        if patch.index in kept:
            for direction, by_layer in ((1, kept[patch.index].full), (-1, kept[patch.index].rest)):
                for layer, head in ((layer, head) for layer, heads in by_layer.items() for head in heads):
                    marks.setdefault((layer, head), []).append(Mark(patch.index, None, direction))
            continue
        for (layer, head), strength in _strengths(patch):
            marks.setdefault((layer, head), []).append(Mark(patch.index, strength, _direction(patch.method, strength)))
    return [
        Grid(part, kind, shape.parts[part].heads(kind), {place: tuple(several) for place, several in marks.items()})
        for (part, kind), marks in found.items()
    ]


def shape_of(recipe: Recipe) -> ModelShape:
    """The shape that a recipe gives: its ``model:`` block, and where that is silent, the layers and heads that it names.

    Raises
    ------
    RecipeError
        A selector with ``*`` counts heads or layers that the recipe does not give, or a cache policy acts on them.
    """
    named = {patch.part for patch in recipe.patches}
    main = "decoder" if named & {"encoder", "decoder", "cross"} else "text"
    block: Mapping[str, Any] = recipe.model
    parts = {}
    for part in sorted({name or main for name in named} | {main}):
        known = block if part == main else {}
        patches = [patch for patch in recipe.patches if (patch.part or main) == part]
        policy = next((patch.method.name for patch in patches if patch.method.family == "cache"), None)
        if policy is not None and not {"num_layers", "num_kv_heads"} <= known.keys():
            raise RecipeError(
                f"{policy} acts on all KV heads of a part, and the recipe does not say how many its model has",
                source=recipe.source, key="model", remedy="give the model, as in --model NAME, or add a model: block",
            )  # fmt: skip
        layers = int(known.get("num_layers") or _extent(recipe, [s for p in patches for s, _ in p.heads], 0))
        counts = {}
        for kind, key in (("query", "num_heads"), ("kv", "num_kv_heads")):
            selectors = [s for p in patches if p.method.head_kind == kind for s, _ in p.heads]
            counts[kind] = _per_layer(known[key] if key in known else _extent(recipe, selectors, 1), layers)
        parts[part] = PartShape(counts["query"], counts["kv"], _per_layer(known.get("head_dim", 0), layers))
    return ModelShape(str(block.get("model_type", "")), parts, main, block.get("name"))


def _per_layer(value: Any, layers: int) -> tuple[int, ...]:
    return tuple(int(n) for n in value) if isinstance(value, list | tuple) else (int(value),) * layers


def _extent(recipe: Recipe, selectors: Iterable[str], which: int) -> int:
    """One more than the highest layer (0) or head (1) that selectors name."""
    most = 0
    for selector in selectors:
        chosen = parse_selector(selector)[which]
        if chosen is None:
            raise RecipeError(
                f"selector {selector!r} stands for all {('layers', 'heads')[which]}, and the recipe does not say how many "
                "its model has",
                source=recipe.source, key="model", remedy="give the model, as in --model NAME, or add a model: block",
            )  # fmt: skip
        most = max(most, chosen.stop)
    return most


def _strengths(patch: ResolvedPatch) -> Iterable[tuple[tuple[int, int], float | None]]:
    for layer, heads in patch.heads.items():
        given = heads.items() if isinstance(heads, Mapping) else ((head, None) for head in heads)
        yield from (((layer, head), value) for head, value in given)


def _direction(method: Any, strength: float | None) -> int:
    if strength is None:
        return 1
    identity = method.identity()
    return (strength > identity) - (strength < identity)


def strength_words(patch: ResolvedPatch, shape: ModelShape) -> str:
    """The strengths of a patch in a line: each with its heads where those are few, else the range.

    ``gamma 0.3 on 12.5, 13.0, 16.1; 3 on 14.7``, or ``gamma 0.3 to 3``.
    """
    strength = patch.method.strength_field()
    part, kind = shape.parts[patch.part], patch.method.head_kind
    if strength is None:  # a cache policy: the KV heads that it lists
        return ", ".join(to_selectors({n: dict.fromkeys(heads) for n, heads in patch.heads.items()}, part, kind))
    groups: dict[float, dict[int, dict[int, None]]] = {}
    for (layer, head), value in _strengths(patch):
        assert value is not None
        groups.setdefault(value, {}).setdefault(layer, {})[head] = None
    texts = {value: list(to_selectors(heads, part, kind)) for value, heads in sorted(groups.items())}
    if sum(map(len, texts.values())) > NAMED and len(texts) > 1:
        return f"{strength.name} {min(groups):g} to {max(groups):g}"
    if len(texts) == 1:
        value, selectors = next(iter(texts.items()))
        shown = f" on {', '.join(selectors)}" if len(selectors) <= NAMED else ""
        return f"{strength.name} {value:g}{shown}"
    return f"{strength.name} " + "; ".join(f"{value:g} on {', '.join(names)}" for value, names in texts.items())
