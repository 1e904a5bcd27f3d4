"""Soft injection against zero-shot, few-shot prompts, function vectors and chance, over many small tasks.

    python benchmarks/soft_injection.py --data FOLDER [--tasks 30] [--seeds 3] [--device cuda] [--minutes 120]

FOLDER holds one JSON file per task (in any subfolder), a list of {"input": ..., "output": ...}: the tasks of
github.com/ericwtodd/function_vectors have this form. Each task is split once into training, validation and test pairs; seeds differ
in few-shot prompts, in the order of training pairs and in the random control. What is done is kept in `--out`, and the same command
goes on from there; `--minutes` ends it after the group of tasks that is being run then.

Per task and seed: zero-shot (no seed); ICL, `--shots` demonstrations in `--draws` draws, each for a part of the questions; the
function vector of the heads that mediation finds on training prompts of some tasks, in the layer that validation pairs choose; soft
injection; and its control, the same strengths on heads in random order. Answers are greedy; they count by the published prefix match
and by exact match. Afterwards recipes of some tasks are applied with headpatch.apply and used one query at a time: latency, and
whether they answer as measured.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine

import headpatch
from headpatch.commands.generate import load
from headpatch.demo_model import SHORT_NAME
from headpatch.tune.engine import Beginnings, LastTokens, last_tokens
from headpatch.tune.function_vector import HeadWriter, addition, best_layer, function_vector, mediation
from headpatch.tune.pairs import Format, Pair, Split, exact_match, first_tokens, prefix_match, split
from headpatch.tune.soft import Learned, Lesson, Settings, embed, injection, learn
from headpatch.tune.task_recipes import injection_recipe, vector_recipe

STYLE = Format()
METHODS = ("zero-shot", "ICL", "function vector", "soft injection", "random alpha")
FV_HEADS = 10


@dataclass
class Test:
    """A task's test questions: zero-shot prompts, and how many tokens decide an answer."""

    pairs: list[Pair]
    prompts: Beginnings
    lengths: list[int]
    tokens: int


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


def saint(text: str) -> str:
    return text.replace("St.", "Saint")


def marks(task: str, texts: list[str], pairs: list[Pair]) -> dict[str, list[int]]:
    """1 or 0 per question, by both scores; letter-case tasks mind the case."""
    case = task.startswith(("capitalize", "lowercase"))
    both = [(saint(text), saint(pair.answer)) for text, pair in zip(texts, pairs, strict=True)]
    return {
        "prefix": [int(prefix_match(text, answer, case)) for text, answer in both],
        "exact": [int(exact_match(text, answer, case)) for text, answer in both],
    }


