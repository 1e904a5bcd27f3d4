"""benchmarks/calibrations.py: runs that share a device, and which results they are written to."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import calibrations
import common


def test_runs_that_share_a_device_end_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is done, one fails, one is cut off, and one is never begun; what they said is in their logs."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nprint(sys.argv[1:], flush=True)\nname = sys.argv[1]\n"
        "time.sleep({'slow': 60}.get(name, 0))\nsys.exit({'bad': 3}.get(name, 0))\n"
    )
    monkeypatch.setattr(calibrations, "__file__", str(script))
    options = argparse.Namespace(work=tmp_path, data=None, device="cpu", parallel=1, deadline=4.0)
    calibrations.together(["good", "bad", "slow", "last"], options)
    assert capsys.readouterr().out.splitlines() == ["good: done", "bad: exit 3", "slow: cut off", "last: not begun"]
    assert "'good', '--work'" in (tmp_path / "good.log").read_text()


def test_a_report_of_runs_on_a_gpu_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "act-sst2.run.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "seconds": 7}))
    (tmp_path / "act-sst2.profile.json").write_text(json.dumps({"edits": [], "choice": "nothing helps"}))
    calibrations.report(tmp_path)
    text = (tmp_path / "results" / "calibrations_smollm2_h100.md").read_text()
    assert "NVIDIA H100" in text and "no recipe" in text and "Seconds: act-sst2 7." in text
    assert [common.short_name(n) for n in ("NVIDIA H200", "NVIDIA L4", "Some Processor")] == ["h200", "gpu", "cpu"]


def test_settings_name_each_search_once() -> None:
    """What a run has of its own stays; runs of few rows search on few."""
    assert "--effort" in calibrations.settings("act-sst2", "cpu")
    on_gpu = calibrations.settings("act-bbh-yes-no", "cuda")
    assert on_gpu[-4:] == ("--screen", "30,60", "--held-out", "60") and "--anyway" in on_gpu
    own = calibrations.RUNS["pasta-marked-sentences"][-1]
    assert calibrations.settings("pasta-marked-sentences", "cuda") == own
