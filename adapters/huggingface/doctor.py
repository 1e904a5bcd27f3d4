"""What `headpatch doctor` asks of this engine: versions, and a tiny model to try edits on."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["specimen", "versions"]

PACKAGES = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "accelerate",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "lm_eval",
)


def versions() -> dict[str, str | None]:
    """Versions of the packages that this engine is made of or works with; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def specimen(device: str = "cpu") -> tuple[Any, Callable[..., Tensor]]:
    """A tiny Llama with random weights, and a function that runs it on 12 fixed tokens and gives its logits [1, 12, 64].

    The function takes a number of tokens that come in one call, the rest then token by token through a cache; default: all. The
    random state of the process is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().to(device)
        ids = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.randint(2, 64, (1, 11))], 1).to(device)

    def run(prompt: int = ids.shape[1]) -> Tensor:
        cache, found = None, []
        with torch.no_grad():
            for i, j in itertools.pairwise((0, *range(prompt, ids.shape[1] + 1))):
                out = model(ids[:, i:j], past_key_values=cache)
                cache = out.past_key_values
                found.append(out.logits)
        return torch.cat(found, 1)

    return model, run
