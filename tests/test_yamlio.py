"""YAML from strangers, and YAML for people."""

from __future__ import annotations

import math
import os
import time
import tracemalloc

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_tools import complaint

from headpatch import yamlio
from headpatch.errors import RecipeError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01), ("1E5", 1e5), (".5", 0.5), ("2.", 2.0), ("-3", -3), ("+3", 3), ("010", 10), ("1.5e+3", 1500.0),
        ("-0.0", -0.0), (".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    read = yamlio.loads(f"a: {text}")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "off", "Y", "2026-01-31", "2026-01-31 10:00:00", "12:30:45", "0x1F", "0o17", "0b1", "1_000", "1.2.3",
     "12.0-2", "8.*", "tRue", "=", "infinity", "nan", "1e", "e5", "."],
)  # fmt: skip
def test_these_are_strings(text):
    assert yamlio.loads(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", ['"12.10"', "'12.10'", "|-\n  12.10"])
def test_quoted_numbers_are_strings(text):
    assert yamlio.loads(f"a: {text}") == {"a": "12.10"}


def test_nan_is_read_for_others_to_refuse():
    assert math.isnan(yamlio.loads("a: .nan")["a"])


def test_structure_comments_and_order():
    text = "b: 1  # why\na: [1, {x: y}, 'z']\n"
    assert list(yamlio.loads(text)) == ["b", "a"]
    assert yamlio.loads(text)["a"] == [1, {"x": "y"}, "z"]
    assert yamlio.loads("--- \na: 1\n...\n") == {"a": 1}
    assert yamlio.loads("# nothing") is None
    assert yamlio.loads('{"a": [1.5, true, null]}') == {"a": [1.5, True, None]}


BAD = {
    "duplicate key": ("a: 1\nb: 2\na: 3", "a", ["line 3", "'a' occurs twice", "first on line 1", "keep one"]),
    "duplicate in flow": ('h: {"1.3": 1, "1.3": 2}', 'h["1.3"]', ["occurs twice"]),
    "duplicate spelt otherwise": ("a: 1\n'a': 2", "a", ["occurs twice"]),
    "unquoted selector": ("heads: {12.10: 3}", 'heads["12.10"]', ["12.10 is a number", 'in quotes: "12.10"']),
    "integer key": ("a: {3: 1}", 'a["3"]', ['in quotes: "3"']),
    "boolean key": ("true: 1", "true", ["boolean", "in quotes"]),
    "null key": ("~: 1", '["~"]', ["null", "in quotes"]),
    "list as key": ("[a]: 1", None, ["line 1", "keys are strings"]),
    "mapping as key": ("? {a: b}\n: 1", None, ["keys are strings"]),
    "merge key": ("a:\n  <<: {b: 1}", 'a["<<"]', ["line 2", "merge key", "write the keys out"]),
    "anchor": ("a: &x 1", "a", ["anchor", "in quotes"]),
    "alias": ("a: *x", "a", ["alias", "in quotes"]),
    "alias as key": ("*x : 1", None, ["alias", "in quotes"]),
    "star selector": ("heads: [*.7]", None, ["alias", 'in quotes, as in "*.7"']),
    "star selector as key": ("heads: {*.7: 1}", None, ["alias", 'in quotes, as in "*.7"']),
    "python tag": ("a: !!python/object/apply:os.system [ls]", "a", ["the tag", "python/object/apply", "remove it"]),
    "own tag": ("a: !x y", "a", ["the tag '!x'", "remove it"]),
    "standard tag": ("a: !!float 3", "a", ["the tag", "remove it"]),
    "two documents": ("a: 1\n---\nb: 2", None, ["line 2", "second document", "remove the ---"]),
    "directive": ("%YAML 1.1\n---\na: 1", None, ["line 1", "directive", "begin with %"]),
    "tag directive": ("# x\n%TAG ! tag:x,2000:\n---\na: 1", None, ["line 2", "directive"]),
    "open bracket": ("a: [1", None, ["line", "not YAML"]),
    "tab": ("a:\n\t- 1", None, ["line 2", "not YAML"]),
    "control character": ("a: \x07", None, ["not YAML"]),
    "lone surrogate": ("a: \ud800", None, ["not YAML"]),
    "NUL": ("a: \0", None, ["NUL"]),
    "long integer": ("a: " + "9" * 5000, "a", ["beyond 64 bits"]),
    "integer of 64 bits": ("a: 9223372036854775808", "a", ["beyond 64 bits"]),
}


@pytest.mark.parametrize(("text", "key", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(text, key, words):
    with pytest.raises(RecipeError) as caught:
        yamlio.loads(text, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml")
    assert caught.value.remedy
    assert caught.value.key == key
    assert all(word in message for word in words), message


BOMBS = {
    "billion laughs": "k0: &a0 [x,x]\n" + "".join(f"k{i + 1}: &a{i + 1} [*a{i},*a{i}]\n" for i in range(30)),
    "brackets": "[" * (MIB - 1),
    "braces": "{a: " * (MIB // 4 - 1),
    "dashes": "- " * (MIB // 2 - 1),
    "keys in keys": "? " * (MIB // 2 - 1),
    "flow keys in keys": "{? " * (MIB // 3 - 1),
    "scalars": "[" + "a," * (MIB // 2 - 2) + "]",
    "empty mappings": "[" + "{}," * (MIB // 3 - 2) + "]",
    "keys": "".join(f"k{i}: 1\n" for i in range(80_000)),
    "tag directives": "%TAG !a! b\n" * (MIB // 11 - 1),
    "quotes": "'" * (MIB - 1),
    "colons": ":" * (MIB - 1),
    "tabs": "\t" * (MIB - 1),
    "too long": "a" * (MIB + 1),
}  # fmt: skip


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_quickly(text):
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        yamlio.loads(text, "bomb.yaml")
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 500


HEAVY = {
    "blank": " " * (MIB - 1), "comments": "#\n" * (MIB // 2), "one plain scalar": "a: " + "b " * (MIB // 2 - 4),
    "one quoted scalar": 'a: "' + r"\x41" * (MIB // 4 - 4) + '"', "block text": "a: |\n" + "  x\n" * (MIB // 4 - 4),
    "long float": "a: ." + "9" * (MIB - 9), "huge exponent": "a: 1e" + "9" * (MIB - 9),
}  # fmt: skip


@pytest.mark.parametrize("text", HEAVY.values(), ids=HEAVY)
def test_heavy_but_harmless_text_is_quick_too(text):
    start = time.process_time()
    yamlio.loads(text)
    assert time.process_time() - start < 2


def test_the_fallback_parser_gives_the_same(monkeypatch):
    """Builds of PyYAML without libyaml have SafeLoader only."""
    monkeypatch.setattr(yamlio, "_Loader", yaml.SafeLoader)
    assert yamlio.loads('a: 1e-2\nb: [yes, "1.3"]') == {"a": 0.01, "b": ["yes", "1.3"]}
    for name in (
        "duplicate key",
        "anchor",
        "python tag",
        "unquoted selector",
        "merge key",
        "two documents",
        "star selector",
    ):
        text, _, words = BAD[name]
        with pytest.raises(RecipeError) as caught:
            yamlio.loads(text)
        assert all(word in str(caught.value) for word in words)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "junk.yaml"
    path.write_bytes(b"x")
    os.truncate(path, 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match=r"100000000 bytes are too many .*at most 1048576"):
            yamlio.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_grows_while_it_is_read_is_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "grows.yaml"
    path.write_bytes(b"a" * (2 * MIB))
    monkeypatch.setattr(yamlio.stat, "S_ISREG", lambda mode: True)
    real = type(path).stat

    class Small:
        st_mode, st_size = 0o100644, 1

    monkeypatch.setattr(type(path), "stat", lambda self, **kw: Small if self == path else real(self, **kw))
    with pytest.raises(RecipeError, match="too many"):
        yamlio.load(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.mkdir(), ["is a folder", "name the recipe file"]),
        (lambda p: None, ["cannot be read", "No such file", "that exists"]),
        (lambda p: p.write_bytes(b"\x80\x81\xff"), ["not text", "byte 0", "UTF-8"]),
        (lambda p: p.write_bytes(b"a: \x00"), ["not text", "UTF-8"]),
        (lambda p: p.write_bytes("a: 1".encode("utf-16")), ["not text", "UTF-8"]),
        (lambda p: p.write_bytes(bytes(range(256)) * 100), ["not text", "UTF-8"]),
        (os.mkfifo, ["not a regular file"]),
        (lambda p: p.symlink_to(p), ["cannot be read"]),
        (lambda p: p.symlink_to("/dev/zero"), ["not a regular file"]),
    ],
    ids=["folder", "missing", "binary", "NUL", "UTF-16", "all bytes", "pipe", "link to itself", "device"],
)
def test_what_cannot_be_a_recipe_file(tmp_path, make, words):
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(RecipeError) as caught:
        yamlio.load(path)
    assert str(caught.value).startswith(str(path))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    assert yamlio.load(path) == {"a": 1, "b": "x"}


def test_plain_values_are_copied():
    inner = [1, 2.5, "x", None, True]
    data = {"a": inner, "b": (1, 2)}
    copied = yamlio.check_plain(data)
    assert copied == {"a": inner, "b": [1, 2]}
    assert copied["a"] is not inner


class Loud(str):
    """A str that is more than a str."""

    __slots__ = ()


def test_subclasses_become_plain():
    np = pytest.importorskip("numpy")
    copied = yamlio.check_plain({Loud("a"): np.float64(2.5)})
    assert [type(x) for pair in copied.items() for x in pair] == [str, float]


LOOP: list[object] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "key", "words"),
    [
        ({"a": {"b": object()}}, "a.b", ["object cannot stand in a recipe", "float(x)"]),
        ({"a": {1, 2}}, "a", ["set cannot stand"]),
        ({"a": b"x"}, "a", ["bytes cannot stand"]),
        ({"a": [1j]}, "a[0]", ["complex cannot stand"]),
        ({12.1: 1}, "[12.1]", ["12.1 is a number", 'in quotes: "12.1"']),
        ({True: 1}, "[true]", ["boolean", "in quotes"]),
        ({"a": math.nan}, "a", ["nan is not a finite number"]),
        ({"a": [-math.inf]}, "a[0]", ["-inf is not a finite number"]),
        ({"a": 2**63}, "a", ["beyond 64 bits"]),
        ({"a": 10**5000}, "a", ["beyond 64 bits"]),
        ({"a": "\ud800"}, "a", ["UTF-8 cannot hold"]),
        ({"\udfff": 1}, None, ["UTF-8 cannot hold"]),
        ({"a": LOOP}, None, ["nested deeper than 20"]),
        ({"a": [0] * 100_001}, None, ["more than 100000 values"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_a_dict_cannot_hold(value, key, words):
    with pytest.raises(RecipeError) as caught:
        yamlio.check_plain(value, "dict")
    assert key is None or caught.value.key == key
    assert caught.value.remedy
    assert all(word in str(caught.value) for word in words), str(caught.value)


SPECIAL = [
    "1e-2", "yes", "null", "~", "012", "1.2", "8.*", "*.*", "<<", "=", "2026-01-31", "12:30", "0x1f", ".inf", ".nan", "---", "%x",
    "a: b", "- a", "#x", " ", "\n", "a\nb", "\u2028", "\x85", "\ufeff", "?", "&a", "*a", "!x", "1.3", "12.10", "true", "x" * 200,
]  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(SPECIAL)
)  # fmt: skip
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(SPECIAL)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, plain, max_size=5))
def test_what_is_written_is_read_back(data):
    back = yamlio.loads(yamlio.dumps(data))
    assert repr(back) == repr(data)  # types, and the order of keys, too


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="{}[]:,-*&!|>'\"%#?~ \n\ta1.e<"))
def test_text_is_read_or_refused(text):
    error = complaint(yamlio.loads, text)
    assert error is None or (error.remedy and "\n" not in str(error))


def test_people_can_read_it():
    data = {
        "headpatch": 1,
        "patches": [{"method": "m", "heads": {"1.3": 3.0, "8.*": 2}}, {"heads": ["12.0-2", "*.7"]}],
    }
    data["date"] = "2026-01-31"
    assert yamlio.dumps(data) == (
        "headpatch: 1\npatches:\n- method: m\n  heads: {\"1.3\": 3.0, \"8.*\": 2}\n- heads: [\"12.0-2\", \"*.7\"]\n"
        "date: '2026-01-31'\n"
    )  # fmt: skip
