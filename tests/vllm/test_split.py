"""How layers are cut: heads, ranks, places, block sizes, prefix-cache hits; without an engine."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from headpatch.adapters.vllm.split import FULL, WINDOW, Split, choose_blocks, longest_hit, plan_split
from headpatch.errors import EngineError
from headpatch.heads import PartShape

WITHOUT_VLLM = True


def part(layers: int, heads: int, kv: int) -> PartShape:
    return PartShape((heads,) * layers, (kv,) * layers, (64,) * layers)


def plan(
    full: dict[int, tuple[int, ...]],
    kv: int = 8,
    world: int = 1,
    unit: int | None = None,
    keep: tuple[int, int] = (64, 256),
) -> Split:
    return plan_split(full, *keep, part(len(full), 4 * kv, kv), world, unit)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("unit", [None, 1, 2])
def test_every_head_is_in_one_piece_of_one_rank(world: int, unit: int | None) -> None:
    rng = random.Random(world)
    full = {layer: tuple(rng.sample(range(8), rng.randrange(9))) for layer in range(12)}
    full[3], full[7] = (), tuple(range(8))
    split = plan(full, world=world, unit=unit)
    for layer, kept in full.items():
        ranks = [split.pieces(layer, rank) for rank in range(world)]
        # vLLM wants the same layers on all ranks.
        assert len({tuple(piece.kind for piece in pieces) for pieces in ranks}) == 1
        pieces = list(itertools.chain(*ranks))
        assert sorted(h for p in pieces for h in p.kv) == list(range(8))
        assert sorted(h for p in pieces for h in p.query) == list(range(32))
        assert {h for p in pieces if p.kind == FULL for h in p.kv} == set(kept)
        for piece in pieces:
            assert {h // 4 for h in piece.query} == set(piece.kv)
            assert piece.kind == WINDOW or len(piece.kv) <= split.unit
        for rank, found in enumerate(ranks):
            here = range(rank * 8 // world, (rank + 1) * 8 // world)
            assert all(h in here for piece in found for h in piece.kv)
        assert unit is not None or sum(p.kind == FULL for p in ranks[0]) <= 2


def test_equal_layers_waste_nothing() -> None:
    split = plan({layer: (layer % 5, 5, 6, 7) for layer in range(8)})
    assert (split.unit, split.wasted()) == (4, (0, 32))
    assert "empty" not in split.describe()
    assert [p.kind for p in split.pieces(0, 0)] == [FULL, WINDOW]


def test_unequal_layers_say_what_they_waste() -> None:
    """Counts of a published pattern at half of its heads."""
    counts = [2, 3, 4, 1, 4, 2, 2, 6, 4, 6, 5, 5, 2, 8, 4, 5, 4, 6, 3, 4, 5, 2, 4, 5, 3, 3, 3, 4, 5, 5, 8, 1]
    full = {layer: tuple(range(n)) for layer, n in enumerate(counts)}
    assert (plan(full).unit, plan(full).wasted()) == (4, (176 - sum(counts), 176))
    assert "places for heads that keep all are empty" in plan(full).describe()
    assert plan(full, unit=1).wasted() == (0, sum(counts))
    with pytest.raises(EngineError, match="no layer has more than 8"):
        plan(full, unit=9)


def test_one_sided_ranks() -> None:
    """Heads that all lie on one rank: the other has a piece without heads, because the cache must look the same there."""
    split = plan({0: (0, 1, 2, 3)}, world=2)
    assert [p.kv for p in split.pieces(0, 0)] == [(0, 1, 2, 3), ()]
    assert [p.kv for p in split.pieces(0, 1)] == [(), (4, 5, 6, 7)]
    assert split.wasted() == (4, 8)
    with pytest.raises(EngineError, match="replicated"):
        plan({0: (0,)}, kv=2, world=4)


def test_plain_values() -> None:
    split = plan({0: (1, 0), 1: ()}, world=2)
    assert Split.from_plain(json.loads(json.dumps(split.to_plain()))) == split


@pytest.mark.parametrize("sink", [32, 64, 96, 128])
@pytest.mark.parametrize(("block", "step"), [(16, 16), (32, 32), (128, 32), (128, 16)])
def test_blocks_of_both_kinds_are_equally_large(block: int, step: int, sink: int) -> None:
    for kept in range(1, 8):
        split = plan({0: tuple(range(kept))}, keep=(sink, 256))
        blocks = choose_blocks(split, block, [step])
        assert blocks.full_places == split.unit == kept
        assert blocks.window_places >= 8 - kept
        assert blocks.full_places * blocks.full_size == blocks.window_places * blocks.window_size
        assert blocks.full_size % block == 0
        assert blocks.window_size % step == 0
        assert sink % blocks.window_size == 0
    assert choose_blocks(plan({0: (0, 1, 2, 3)}), block, [step]).window_places in (4, 8)


def test_blocks_where_all_heads_drop_tokens() -> None:
    split = plan({0: (), 1: ()})
    assert choose_blocks(split, 32, [16]).window_size == 32
    with pytest.raises(EngineError, match=r"sink: 128"):
        choose_blocks(split, 128, [16])


@pytest.mark.parametrize(
    ("keep", "remedy"),
    [((4, 256), "sink: 16"), ((0, 256), "sink: 16"), ((40, 256), "sink: 48"), ((64, 9), "recent: 16")],
)
def test_windows_that_are_no_whole_blocks(keep: tuple[int, int], remedy: str) -> None:
    with pytest.raises(EngineError, match=remedy):
        choose_blocks(plan({0: (1,)}, keep=keep), 16, [16])


def test_hits_against_a_plain_rule() -> None:
    """A prefix is hit if its sinks are cached, and all blocks that its next token's window reaches into."""
    rng = random.Random(2)
    for _ in range(3000):
        blocks, sinks, needed, step = rng.randrange(12), rng.randrange(1, 4), rng.randrange(4), rng.choice([1, 2, 3])
        there = {i for i in range(blocks) if rng.random() < 0.7}

        def right(end: int, there: set[int] = there, sinks: int = sinks, needed: int = needed) -> set[int] | None:
            wanted = {i for i in range(end) if i < sinks or i >= end - needed}
            return wanted if wanted <= there else None

        best = max(end for end in range(0, blocks + 1, step) if right(end) is not None)
        end, kept = longest_hit(blocks, sinks, max(1, needed), step, lambda i, there=there: i in there and [i])
        if needed:
            assert end == best
            assert right(end) == set(kept)
