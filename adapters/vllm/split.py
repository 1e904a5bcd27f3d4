"""KV heads of one layer that keep different tokens: which of them share a cache, on which rank, in blocks of which size.

A layer is cut into *pieces*, each an attention layer of the engine's own. Heads that keep everything go into one piece or more
(``full``), all others into one (``window``): those keep the first `sink` and the last `recent` tokens. All full pieces of a model
form one group of vLLM's KV caches, all window pieces another, with block tables of their own and one pool of blocks under both, so
that a block that a window piece lets go of can be had by anybody.

Blocks of all groups have one size in bytes, and a group has one number of heads a block. A piece therefore has a number of *places*
for heads that is the same in all layers and on all ranks, `unit` for full ones, and holds as many heads as the recipe wants there:
what is computed is the recipe's, layer by layer, whatever is rounded in memory. Places without a head are reported.

Nothing here knows vLLM, and nothing needs a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import EngineError
from headpatch.heads import local_heads, query_heads_of

if TYPE_CHECKING:
    from headpatch.heads import PartShape

__all__ = ["FULL", "WINDOW", "Blocks", "Piece", "Split", "check_whole", "choose_blocks", "longest_hit", "plan_split"]

FULL, WINDOW = "full", "window"
MAX_PIECES = 2
"""Full pieces that a layer is cut into where the flag names no unit: each costs a launch of the attention kernel."""
MAX_PERIOD = 4096
"""Largest least common multiple of two block sizes: prefix-cache hits end at its multiples only."""


@dataclass(frozen=True)
class Piece:
    """Heads of one layer on one rank that share a cache.

    Attributes
    ----------
    kind
        :data:`FULL` or :data:`WINDOW`.
    kv
        KV heads of the whole model, ascending; empty where this rank has none for a piece that other ranks need.
    query
        Query heads of the whole model that read them, ascending.
    """

    kind: str
    kv: tuple[int, ...]
    query: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """How all layers of a model are cut, on every rank.

    Attributes
    ----------
    sink, recent
        Tokens that the heads of window pieces keep.
    full
        By layer, the KV heads that keep everything; layers without softmax attention are missing.
    num_heads, num_kv_heads
        By layer, of the whole model.
    world
        Tensor-parallel ranks.
    unit
        Places for KV heads in a full piece.
    """

    sink: int
    recent: int
    full: Mapping[int, tuple[int, ...]]
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    world: int
    unit: int

    def pieces(self, layer: int, rank: int) -> tuple[Piece, ...]:
        """The pieces of a layer on a rank: full ones, then the window piece; equally many of each kind on all ranks."""
        full, window = self._local(layer, rank)
        made = [
            self._piece(FULL, layer, full[i * self.unit : (i + 1) * self.unit]) for i in range(self.full_pieces(layer))
        ]
        return (*made, self._piece(WINDOW, layer, window)) if self.has_window(layer) else tuple(made)

    def full_pieces(self, layer: int) -> int:
        """Full pieces of a layer."""
        return max(-(-len(self._local(layer, rank)[0]) // self.unit) for rank in range(self.world))

    def has_window(self, layer: int) -> bool:
        """Whether any rank has a head of the layer that keeps a window."""
        return any(self._local(layer, rank)[1] for rank in range(self.world))

    @property
    def window_heads(self) -> int:
        """Most heads that a window piece holds."""
        return max((len(self._local(layer, rank)[1]) for layer in self.full for rank in range(self.world)), default=0)

    def _local(self, layer: int, rank: int) -> tuple[list[int], list[int]]:
        """KV heads of a layer on a rank: those that keep everything, and those that do not."""
        here = local_heads(self.num_heads[layer], self.num_kv_heads[layer], rank, self.world).kv
        return [h for h in here if h in self.full[layer]], [h for h in here if h not in self.full[layer]]

    def _piece(self, kind: str, layer: int, kv: Sequence[int]) -> Piece:
        total, groups = self.num_heads[layer], self.num_kv_heads[layer]
        query = [head for kv_head in kv for head in query_heads_of(kv_head, total, groups)]
        return Piece(kind, tuple(kv), tuple(query))

    def wasted(self) -> tuple[int, int]:
        """Full places without a head, and all full places, over layers and ranks."""
        places = sum(self.full_pieces(layer) for layer in self.full) * self.unit * self.world
        used = sum(len(self._local(layer, rank)[0]) for layer in self.full for rank in range(self.world))
        return places - used, places

    def describe(self) -> str:
        """One line for logs and reports."""
        held = sum(map(len, self.full.values()))
        total = sum(self.num_kv_heads[layer] for layer in self.full)
        lost, places = self.wasted()
        rounding = f"; {lost} of {places} places for heads that keep all are empty" if lost else ""
        return (
            f"{held} of {total} KV heads keep all tokens, the others {self.sink} first and {self.recent} last ones; pieces of "
            f"{self.unit} KV heads{rounding}"
        )

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for the config; also what the compiled code depends on."""
        return {
            "sink": self.sink, "recent": self.recent, "world": self.world, "unit": self.unit,
            "full": [[layer, list(heads)] for layer, heads in sorted(self.full.items())],
            "num_heads": list(self.num_heads), "num_kv_heads": list(self.num_kv_heads),
        }  # fmt: skip

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Split:
        """Back from plain values."""
        return cls(
            sink=plain["sink"], recent=plain["recent"], world=plain["world"], unit=plain["unit"],
            full={layer: tuple(heads) for layer, heads in plain["full"]},
            num_heads=tuple(plain["num_heads"]), num_kv_heads=tuple(plain["num_kv_heads"]),
        )  # fmt: skip


