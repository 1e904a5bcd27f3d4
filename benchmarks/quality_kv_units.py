"""What quality_kv.py measures, as units that processes can share: prompts, texts and tasks under every policy."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine
from quality_kv_work import Stopped, Store, Unit

from headpatch.evaluate import matches
from headpatch.find.data import file_sha256
from headpatch.find.engine import Bench, Passage, load_model, open_bench
from headpatch.find.gates import Training, train_gates
from headpatch.find.haystack import load_haystack
from headpatch.find.loss import near_loss
from headpatch.find.needles import Prompt, make_needle, needle_prompt, rng_of
from headpatch.find.passkeys import Passkeys
from headpatch.find.ranking import HeadScores, full_heads
from headpatch.find.retrieval import Probe, recall, retrieval_heads
from headpatch.heads import to_selectors
from headpatch.recipe import Recipe

FOUND = ("gates", "retrieval", "quick")
CHOOSING = ("snapkv", "ada_kv")
"""Policies that choose what to keep where the prompt ends, by what its last queries look at."""
NEW_TOKENS = {"number": 20, "fact": 36}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured. Streaming heads keep `sink` first and `recent` last tokens."""

    sink: int = 16
    recent: int = 64
    steps: int = 300
    samples: int = 8
    probe_lengths: tuple[int, ...] = (256, 512)
    rounds: int = 2
    sparsity: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    draws: int = 5
    needles: tuple[tuple[str, int], ...] = (
        ("number", 512), ("fact", 256), ("number", 1024), ("number", 256), ("number", 2048),
    )  # fmt: skip
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 30
    passages: int = 16
    lengths: tuple[int, ...] = (1024, 4096)
    tasks: tuple[str, ...] = (
        "choose_first_of_5", "choose_last_of_5", "antonym", "country-capital", "present-past", "singular-plural",
    )  # fmt: skip
    shots: int = 16
    queries: int = 200
    masked: tuple[int, ...] = (10, 20, 40)
    seed: int = 1


SMALL = Sizes(
    steps=40, samples=4, probe_lengths=(256,), sparsity=(0.75, 0.5, 0.9), draws=2, needles=(("number", 256), ("number", 512)),
    prompts=4, passages=4, lengths=(1024,), queries=10, masked=(10, 20),
)  # fmt: skip
"""What one core of a CPU gets through in half an hour."""
QUICK = Sizes(
    steps=3, samples=1, probe_lengths=(256,), rounds=1, sparsity=(0.75,), draws=1, needles=(("number", 256),), depths=(0.0, 0.5),
    prompts=2, passages=2, lengths=(256,), tasks=("antonym", "country-capital"), queries=3, masked=(10,),
)  # fmt: skip
"""Enough to see that everything runs."""
LONG = dataclasses.replace(Sizes(), passages=4, lengths=(4096,))
"""Long texts, as few as a CPU gets through; heads found as in the full size."""
SIZES = {"full": Sizes(), "long": LONG, "small": SMALL, "quick": QUICK}


@dataclasses.dataclass(frozen=True)
class Given:
    """Where things are: a model's name or folder, a long text, a folder of tasks."""

    model: str
    device: str
    dtype: str
    book: Path
    tasks: Path


