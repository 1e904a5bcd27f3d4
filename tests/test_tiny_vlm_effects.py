"""Measurements of the small vision-language model, at toy size: figures are what they claim, and a whole lease runs on a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_vlm"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import model as tiny
import tiny_vlm_effects as effects
import tiny_vlm_gpu as lease
import tiny_vlm_measure as measure
import tiny_vlm_sinks as sinks
import world as scenes_of
from world import SHAPES, World

# --- figures --------------------------------------------------------------------------------------------------------------


def test_area_and_equal_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(n, generator=generator).round(decimals=1) for n in (60, 40))
    positive = positive + 0.5
    wins = sum(float(p > n) + 0.5 * float(p == n) for p in positive for n in negative)
    assert measure.auc(positive, negative) == pytest.approx(wins / 2400)
    recall = float((positive > 0).double().mean())
    assert measure.at_recall(positive, negative, recall) == float((negative > 0).double().mean()), "itself"
    assert measure.at_recall(positive - 3.0, negative - 3.0, recall) == pytest.approx(
        float((negative > 0).double().mean()), abs=0.06
    )
    shifted = measure.at_recall(positive + 5.0, negative + 5.0, recall)
    assert shifted == pytest.approx(measure.at_recall(positive - 3.0, negative - 3.0, recall)), (
        "a shift of both is no gain"
    )


def test_captions_are_counted() -> None:
    world = World(0)
    drawn = effects._head(world.scenes(2, "counterfactual"), 2)
    drawn.present[:] = False
    for row, names in enumerate((("star", "ring", "bar"), ("moon",))):
        for name in names:
            drawn.present[row, SHAPES.index(name)] = True
    drawn.companion[:] = SHAPES.index("heart")
    text = ["the image shows a red star , a small heart and a heart . </s>", "the image shows a moon"]
    tokens = [scenes_of.encode(t) for t in text]
    ids = torch.tensor([t + [0] * (20 - len(t)) for t in tokens])
    found = measure.captions(ids, drawn)
    expected = {
        "chair_i": 100 / 3, "chair_s": 50.0, "recall": 50.0, "f1": 200 * 2 / 7, "false_companion": 50.0, "mentions": 1.5,
        "repeated": 50.0, "length": (len(tokens[0]) + len(tokens[1])) / 2, "ended": 50.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_questions_of_pope() -> None:
    world = World(5)
    drawn = world.scenes(400, "counterfactual")
    asked = measure.pope_questions(drawn, world)
    for kind, shape in asked.items():
        assert bool((drawn.has(shape) == kind.startswith("present")).all()), kind
    assert torch.equal(asked["adversarial"], drawn.companion), "what goes with the anchor most is the companion"
    assert len(set(asked["random"].tolist())) > 8


def test_differences_are_of_seeds() -> None:
    def one(seed: int, base: float, gain: float) -> dict[str, Any]:
        scores = {"auc": base, "false_yes": 10.0}
        methods = {
            "A": {"auc": base + gain}, "B": {"refused": "RecipeError: no"}, "random half, doubled, draw 0": {"auc": base + 0.01},
            "random half, doubled, draw 1": {"auc": base + 0.03},
        }  # fmt: skip
        return {"seed": seed, "untouched": scores, "logit shift": {"auc": base}, "methods": methods}

    studies = [one(1, 0.9, 0.01), one(2, 0.8, 0.03)]
    found = effects.differences(studies, ("auc",))
    assert found["A"] == pytest.approx([1.0, 3.0])
    assert found["random half, doubled"] == pytest.approx([2.0, 2.0])
    assert found["logit shift"] == pytest.approx([0.0, 0.0])
    assert "B" not in found
    assert effects.interval([1.0, 3.0]) == "+2.00 +- 12.71"


# --- all of it ------------------------------------------------------------------------------------------------------------


def options(folder: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"parallel": 2, "device": "cpu", "toy": True, **more})


def test_a_lease_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds, methods, controls, conditions and the files that come back; what cannot run is named with its reason."""
    monkeypatch.setattr(sinks, "CONDITIONS", {k: sinks.CONDITIONS[k] for k in ("wider", "no prefix")})
    monkeypatch.setattr(lease, "CONDITIONS", sinks.CONDITIONS)
    monkeypatch.setattr(effects, "DRAWS", 1)
    work, out = tmp_path / "work", tmp_path / "out"
    call = [
        "tiny_vlm_gpu.py",
        "--work",
        str(work),
        "--out",
        str(out),
        "--toy",
        "--inline",
        "--device",
        "cpu",
        "--seeds",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*call, "--deadline", "0"])
    lease.main()
    assert "left: train:1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", call)
    lease.main()
    said = capsys.readouterr().out
    assert said.endswith("complete\n")
    files = sorted(f.name for f in out.iterdir())
    assert files == ["report.md", "results.json", "seed1.safetensors", "sinks.json"]
    results = json.loads((out / "results.json").read_text())
    assert results["left"] == []
    (study,) = results["studies"]
    methods = study["methods"]
    assert {
        "VHR online",
        "VHR listed",
        "PAI 0.2",
        "VAR 0.4",
        "all heads, doubled",
        "norm-matched",
        "not listed, doubled",
    } <= methods.keys()
    for name, scores in methods.items():
        assert ("refused" in scores) != ("auc" in scores), name
        if "refused" in scores:
            assert name in (out / "report.md").read_text()
    refused = {name for name, scores in methods.items() if "refused" in scores}
    assert refused <= {"VHR online", "VHR listed", "VAR 0.4", "VAR 0.6"}, "methods that every build has must run"
    assert {"auc", "false_yes_at_recall", "recall", "pope_train", "captions_train"} <= methods["PAI 0.5"].keys()
    assert [c["name"] for c in json.loads((out / "sinks.json").read_text())] == ["wider", "no prefix"]
    assert "no prefix" in (out / "report.md").read_text()
    from transformers import AutoModelForImageTextToText

    folder = tiny.export(tiny.load(out / "seed1.safetensors", tiny.TOY), tmp_path / "model")
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "llava"


