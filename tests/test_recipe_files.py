"""What enters a recipe's hashes; copies of recipes; what is written to disk and read from it."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from pathlib import Path

import pytest
from recipe_tools import FULL, LLAMA, add_methods, arrays_recipe, disk, safetensors_bytes, same, zero

from headpatch import yamlio
from headpatch.errors import RecipeError
from headpatch.methods.zerotuning import ZeroTuning
from headpatch.recipe import Recipe, resolve


@pytest.fixture
def extra(monkeypatch):
    add_methods(monkeypatch)


def digest(**patch):
    return Recipe.from_dict(zero(**patch)).digest


def test_the_digest_is_of_what_decides_the_numbers():
    base = Recipe.from_dict(zero(heads={"1.3": 2.0}))
    for other in (
        FULL | {"patches": base.to_dict()["patches"]},
        zero(heads={"1.3": 2}),
        zero(heads=["1.3"], gamma=2.0),
    ):
        assert Recipe.from_dict(other).digest == base.digest
    assert digest(heads={"1.3": 0.0}) == digest(heads={"1.3": -0.0})
    different = [
        base.digest, digest(heads={"1.3": 2.5}), digest(heads={"1.4": 2.0}), digest(heads={"1.3": 2.0}, part="text"),
        digest(heads={"1.3": 2.0, "1.4": 2.0}), Recipe.from_dict(FULL).digest,
        digest(method="head_scaling", heads={"1.3": 2.0}), digest(method="head_scaling", heads={"1.3": 2.0}, positions="last"),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert all(len(d) == 64 for d in different)
    explicit = digest(method="head_scaling", heads={"1.3": 2.0}, positions="all")
    assert explicit == digest(method="head_scaling", heads={"1.3": 2.0})


def test_a_new_version_of_a_method_changes_the_digest(monkeypatch):
    before = digest(heads={"1.3": 2.0})
    monkeypatch.setattr(ZeroTuning, "version", 2)
    assert digest(heads={"1.3": 2.0}) != before


def test_equal_recipes_have_equal_hashes():
    one, two = Recipe.from_dict(FULL), Recipe.from_dict(copy.deepcopy(FULL))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Recipe.from_dict(FULL | {"name": "other"})
    assert one != FULL


def test_the_salt_follows_the_scope(extra):
    prefix = Recipe.from_dict(zero())
    assert prefix.scope == "prefix"
    assert (
        prefix.salt(call_data=[1], prompt=[1, 2]) == prefix.salt() != Recipe.from_dict(zero(heads={"1.3": 3.0})).salt()
    )

    prompt = Recipe.from_dict(zero(method="head_scaling", heads={"1.3": 0.5}, positions="last"))
    assert prompt.scope == "prompt"
    assert prompt.salt(prompt=[1, 2]) == prompt.salt(prompt=(1, 2), call_data="x") != prompt.salt(prompt=[1, 2, 3])
    with pytest.raises(ValueError, match="needs prompt="):
        prompt.salt()

    request = Recipe.from_dict(zero(method="test_spans", heads={"1.3": 2.0}))
    assert request.scope == "request"
    assert request.salt(call_data=[[0, 3]]) == request.salt(call_data=[(0, 3)], prompt=[1])
    assert (
        len({request.salt(), request.salt([[0, 3]]), request.salt([[0, 4]]), request.salt([0, 3]), prefix.salt()}) == 5
    )

    both = Recipe.from_dict({"headpatch": 1, "patches": [*prompt.to_dict()["patches"], *request.to_dict()["patches"]]})
    assert both.scope == "request"
    salts = {both.salt(a, b) for a in ([1], [2]) for b in ([1], [2])}
    assert len(salts) == 4, "a patch that depends on the prompt still does beside one that depends on the call"


def test_salts_tell_values_apart(extra):
    recipe = Recipe.from_dict(zero(method="test_spans", heads={"1.3": 2.0}))
    data = [
        1,
        True,
        "1",
        1.5,
        None,
        [1],
        [[1]],
        b"1",
        {"a": 1},
        {"a": [1]},
        [["a", 1]],
        {},
        [],
        "",
        b"",
        {"map": []},
        {"bytes": ""},
    ]
    assert len({recipe.salt(item) for item in data}) == len(data)
    assert recipe.salt({"a": 1, "b": 2}) == recipe.salt({"b": 2, "a": 1})
    np = pytest.importorskip("numpy")
    assert recipe.salt(np.array([1, 2])) == recipe.salt([1, 2])
    with pytest.raises(TypeError, match="cannot be part of a cache salt"):
        recipe.salt({1, 2})


def test_copies_and_pickles_are_equal(extra, tmp_path):
    data = safetensors_bytes()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/task.safetensors").write_bytes(data)
    for recipe in (
        Recipe.from_dict(FULL, source="x"),
        Recipe.from_dict(arrays_recipe(data, "sub/task.safetensors"), source="x", folder=tmp_path),
    ):
        for other in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
            assert (other, other.source, other.digest, other.tensors) == (recipe, "x", recipe.digest, recipe.tensors)
        (patch,) = pickle.loads(pickle.dumps(resolve(recipe, LLAMA)))[:1]
        assert patch.recipe == recipe


def test_arrays_are_read_on_first_use(extra, tmp_path):
    torch = pytest.importorskip("torch")
    data = safetensors_bytes("v", (1.0, 2.0))
    path = tmp_path / "task.safetensors"
    path.write_bytes(data)
    recipe = Recipe.from_dict(arrays_recipe(data), folder=tmp_path)
    (patch,) = resolve(recipe, LLAMA)
    arrays = patch.arrays()
    assert torch.equal(arrays["v"], torch.tensor([1.0, 2.0]))
    path.unlink()
    assert patch.arrays()["v"] is arrays["v"]
    assert recipe.tensors.sha256 == hashlib.sha256(data).hexdigest()


def test_what_is_loaded_is_what_was_hashed(extra, tmp_path):
    data = safetensors_bytes("v", (1.0, 2.0))
    path = tmp_path / "task.safetensors"
    path.write_bytes(data)
    recipe = Recipe.from_dict(arrays_recipe(data), source="r.yaml", folder=tmp_path)
    path.write_bytes(safetensors_bytes("v", (1.0, 3.0)))
    with pytest.raises(RecipeError, match=r"r\.yaml: tensors\.sha256: .*another SHA-256"):
        recipe.arrays()


def test_arrays_change_the_digest(extra, tmp_path):
    digests = set()
    for values in ((1.0, 2.0), (1.0, 3.0)):
        data = safetensors_bytes("v", values)
        (tmp_path / "task.safetensors").write_bytes(data)
        digests.add(Recipe.from_dict(arrays_recipe(data), folder=tmp_path).digest)
    assert len(digests) == 2


def test_saving_and_loading(tmp_path):
    recipe = Recipe.from_dict(FULL)
    path = recipe.save(tmp_path / "deep" / "r.yaml")
    assert path == tmp_path / "deep" / "r.yaml"
    assert same(yamlio.load(path), FULL)
    assert [p.name for p in path.parent.iterdir()] == ["r.yaml"]
    text = path.read_text()
    assert 'heads: {"1.3": 3.0, "8.*": 2}' in text
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    Recipe.from_dict(FULL | {"name": "other"}).save(path)
    assert yamlio.load(path)["name"] == "other"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_saving_copies_arrays(extra, tmp_path):
    data = safetensors_bytes()
    source = tmp_path / "from"
    source.mkdir()
    (source / "task.safetensors").write_bytes(data)
    recipe = Recipe.from_dict(arrays_recipe(data), folder=source)
    for _ in range(2):  # a second time, over itself
        recipe.save(tmp_path / "to" / "r.yaml")
    again = Recipe.from_dict(yamlio.load(tmp_path / "to" / "r.yaml"), folder=tmp_path / "to")
    assert again == recipe
    assert (tmp_path / "to" / "task.safetensors").read_bytes() == data
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["r.yaml", "task.safetensors"]
    recipe.save(source / "r.yaml")  # beside its own arrays
    assert (source / "task.safetensors").read_bytes() == data


def test_saving_never_overwrites_other_arrays(extra, tmp_path):
    data, other = safetensors_bytes(), safetensors_bytes("w")
    for folder, content in (("from", data), ("to", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.safetensors").write_bytes(content)
    before = disk(tmp_path)
    with pytest.raises(RecipeError, match=r"exists and is another file .*another folder"):
        Recipe.from_dict(arrays_recipe(data), folder=tmp_path / "from").save(tmp_path / "to" / "r.yaml")
    assert disk(tmp_path) == before


def test_a_failed_save_leaves_nothing(extra, tmp_path, monkeypatch):
    data = safetensors_bytes()
    (tmp_path / "task.safetensors").write_bytes(data)
    recipe = Recipe.from_dict(arrays_recipe(data), folder=tmp_path)
    (tmp_path / "task.safetensors").write_bytes(data[:-1] + b"x")
    (tmp_path / "to").mkdir()
    before = disk(tmp_path)
    with pytest.raises(RecipeError, match="another SHA-256"):
        recipe.save(tmp_path / "to" / "r.yaml")
    assert disk(tmp_path) == before
    with pytest.raises(RecipeError, match="is a folder"):
        recipe.save(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RecipeError, match=r"cannot be written: No space left .*writable folder"):
        Recipe.from_dict(FULL).save(tmp_path / "to" / "r.yaml")
    monkeypatch.undo()
    assert disk(tmp_path) == before
