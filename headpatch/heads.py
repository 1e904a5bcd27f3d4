"""Which heads: selectors, query-head and KV-head maps, tensor-parallel slices.

A head is written ``layer.head``, both 0-based: ``12.3`` is head 3 of layer 12. A selector is the *string* ``L.H``, where L and H are
each a number, a range ``a-b`` (both ends in) or ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from headpatch.errors import RecipeError
from headpatch.show import describe, key_path, short

__all__ = [
    "PARTS", "SELECTOR_PATTERN", "LocalHeads", "ModelShape", "PartShape", "Selector", "expand", "expand_all", "kv_head_of",
    "local_heads", "parse_selector", "query_heads_of", "select_heads", "to_selectors",
]  # fmt: skip

T = TypeVar("T")

PARTS = ("text", "vision", "audio", "encoder", "decoder", "cross")
"""Attention stacks that ``part:`` can name. A text-only model has `text`; an encoder-decoder has `encoder`, `decoder`, `cross`."""


@dataclass(frozen=True)
class PartShape:
    """Heads of one attention stack.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim
        One entry per layer of the stack; 0 heads where a layer has no softmax attention (a state-space or linear-attention
        layer). `num_kv_heads` divides `num_heads`.
    """

    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the stack, those without softmax attention included."""
        return len(self.num_heads)

    def heads(self, kind: str) -> tuple[int, ...]:
        """Number of heads of each layer; `kind` is ``query`` or ``kv``."""
        return {"query": self.num_heads, "kv": self.num_kv_heads}[kind]

    def softmax_layers(self) -> tuple[int, ...]:
        """Layers that have softmax attention: those that ``*`` stands for."""
        return tuple(layer for layer, n in enumerate(self.num_heads) if n)


@dataclass(frozen=True)
class ModelShape:
    """What a recipe is checked against.

    Attributes
    ----------
    model_type
        As in a transformers config (``llama``).
    parts
        The attention stacks that the model has, by name.
    main
        The part that a patch without ``part:`` means, and that the shape keys under ``model:`` describe.
    name
        Where the model was loaded from, if known; informs, never refuses.
    """

    model_type: str
    parts: Mapping[str, PartShape]
    main: str
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))
        if self.main not in self.parts:
            raise ValueError(f"main part {self.main!r} is not among {sorted(self.parts)}")

    def to_block(self, name: str | None = None) -> dict[str, object]:
        """The ``model:`` block of a recipe for this model: one number where all layers are alike, a list where they are not."""
        part = self.parts[self.main]
        block: dict[str, object] = {} if name is None else {"name": name}
        block |= {"model_type": self.model_type, "num_layers": part.num_layers}
        for key in ("num_heads", "num_kv_heads", "head_dim"):
            values = list(getattr(part, key))
            block[key] = values[0] if len(set(values)) == 1 else values
        return block

    def __reduce__(self) -> tuple[object, ...]:
        # A mapping proxy can be neither pickled nor deep-copied, and handles that hold a shape are both.
        return ModelShape, (self.model_type, dict(self.parts), self.main, self.name)


_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_RANGE = rf"(?:\*|{_NUMBER}(?:-{_NUMBER})?)"
SELECTOR_PATTERN = rf"^{_RANGE}\.{_RANGE}$"
"""What a selector looks like, for the JSON schema too; :func:`parse_selector` also refuses reversed ranges."""

_SELECTOR = re.compile(SELECTOR_PATTERN)
_HOW = 'a selector is layer.head, each a number, a range a-b (both ends in) or *: "12.3", "8.*", "0-5.2"'


class Selector(NamedTuple):
    """A parsed selector: `layers` and `heads` are ranges, None for ``*``."""

    layers: range | None
    heads: range | None


class LocalHeads(NamedTuple):
    """Heads of one tensor-parallel rank, in global numbers."""

    query: range
    kv: range


