"""What a query takes under the recipes that benchmarks/soft_injection.py has kept, and whether it is answered as was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine

import headpatch

__all__ = ["latency", "timings"]


def timings(kept_recipes: Mapping[str, Any], folder: Path, model: Any, tokenizer: Any, until: float) -> dict[str, Any]:
    """Of all recipes in `folder`, or of those that there is time for: at least of one task's."""
    device, done = model.device, []
    times: dict[str, list[float]] = {"zero-shot": [], "ICL": [], "function vector": [], "soft injection": []}
    same = {"function vector": [0, 0], "soft injection": [0, 0]}
    first: dict[str, list[float]] = {name: [] for name in times}
    for name, kept in kept_recipes.items():
        if done and time.monotonic() > until:
            break
        done.append(kept["tokens"])
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
    return {
        "dtype": str(model.dtype).removeprefix("torch."), "tokens generated": round(statistics.mean(done), 1), "tasks": len(done),
        "machine": machine(device),
        "first token, ms": {k: round(statistics.median(v), 2) for k, v in first.items() if v},
        "whole answer, ms": {k: round(statistics.median(v), 2) for k, v in times.items() if v},
        "answers as measured": {k: f"{a} of {b}" for k, (a, b) in same.items()},
    }  # fmt: skip


def latency(
    bench: Any, models: dict[str, tuple[Any, Any]], dtypes: Sequence[str], load: Callable[[str], tuple[Any, Any]], until: float
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
    """
    folder = bench.given.out.with_suffix(".recipes")
    for dtype in dict.fromkeys(dtypes):
        if "latency" in bench.data and time.monotonic() > until:
            break
        model, tokenizer = models.pop(dtype, None) or load(dtype)
        found = timings(bench.data["recipes"], folder, model, tokenizer, until)
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
