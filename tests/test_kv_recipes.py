"""Cache policies as recipes: what they may say, which heads that means, and what they do not go with."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, ClassVar

import pytest
import torch
from recipe_tools import LLAMA, add_methods

from headpatch import Recipe, RecipeError
from headpatch.heads import ModelShape, PartShape
from headpatch.kv.duo_attention import DuoAttention
from headpatch.kv.streaming_llm import StreamingLLM
from headpatch.methods.base import MassMethod, OutputMethod, strength
from headpatch.policies import WindowMethod
from headpatch.recipe import resolve
from headpatch.resolve import check_policies

DUO: dict[str, Any] = {"method": "duo_attention", "full_kv_heads": ["3.1", "5.*"]}
STREAM: dict[str, Any] = {"method": "streaming_llm"}
UNEVEN = ModelShape("llama", {"text": PartShape((8, 0, 6, 8), (2, 0, 3, 8), (16, 0, 16, 16))}, "text")


def of(*patches: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"headpatch": 1, "patches": list(patches)})


def test_a_layer_that_is_not_named_streams_entirely():
    (patch,) = resolve(of(DUO), LLAMA)
    assert patch.heads == {layer: {3: (1,), 5: (0, 1, 2)}.get(layer, ()) for layer in range(30)}
    assert isinstance(patch.method, WindowMethod)
    assert (patch.method.sink, patch.method.recent) == (64, 256)


def test_nothing_is_listed_for_a_policy_that_treats_heads_alike():
    recipe = of(STREAM)
    (patch,) = resolve(recipe, UNEVEN)
    assert patch.heads == {0: (), 2: (), 3: ()}, "layers without softmax attention have no keys to keep"
    assert (patch.method.sink, patch.method.recent) == (4, 2000)
    assert recipe.patches[0].key == "patches[0]"
    assert recipe.to_dict()["patches"] == [STREAM]
    assert "streaming_llm in 3 layers (text)" in str(recipe.check(UNEVEN))


def test_selectors_count_kv_heads_of_each_layer():
    (patch,) = resolve(of({**DUO, "full_kv_heads": ["*.*", "3.6-7"]}), UNEVEN)
    assert patch.heads == {0: (0, 1), 2: (0, 1, 2), 3: tuple(range(8))}


WRONG = [
    ({**DUO, "full_kv_heads": ["0.3"]}, r'patches\[0\]\.full_kv_heads\["0\.3"\]: head 3 .* does not exist .*KV heads \(not query'),
    ({**DUO, "full_kv_heads": ["30.0"]}, r'full_kv_heads\["30\.0"\]: layer 30 .* does not exist'),
    ({**DUO, "full_kv_heads": [12.1]}, r"full_kv_heads\[0\]: must be a string.*in quotes"),
    ({**DUO, "full_kv_heads": {"3.1": 1.0}}, r"full_kv_heads: must be a list, is a mapping"),
    ({**DUO, "full_kv_heads": []}, r"full_kv_heads: is empty"),
    ({"method": "duo_attention"}, r"full_kv_heads: is missing"),
    ({"method": "duo_attention", "heads": ["3.1"]}, r"heads: unknown key"),
    ({**DUO, "sink": -1}, r"sink: -1 is out of range"),
    ({**DUO, "recent": 0}, r"recent: 0 is out of range"),
    ({**DUO, "recent": 2.5}, r"recent: must be a whole number"),
    ({**DUO, "sink": True}, r"sink: must be a whole number"),
    ({**STREAM, "full_kv_heads": ["0.1"]}, r"full_kv_heads: unknown key"),
    ({**STREAM, "heads": ["*.*"]}, r"heads: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("patch", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_named(patch, message):
    with pytest.raises(RecipeError, match=message) as caught:
        of(patch).check(LLAMA)
    assert caught.value.remedy


def test_a_recipe_for_another_gqa_layout_is_refused():
    """Head 4 of 8 KV heads would be another head among 4: the shape keys say so first, then the selector."""
    other = ModelShape("llama", {"text": PartShape((32,) * 32, (4,) * 32, (128,) * 32)}, "text")
    patch = {**DUO, "full_kv_heads": ["3.4"]}
    with pytest.raises(RecipeError, match=r'full_kv_heads\["3\.4"\]: head 4'):
        of(patch).check(other)
    recipe = Recipe.from_dict({"headpatch": 1, "model": {"num_kv_heads": 8}, "patches": [DUO]})
    with pytest.raises(RecipeError, match=r"model\.num_kv_heads: the recipe says 8, the model has 4"):
        recipe.check(other)


@pytest.mark.parametrize("patches", [(DUO, STREAM), (STREAM, STREAM), (DUO, DUO)])
def test_a_part_has_one_policy(patches):
    with pytest.raises(RecipeError, match=r"patches\[1\]: the part 'text' already has a cache policy"):
        of(*patches).check(LLAMA)


def test_policies_of_several_recipes_are_checked_together():
    first, second = resolve(of(DUO), LLAMA), resolve(of(STREAM), LLAMA)
    with pytest.raises(RecipeError, match="already has a cache policy"):
        check_policies([*first, *second])


ZERO = {"method": "zerotuning", "heads": {"*.*": 2.0}}


def test_keys_that_another_patch_names_are_kept_or_refused(monkeypatch):
    add_methods(monkeypatch)
    assert len(resolve(of(ZERO, DUO, {"method": "head_scaling", "heads": {"1.3": 0.0}}), LLAMA)) == 3
    with pytest.raises(
        RecipeError, match=r"patches\[0\]: zerotuning needs 'first_token', and .*let duo_attention keep it"
    ):
        of(ZERO, {**DUO, "sink": 0}).check(LLAMA)
    with pytest.raises(
        RecipeError, match=r"patches\[1\]: pasta needs 'beside_spans', and duo_attention may drop .*leave one"
    ):
        of(DUO, {"method": "pasta", "heads": {"*.*": 0.5}}).check(LLAMA)
    with pytest.raises(RecipeError, match=r"patches\[0\]: test_spans needs 'spans', and streaming_llm may drop"):
        of({"method": "test_spans", "heads": {"*.*": 2.0}}, STREAM).check(LLAMA)


def test_parts_are_apart():
    speech = ModelShape(
        "whisper",
        {name: PartShape((4,) * 2, (4,) * 2, (8,) * 2) for name in ("decoder", "encoder", "cross")},
        "decoder",
    )
    resolved = resolve(of(STREAM, {**STREAM, "part": "encoder"}), speech)
    assert [patch.part for patch in resolved] == ["decoder", "encoder"]


@pytest.mark.parametrize(
    "method", [DuoAttention(sink=3, recent=5), DuoAttention(sink=0, recent=1), StreamingLLM(2, 4)]
)
def test_keep_is_the_definition(method):
    rng = random.Random(0)
    lengths = [rng.randrange(1, 30) for _ in range(8)]
    positions = torch.arange(32)
    for listed in (False, True):
        kept = method.keep(positions, torch.tensor(lengths), listed)
        for row, n in enumerate(lengths):
            i = n - 1  # the query that has just been seen
            wanted = [p <= i and (listed or p < method.sink or i - method.recent < p) for p in range(32)]
            assert kept[row].tolist() == wanted


def test_the_list_decides_the_digest():
    digests = {of(patch).digest for patch in (DUO, {**DUO, "full_kv_heads": ["3.1"]}, {**DUO, "sink": 4}, STREAM)}
    assert len(digests) == 4
    assert of(DUO).scope == "prefix"


def test_what_is_no_policy_is_refused_on_registration():
    @dataclasses.dataclass(frozen=True)
    class Listless(OutputMethod):
        amount: float = strength(1.0, help="amount")
        name: ClassVar[str] = "listless"
        heads_key: ClassVar[str | None] = None

    @dataclasses.dataclass(frozen=True)
    class Strong(WindowMethod):
        amount: float = strength(1.0, help="amount")
        name: ClassVar[str] = "strong"

    @dataclasses.dataclass(frozen=True)
    class OfQueries(WindowMethod):
        name: ClassVar[str] = "of_queries"
        head_kind: ClassVar[str] = "query"

    with pytest.raises(TypeError, match="only a cache policy may go without a list of heads"):
        Listless.check()
    for cls in (Strong, OfQueries):
        with pytest.raises(TypeError, match=r"lists KV heads .* and has no strength"):
            cls.check()
    assert not issubclass(WindowMethod, MassMethod)
