"""Parameters of methods in recipes, and the JSON schema for editors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_tools import FULL, add_methods, zero

from headpatch import schema
from headpatch.errors import RecipeError
from headpatch.methods.base import OutputMethod, param, strength
from headpatch.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def extra(monkeypatch):
    add_methods(monkeypatch)


def spans(**patch):
    (found,) = Recipe.from_dict(zero(method="test_spans", heads={"1.3": 2.0}, **patch)).patches
    return found.method


def test_parameters_of_every_type(extra):
    method = spans(dims=[1, 2], rounds=2, strict=True, low=0, high=0.5)
    assert (method.dims, method.rounds, method.strict, method.low, method.high) == ((1, 2), 2, True, 0.0, 0.5)
    assert isinstance(method.low, float)
    assert hash(method) == hash(spans(dims=[1, 2], rounds=2, strict=True, low=0.0, high=0.5))
    data = zero(method="test_spans", heads={"1.3": 2.0}, dims=[1, 2])
    assert Recipe.from_dict(data).to_dict() == data


@pytest.mark.parametrize(
    ("patch", "key", "words"),
    [
        ({"dims": [1, True]}, "dims[1]", ["whole number", "true"]),
        ({"dims": [1.0]}, "dims[0]", ["whole number"]),
        ({"dims": 3}, "dims", ["a list"]),
        ({"rounds": True}, "rounds", ["is true", "1 or 2"]),
        ({"rounds": 1.0}, "rounds", ["is 1.0", "1 or 2"]),
        ({"rounds": 3}, "rounds", ["is 3", "1 or 2"]),
        ({"strict": 1}, "strict", ["true or false", "the number 1"]),
        ({"strict": "yes"}, "strict", ["true or false", "'yes'"]),
        ({"low": 2.0}, None, ["low 2.0 is not below high 1.0"]),
    ],
)
def test_wrong_parameters(extra, patch, key, words):
    with pytest.raises(RecipeError) as caught:
        spans(**patch)
    assert caught.value.key == ("patches[0]" if key is None else f"patches[0].{key}")
    assert caught.value.remedy
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_method_whose_fields_clash_with_recipe_keys(extra, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Clash(OutputMethod):
        """Clashes."""

        amount: float = strength(0.0, help="x")
        part: int = param(1, help="x")
        name = "test_clash"

    with pytest.raises(TypeError, match="cannot be called 'part'"):
        schema.patch_model(Clash)


def test_the_shipped_json_schema_is_up_to_date(extra):
    run = subprocess.run([sys.executable, "-m", "headpatch.schema"], capture_output=True, text=True, check=True)
    assert (ROOT / "headpatch/recipe.schema.json").read_text() == run.stdout, (
        "run: python -m headpatch.schema > headpatch/recipe.schema.json"
    )
    assert json.loads(run.stdout) == schema.json_schema()  # methods of others, registered here, stay out


SCHEMA_SAYS_NO = [
    {}, {"headpatch": 1}, {"headpatch": 2, "patches": FULL["patches"]}, zero() | {"nam": "x"}, zero() | {"patches": []},
    zero(heads={}), zero(heads=[]), zero(heads={"1.3": "2"}), zero(heads={"1.3": True}), zero(heads={"1.3": -1}),
    zero(heads={"1": 1}), zero(heads=["1.3"]), zero(heads={"1.3": 1}, gamma=2), zero(heads=["x"], gamma=2), zero(head=["1.3"]),
    zero(method="nope", heads={"1.3": 1}), zero(part="txt", heads={"1.3": 1}), zero() | {"model": {"num_heads": "9"}},
    zero(method="head_scaling", heads={"1.3": 1}, positions="first"), zero() | {"tensors": {"file": "x", "sha256": "y"}},
]  # fmt: skip


def test_editors_and_headpatch_agree():
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(json.loads((ROOT / "headpatch/recipe.schema.json").read_text()))
    checker.check_schema(checker.schema)
    for good in (FULL, zero(), zero(heads=["1.3"], gamma=0)):
        checker.validate(good)
        Recipe.from_dict(good)
    for bad in SCHEMA_SAYS_NO:
        assert not checker.is_valid(bad), bad
        with pytest.raises(RecipeError):
            Recipe.from_dict(bad)


def test_reading_recipes_imports_no_torch():
    code = (
        "import sys, headpatch; headpatch.load_recipe({'headpatch': 1, 'patches': [{'method': 'zerotuning', 'heads': {'1.3': 2}}]});"
        "print(*(set(sys.modules) & {'torch', 'transformers', 'vllm', 'numpy', 'huggingface_hub', 'safetensors'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split()
