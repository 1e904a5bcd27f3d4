"""The flag and the request's field as text, without an engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from headpatch.adapters.vllm.flag import Armed, Flag, without_recipes
from headpatch.adapters.vllm.request import PREFIX, pack, read_wish, salted, unpack
from headpatch.commands.serve import flag_of
from headpatch.errors import HeadpatchError, RecipeError
from headpatch.heads import ModelShape, PartShape

WITHOUT_VLLM = True
GOOD = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"1.*": 2.0}}]}
ROWS = {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"0.1": 2.0}, "positions": "decode"}]}
SHAPE = ModelShape("llama", {"text": PartShape((4, 4), (2, 2), (8, 8))}, "text")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("smollm2", None), ([], None), (None, None), (True, None),
        ({"recipies": {}}, "recipies"), ({"recipe": GOOD, "recipes": {}}, "recipes"), ({"recipe": GOOD, "default": "a"}, "recipes"),
        ({"recipes": ["a.yaml"]}, "recipes"), ({"recipes": {"none": GOOD}}, "recipes"), ({"recipes": {"{x": GOOD}}, "recipes"),
        ({"recipes": {"a": GOOD}, "default": "b"}, "default"), ({"default": "a"}, "default"),
        ({"slots": 0}, "slots"), ({"slots": "8"}, "slots"), ({"slots": True}, "slots"), ({"slots": 10**9}, "slots"),
        ({"admin": "yes"}, "admin"), ({"arrays": "yes"}, "arrays"), ({"segments": 1}, "segments"),
        ({"allow_inline": 1}, "allow_inline"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named(given: Any, key: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        Flag.read(given)
    text = str(caught.value)
    assert text.startswith("--additional-config: headpatch")
    assert key is None or f"headpatch.{key}" in text


def test_forms_of_the_flag() -> None:
    assert Flag.read({}).open
    one = Flag.read({"recipe": GOOD})
    assert (one.default, list(one.recipes), one.open) == ("default", ["default"], False)
    named = Flag.read({"recipes": {"calm": GOOD, "sharp": ROWS}, "default": "calm", "slots": 3})
    assert (named.default, named.slots, named.open) == ("calm", 3, False)
    assert Flag.read({"recipes": {"calm": GOOD}, "default": "none"}).default is None
    assert Flag.read({"recipes": {"calm": GOOD}, "allow_inline": True}).open
    assert Flag.read({"recipes": {"calm": GOOD}, "segments": True}).open


def arm(recipes: dict[str, Any], **options: Any) -> Armed:
    flag = Flag.read({"recipes": recipes})
    settings = {
        "layers": frozenset({1}),
        "weights": True,
        "scales": False,
        "rows": False,
        "vectors": False,
        "graphs": True,
    }
    return Armed(flag.recipes, None, False, False, 8, **{**settings, **options})


def test_what_is_armed_travels_as_plain_values() -> None:
    armed = arm({"calm": GOOD})
    back = Armed.from_plain(json.loads(json.dumps(armed.to_plain())))
    assert back.to_plain() == armed.to_plain()
    assert back.recipes["calm"].digest == armed.recipes["calm"].digest


def test_what_was_not_armed_cannot_come_later() -> None:
    from headpatch.recipe import Recipe

    armed = arm({"calm": GOOD})
    assert armed.unarmed(Recipe.from_dict(GOOD), SHAPE) == ""
    other = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"0.0": 2.0}}]}
    assert "layer 0 was not armed" in armed.unarmed(Recipe.from_dict(other), SHAPE)
    scale = {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"1.0": 2.0}}]}
    assert "not armed" in armed.unarmed(Recipe.from_dict(scale), SHAPE)
    everything = arm({}, layers=None, scales=True)
    assert everything.unarmed(Recipe.from_dict(scale), SHAPE) == ""
    assert '{"arrays": true}' in everything.unarmed(Recipe.from_dict(ROWS), SHAPE)
    assert arm({}, layers=None, rows=True).unarmed(Recipe.from_dict(ROWS), SHAPE) == ""
    spans = Recipe.from_dict({"headpatch": 1, "patches": [{"method": "pasta", "heads": {"1.0": 0.5}}]})
    assert '{"segments": true}' in arm({}, layers=None, segments=True).unarmed(spans, SHAPE)  # those of the flag alone
    assert arm({}, layers=None, segments=True, later_segments=True).unarmed(spans, SHAPE) == ""
    eager = arm({}, graphs=False)
    assert "layer 0 was not armed" in eager.unarmed(Recipe.from_dict(ROWS), SHAPE)
    assert "not armed" in arm({}, layers=None, graphs=False).unarmed(Recipe.from_dict(ROWS), SHAPE)
    assert arm({}, layers=None, rows=True, graphs=False).unarmed(Recipe.from_dict(ROWS), SHAPE) == ""
    assert arm({}, layers=None, graphs=False).unarmed(Recipe.from_dict(scale), SHAPE) == ""


def injected(tensors: Any = None) -> Any:
    """A recipe with arrays."""
    import hashlib

    import safetensors.torch
    import torch

    from headpatch.recipe import Recipe

    data = safetensors.torch.save({"t.1.0": torch.arange(8.0)})
    patch = {"method": "soft_injection", "heads": {"1.0": 0.5}}
    arrays = {"file": "t.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    return Recipe.from_dict({"headpatch": 1, "patches": [patch], "tensors": arrays}, arrays=data)


def test_arrays_travel_with_their_recipe() -> None:
    """In the config, as text, and with a request, packed; and what came with them is checked again."""
    recipe = injected()
    back = Armed.from_plain(json.loads(json.dumps(arm({"task": recipe}).to_plain()))).recipes["task"]
    again = unpack(pack(recipe))
    assert back.digest == again.digest == recipe.digest
    assert back.arrays()["t.1.0"].tolist() == again.arrays()["t.1.0"].tolist() == [float(i) for i in range(8)]


def test_arrays_that_come_later_need_their_tables() -> None:
    recipe = injected()
    assert '{"arrays": true}' in arm({}, layers=None, scales=True).unarmed(recipe, SHAPE)
    assert '{"arrays": true}' in arm({}, layers=None, scales=True, rows=True).unarmed(recipe, SHAPE)
    assert arm({}, layers=None, scales=True, rows=True, vectors=True).unarmed(recipe, SHAPE) == ""
    assert Flag.read({"recipes": {"calm": GOOD}, "arrays": True}).open


def test_recipes_that_act_together() -> None:
    from headpatch.adapters.vllm.frontend import _together
    from headpatch.errors import EngineError
    from headpatch.recipe import Recipe

    recipe, other = injected(), Recipe.from_dict(GOOD)
    both = _together([other, recipe, other])
    assert both.arrays()["t.1.0"].tolist() == recipe.arrays()["t.1.0"].tolist() and len(both.patches) == 3
    assert _together([recipe, recipe]).tensors is not None
    import hashlib

    import safetensors.torch
    import torch

    data = safetensors.torch.save({"t.1.0": torch.zeros(8)})
    third = Recipe.from_dict(
        {**recipe.to_dict(), "tensors": {"file": "t.safetensors", "sha256": hashlib.sha256(data).hexdigest()}},
        arrays=data,
    )
    with pytest.raises(EngineError, match="only one recipe that acts by default"):
        _together([recipe, third])


def test_the_compile_cache_does_not_depend_on_recipes() -> None:
    other = {"cudagraph": 1}
    a, b = ({**other, "headpatch": {"recipe": r, "resolved": {"x": r}}} for r in ("a", "b"))
    assert without_recipes(a) == without_recipes(b) != other
    assert without_recipes(other) is other


def test_the_field() -> None:
    assert read_wish(None).recipe is None
    assert read_wish(" calm ").recipe == "calm"
    assert read_wish('{"recipe": "calm", "spans": [[1, 2]]}').data == {"spans": [[1, 2]]}
    assert read_wish(json.dumps(GOOD)).recipe == GOOD
    assert read_wish({"recipe": GOOD}).recipe == GOOD
    for bad in (1, [], "{", "{} {}", {"recipes": "a"}, {"recipe": []}, '{"recipe": 1}', "{" * 100_000):
        with pytest.raises(ValueError, match=r"the field|recipe is a"):
            read_wish(bad)


def test_a_recipe_travels_whole() -> None:
    from headpatch.recipe import Recipe

    recipe = Recipe.from_dict(ROWS)
    assert unpack(pack(recipe)).digest == recipe.digest


def test_salts_keep_apart() -> None:
    salts = {salted(user, salt) for user in (None, "", "a", "null", '"a"') for salt in ("a", "b", "")}
    assert len(salts) == 15
    assert all(salt.startswith(PREFIX) for salt in salts)


def test_serve_options(tmp_path: Any) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(GOOD))
    path = str(file)
    assert flag_of([path]) == {"recipe": path}
    assert flag_of([]) == {}
    assert flag_of([f"calm={path}", f"sharp={path}"], "calm", slots=2) == {
        "recipes": {"calm": path, "sharp": path}, "default": "calm", "slots": 2,
    }  # fmt: skip
    assert flag_of([f"calm={path}", path], admin=True) == {
        "recipes": {"calm": path, "default": path}, "default": "default", "admin": True,
    }  # fmt: skip
    for wrong in ([path, path], [f"a={path}", f"a={path}"], [str(tmp_path / "missing.yaml")]):
        with pytest.raises(RecipeError):
            flag_of(wrong)
    with pytest.raises(RecipeError):
        flag_of([], "calm")


def test_serve_keeps_the_users_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    from importlib.machinery import ModuleSpec

    from headpatch.commands import serve

    spec = ModuleSpec("vllm", None, origin="/somewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    command = serve.command_line("m", {"recipe": "a"}, ["--port", "1", "--additional-config", '{"x": 2}', "--seed=3"])
    assert json.loads(command[command.index("--additional-config") + 1]) == {"x": 2, "headpatch": {"recipe": "a"}}
    assert command[-3:] == ["--port", "1", "--seed=3"]
    for wrong in (["--additional-config", "nope"], ['--additional-config={"headpatch": {}}']):
        with pytest.raises(HeadpatchError):
            serve.command_line("m", {}, wrong)


def test_a_worker_is_found_from_a_language_model_in_another() -> None:
    """By the engine's config, or by one derived from it for a part of its model; not by a draft model's, nor another engine's."""
    from headpatch.adapters.vllm import worker as module

    class Half:
        vllm_config: Any

    def config(model: str, registry: object, **more: bool) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(model=model, **more), compilation_config=registry)

    half, layers = Half(), object()
    half.vllm_config = config("llava", layers, is_submodel_config=False)
    module._by_config[id(half.vllm_config)] = half  # type: ignore[assignment]
    assert module.worker_of(half.vllm_config) is half
    assert module.worker_of(config("llava", layers, is_submodel_config=True)) is half
    assert module.worker_of(config("llava", layers)) is half, "earlier versions do not say what is a part"
    for other in (
        config("llava", layers, is_submodel_config=False), config("draft", layers, is_submodel_config=True),
        config("llava", object(), is_submodel_config=True), None, SimpleNamespace(model_config=None, compilation_config=layers),
    ):  # fmt: skip
        assert module.worker_of(other) is None
