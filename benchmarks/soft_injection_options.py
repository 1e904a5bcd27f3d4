"""Options and tasks of benchmarks/soft_injection.py."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

from common import RESULTS

from headpatch.demo_model import SHORT_NAME
from headpatch.tune.pairs import Pair
from headpatch.tune.soft import LOSSES

__all__ = ["NO_SETTINGS", "options", "tasks_of"]

NO_SETTINGS = {
    "out", "minutes", "data", "device", "tasks", "names", "latency", "latency_dtypes", "workers", "part", "keep", "group",
    "wider", "model", "figure",
}  # fmt: skip
"""Options that a run may be gone on with differently; the model is in the result by itself."""


def tasks_of(folder: Path, count: int | None, skip: set[str], names: list[str]) -> dict[str, list[Pair]]:
    files = {path.stem: path for path in sorted(folder.rglob("*.json"))}
    chosen = names or [name for name in files if name not in skip]
    if not names:
        random.Random(0).shuffle(chosen)
    found = {}
    for name in chosen[:count]:
        rows = json.loads(files[name].read_text("utf-8"))
        found[name] = [Pair(str(row["input"]).strip(), str(row["output"]).strip()) for row in rows]
    return found


def options(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--out", type=Path, default=RESULTS / "soft_injection.json")
    parser.add_argument("--figure", type=Path, help="draw the report's figure here")
    parser.add_argument("--tasks", type=int, help="how many, in a fixed random order; default: all")
    parser.add_argument("--names", nargs="*", default=[], help="these tasks")
    parser.add_argument("--skip", nargs="*", default=["squad_val", "commonsense_qa"], help="tasks with long questions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--group", type=int, default=6, help="tasks that are learned side by side")
    parser.add_argument("--workers", type=int, default=1, help="groups that are measured side by side")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["first"], help="what is learned from")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--train", type=int, default=600, help="training pairs at most")
    parser.add_argument("--valid", type=int, default=100)
    parser.add_argument("--test", type=int, default=200, help="test pairs at most")
    parser.add_argument("--draws", type=int, default=20, help="draws of demonstrations for a seed's test questions")
    parser.add_argument("--mediation-tasks", type=int, default=6)
    parser.add_argument("--mediation-prompts", type=int, default=25)
    parser.add_argument("--latency", type=int, default=4, help="tasks whose recipes are kept and timed")
    parser.add_argument("--latency-dtypes", nargs="*", default=[], help="time them in these dtypes, too")
    parser.add_argument("--queries", type=int, default=9, help="queries of each")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument(
        "--wider", type=int, help="rows run at once, in a CPU's batches; default: 1 on a CPU, 4 on a GPU"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    # What a run with --workers tells its workers.
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", nargs="*", help=argparse.SUPPRESS)
    return parser
