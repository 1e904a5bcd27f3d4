"""Long padded prompts, attended row by row without a mask: exact, only where the mask is padding and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import close, expected, forward, patched, recipes, tolerance
from test_exactness import one_thread
from zoo import ZOO

from headpatch.adapters.huggingface import mass, rows
from headpatch.adapters.huggingface.masks import causal_ranges

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [14, 9, 5]
NAMES = ("llama", "qwen3", "phi3", "gpt2", "gpt_neox", "mistral", "gemma2", "gemma3")


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of the zoo's length count as long; the rows of every call that takes the way are noted."""
    seen: list[int] = []
    inner = mass._row_by_row

    def noted(call: Any, ranges: Any, *args: Any) -> Any:
        seen.append(len(ranges))
        return inner(call, ranges, *args)

    monkeypatch.setattr(rows, "LONG", 4)
    monkeypatch.setattr(mass, "_row_by_row", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str, side: str, dtype: torch.dtype, row_by_row: list[int]) -> None:
    entry = ZOO[name]
    inputs, applied = entry.make_inputs(lengths=LENGTHS, padding_side=side), recipes(entry, "stacked", seed=3)
    with patched(entry, dtype, "sdpa", applied) as model:
        close(
            forward(model, inputs), expected(entry, inputs, applied, "sdpa"), inputs, tolerance(entry, dtype, "sdpa")
        )
    assert all(n == len(LENGTHS) for n in row_by_row)
    assert bool(row_by_row) == (name != "mistral")  # all of its layers have a window, shorter than these prompts


def test_the_short_stay_as_they_were() -> None:
    assert rows.LONG > 256


def mask_of(real: torch.Tensor) -> torch.Tensor:
    """[b, 1, n, n]: causal among real tokens; padding rows see everything, as some versions have it."""
    n = real.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return ((causal & real[:, None]) | ~real[:, :, None])[:, None]


@pytest.mark.parametrize("room", [0, 7])
def test_ranges(room: int) -> None:
    real = torch.zeros(3, 1500, dtype=torch.bool)
    real[0, 100:] = real[1, :1200] = real[2, 30:700] = True
    mask = torch.cat([mask_of(real), torch.zeros(3, 1, 1500, room, dtype=torch.bool)], -1)
    assert causal_ranges(mask, real) == [(100, 1500), (0, 1200), (30, 700)]


@pytest.mark.parametrize("spoil", ["window", "future", "hole", "empty", "room", "float", "packed"])
def test_anything_else_is_not_padding(spoil: str) -> None:
    real = torch.zeros(2, 40, dtype=torch.bool)
    real[0, 5:] = real[1, :] = True
    mask = torch.cat([mask_of(real), torch.zeros(2, 1, 40, 3, dtype=torch.bool)], -1)
    if spoil == "window":
        mask[:, :, 39, :10] = False
    elif spoil == "future":
        mask[1, 0, 20, 21] = True
    elif spoil == "hole":
        real[0, 20] = False
    elif spoil == "empty":
        real[0] = False
    elif spoil == "room":
        mask[0, 0, 39, 41] = True
    elif spoil == "float":
        mask = mask.float()
    else:
        mask[1, 0, 20:, :20] = False
    assert causal_ranges(mask, real) is None
