"""The benchmark of the attention and vision methods, at a size where it measures nothing: what a GPU runs, on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attention_cases as cases
import bench_attention_methods as bench
import host_attention_methods
import pytest
from compat import one_thread, silent

__all__ = ["one_thread", "silent"]


@pytest.mark.parametrize("kind", ["prefill", "prefill-text", "decode", "decode-eager"])
def test_every_case_runs(kind, tmp_path, monkeypatch, capsys):
    # (Every method under a compiler: test_method_compiled.py.)
    only = "decode:pasta,decode:var" if kind == "decode" else kind
    words = ["bench", "--device", "cpu", "--quick", "--only", only, "--out", str(tmp_path), "--seconds", "1000"]
    monkeypatch.setattr(sys, "argv", [*words, *(["--profile"] if kind == "prefill-text" else [])])
    monkeypatch.setattr(bench, "STEPS", 2)
    bench.main()
    torch.compiler.reset()
    found = json.loads((tmp_path / "attention_methods_cpu_quick.json").read_text(encoding="utf-8"))
    assert not found["notes"]
    expected = [case.method for case in cases.CASES if case.text_too or kind != "prefill-text"]
    expected = ["pasta", "var"] if kind == "decode" else expected
    assert [row["name"].split(", ")[1].split(":")[0] for row in found["rows"]] == expected
    assert all(row["bound"] is None for row in found["rows"]), "nothing is promised on a CPU"
    if kind == "prefill-text":
        said = capsys.readouterr().out
        assert said.count("until the host is through") == 2 * len(expected) and "x aten::mm" in said
    if kind == "prefill":
        assert all("untouched" in row["notes"] for row in found["rows"])
        assert {
            row["name"].split(", ")[1].split(":")[0] for row in found["rows"] if "with the edit" in row["notes"]
        } == set(cases.PUBLISHED)


def test_what_the_host_takes(tmp_path):
    threads = torch.get_num_threads()
    try:
        host_attention_methods.main(["--layers", "4", "--pairs", "2", "--turns", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "host_attention_methods.json").read_text(encoding="utf-8"))
    assert [row["name"].split(":")[0] for row in found["rows"]] == list(host_attention_methods.METHODS)
    assert all(row["notes"].endswith("us a layer") for row in found["rows"])


def test_nothing_is_begun_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["bench", "--device", "cpu", "--quick", "--seconds", "-1", "--out", str(tmp_path)]
    )
    bench.main()
    found = json.loads((tmp_path / "attention_methods_cpu_quick.json").read_text(encoding="utf-8"))
    assert not found["rows"] and all("left out" in note for note in found["notes"])


@pytest.mark.parametrize("method", [case.method for case in cases.CASES])
def test_a_tenth_of_the_heads_and_the_published_layers(method):
    config = cases.LlamaConfig(**cases.FULL["text"])
    heads = cases.recipe(method, config)["patches"][0]["heads"]
    expected = {"var": ["2-30.*"], "vhr": ["1.*", "18-31.*"], "pai": ["2-31.*"], "paint": ["2-31.*"]}
    assert heads == expected.get(method, heads)
    assert len(heads) == 102 or method in expected