def parse_selector(text: object) -> Selector:
    """Read one selector, as in ``parse_selector("8.0-2")``.

    Returns
    -------
    Selector
        Its ranges; whether they exist in a model is for :func:`expand` to say.

    Raises
    ------
    RecipeError
        `text` is no selector: not a string (a YAML number such as 12.10 has lost its zero), a reversed range, a sign, a space,
        leading zeros, digits other than 0-9.
    """
    if not isinstance(text, str):
        raise RecipeError(
            f"a selector is a string, this is {describe(text)}",
            remedy='write it in quotes, as in "12.10"',
        )
    # fullmatch, because $ alone lets a line break pass
    if _SELECTOR.fullmatch(text) is None:
        raise RecipeError(f"{short(text)} is not a selector", remedy=_HOW)
    layers, heads = text.split(".")
    return Selector(_parse_range(layers, text), _parse_range(heads, text))


def _parse_range(text: str, selector: str) -> range | None:
    if text == "*":
        return None
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise RecipeError(f"the range {text} of selector {selector!r} is reversed", remedy=f"write {last}-{first}")
    return range(int(first), int(last or first) + 1)


def expand(selector: str, shape: PartShape, kind: str = "query") -> dict[int, range]:
    """Heads that one selector stands for.

    Parameters
    ----------
    selector
        As in ``"8.*"``.
    shape
        The attention stack it is read against.
    kind
        ``query`` or ``kv``: which heads the selector counts.

    Returns
    -------
    dict
        For each layer, its heads.

    Raises
    ------
    RecipeError
        No selector, a layer or head that the stack does not have, or a layer that is named although it has no softmax heads.
    """
    layers, heads = parse_selector(selector)
    counts = shape.heads(kind)
    if layers is not None and layers.stop > shape.num_layers:
        raise RecipeError(
            f"layer {layers.stop - 1} of selector {selector!r} does not exist",
            remedy=f"layers are {_span(shape.num_layers)}",
        )
    chosen = shape.softmax_layers() if layers is None else layers
    for layer in chosen:
        if not counts[layer]:
            raise RecipeError(
                f"layer {layer}, which selector {selector!r} names, has no softmax attention and so no heads",
                remedy=f"name layers of {_join(shape.softmax_layers())}, or all of them with *",
            )
        if heads is not None and heads.stop > counts[layer]:
            raise RecipeError(
                f"head {heads.stop - 1} of selector {selector!r} does not exist in layer {layer}",
                remedy=f"its {_WORDS[kind]} are {_span(counts[layer])}",
            )
    if not chosen:
        raise RecipeError(f"selector {selector!r} selects nothing: no layer of this part has softmax attention",
                          remedy="choose another part")  # fmt: skip
    return {layer: range(counts[layer]) if heads is None else heads for layer in chosen}


def expand_all(
    selected: Iterable[tuple[str, T]], shape: PartShape, kind: str = "query", budget: int = 1_000_000
) -> dict[int, dict[int, T]]:
    """Heads that several selectors stand for, each with its value; later selectors override earlier ones.

    Parameters
    ----------
    selected
        Pairs of selector and value.
    budget
        Most heads that may be visited, repetitions counted: thousands of overlapping selectors must not hang a server.

    Returns
    -------
    dict
        ``{layer: {head: value}}``, both in ascending order.

    Raises
    ------
    RecipeError
        As :func:`expand`, with the selector as key; or the selectors overlap beyond the budget.
    """
    found: dict[int, dict[int, T]] = {}
    for selector, value in selected:
        try:
            layers = expand(selector, shape, kind)
        except RecipeError as error:
            raise error.at(key=key_path([selector])) from None
        for layer, heads in layers.items():
            budget -= len(heads)
            found.setdefault(layer, {}).update(dict.fromkeys(heads, value))
        if budget < 0:
            raise RecipeError("the selectors overlap too often", remedy="name each head once")
    return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}


def select_heads(selectors: str | Iterable[str], shape: PartShape, kind: str = "query") -> dict[int, tuple[int, ...]]:
    """Heads that one selector or several stand for together, ``{layer: (head, ...)}`` in ascending order.

    Raises
    ------
    RecipeError
        As :func:`expand`; or there is no selector at all.
    """
    chosen = [selectors] if isinstance(selectors, str) else list(selectors)
    if not chosen:
        raise RecipeError("no heads are named", remedy=_HOW)
    return {layer: tuple(heads) for layer, heads in expand_all(((s, None) for s in chosen), shape, kind).items()}