class Subject:
    """One process's model, and what it is asked; all made when first needed."""

    def __init__(self, given: Given, sizes: Sizes, store: Store, deadline: float) -> None:
        self.given, self.sizes, self.store, self.deadline = given, sizes, store, deadline
        self.model, self.tokenizer = load_model(given.model, device=given.device, dtype=given.dtype)
        self.bench: Bench = open_bench(self.model, self.tokenizer)
        self.part = self.bench.shape.parts["text"]
        self.book = load_haystack(given.book)
        self.prompts = functools.cache(self._prompts)
        self.passages = functools.cache(self._passages)
        self.queries = functools.cache(self._queries)

    def about(self) -> dict[str, Any]:
        engine = self.bench.about()
        return {**machine(torch.device(self.given.device)), **engine, "book": self.book.about(), "chat": True}

    # --- finding ----------------------------------------------------------------------------------------------------------

    def find(self, which: str) -> dict[str, Any]:
        """Scores of heads, on generated texts and in float32."""
        s = self.sizes
        keys = Passkeys(shortest=300, longest=700, lengths=9, count=4, words=8, seed=0)
        model, tokenizer = load_model(self.given.model, device=self.given.device)
        more: dict[str, Any] = {}
        if which == "gates":
            training = Training(keys, sink=s.sink, recent=s.recent, steps=s.steps, recompute=False)
            work = self.store.path.with_suffix(".gates.work")
            made = train_gates(model, tokenizer, training, work=work, progress=self._in_time, say=print)
            more["losses"] = [[float(f"{a:.4g}"), float(f"{b:.4g}")] for a, b in made.losses]
            scores = made.scores
            work.unlink(missing_ok=True)
        elif which == "retrieval":
            probe = Probe(s.probe_lengths, s.depths, s.rounds, "fact", chat=True, seed=0)
            found = retrieval_heads(model, tokenizer, probe, progress=self._in_time, say=print)
            more["errors"] = {str(n): list(r) for n, r in found.errors.items()}
            scores = found.scores
        else:
            scores = near_loss(model, tokenizer, keys, samples=s.samples, sink=s.sink, recent=s.recent)
        values = {str(n): list(r) for n, r in scores.values.items()}
        return {"about": dict(scores.about), "kind": scores.kind, "values": values, **more}

    def _in_time(self, what: str, done: int, total: int) -> None:
        if time.time() > self.deadline:
            raise Stopped

    def scores(self, which: str) -> HeadScores:
        held = self.store.get("find", which)
        return HeadScores(which, held["kind"], {int(n): tuple(r) for n, r in held["values"].items()}, held["about"])

    # --- policies ---------------------------------------------------------------------------------------------------------

    def recipe(self, name: str, length: int) -> Recipe | None:
        """The recipe ``policy@sparsity`` (and ``/draw``) for prompts of this length; None for ``untouched``."""
        if name == "untouched":
            return None
        s = self.sizes
        which, _, rest = name.partition("@")
        sparsity, _, draw = rest.partition("/")
        kept = keys_kept(s, float(sparsity), length)
        patch: dict[str, Any]
        if which in FOUND:
            patch = self._duo(full_heads(self.scores(which).of_kv_heads(self.part), sparsity=float(sparsity)))
        elif which == "random":
            layers = self.part.softmax_layers()
            every = [(layer, head) for layer in layers for head in range(self.part.num_kv_heads[layer])]
            count = math.ceil(round((1 - float(sparsity)) * len(every), 9))
            picked: dict[int, list[int]] = {}
            for layer, head in sorted(random.Random(f"{float(sparsity)}/{draw}").sample(every, count)):
                picked.setdefault(layer, []).append(head)
            patch = self._duo({n: tuple(h) for n, h in picked.items()})
        elif which == "streaming_llm":
            recent = s.recent if sparsity == "1.0" else max(1, round(kept * length) - s.sink)
            patch = {"method": which, "sink": s.sink, "recent": recent}
        else:
            patch = {"method": which, "ratio": kept}
        return Recipe.from_dict({"headpatch": 1, "name": name, "patches": [patch]})

    def _duo(self, full: dict[int, tuple[int, ...]]) -> dict[str, Any]:
        heads = list(to_selectors({n: dict.fromkeys(h, True) for n, h in full.items()}, self.part, "kv"))
        return {
            "method": "duo_attention",
            "full_kv_heads": heads,
            "sink": self.sizes.sink,
            "recent": self.sizes.recent,
        }

    # --- measuring --------------------------------------------------------------------------------------------------------

    def _prompts(self, kind: str, length: int) -> list[Prompt]:
        """Needles at every depth; the same ones for every policy."""
        made = []
        for depth in self.sizes.depths:
            for number in range(self.sizes.prompts):
                rng = rng_of(self.sizes.seed, kind, length, depth, number)
                needle = make_needle(kind, rng)
                made.append(needle_prompt(self.bench, self.book, needle, length, depth, rng, chat=True))
        return made

    def needles(self, kind: str, length: int, recipe: Callable[[], Recipe | None]) -> dict[str, Any]:
        asked = self.prompts(kind, length)
        texts = [p.hidden.text for p in asked]
        wrote = self.bench.generate(texts, recipe(), NEW_TOKENS[kind], asked[0].hidden.special_tokens)
        answers = [p.needle.answer for p in asked]
        return {
            "depths": [p.depth for p in asked],
            "found": [matches(w, a) for w, a in zip(wrote, answers, strict=True)],
            "recall": [round(recall(w, a), 3) for w, a in zip(wrote, answers, strict=True)],
        }

    def _passages(self, length: int) -> list[Passage]:
        made = []
        for number in range(self.sizes.passages):
            drawn = self.book.draw(random.Random(f"{self.sizes.seed}/{number}"), 8 * length)
            ids = self.bench.encode(" ".join(drawn))[0][: length + 1]
            made.append(Passage(ids[:-1], ids[1:]))
        return made

    def text(self, length: int, recipe: Callable[[], Recipe | None]) -> dict[str, Any]:
        """Minus mean log-probability of each passage's tokens behind sink and window: before that nothing is missing."""
        passages = self.passages(length)
        skip = self.sizes.sink + self.sizes.recent
        ((_, outcome),) = self.bench.run([recipe()], None, passages)
        rows = outcome.text.view(len(passages), length)[:, skip:]
        return {"log_perplexity": [-float(r.double().mean()) for r in rows]}

    def _queries(self, task: str) -> tuple[list[str], list[str], int, str]:
        """Prompts with examples, right answers, mean tokens, digest of the file."""
        s = self.sizes
        path = next(self.given.tasks.rglob(f"{task}.json"))
        rows = json.loads(path.read_text())
        rng = random.Random(f"{s.seed}/{task}")
        prompts, answers = [], []
        for _ in range(s.queries):
            *shots, asked = rng.sample(rows, s.shots + 1)
            shown = "".join(f"Q: {r['input']}\nA: {r['output']}\n\n" for r in shots)
            prompts.append(f"{shown}Q: {asked['input']}\nA:")
            answers.append(str(asked["output"]))
        tokens = sum(len(self.bench.encode(p)[0]) for p in prompts) // len(prompts)
        return prompts, answers, tokens, file_sha256(path)

    def task(self, task: str, name: str) -> list[bool]:
        """Exact first lines."""
        prompts, answers, tokens, _ = self.queries(task)
        wrote = self.bench.generate(prompts, self.recipe(name, tokens), 8)
        return [matches(w, a, "exact") for w, a in zip(wrote, answers, strict=True)]

    def task_about(self, task: str) -> dict[str, Any]:
        _, _, tokens, digest = self.queries(task)
        return {"tokens": tokens, "sha256": digest}

    def masked(self, name: str) -> dict[str, Any]:
        """The best retrieval heads set to zero, or as many others: ``anywhere`` or in the ``same layers``."""
        recipe = None
        if name != "untouched":
            count, group, draw = (name + "/").split("/")[:3]
            ranked = [(layer, head) for layer, head, _ in self.scores("retrieval").ranked()]
            best, rest = ranked[: int(count)], ranked[int(count) :]
            rng = random.Random(f"mask/{count}/{draw}")
            if group == "retrieval":
                chosen = best
            elif group == "anywhere":
                chosen = rng.sample(rest, int(count))
            else:
                layers, chosen = [layer for layer, _ in best], []
                for layer in sorted(set(layers)):
                    others = [e for e in rest if e[0] == layer]
                    chosen += rng.sample(others, min(len(others), layers.count(layer)))
            heads = [f"{layer}.{head}" for layer, head in sorted(chosen)]
            patch = {"method": "head_scaling", "heads": heads, "scale": 0.0}
            recipe = Recipe.from_dict({"headpatch": 1, "name": name, "patches": [patch]})
        kind, length = self.sizes.needles[0]
        made = self.needles(kind, length, lambda: recipe) | self.text(self.sizes.lengths[0], lambda: recipe)
        return {**made, "heads": list(recipe.to_dict()["patches"][0]["heads"]) if recipe else []}


