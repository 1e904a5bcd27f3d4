"""Rows, templates and labels: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headpatch.errors import HeadpatchError
from headpatch.find.data import Row, Task, fill, load_rows, parse_labels, unescape

LABELS = {"negative": " negative", "positive": " positive"}


def task(**more: object) -> Task:
    return Task(**{"templates": ("Review: {text}\nSentiment:",), "labels": LABELS, **more})  # type: ignore[arg-type]


def test_rows_are_read_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b", "label": "positive"}\r\n\r\n{"text": "c", "n": 3}')
    rows = load_rows(path)
    assert [r.place for r in rows] == [f"{path}:1", f"{path}:3"]
    assert rows[0].fields["text"] == "a\u2028b", "a line separator inside a string is no end of line"
    assert rows[1].fields == {"text": "c", "n": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}\n{"a": ', ":2: not JSON"), ('{"a": 1}\n[1]', ":2: a list is no row"), ("7", ":1: the number 7 is no row"),
        ("\n \n", "holds no rows"), ("\ufeff", "holds no rows"), ("[" * 100_000, ":1: not JSON"),
    ],
)  # fmt: skip
def test_bad_files_name_file_and_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(HeadpatchError, match=words) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(HeadpatchError, match="No such file"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(HeadpatchError, match="cannot be read"):
        load_rows(tmp_path / "latin")


def test_templates_are_filled() -> None:
    row = Row({"text": "a {b} {{c}}", "n": 3, "x y": "z"}, "f:1")
    assert fill("{{{text}}} {n} {x y}", row) == "{a {b} {{c}}} 3 z", "what a field holds is never a template"
    two = task(templates=("A {text}", "B {text}"))
    assert two.prompts([Row({"text": "1"}), Row({"text": "2"})]) == ["A 1", "A 2", "B 1", "B 2"]
    assert two.content_free() == ["A N/A", "A [MASK]", "A ", "B N/A", "B [MASK]", "B "]
    assert task(templates=("{text}",)).content_free() == ["N/A", "[MASK]"], "an empty prompt has no tokens"


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.sampled_from(["text", "b"]), st.text(), min_size=2), st.text())
def test_fields_never_leak_format_syntax(fields: dict[str, str], tail: str) -> None:
    row = Row(fields)
    safe = tail.replace("{", "{{").replace("}", "}}")
    assert fill("{text}|{b}" + safe, row) == f"{fields['text']}|{fields['b']}{tail}"


@pytest.mark.parametrize("fields", [{}, {"text": None}, {"text": ["a"]}, {"text": True}])
def test_missing_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(HeadpatchError, match=r"f:9: has no text in field 'text'"):
        fill("{text}", Row(fields, "f:9"))


def test_gold() -> None:
    rows = [Row({"text": "", "label": "positive"}), Row({"text": ""})]
    assert task().gold(rows, required=False) == [1, -1]
    assert task(labels={"0": " no", "1": " yes"}).gold([Row({"label": 1}), Row({"label": "0"})]) == [1, 0]
    for label in ("Positive", None, True, ["positive"]):
        with pytest.raises(HeadpatchError, match=r"f:3: 'label' is .*must be one of negative, positive"):
            task().gold([Row({"label": label}, "f:3")])


def test_templates_that_make_no_sense() -> None:
    with pytest.raises(HeadpatchError, match="needs a template"):
        task(templates=())
    with pytest.raises(HeadpatchError, match="names no field"):
        task(templates=("Review: {{text}}",))
    with pytest.raises(HeadpatchError, match="show the model the label"):
        task(templates=("{text} {label}",))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("negative, positive", LABELS), ("negative,positive", LABELS), (json.dumps(LABELS), LABELS),
        ("a= one two,b=  three", {"a": " one two", "b": "  three"}), ("a=x=y, b", {"a": "x=y", "b": " b"}),
        ('{"a,b": " x", "c": " y"}', {"a,b": " x", "c": " y"}),
    ],
)  # fmt: skip
def test_labels(text: str, labels: dict[str, str]) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("positive", "at least two"), ("a,a", "twice"), ('{"a": "x", "a": "y"}', "twice"), ("a,,b", "needs a text"),
        ("a= ,b", "needs a text"), ('{"a": 1, "b": "x"}', "the number 1"), ('{"a"', "not JSON"), ("", "needs a text"),
    ],
)  # fmt: skip
def test_bad_labels(text: str, words: str) -> None:
    with pytest.raises(HeadpatchError, match=words):
        parse_labels(text)


def test_unescape() -> None:
    assert unescape(r"a\nb\tc\\n\d") == "a\nb\tc\\n\\d"


def test_spans_of_rows() -> None:
    """A field with a piece of the prompt, or a list of pieces; for each template and row."""
    two = task(templates=("A {text}", "{text} B"), span_fields=("mark", "more"))
    rows = [Row({"text": "one two", "mark": "one", "more": ["two", "one two"]}, "f:1")]
    assert two.spans(rows) == [["one", "two", "one two"]] * 2
    assert task().spans(rows) is None
    for field, words in (
        (None, "f:1: 'mark' is null"), (7, "f:1: 'mark' is the number 7"), ([], None), ("", "the string ''"),
        ("three", "'three' does not occur in the row's prompt"), (["one", 1], "a piece of the prompt"),
    ):  # fmt: skip
        given_rows = [Row({**rows[0].fields, "mark": field}, "f:1")]
        if words is None:
            assert two.spans(given_rows)[0] == ["two", "one two"]
            continue
        with pytest.raises(HeadpatchError, match=words):
            two.spans(given_rows)
