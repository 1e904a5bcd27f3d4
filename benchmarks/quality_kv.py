"""What is lost when KV heads keep the first and the last tokens only: found heads, random heads, no heads at all.

    python benchmarks/quality_kv.py --book TEXT --tasks FOLDER [--model M] [--dtype bfloat16] [--stage STAGE ...] [--out FOLDER]

`--book` is a long plain text that nothing was chosen on; `--tasks` a folder of JSON files, each a list of {"input", "output"}.
Stages: `find` (gates, retrieval scores and quick scores, all on generated texts), `needles`, `text` (perplexity), `tasks` (few-shot
prompts), `masks` (retrieval heads switched off, against as many random ones), `draw`. Every measurement is written as soon as it is
made, and made only once: an interrupted run goes on where it was. Nothing of book or tasks goes into the result but their names and
digests.

Settings are small enough for two cores. Streaming heads keep 16 first and 64 last tokens. Every other policy keeps as many tokens in
all: streaming_llm by its `recent`, snapkv and ada_kv by their `ratio`. Note what differs: windows hold for the prompt's own queries
too, while snapkv and ada_kv read the whole prompt, question included, before they choose (they are query-aware here).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import quality_kv_draw
import torch
from common import RESULTS, machine

from headpatch.demo_model import SHORT_NAME, locate
from headpatch.evaluate import matches
from headpatch.find.data import file_sha256
from headpatch.find.engine import Passage, load_model, open_bench
from headpatch.find.gates import Training, train_gates
from headpatch.find.haystack import load_haystack
from headpatch.find.loss import near_loss
from headpatch.find.passkeys import Passkeys
from headpatch.find.ranking import HeadScores, full_heads
from headpatch.find.retrieval import Probe, retrieval_heads
from headpatch.heads import PartShape, to_selectors
from headpatch.needle_grid import evaluate_needles
from headpatch.recipe import Recipe

SINK, RECENT = 16, 64
KEYS = Passkeys(shortest=300, longest=700, lengths=9, count=4, words=8, seed=0)
TRAINING = Training(KEYS, sink=SINK, recent=RECENT, steps=150)
PROBE = Probe((256, 512), (0.0, 0.25, 0.5, 0.75, 1.0), 2, "fact", chat=True, seed=0)
SPARSITY = (0.5, 0.75, 0.9)
DRAWS = 3
NEEDLES = (("number", 512, 2), ("fact", 256, 2), ("number", 1024, 1), ("number", 256, 1), ("number", 2048, 1))
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PASSAGES, PASSAGE = 4, 1024
TASKS = ("choose_first_of_5", "choose_last_of_5", "antonym", "country-capital", "present-past", "singular-plural")
SHOTS, QUERIES = 16, 10
MASKED = (10, 20, 40)
SEED = 1
CHOOSING = ("snapkv", "ada_kv")
"""Policies that choose what to keep where the prompt ends, by what its last queries look at."""


class Results:
    """A JSON file of measurements by key, rewritten after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, stage: str, key: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this key, now or before."""
        held = self.data.setdefault(stage, {})
        if key not in held:
            held[key] = measure()
            self.save()
            print(stage, key, json.dumps(held[key])[:150], flush=True)
        return held[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        beside.replace(self.path)


def find(results: Results, name: str, device: str, work: Path) -> dict[str, HeadScores]:
    """Gates and quick scores of KV heads, and retrieval scores of query heads; all on generated texts, in float32."""
    if {"gates", "retrieval", "quick"} <= results.data.get("find", {}).keys():
        model = tokenizer = None
    else:
        model, tokenizer = load_model(name, device=device)

    def plain(scores: HeadScores) -> dict[str, Any]:
        return {
            "about": dict(scores.about),
            "kind": scores.kind,
            "values": {str(n): list(r) for n, r in scores.values.items()},
        }

    def gates() -> dict[str, Any]:
        found = train_gates(model, tokenizer, TRAINING, work=work, say=lambda line: print(line, flush=True))
        return {**plain(found.scores), "losses": [[float(f"{a:.4g}"), float(f"{b:.4g}")] for a, b in found.losses]}

    def retrieval() -> dict[str, Any]:
        found = retrieval_heads(model, tokenizer, PROBE, say=lambda line: print(line, flush=True))
        return {**plain(found.scores), "errors": {str(n): list(r) for n, r in found.errors.items()}}

    def quick() -> dict[str, Any]:
        return plain(near_loss(model, tokenizer, KEYS, samples=4, sink=SINK, recent=RECENT))

    made = {}
    for which, measure in (("gates", gates), ("retrieval", retrieval), ("quick", quick)):
        held = results.once("find", which, measure)
        made[which] = HeadScores(
            which, held["kind"], {int(n): tuple(r) for n, r in held["values"].items()}, held["about"]
        )
    work.unlink(missing_ok=True)
    return made


def duo(full: dict[int, tuple[int, ...]], part: PartShape) -> dict[str, Any]:
    heads = list(to_selectors({n: dict.fromkeys(h, True) for n, h in full.items()}, part, "kv"))
    return {"method": "duo_attention", "full_kv_heads": heads, "sink": SINK, "recent": RECENT}


def policies(scores: dict[str, HeadScores], part: PartShape, length: int) -> dict[str, Recipe]:
    """Recipes by ``name@sparsity`` (and ``/draw``) for prompts of this length."""
    made: dict[str, dict[str, Any]] = {}
    everything = [(layer, head) for layer in part.softmax_layers() for head in range(part.num_kv_heads[layer])]
    for sparsity in SPARSITY:
        for name in ("gates", "retrieval", "quick"):
            made[f"{name}@{sparsity}"] = duo(full_heads(scores[name].of_kv_heads(part), sparsity=sparsity), part)
        for draw in range(DRAWS):
            rng = random.Random(f"{sparsity}/{draw}")
            picked: dict[int, list[int]] = {}
            for layer, head in rng.sample(everything, math.ceil(round((1 - sparsity) * len(everything), 9))):
                picked.setdefault(layer, []).append(head)
            made[f"random@{sparsity}/{draw}"] = duo({n: tuple(sorted(h)) for n, h in picked.items()}, part)
        recent = round(kept(sparsity, length) * length) - SINK
        made[f"streaming_llm@{sparsity}"] = {"method": "streaming_llm", "sink": SINK, "recent": recent}
        for name in CHOOSING:
            made[f"{name}@{sparsity}"] = {"method": name, "ratio": kept(sparsity, length)}
    made["streaming_llm@1.0"] = {"method": "streaming_llm", "sink": SINK, "recent": RECENT}
    return {name: Recipe.from_dict({"headpatch": 1, "name": name, "patches": [patch]}) for name, patch in made.items()}


def kept(sparsity: float, length: int) -> float:
    """Share of the keys of a sequence that are kept."""
    return 1 - sparsity + sparsity * min(1.0, (SINK + RECENT) / length)


def needles(
    results: Results, model: Any, tokenizer: Any, scores: dict[str, HeadScores], part: PartShape, book: Any
) -> None:
    for kind, length, prompts in NEEDLES:
        recipes = {n: r for n, r in policies(scores, part, length).items() if not n.startswith("quick")}
        for depth in DEPTHS:
            cell = {"lengths": [length], "depths": [depth], "prompts": prompts, "kind": kind, "haystack": book}
            new = 20 if kind == "number" else 36
            measure = partial(ask, model, tokenizer, recipes, max_new_tokens=new, **cell)
            results.once("needles", f"{kind}/{length}/{depth}", measure)


def ask(model: Any, tokenizer: Any, recipes: dict[str, Recipe], **cell: Any) -> dict[str, Any]:
    grid = evaluate_needles(model, tokenizer, recipes, chat=True, seed=SEED, **cell)
    return {
        name: {"found": [a.found(name) for a in grid.asked], "recall": [round(a.recall(name), 3) for a in grid.asked]}
        for name in grid.names
    }


def text(
    results: Results, model: Any, tokenizer: Any, scores: dict[str, HeadScores], part: PartShape, book: Any
) -> None:
    """Log-probability per token of passages of the book, over the tokens that full heads can see beyond sink and window."""
    bench = open_bench(model, tokenizer)
    passages = []
    for number in range(PASSAGES):
        ids = bench.encode(" ".join(book.draw(random.Random(f"{SEED}/{number}"), 8 * PASSAGE)))[0][: PASSAGE + 1]
        passages.append(Passage(ids[:-1], ids[1:]))
    for name, recipe in {"untouched": None, **policies(scores, part, PASSAGE)}.items():
        if name.startswith(CHOOSING):
            continue  # they see all of a text that is read at once

        def measure(recipe: Recipe | None = recipe) -> Any:
            (_, outcome), *_ = bench.run([recipe], None, passages)
            rows = outcome.text.view(PASSAGES, PASSAGE)[:, SINK + RECENT :]
            return {"log_perplexity": [-float(r.double().mean()) for r in rows]}

        results.once("text", name, measure)


def tasks(
    results: Results, model: Any, tokenizer: Any, scores: dict[str, HeadScores], part: PartShape, folder: Path
) -> None:
    """Exact first lines after prompts with sixteen examples."""
    bench = open_bench(model, tokenizer)
    for task in TASKS:
        path = next(folder.rglob(f"{task}.json"))
        rows = json.loads(path.read_text())
        rng = random.Random(f"{SEED}/{task}")
        prompts, answers = [], []
        for _ in range(QUERIES):
            *shots, asked = rng.sample(rows, SHOTS + 1)
            shown = "".join(f"Q: {r['input']}\nA: {r['output']}\n\n" for r in shots)
            prompts.append(f"{shown}Q: {asked['input']}\nA:")
            answers.append(str(asked["output"]))
        length = sum(len(bench.encode(p)[0]) for p in prompts) // QUERIES
        results.once("tasks", f"{task}/about", lambda p=path, n=length: {"sha256": file_sha256(p), "tokens": n})
        for name, recipe in {"untouched": None, **policies(scores, part, length)}.items():
            if name.startswith("quick") or f"@{SPARSITY[0]}" in name:
                continue
            measure = partial(exact, bench, prompts, answers, recipe)
            results.once("tasks", f"{task}/{name}", measure)


def exact(bench: Any, prompts: list[str], answers: list[str], recipe: Recipe | None) -> list[bool]:
    return [matches(w, a, "exact") for w, a in zip(bench.generate(prompts, recipe, 8), answers, strict=True)]


def masks(results: Results, model: Any, tokenizer: Any, scores: HeadScores, book: Any) -> None:
    """The best retrieval heads set to zero, against as many others: anywhere, and in the same layers."""
    ranked = [(layer, head) for layer, head, _ in scores.ranked()]
    bench = open_bench(model, tokenizer)
    ids = bench.encode(" ".join(book.draw(random.Random(f"{SEED}/fluent"), 4096)))[0][:513]
    recipes = {}
    for count in MASKED:
        best, rest = ranked[:count], ranked[count:]
        sets = {"retrieval": best}
        layers = [layer for layer, _ in best]
        for draw in range(DRAWS):
            rng = random.Random(f"mask/{count}/{draw}")
            sets[f"random/{draw}"] = rng.sample(rest, count)
            free = {layer: [e for e in rest if e[0] == layer] for layer in sorted(set(layers))}
            sets[f"same layers/{draw}"] = [
                e for layer, others in free.items() for e in rng.sample(others, min(len(others), layers.count(layer)))
            ]
        for name, chosen in sets.items():
            heads = [f"{layer}.{head}" for layer, head in sorted(chosen)]
            patch = {"method": "head_scaling", "heads": heads, "scale": 0.0}
            recipes[f"{count}/{name}"] = Recipe.from_dict({"headpatch": 1, "name": name, "patches": [patch]})
    for depth in DEPTHS:
        cell = {"lengths": [512], "depths": [depth], "prompts": 2, "kind": "number", "haystack": book}
        results.once("masks", f"needles/{depth}", partial(ask, model, tokenizer, recipes, max_new_tokens=20, **cell))

    def fluent() -> Any:
        made = bench.run([None, *recipes.values()], None, [Passage(ids[:-1], ids[1:])])
        losses = {index: -float(outcome.text.double().mean()) for index, outcome in made}
        return {name: losses[i] for i, name in enumerate(("untouched", *recipes))}

    results.once("masks", "log_perplexity", fluent)
    results.once("masks", "heads", lambda: {n: list(r.to_dict()["patches"][0]["heads"]) for n, r in recipes.items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stage", action="append", choices=["find", "needles", "text", "tasks", "masks", "draw"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    wanted = given.stage or ["find", "needles", "text", "tasks", "masks", "draw"]
    results = Results(given.out / "quality_kv.json")
    if wanted != ["draw"]:
        model, tokenizer = load_model(locate(given.model), device=given.device, dtype=given.dtype)
        part = open_bench(model, tokenizer).shape.parts["text"]
        book = load_haystack(given.book)
        results.data["about"] = {
            **machine(torch.device(given.device)), **open_bench(model, tokenizer).about(), "book": book.about(), "sink": SINK,
            "recent": RECENT, "sparsity": SPARSITY, "draws": DRAWS, "seed": SEED, "needles": NEEDLES, "depths": DEPTHS,
            "passages": [PASSAGES, PASSAGE], "shots": SHOTS, "queries": QUERIES, "chat": True,
        }  # fmt: skip
        scores = find(results, locate(given.model), given.device, given.out / "quality_kv.gates.work")
        for stage in wanted:
            if stage == "needles":
                needles(results, model, tokenizer, scores, part, book)
            elif stage == "text":
                text(results, model, tokenizer, scores, part, book)
            elif stage == "tasks":
                tasks(results, model, tokenizer, scores, part, given.tasks)
            elif stage == "masks":
                masks(results, model, tokenizer, scores["retrieval"], book)
        results.save()
    if "draw" in wanted:
        quality_kv_draw.write(results.data, given.out)


if __name__ == "__main__":
    main()
