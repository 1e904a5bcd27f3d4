"""benchmarks/quality_kv*.py: processes share measurements, interrupted runs go on, and tables compare prompt by prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality_kv_draw as draw
from quality_kv_work import Stopped, Store, Unit, share, work


def opened(path: Path, **stages: dict[str, object]) -> Store:
    store = Store(path)
    store.data.update(stages)
    store.open()
    return store


def units(seen: list[str]) -> list[Unit]:
    def note(name: str) -> object:
        seen.append(name)
        return len(seen)

    return [
        Unit("late", "b", 2, lambda: note("b")),
        Unit("early", "needing", 0, lambda: note("needing"), (("find", "a"),)),
        Unit("find", "a", 1, lambda: note("a")),
    ]


def test_what_others_need_comes_first_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    seen: list[str] = []
    store = opened(tmp_path / "r.json")
    work(store, units(seen), time.time() + 60)
    assert seen == ["a", "needing", "b"]
    work(store, units(seen), time.time() + 60)
    store.gather(end=True)
    again = opened(tmp_path / "r.json")
    work(again, units(seen), time.time() + 60)
    assert seen == ["a", "needing", "b"]
    assert again.data["find"] == {"a": 1}
    assert not list(tmp_path.glob("*.parts/*.json"))


def test_what_another_process_has_claimed_is_left_to_it(tmp_path: Path) -> None:
    seen: list[str] = []
    store, other = opened(tmp_path / "r.json"), Store(tmp_path / "r.json")
    assert other.claim("late", "b")
    work(store, [u for u in units(seen) if u.stage == "late"], time.time() + 60)
    assert seen == []
    store.open()  # a new run: the process that claimed it is gone
    work(store, units(seen), time.time() + 60)
    assert "b" in seen


def test_failures_are_named_do_not_hang_those_that_need_them_and_are_tried_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no luck")

    store = opened(tmp_path / "r.json")
    needing = Unit("early", "needing", 0, lambda: 1, (("find", "a"),))
    work(store, [needing, Unit("find", "a", 1, fail)], time.time() + 60)
    store.gather()
    assert store.data["failed"] == {"find/a": "ValueError: no luck"}
    again = opened(tmp_path / "r.json")
    for part in again.parts.glob("*.json"):
        part.unlink()
    work(again, [needing, Unit("find", "a", 1, lambda: 2)], time.time() + 60)
    assert again.get("early", "needing") == 1


def test_at_the_deadline_nothing_begins_and_what_stopped_itself_is_open(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped

    seen: list[str] = []
    store = opened(tmp_path / "r.json")
    work(store, units(seen), time.time() - 1)
    assert seen == []
    soon = time.time() + 0.3
    work(store, [Unit("find", "a", 0, stop)], soon)
    assert not store.has("find", "a")


def count(path: Path, deadline: float) -> None:
    work(Store(path), [Unit("n", str(i), i, lambda i=i: i * i) for i in range(20)], deadline)


def test_processes_share_the_work(tmp_path: Path) -> None:
    store = share(tmp_path / "r.json", 2, time.time() + 60, count, ())
    assert store.data["n"] == {str(i): i * i for i in range(20)}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.fixture
def data() -> dict[str, object]:
    def found(*values: bool) -> dict[str, object]:
        return {"found": list(values), "log_perplexity": [2.0, 3.0], "heads": []}

    return {
        "settings": {"sink": 16, "recent": 64, "needles": [["number", 512]]},
        "about": {"machine": {"device": "cpu"}},
        "needles": {
            "number/512/untouched": found(True, True, True, True),
            "number/512/gates@0.5": found(True, True, True, False),
            "number/512/random@0.5/0": found(True, False, False, False),
            "number/512/random@0.5/1": found(False, False, False, False),
            "number/512/snapkv@0.5": found(True, True, False, False),
        },
        "text": {"1024/untouched": found(), "1024/gates@0.5": {"log_perplexity": [2.5, 3.5]}},
        "tasks": {"a/about": {"tokens": 160, "sha256": ""}, "a/untouched": [True, False], "a/gates@0.5": [True, True]},
        "masks": {"untouched": found(True, True), "10/retrieval": found(False, False), "10/anywhere/0": found(True, False)},
    }  # fmt: skip


def test_random_heads_are_averaged_over_draws_and_compared_by_prompt(data: dict[str, object]) -> None:
    rows = draw.needles(data)["number", 512]
    assert list(rows) == ["untouched", "gates@0.5", "random@0.5", "snapkv@0.5"]
    assert draw.mean(rows["random@0.5"]) == [0.5, 0, 0, 0]
    assert draw.minus(rows["gates@0.5"], rows["random@0.5"]) == [0.5, 1, 1, 0]
    value, low, high = draw.interval([0.5, 1, 1, 0])
    assert value == 0.625
    assert 0 <= low < value < high <= 1


def test_tables_and_picture(data: dict[str, object], tmp_path: Path) -> None:
    draw.write(data, tmp_path, "quality")
    text = (tmp_path / "quality.md").read_text()
    assert "| gates@0.5 | 58 % | 75 (" in text
    assert "| gates@0.5 | 54 % | 20.09 | +0.5000 (+0.5000 to +0.5000) |" in text
    assert "| gates@0.5 | 75 % | 100 | 100.0 (34.2 to 100.0) |" in text
    assert "| 10/retrieval | 0 (0 to 66) | 12.18 |" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
