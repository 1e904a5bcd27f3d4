"""Recipes against models: what is resolved, what refuses to fit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from recipe_tools import FULL, HYBRID, LLAMA, MODEL_BLOCK, SPEECH, add_methods, same, zero

from headpatch import registry
from headpatch.errors import RecipeError, UnsupportedModelError
from headpatch.methods.head_scaling import HeadScaling
from headpatch.methods.zerotuning import ZeroTuning
from headpatch.operands import Supply
from headpatch.recipe import Recipe, resolve


@pytest.fixture
def extra(monkeypatch):
    add_methods(monkeypatch)


def test_what_a_recipe_says():
    recipe = Recipe.from_dict(FULL, source="some.yaml")
    assert (recipe.name, recipe.description, recipe.source) == (FULL["name"], "Two patches.", "some.yaml")
    assert dict(recipe.model) == MODEL_BLOCK
    assert recipe.tensors is None
    assert recipe.provenance["patched"]["accuracy"] == 0.9
    first, second = recipe.patches
    assert first.heads == (("1.3", 3.0), ("8.*", 2.0))
    assert isinstance(first.method, ZeroTuning)
    assert first.part is None
    assert second.method == HeadScaling(scale=0.0, positions="last")
    assert second.heads == (("12.0-2", 0.0), ("*.7", 0.0))
    assert (second.index, second.part, second.key) == (1, "text", "patches[1].heads")
    assert same(recipe.to_dict(), FULL)


def test_the_least_that_a_recipe_needs():
    recipe = Recipe.from_dict(zero())
    assert (recipe.name, recipe.description, recipe.tensors, recipe.source) == (None, None, None, None)
    assert dict(recipe.model) == dict(recipe.provenance) == {}
    assert [p.index for p in resolve(recipe, LLAMA)] == [0]


def test_a_recipe_does_not_change():
    data = copy.deepcopy(FULL)
    recipe = Recipe.from_dict(data)
    data["patches"][0]["heads"]["2.2"] = 1.0
    recipe.to_dict()["provenance"]["data"] = "else"
    assert same(recipe.to_dict(), FULL)
    for change in (
        lambda: setattr(recipe, "name", "x"),
        lambda: recipe.model.__setitem__("num_heads", 1),
        lambda: recipe.provenance["patched"].__setitem__("accuracy", 1),
        lambda: recipe.provenance["curve"].append(1),
        lambda: setattr(recipe.patches[0], "part", "text"),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    assert same(recipe.to_dict(), FULL)


def test_resolving_says_layer_by_layer_what_is_meant():
    first, second = resolve(Recipe.from_dict(FULL), LLAMA)
    assert (first.index, first.part, first.method) == (0, "text", ZeroTuning())
    assert first.heads == {1: {3: 3.0}, 8: dict.fromkeys(range(9), 2.0)}
    assert second.heads[12] == {0: 0.0, 1: 0.0, 2: 0.0, 7: 0.0}
    assert list(second.heads) == list(range(30))
    assert second.method.positions == "last"
    assert first.arrays() == {}
    assert dataclasses.replace(first, heads={}).method is first.method  # adapters do this with trained strengths


def test_later_selectors_win_in_both_forms():
    table = Recipe.from_dict(zero(heads={"1.*": 2.0, "1.3": 5.0}))
    assert resolve(table, LLAMA)[0].heads[1][3] == 5.0
    turned = Recipe.from_dict(zero(heads={"1.3": 5.0, "1.*": 2.0}))
    assert resolve(turned, LLAMA)[0].heads[1][3] == 2.0
    assert table != turned
    assert table.digest != turned.digest


def test_cache_methods_name_kv_heads(extra):
    recipe = Recipe.from_dict(
        {"headpatch": 1, "patches": [{"method": "test_cache", "full_kv_heads": ["3.1", "5.*"], "window": 64}]}
    )
    (patch,) = resolve(recipe, LLAMA)
    assert patch.heads == {layer: {3: (1,), 5: (0, 1, 2)}.get(layer, ()) for layer in range(30)}
    assert patch.method.window == 64
    assert recipe.patches[0].key == "patches[0].full_kv_heads"
    assert "test_cache in 30 layers (text), 4 KV heads listed" in str(recipe.check(LLAMA))


def test_parts(extra):
    def heads(part):
        data = zero(heads={"*.*": 2.0}) if part is None else zero(heads={"*.*": 2.0}, part=part)
        (patch,) = resolve(Recipe.from_dict(data), SPEECH)
        return patch.part, len(patch.heads), len(patch.heads[0])

    assert heads(None) == ("decoder", 3, 4)
    assert heads("decoder") == ("decoder", 3, 4)
    assert heads("encoder") == ("encoder", 2, 6)
    assert heads("cross") == ("cross", 3, 4)
    with pytest.raises(
        RecipeError, match=r"patches\[0\]\.part: this model has no part 'vision' .*encoder, decoder, cross"
    ):
        heads("vision")


def test_star_leaves_out_layers_without_softmax_heads():
    (patch,) = resolve(Recipe.from_dict(zero(heads={"*.0": 2.0})), HYBRID)
    assert patch.heads == {0: {0: 2.0}, 3: {0: 2.0}}


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (MODEL_BLOCK, LLAMA),
        (MODEL_BLOCK | {"name": "another/name"}, LLAMA),
        ({"num_heads": [9] * 30, "num_kv_heads": [3] * 30, "head_dim": [64] * 30}, LLAMA),
        ({}, LLAMA),
        (
            {"num_layers": 4, "num_heads": [8, 0, 0, 4], "num_kv_heads": [2, 0, 0, 2], "head_dim": [64, 0, 0, 32]},
            HYBRID,
        ),
        ({"num_kv_heads": 2, "head_dim": [64, 64, 64, 32]}, HYBRID),
        ({"model_type": "whisper", "num_layers": 3, "num_heads": 4}, SPEECH),
    ],
)
def test_models_that_fit(block, shape):
    (patch,) = resolve(Recipe.from_dict(zero(heads={"*.0": 2.0}) | {"model": block}), shape)
    assert 0 in patch.heads


@pytest.mark.parametrize(
    ("key", "value", "shape", "words"),
    [
        ("model_type", "gpt2", LLAMA, ["'gpt2'", "'llama'"]),
        ("num_layers", 32, LLAMA, ["32", "30"]),
        ("num_heads", 12, LLAMA, ["12", "9 in layer 0"]),
        ("num_heads", [9] * 29 + [8], LLAMA, ["8", "9 in layer 29"]),
        ("num_heads", [9] * 29, LLAMA, ["29 layers", "30 layers"]),
        ("num_kv_heads", 9, LLAMA, ["9", "3 in layer 0"]),
        ("head_dim", 128, LLAMA, ["128", "64 in layer 0"]),
        ("num_heads", 8, HYBRID, ["8", "4 in layer 3"]),
        ("num_heads", [8, 8, 0, 4], HYBRID, ["8", "0 in layer 1"]),
        ("head_dim", 64, HYBRID, ["64", "32 in layer 3"]),
        ("num_layers", 2, SPEECH, ["2", "3"]),
    ],
)
def test_models_that_do_not_fit(key, value, shape, words):
    recipe = Recipe.from_dict(zero(heads={"*.0": 2.0}) | {"model": {key: value}}, source="r.yaml")
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, shape)
    assert caught.value.key == f"model.{key}"
    assert str(caught.value).startswith("r.yaml")
    assert "made for this model" in caught.value.remedy
    assert all(word in caught.value.problem for word in words), caught.value.problem


@pytest.mark.parametrize(
    ("heads", "key"),
    [({"12.99": 1.0}, 'patches[0].heads["12.99"]'), ({"1.1": 1.0, "30.0": 1.0}, 'patches[0].heads["30.0"]')],
)
def test_heads_that_the_model_does_not_have(heads, key):
    with pytest.raises(RecipeError) as caught:
        resolve(Recipe.from_dict(zero(heads=heads), source="r.yaml"), LLAMA)
    assert (caught.value.source, caught.value.key) == ("r.yaml", key)


def test_a_check_reads_like_a_report():
    report = Recipe.from_dict(FULL).check(LLAMA)
    assert [(p.method, p.part, p.kind, p.num_heads) for p in report.patches] == [
        ("zerotuning", "text", "query", 10), ("head_scaling", "text", "query", 33),
    ]  # fmt: skip
    assert report.patches[0].heads == {1: (3,), 8: tuple(range(9))}
    assert (report.num_heads, report.scope, report.needs) == (43, "prompt", ("first_token", "position", "prompt_len"))
    assert "zerotuning on 10 query heads in 2 layers (text)" in str(report)


class FakeAdapter:
    """Knows strings, and supplies what it is told to."""

    name = "fake"

    def __init__(self, supplied):
        self.supplied = supplied

    def matches(self, obj):
        return isinstance(obj, str)

    def shape(self, obj):
        return LLAMA

    def supplies(self):
        return {name: Supply() for name in self.supplied}


def test_a_check_asks_the_adapter(monkeypatch):
    recipe = Recipe.from_dict(zero())
    monkeypatch.setattr(registry, "adapters", lambda: [FakeAdapter(["first_token"])])
    assert recipe.check("a model").num_heads == 1
    monkeypatch.setattr(registry, "adapters", lambda: [FakeAdapter([])])
    with pytest.raises(
        UnsupportedModelError, match="fake cannot do this recipe exactly: operand 'first_token' is not supplied"
    ):
        recipe.check("a model")
    with pytest.raises(UnsupportedModelError, match="int"):
        recipe.check(3)


def test_thousands_of_selectors_resolve_quickly_or_not_at_all():
    heads = {f"{a}-29.{b}": 1.0 for a in range(30) for b in range(9)}
    assert resolve(Recipe.from_dict(zero(heads=heads)), LLAMA)
    patch = {"method": "zerotuning", "heads": ["*.*"] * 900, "gamma": 2.0}
    with pytest.raises(RecipeError, match=r"patches\[0\]\.heads: the selectors overlap too often"):
        resolve(Recipe.from_dict({"headpatch": 1, "patches": [patch] * 100}), LLAMA)
