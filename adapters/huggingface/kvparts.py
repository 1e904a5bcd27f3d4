"""What the attention function gets of a cache that holds head groups, and how a call without a cache looks the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, device

from headpatch.adapters.huggingface.kvplan import Policy
from headpatch.adapters.huggingface.kvrows import Chunk, Columns
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import FirstKey
from headpatch.errors import EngineError

__all__ = [
    "Bundle",
    "Kept",
    "Part",
    "Picked",
    "Slice",
    "Window",
    "bytes_of",
    "fresh",
    "ordered",
    "pick",
    "picked",
    "tail",
]

Picked = Tensor | slice | None
"""Some of a dimension: indices, a run of neighbours (a view, no copy), or None for all of it."""


@dataclass(frozen=True)
class Part:
    """Keys and values [b, h, n, d] of one group, and which of them each query sees."""

    k: Tensor
    v: Tensor
    seen: Visible
    first: FirstKey

    @classmethod
    def of(cls, pair: Sequence[Tensor], seen: Visible, first: FirstKey) -> Part:
        """Of keys and values that come together."""
        k, v = pair
        return cls(k, v, seen, first)


@dataclass(frozen=True)
class Window:
    """Keys and values of a streaming group for the queries at positions past..stop.

    Attributes
    ----------
    sink_k, sink_v
        [b, h, min(sink, stop), d]: positions 0, 1, ...
    k, v
        [b, h, stop - start, d]: positions start..stop without a gap.
    """

    sink_k: Tensor
    sink_v: Tensor
    k: Tensor
    v: Tensor
    start: int
    past: int
    stop: int


@dataclass(frozen=True)
class Bundle:
    """Queries that are attended to together: all rows, or one (`row`) with its real `queries`; a group is None without heads."""

    full: Part | None
    streaming: Part | Window | None
    row: int | None = None
    queries: Columns | None = None


@dataclass(frozen=True)
class Slice:
    """Some rows and some KV heads that keep equally many tokens.

    Attributes
    ----------
    rows, queries
        Which rows and query heads.
    heads
        The query heads again, as numbers.
    part
        [rows, KV heads, n, d].
    """

    rows: Picked
    queries: Picked
    heads: tuple[int, ...]
    part: Part


class Kept:
    """What a :class:`KeptLayer` returns in place of keys and values; only this adapter's attention function can read it.

    Attributes
    ----------
    bundles
        Of a policy by position, or of a prompt.
    k, v
        The call's own new tokens [b, K, q, d].
    slices
        Of a policy that has chosen; then there are no bundles.
    after
        Called with the queries once they have been attended to, if anything is to be chosen.
    """

    def __init__(
        self, bundles: list[Bundle], k: Tensor, v: Tensor, slices: tuple[Slice, ...] = (), after: Any = None
    ) -> None:
        self.bundles, self.k, self.v, self.slices, self.after = bundles, k, v, slices, after

    def __getattr__(self, name: str) -> Any:
        raise EngineError(
            f"keys and values of a cache that holds head groups were asked for {name!r}: only the model that the cache policy is "
            "applied to can read them. Start with an empty cache, or apply the recipe to this model, too"
        )


def picked(numbers: Sequence[int], count: int, on: device) -> Picked:
    """Ascending `numbers` out of `count`, to be kept: made on the host, which every use would otherwise wait for."""
    if len(numbers) == count:
        return None
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=on)


def pick(x: Tensor, dim: int, which: Picked) -> Tensor:
    """Some of one dimension of `x`."""
    if which is None:
        return x
    if isinstance(which, slice):
        return x.narrow(dim, which.start, which.stop - which.start)
    return x.index_select(dim, which)


def ordered(policy: Policy, x: Tensor) -> Tensor:
    """[b, K, n, d] with the full heads in front."""
    index = policy.kv_order(x.device)
    return x if index is None else x.index_select(1, index)


def tail(past: int, new: int, on: device) -> Visible:
    """Who sees what where the last `new` of ``past + new`` tokens ask."""
    kind = "all" if new == 1 else ("tail" if past else "causal")
    return Visible(kind, new, past + new, on)


def fresh(policy: Policy, chunk: Chunk, key: Tensor, value: Tensor) -> Kept:
    """A call's own tokens, for a call without a cache."""
    k, v = ordered(policy, key), ordered(policy, value)
    n = len(policy.full)
    groups = (k[:, :n], v[:, :n]), (k[:, n:], v[:, n:])
    if chunk.even:
        return Kept([_bundle(policy, *groups, 0, chunk.queries)], key, value)
    if chunk.queries == 1 and not chunk.spans:  # a single column of nothing but real tokens
        return Kept([_bundle(policy, *groups, 0, 1)], key, value)
    if not chunk.spans:
        return Kept([_masked(policy, chunk, *groups)], key, value)
    bundles = []
    for span in chunk.spans:
        if span.new:
            mine = [[x[span.row : span.row + 1, :, span.keys] for x in group] for group in groups]
            bundles.append(_bundle(policy, mine[0], mine[1], 0, span.new, span.row, span.queries))
    return Kept(bundles, key, value)


def _masked(policy: Policy, chunk: Chunk, full: Any, streaming: Any) -> Bundle:
    """All rows at once, under masks: padded rows in a traced call, which cannot go row by row."""
    assert chunk.real is not None
    assert chunk.pads is not None
    real, n = chunk.real, chunk.queries
    column = torch.arange(n, device=real.device)
    position = real.long().cumsum(-1) - 1
    first = FirstKey(chunk.pads)

    def causal(i: int, j: int) -> Tensor:
        return (column <= column[i:j, None])[None, None] & real[:, None, None]

    def windowed(i: int, j: int) -> Tensor:
        near = position[:, None] > position[:, i:j, None] - policy.recent
        return causal(i, j) & (near | (position[:, None] < policy.sink))[:, None]

    parts = [
        Part.of(group, Visible("blocks", n, n, real.device, seen), first) if heads else None
        for group, heads, seen in ((full, policy.full, causal), (streaming, policy.streaming, windowed))
    ]
    return Bundle(parts[0], parts[1])


def _bundle(
    policy: Policy, full: Any, streaming: Any, past: int, stop: int, row: int | None = None, queries: Columns | None = None
) -> Bundle:  # fmt: skip
    """Full heads over `full`; streaming heads over the window's tokens, of which none is dropped yet."""
    k, v = full
    a = Part(k, v, tail(past, stop - past, k.device), FirstKey()) if policy.full else None
    b = None
    if policy.streaming:
        k, v = streaming
        b = Window(k[:, :, : policy.sink], v[:, :, : policy.sink], k, v, 0, past, stop)
    return Bundle(a, b, row, queries)


def bytes_of(layer: Any) -> int:
    """Bytes of the tensors that a layer of transformers' own holds, quantised ones included."""
    found = {}
    for value in vars(layer).values():
        for x in _tensors(value):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        inner = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
        parts = [x for y in inner if y is not None for x in _tensors(y)]
        return parts or [value]
    if isinstance(value, tuple | list):
        return [x for y in value for x in _tensors(y)]
    if isinstance(value, dict):
        return [x for y in value.values() for x in _tensors(y)]
    return []
