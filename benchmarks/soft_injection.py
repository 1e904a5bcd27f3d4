"""Soft injection against zero-shot, few-shot prompts, function vectors and chance, over many small tasks.

    python benchmarks/soft_injection.py --data FOLDER [--tasks 30] [--seeds 3] [--device cuda] [--workers 6] [--minutes 120]

FOLDER holds one JSON file per task (in any subfolder), a list of {"input": ..., "output": ...}: the tasks of
github.com/ericwtodd/function_vectors have this form. Each task is split once into training, validation and test pairs; seeds differ
in few-shot prompts, in the order of training pairs and in the random control. What is done is kept in `--out`, and the same command
goes on from there; `--minutes` ends it after the group of tasks that is being run then. With `--workers` groups are measured side by
side, in processes of their own that write beside `--out` and share its device; these are stopped at the minute, and what they had
measured counts (`--minutes 0` does nothing but merge what there is, and report).

Per task and seed: zero-shot (no seed); ICL, `--shots` demonstrations in `--draws` draws, each for a part of the questions; the
function vector of the heads that mediation finds on training prompts of some tasks, in the layer that validation pairs choose; soft
injection, learned by each of `--losses`; and its control, the first one's strengths on heads in random order. Answers are greedy and
count by the published prefix match and by exact match. Afterwards recipes of some tasks are applied with headpatch.apply and used one
query at a time: latency, and whether they answer as measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soft_injection_parts as parts_of
import torch
from common import machine
from soft_injection_latency import latency
from soft_injection_options import NO_SETTINGS, options, tasks_of
from soft_injection_report import METHODS, WHOLE, report

from headpatch.commands.generate import load
from headpatch.tune.engine import Beginnings, LastTokens, last_tokens
from headpatch.tune.function_vector import HeadWriter, addition, best_layer, function_vector, mediation
from headpatch.tune.measure import answers
from headpatch.tune.pairs import Format, Pair, Split, answer_tokens, exact_match, first_tokens, prefix_match, split
from headpatch.tune.soft import Learned, Lesson, Settings, embed, injection, learn
from headpatch.tune.task_recipes import injection_recipe, vector_recipe

STYLE = Format()
FV_HEADS = 10
LEARNED = {"first": "soft injection", "answer": WHOLE}
RESERVE = 40.0
"""Seconds of `--minutes` that are kept for the latency of each dtype."""


@dataclass
class Test:
    """A task's test questions: zero-shot prompts, and how many tokens decide an answer."""

    pairs: list[Pair]
    prompts: Beginnings
    lengths: list[int]
    tokens: int


def marks(task: str, texts: list[str], pairs: list[Pair]) -> dict[str, list[int]]:
    """1 or 0 per question, by both scores; letter-case tasks mind the case."""
    case = task.startswith(("capitalize", "lowercase"))
    both = [
        (text.replace("St.", "Saint"), pair.answer.replace("St.", "Saint"))
        for text, pair in zip(texts, pairs, strict=True)
    ]
    return {
        "prefix": [int(prefix_match(text, answer, case)) for text, answer in both],
        "exact": [int(exact_match(text, answer, case)) for text, answer in both],
    }


