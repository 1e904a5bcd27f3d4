"""What both sides of the comparison with kvpress measure, in the same way: bytes of storage, time per token, needles.

Imports neither headpatch nor kvpress: `kvpress_side.py` uses it in kvpress's environment, `kvpress_ours.py` in headpatch's.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from common import interval, machine

REMOVED = (0.5, 0.75)
"""Shares of keys (or of KV heads) that go. kvpress calls them compression ratio; headpatch's `ratio` is what stays."""
WINDOW, KERNEL, SAFEGUARD = 64, 5, 0.2
STEPS, ROUNDS = 8, 40
NEW_TOKENS = 20


class Running(Protocol):
    """A prompt that was read under one policy."""

    token: int
    """Most probable next token."""

    def step(self, token: int) -> None:
        """Read one more token."""


Begin = Callable[[Sequence[int]], Running]


def storages() -> dict[int, int]:
    """Bytes of every tensor storage that is alive, by address."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}


def held(begin: Begin, ids: Sequence[int]) -> tuple[Running, dict[str, Any]]:
    """A prompt and a few tokens; what they leave behind, counted as storage, each once, and seconds of the prompt."""
    before = storages()
    start = time.perf_counter()
    running = begin(ids)
    seconds = time.perf_counter() - start
    for _ in range(STEPS):
        running.step(running.token)
    after = storages()
    return running, {"bytes": sum(n for a, n in after.items() if a not in before), "prefill_s": round(seconds, 2)}


def times(running: dict[str, Running], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a decoded token; all policies in every round, in another order each time."""
    rng, made = random.Random(0), {name: [] for name in running}
    for _ in range(rounds):
        for name in rng.sample([*running], len(running)):
            start = time.perf_counter()
            running[name].step(running[name].token)
            made[name].append((time.perf_counter() - start) * 1e3)
    return made


def write(begin: Begin, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Greedy answer."""
    running, written = begin(ids), []
    while running.token not in ends and len(written) < NEW_TOKENS:
        written.append(running.token)
        running.step(running.token)
    return written


def measure(policies: dict[str, Begin], tokenizer: Any, asked: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Everything, by policy. `asked` is what ``kvpress_ours.py prompts`` wrote."""
    running: dict[str, Running] = {}
    made: dict[str, Any] = {name: {} for name in policies}
    ends = asked["ends"]
    with torch.no_grad():
        policies["full"](asked["needles"][0]["ids"])  # the first call of a process is slower
        for name, begin in policies.items():
            running[name], made[name] = held(begin, asked["long"])
            print(name, made[name], flush=True)
        for name, values in times(running, 3 if quick else ROUNDS).items():
            made[name]["ms"] = [round(v, 3) for v in values]
        running.clear()
        for name, begin in policies.items():
            wrote = []
            for needle in asked["needles"][:: 8 if quick else 1]:
                try:
                    wrote.append(tokenizer.decode(write(begin, needle["ids"], ends), skip_special_tokens=True))
                except ValueError as error:  # kvpress: "Could not find fake keys ..."
                    wrote.append(f"error: {error}")
            made[name]["wrote"] = wrote
            found = [n["answer"] in w for n, w in zip(asked["needles"][:: 8 if quick else 1], wrote, strict=True)]
            made[name]["found"] = found
            print(name, sum(found), "of", len(found), flush=True)
    return {"about": machine(torch.device("cpu")), "policies": made}


def summary(side: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Medians with intervals; times against the untouched model of the same side and rounds."""
    full, made = side["policies"]["full"], {}
    for name, p in side["policies"].items():
        ratios = [a / b for a, b in zip(p["ms"], full["ms"], strict=True)]
        made[name] = {
            "bytes": p["bytes"], "of_full": p["bytes"] / full["bytes"],
            "ms": statistics.median(p["ms"]), "ms_interval": interval(p["ms"]),
            "ratio": statistics.median(ratios), "ratio_interval": interval(ratios), "prefill_s": p["prefill_s"], "found": p["found"],
        }  # fmt: skip
    return made


def read(path: Path) -> Any:
    return json.loads(path.read_text())
