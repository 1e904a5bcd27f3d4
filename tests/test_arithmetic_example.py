"""The example that finds, silences and tunes heads for arithmetic: tiny, interrupted and resumed; and what it makes its data of."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from tiny_model import save_tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = [
    "--any", "--prompts", "2", "--test", "6", "--knock-out", "1", "4", "--draws", "2", "--heads", "3", "--rank", "2", "--steps", "3",
    "--batch", "4", "--exercises", "8", "--seeds", "1", "--device", "cpu", "--save",
]  # fmt: skip


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("example_arithmetic_heads", EXAMPLES / "arithmetic_heads.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_it_runs_stops_and_goes_on(example, folder, tmp_path, capsys, monkeypatch):
    """Stopped after the first adapter; the second run measures nothing again and ends with the whole table."""
    real = example.Study.tuned

    def stop(self, name, *rest):
        if name == "random":
            raise KeyboardInterrupt
        return real(self, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(example.Study, "tuned", stop)
        with pytest.raises(KeyboardInterrupt):
            example.main([str(folder), "--work", str(tmp_path), *TINY])
    first = json.loads((tmp_path / "result.json").read_text())
    assert {"find", "untouched", "ranks", "tuned chosen 0"} <= first.keys() and "tuned random 0" not in first
    capsys.readouterr()
    example.main([str(folder), "--work", str(tmp_path), *TINY])
    said, known = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert "path patching" not in said and all(known[key] == first[key] for key in first)
    rows = dict(re.findall(r"^\| (\w+) heads \| \d+ \| ([\d,]+) \|", said, re.MULTILINE))
    numbers = [int(n.replace(",", "")) for n in rows.values()]
    assert rows.keys() == {"chosen", "random", "all"} and max(numbers) < 2 * min(numbers)
    assert len(known["find"]["heads"]) == 12 and known["find"]["knock-out"].keys() == {"0", "1", "4"}
    for name, chosen in (("chosen", known["find"]["heads"][:3]), ("random", None)):
        facts = json.loads((tmp_path / f"{name}-0" / "headpatch_heads.json").read_text())
        named = set(facts["heads"])
        assert chosen is None or len(named) <= 3
    with pytest.raises(SystemExit, match="other settings"):
        example.main([str(folder), "--work", str(tmp_path), *TINY, "--seed", "1"])
    from transformers import AutoModelForCausalLM

    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "chosen-0"))
    assert any(p.any() for n, p in tuned.named_parameters() if "lora_B" in n)


def test_contrasts_and_exercises_are_what_they_say(example, folder):
    from headpatch.find.engine import load_model
    from headpatch.tune.engine import last_tokens

    model = last_tokens(*load_model(str(folder), device="cpu"))
    found = example.contrasts(model)
    assert {style for style, _ in found} >= {"equation"} and len(found) > 100
    for _, c in found:
        assert len(c.prompt) == len(c.other) and c.prompt != c.other
        text = model.decode(c.prompt).splitlines()[-1]
        a, b = map(int, re.findall(r"\d", text)[-2:])
        sign = re.findall(r"\+|plus|sum|minus|-", text)[-1]
        value = a - b if sign in ("-", "minus") else a + b
        assert model.decode([c.answer]) == str(value)
    rows = example.exercises(600, 3)
    assert len(set(rows)) == 600 == len(example.exercises(600, 3)) and rows == example.exercises(600, 3)
    for question, answer in rows:
        a, word, b = re.search(r"is (\d+) (\w+) (\d+)\?", question).groups()
        assert int(answer) == {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[word]
    few, many = example.exercises(40, 0), example.exercises(90, 0)
    assert not set(many[:40]) & set(many[40:]) and len(few) == 40


def test_a_model_that_cannot_count_says_so(example, folder, tmp_path):
    with pytest.raises(SystemExit, match="too few to look for heads"):
        example.main([str(folder), "--work", str(tmp_path), *[word for word in TINY if word != "--any"]])
