"""kvpress's half of the comparison, in an environment of its own (it needs transformers < 5.3 and does not import headpatch):

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5 torch==2.13.0
    python benchmarks/kvpress_ours.py prompts --out PROMPTS.json                     # headpatch's environment, as are the next two
    OMP_NUM_THREADS=1 kvpress-env/bin/python benchmarks/kvpress_side.py PROMPTS.json --out THEIRS.json
    OMP_NUM_THREADS=1 python benchmarks/kvpress_ours.py measure PROMPTS.json --theirs THEIRS.json

Presses act as in kvpress's own pipeline: on while the prompt is read, positions of later tokens go on from the prompt's length. The
question is part of the prompt. DuoAttentionPress downloads its heads for six models; here they, and the window, come from the file of
prompts: its way of loading is replaced, nothing else. A press marks masked keys on the modules; they are put back before each step,
so that several caches can take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvpress_measure
import numpy as np
import torch
from kvpress import AdaKVPress, DuoAttentionPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

MASKED = "masked_key_indices"


class Running:
    """A prompt read under a press (None: none)."""

    def __init__(self, model: Any, press: Any, ids: Sequence[int]) -> None:
        self.model, self.cache, self.position = model, DynamicCache(), len(ids)
        self.layers = [layer.self_attn for layer in model.model.layers]
        self._put([None] * len(self.layers))
        with press(model) if press else contextlib.nullcontext():
            self.token = self._read(ids, 0)
        self.masked = [getattr(layer, MASKED, None) for layer in self.layers]

    def step(self, token: int) -> None:
        self._put(self.masked)
        self.token = self._read([token], self.position)
        self.position += 1

    def _read(self, ids: Sequence[int], start: int) -> int:
        positions = torch.arange(start, start + len(ids))[None]
        out = self.model(
            input_ids=torch.tensor([list(ids)]), past_key_values=self.cache, position_ids=positions, use_cache=True, logits_to_keep=1
        )  # fmt: skip
        return int(out.logits[0, -1].argmax())

    def _put(self, masked: list[Any]) -> None:
        for layer, value in zip(self.layers, masked, strict=True):
            setattr(layer, MASKED, value)


def presses(asked: dict[str, Any]) -> dict[str, Any]:
    """Names as on our side."""
    made: dict[str, Any] = {"full": None}
    for removed in kvpress_measure.REMOVED:
        duo = DuoAttentionPress(head_compression_ratio=removed)
        scores = np.array(asked["scores"])
        duo.load_attention_pattern = lambda model, scores=scores: (asked["sink"], asked["recent"], scores)
        snap = {"window_size": kvpress_measure.WINDOW, "kernel_size": kvpress_measure.KERNEL}
        made[f"duo_attention@{removed}"] = duo
        made[f"streaming_llm@{removed}"] = StreamingLLMPress(removed, n_sink=asked["sink"])
        made[f"snapkv@{removed}"] = SnapKVPress(removed, **snap)
        made[f"ada_kv@{removed}"] = AdaKVPress(SnapKVPress(removed, **snap), alpha_safeguard=kvpress_measure.SAFEGUARD)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", help="folder or name; default: the one that PROMPTS.json was made with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    asked = kvpress_measure.read(given.prompts)
    name = given.model or asked["model"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    def begin(press: Any) -> kvpress_measure.Begin:
        return lambda ids: Running(model, press, ids)

    policies = {name: begin(press) for name, press in presses(asked).items()}
    made = kvpress_measure.measure(policies, tokenizer, asked, given.quick)
    made["about"]["kvpress"] = importlib.metadata.version("kvpress")
    given.out.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