def plan_split(
    full: Mapping[int, Sequence[int]], sink: int, recent: int, part: PartShape, world: int, unit: int | None = None
) -> Split:
    """Cut the layers of a model.

    Parameters
    ----------
    full
        By layer, the KV heads that keep everything.
    sink, recent
        What the others keep.
    part
        Heads of the stack.
    world
        Tensor-parallel ranks.
    unit
        Places for KV heads in a full piece. Small ones fit every layer and cost launches; None: as few empty places as
        :data:`MAX_PIECES` pieces a layer allow, none where all layers and ranks have equally many.

    Raises
    ------
    EngineError
        More ranks than KV heads, or a unit that no layer could fill.
    """
    for layer in full:
        if world > part.num_kv_heads[layer]:
            raise EngineError(
                f"layer {layer} has {part.num_kv_heads[layer]} KV heads: over {world} tensor-parallel ranks they are replicated, and "
                "operand 'kv_windows' is not supplied for replicated KV heads; use fewer ranks"
            )
    heads = {layer: tuple(sorted(kept)) for layer, kept in full.items()}
    plain = Split(sink, recent, heads, part.num_heads, part.num_kv_heads, world, 1)
    counts = {layer: plain.full_pieces(layer) for layer in heads}  # with one place a piece: the most heads of any rank
    most = max(counts.values(), default=0)
    if unit is None:
        units = range(max(1, -(-most // MAX_PIECES)), max(1, most) + 1)
        unit = min(units, key=lambda u: (sum(-(-n // u) * u for n in counts.values()), -u))
    elif unit > max(1, most):
        raise EngineError(
            f"pieces of {unit} KV heads: no layer has more than {most} heads on a rank that keep everything"
        )
    return Split(sink, recent, heads, part.num_heads, part.num_kv_heads, world, unit)


@dataclass(frozen=True)
class Blocks:
    """Tokens and places for KV heads of a block, in each group; both groups' blocks are equally large.

    Attributes
    ----------
    full_size, window_size
        Tokens.
    full_places, window_places
        KV heads.
    """

    full_size: int
    full_places: int
    window_size: int
    window_places: int


def choose_blocks(split: Split, block_size: int, steps: Sequence[int]) -> Blocks:
    """Block sizes of the two groups.

    Window blocks are as large as the pages of full ones allow, in whole heads, and as divides `sink`, so that the sinks are whole
    blocks. Where even the smallest are larger than a full block, full blocks hold several of the engine's.

    Parameters
    ----------
    block_size
        The engine's own.
    steps
        Block sizes that the attention kernel takes: any multiple of any of them.

    Raises
    ------
    EngineError
        `sink` is no whole number of blocks, or `recent` shorter than one.
    """
    heads, step = max(split.window_heads, 1), min(steps)
    if not any(split.full_pieces(layer) for layer in split.full):  # one group alone has the engine's block size
        check_whole(split, block_size)
        return Blocks(block_size, 0, block_size, heads)
    check_whole(split, step)
    full = block_size * -(-heads * step // (split.unit * block_size))
    page = split.unit * full  # in KV heads times tokens
    choices = [
        Blocks(full, split.unit, size, page // size)
        for size in range(step, page // heads + 1)
        if page % size == 0 and split.sink % size == 0 and size <= split.recent and any(size % s == 0 for s in steps)
        and math.lcm(full, size) <= MAX_PERIOD
    ]  # fmt: skip
    return min(choices, key=lambda b: (b.window_places, abs(b.window_size - b.full_size)))


def check_whole(split: Split, step: int) -> None:
    """Raise EngineError where the window is not made of whole blocks of `step` tokens."""
    if split.sink < step or split.sink % step:
        above = max(1, -(-split.sink // step)) * step
        raise EngineError(
            f"operand 'kv_windows': {split.sink} first tokens are no whole number of this engine's blocks, which hold {step} tokens "
            f"and are kept or freed as a whole; let the recipe keep {above} (sink: {above})"
        )
    if split.recent < step:
        raise EngineError(
            f"operand 'kv_windows': {split.recent} last tokens are less than one of this engine's blocks of {step}; "
            f"let the recipe keep at least as many (recent: {step})"
        )


def longest_hit(
    blocks: int, sinks: int, needed: int, step: int, cached: Callable[[int], Any]
) -> tuple[int, dict[int, Any]]:
    """The longest prefix that a prefix cache can give to heads that keep `sinks` first blocks and a window.

    Parameters
    ----------
    blocks
        Most blocks of the prefix.
    needed
        Blocks before the prefix's end that its next token's window reaches into.
    step
        The prefix is a multiple of so many blocks.
    cached
        What is cached of a block, by its number; something false where nothing is.

    Returns
    -------
    tuple
        Blocks of the prefix, and what is cached of those that are kept, by number.
    """
    kept: dict[int, Any] = {}
    for i in range(min(sinks, blocks)):
        found = cached(i)
        if not found:
            break
        kept[i] = found
    front = len(kept)
    if front == sinks:
        end, run = 0, dict[int, Any]()
        for i in range(blocks - 1, sinks - 1, -1):
            found = cached(i)
            if not found:
                run = {}
                continue
            if not run:
                if (i + 1) % step:
                    continue
                end = i + 1
            run[i] = found
            if len(run) >= needed:
                break
        if run and (len(run) >= needed or min(run) == sinks):
            return end, {**kept, **run}
    end = front - front % step
    return end, {i: found for i, found in kept.items() if i < end}