class Bench:
    """One process's model and what it has measured, in `out`."""

    def __init__(self, given: argparse.Namespace, model: LastTokens, keep: list[str]) -> None:
        self.given, self.model, self.out, self.kept = given, model, given.part or given.out, keep
        if given.wider:
            model.wider = given.wider
        self.settings = Settings(
            prompts=given.prompts, shots=given.shots, steps=given.steps, validation=given.valid, every=given.every
        )
        plain = {k: v for k, v in vars(given).items() if k not in NO_SETTINGS}
        self.methods = [m for m in METHODS if m not in LEARNED.values() or m in map(LEARNED.get, given.losses)]
        self._writers: dict[int, HeadWriter] = {}
        self.data: dict[str, Any] = {
            "settings": plain, "model": model.about(), "tasks": {}, "heads": None, "recipes": {}
        }  # fmt: skip
        if self.out.exists():
            known = json.loads(self.out.read_text("utf-8"))
            if known["settings"] != plain:
                sys.exit(f"{self.out} was made with other settings: {known['settings']}")
            self.data = known

    @property
    def writers(self) -> dict[int, HeadWriter]:
        """Of every layer, made when they are first asked for: each takes a decomposition."""
        if not self._writers:
            layers = range(self.model.shape.parts[self.model.shape.main].num_layers)
            self._writers = {layer: HeadWriter(self.model.writer(layer)) for layer in layers}
        return self._writers

    def save(self) -> None:
        parts_of.write_whole(self.out, self.data)

    def parts(self, pairs: list[Pair]) -> Split:
        made = split(pairs, 0)
        g = self.given
        return Split(made.train[: g.train], made.valid[: g.valid], made.test[: g.test])

    def test(self, parts: Split) -> Test:
        pairs = list(parts.test)
        ids, said = answer_tokens(
            self.model, [STYLE.prompt(p.question) for p in pairs], [STYLE.said(p.answer) for p in pairs]
        )
        return Test(pairs, self.model.begin(ids), [len(i) for i in ids], min(20, max(map(len, said)) + 2))

    def answers(self, beginnings: Beginnings, edit: Any, tokens: int) -> list[str]:
        return answers(self.model, beginnings, edit, tokens)

    def heads(self, tasks: dict[str, Split], vectors: dict[str, list[torch.Tensor]]) -> list[str]:
        """Heads that carry tasks, found once, on training prompts of the first tasks; a part waits for its parent's."""
        parent = os.getppid()
        while self.data["heads"] is None and self.given.part:
            if self.given.out.exists():
                self.data["heads"] = json.loads(self.given.out.read_text("utf-8"))["heads"]
            if os.getppid() != parent:
                sys.exit("the process that was to find heads has ended")
            time.sleep(0.5)
        if self.data["heads"] is None:
            started = time.monotonic()
            some = list(tasks)[: self.given.mediation_tasks]
            for n in some:
                if n not in vectors:
                    vectors[n] = embed(self.model, tasks[n].train, STYLE, self.given.prompts, self.given.shots, 0)
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
        learned: dict[str, list[Learned]] = {}
        each, works = {}, []
        for loss in self.given.losses:
            work, began = self.work([*tasks, str(seeds), loss]), time.monotonic()

            def show(step: Any, loss: str = loss) -> None:
                text = (
                    f"\r{loss}: step {step.step}/{step.steps}, loss {step.loss:.3f}, {step.seconds_left:.0f} s left "
                )
                print(text, end="", flush=True)

            settings = replace(self.settings, loss=loss)
            learned[loss] = learn(self.model, lessons, STYLE, settings, work=work, progress=show)
            each[loss] = (time.monotonic() - began) / len(lessons)
            works.append(work)
            print()
        heads = self.heads(tasks, vectors)  # type: ignore[arg-type]
        for name, parts in tasks.items():
            mine = [
                (seed, lessons[i], {loss: learned[loss][i] for loss in learned})
                for i, (n, seed) in enumerate(keys)
                if n == name
            ]
            self.data["tasks"][name] = self.measure(name, parts, mine, heads, each)
            self.save()
            done = self.data["tasks"][name]
            rows = {m: [statistics.mean(r["prefix"]) for r in done["answers"][m]] for m in self.methods}
            print(
                name,
                {m: round(100 * statistics.mean(v), 1) for m, v in rows.items()},
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        for work in works:
            work.unlink(missing_ok=True)

    def work(self, words: list[str]) -> Path:
        """Where the learning of these tasks keeps its state, whoever runs it."""
        folder = self.given.out.with_suffix(".work")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(folder / hashlib.sha256(" ".join(words).encode()).hexdigest()[:12])

    def measure(
        self, name: str, parts: Split, mine: list[tuple[int, Lesson, dict[str, Learned]]], heads: list[str],
        seconds: dict[str, float],
    ) -> dict[str, Any]:  # fmt: skip
        test = self.test(parts)
        found: dict[str, Any] = {
            "pairs": {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
            "prompt_tokens": {"zero-shot": statistics.mean(test.lengths)}, "answers": {m: [] for m in self.methods},
            "learned": [],
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
            for loss, learned in got.items():
                texts = self.answers(test.prompts, injection(learned.alpha, lesson.vectors), test.tokens)
                note[LEARNED[loss]].append({"seed": seed, **marks(name, texts, test.pairs)})
                found["learned"].append(
                    {"seed": seed, "loss": loss, **about(learned), "seconds": round(seconds[loss], 1)}
                )
            main = got[self.given.losses[0]]
            texts = self.answers(test.prompts, injection(shuffled(main.alpha, seed), lesson.vectors), test.tokens)
            note["random alpha"].append({"seed": seed, **marks(name, texts, test.pairs)})
            if seed == 0 and name in self.kept:
                self.keep(name, main, lesson, layer, v, parts, test)
        found["prompt_tokens"]["ICL"] = statistics.mean(shown_tokens)
        return found

    def few_shot(self, parts: Split, test: Test, seed: int) -> tuple[list[str], list[int]]:
        """Answers behind demonstrations: each draw of them serves a part of the questions, whose prompts share it.

        What they share is computed once, unless there is room for all of them in one batch: a GPU waits for the number of calls.
        """
        rng, texts, lengths = random.Random(f"ICL {seed}"), [""] * len(test.pairs), []
        groups: list[tuple[list[int], list[tuple[int, ...]]]] = []
        for draw in range(self.given.draws):
            rows = list(range(draw, len(test.pairs), self.given.draws))
            if rows:
                shown = rng.sample(list(parts.train), self.given.shots)
                groups.append((rows, self.model.encode([STYLE.prompt(test.pairs[i].question, shown) for i in rows])))
        if self.model.wider > 1:
            groups = [([i for rows, _ in groups for i in rows], [own for _, ids in groups for own in ids])]
        for rows, ids in groups:
            shortest = min(map(len, ids)) - 1
            shared = next((k for k, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), shortest)
            beginnings = self.model.begin(ids, 0 if self.model.wider > 1 else min(shared, shortest))
            for i, text in zip(rows, self.answers(beginnings, None, test.tokens), strict=True):
                texts[i] = text
            lengths += [len(own) for own in ids]
        return texts, lengths

    def keep(
        self, name: str, got: Learned, lesson: Lesson, layer: int, v: torch.Tensor, parts: Split, test: Test
    ) -> None:
        folder = self.given.out.with_suffix(".recipes")
        for kind in ("soft", "fv"):  # of a run that was stopped before it could note this task
            (folder / f"{name}-{kind}.safetensors").unlink(missing_ok=True)
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


def about(got: Learned) -> dict[str, Any]:
    """What was learned, for the result."""
    every = torch.cat(got.alpha)
    alpha = {
        "mean": round(float(every.mean()), 4), "below 0.1": int((every < 0.1).sum()), "above 0.9": int((every > 0.9).sum()),
        "of": len(every), "by layer": [round(float(a.mean()), 3) for a in got.alpha],
    }  # fmt: skip
    return {
        "step": got.step, "train": [round(x, 4) for x in got.train], "valid": [round(x, 4) for x in got.valid], "alpha": alpha
    }  # fmt: skip


def shuffled(alpha: Any, seed: int) -> list[torch.Tensor]:
    every = torch.cat(list(alpha))
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1000 + seed))]
    return list(mixed.split([len(a) for a in alpha]))


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    given, started = options(__doc__).parse_args(arguments), time.monotonic()
    tasks = tasks_of(given.data, given.tasks, set(given.skip), given.names)
    keep = list(tasks)[: given.latency] if given.keep is None else given.keep
    until = started + 60 * given.minutes
    many = given.workers > 1 and not given.part
    if many:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers do not outlive their parent
    known = json.loads(given.out.read_text("utf-8")) if many and given.out.exists() else {"tasks": {}}
    measured = {*known["tasks"], *(name for part in parts_of.read_parts(given.out) for name in part["tasks"])}
    todo = [name for name in tasks if name not in measured]

    def command(names: list[str], file: Path) -> list[str]:
        own = ["--part", str(file), "--names", *names, "--keep", *keep, "--tasks", str(len(names))]
        return [sys.executable, str(Path(__file__).resolve()), *arguments, *own]

    groups = parts_of.groups_of(todo, given.group) if many and given.minutes > 0 else []
    pool = parts_of.Pool(given.out, groups, command, given.workers)
    try:
        pool.fill()  # before this process loads its model: workers take as long for theirs
        model, tokenizer = load(given.model, given.device, given.dtype)
        bench = Bench(given, last_tokens(model, tokenizer), keep)
        if many:
            side_by_side(bench, pool, tasks, until)
        else:
            one_by_one(bench, tasks, until)
    finally:
        pool.stop()
    if given.part:
        return
    bench.data["machine"] = machine(model.device)
    bench.save()
    if bench.data["recipes"] and "latency" not in bench.data and given.latency and given.minutes > 0:
        with_dtypes = {given.dtype: (model, tokenizer)}
        latency(
            bench,
            with_dtypes,
            [given.dtype, *given.latency_dtypes],
            lambda d: load(given.model, given.device, d),
            until,
        )
    report(given.out, given.figure)
    print(f"{len(bench.data['tasks'])} of {len(tasks)} tasks, {(time.monotonic() - started) / 60:.1f} min", flush=True)
    if len(bench.data["tasks"]) == len(tasks):
        for left in (".parts", ".work"):
            shutil.rmtree(given.out.with_suffix(left), ignore_errors=True)
    if pool.failed:
        sys.exit(f"{len(pool.failed)} groups failed; the same command measures them again")