class Bench:
    def __init__(self, given: argparse.Namespace, model: LastTokens, ends: set[int], out: Path) -> None:
        self.given, self.model, self.ends, self.out = given, model, ends, out
        self.settings = Settings(
            prompts=given.prompts, shots=given.shots, steps=given.steps, validation=given.valid, every=given.every
        )
        plain = {
            k: v
            for k, v in vars(given).items()
            if k not in ("out", "minutes", "data", "device", "tasks", "seeds", "names", "latency")
        }
        layers = range(model.shape.parts[model.shape.main].num_layers)
        self.writers = {layer: HeadWriter(model.writer(layer)) for layer in layers}
        self.data: dict[str, Any] = {
            "settings": plain,
            "model": model.about(),
            "tasks": {},
            "heads": None,
            "recipes": {},
        }
        if out.exists():
            known = json.loads(out.read_text("utf-8"))
            if known["settings"] != plain:
                sys.exit(f"{out} was made with other settings: {known['settings']}")
            self.data = known

    def save(self) -> None:
        scratch = self.out.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        scratch.replace(self.out)

    def parts(self, pairs: list[Pair]) -> Split:
        made = split(pairs, 0)
        g = self.given
        return Split(made.train[: g.train], made.valid[: g.valid], made.test[: g.test])

    def test(self, parts: Split) -> Test:
        pairs = list(parts.test)
        ids, _ = first_tokens(
            self.model, [STYLE.prompt(p.question) for p in pairs], [STYLE.said(p.answer) for p in pairs]
        )
        whole = self.model.encode([STYLE.prompt(p.question) for p in pairs], [STYLE.said(p.answer) for p in pairs])
        longest = max(len(b) - len(a) for a, b in zip(ids, whole, strict=True))
        return Test(pairs, self.model.begin(ids), [len(i) for i in ids], min(20, longest + 2))

    def answers(self, beginnings: Beginnings, edit: Any, tokens: int) -> list[str]:
        return [
            self.model.decode(found)
            for start in range(0, len(beginnings), 64)
            for found in self.model.answer(
                beginnings, range(start, min(len(beginnings), start + 64)), edit, tokens, self.ends
            )
        ]

    def heads(self, tasks: dict[str, Split], vectors: dict[str, list[torch.Tensor]]) -> list[str]:
        """Heads that carry tasks, found once, on training prompts of the first tasks."""
        if self.data["heads"] is None:
            started = time.monotonic()
            some = list(tasks)[: self.given.mediation_tasks]
            effects = mediation(
                self.model, [(tasks[n].train, vectors[n]) for n in some], STYLE, prompts=self.given.mediation_prompts,
                shots=self.given.shots, progress=lambda i, n: print(f"\rmediation {i}/{n}", end="", flush=True),
            )  # fmt: skip
            best = sorted(effects, key=lambda head: -effects[head])
            self.data["heads"] = {
                "tasks": some, "prompts": self.given.mediation_prompts, "chosen": best[:FV_HEADS],
                "effects": {head: round(effects[head], 5) for head in best[:40]}, "seconds": round(time.monotonic() - started, 1),
            }  # fmt: skip
            self.save()
            print(f"\nheads: {' '.join(best[:FV_HEADS])}")
        return list(self.data["heads"]["chosen"])

    # --- one group of tasks -----------------------------------------------------------------------------------------------

    def group(self, tasks: dict[str, Split], seeds: int) -> None:
        started = time.monotonic()
        lessons, keys = [], []
        for name, parts in tasks.items():
            for seed in range(seeds):
                t = embed(self.model, parts.train, STYLE, self.given.prompts, self.given.shots, seed)
                lessons.append(Lesson(t, parts.train, parts.valid, seed))
                keys.append((name, seed))
                print(f"\r{name} seed {seed}: embedded ({time.monotonic() - started:.0f} s)   ", end="", flush=True)
        vectors = {name: lesson.vectors for (name, seed), lesson in zip(keys, lessons, strict=True) if seed == 0}
        heads = self.heads(tasks, vectors)  # type: ignore[arg-type]
        work = self.out.with_suffix(".work")
        began = time.monotonic()

        def show(step: Any) -> None:
            text = f"\rstep {step.step}/{step.steps}, loss {step.loss:.3f}, {step.seconds_left:.0f} s left "
            print(text, end="", flush=True)

        learned = learn(self.model, lessons, STYLE, self.settings, work=work, progress=show)
        each = (time.monotonic() - began) / len(lessons)
        print()
        for name, parts in tasks.items():
            mine = [
                (seed, lesson, got) for (n, seed), lesson, got in zip(keys, lessons, learned, strict=True) if n == name
            ]
            self.data["tasks"][name] = self.measure(name, parts, mine, heads, each)
            self.save()
            done = self.data["tasks"][name]
            rows = {m: [statistics.mean(r["prefix"]) for r in done["answers"][m]] for m in METHODS}
            print(
                name,
                {m: round(100 * statistics.mean(v), 1) for m, v in rows.items()},
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        work.unlink(missing_ok=True)

    def measure(
        self, name: str, parts: Split, mine: list[tuple[int, Lesson, Learned]], heads: list[str], seconds: float
    ) -> dict[str, Any]:
        test = self.test(parts)
        found: dict[str, Any] = {
            "pairs": {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
            "prompt_tokens": {"zero-shot": statistics.mean(test.lengths)}, "answers": {m: [] for m in METHODS}, "learned": [],
        }  # fmt: skip
        note = found["answers"]
        note["zero-shot"].append(marks(name, self.answers(test.prompts, None, test.tokens), test.pairs))
        valid = [(STYLE.prompt(p.question), STYLE.said(p.answer)) for p in parts.valid]
        ids, firsts = first_tokens(self.model, [q for q, _ in valid], [a for _, a in valid])
        checked, targets = self.model.begin(ids), torch.tensor(firsts, device=test.prompts.last.device)
        shown_tokens = []
        for seed, lesson, got in mine:
            texts, lengths = self.few_shot(parts, test, seed)
            shown_tokens += lengths
            note["ICL"].append({"seed": seed, **marks(name, texts, test.pairs)})
            f = function_vector(self.model, lesson.vectors, heads)
            layer, _ = best_layer(self.model, f, checked, range(len(checked)), targets, self.writers)
            v, missing = self.writers[layer](f)
            texts = self.answers(test.prompts, addition(layer, v), test.tokens)
            note["function vector"].append(
                {"seed": seed, "layer": layer, "missing": round(missing, 4), **marks(name, texts, test.pairs)}
            )
            texts = self.answers(test.prompts, injection(got.alpha, lesson.vectors), test.tokens)
            note["soft injection"].append({"seed": seed, **marks(name, texts, test.pairs)})
            texts = self.answers(test.prompts, injection(shuffled(got.alpha, seed), lesson.vectors), test.tokens)
            note["random alpha"].append({"seed": seed, **marks(name, texts, test.pairs)})
            every = torch.cat(got.alpha)
            alpha = {
                "mean": round(float(every.mean()), 4), "below 0.1": int((every < 0.1).sum()), "above 0.9": int((every > 0.9).sum()),
                "of": len(every), "by layer": [round(float(a.mean()), 3) for a in got.alpha],
            }  # fmt: skip
            found["learned"].append({
                "seed": seed, "step": got.step, "train": [round(x, 4) for x in got.train],
                "valid": [round(x, 4) for x in got.valid], "alpha": alpha, "seconds": round(seconds, 1),
            })  # fmt: skip
            if seed == 0 and len(self.data["recipes"]) < self.given.latency:
                self.keep(name, got, lesson, layer, v, parts, test)
        found["prompt_tokens"]["ICL"] = statistics.mean(shown_tokens)
        return found

    def few_shot(self, parts: Split, test: Test, seed: int) -> tuple[list[str], list[int]]:
        """Answers behind demonstrations: each draw of them serves a part of the questions, whose prompts share it."""
        rng, texts, lengths = random.Random(f"ICL {seed}"), [""] * len(test.pairs), []
        for draw in range(self.given.draws):
            rows = list(range(draw, len(test.pairs), self.given.draws))
            if not rows:
                continue
            shown = rng.sample(list(parts.train), self.given.shots)
            ids = self.model.encode([STYLE.prompt(test.pairs[i].question, shown) for i in rows])
            shared = next(
                (k for k, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), min(map(len, ids)) - 1
            )
            beginnings = self.model.begin(ids, min(shared, min(map(len, ids)) - 1))
            for i, text in zip(rows, self.answers(beginnings, None, test.tokens), strict=True):
                texts[i] = text
            lengths += [len(i) for i in ids]
        return texts, lengths

    def keep(
        self, name: str, got: Learned, lesson: Lesson, layer: int, v: torch.Tensor, parts: Split, test: Test
    ) -> None:
        folder = self.out.with_suffix(".recipes")
        injection_recipe(self.model.shape, got.alpha, lesson.vectors, name=f"{name}-soft").save(
            folder / f"{name}-soft.yaml"
        )
        vector_recipe(self.model.shape, layer, v, name=f"{name}-fv").save(folder / f"{name}-fv.yaml")
        shown = random.Random("ICL 0").sample(list(parts.train), self.given.shots)
        some = test.pairs[: self.given.queries]
        self.data["recipes"][name] = {
            "zero": [STYLE.prompt(p.question) for p in some], "few": [STYLE.prompt(p.question, shown) for p in some],
            "tokens": test.tokens,
            "soft": self.answers(test.prompts, injection(got.alpha, lesson.vectors), test.tokens)[: len(some)],
            "fv": self.answers(test.prompts, addition(layer, v), test.tokens)[: len(some)],
        }  # fmt: skip


def shuffled(alpha: Any, seed: int) -> list[torch.Tensor]:
    every = torch.cat(list(alpha))
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1000 + seed))]
    return list(mixed.split([len(a) for a in alpha]))