def to_selectors(heads: Mapping[int, Mapping[int, T]], shape: PartShape, kind: str = "query") -> dict[str, T]:
    """Few selectors that say the same as ``{layer: {head: value}}``: the inverse of :func:`expand_all`.

    Selectors do not overlap, so their order means nothing; they come in the order of their first heads.
    """
    counts = shape.heads(kind)
    every_layer = list(shape.softmax_layers())
    # A run of neighbouring heads with the same value, and the layers that have exactly this run. A run of all of a layer's
    # heads counts as `*`, so that layers of different sizes share it.
    runs: dict[tuple[str, T], list[int]] = {}
    first_head: dict[tuple[str, T], int] = {}
    for layer in sorted(heads):
        for first, last, value in _runs(heads[layer]):
            text = "*" if (first, last) == (0, counts[layer] - 1) and last else _text(first, last)
            runs.setdefault((text, value), []).append(layer)
            first_head[text, value] = first
    found: list[tuple[int, int, str, T]] = []
    for (text, value), layers in runs.items():
        if layers == every_layer and len(layers) > 1:
            found.append((layers[0], first_head[text, value], f"*.{text}", value))
        else:
            found += [
                (first, first_head[text, value], f"{_text(first, last)}.{text}", value)
                for first, last, _ in _runs(dict.fromkeys(layers))
            ]
    return {text: value for *_, text, value in sorted(found, key=lambda entry: entry[:3])}


def _runs(values: Mapping[int, T]) -> Iterator[tuple[int, int, T]]:
    """Runs of neighbouring numbers with equal values: first, last, value."""
    first = last = -2
    for number in sorted(values):
        if number == last + 1 and values[number] == values[first]:
            last = number
            continue
        if first >= 0:
            yield first, last, values[first]
        first = last = number
    if first >= 0:
        yield first, last, values[first]


def kv_head_of(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    """KV head that a query head reads: ``query_head // G`` with G = num_heads / num_kv_heads.

    Raises
    ------
    RecipeError
        No such query head, or KV heads that do not divide the query heads.
    """
    group = _group(num_heads, num_kv_heads)
    _require(query_head, num_heads, "query")
    return query_head // group


def query_heads_of(kv_head: int, num_heads: int, num_kv_heads: int) -> range:
    """Query heads that share a KV head: G neighbours.

    Raises
    ------
    RecipeError
        No such KV head, or KV heads that do not divide the query heads.
    """
    group = _group(num_heads, num_kv_heads)
    _require(kv_head, num_kv_heads, "kv")
    return range(kv_head * group, (kv_head + 1) * group)


def local_heads(num_heads: int, num_kv_heads: int, rank: int, world: int) -> LocalHeads:
    """Heads that one tensor-parallel rank holds. A recipe's heads are global; this says which of them are here.

    Query heads lie contiguously over the ranks. KV heads do too; where there are more ranks than KV heads, each KV head is
    replicated on ``world / num_kv_heads`` neighbouring ranks.

    Raises
    ------
    RecipeError
        No such rank, or heads that do not divide over the ranks.
    """
    group = _group(num_heads, num_kv_heads)
    if world < 1 or not 0 <= rank < world:
        raise RecipeError(f"there is no rank {rank} of {world}", remedy="ranks count from 0")
    if num_heads % world or (num_kv_heads % world and world % num_kv_heads):
        raise RecipeError(
            f"{num_heads} query heads and {num_kv_heads} KV heads cannot be split evenly over {world} ranks",
            remedy="choose a tensor-parallel size that divides the query heads, and divides the KV heads or is a multiple of them",
        )
    size = num_heads // world
    query = range(rank * size, (rank + 1) * size)
    return LocalHeads(query, range(query.start // group, (query.stop - 1) // group + 1))


def _group(num_heads: int, num_kv_heads: int) -> int:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise RecipeError(
            f"{num_kv_heads} KV heads do not divide {num_heads} query heads",
            remedy="each KV head serves the same number of query heads",
        )
    return num_heads // num_kv_heads


def _require(head: int, count: int, kind: str) -> None:
    if not 0 <= head < count:
        raise RecipeError(f"head {head} does not exist", remedy=f"the {_WORDS[kind]} are {_span(count)}")


_WORDS = {"query": "query heads", "kv": "KV heads (not query heads)"}


def _text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _span(count: int) -> str:
    return _text(0, count - 1)


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(_text(first, last) for first, last, _ in _runs(dict.fromkeys(numbers))) or "none"
