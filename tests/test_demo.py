"""`headpatch demo`: its sentences are balanced, its figures are counted right, and it notices when removal leaves a trace."""

from __future__ import annotations

import collections
import json
import re

import pytest
import torch
import yaml
from tiny_model import RECIPE, save_tiny_model

import headpatch
from headpatch import cli
from headpatch.commands import demo


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_model(folder / "model")
    provenance = {
        "data": {"train": {"file": "train.jsonl", "rows": 600}, "eval": {"file": "test.jsonl", "rows": 1821}},
        "baseline": {"accuracy": 73.31, "perplexity": 30.5}, "patched": {"accuracy": 80.67, "perplexity": 30.75},
        "difference": {"accuracy": 7.36, "perplexity": 0.82},
        "difference_intervals": {"accuracy": [5.5, 9.25], "perplexity": [0.25, 1.5]},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "provenance": provenance}))
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(place / "model"),
    )


def test_the_sentences_are_balanced_and_differ():
    rows = demo.sentences()
    counts = collections.Counter(label for _, label in rows)
    assert counts == {"positive": 40, "negative": 40}
    assert len({text for text, _ in rows}) == 80
    for text, _ in rows:
        assert text == text.strip()
        assert text.endswith((".", "!", "?"))
        assert not re.search(r"\b(positive|negative)\b", text, re.IGNORECASE), "the answer stands in the sentence"


def right_by_hand(loaded, rows, recipe=None):
    """One forward per sentence; labels compared by their first tokens."""
    model, tokenizer = loaded
    first = {
        name: tokenizer(f"x{text}").input_ids[len(tokenizer("x").input_ids)] for name, text in demo.LABELS.items()
    }
    handle = headpatch.apply(model, str(recipe)) if recipe else None
    found = []
    for text, label in rows:
        ids = tokenizer(f"Review: {text}\nSentiment (positive or negative):", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        found.append(max(first, key=lambda name: float(logits[first[name]])) == label)
    if handle:
        handle.remove()
    return found


def test_accuracy_is_counted_as_by_hand(loaded, place):
    rows = demo.sentences()[:24]
    recipe = headpatch.load_recipe(str(place / "recipe.yaml"))
    found = demo.compare_accuracy(*loaded, recipe, rows)
    plain, patched = right_by_hand(loaded, rows), right_by_hand(loaded, rows, place / "recipe.yaml")
    assert (found.total, found.before, found.after) == (24, sum(plain), sum(patched))
    assert found.gained == sum(b and not a for a, b in zip(plain, patched, strict=True))
    assert found.lost == sum(a and not b for a, b in zip(plain, patched, strict=True))
    assert not headpatch.handles(loaded[0])


def test_the_recipe_s_template_is_used_where_it_fits():
    patches = RECIPE["patches"]

    def recipe(**provenance):
        return headpatch.load_recipe({"headpatch": 1, "patches": patches, "provenance": provenance})

    own = {"templates": ["{text} It was"], "labels": {"negative": " terrible", "positive": " great"}}
    assert demo.asked_as(recipe(**own)) == ("{text} It was", {"negative": " terrible", "positive": " great"})
    other = {"templates": ["{question}"], "labels": {"NUM": " number"}}
    assert demo.asked_as(recipe(**other)) == (demo.TEMPLATE, demo.LABELS)
    assert demo.asked_as(recipe()) == (demo.TEMPLATE, demo.LABELS)


@pytest.fixture
def run(capsys, monkeypatch, place):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(demo, "PAIRS", 1)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 4)
    monkeypatch.setattr(
        demo, "sentences", lambda: [("the film is good.", "positive"), ("nobody laughed.", "negative")]
    )

    def call(*more):
        recipe = str(place / "recipe.yaml")
        common = ["--recipe", recipe, "--text-recipe", recipe, "--model", str(place / "model"), "--tokens", "8"]
        status = cli.main(["demo", *common, *map(str, more)])
        return status, capsys.readouterr().out

    return call


def test_the_demo_shows_all_that_it_promises(run, tmp_path):
    status, out = run("--json", tmp_path / "demo.json")
    assert status == 0
    assert "2 sentences about films" in out
    assert re.search(r"accuracy, labels compared\s+73\.31 %\s+80\.67 %\s+\+7\.36 \(\+5\.5 to \+9\.25\)", out)
    assert re.search(r"neutral texts\s+30\.5\s+30\.75\s+\+0\.82", out)
    assert "heads chosen on 600 rows of train.jsonl; held-out figures from 1821 rows of test.jsonl" in out
    assert "6 of 12 heads" in out
    assert "▼" in out
    assert "untouched" in out
    assert "ratio" in out
    assert "bit-equal to the untouched model's" in out
    measured = json.loads((tmp_path / "demo.json").read_text())
    assert measured["bit_equal"] is True
    assert measured["largest_change"] > 0.01
    assert measured["texts"]["untouched"] != measured["texts"]["patched"]
    assert measured["milliseconds"]["patched"] > 0


def test_a_trace_that_stays_fails_the_demo(run, monkeypatch):
    """Removal that leaves one bit behind is seen, and said with status 1."""
    from headpatch.adapters.huggingface import ADAPTER

    real, calls = type(ADAPTER).logits, []

    def leaky(self, *args, **kwargs):
        calls.append(real(self, *args, **kwargs))
        if len(calls) == 3:
            calls[-1].view(-1)[5] = calls[-1].view(-1)[5].nextafter(torch.tensor(1e9))
        return calls[-1]

    monkeypatch.setattr(type(ADAPTER), "logits", leaky)
    status, out = run()
    assert status == 1
    assert "NOT what they were" in out


def test_a_recipe_for_another_model_is_refused(place, capsys):
    arguments = ["demo", "--model", str(place / "model"), "--recipe", "smollm2-135m-instruct/follow-context"]
    assert cli.main([*arguments, "--text-recipe", "smollm2-135m-instruct/follow-context"]) == 2
    assert "the model has 3" in capsys.readouterr().err