def latency(bench: Bench, model: Any, tokenizer: Any) -> None:
    """Recipes applied through the public API, one query at a time."""
    folder, device = bench.out.with_suffix(".recipes"), model.device
    times: dict[str, list[float]] = {"zero-shot": [], "ICL": [], "function vector": [], "soft injection": []}
    same = {"function vector": [0, 0], "soft injection": [0, 0]}
    first: dict[str, list[float]] = {name: [] for name in times}
    for name, kept in bench.data["recipes"].items():
        for way, prompts, recipe in (
            ("zero-shot", kept["zero"], None), ("ICL", kept["few"], None), ("function vector", kept["zero"], "fv"),
            ("soft injection", kept["zero"], "soft"),
        ):  # fmt: skip
            handle = headpatch.apply(model, str(folder / f"{name}-{recipe}.yaml")) if recipe else None
            for i, prompt in enumerate(prompts):
                inputs = tokenizer(prompt, return_tensors="pt").to(device)
                for tokens, into in ((1, first), (kept["tokens"], times)):
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    with torch.no_grad():
                        out = model.generate(
                            **inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
                        )
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if i:  # the first is a warm-up
                        into[way].append(1e3 * (time.perf_counter() - start))
                if recipe:
                    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                    same[way][0] += said_alike(text, kept[recipe][i])
                    same[way][1] += 1
            if handle is not None:
                handle.remove()
    tokens = statistics.mean(kept["tokens"] for kept in bench.data["recipes"].values())
    bench.data["latency"] = {
        "tokens generated": round(tokens, 1), "tasks": len(bench.data["recipes"]), "machine": machine(device),
        "first token, ms": {k: round(statistics.median(v), 2) for k, v in first.items() if v},
        "whole answer, ms": {k: round(statistics.median(v), 2) for k, v in times.items() if v},
        "answers as measured": {k: f"{a} of {b}" for k, (a, b) in same.items()},
    }  # fmt: skip
    # Questions and answers of the data stay out of the result file.
    bench.data["recipes"] = {
        name: {"queries": len(kept["zero"]), "tokens": kept["tokens"]} for name, kept in bench.data["recipes"].items()
    }
    bench.save()


