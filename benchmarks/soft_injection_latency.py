"""What a query takes under the recipes that benchmarks/soft_injection.py has kept, and whether it is answered as was measured.

    python benchmarks/soft_injection_latency.py RESULT.json [--device cpu] [--rounds 2]

adds this to a result whose run had no time for it, from the recipes beside it; the machine may be another one, and is named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import interval, machine
from soft_injection_parts import write_whole
from soft_injection_report import report

import headpatch
from headpatch.commands.generate import load as load_model
from headpatch.demo_model import SHORT_NAME

__all__ = ["latency", "timings"]


WAYS = {
    "zero-shot": ("zero", None),
    "ICL": ("few", None),
    "function vector": ("zero", "fv"),
    "soft injection": ("zero", "soft"),
}
"""By method, the kept prompts that it is asked with, and the recipe that is applied."""


def timings(
    kept_recipes: Mapping[str, Any], folder: Path, model: Any, tokenizer: Any, until: float, rounds: int = 1
) -> dict[str, Any]:
    """Of all recipes in `folder`, or of those that there is time for: at least of one task's.

    Each query is asked in all ways in turn, in another order each time: what else a machine does falls on all of them alike, and the
    ratios are of calls that stood side by side.
    """
    device, done, load = model.device, [], []
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    same = {
        way: [0, 0] for way, (_, recipe) in WAYS.items() if recipe and all(recipe in k for k in kept_recipes.values())
    }

    def asked(inputs: Any, tokens: int) -> tuple[float, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), out

    for name, kept in kept_recipes.items():
        if done and time.monotonic() > until:
            break
        done.append(kept["tokens"])
        turn = 0
        for i in range(len(kept["zero"])):
            for again in range(rounds):
                turn += 1
                for way in [*WAYS][turn % len(WAYS) :] + [*WAYS][: turn % len(WAYS)]:
                    prompts, recipe = WAYS[way]
                    inputs = tokenizer(kept[prompts][i], return_tensors="pt").to(device)
                    handle = headpatch.apply(model, str(folder / f"{name}-{recipe}.yaml")) if recipe else None
                    asked(
                        inputs, 2
                    )  # the first call behind an application, or another length, is not what is measured
                    first[way].append(asked(inputs, 1)[0])
                    took, out = asked(inputs, kept["tokens"])
                    times[way].append(took)
                    if handle is not None:
                        handle.remove()
                    if way in same and not again:
                        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                        same[way][0] += said_alike(text, kept[recipe][i])
                        same[way][1] += 1
            load.append(os.getloadavg()[0])

    def against(base: str) -> dict[str, list[float]]:
        """Median of the ratios of paired calls, and its interval."""
        found = {}
        for way in WAYS:
            ratios = [a / b for a, b in zip(times[way], times[base], strict=True)]
            if way != base:
                found[way] = [round(x, 3) for x in (statistics.median(ratios), *interval(ratios))]
        return found

    return {
        "dtype": str(model.dtype).removeprefix("torch."), "tokens generated": round(statistics.mean(done), 1), "tasks": len(done),
        "calls": len(times["ICL"]), "machine": {**machine(device), "load": round(statistics.mean(load), 1)},
        "first token, ms": {k: round(statistics.median(v), 2) for k, v in first.items()},
        "whole answer, ms": {k: round(statistics.median(v), 2) for k, v in times.items()},
        "whole answer / zero-shot": against("zero-shot"), "whole answer / ICL": against("ICL"),
        "answers as measured": {k: f"{a} of {b}" for k, (a, b) in same.items()},
    }  # fmt: skip


def latency(
    bench: Any, models: dict[str, tuple[Any, Any]], dtypes: Sequence[str], load: Callable[[str], tuple[Any, Any]], until: float,
    rounds: int = 1,
) -> None:  # fmt: skip
    """Add to the result what kept recipes take, in the first dtype and in others that there is time for.

    Parameters
    ----------
    bench
        Has `data`, the result, `given.out` and `save`.
    models
        What is loaded already, by dtype.
    load
        Gives a model and its tokenizer in a dtype.
    until
        Time of time.monotonic() after which no other task or dtype is begun.
    rounds
        How often each query is asked.
    """
    folder = bench.given.out.with_suffix(".recipes")
    for dtype in dict.fromkeys(dtypes):
        if "latency" in bench.data and time.monotonic() > until:
            break
        model, tokenizer = models.pop(dtype, None) or load(dtype)
        found = timings(bench.data["recipes"], folder, model, tokenizer, until, rounds)
        if "latency" in bench.data:
            bench.data.setdefault("latency in other dtypes", []).append(found)
        else:
            bench.data["latency"] = found
        bench.save()
    # Questions and answers of the data stay out of the result file.
    bench.data["recipes"] = {
        name: {"queries": len(kept["zero"]), "tokens": kept["tokens"]} for name, kept in bench.data["recipes"].items()
    }
    bench.save()


def said_alike(text: str, kept: str) -> int:
    return int(text.partition("\n")[0].startswith(kept.partition("\n")[0]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=1, help="how often each query is asked")
    given = parser.parse_args(arguments)
    data = json.loads(given.result.read_text("utf-8"))
    if not data["recipes"] or not all("zero" in kept for kept in data["recipes"].values()):
        sys.exit(f"{given.result} holds no queries: it had no recipes kept, or they have been timed already")
    bench = SimpleNamespace(
        data=data, given=SimpleNamespace(out=given.result), save=lambda: write_whole(given.result, data)
    )
    latency(
        bench, {}, given.dtype, lambda dtype: load_model(given.model, given.device, dtype), float("inf"), given.rounds
    )
    report(given.result)


if __name__ == "__main__":
    main()
