"""Where recipes come from: files, the package, the hub's cache, dicts; and pushing to the hub."""

from __future__ import annotations

import builtins
import os
import types
from pathlib import Path

import pytest
from recipe_tools import FULL, add_methods, arrays_recipe, disk, safetensors_bytes, zero

import headpatch
from headpatch import hub, sources, yamlio
from headpatch.errors import RecipeError
from headpatch.recipe import Recipe
from headpatch.sources import list_recipes, load_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def extra(monkeypatch):
    add_methods(monkeypatch)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    folder = tmp_path / "shipped"
    for name, description in (("tiny/steady", "Keeps steady."), ("tiny/free", ""), ("other/steady", "Elsewhere.")):
        Recipe.from_dict(zero() | {"name": name, "description": description}).save(folder / f"{name}.yaml")
    monkeypatch.setattr(sources, "_shipped_folder", lambda: folder)
    return folder


def test_a_file(tmp_path, monkeypatch):
    path = Recipe.from_dict(FULL).save(tmp_path / "r.yaml")
    for source in (path, str(path)):
        recipe = load_recipe(source)
        assert recipe.to_dict() == FULL
        assert recipe.source == str(path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("r.yaml").source == "r.yaml"
    assert load_recipe("./r.yaml").name == FULL["name"]


def test_a_file_without_a_suffix_and_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text(yamlio.dumps(FULL))
    assert load_recipe("plain").name == FULL["name"]
    Path("r.json").write_text('{"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"1.3": 2.0}}]}')
    assert load_recipe("r.json").patches[0].heads == (("1.3", 2.0),)


def test_a_dict_and_a_recipe():
    recipe = load_recipe(FULL)
    assert recipe.to_dict() == FULL
    assert load_recipe(recipe) is recipe
    assert load_recipe(types.MappingProxyType(zero())).patches


def test_the_public_names_are_these():
    assert headpatch.load_recipe is load_recipe
    assert headpatch.list_recipes is list_recipes
    assert headpatch.Recipe is Recipe


def test_shipped_recipes(shipped):
    assert list_recipes() == {"other/steady": "Elsewhere.", "tiny/free": "", "tiny/steady": "Keeps steady."}
    assert list(list_recipes()) == sorted(list_recipes())
    recipe = load_recipe("tiny/steady")
    assert (recipe.name, recipe.source) == ("tiny/steady", "tiny/steady")


def test_a_shipped_name_is_not_shadowed_by_a_file(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("tiny/steady").write_text(yamlio.dumps(zero() | {"name": "mine"}))
    assert load_recipe("tiny/steady").name == "tiny/steady"
    assert load_recipe("./tiny/steady").name == "mine"
    assert load_recipe(Path("tiny/steady")).name == "mine"


def test_a_misspelt_name(shipped):
    with pytest.raises(RecipeError, match=r"tiny/stedy: there is no shipped recipe .*did you mean 'tiny/steady'\?"):
        load_recipe("tiny/stedy")
    with pytest.raises(RecipeError, match=r"known: other/steady, tiny/free, tiny/steady"):
        load_recipe("zzz")


@pytest.mark.parametrize(
    "name", ["../secret", "tiny/../secret", "tiny/../../secret", "tiny//steady", "/tiny/steady", "tiny\\..\\secret"]
)
def test_a_name_does_not_lead_out_of_the_package(shipped, tmp_path, name, monkeypatch):
    Recipe.from_dict(zero() | {"name": "secret"}).save(tmp_path / "secret.yaml")
    Recipe.from_dict(zero() | {"name": "secret"}).save(shipped / "secret.yaml")
    empty = tmp_path / "empty" / "deep"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    with pytest.raises(RecipeError):
        load_recipe(name)


def test_what_is_really_shipped_loads():
    assert list(list_recipes()) == sorted(list_recipes()), "by name, and not by file: a-b comes after a"
    for name, description in list_recipes().items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description == description != ""
        assert set(recipe.model) >= {"name", "model_type", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
        assert recipe.provenance


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, ["a number is no recipe", "give a path"]),
        (None, ["a null is no recipe", "give a path"]),
        ([FULL], ["a list is no recipe", "give a path"]),
        (object(), ["a object is no recipe", "give a path"]),
        (b"r.yaml", ["is no recipe", "give a path"]),
        ("", ["no shipped recipe and no file"]),
        ("x" * 100_000, ["no shipped recipe and no file"]),
        ("a\0b", ["no shipped recipe and no file"]),
        ("nothing.yaml", ["nothing.yaml: cannot be read", "that exists"]),
        ("/nothing/here", ["cannot be read"]),
        ("./nothing", ["cannot be read"]),
        ("a\0b.yaml", ["cannot be read"]),
    ],
    ids=[f"source{i}" for i in range(12)],
)
def test_what_is_no_source(source, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 500


# --- the hub


@pytest.mark.parametrize(
    ("address", "repo", "file", "revision"),
    [
        ("hf://a/b", "a/b", "recipe.yaml", None),
        ("hf://a/b/", "a/b", "recipe.yaml", None),
        ("hf://a/b@v1.0", "a/b", "recipe.yaml", "v1.0"),
        ("hf://a/b@refs/pr/1", "a/b", "recipe.yaml", "refs/pr/1"),
        ("hf://a/b.c-d_e/x", "a/b.c-d_e", "x/recipe.yaml", None),
        ("hf://a/b/x/y.yml@main", "a/b", "x/y.yml", "main"),
        ("hf://a/b/x y/z.yaml", "a/b", "x y/z.yaml", None),
    ],
)
def test_addresses(address, repo, file, revision):
    assert hub.parse_address(address) == (repo, file, revision)


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://a", "hf:a/b", "hf:/a/b", "hf:///a/b", "hf://a/b/../c", "hf://a/b/..", "hf://a/b@", "hf://a/b@v@w", "hf://a/b\\c",
     "hf://a/b\n", "hf://a b/c", "hf://ä/b"],
)  # fmt: skip
def test_what_is_no_address(address):
    with pytest.raises(RecipeError, match=r"no address on the hub .*hf://owner/repo\[/path\]\[@revision\]"):
        load_recipe(address)