def said_alike(text: str, kept: str) -> int:
    return int(text.partition("\n")[0].startswith(kept.partition("\n")[0]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--out", type=Path, default=RESULTS / "soft_injection.json")
    parser.add_argument("--tasks", type=int, help="how many, in a fixed random order; default: all")
    parser.add_argument("--names", nargs="*", default=[], help="these tasks")
    parser.add_argument("--skip", nargs="*", default=["squad_val", "commonsense_qa"], help="tasks with long questions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--group", type=int, default=6, help="tasks that are learned side by side")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--train", type=int, default=600, help="training pairs at most")
    parser.add_argument("--valid", type=int, default=100)
    parser.add_argument("--test", type=int, default=200, help="test pairs at most")
    parser.add_argument(
        "--draws", type=int, default=20, help="draws of demonstrations for the test questions of a seed"
    )
    parser.add_argument("--mediation-tasks", type=int, default=6)
    parser.add_argument("--mediation-prompts", type=int, default=25)
    parser.add_argument("--latency", type=int, default=4, help="tasks whose recipes are kept and timed")
    parser.add_argument("--queries", type=int, default=9, help="queries of each; the first is a warm-up")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(arguments)

    model, tokenizer = load(given.model, given.device, given.dtype)
    ends = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])} | {tokenizer.eos_token_id}
    bench = Bench(given, last_tokens(model, tokenizer), ends, given.out)
    tasks, started = tasks_of(given.data, given.tasks, set(given.skip), given.names), time.monotonic()
    todo = [name for name in tasks if name not in bench.data["tasks"]]
    while todo and (time.monotonic() - started) / 60 < given.minutes:
        some, todo = todo[: given.group], todo[given.group :]
        bench.group({name: bench.parts(tasks[name]) for name in some}, given.seeds)
        print(
            f"{len(bench.data['tasks'])} of {len(tasks)} tasks, {(time.monotonic() - started) / 60:.1f} min",
            flush=True,
        )
    bench.data["machine"] = machine(model.device)
    if "latency" not in bench.data and given.latency:
        latency(bench, model, tokenizer)
    bench.save()
    from soft_injection_report import report

    report(given.out)


if __name__ == "__main__":
    main()
