"""Find the heads that carry arithmetic in a small model, silence them, tune them, and compare with random heads and with all heads.

    python examples/arithmetic_heads.py --work DIR                     # SmolLM2-135M-Instruct, fetched on first use
    python examples/arithmetic_heads.py --work DIR --quick             # the same in a few minutes on two cores

Four stages; each is kept in DIR, and the same command goes on from there:

1. Path patching (arXiv 2409.01659): prompts with one-digit answers against the same prompts without an operator, heads patched one
   at a time at the last token. Only prompts that the model answers rightly are used.
2. Knock-out on other prompts: the best heads, and as many random ones, say their mean instead.
3. LoRA on the heads found, on random heads, and on all heads at about as many trainable numbers, trained on the same exercises.
4. What it did: exercises that nobody trained on, the prompts of stage 2, and the perplexity of a neutral text.

The exercises are written by this script. `--save` keeps the adapters, which plain PEFT loads.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tune_heads import accuracy, encode, train

from headpatch import tune
from headpatch.demo_model import SHORT_NAME
from headpatch.find.neutral import PASSAGES
from headpatch.find.path_patching import Contrast, knocked_out, last_outputs, path_effects
from headpatch.registry import find_adapter
from headpatch.tune.engine import LastTokens, last_tokens

# A prompt with two solved problems, so that a small model knows what is asked; {op} is the operator, {no} what stands there instead.
TEMPLATES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "equation": (
        ("5+2=7\n3+3=6\n{a}{op}{b}=", "+", "@"), ("6-2=4\n9-4=5\n{a}{op}{b}=", "-", "@"),
        ("4 + 1 = 5, 2 + 6 = 8, {a} {op} {b} = ", "+", "@"), ("8 - 5 = 3, 7 - 6 = 1, {a} {op} {b} = ", "-", "@"),
    ),
    "statement": (
        ("2 plus 2 equals 4. 3 plus 5 equals 8. {a} {op} {b} equals ", "plus", "none"),
        ("6 minus 2 is 4. 9 minus 5 is 4. {a} {op} {b} is ", "minus", "none"),
        ("The sum of 1 and 4 is 5. The sum of 6 and 2 is 8. The {op} of {a} and {b} is ", "sum", "none"),
    ),
    "question": (
        ("How much is 5 plus 2? 7\nHow much is 3 plus 1? 4\nHow much is {a} {op} {b}? ", "plus", "none"),
        ("What is 7 minus 3? 4\nWhat is 9 minus 8? 1\nWhat is {a} {op} {b}? ", "minus", "none"),
    ),
}  # fmt: skip
LESS = {"-", "minus"}


def contrasts(model: LastTokens) -> list[tuple[str, Contrast]]:
    """Every template with every pair of digits whose answer is a digit; (style, contrast)."""
    found = []
    for style, forms in TEMPLATES.items():
        for text, sign, nothing in forms:
            for a in range(1, 10):
                for b in range(1, 10):
                    answer = a - b if sign in LESS else a + b
                    if 0 <= answer <= 9:
                        ids, other = model.encode([text.format(a=a, b=b, op=op) for op in (sign, nothing)])
                        whole = model.encode([text.format(a=a, b=b, op=sign)], [str(answer)])[0]
                        if len(ids) == len(other) and whole[:-1] == ids:  # else the answer is no token of its own
                            found.append((style, Contrast(ids, other, whole[-1])))
    return found


def right(model: LastTokens, some: Sequence[Contrast], edit: Any = None) -> list[bool]:
    """Whether the answer is the most probable token of the whole vocabulary."""
    begun = model.begin([c.prompt for c in some])
    found: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(some), 64):
            rows = range(start, min(len(some), start + 64))
            best = model.run(begun, rows, edit).argmax(-1).tolist()
            found += [best[i - start] == some[i].answer for i in rows]
    return found


def exercises(count: int, seed: int) -> list[tuple[str, str]]:
    """Different sums, differences and products: question and answer."""
    kinds = [("plus", a, b, a + b) for a in range(10, 100) for b in range(2, 100)]
    kinds += [("minus", a, b, a - b) for a in range(10, 100) for b in range(2, a)]
    kinds += [("times", a, b, a * b) for a in range(2, 13) for b in range(2, 13)]
    drawn = random.Random(seed).sample(kinds, min(count, len(kinds)))  # noqa: S311
    return [(f"Q: What is {a} {word} {b}?\nA:", f" {answer}") for word, a, b, answer in drawn]


def perplexity(model: Any, tokenizer: Any) -> float:
    """Of the neutral text that calibration uses."""
    losses, tokens = 0.0, 0
    with torch.no_grad():
        for text in PASSAGES:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(losses / tokens)


class Study:
    """The stages, and what is known of them."""

    def __init__(self, given: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.given, self.model, self.tokenizer = given, model, tokenizer
        self.file = Path(given.work) / "result.json"
        settings = {k: v for k, v in vars(given).items() if k not in ("work", "save", "device")}
        self.known: dict[str, Any] = {"settings": settings}
        if self.file.exists():
            self.known = json.loads(self.file.read_text("utf-8"))
            if self.known["settings"] != settings:
                raise SystemExit(f"{self.file} was made with other settings; name another folder")

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        """The result of a stage: from the file, or computed and kept."""
        if name not in self.known:
            started = time.monotonic()
            self.known[name] = run()
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            self.save()
        return self.known[name]

    def save(self) -> None:
        """Keep what is known; a file that is there stays whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.known, indent=1) + "\n", "utf-8")
        scratch.replace(self.file)

    # --- which heads ------------------------------------------------------------------------------------------------------

    def find(self) -> dict[str, Any]:
        """Path patching on half of the prompts that are answered rightly; knock-out on the other half."""
        model = last_tokens(self.model, self.tokenizer)
        every = contrasts(model)
        marks = right(model, [c for _, c in every])
        good = [pair for pair, mark in zip(every, marks, strict=True) if mark or self.given.any]
        if len(good) < 4:
            raise SystemExit(
                f"the model answers {sum(marks)} of {len(every)} prompts rightly: too few to look for heads (--any)"
            )
        random.Random(self.given.seed).shuffle(good)  # noqa: S311
        half, test = good[: len(good) // 2], [c for _, c in good[len(good) // 2 :]][: self.given.test]
        used = [c for _, c in half][: self.given.prompts]
        digits = {c.answer for _, c in every}
        found = path_effects(
            model, used, digits, progress=lambda i, n: print(f"\rpath patching {i}/{n}", end="", flush=True)
        )
        print()
        ranking = found.ranking()
        best = sorted(ranking, key=lambda head: -ranking[head])
        means = [z.mean(0) for z in self._outputs(model, [c.other for c in used])]
        curve: dict[str, Any] = {"0": {"found": statistics.mean(right(model, test))}}
        for k in self.given.knock_out:
            draws = [self._random(best, k, draw) for draw in range(self.given.draws)]
            curve[str(k)] = {
                "found": statistics.mean(right(model, test, knocked_out(best[:k], means))),
                "random": [statistics.mean(right(model, test, knocked_out(heads, means))) for heads in draws],
            }
        styles = {style: sum(s == style for s, _ in good) for style in TEMPLATES}
        return {
            "prompts": {"all": len(every), "right": sum(marks), "patched": len(used), "knocked out": len(test), "by style": styles},
            "heads": best, "change": {h: round(found.change[h], 4) for h in best[:60]},
            "relative": {h: round(found.relative[h], 4) for h in best[:60]}, "knock-out": curve,
        }  # fmt: skip

    def _outputs(self, model: LastTokens, prompts: Iterable[tuple[int, ...]]) -> list[Tensor]:
        begun = model.begin(list(prompts))
        return last_outputs(model, begun, range(len(begun)))

    def _random(self, best: Sequence[str], count: int, draw: int) -> list[str]:
        """Heads that are not among the best: as many, drawn from the others."""
        others = sorted(set(best) - set(best[: max(count, self.given.heads)]))
        return random.Random(100 * self.given.seed + draw).sample(others, min(count, len(others)))  # noqa: S311

    # --- tuning -----------------------------------------------------------------------------------------------------------

    def ranks(self, heads: Sequence[str]) -> dict[str, int]:
        """The rank with which all heads have about as many trainable numbers as the chosen ones."""
        tuned = tune.lora(self.model, list(heads), r=self.given.rank)
        budget = tune.report(tuned).trainable
        self.model = tuned.unload()
        stack = find_adapter(self.model).shape(self.model).parts["text"]
        wide = sum(h * d for h, d in zip(stack.num_heads, stack.head_dim, strict=True))
        each = 2 * (wide + stack.num_layers * self.model.config.hidden_size)
        return {"chosen": self.given.rank, "random": self.given.rank, "all": max(1, round(budget / each))}

    def measure(self, model: Any) -> dict[str, float]:
        """Exercises that nobody trains on, one-digit prompts, and the neutral text."""
        rows = exercises(self.given.exercises + self.given.steps * self.given.batch, self.given.seed)[
            : self.given.exercises
        ]
        size = self.given.batch
        batches = [encode(self.tokenizer, rows[i : i + size], self.model.device) for i in range(0, len(rows), size)]
        inner = getattr(model, "get_base_model", lambda: model)()
        ends = last_tokens(inner, self.tokenizer)
        return {
            "exercises": accuracy(model, batches), "one digit": statistics.mean(right(ends, [c for _, c in contrasts(ends)])),
            "perplexity": perplexity(model, self.tokenizer),
        }  # fmt: skip

    def tuned(self, name: str, heads: Any, rank: int, seed: int) -> dict[str, Any]:
        """One adapter: trained, measured, taken off again."""
        g = self.given
        rows = exercises(g.exercises + g.steps * g.batch, g.seed)[g.exercises :]
        batches = [
            encode(self.tokenizer, rows[i : i + g.batch], self.model.device)
            for i in range(0, len(rows) - g.batch + 1, g.batch)
        ]
        torch.manual_seed(seed)
        model = tune.lora(self.model, heads, r=rank)
        started = time.perf_counter()
        loss = train(model, batches, g.steps, g.lr)
        took = (time.perf_counter() - started) / g.steps
        tune.check(model)
        found = {
            "rank": rank, "trainable": tune.report(model).trainable, "loss": round(loss, 4), "ms per step": round(1000 * took, 1),
            **self.measure(model),
        }  # fmt: skip
        if g.save:
            tune.save(model, Path(g.work) / f"{name}-{seed}")
        self.model = model.unload()
        return found


def table(known: dict[str, Any]) -> list[str]:
    """What came out."""
    found, before, given = known["find"], known["untouched"], known["settings"]
    p = found["prompts"]
    about = (
        f"{given['model']}, float32, {known['device']}, torch {known['torch']}; {given['steps']} steps of {given['batch']} "
        f"exercises, {given['exercises']} others to test on, {given['seeds']} seeds (mean, lowest to highest)"
    )
    lines = [
        about, "",
        f"{p['right']} of {p['all']} one-digit prompts are answered rightly; heads found on {p['patched']} of them: "
        + " ".join(found["heads"][: known["settings"]["heads"]]),
        "", "| heads silenced | found | random, mean (lowest) |", "| --- | --- | --- |",
    ]  # fmt: skip
    for k, row in found["knock-out"].items():
        drawn = row.get("random")
        other = f"{statistics.mean(drawn):.1%} ({min(drawn):.1%})" if drawn else "-"
        lines.append(f"| {k} | {row['found']:.1%} | {other} |")
    lines += [
        "", "| tuned | rank | trainable | exercises | one digit | perplexity | loss |", "| --- | --- | --- | --- | --- | --- | --- |",
        f"| nothing | - | 0 | {before['exercises']:.1%} | {before['one digit']:.1%} | {before['perplexity']:.2f} | - |",
    ]  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, run in known.items():
        if key.startswith("tuned "):
            runs.setdefault(key.split()[1], []).append(run)
    for name, seeds in runs.items():
        cells = [f"{seeds[0]['rank']}", f"{seeds[0]['trainable']:,}"]
        for key, form in (
            ("exercises", "{:.1%}"),
            ("one digit", "{:.1%}"),
            ("perplexity", "{:.2f}"),
            ("loss", "{:.3f}"),
        ):
            values = [run[key] for run in seeds]
            spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append(f"| {name} heads | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """All stages, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=SHORT_NAME)
    parser.add_argument("--work", required=True, help="folder for what is done")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, steps and seeds")
    parser.add_argument("--prompts", type=int, default=100, help="prompts for path patching")
    parser.add_argument("--test", type=int, default=200, help="prompts for the knock-out")
    parser.add_argument("--knock-out", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--draws", type=int, default=5, help="draws of random heads for the knock-out")
    parser.add_argument("--heads", type=int, default=32, help="heads that are tuned")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--exercises", type=int, default=400, help="exercises that are kept for the test")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of prompts, exercises and random heads")
    parser.add_argument("--any", action="store_true", help="look for heads in prompts that are answered wrongly, too")
    parser.add_argument("--save", action="store_true", help="keep the adapters in the folder, too")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    if given.quick:
        given.prompts, given.test, given.steps, given.batch = 24, 80, 60, 8
        given.exercises, given.seeds, given.draws = 160, 2, 3

    from headpatch.commands.generate import load

    model, tokenizer = load(given.model, given.device, "float32")
    study = Study(given, model, tokenizer)
    heads = study.stage("find", study.find)["heads"]
    study.stage("untouched", lambda: study.measure(study.model))
    chosen = heads[: given.heads]
    ranks = study.stage("ranks", lambda: study.ranks(chosen))
    for seed in range(given.seeds):
        others = study._random(heads, len(chosen), 50 + seed)
        for name, which in (("chosen", chosen), ("random", others), ("all", "*.*")):
            key = f"tuned {name} {seed}"
            study.stage(key, lambda n=name, w=which, s=seed: study.tuned(n, w, ranks[n], s))
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine() + " CPU"
    study.known |= {"device": f"{device}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    study.save()
    text = "\n".join(table(study.known)) + "\n"
    (Path(given.work) / "result.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
