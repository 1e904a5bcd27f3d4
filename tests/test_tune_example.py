"""The example and the documentation of fine-tuning run; the example tests on other problems than it trains on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import peft
import pytest
import torch
from tiny_model import save_tiny_model

import headpatch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tune_heads.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_tune_heads", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs(example, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "tiny")
    example.main(
        [str(folder), "--device", "cpu", "--heads", "3", "--rank", "2", "--steps", "4", "--batch", "4", "--test", "8",
         "--save", str(tmp_path / "adapter")]
    )  # fmt: skip
    said = capsys.readouterr().out
    found = dict(re.findall(r"^(\w+ heads): .* ([\d,]+) trainable numbers", said, re.MULTILINE))
    assert found.keys() == {"chosen heads", "random heads", "all heads"}
    numbers = [int(n.replace(",", "")) for n in found.values()]
    assert max(numbers) < 2 * min(numbers)
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    assert any(p.any() for n, p in tuned.named_parameters() if "lora_B" in n)


def test_training_lowers_the_loss_and_problems_differ(example, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headpatch import tune

    rows = example.problems(500)
    assert len(set(rows)) == 500
    assert all(int(answer) == sum(map(int, re.findall(r"\d+", question))) for question, answer in rows)
    folder = save_tiny_model(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = example.encode(tokenizer, rows[:8], torch.device("cpu"))
    assert [tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]] == [answer for _, answer in rows[:8]]
    before = float(model(**batch).loss.detach())
    assert example.train(tune.lora(model, "*.*", r=4), [batch], steps=20, lr=2e-2) < before - 0.1


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path)).eval()
    ids = torch.randint(2, 60, (2, 12))
    names = {"torch": torch, "headpatch": headpatch, "base": base, "data": [{"input_ids": ids, "labels": ids}] * 2}
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fine-tuning.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/fine-tuning.md", "exec"), names)
        # the first block leaves its adapter on the model, as a script that goes on elsewhere would
        if "model" in names:
            names["base"] = names.pop("model").unload()
        if "merged" in names:
            names["base"] = names.pop("merged")
    assert (tmp_path / "learned-adapter" / "adapter_model.safetensors").is_file()
