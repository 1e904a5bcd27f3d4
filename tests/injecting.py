"""What the tests of injected tasks share: recipes with arrays of random vectors, and the edit written out on head outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from naive import Call
from torch import Tensor

import headpatch

__all__ = ["ALPHA", "injected", "task", "vectors"]

ALPHA = {"0.1": 0.3, "0.2": 1.0, "1.0": 0.05, "1.3": 0.8}


def vectors(
    heads: Sequence[str], word: str = "t", seed: int = 0, width: int = 16, scale: float = 1.0
) -> dict[str, Tensor]:
    """Random arrays, one per head, by their names in a recipe's file."""
    g = torch.Generator().manual_seed(seed)
    return {f"{word}.{head}": torch.randn(width, generator=g) * scale for head in heads}


def task(
    strengths: Mapping[str, float] = ALPHA, arrays: Mapping[str, Tensor] | None = None, *, method: str = "soft_injection",
    more: Sequence[dict[str, Any]] = (), seed: int = 0, width: int = 16, **parameters: Any,
) -> headpatch.Recipe:  # fmt: skip
    """A recipe of one injected task, its arrays in memory."""
    word = "t" if method == "soft_injection" else "v"
    found = vectors(list(strengths), word, seed, width) if arrays is None else dict(arrays)
    data = safetensors.torch.save(found)
    recipe = {
        "headpatch": 1,
        "patches": [{"method": method, "heads": dict(strengths), **parameters}, *more],
        "tensors": {"file": "task.safetensors", "sha256": hashlib.sha256(data).hexdigest()},
    }
    return headpatch.Recipe.from_dict(recipe, arrays=data)


def injected(
    strengths: Mapping[str, float],
    arrays: Mapping[str, Tensor],
    ends: Tensor,
    *,
    add: bool = False,
    stays: bool = False,
) -> Callable[[int], Callable[[Call], Tensor]]:
    """The edit of one layer's calls in turn: row b at column ends[b], and (`stays`) at all later ones. float64, row by row."""

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        done = [0]

        def edit(call: Call) -> Tensor:
            out = call.out()
            columns = range(done[0], done[0] + out.shape[1])
            done[0] = columns.stop
            for b, end in enumerate(ends.tolist()):
                for i, column in enumerate(columns):
                    if column != end and not (stays and column > end):
                        continue
                    for head, strength in strengths.items():
                        at, h = map(int, head.split("."))
                        if at == layer:
                            v = arrays[f"{'v' if add else 't'}.{head}"].double()
                            o = out[b, i, h]
                            out[b, i, h] = o + strength * v if add else (1 - strength) * o + strength * v
            return out

        return edit

    return of_layer