def one_by_one(bench: Bench, tasks: dict[str, list[Pair]], until: float) -> None:
    """Groups in this process."""
    given = bench.given
    todo = [name for name in tasks if name not in bench.data["tasks"]]
    while todo and time.monotonic() < until:
        some, todo = todo[: given.group], todo[given.group :]
        bench.group({name: bench.parts(tasks[name]) for name in some}, given.seeds)
        print(f"{len(bench.data['tasks'])} of {len(tasks)} tasks", flush=True)


def side_by_side(bench: Bench, pool: parts_of.Pool, tasks: dict[str, list[Pair]], until: float) -> None:
    """Groups in processes of their own, while this one finds the heads for all of them."""
    given = bench.given

    def news() -> None:
        try:
            bench.data = parts_of.merge(bench.data, parts_of.read_parts(bench.out))
        except ValueError as error:
            sys.exit(f"{bench.out.with_suffix('.parts')}: {error}; remove this folder, or take another --out")
        bench.save()
        print(
            f"\r{len(bench.data['tasks'])} of {len(tasks)} tasks, {len(pool.running)} groups at work ",
            end="",
            flush=True,
        )

    news()
    if given.minutes > 0:
        some = list(tasks)[: given.mediation_tasks]
        bench.heads({name: bench.parts(tasks[name]) for name in some}, {})
        torch.cuda.empty_cache()  # nothing without a GPU
        reserve = min(RESERVE * (1 + len(given.latency_dtypes)), 15 * given.minutes) if given.latency else 0
        pool.wait(until - reserve, news)
        print()


if __name__ == "__main__":
    main()
