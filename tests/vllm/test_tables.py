"""Slots, maps and the numbers in the tables, without an engine."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import safetensors.torch
import torch

from headpatch.adapters.vllm.plan import compile_recipe
from headpatch.adapters.vllm.rowedits import edit_rows
from headpatch.adapters.vllm.tables import NOBODY, Tables
from headpatch.errors import EngineError
from headpatch.heads import ModelShape, PartShape
from headpatch.recipe import Recipe, resolve

WITHOUT_VLLM = True
SHAPE = ModelShape("llama", {"text": PartShape((6, 6, 6), (2, 2, 2), (8, 8, 8))}, "text")


def make(*patches: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"headpatch": 1, "patches": list(patches)})


def gamma(value: float) -> Recipe:
    return make({"method": "zerotuning", "heads": {"*.*": value}})


def tables(slots: int = 3, local: range = range(6), vectors: bool = False) -> Tables:
    return Tables(SHAPE, [[local]] * 3, slots, blocks=16, rows=8, device=torch.device("cpu"), vectors=vectors)


def test_constants_multiply_and_identity_is_left_out() -> None:
    recipe = make(
        {"method": "head_scaling", "heads": {"0.0": 3.0, "1.1": 1.0}},
        {"method": "zerotuning", "heads": {"0.*": 2.0, "2.5": 1.0}},
        {"method": "zerotuning", "heads": {"0.1": 0.5}},
    )
    edits = compile_recipe(recipe, SHAPE)
    assert set(edits) == {0}  # layers 1 and 2 hold identities only
    assert edits[0].weight.tolist() == [2, 1, 2, 2, 2, 2]
    assert edits[0].scale.tolist() == [3, 1, 1, 1, 1, 1]


def test_a_rank_has_its_own_heads() -> None:
    found = tables(local=range(2, 4))
    slot = found.put(make({"method": "zerotuning", "heads": {"1.0-2": 2.0, "1.3": 5.0, "1.5": 7.0}}))
    assert found.weight[:, slot].tolist() == [[1, 1], [2, 5], [1, 1]]


def test_slots_are_kept_by_content_and_reused_when_idle() -> None:
    found = tables(3)
    pinned = found.put(gamma(2.0), pinned=True)
    a, b = found.put(gamma(3.0)), found.put(gamma(4.0))
    assert len({pinned, a, b}) == 3
    assert found.put(gamma(3.0)) == a
    found.use(a)
    found.use(b)
    with pytest.raises(EngineError, match="every recipe slot"):
        found.put(gamma(5.0))
    found.release(a)
    found.use(a)
    found.release(b)
    assert found.put(gamma(5.0)) == b  # idle; a is in use, the first is pinned
    assert found.weight[0, b].tolist() == [5.0] * 6
    found.release(a)
    assert found.put(gamma(6.0)) == a or found.put(gamma(6.0)) == b
    assert found.by_key[gamma(2.0).digest] == pinned


def test_the_longest_idle_makes_way() -> None:
    found = tables(2)
    a, b = found.put(gamma(2.0)), found.put(gamma(3.0))
    for slot in (b, a):
        found.use(slot)
        found.release(slot)
    assert found.put(gamma(4.0)) == b


def test_maps() -> None:
    found = tables()
    found.mark_blocks([3, 0, 5], [1, 2, NOBODY])
    assert found.block_slot[[0, 3, 5]].tolist() == [NOBODY, 1, NOBODY]  # the null block is nobody's
    found.order([(1, 10), (NOBODY, 20), (2, 30)])
    assert (found.row_slot[:4].tolist(), found.row_prompt[:3].tolist()) == ([1, NOBODY, 2, NOBODY], [10, 20, 30])
    found.order([(2, 30)])
    assert found.row_slot[:4].tolist() == [2, NOBODY, NOBODY, NOBODY]  # rows that are gone are nobody's


class _Patch:
    """What edit_rows reads of a layer."""

    def __init__(self, found: Tables, index: int) -> None:
        self.index, self.start, self.num_heads = index, 0, 6
        self.worker: Any = type("W", (), {"tables": found, "armed": type("A", (), {"graphs": False})()})()


@pytest.mark.parametrize("positions", ["decode", "last"])
def test_row_edits_follow_prompt_and_position(positions: str) -> None:
    """Three packed rows: a chunk that ends a prompt and goes on, a decode step, somebody else's."""
    found = tables()
    slot = found.put(make({"method": "head_scaling", "heads": {"1.2": -2.0, "1.4": 3.0}, "positions": positions}))
    found.use(slot)
    found.order([(slot, 5), (slot, 9), (NOBODY, 4)])
    out = torch.randn(4 + 1 + 2, 6, 8)
    starts, lengths = torch.tensor([0, 4, 5, 7], dtype=torch.int32), torch.tensor([7, 20, 6], dtype=torch.int32)
    wanted = out.clone()
    first = 5 if positions == "decode" else 4
    for t, position in enumerate([3, 4, 5, 6, 19]):
        limit = first if t < 4 else 9
        if position >= limit:
            wanted[t, 2] *= -2.0
            wanted[t, 4] *= 3.0
    edit_rows(_Patch(found, 1), out, starts, lengths)  # type: ignore[arg-type]
    torch.testing.assert_close(out, wanted)
    before = out.clone()
    edit_rows(_Patch(found, 0), out, starts, lengths)  # type: ignore[arg-type]
    assert torch.equal(out, before)


