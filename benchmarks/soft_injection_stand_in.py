"""What an injected query takes, with recipes made up for it: no training, no data, less than a minute.

    python benchmarks/soft_injection_stand_in.py [--device cuda] [--dtype float32 bfloat16] [--queries 12] [--rounds 2]

What a query takes depends on the shape of a recipe and on the length of its prompt, not on what was learned. So the strengths are
drawn as learned ones are distributed (45 percent of heads near 0 that still have their vector, 43 percent near 1, the rest between),
the vectors at random, and the prompts are lists of words, alone or behind ten of their kind. Answers mean nothing and are not looked
at; as many tokens are generated as answers of the tasks have. Everything else is soft_injection_latency.py's.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, short_name
from soft_injection_latency import timings
from soft_injection_report import latency_lines

from headpatch.commands.generate import load
from headpatch.demo_model import SHORT_NAME
from headpatch.registry import find_adapter
from headpatch.tune.pairs import Format, Pair
from headpatch.tune.task_recipes import injection_recipe, vector_recipe

WORDS = [
    "harbour", "lantern", "violin", "meadow", "copper", "window", "pepper", "castle", "ribbon", "orchard", "marble",
    "thunder", "button", "saddle", "canyon", "feather", "mirror", "walnut", "basket", "glacier", "trumpet", "needle",
    "island", "carpet", "dragon", "hammer", "velvet", "garden", "pencil", "bridge", "cotton", "silver",
]  # fmt: skip
SHOTS, TOKENS = 10, 4


def queries(count: int) -> dict[str, Any]:
    """Questions for the second of three words, without and with demonstrations."""
    drawn, style = random.Random(0), Format()

    def pair() -> Pair:
        words = drawn.sample(WORDS, 3)
        return Pair(", ".join(words), words[1])

    asked = [pair() for _ in range(count)]
    return {
        "zero": [style.prompt(p.question) for p in asked],
        "few": [style.prompt(p.question, [pair() for _ in range(SHOTS)]) for p in asked],
        "tokens": TOKENS,
    }


def recipes(model: Any, folder: Path) -> int:
    """One recipe of each kind; how many heads the injection has."""
    shape, generator = find_adapter(model).shape(model), torch.Generator().manual_seed(0)
    part = shape.parts[shape.main]
    alpha, vectors = [], []
    for heads, width in zip(part.num_heads, part.head_dim, strict=True):
        kind = torch.rand(heads, generator=generator)
        between = torch.rand(heads, generator=generator)
        alpha.append(torch.where(kind < 0.45, 0.05, torch.where(kind < 0.88, 0.95, between.clamp_min(0.1))))
        vectors.append(0.1 * torch.randn(heads, width, generator=generator))
    middle = part.num_layers // 3
    injection_recipe(shape, alpha, vectors, name="stand-in-soft").save(folder / "stand-in-soft.yaml")
    vector_recipe(shape, middle, vectors[middle], name="stand-in-fv").save(folder / "stand-in-fv.yaml")
    return sum(len(a) for a in alpha)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2, help="how often each query is asked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    runs, lines = [], ["# What an injected query takes: recipes and prompts made up, of the learned ones' shape", ""]
    for dtype in given.dtype:
        model, tokenizer = load(given.model, given.device, dtype)
        kept = queries(given.queries)
        with tempfile.TemporaryDirectory() as folder:
            heads = recipes(model, Path(folder))
            run = timings({"stand-in": kept}, Path(folder), model, tokenizer, float("inf"), given.rounds)
        run["prompt tokens"] = {
            k: sum(len(tokenizer(p)["input_ids"]) for p in kept[k]) / given.queries for k in ("zero", "few")
        }
        run["heads"] = heads
        device = run["machine"]["device"]
        runs.append(run)
        lengths = run["prompt tokens"]
        lines += [
            *latency_lines(run, device),
            f"Prompts of {lengths['zero']:.0f} tokens, {lengths['few']:.0f} with demonstrations; {heads} heads injected.",
            "",
        ]
        stem = (
            given.out / f"soft_injection_latency_{short_name(device)}"
        )  # written after each, in case there is no time for the next
        stem.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