class Cache:
    """The hub's cache with one repository, laid out as huggingface_hub does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repo = root / "models--a--b"
        (self.repo / "refs").mkdir(parents=True)
        (self.repo / "refs" / "main").write_text(COMMIT)
        (self.repo / "blobs").mkdir()
        self.snapshot = self.repo / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)

    def add(self, name: str, content: bytes, shared: bool = False) -> None:
        blob = self.repo / "blobs" / f"etag-of-{Path(name).name}"
        if shared:  # one store for all repositories, as huggingface_hub 2 has it
            store = self.root / "blobs" / "ab" / ("ab" + "0" * 62)
            store.parent.mkdir(parents=True)
            store.write_bytes(content)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            blob.write_bytes(content)
        path = self.snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Cache(tmp_path / "hub")


@pytest.mark.parametrize("address", ["hf://a/b", "hf://a/b@main", f"hf://a/b@{COMMIT}", "hf://a/b/recipe.yaml"])
def test_the_hubs_cache(cache, address):
    cache.add("recipe.yaml", yamlio.dumps(FULL).encode())
    recipe = load_recipe(address)
    assert recipe.to_dict() == FULL
    assert recipe.source == address


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("folder", ["", "deep/er/"])
def test_arrays_in_the_hubs_cache(cache, extra, folder, shared):
    data = safetensors_bytes()
    cache.add(f"{folder}recipe.yaml", yamlio.dumps(arrays_recipe(data, "sub/t.safetensors")).encode())
    cache.add(f"{folder}sub/t.safetensors", data, shared=shared)
    recipe = load_recipe(f"hf://a/b/{folder}".rstrip("/"))
    assert recipe.tensors.path.read_bytes() == data


def test_the_cache_does_not_have_it(cache):
    for address in ("hf://a/b", "hf://a/b@v2", "hf://none/here"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(address)
        assert str(caught.value).startswith(address)
        assert "recipe.yaml cannot be fetched from" in str(caught.value)
        assert "offline, only what is in the cache is found" in caught.value.remedy


def test_arrays_are_missing_in_the_cache(cache, extra):
    cache.add("recipe.yaml", yamlio.dumps(arrays_recipe(b"x")).encode())
    with pytest.raises(RecipeError, match=r"task\.safetensors cannot be fetched from a/b"):
        load_recipe("hf://a/b")


def test_arrays_on_the_hub_stay_in_the_recipes_folder(cache, extra):
    cache.add("deep/recipe.yaml", yamlio.dumps(arrays_recipe(b"x", "../x.safetensors")).encode())
    cache.add("x.safetensors", safetensors_bytes())
    with pytest.raises(RecipeError, match="leads out of the recipe's folder"):
        load_recipe("hf://a/b/deep")


def test_both_files_are_of_one_commit(cache, extra, monkeypatch):
    """The branch may move between two downloads."""
    data = safetensors_bytes()
    cache.add("recipe.yaml", yamlio.dumps(arrays_recipe(data)).encode())
    cache.add("task.safetensors", data)
    asked = []

    def download(repo, file, *, revision=None, dry_run=False):
        asked.append((file, revision, dry_run))
        if dry_run:
            return types.SimpleNamespace(file_size=1, commit_hash=COMMIT)
        return str(cache.snapshot / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_recipe("hf://a/b@main").tensors
    assert asked == [
        ("recipe.yaml", "main", True),
        ("recipe.yaml", COMMIT, False),
        ("task.safetensors", COMMIT, True),
        ("task.safetensors", COMMIT, False),
    ]


def test_too_large_for_a_recipe_is_not_downloaded(cache, monkeypatch):
    calls = []

    def download(repo, file, *, revision=None, dry_run=False):
        calls.append(dry_run)
        return types.SimpleNamespace(file_size=10**12, commit_hash=COMMIT)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RecipeError, match=r"1000000000000 bytes, too many for a recipe \(at most 1048576\)"):
        load_recipe("hf://a/b")
    assert calls == [True]


def test_without_huggingface_hub(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(RecipeError, match=r"hf://a/b: an hf:// recipe needs .*pip install 'headpatch\[hf\]'"):
        load_recipe("hf://a/b")


class FakeApi:
    """Remembers what it is asked."""

    calls: list[tuple[str, tuple[object, ...], dict[str, object]]]

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, *args, **kwargs):
        FakeApi.calls.append(("create_repo", args, kwargs))

    def create_commit(self, *args, **kwargs):
        FakeApi.calls.append(("create_commit", args, kwargs))


@pytest.fixture
def api(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.calls = []
    return FakeApi


def test_pushing(api):
    recipe = Recipe.from_dict(FULL)
    assert recipe.push_to_hub("a/b", private=True, commit_message="why") == "hf://a/b/recipe.yaml"
    (first, args, options), (second, args2, options2) = api.calls
    assert (first, args, options) == ("create_repo", ("a/b",), {"exist_ok": True, "private": True})
    assert (second, args2[0], options2["commit_message"]) == ("create_commit", "a/b", "why")
    (operation,) = args2[1]
    assert operation.path_in_repo == "recipe.yaml"
    assert yamlio.loads(operation.path_or_fileobj.decode()) == FULL


def test_pushing_arrays_in_the_same_commit(api, extra, tmp_path):
    data = safetensors_bytes()
    (tmp_path / "task.safetensors").write_bytes(data)
    recipe = Recipe.from_dict(arrays_recipe(data), folder=tmp_path)
    address = recipe.push_to_hub("a/b", path_in_repo="x/y.yaml", revision="v1")
    assert address == "hf://a/b/x/y.yaml@v1"
    assert hub.parse_address(address) == ("a/b", "x/y.yaml", "v1")
    _, args, options = api.calls[-1]
    assert options["revision"] == "v1"
    assert [(o.path_in_repo, o.path_or_fileobj) for o in args[1]][1] == (
        "x/task.safetensors",
        str(tmp_path / "task.safetensors"),
    )
    (tmp_path / "task.safetensors").write_bytes(b"changed")
    api.calls.clear()
    with pytest.raises(RecipeError, match=r"not a safetensors file"):
        recipe.push_to_hub("a/b")
    assert not api.calls


@pytest.mark.parametrize(
    ("repo", "path"), [("a", "recipe.yaml"), ("a/b", "../x.yaml"), ("a/b", "x"), ("a/b", "x@y.yaml"), ("a/b", "")]
)
def test_pushing_somewhere_impossible(api, repo, path):
    with pytest.raises(RecipeError):
        Recipe.from_dict(FULL).push_to_hub(repo, path_in_repo=path)
    assert not api.calls


def test_loading_leaves_the_disk_alone(cache, extra):
    data = safetensors_bytes()
    cache.add("recipe.yaml", yamlio.dumps(arrays_recipe(data)).encode())
    cache.add("task.safetensors", data)
    before = disk(cache.root)
    load_recipe("hf://a/b")
    assert disk(cache.root) == before
