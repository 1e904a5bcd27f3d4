"""What is lost when KV heads keep the first and the last tokens only: found heads, random heads, no heads at all.

    python benchmarks/quality_kv.py --book TEXT --tasks FOLDER [--model M] [--dtype bfloat16] [--device D] [--stage STAGE ...]
                                    [--out FOLDER] [--stem NAME] [--workers N] [--deadline SECONDS]
                                    [--sizes full|long|small|quick] [--found RESULT]

`--book` is a long plain text that nothing was chosen on; `--tasks` a folder of JSON files, each a list of {"input", "output"}.
Stages: `find` (gates, retrieval scores and quick scores, all on generated texts; always measured, for others need them), `needles`,
`text` (perplexity), `tasks` (few-shot prompts), `masks` (retrieval heads switched off, against as many random ones), `draw`. Nothing
of book or tasks goes into the result but their names and digests.

`--found` takes the heads that another run of the same model found, in place of finding them again.

`--workers` processes share the work: steps of a small model wait for the host, and a GPU serves many of them. After `--deadline`
seconds no new measurement begins; a run that is started again goes on where the last one was.

Streaming heads keep 16 first and 64 last tokens. Every other policy keeps as many tokens in all: streaming_llm by its `recent`,
snapkv and ada_kv by their `ratio`. Note what differs: windows hold for the prompt's own queries too, while snapkv and ada_kv read the
whole prompt, question included, before they choose (they are query-aware here).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import quality_kv_draw
import torch
from common import RESULTS
from quality_kv_units import SIZES, Given, Sizes, Subject, units
from quality_kv_work import Store, share, work

from headpatch.demo_model import SHORT_NAME, locate

STAGES = ("find", "needles", "text", "tasks", "masks")


def run(path: Path, deadline: float, given: Given, sizes: Sizes, stages: list[str], threads: int | None) -> None:
    """One process's share."""
    if threads:
        torch.set_num_threads(threads)
    store = Store(path)
    work(store, units(Subject(given, sizes, store, deadline), stages), deadline)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--book", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stage", action="append", choices=[*STAGES, "draw"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stem", default="quality_kv", help="name of the files that are written")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing new begins")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="small: for a CPU; quick: to see that it runs")
    parser.add_argument("--found", type=Path, help="a result whose heads are taken")
    asked = parser.parse_args()
    deadline = time.time() + asked.deadline
    wanted, path = asked.stage or [*STAGES, "draw"], asked.out / f"{asked.stem}.json"
    if wanted != ["draw"]:
        if not asked.book or not asked.tasks:
            parser.error("--book and --tasks are needed to measure")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        sizes = SIZES[asked.sizes]
        given = Given(locate(asked.model), asked.device, asked.dtype, asked.book, asked.tasks)
        settings = json.loads(json.dumps(dataclasses.asdict(sizes)))
        before = Store(path)
        if before.data.get("settings", settings) != settings:
            parser.error(f"{path} holds measurements of other sizes; remove it, or choose another --stem")
        before.data["settings"] = settings
        if asked.found:
            before.data.setdefault("find", json.loads(asked.found.read_text())["find"])
        before.path.parent.mkdir(parents=True, exist_ok=True)
        before.path.write_text(json.dumps(before.data))
        threads = 1 if asked.workers > 1 else None
        store = share(path, asked.workers, deadline, run, (given, sizes, wanted, threads))
        for name, problem in store.data.get("failed", {}).items():
            print(f"failed: {name}: {problem}")
    if "draw" in wanted:
        quality_kv_draw.write(json.loads(path.read_text()), asked.out, asked.stem)


if __name__ == "__main__":
    main()
