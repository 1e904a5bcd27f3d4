"""How long a sweep over all heads takes: every (layer, head) at one gamma, on prompts of a labelled file or on made-up ones.

    python benchmarks/bench_calibration.py [--model M] [--data FILE.jsonl] [--rows 300] [--dtype float32] [--heads 270] [--check 8]

The layers below each edited one are computed once. `--check` measures so many of the edits again by whole forwards under
headpatch.apply, one row at a time, and says how far the log-probabilities are from the sweep's. `--out` is a folder for the result.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

import headpatch
from headpatch.demo_model import SHORT_NAME, locate
from headpatch.find.data import Row, Task, load_rows
from headpatch.find.engine import Bench, load_model, open_bench
from headpatch.find.neutral import PASSAGES
from headpatch.recipe import Recipe

TASK = Task(("Review: {text}\nSentiment (positive or negative):",), {"negative": " negative", "positive": " positive"})


def made_up(rows: int) -> list[Row]:
    """Sentences of 5 to 40 words out of the neutral text: as long as film reviews, and as senseless as a benchmark needs."""
    words, rng = " ".join(PASSAGES).split(), random.Random(0)
    return [Row({"text": " ".join(rng.choices(words, k=rng.randint(5, 40)))}) for _ in range(rows)]


def recipes(bench: Bench, gamma: float, limit: int) -> list[Recipe]:
    part = bench.shape.parts[bench.shape.main]
    heads = [f"{layer}.{h}" for layer in part.softmax_layers() for h in range(part.num_heads[layer])]
    picked = heads if limit >= len(heads) else sorted(random.Random(0).sample(heads, limit), key=heads.index)
    return [
        Recipe.from_dict({"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {h: gamma}}]}) for h in picked
    ]


def check(model: Any, bench: Bench, questions: Any, found: dict[int, Any], edits: list[Recipe], count: int) -> float:
    """Largest difference between the sweep and whole forwards of single rows under headpatch.apply."""
    worst, rng = 0.0, random.Random(1)
    for index in rng.sample(range(len(edits)), min(count, len(edits))):
        rows = rng.sample(range(questions.rows), min(8, questions.rows))
        with headpatch.applied(model, edits[index]), torch.no_grad():
            for row in rows:
                ids = torch.tensor([questions.passages[row].ids], device=model.device)
                logp = model(ids).logits[0, -1].float().log_softmax(-1)[list(questions.starts)].cpu()
                worst = max(worst, float((logp - found[index].first[row]).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--heads", type=int, default=10**9)
    parser.add_argument("--gamma", type=float, default=3.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loading = time.perf_counter()
    model, tokenizer = load_model(locate(args.model), device=args.device, dtype=args.dtype)
    bench = open_bench(model, tokenizer)
    loading = time.perf_counter() - loading
    rows = load_rows(args.data)[: args.rows] if args.data else made_up(args.rows)
    questions = bench.questions(TASK.prompts(rows), list(TASK.labels.values()))
    edits = recipes(bench, args.gamma, args.heads)
    found: dict[int, Any] = {}
    start = time.perf_counter()
    for index, outcome in bench.run([None, *edits], questions):
        found[index - 1] = outcome
    seconds = time.perf_counter() - start
    tokens = [len(p.ids) for p in questions.passages]
    result = {
        "what": f"{len(edits)} single-head edits x {len(rows)} prompts, gamma {args.gamma}", "seconds": round(seconds, 2),
        "seconds_loading": round(loading, 2), "tokens_per_prompt": round(sum(tokens) / len(tokens), 1),
        "milliseconds_per_edit": round(1000 * seconds / max(len(edits), 1), 2), "layers": bench.shares_layers,  # type: ignore[attr-defined]
        **bench.about(),
    }  # fmt: skip
    if args.check:
        result["largest_difference_from_whole_forwards"] = check(model, bench, questions, found, edits, args.check)
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        kind = "gpu" if model.device.type == "cuda" else "cpu"
        (args.out / f"calibration_{kind}_{args.dtype}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
