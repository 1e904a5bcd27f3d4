"""What the attention methods ask of the host in a prompt: whole model over whole untouched model, with tensors of next to no size.

    python benchmarks/host_attention_methods.py                   # one CPU thread, some minutes
    python benchmarks/host_attention_methods.py --only act,var

A GPU reads a short prompt about as fast as Python can launch its kernels, so that the host decides what a method costs there. This
says so without a GPU: a LLaVA of 32 layers and 32 heads that are 8 wide, a prompt of 24 tokens, and the way that a GPU is sent for
small prompts. What comes out is not what a GPU takes, but moves as that does. Writes benchmarks/results/host_attention_methods.*.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import attention_cases
import torch
from bench_hf import twin
from common import RESULTS, alternate, machine, write

import headpatch
from headpatch.adapters.huggingface import cells

METHODS = ("pasta", "act", "var", "pai", "paint")
LENGTH, BEFORE, SPAN = 24, 4, (18, 20)


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
    # As on a GPU: what is small there is.
    with torch.no_grad(), mock.patch.object(cells, "is_small", return_value=True):
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