def keys_kept(sizes: Sizes, sparsity: float, length: int) -> float:
    """Share of the keys of a sequence that a policy of this sparsity keeps."""
    return 1 - sparsity + sparsity * min(1.0, (sizes.sink + sizes.recent) / length)


def policies(sizes: Sizes) -> Iterator[tuple[str, bool]]:
    """Names, and whether they may come late."""
    yield "untouched", False
    for sparsity in sizes.sparsity:
        late = sparsity < 0.5
        for which in (*FOUND, *CHOOSING, "streaming_llm"):
            yield f"{which}@{sparsity}", late or which == "quick"
        for draw in range(sizes.draws):
            yield f"random@{sparsity}/{draw}", late or draw > 2
    yield "streaming_llm@1.0", False


def units(subject: Subject, stages: list[str]) -> list[Unit]:
    """Everything, what others wait for first; what may come late comes after all that may not."""
    s, made = subject.sizes, []

    def add(stage: str, key: str, order: float, name: str, measure: Callable[[], Any]) -> None:
        which = "retrieval" if stage == "masks" and name != "untouched" else name.partition("@")[0]
        made.append(Unit(stage, key, order, measure, (("find", which),) if which in FOUND else ()))

    add("about", "machine", -1, "", subject.about)
    for order, which in enumerate(FOUND):
        add("find", which, order / 10 - 0.9, "", partial(subject.find, which))
    later = [*s.needles[:2], *((),) * 5, *s.needles[2:]]
    for name, late in policies(s):
        for order, cell in enumerate(later):
            if cell:
                kind, length = cell
                recipe = partial(subject.recipe, name, length)
                measure: Callable[[], Any] = partial(subject.needles, kind, length, recipe)
                add("needles", f"{kind}/{length}/{name}", order + 20 * late, name, measure)
        for task in s.tasks:
            add("tasks", f"{task}/{name}", 5 + 20 * late, name, partial(subject.task, task, name))
        for order, length in enumerate(s.lengths):
            if not name.startswith(CHOOSING):  # they would see all of a text that is read at once
                measure = partial(subject.text, length, partial(subject.recipe, name, length))
                add("text", f"{length}/{name}", 0.7 + 9 * order + 20 * late, name, measure)
    for task in s.tasks:
        add("tasks", f"{task}/about", 4.9, "", partial(subject.task_about, task))
    sets = [f"{n}/{g}/{d}" for n in s.masked for g in ("anywhere", "same layers") for d in range(s.draws)]
    for name in ("untouched", *(f"{n}/retrieval" for n in s.masked), *sets):
        add("masks", name, 0.5, name, partial(subject.masked, name))
    return [u for u in made if u.stage in ("about", "find", *stages)]
