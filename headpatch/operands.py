"""What a method may ask of an engine: the closed list of operands, with their shapes and meanings.

Methods name operands and never engines; adapters supply operands and never name a method. An adapter publishes a
:class:`Supply` for each operand; :func:`refusals` says which needs of a method it cannot meet, and ``apply()`` refuses by
operand and feature before it touches anything.

Letters in shapes: b rows of the batch, q query positions of this call, n keys of this call, H query heads, K KV heads, d head
dimension, D width of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "KEYED", "OPERANDS", "SCOPES", "SEGMENT_KINDS", "Operand", "Segment", "Supply", "first_token", "refusals", "widest_scope",
]  # fmt: skip

SCOPES = ("prefix", "prompt", "request")
"""What may be shared between requests, narrowest salt first.

``prefix``: a token's keys and values depend on the recipe and on earlier tokens only. ``prompt``: they depend on the whole
prompt. ``request``: they depend on data given with the call.
"""


@dataclass(frozen=True)
class Operand:
    """One entry of the closed list.

    Attributes
    ----------
    name
        How methods ask for it.
    kind
        ``segment`` (a set of keys), ``tensor``, ``row`` (one number or mask per row), ``heads`` (across heads), or ``storage`` (what
        a cache can hold; no value that a method receives).
    shape
        Shape of what the method receives, in the letters of this module.
    meaning
        One sentence.
    """

    name: str
    kind: str
    shape: str
    meaning: str


OPERANDS: Mapping[str, Operand] = {
    o.name: o
    for o in (
        Operand("first_token", "segment", "[b, 1, q, n] bool", "the first real token that a query row can see"),
        Operand("spans", "segment", "[b, 1, 1, n] bool", "the caller's spans of each row (their union)"),
        Operand("beside_spans", "segment", "[b, 1, 1, n] bool",
                "keys of the prompt outside the caller's spans; none in rows without a span"),
        Operand("image_tokens", "segment", "[b, 1, 1, n] bool", "keys of image placeholder tokens"),
        Operand("vision_salient", "segment", "[b, 1, 1, n] bool",
                "keys of image tokens whose patch the vision tower's class token attends to most, in one of the tower's layers"),
        Operand("column_sinks", "segment", "[b, H, 1, n] bool",
                "keys whose mean attention over the prompt's queries exceeds a threshold"),
        Operand("residual_sinks", "segment", "[b, 1, 1, n] bool",
                "keys whose residual stream is extreme in named dimensions"),
        Operand("lse", "tensor", "[b, H, q] fp32", "natural-log log-sum-exp of the scores, before any edit"),
        Operand("q", "tensor", "[b, H, q, d]", "queries as the attention kernel gets them"),
        Operand("k", "tensor", "[b, K, n, d]", "keys as the attention kernel gets them"),
        Operand("v", "tensor", "[b, K, n, d]", "values as the attention kernel gets them"),
        Operand("column_means", "tensor", "[b, H, n] fp32",
                "mean attention that each key receives from the queries of this call that can see it"),
        Operand("window_scores", "tensor", "[b, H, w, n] fp32",
                "attention of the last w queries of this call (w: the method's field `window`)"),
        Operand("layer_input", "tensor", "[b, q, D]", "residual stream that enters the layer"),
        Operand("o_proj", "tensor", "[H, d, D]", "output-projection slice of each head"),
        Operand("arrays", "tensor", "named", "the recipe's own tensors"),
        Operand("prompt_len", "row", "[b] int64", "real tokens of the prompt; fixed when the request starts"),
        Operand("position", "row", "[b, q] int64", "position of each query, counted from the row's first real token"),
        Operand("image_queries", "row", "[b, q] bool", "which queries are image placeholder tokens"),
        Operand("without_image", "row", "[b] int64",
                "row of this batch that holds the same prompt without its image, -1 where there is none"),
        Operand("kv_windows", "storage", "[K] lengths",
                "KV heads of one layer that keep different tokens: all, or the first and the last ones"),
        Operand("kv_selection", "storage", "[K] sets of positions",
                "KV heads of one layer that keep chosen tokens of the prompt, each its own"),
        Operand("depth", "row", "(layer, layers)",
                "the layer's place among those of its part that have softmax attention, and their number"),
        Operand("all_heads", "heads", "[b, q, H, d]", "outputs of all heads of the layer, gathered over ranks"),
    )
}  # fmt: skip

KEYED = frozenset(o.name for o in OPERANDS.values() if re.search(r"\bn\b", o.shape))
"""Operands that have an entry for every key of the call, whatever a cache policy keeps of them."""

SEGMENT_KINDS = frozenset(o.name for o in OPERANDS.values() if o.kind == "segment")


@dataclass(frozen=True)
class Segment:
    """A set of keys that a mass or scores method names.

    Attributes
    ----------
    kind
        One of :data:`SEGMENT_KINDS`.
    options
        What that kind needs, as sorted pairs. column_sinks: ``threshold``; ``per_length`` (default False: the threshold is
        divided by the prompt's length); ``min_queries`` (default 1: keys that fewer queries see are none). residual_sinks:
        ``dims`` and ``threshold``. vision_salient: ``layer`` of the tower (negative: from its end; its attention is summed over
        heads), and either ``share`` (so much of each image's tokens, rounded down, those attended to most) or ``fence`` (those
        above the image's third quartile by more than so many interquartile ranges).
    minus
        Kinds whose keys are taken out (image tokens minus residual sinks, say); they must be segments named before.
    """

    kind: str
    options: tuple[tuple[str, object], ...] = ()
    minus: tuple[Segment, ...] = field(default=())
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in SEGMENT_KINDS:
            raise ValueError(f"unknown segment {self.kind!r}; there are {', '.join(sorted(SEGMENT_KINDS))}")
        object.__setattr__(self, "_hash", hash((self.kind, self.options, self.minus)))

    def __hash__(self) -> int:  # asked for in every layer of every call
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:  # another process hashes words differently
        return Segment, (self.kind, self.options, self.minus)

    def operands(self) -> tuple[str, ...]:
        """Names of the operands that this segment is made of."""
        return (self.kind, *(name for s in self.minus for name in s.operands()))

    def mentions(self, other: Segment) -> bool:
        """Whether the keys of `other`, whatever is taken out of them, are needed to know this segment."""
        same = (self.kind, self.options) == (other.kind, other.options)
        return same or any(s.mentions(other) for s in self.minus)

    def option(self, name: str) -> object:
        """Value of one option; a KeyError names what is missing."""
        return dict(self.options)[name]


first_token = Segment("first_token")
"""The segment that ZeroTuning and every sink-aware method names."""


@dataclass(frozen=True)
class Supply:
    """How an adapter supplies one operand.

    Attributes
    ----------
    exact
        False where the adapter can only approximate it; a method that needs it is then refused.
    not_with
        Engine features or layer kinds under which it cannot be had (``mla``, ``position_bias``, ...), each refused by name.
    note
        One line for the compatibility table.
    """

    exact: bool = True
    not_with: tuple[str, ...] = ()
    note: str = ""


def refusals(needs: Iterable[str], supplies: Mapping[str, Supply], features: Iterable[str] = ()) -> list[str]:
    """Say in words which needs an adapter cannot meet while `features` are on; an empty list means all can be met."""
    present = set(features)
    words = []
    for name in dict.fromkeys(needs):
        supply = supplies.get(name)
        if supply is None:
            words.append(f"operand {name!r} is not supplied by this adapter")
        elif not supply.exact:
            words.append(f"operand {name!r} is only approximate in this adapter")
        else:
            words += [f"operand {name!r} cannot be had with {f}" for f in supply.not_with if f in present]
    return words


def widest_scope(scopes: Iterable[str]) -> str:
    """The scope that a set of patches has together: the one that shares least."""
    return max(scopes, key=SCOPES.index, default=SCOPES[0])
