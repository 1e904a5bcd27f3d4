"""headpatch's half of the comparison with kvpress, the prompts for both, and the table: the commands stand in kvpress_side.py.

`prompts` writes token ids of needle prompts (five digits in a generated text, in the chat template), one long text, and the scores by
which both choose full heads: no text of anybody's, and nothing chosen on the needles. `measure` writes kvpress_side_cpu.json and .md.

In float32 on the CPU, one row at a time. Memory: storage of all tensors that a prompt and eight decoded tokens leave behind. Time: a
decoded token behind the long text, all policies of a side taking turns in one process; compare the ratios to the side's own untouched
model, for the two sides have different versions of transformers. At the same shares removed: half and three quarters of the KV heads
(duo_attention) or of the keys (all others).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvpress_measure as both
import torch
from bench_hf import twin
from common import RESULTS

import headpatch
from headpatch.demo_model import SHORT_NAME, locate
from headpatch.find.engine import load_model, open_bench
from headpatch.find.haystack import generated
from headpatch.find.loss import near_loss
from headpatch.find.needles import make_needle, needle_prompt, rng_of
from headpatch.find.passkeys import Passkeys
from headpatch.find.ranking import HeadScores, full_heads
from headpatch.find.stats import wilson
from headpatch.heads import to_selectors

SINK, RECENT = 16, 64
LENGTH, DEPTHS, PROMPTS, LONG = 384, (0.0, 0.25, 0.5, 0.75, 1.0), 6, 2048
SEED = 5


def prompts(name: str, path: Path) -> None:
    """Write what both sides are asked."""
    model, tokenizer = load_model(name, device="cpu")
    bench = open_bench(model, tokenizer)
    keys = Passkeys(shortest=300, longest=700, lengths=9, count=4, words=8, seed=0)
    scores = near_loss(model, tokenizer, keys, samples=4, sink=SINK, recent=RECENT)
    needles = []
    for depth in DEPTHS:
        for number in range(PROMPTS):
            rng = rng_of(SEED, LENGTH, depth, number)
            prompt = needle_prompt(bench, generated, make_needle("number", rng), LENGTH, depth, rng, chat=True)
            needles.append({"ids": list(prompt.hidden.ids), "answer": prompt.needle.answer, "depth": depth})
    rng = rng_of(SEED, "long")
    long = needle_prompt(bench, generated, make_needle("number", rng), LONG, 0.5, rng, chat=True)
    asked = {
        "model": name, "ends": sorted(bench.ends), "sink": SINK, "recent": RECENT, "long": list(long.hidden.ids), "needles": needles,
        "scores": [list(scores.values[layer]) for layer in sorted(scores.values)],
    }  # fmt: skip
    path.write_text(json.dumps(asked) + "\n")


class Running:
    """A prompt read by a model with a recipe on it, or without one."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.model, self.cache = model, None
        self.step_all(ids)

    def step(self, token: int) -> None:
        self.step_all([token])

    def step_all(self, ids: Sequence[int]) -> None:
        row = torch.tensor([list(ids)])
        out = self.model(input_ids=row, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, int(out.logits[0, -1].argmax())


def patches(asked: dict[str, Any], part: Any, length: int) -> dict[str, dict[str, Any]]:
    """Names as on kvpress's side."""
    made: dict[str, dict[str, Any]] = {}
    scores = HeadScores("", "kv", {n: tuple(row) for n, row in enumerate(asked["scores"])})
    sink, recent = asked["sink"], asked["recent"]
    for removed in both.REMOVED:
        stays = 1 - removed
        full = full_heads(scores, sparsity=removed)
        heads = list(to_selectors({n: dict.fromkeys(h, True) for n, h in full.items()}, part, "kv"))
        snap = {"ratio": stays, "window": both.WINDOW, "kernel": both.KERNEL, "pool": "avg"}
        made[f"duo_attention@{removed}"] = {
            "method": "duo_attention", "full_kv_heads": heads, "sink": sink, "recent": recent
        }  # fmt: skip
        made[f"streaming_llm@{removed}"] = {
            "method": "streaming_llm", "sink": sink, "recent": int(length * stays) - sink
        }  # fmt: skip
        made[f"snapkv@{removed}"] = {"method": "snapkv", **snap}
        made[f"ada_kv@{removed}"] = {"method": "ada_kv", **snap, "safeguard": both.SAFEGUARD}
    return made


def ours(asked: dict[str, Any], quick: bool) -> dict[str, Any]:
    """One twin of the model, on the same weights, for each recipe; streaming_llm's window goes by the prompt's length."""
    model, tokenizer = load_model(asked["model"], device="cpu")
    part = open_bench(model, tokenizer).shape.parts["text"]

    def begin(length: int) -> dict[str, both.Begin]:
        made: dict[str, both.Begin] = {"full": lambda ids: Running(model, ids)}
        for name, patch in patches(asked, part, length).items():
            patched = twin(model)
            headpatch.apply(patched, {"headpatch": 1, "patches": [patch]})
            made[name] = lambda ids, patched=patched: Running(patched, ids)
        return made

    long, short = begin(len(asked["long"])), begin(LENGTH)
    policies: dict[str, both.Begin] = {
        name: lambda ids, name=name: (long if len(ids) > LENGTH else short)[name](ids) for name in long
    }
    made = both.measure(policies, tokenizer, asked, quick)
    made["about"]["headpatch"] = importlib.metadata.version("headpatch")
    return made


def table(data: dict[str, Any]) -> list[str]:
    """As Markdown."""
    sides = {side: data[side] for side in ("headpatch", "kvpress")}
    sums, tokens = {side: both.summary(made) for side, made in sides.items()}, data["settings"]["tokens"]
    lines = ["# kvpress_side", ""]
    for side, made in sides.items():
        lines += [f"{side}: {', '.join(f'{k} {v}' for k, v in made['about'].items())}", ""]
    same = []
    for name in sums["kvpress"]:
        wrote = [made["policies"][name]["wrote"] for made in sides.values()]
        same.append(f"{name} {sum(a == b for a, b in zip(*wrote, strict=True))}")
    lines += [f"Prompts, of {len(wrote[0])}, to which both sides write the same text: {', '.join(same)}.", ""]
    columns = ("policy, share removed", "side", f"MiB after {tokens} tokens", "of untouched", "ms per token", "against untouched",
               "needles found")  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    for name in next(iter(sums.values())):
        for side, made in sums.items():
            p = made[name]
            e = wilson(sum(p["found"]), len(p["found"]))
            low, high = p["ms_interval"]
            ratio = f"{p['ratio']:.3f} ({p['ratio_interval'][0]:.3f} to {p['ratio_interval'][1]:.3f})"
            lines.append(
                f"| {name.replace('@', ', ')} | {side} | {p['bytes'] / 2**20:.1f} | {p['of_full']:.3f} | "
                f"{p['ms']:.1f} ({low:.1f} to {high:.1f}) | {ratio} | "
                f"{sum(p['found'])} of {e.rows} ({100 * e.low:.0f} to {100 * e.high:.0f} %) |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prompts")
    first.add_argument("--model", default=SHORT_NAME)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("measure")
    second.add_argument("prompts", type=Path)
    second.add_argument("--theirs", type=Path, required=True)
    second.add_argument("--note", help="about the machine, say, what else it did")
    third = commands.add_parser("table", help="again, from what was measured")
    for command in (second, third):
        command.add_argument("--out", type=Path, default=RESULTS)
    second.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.command == "prompts":
        prompts(locate(given.model), given.out)
        return
    path = given.out / "kvpress_side_cpu.json"
    if given.command == "measure":
        asked = both.read(given.prompts)
        settings = {k: asked[k] for k in ("sink", "recent", "scores")} | {"tokens": len(asked["long"]) + both.STEPS}
        sides = {"headpatch": ours(asked, given.quick), "kvpress": both.read(given.theirs)}
        path.write_text(json.dumps({"settings": settings, "note": given.note, **sides}) + "\n")
    data = both.read(path)
    lines = table(data) + (["", data["note"]] if data["note"] else [])
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