@pytest.mark.slow
def test_a_lease_in_processes(tmp_path: Path) -> None:
    """Jobs in processes of their own; a job that fails is in the result with the end of its log."""
    lease_options = options(tmp_path)
    (tmp_path / "seed1.effects.json").write_text("{}")
    failed = lease.schedule(["train:1", "sinks:nowhere"], tmp_path, 1e12, lease_options)
    assert lease.result("train:1", tmp_path).is_file()
    assert set(failed) == {"sinks:nowhere"}
    assert "KeyError" in lease._tail(tmp_path / "sinks_nowhere.log")


def test_conditions_that_were_trained_by_themselves_join_the_results(tmp_path: Path) -> None:
    """What is left gets less, a condition that was there is replaced, and the tables of the seeds stay as they are."""

    def found(name: str, phi: float) -> dict[str, Any]:
        return {"name": name, "layers": [{"phi": phi}], "verdict": {"refused": "none"}, "device": "NVIDIA H100"}

    assert lease.jobs((1,), "sinks")[0] == "sinks:longer" and set(lease.jobs((1,))) > set(lease.jobs((1,), "sinks"))
    results, new = tmp_path / "results", tmp_path / "new"
    results.mkdir()
    new.mkdir()
    old = {
        "left": ["sinks:base", "sinks:longer"],
        "training": {"seed1": {}},
        "studies": [1],
        "sinks": [found("base", 1)],
    }
    (results / "tiny_vlm_h100.json").write_text(json.dumps(old))
    (results / "tiny_vlm_h100.md").write_text("# Seeds\n\n## Sinks\n\nnone trained\n")
    (new / "sinks.json").write_text(json.dumps([found("longer", 3), found("base", 2)]))
    (new / "results.json").write_text(
        json.dumps({"training": {"sinks-longer": {"seconds": 1}, "seed1": {"other": 1}}})
    )
    lease.merge(new, results)
    whole = json.loads((results / "tiny_vlm_h100.json").read_text())
    assert whole["left"] == [] and whole["studies"] == [1]
    assert whole["training"] == {"seed1": {}, "sinks-longer": {"seconds": 1}}
    assert whole["sinks"] == [found("base", 2), found("longer", 3)]
    text = (results / "tiny_vlm_h100.md").read_text()
    assert text.startswith("# Seeds\n\n## Sinks\n\n| condition | phi |") and "none trained" not in text