def task(*more: dict[str, Any], method: str = "soft_injection", seed: int = 0, **patch: Any) -> Recipe:
    """A recipe with vectors on heads 1.2, 1.3 and 2.0, and other patches behind."""
    strengths = {"1.2": 0.25, "1.3": 1.0, "2.0": 0.5}
    word, g = ("t" if method == "soft_injection" else "v"), torch.Generator().manual_seed(seed)
    data = safetensors.torch.save({f"{word}.{name}": torch.randn(8, generator=g) for name in strengths})
    plain = {
        "headpatch": 1,
        "patches": [{"method": method, "heads": strengths, **patch}, *more],
        "tensors": {"file": "t.safetensors", "sha256": hashlib.sha256(data).hexdigest()},
    }
    return Recipe.from_dict(plain, arrays=data)


SCALED: dict[str, Any] = {"method": "head_scaling", "heads": {"1.*": 3.0}}
LATER: dict[str, Any] = {"method": "head_scaling", "heads": {"1.2": -2.0}, "positions": "decode"}


@pytest.mark.parametrize(
    ("more", "rows"),
    [([], 0), ([SCALED], 0), ([{**SCALED, "positions": "last"}], 2), ([SCALED, LATER], 3)],
    ids=["alone", "scaled after", "other positions", "in order"],
)
def test_tables_do_what_the_methods_say(more: list[dict[str, Any]], rows: int) -> None:
    """Constant edits of some positions go into tables where all of a layer's are of the same; what comes out is the methods' own."""
    recipe = task(*more)
    found = tables(vectors=True)
    edits = compile_recipe(recipe, SHAPE)[1]
    assert len(edits.rows) == rows and (edits.affine is None) == bool(rows)
    slot = found.put(recipe)
    found.use(slot)
    found.order([(slot, 5), (slot, 9), (NOBODY, 4)])
    g = torch.Generator().manual_seed(1)
    out = torch.randn(4 + 1 + 2, 6, 8, generator=g)
    starts, lengths = torch.tensor([0, 4, 5, 7], dtype=torch.int32), torch.tensor([7, 9, 6], dtype=torch.int32)
    wanted = out.clone()
    for patch in resolve(recipe, SHAPE):
        heads = list(patch.heads.get(1, {}))
        method: Any = patch.method
        for t, (position, prompt) in enumerate([(3, 5), (4, 5), (5, 5), (6, 5), (8, 9)]):
            operands = {
                "position": torch.tensor([[position]]), "prompt_len": torch.tensor([prompt]), "arrays": patch.pick(1, heads)
            }  # fmt: skip
            strength = torch.tensor(list(patch.heads[1].values()))
            wanted[t, heads] = method.edit(wanted[None, None, t, heads], strength, operands)[0, 0]
    if not rows:  # constant scales are the kernel's business
        out[:5] *= found.scale[1, slot][:, None]
    edit_rows(_Patch(found, 1), out, starts, lengths)  # type: ignore[arg-type]
    torch.testing.assert_close(out, wanted)
    assert not torch.equal(out[1], out[0])


def test_ranks_hold_their_heads_vectors_and_slots_are_written_over() -> None:
    recipe = task()
    found = tables(1, range(3, 6), vectors=True)
    slot = found.put(recipe)
    assert found.shift is not None
    torch.testing.assert_close(found.shift[1, slot, 0], recipe.arrays()["t.1.3"])
    assert found.factor[1, slot].tolist() == [0.0, 1.0, 1.0]
    assert not found.shift[1, slot, 1:].any() and not found.shift[2].any()  # 1.2 and 2.0 are another rank's
    assert (found.start[1, slot], found.stop[1, slot]) == (-1, 0)
    again = found.put(gamma(2.0))
    assert again == slot
    assert not found.shift.any() and (found.factor == 1).all() and (found.start == found.stop).all()
    with pytest.raises(EngineError, match="none was promised"):
        tables().put(recipe)


def test_two_vectors_on_a_head_are_added_in_order() -> None:
    recipe = task(method="function_vector")
    both = Recipe.from_dict(
        {
            **recipe.to_dict(),
            "patches": [*recipe.to_dict()["patches"], {"method": "function_vector", "heads": {"1.2": -2.0}}],
        },
        arrays=recipe.tensors.read(),  # type: ignore[union-attr]
    )
    affine = compile_recipe(both, SHAPE)[1].affine
    assert affine is not None and affine.shift is not None
    torch.testing.assert_close(affine.shift[2], (0.25 - 2.0) * recipe.arrays()["v.1.2"])
    assert (affine.factor == 1).all()
