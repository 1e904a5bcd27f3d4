"""Two minutes of the soak; `make soak` runs it for thirty."""

from __future__ import annotations

from pathlib import Path

from soak import soak


def test_two_minutes_of_mixed_traffic_and_a_killed_worker(tmp_path: Path) -> None:
    result = soak(2, tmp_path)
    assert result["passed"], result
    assert result["counts"]["complete"] > 20, result
