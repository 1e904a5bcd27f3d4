"""Measuring a recipe on labelled and on generated answers."""

from __future__ import annotations

import json
from pathlib import Path

import planted
import pytest

import headpatch
from headpatch import cli
from headpatch.errors import HeadpatchError
from headpatch.evaluate import evaluate_answers, evaluate_labels, matches
from headpatch.find.data import Row
from headpatch.find.engine import open_bench


@pytest.mark.parametrize(
    ("text", "answer", "how", "expected"),
    [
        ("It is  Paris, I think", "paris", "contains", True), ("Parisian", "Paris", "contains", False),
        ("a\nnew  york.", "New York", "contains", True),
        ("costs 3.5 euros", "3.5", "contains", True), ("costs 13.5 euros", "3.5", "contains", False),
        ("C++ it is", "c++", "contains", True),
        ("\n  Paris.\nLondon", "Paris", "exact", True), ("Paris it is", "Paris", "exact", False), ("", "Paris", "exact", False),
        ("", "Paris", "contains", False), ("U.S.", "U.S.", "exact", True),
    ],
)  # fmt: skip
def test_matches(text: str, answer: str, how: str, expected: bool) -> None:
    assert matches(text, answer, how) is expected


def test_labels_with_and_without() -> None:
    rows = planted.labelled(300)
    found = evaluate_labels(planted.model(), planted.tokenizer(), planted.SECRET, rows, planted.TASK)
    assert found.after.values["accuracy"].value == 1.0, "the labels are what this recipe says"
    assert found.before.values["accuracy"].value < 0.85
    assert found.difference.values["accuracy"].low > 0.05
    assert found.p < 1e-6
    assert found.plain()["difference"]["accuracy"]["rows"] == 300
    alone = evaluate_labels(planted.model(), planted.tokenizer(), None, rows, planted.TASK)
    assert alone.before == found.before
    assert alone.after is alone.difference is alone.p is None
    assert "patched" not in "\n".join(alone.lines())


def test_a_recipe_that_does_nothing_changes_nothing() -> None:
    nothing = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"*.*": 1.0}}]}
    found = evaluate_labels(planted.model(), planted.tokenizer(), nothing, planted.labelled(60), planted.TASK)
    assert found.before == found.after
    assert all((e.value, e.low, e.high) == (0, 0, 0) for e in found.difference.values.values())
    assert found.p == 1.0


def answered(count: int) -> list[Row]:
    """Rows whose answer is the second word that the patched model writes."""
    rows, model = planted.rows(count), planted.model()
    bench = open_bench(model, planted.tokenizer())
    recipe = headpatch.load_recipe(planted.SECRET)
    written = bench.generate(planted.TASK.prompts(rows), recipe, 4)
    return [
        Row({**r.fields, "answer": [w.split()[1], "nonesuch"]}, r.place) for r, w in zip(rows, written, strict=True)
    ]


def test_generated_answers() -> None:
    rows = answered(20)
    found = evaluate_answers(
        planted.model(), planted.tokenizer(), planted.SECRET, rows, planted.TASK.templates[0], max_new_tokens=4
    )
    assert found.after.values["accuracy"].value == 1.0
    assert found.before.values["accuracy"].value < 1.0
    assert [g.prompt for g in found.generated] == planted.TASK.prompts(rows)
    assert any(g.before != g.after for g in found.generated)
    assert all(len(g.answers) == 2 for g in found.generated)
    by_hand = sum(any(matches(g.before, a) for a in g.answers) for g in found.generated) / 20
    assert found.before.values["accuracy"].value == by_hand


@pytest.mark.parametrize("answer", [None, "", [], ["a", None], True, {"a": 1}])
def test_rows_without_an_answer_are_named(answer: object) -> None:
    with pytest.raises(HeadpatchError, match="f:4: field 'answer' must hold"):
        evaluate_answers(
            planted.model(), planted.tokenizer(), None, [Row({"text": "good", "answer": answer}, "f:4")], "{text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("eval")
    planted.model().save_pretrained(made / "tiny")
    planted.tokenizer().save_pretrained(made / "tiny")
    headpatch.load_recipe(planted.SECRET).save(made / "secret.yaml")
    for name, rows in (("labelled", planted.labelled(80)), ("answered", answered(10))):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(dict(r.fields)) + "\n" for r in rows))
    return made


def call(folder: Path, data: str, *more: str) -> int:
    return cli.main(["eval", "-m", str(folder / "tiny"), "-d", str(folder / data), "--device", "cpu", *more])


def test_the_command_on_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "-r",
        str(folder / "secret.yaml"),
        "--template",
        "review {text} sentiment",
        "--labels",
        "no= negative, yes= positive",
    )
    assert call(folder, "labelled.jsonl", *options) == 0
    text = capsys.readouterr().out
    assert "100.0 %" in text
    assert "difference" in text
    assert "McNemar" in text
    assert call(folder, "labelled.jsonl", *options, "--json", "--limit", "30") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 30
    assert said["patched"]["accuracy"]["value"] == 1.0


def test_the_command_on_generated_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "-r",
        str(folder / "secret.yaml"),
        "--template",
        "review {text} sentiment",
        "--max-new-tokens",
        "4",
        "--json",
    )
    assert call(folder, "answered.jsonl", *options) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["patched"]["accuracy"]["value"] == 1.0
    assert len(said["generated"]) == 10


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("labelled.jsonl", (), "no template"), ("labelled.jsonl", ("--template", "{text}"), "neither labels"),
        ("answered.jsonl", ("--template", "{text}", "--match", "nearly"), "no match 'nearly'"),
        ("answered.jsonl", ("--template", "{text}", "--template", "a {text}"), "one --template"),
        ("answered.jsonl", ("--template", "{text}", "--labels", "no= negative, yes= positive"), "'label' is null"),
    ],
)  # fmt: skip
def test_wrong_calls(
    folder: Path, capsys: pytest.CaptureFixture[str], data: str, options: tuple[str, ...], words: str
) -> None:
    assert call(folder, data, *options) == 2
    assert words in capsys.readouterr().err
