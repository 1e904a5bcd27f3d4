"""The benchmark of soft injection: parts that several processes write are merged, and the report works on what comes out."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import soft_injection
import soft_injection_latency as latency_of
import soft_injection_parts as parts_of
import soft_injection_report as report_of
import soft_injection_stand_in as stand_in


def result(*tasks: str, right: int = 1, whole: bool = False, heads: Any = None) -> dict[str, Any]:
    """A result with these tasks, two seeds and two questions each."""
    methods = [m for m in report_of.METHODS if whole or m != report_of.WHOLE]
    alpha = {"mean": 0.5, "below 0.1": 1, "above 0.9": 1, "of": 4, "by layer": [0.5]}
    task = {
        "pairs": {"train": 5, "valid": 2, "test": 2},
        "prompt_tokens": {"zero-shot": 8.0, "ICL": 80.0},
        "answers": {m: [{"seed": s, "prefix": [right, 1], "exact": [right, 0]} for s in (0, 1)] for m in methods},
        "learned": [{"seed": s, "loss": "first", "step": 50, "alpha": alpha} for s in (0, 1)],
    }
    return {
        "settings": {"prompts": 5, "steps": 6, "train": 7, "valid": 2, "shots": 3, "draws": 1},
        "model": {"model": "m", "dtype": "float32", "device": "cpu"},
        "tasks": {name: copy.deepcopy(task) for name in tasks},
        "heads": heads,
        "recipes": {name: {"tokens": 3} for name in tasks[:1]},
    }


def test_parts_are_merged_and_the_first_figures_stay() -> None:
    heads = {"chosen": ["0.1"]}
    whole, first, second = result(), result("a", "b", heads=heads), result("b", "c", right=0, heads=heads)
    before = copy.deepcopy([whole, first, second])
    found = parts_of.merge(whole, [first, second])
    assert sorted(found["tasks"]) == ["a", "b", "c"] and sorted(found["recipes"]) == ["a", "b"]
    assert found["tasks"]["b"] == first["tasks"]["b"] and found["tasks"]["c"] == second["tasks"]["c"]
    assert found["heads"] == heads
    assert [whole, first, second] == before
    assert parts_of.merge(found, [first, second]) == found


@pytest.mark.parametrize("key", ["settings", "model", "heads"])
def test_parts_of_another_run_are_refused(key: str) -> None:
    whole, part = result("a", heads={"chosen": ["0.1"]}), result("b", heads={"chosen": ["0.1"]})
    part[key] = {**part[key], "other": 1}
    with pytest.raises(ValueError, match=f"other {key}"):
        parts_of.merge(whole, [part])


@pytest.mark.parametrize("marks", [[1], [0], [0, 0, 1], [1, 0, 1, 1, 0, 0], [0] * 9 + [1] * 200, [0] * 70])
def test_marks_are_packed_and_come_back(marks: list[int]) -> None:
    text = parts_of.packed(marks)
    assert parts_of.unpacked(text) == marks == parts_of.unpacked(marks) and parts_of.packed(text) == text
    assert len(text) < 12 + len(marks) / 3


def test_a_file_holds_packed_marks_and_is_read_as_json(tmp_path: Path) -> None:
    data = result("a", "b")
    data["heads"] = {"chosen": ["x" * 100] * 20}  # longer than a line
    before = copy.deepcopy(data)
    parts_of.write_whole(tmp_path / "r.json", data)
    assert data == before
    read = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert read["heads"] == data["heads"] and read["tasks"]["b"]["learned"] == data["tasks"]["b"]["learned"]
    assert read["tasks"]["a"]["answers"]["ICL"][1] == {"seed": 1, "prefix": "2:3", "exact": "2:2"}
    assert report_of.scores(read) == report_of.scores(data) and report_of.lines(read) == report_of.lines(data)
    assert parts_of.merge(result(), [read])["tasks"] == read["tasks"]  # a part is a file that was read


@pytest.mark.parametrize("whole", [False, True])
def test_the_report_of_a_merged_result(tmp_path: Path, whole: bool) -> None:
    pytest.importorskip("matplotlib")
    merged = parts_of.merge(result("a", whole=whole), [result("b", right=0, whole=whole)])
    parts_of.write_whole(tmp_path / "r.json", merged)
    report_of.report(tmp_path / "r.json", tmp_path / "r.png")
    text = (tmp_path / "r.md").read_text("utf-8")
    assert "| soft injection | 75.0 [50.0, 100.0] | 25.0 [0.0, 50.0] | 0.0 | 8 |" in text
    assert "2 tasks, 2 seeds, 4 test questions" in text and "| ICL | 75.0 [50.0, 100.0]" in text
    assert (report_of.WHOLE in text) == whole
    assert (tmp_path / "r.png").stat().st_size > 1000


WRITES = "import json, sys; json.dump({'tasks': sys.argv[2:]}, open(sys.argv[1], 'w'))"


def test_a_group_that_fails_or_takes_too_long_takes_nothing_from_the_others(tmp_path: Path) -> None:
    code = {
        "good": WRITES,
        "bad": "raise SystemExit('no such thing')",
        "slow": f"{WRITES}; import time; time.sleep(60)",
    }
    groups, news = [["good"], ["bad"], ["slow"], ["good", "again"]], []

    def command(names: list[str], file: Path) -> list[str]:
        return [sys.executable, "-c", code[names[0]], str(file), *names]

    pool = parts_of.Pool(tmp_path / "r.json", groups, command, 2)
    start = time.monotonic()
    assert not pool.wait(start + 4, lambda: news.append(len(parts_of.read_parts(tmp_path / "r.json"))))
    assert time.monotonic() - start < 30
    assert pool.failed == [["bad"]] and not pool.running and not pool.waiting
    assert sorted(part["tasks"] for part in parts_of.read_parts(tmp_path / "r.json")) == [
        ["good"],
        ["good", "again"],
        ["slow"],
    ]
    assert news[-1] == 3
    assert "no such thing" in parts_of.file_of(tmp_path / "r.json", ["bad"]).with_suffix(".log").read_text("utf-8")


def test_a_run_goes_on_from_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny random model: one task measured here, another as a part; both are merged, and nothing is measured twice."""
    model, data, out = save_tiny_model(tmp_path / "model"), tmp_path / "data", tmp_path / "out" / "r.json"
    data.mkdir()
    for name in ("one", "two"):
        pairs = [{"input": f"the film {i}", "output": "good" if i % 2 else "bad"} for i in range(24)]
        (data / f"{name}.json").write_text(json.dumps(pairs), "utf-8")
    given = [
        "--data", str(data), "--model", str(model), "--device", "cpu", "--out", str(out), "--seeds", "2", "--prompts", "2",
        "--shots", "1", "--steps", "2", "--every", "1", "--valid", "2", "--test", "4", "--draws", "2", "--mediation-tasks", "1",
        "--mediation-prompts", "1", "--latency", "1", "--queries", "2", "--losses", "first", "answer", "--wider", "2",
    ]  # fmt: skip
    soft_injection.main([*given, "--names", "one"])
    found = json.loads(out.read_text("utf-8"))
    assert (
        list(found["tasks"]) == ["one"] and found["latency"]["tasks"] == 1 and found["latency"]["dtype"] == "float32"
    )
    assert set(found["tasks"]["one"]["answers"]) == set(report_of.METHODS)
    assert found["recipes"] == {"one": {"queries": 2, "tokens": found["recipes"]["one"]["tokens"]}}  # no questions
    assert [(run["seed"], run["loss"]) for run in found["tasks"]["one"]["learned"]] == [
        (0, "first"), (0, "answer"), (1, "first"), (1, "answer")
    ]  # fmt: skip
    part = parts_of.file_of(out, ["two"])
    soft_injection.main([*given, "--names", "two", "--part", str(part), "--keep"])
    assert list(json.loads(part.read_text("utf-8"))["tasks"]) == ["two"]
    soft_injection.main([*given, "--workers", "2", "--minutes", "0"])
    merged = json.loads(out.read_text("utf-8"))
    assert sorted(merged["tasks"]) == ["one", "two"] and merged["tasks"]["one"] == found["tasks"]["one"]
    assert merged["latency"] == found["latency"] and not out.with_suffix(".parts").exists()
    assert "2 of 2 tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        soft_injection.main([*given, "--steps", "3"])


