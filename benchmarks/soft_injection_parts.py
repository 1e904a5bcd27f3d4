"""Several processes for benchmarks/soft_injection.py: each measures one group of tasks into a file of its own, and files are merged.

A group that fails, or is stopped for time, takes nothing from the others, and what it had measured counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Pool", "file_of", "groups_of", "merge", "packed", "read_parts", "unpacked", "write_whole"]

PATIENCE = 10.0
"""Seconds that a worker has between being asked to end and being ended."""


def packed(marks: Sequence[int] | str) -> str:
    """0 or 1 per question as their count and the bits in hexadecimal: "6:2c" is 1 0 1 1 0 0. A tenth of what a list takes."""
    return marks if isinstance(marks, str) else f"{len(marks)}:{int('0' + ''.join(map(str, marks)), 2):x}"


def unpacked(marks: Sequence[int] | str) -> list[int]:
    """Back from :func:`packed`; lists, which are in the files of older runs, stay as they are."""
    if not isinstance(marks, str):
        return list(marks)
    count, _, digits = marks.partition(":")
    return [int(bit) for bit in f"{int(digits, 16):0{count}b}"]


def write_whole(path: Path, data: Mapping[str, Any]) -> None:
    """A result file, which appears whole or stays as it was. Marks are packed in it, and what is short stands in one line."""
    small = {**data, "tasks": {name: _packed_task(task) for name, task in data["tasks"].items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(_text(small) + "\n", "utf-8")
    scratch.replace(path)


def _packed_task(task: Mapping[str, Any]) -> dict[str, Any]:
    answers = {
        method: [{k: packed(v) if k in ("prefix", "exact") else v for k, v in run.items()} for run in runs]
        for method, runs in task["answers"].items()
    }
    return {**task, "answers": answers}


def _text(value: Any, indent: str = "", width: int = 700) -> str:
    """JSON in which a list or object of at most so many characters has a line of its own."""
    line = json.dumps(value)
    if len(line) <= width or not isinstance(value, (dict, list)):
        return line
    inner = f"{indent} "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_text(v, inner, width)}" for key, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(f"{inner}{_text(v, inner, width)}" for v in value) + f"\n{indent}]"


def merge(whole: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A result with the tasks and kept recipes of its parts; where a task is in several, the first one's figures stay.

    Raises
    ------
    ValueError
        A part was made with other settings, by another model, or with other heads for the function vectors.
    """
    found = {**whole, "tasks": dict(whole["tasks"]), "recipes": dict(whole["recipes"])}
    for part in parts:
        for key in ("settings", "model"):
            if part[key] != whole[key]:
                raise ValueError(f"a part has other {key}: {part[key]}, not {whole[key]}")
        if part["tasks"] and None not in (part["heads"], found["heads"]) and part["heads"] != found["heads"]:
            raise ValueError("a part has other heads for its function vectors")
        if found["heads"] is None and part["tasks"]:
            found["heads"] = part["heads"]
        for key in ("tasks", "recipes"):
            found[key] = {**part[key], **found[key]}
    return found


def groups_of(names: Sequence[str], size: int) -> list[list[str]]:
    """Names in their order, so many together."""
    return [list(names[i : i + size]) for i in range(0, len(names), size)]


def file_of(out: Path, names: Sequence[str]) -> Path:
    """Where the group with these tasks writes."""
    return out.with_suffix(".parts") / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:12]}.json"


def read_parts(out: Path) -> list[dict[str, Any]]:
    """All parts of a result that have been written so far."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(out.with_suffix(".parts").glob("*.json"))]


class Pool:
    """At most so many groups at a time, a process each.

    Parameters
    ----------
    out
        The result; parts and logs lie in a folder beside it.
    groups
        Tasks of each group.
    command
        From a group's tasks and its file, the command that measures it.
    workers
        How many groups are measured at a time.
    """

    def __init__(
        self, out: Path, groups: Iterable[list[str]], command: Callable[[list[str], Path], list[str]], workers: int
    ) -> None:
        self.out, self.waiting, self.command, self.workers = out, list(groups), command, workers
        self.running: list[tuple[list[str], subprocess.Popen[bytes]]] = []
        self.failed: list[list[str]] = []
        self.ended = 0

    def fill(self) -> None:
        """Start what there is room for."""
        threads = str(max(1, (os.cpu_count() or 1) // (self.workers + 1)))
        while self.waiting and len(self.running) < self.workers:
            names = self.waiting.pop(0)
            file = file_of(self.out, names)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".log").open("ab") as log:
                started = subprocess.Popen(
                    self.command(names, file), stdout=log, stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": threads, **os.environ},
                )  # fmt: skip
            self.running.append((names, started))

    def look(self) -> bool:
        """Note who has ended; whether anybody has since the last look."""
        ended = [(names, process) for names, process in self.running if process.poll() is not None]
        for names, process in ended:
            self.running.remove((names, process))
            self.ended += 1
            if process.returncode:
                self.failed.append(names)
                log = file_of(self.out, names).with_suffix(".log").read_text("utf-8", "replace")
                print(f"\ngroup {' '.join(names)} failed ({process.returncode}):\n{log[-3000:]}", file=sys.stderr)
        return bool(ended)

    def wait(self, until: float, news: Callable[[], None], every: float = 15.0) -> bool:
        """Run all groups, up to a time of time.monotonic(); `news` is called when there may be more. False: time was up."""
        told = time.monotonic()
        while self.running or self.waiting:
            if time.monotonic() > until:
                self.stop()
                news()
                return False
            if self.look() or time.monotonic() - told > every:
                told = time.monotonic()
                news()
            self.fill()
            time.sleep(0.2)
        news()
        return True

    def stop(self) -> None:
        """End what is running."""
        for _, process in self.running:
            process.terminate()
        last = time.monotonic() + PATIENCE
        for _, process in self.running:
            try:
                process.wait(max(0.1, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()
