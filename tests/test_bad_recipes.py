"""Broken recipes of every kind: the named error with the key and the remedy, quickly, and the disk as before.

One table for what is written in a file, one for dicts, one for files that are no recipes or whose arrays are not right, one for
recipes that do not fit the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import pytest
from recipe_tools import HYBRID, LLAMA, MODEL_BLOCK, SPEECH, add_methods, arrays_recipe, disk, safetensors_bytes, zero

from headpatch import yamlio
from headpatch.errors import RecipeError
from headpatch.sources import load_recipe

HEAD = "headpatch: 1\npatches:\n- method: zerotuning\n"
SCALE = "headpatch: 1\npatches:\n- method: head_scaling\n"
CACHE = "headpatch: 1\npatches:\n- method: test_cache\n"
HASH = "a" * 64
FINE = HEAD + '  heads: {"1.3": 2}\n'


@pytest.fixture(autouse=True)
def extra(monkeypatch):
    add_methods(monkeypatch)


@contextlib.contextmanager
def refused(folder: Path, key: str | None, words: list[str], seconds: float = 2.0):
    """The block raises a RecipeError about `key` with these words, in time, and leaves the folder as it was."""
    before, start = disk(folder), time.process_time()
    with pytest.raises(RecipeError) as caught:
        yield
    assert time.process_time() - start < seconds  # of this process: other tests may hold the cores
    error = caught.value
    assert error.key == key, str(error)
    assert error.remedy
    assert error.remedy in str(error)
    assert key is None or key in str(error)
    assert all(word in str(error) for word in words), str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 600
    assert disk(folder) == before


# What stands in the file, the key that is blamed, words that the message must hold (those of the remedy among them).
TEXT = {
    # not a recipe at all
    "empty": ("", None, ["is empty, not a recipe", "begins with headpatch: 1"]),
    "only comments": ("# nothing\n", None, ["is empty", "begins with headpatch: 1"]),
    "a list": ("- a\n- b\n", None, ["is a list", "begins with headpatch: 1"]),
    "a word": ("hello", None, ["is a string", "begins with headpatch: 1"]),
    "a number": ("3", None, ["is a number", "begins with headpatch: 1"]),
    "not YAML": ("a: [1", None, ["not YAML", "mend the YAML"]),
    "HTML": ("<!DOCTYPE html>\n<html><body>a: b: c</body></html>", None, ["not YAML", "mend the YAML"]),
    # the envelope
    "no version": ("patches: []", "headpatch", ["is missing", "version of the recipe format"]),
    "no patches": ("headpatch: 1", "patches", ["is missing", "methods with their heads"]),
    "future version": (FINE.replace("1", "2", 1), "headpatch", ["version 2 is not known", "update headpatch"]),
    "version as text": (FINE.replace("1", "'1'", 1), "headpatch", ["the string '1'", "write a whole number"]),
    "version true": (FINE.replace("1", "true", 1), "headpatch", ["boolean true", "write a whole number"]),
    "version 1.0": (FINE.replace("1", "1.0", 1), "headpatch", ["the number 1.0", "write a whole number"]),
    "unknown key": (FINE + "nmae: x\n", "nmae", ["unknown key", "did you mean 'name'?"]),
    "name is a number": (FINE + "name: 3\n", "name", ["the number 3", "write a string"]),
    "name is null": (FINE + "name:\n", "name", ["is null", "write a string"]),
    "empty patches": ("headpatch: 1\npatches: []", "patches", ["is empty", "name at least one"]),
    "patches is a mapping": ("headpatch: 1\npatches: {method: zerotuning}", "patches", ["a mapping", "write a list"]),
    "a patch is a word": ("headpatch: 1\npatches: [zerotuning]", "patches[0]", ["'zerotuning'", "write a mapping"]),
    "provenance is a list": (FINE + "provenance: [1]\n", "provenance", ["a list", "write a mapping"]),
    "NaN in provenance": (FINE + "provenance: {a: [.nan]}\n", "provenance.a[0]", ["nan", "finite number"]),
    "duplicate key": (FINE + "headpatch: 1\n", "headpatch", ["line 5", "occurs twice", "line 1", "keep one"]),
    "duplicate patch key": (HEAD + "  method: head_scaling\n", "patches[0].method", ["occurs twice", "keep one"]),
    # methods
    "unknown method": (FINE.replace("tuning", "tunin"), "patches[0].method", ["no method 'zerotunin'", "mean 'zerotuning'?"]),
    "no method": ("headpatch: 1\npatches: [{heads: ['1.3']}]", "patches[0].method", ["is missing", "head_scaling, "]),
    "method misspelt": ("headpatch: 1\npatches: [{mehtod: x}]", "patches[0].method", ["'mehtod' is not it", "zerotuning"]),
    "method is a number": (FINE.replace("zerotuning", "3"), "patches[0].method", ["the number 3", "zerotuning"]),
    "unknown parameter": (FINE + "  gama: 2\n", "patches[0].gama", ["unknown key", "did you mean 'gamma'?"]),
    "choice": (SCALE + '  heads: {"1.3": 2}\n  positions: first\n', "patches[0].positions", ["'first'", "'all', 'last' or 'decode'"]),
    "choice true": (SCALE + '  heads: {"1.3": 2}\n  positions: yes\n', "patches[0].positions", ["'yes'", "'all'"]),
    "unknown part": (FINE + "  part: txt\n", "patches[0].part", ["'txt'", "'text'"]),
    # heads and strengths
    "no heads": (HEAD, "patches[0].heads", ["is missing", "selectors"]),
    "empty heads": (HEAD + "  heads: {}\n", "patches[0].heads", ["is empty", "at least one"]),
    "empty list of heads": (HEAD + "  heads: []\n  gamma: 2\n", "patches[0].heads", ["is empty", "at least one"]),
    "null heads": (HEAD + "  heads:\n", "patches[0].heads", ["is null", "selectors"]),
    "heads is a word": (HEAD + "  heads: '1.3'\n", "patches[0].heads", ["'1.3'", "selectors"]),
    "unquoted selector": (HEAD + "  heads: {12.10: 2}\n", 'patches[0].heads["12.10"]', ["12.10 is a number", 'in quotes: "12.10"']),
    "unquoted in a list": (HEAD + "  heads: [12.10]\n  gamma: 2\n", "patches[0].heads[0]", ["number 12.1", "in quotes"]),
    "unquoted star": (HEAD + "  heads: {*.7: 2}\n", None, ["alias", 'in quotes, as in "*.7"']),
    "selector true": (HEAD + "  heads: {true: 2}\n", "patches[0].heads.true", ["boolean", "in quotes"]),
    "no selector": (HEAD + "  heads: {layer1: 2}\n", "patches[0].heads.layer1", ["not a selector", "layer.head"]),
    "selector with a sign": (HEAD + '  heads: {"-1.3": 2}\n', 'patches[0].heads["-1.3"]', ["not a selector", "layer.head"]),
    "selector with a space": (HEAD + '  heads: {"1. 3": 2}\n', 'patches[0].heads["1. 3"]', ["not a selector", "layer.head"]),
    "other digits": (HEAD + '  heads: {"\u0661.2": 2}\n', 'patches[0].heads["\u0661.2"]', ["not a selector", "layer.head"]),
    "reversed range": (HEAD + '  heads: ["1.5-3"]\n  gamma: 2\n', "patches[0].heads[0]", ["reversed", "write 3-5"]),
    "duplicate selector": (HEAD + '  heads: {"1.3": 2, "1.3": 3}\n', 'patches[0].heads["1.3"]', ["twice", "keep one"]),
    "nested heads": (HEAD + '  heads: {"1.3": {"gamma": 2}}\n', 'patches[0].heads["1.3"]', ["a mapping", "write a number"]),
    "strength is text": (HEAD + '  heads: {"1.3": "2"}\n', 'patches[0].heads["1.3"]', ["'2'", "write a number"]),
    "strength is true": (HEAD + '  heads: {"1.3": true}\n', 'patches[0].heads["1.3"]', ["boolean true", "write a number"]),
    "strength is NaN": (HEAD + '  heads: {"1.3": .nan}\n', 'patches[0].heads["1.3"]', ["nan", "finite number"]),
    "strength is infinite": (HEAD + '  heads: {"1.3": 1e999}\n', 'patches[0].heads["1.3"]', ["inf", "finite number"]),
    "strength is negative": (HEAD + '  heads: {"1.3": -1}\n', 'patches[0].heads["1.3"]', ["-1 is out of range", "at least 0"]),
    "strength is too large": (HEAD + '  heads: ["1.3"]\n  gamma: 1e7\n', "patches[0].gamma", ["out of range", "at most 1000000"]),
    "strength is a list": (HEAD + '  heads: ["1.3"]\n  gamma: [2]\n', "patches[0].gamma", ["a list", "write a number"]),
    "strength in no place": (HEAD + '  heads: ["1.3"]\n', "patches[0].gamma", ["is missing", "one gamma for the list"]),
    "strength in both places": (FINE + "  gamma: 2\n", "patches[0].gamma", ["both", "remove gamma"]),
    "query heads for a cache": (CACHE + "  heads: ['1.1']\n", "patches[0].heads", ["unknown key", "full_kv_heads"]),
    "strengths for a cache": (CACHE + "  full_kv_heads: {'1.1': 2}\n", "patches[0].full_kv_heads", ["a mapping", "write a list"]),
    # the model block and arrays
    "unknown model key": (FINE + "model: {num_head: 9}\n", "model.num_head", ["unknown key", "did you mean 'num_heads'?"]),
    "model is a name": (FINE + "model: llama\n", "model", ["'llama'", "write a mapping"]),
    "heads of the model as text": (FINE + "model: {num_heads: '9'}\n", "model.num_heads", ["'9'", "write a whole number"]),
    "no layers": (FINE + "model: {num_layers: 0}\n", "model.num_layers", ["0 is out of range", "at least 1"]),
    "layers in a list": (FINE + "model: {num_layers: [30]}\n", "model.num_layers", ["a list", "write a whole number"]),
    "arrays nobody needs": (FINE + f"tensors: {{file: a.safetensors, sha256: {HASH}}}\n", "tensors", ["no patch", "remove tensors"]),
    "arrays without a hash": (FINE + "tensors: {file: a.safetensors}\n", "tensors.sha256", ["is missing", "SHA-256"]),
    "a hash that is none": (FINE + "tensors: {file: a.safetensors, sha256: abc}\n", "tensors.sha256", ["'abc'", "64 lower-case"]),
    "needed arrays": (FINE.replace("zerotuning", "test_arrays"), "tensors", ["is missing", "test_arrays needs arrays", "sha256"]),
    # attacks
    "python tag": (FINE + "name: !!python/object/apply:os.system ['touch owned']\n", "name", ["the tag", "remove it"]),
    "python name": ("!!python/object/new:headpatch.Recipe {}\n", None, ["the tag", "remove it"]),
    "binary tag": (FINE + "name: !!binary aGVsbG8=\n", "name", ["the tag", "remove it"]),
    "billion laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "a", ["anchor", "are not read"]),
    "an alias to itself": ("a: &a [*a]\n", "a", ["anchor", "are not read"]),
    "merge key": (FINE + "<<: {name: x}\n", '["<<"]', ["merge key", "write the keys out"]),
    "deep lists": (FINE + "provenance: {a: " + "[" * 500, "provenance.a" + "[0]" * 18, ["nested deeper", "flat"]),
    "deep keys": ("? " * 100_000, None, ["keys are strings"]),
    "many values": (FINE + "provenance: {a: [" + "1," * 200_000 + "]}", "provenance.a[99984]", ["more than 100000 values"]),
    "many patches": ("headpatch: 1\npatches:\n" + "- {method: zerotuning}\n" * 101, "patches", ["101", "at most 100"]),
    "two documents": (FINE + "---\n" + FINE, None, ["second document", "remove the ---"]),
    "NUL": (FINE + "name: \0\n", None, ["NUL", "UTF-8"]),
    "terminal escapes": (FINE + "name: \x1b[2J\n", None, ["not YAML", "UTF-8"]),
    "a key of a megabyte": (FINE + '? "' + "k" * 900_000 + '"\n: 1\n', '["' + "k" * 36 + '.."]', ["unknown key"]),
    "a method of a megabyte": (FINE.replace("zerotuning", "z" * 900_000), "patches[0].method", ["no method 'zzz", "known: "]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "key", "words"), TEXT.values(), ids=TEXT)
def test_broken_text(tmp_path, text, key, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with refused(tmp_path, key, [str(path), *words]):
        load_recipe(path)


LOOP: dict[str, object] = {}
LOOP["a"] = LOOP
DICT = {
    "unquoted selector": (zero(heads={12.1: 2.0}), "patches[0].heads[12.1]", ["12.1 is a number", "in quotes"]),
    "whole number as selector": (zero(heads={3: 2.0}), "patches[0].heads[3]", ["3 is a number", "in quotes"]),
    "number in a list": (zero(heads=[12.1], gamma=2.0), "patches[0].heads[0]", ["number 12.1", "in quotes"]),
    "true": (zero(heads={"1.3": True}), 'patches[0].heads["1.3"]', ["boolean true", "write a number"]),
    "NaN": (zero(heads={"1.3": math.nan}), 'patches[0].heads["1.3"]', ["nan", "finite"]),
    "infinity": (zero(heads=["1.3"], gamma=math.inf), "patches[0].gamma", ["inf", "finite"]),
    "a huge number": (zero(heads={"1.3": 10**400}), 'patches[0].heads["1.3"]', ["beyond 64 bits", "smaller"]),
    "an object": (zero(heads={"1.3": object()}), 'patches[0].heads["1.3"]', ["object cannot stand", "float(x)"]),
    "a set of heads": (zero(heads={"1.3"}, gamma=2.0), "patches[0].heads", ["set cannot stand", "lists"]),
    "bytes": (zero() | {"name": b"x"}, "name", ["bytes cannot stand", "plain strings"]),
    "a lone surrogate": (zero() | {"name": "\udcff"}, "name", ["UTF-8 cannot hold", "surrogates"]),
    "itself": (LOOP, ".".join("a" * 20), ["nested deeper", "flat"]),
    "arrays without a folder": (arrays_recipe(b"x"), "tensors.file", ["has no folder", "from its file"]),
}  # fmt: skip


def test_lists_deeper_than_the_parser_goes(tmp_path):
    """Some versions of the parser stop by themselves, before a key is known; the words are the same."""
    file = tmp_path / "r.yaml"
    file.write_text(FINE + "provenance: {a: " + "[" * 100_000)
    with pytest.raises(RecipeError, match=r"nested deeper than 20 levels.*flat"):
        load_recipe(file)


@pytest.mark.parametrize(("data", "key", "words"), DICT.values(), ids=DICT)
def test_broken_dicts(tmp_path, data, key, words):
    with refused(tmp_path, key, words):
        load_recipe(data)


DATA = safetensors_bytes()


def write(folder: Path, recipe: dict[str, object], content: bytes | None = None) -> Path:
    """A recipe in `folder`/in, with task.safetensors beside it if there is content."""
    (folder / "in").mkdir()
    path = folder / "in" / "r.yaml"
    path.write_text(yamlio.dumps(recipe))
    if content is not None:
        (folder / "in" / "task.safetensors").write_bytes(content)
    return path


def junk(folder: Path) -> Path:
    path = write(folder, {})
    os.truncate(path, 100_000_000)
    return path


def link_out(folder: Path) -> Path:
    (folder / "secret.safetensors").write_bytes(DATA)
    path = write(folder, arrays_recipe(DATA))
    (folder / "in" / "task.safetensors").symlink_to("../secret.safetensors")
    return path


def folder_link_out(folder: Path) -> Path:
    (folder / "else").mkdir()
    (folder / "else" / "task.safetensors").write_bytes(DATA)
    path = write(folder, arrays_recipe(DATA, "sub/task.safetensors"))
    (folder / "in" / "sub").symlink_to(folder / "else")
    return path


def false_snapshot(folder: Path) -> Path:
    """Laid out like a hub cache, but the link leads elsewhere."""
    (folder / "secret.safetensors").write_bytes(DATA)
    snapshot = folder / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "models--a--b" / "blobs").symlink_to(folder)
    (snapshot / "r.yaml").write_text(yamlio.dumps(arrays_recipe(DATA)))
    (snapshot / "task.safetensors").symlink_to("../../blobs/secret.safetensors")
    return snapshot / "r.yaml"


def link_loop(folder: Path) -> Path:
    path = write(folder, arrays_recipe(DATA))
    (folder / "in" / "task.safetensors").symlink_to("task.safetensors")
    return path


def pipe(folder: Path) -> Path:
    path = write(folder, arrays_recipe(DATA))
    os.mkfifo(folder / "in" / "task.safetensors")
    return path


def too_much(folder: Path) -> Path:
    path = write(folder, arrays_recipe(DATA), DATA)
    os.truncate(folder / "in" / "task.safetensors", 3 << 30)
    return path


def recipe_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "r.yaml")
    return folder / "r.yaml"


GONE = ["not there", "put it into"]
OUT = ["leads out", "in the folder"]
FILES = {
    "100 MB of junk": (junk, None, ["100000000 bytes are too many", "at most 1048576"]),
    "binary": (lambda f: _bytes(f, bytes(range(256)) * 64), None, ["not text", "UTF-8"]),
    "safetensors as the recipe": (lambda f: _bytes(f, DATA), None, ["UTF-8"]),
    "UTF-16": (lambda f: _bytes(f, FINE.encode("utf-16")), None, ["not text", "UTF-8"]),
    "a folder": (lambda f: f, None, ["is a folder", "name the recipe file"]),
    "nothing": (lambda f: f / "nothing.yaml", None, ["No such file", "that exists"]),
    "a pipe": (recipe_pipe, None, ["not a regular file", "YAML file"]),
    "arrays missing": (lambda f: write(f, arrays_recipe(DATA)), "tensors.file", GONE),
    "wrong hash": (lambda f: write(f, arrays_recipe(DATA), DATA[:-1] + b"x"), "tensors.sha256", ["another SHA-256", "get the file"]),
    "arrays cut off": (lambda f: write(f, arrays_recipe(DATA), DATA[:-1]), "tensors.sha256", ["another SHA-256", "get the file"]),
    "empty arrays": (lambda f: write(f, arrays_recipe(b""), b""), "tensors.file", ["not a safetensors file", "save_file"]),
    "not safetensors": (lambda f: write(f, arrays_recipe(b"x" * 99), b"x" * 99), "tensors.file", ["not a safetensors", "save_file"]),
    "a pickle": (lambda f: write(f, arrays_recipe(DATA, "task.pt"), DATA), "tensors.file", ["'task.pt'", ".safetensors files only"]),
    "parent folder": (lambda f: write(f, arrays_recipe(DATA, "../t.safetensors")), "tensors.file", OUT),
    "hidden parent": (lambda f: write(f, arrays_recipe(DATA, "a/../../t.safetensors")), "tensors.file", OUT),
    "absolute": (lambda f: write(f, arrays_recipe(DATA, "/etc/t.safetensors")), "tensors.file", OUT),
    "Windows drive": (lambda f: write(f, arrays_recipe(DATA, "C:t.safetensors")), "tensors.file", OUT),
    "backslashes": (lambda f: write(f, arrays_recipe(DATA, "..\\t.safetensors")), "tensors.file", OUT),
    "NUL in the name": (lambda f: write(f, arrays_recipe(DATA, "t\0.safetensors")), "tensors.file", OUT),
    "no name": (lambda f: write(f, arrays_recipe(DATA, "")), "tensors.file", OUT),
    "a long name": (lambda f: write(f, arrays_recipe(DATA, "t" * 999 + ".safetensors")), "tensors.file", GONE),
    "link out of the folder": (link_out, "tensors.file", ["link that leads out", "the file itself"]),
    "folder link out of the folder": (folder_link_out, "tensors.file", ["link that leads out", "the file itself"]),
    "false hub cache": (false_snapshot, "tensors.file", ["link that leads out", "the file itself"]),
    "link to itself": (link_loop, "tensors.file", GONE),
    "arrays are a pipe": (pipe, "tensors.file", ["not a regular file", "safetensors file"]),
    "3 GiB of arrays": (too_much, "tensors.file", ["too many", "at most 2147483648"]),
}  # fmt: skip


def _bytes(folder: Path, content: bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("make", "key", "words"), FILES.values(), ids=FILES)
def test_broken_files(tmp_path, make, key, words):
    path = make(tmp_path)
    with refused(tmp_path, key, words):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (safetensors_bytes("v", (1.0, math.nan)), ["array 'v' holds NaN or infinity"]),
        (safetensors_bytes("v", (1.0, -math.inf)), ["array 'v' holds NaN or infinity"]),
        (DATA[:8] + b'{"v": {"dtype": "F32"}}'.ljust(len(DATA) - 16) + DATA[-8:], ["cannot be read"]),
        (DATA + b"more", ["cannot be read"]),
    ],
    ids=["NaN", "infinity", "damaged header", "trailing bytes"],
)
def test_broken_arrays(tmp_path, content, words):
    pytest.importorskip("safetensors.torch")
    recipe = load_recipe(write(tmp_path, arrays_recipe(content), content))
    with refused(tmp_path, "tensors.file", ["r.yaml", *words], seconds=30.0):  # imports torch
        recipe.arrays()


MODEL = {
    "model_type": (zero() | {"model": MODEL_BLOCK | {"model_type": "qwen2"}}, LLAMA, "model.model_type", ["'qwen2'", "'llama'"]),
    "num_layers": (zero() | {"model": MODEL_BLOCK | {"num_layers": 32}}, LLAMA, "model.num_layers", ["32", "30"]),
    "num_heads": (zero() | {"model": MODEL_BLOCK | {"num_heads": 8}}, LLAMA, "model.num_heads", ["8", "9 in layer 0"]),
    "num_kv_heads": (zero() | {"model": MODEL_BLOCK | {"num_kv_heads": 9}}, LLAMA, "model.num_kv_heads", ["9", "3 in layer 0"]),
    "head_dim": (zero() | {"model": MODEL_BLOCK | {"head_dim": 80}}, LLAMA, "model.head_dim", ["80", "64 in layer 0"]),
    "a list of heads": (zero() | {"model": {"num_heads": [9, 9]}}, LLAMA, "model.num_heads", ["2 layers", "30 layers"]),
    "part": (zero(heads={"1.3": 2.0}, part="vision"), LLAMA, "patches[0].part", ["no part 'vision'", "its parts: text"]),
    "main part": (zero(heads={"1.3": 2.0}, part="text"), SPEECH, "patches[0].part", ["no part 'text'", "encoder, decoder"]),
    "layer": (zero(heads={"30.0": 2.0}), LLAMA, 'patches[0].heads["30.0"]', ["layer 30", "layers are 0-29"]),
    "head": (zero(heads={"0.9": 2.0}), LLAMA, 'patches[0].heads["0.9"]', ["head 9", "query heads are 0-8"]),
    "range of layers": (zero(heads={"28-31.0": 2.0}), LLAMA, 'patches[0].heads["28-31.0"]', ["layer 31", "layers are 0-29"]),
    "range of heads": (zero(heads=["*.7-9"], gamma=2.0), LLAMA, 'patches[0].heads["*.7-9"]', ["head 9", "query heads are 0-8"]),
    "KV head": (
        {"headpatch": 1, "patches": [{"method": "test_cache", "full_kv_heads": ["0.3"]}]}, LLAMA,
        'patches[0].full_kv_heads["0.3"]', ["head 3", "KV heads (not query heads) are 0-2"],
    ),
    "no softmax": (zero(heads={"1.0": 2.0}), HYBRID, 'patches[0].heads["1.0"]', ["no softmax attention", "layers of 0, 3"]),
    "second patch": (
        {"headpatch": 1, "patches": [*zero()["patches"], *zero(heads={"99.0": 1.0})["patches"]]}, LLAMA,
        'patches[1].heads["99.0"]', ["layer 99", "layers are 0-29"],
    ),
    "overlap": (zero(heads=["*.*"] * 9000, gamma=2.0), LLAMA, "patches[0].heads", ["overlap too often", "each head once"]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "shape", "key", "words"), MODEL.values(), ids=MODEL)
def test_recipes_that_do_not_fit(tmp_path, data, shape, key, words):
    path = write(tmp_path, data)
    recipe = load_recipe(path)
    with refused(tmp_path, key, [str(path), *words]):
        recipe.check(shape)


def test_there_are_many_and_the_good_one_is_not_among_them(tmp_path):
    assert len(TEXT) + len(DICT) + len(FILES) + len(MODEL) >= 60
    (tmp_path / "fine.yaml").write_text(FINE)
    assert load_recipe(tmp_path / "fine.yaml").check(LLAMA).num_heads == 1
    assert load_recipe(write(tmp_path, arrays_recipe(DATA), DATA)).tensors
