"""Decoding under torch.compile(fullgraph=True) with a static cache that a prompt with a picture filled: every method of attention
and vision does what it does in eager, in one graph.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from compat import one_thread, silent
from method_cases import inputs_of
from torch import Tensor
from transformers import StaticCache
from zoo import ZOO

import headpatch

__all__ = ["one_thread", "silent"]

STEPS = 3
ALONG = ("input_ids", "attention_mask", "position_ids")
RECIPES: dict[str, dict[str, Any]] = {
    "act": {"heads": {"*.0": 0.2, "*.3": 0.5}, "threshold": 0.08},
    "pasta": {"heads": {"*.0": 0.1, "*.3": 0.5}},
    "pasta_target": {"method": "pasta", "heads": {"*.0-3": 0.1}, "target_mass": 0.6},
    "var": {"heads": {"*.*": 0.5}, "sink_dimensions": [1, 5], "sink_threshold": 1.4,
            "min_visual_mass": 0.0, "min_nonsink_ratio": 0.0},
    "vhr": {"heads": {"*.*": 2.0}},
    "pai": {"heads": {"*.0": 0.5, "*.2": 1.5}},
    "paint": {"heads": {"*.1": 1.0, "*.2": 2.0}},
    "image_bias": {"heads": {"*.0": 1.5, "*.2": -3.0}},
}  # fmt: skip


class Graphs:
    """A compiler backend that counts the graphs it gets, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def decoded(model: Any, step: Any, inputs: Any, room: int) -> Tensor:
    """Logits of steps after a prompt that generate() read, the mask made outside as it makes it."""
    given = {k: v for k, v in inputs.kwargs.items() if v is not None}
    prompt = {k: v[:, : inputs.prompt] if k in ALONG else v for k, v in given.items()}
    cache = StaticCache(config=model.config.text_config, max_cache_len=room)
    model.generate(**prompt, max_new_tokens=1, do_sample=False, past_key_values=cache)
    real = prompt.get("attention_mask", torch.ones_like(prompt["input_ids"])).bool()
    found = []
    for i in range(STEPS):
        seen = torch.nn.functional.pad(real, (0, i + 1), value=True)
        mask = torch.nn.functional.pad(seen, (0, room - seen.shape[1]), value=False)[:, None, None]
        token = given["input_ids"][:, inputs.prompt + i : inputs.prompt + i + 1]
        position = (real.sum(-1, keepdim=True) + i).long()
        found.append(step(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_compiled_step_is_an_eager_one(name, padding):
    torch.compiler.reset()
    inputs = inputs_of("llava", padding)
    model = ZOO["llava"].build(torch.float64)
    with torch.no_grad():
        plain = decoded(model, model, inputs, inputs.prompt + 8)
    handle = headpatch.apply(model, {"headpatch": 1, "patches": [{"method": name, **RECIPES[name]}]})
    spans = handle.inputs(spans=[[(1, 3)]] * 3) if "pasta" in name else contextlib.nullcontext()
    with torch.no_grad(), spans:
        eager, graphs = decoded(model, model, inputs, inputs.prompt + 8), Graphs()
        run = torch.compile(model, fullgraph=True, dynamic=False, backend=graphs)
        found = decoded(model, run, inputs, inputs.prompt + 8)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-9)
    assert graphs.count == 1
    assert (eager - plain).abs().max() > 1e-4, "the edit does nothing"