def test_latency_is_added_to_a_result_under_its_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run on a GPU that had no time for it; queries are gone after that, and what was measured stays."""
    out, queries = tmp_path / "r.json", {"zero": ["the film"] * 3, "few": ["the film good the film"] * 3, "tokens": 2}
    data = result("one")
    data["model"]["device"], data["recipes"] = "a GPU", {"one": {**queries, "soft": ["x"] * 3, "fv": [""] * 3}}
    parts_of.write_whole(out, data)
    applied: list[str] = []

    class Handle:
        def remove(self) -> None:
            applied.append("removed")

    def apply(model: object, recipe: str) -> Handle:
        applied.append(Path(recipe).name)
        return Handle()

    monkeypatch.setattr(latency_of.headpatch, "apply", apply)
    latency_of.main([str(out), "--model", str(save_tiny_model(tmp_path / "m")), "--device", "cpu", "--rounds", "2"])
    found = json.loads(out.read_text("utf-8"))
    assert found["recipes"] == {"one": {"queries": 3, "tokens": 2}} and found["settings"] == data["settings"]
    assert report_of.scores(found) == report_of.scores(data)
    assert applied.count("one-soft.yaml") == applied.count("one-fv.yaml") == 6 and applied.count("removed") == 12
    run = found["latency"]
    assert run["calls"] == 6 and run["answers as measured"]["function vector"] == "3 of 3"
    assert set(run["whole answer / ICL"]) == {"zero-shot", "function vector", "soft injection"}
    text = out.with_suffix(".md").read_text("utf-8")
    assert "**not the machine of the accuracies** (a GPU)" in text and run["machine"]["device"] in text
    with pytest.raises(SystemExit, match="timed already"):
        latency_of.main([str(out)])


def test_latency_of_recipes_that_were_made_up(tmp_path: Path) -> None:
    """No data and nothing learned: the same measurement, and no word on answers."""
    model = save_tiny_model(tmp_path / "m")
    given = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--queries", "2", "--rounds", "1"]
    stand_in.main([*given, "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "soft_injection_latency_cpu.json").read_text("utf-8"))
    assert run["calls"] == 2 and run["answers as measured"] == {} and run["heads"] > 1
    assert set(run["whole answer / ICL"]) == {"zero-shot", "function vector", "soft injection"}
    assert run["prompt tokens"]["few"] > 5 * run["prompt tokens"]["zero"]
    assert "Recipes answered" not in (tmp_path / "soft_injection_latency_cpu.md").read_text("utf-8")
