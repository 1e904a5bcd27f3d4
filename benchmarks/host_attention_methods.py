"""What the attention methods ask of the host in a prompt: whole model over whole untouched model, with tensors of next to no size.

    python benchmarks/host_attention_methods.py                   # one CPU thread, some minutes
    python benchmarks/host_attention_methods.py --only act,var

A GPU reads a short prompt about as fast as Python can launch its kernels, so that the host decides what a method costs there. This
says so without a GPU: a LLaVA of 32 layers and 32 heads that are 8 wide, a prompt of 24 tokens, and the way that a GPU is sent for
small prompts, with headpatch's own kernels replaced by the time of their launches. What comes out is not what a GPU takes, but moves
as that does. Writes benchmarks/results/host_attention_methods.*.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attention_cases
import torch
from bench_hf import twin
from common import RESULTS, alternate, machine, write
from torch import Tensor

import headpatch
from headpatch.adapters.huggingface import cells, fused, segmentkeys, statistics

METHODS = ("pasta", "act", "var", "pai", "paint")
LENGTH, BEFORE, SPAN = 24, 4, (18, 20)


LAUNCHES = {"attend_segments": 39e-6, "extreme": 32e-6, "column_sums": 64e-6}
"""Seconds that headpatch's own kernels ask of the host: two measured beside an H100, the third for two launches like them."""


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Prompts are small and go to kernels, which take the time of their launches and give anything of the right shape."""

    def spending(name: str, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*given: Any) -> Tensor:
            end = time.perf_counter() + LAUNCHES[name]
            found = make(*given)
            while time.perf_counter() < end:
                pass
            return found

        return run

    def attended(q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])

    def summed(q: Tensor, k: Tensor, counted: Tensor, scale: float, heads: Tensor) -> Tensor:
        return q.new_zeros(q.shape[0], len(heads), k.shape[2])

    with contextlib.ExitStack() as stack:
        for module, name, stand_in in (
            (cells, "is_small", lambda call: True),
            (fused, "attends_segments", lambda *given: True),
            (fused, "attend_segments", spending("attend_segments", attended)),
            (statistics, "takes", lambda *given: True),
            (statistics, "column_sums", spending("column_sums", summed)),
            (segmentkeys, "extreme", spending("extreme", lambda x, *_: x.new_zeros(x.shape[:2], dtype=torch.bool))),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, comma-separated")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--turns", type=int, default=8, help="calls of a turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    device = torch.device("cpu")
    torch.set_num_threads(1)
    wide = {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 256}
    model = attention_cases.llava(device, torch.float32, given.seed, True, given.layers, **wide)
    config, image = model.config.text_config, model.config.image_token_id
    ids = torch.full((1, LENGTH), 5)
    ids[:, BEFORE : BEFORE + model.config.image_seq_length] = image
    side = model.config.vision_config.image_size
    prompt = {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side), "logits_to_keep": 1, "use_cache": True}
    patched, rows, layers = twin(model), [], given.layers
    with torch.no_grad(), as_on_a_gpu():
        for method in given.only.split(","):
            handle = headpatch.apply(patched, attention_cases.recipe(method, config))
            with handle.inputs(spans=[[SPAN]]) if method == "pasta" else contextlib.nullcontext():
                row = alternate(
                    f"{method}: prefill of {LENGTH} tokens, {layers} layers", lambda: model(**prompt), lambda: patched(**prompt),
                    device, warm=3, turns=given.turns, pairs=given.pairs,
                )  # fmt: skip
            handle.remove()
            row.notes = f"{1e3 * (row.patched - row.untouched) / layers:.0f} us a layer"
            rows.append(row)
    write("host_attention_methods", rows, {**machine(device), "seed": given.seed}, [], given.out)


if __name__ == "__main__":
    main()
