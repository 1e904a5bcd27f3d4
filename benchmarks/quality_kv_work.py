"""Measurements that several processes share: each claims one that nobody has, and writes what came out to a file of its own.

A result file holds everything by stage and key. Beside it, while processes run, a folder has one small file for each measurement that
is finished, and one for each that somebody is at. The result file takes them in every few seconds and at the end. An interrupted run
goes on where it was: what is there is not measured again, and claims of processes that are gone are dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any


class Stopped(Exception):  # noqa: N818  (no error: the time is up)
    """The deadline came in the middle of a measurement, which is not finished."""


@dataclass(frozen=True)
class Unit:
    """One measurement: `needs` are the (stage, key) that must be there before it; low `order` first."""

    stage: str
    key: str
    order: float
    measure: Callable[[], Any] = field(compare=False)
    needs: tuple[tuple[str, str], ...] = ()


class Store:
    """Measurements by stage and key, in `path` and in the folder beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, path.with_suffix(".parts")
        self.data: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def _part(self, stage: str, key: str, ending: str) -> Path:
        return self.parts / f"{hashlib.sha256(f'{stage}/{key}'.encode()).hexdigest()[:24]}{ending}"

    def has(self, stage: str, key: str) -> bool:
        return key in self.data.get(stage, {}) or self._part(stage, key, ".json").exists()

    def get(self, stage: str, key: str) -> Any:
        if key not in self.data.get(stage, {}):
            self._take(self._part(stage, key, ".json"))
        return self.data[stage][key]

    def claim(self, stage: str, key: str) -> bool:
        """Whether this measurement is the caller's now; a file that must not exist yet can be made by one process only."""
        try:
            os.close(os.open(self._part(stage, key, ".claim"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return not self.has(stage, key)

    def release(self, stage: str, key: str) -> None:
        self._part(stage, key, ".claim").unlink(missing_ok=True)

    def put(self, stage: str, key: str, value: Any) -> None:
        part = self._part(stage, key, ".json")
        beside = part.with_suffix(".new")
        beside.write_text(json.dumps({"stage": stage, "key": key, "value": value}))
        beside.replace(part)

    def open(self) -> None:
        """Take over what an earlier run has left, but not its claims and its failures."""
        self.parts.mkdir(parents=True, exist_ok=True)
        for claim in self.parts.glob("*.claim"):
            claim.unlink()
        self.gather()
        self.data.pop("failed", None)

    def gather(self, end: bool = False) -> None:
        """Write the result file from all parts; at the end the parts go."""
        for part in self.parts.glob("*.json"):
            self._take(part)
        beside = self.path.with_suffix(".new")
        ordered = {stage: dict(sorted(held.items())) for stage, held in sorted(self.data.items())}
        beside.write_text(json.dumps(ordered, indent=1) + "\n")
        beside.replace(self.path)
        if end:
            shutil.rmtree(self.parts, ignore_errors=True)

    def _take(self, part: Path) -> None:
        read = json.loads(part.read_text())
        self.data.setdefault(read["stage"], {})[read["key"]] = read["value"]


def work(store: Store, units: Sequence[Unit], deadline: float) -> None:
    """Claim and measure until nothing is left that could be, or until `deadline` (time.time())."""
    left = sorted(units, key=lambda u: u.order)
    while left and time.time() < deadline:
        left = [u for u in left if not store.has(u.stage, u.key)]
        lost = [u for u in left if any(store.has("failed", f"{s}/{k}") for s, k in u.needs)]
        waiting = [u for u in left if u not in lost and not all(store.has(s, k) for s, k in u.needs)]
        ready = next((u for u in left if u not in lost and u not in waiting and store.claim(u.stage, u.key)), None)
        if ready is not None:
            _measure(store, ready)
        elif waiting:
            time.sleep(0.5)
        else:
            return


def _measure(store: Store, unit: Unit) -> None:
    start = time.perf_counter()
    try:
        value = unit.measure()
    except Stopped:
        store.release(unit.stage, unit.key)
    except Exception as error:  # one that fails does not end the others; it is named, and tried again by the next run
        traceback.print_exc()
        if "out of memory" in str(error).lower():  # so many processes share a GPU: later there may be room
            time.sleep(2)
            return store.release(unit.stage, unit.key)
        store.put("failed", f"{unit.stage}/{unit.key}", f"{type(error).__name__}: {error}"[:300])
    else:
        store.put(unit.stage, unit.key, value)
        print(f"{time.perf_counter() - start:6.1f} s  {unit.stage} {unit.key} {json.dumps(value)[:100]}", flush=True)


def share(path: Path, workers: int, deadline: float, target: Callable[..., Any], args: Sequence[Any]) -> Store:
    """Run ``target(path, deadline, *args)`` in so many processes (1: in this one) and gather what they measured.

    A process that is still at something long after the deadline is ended.
    """
    store = Store(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.open()
    try:
        if workers == 1:
            target(path, deadline, *args)
        else:
            _spawned(store, workers, deadline, target, args)
    finally:
        store.gather(end=True)
    return store


def _spawned(
    store: Store, workers: int, deadline: float, target: Callable[..., Any], args: Collection[Any], grace: float = 30
) -> None:
    context = get_context("spawn")  # forked processes cannot use CUDA
    processes = [context.Process(target=target, args=(store.path, deadline, *args)) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        said = time.time()
        while any(p.is_alive() for p in processes) and time.time() < deadline + grace:
            time.sleep(0.2)
            if time.time() > said + 15:
                said = time.time()
                with contextlib.suppress(OSError):
                    store.gather()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
