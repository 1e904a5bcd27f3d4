"""What the tests of fine-tuning share: adapters that look trained, training, and where heads lie, written down by hand."""

from __future__ import annotations

import torch
from torch import nn

import headpatch
from headpatch.tune.guard import restriction_of


def first_layer(entry):
    return next(iter(entry.parts[entry.main].modules))


def spoil(model, seed=0, scale=0.3):
    """Fill what the adapter trains with large random numbers, as if it had been trained hard."""
    g = torch.Generator().manual_seed(seed)
    restriction = restriction_of(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * scale)
    restriction.clear()
    return model


def seen(model, entry, layer, names=("q", "k", "v")):
    heads = entry.parts[entry.main].num_heads
    inputs = entry.make_inputs(batch=1)
    with torch.no_grad(), headpatch.observe(model, list(names), f"{layer}.*") as found:
        model(**inputs.kwargs)
    return {(name, h): found[name, f"{layer}.{h}"][0] for name in names for h in range(heads)}


def slices(entry, layer, heads, name):
    """Rows of q and columns of o of these heads, in each architecture's own storage; written down by hand."""
    d = {"qwen3": 32}.get(name, 16)
    at = torch.tensor([h * d + i for h in heads for i in range(d)])
    if name == "gpt_neox":
        rows = torch.tensor([h * 3 * d + i for h in heads for i in range(d)])
        return {f"gpt_neox.layers.{layer}.attention.query_key_value.weight": (0, rows),
                f"gpt_neox.layers.{layer}.attention.dense.weight": (1, at)}  # fmt: skip
    if name == "gpt2":
        return {
            f"transformer.h.{layer}.attn.c_attn.weight": (1, at),
            f"transformer.h.{layer}.attn.c_proj.weight": (0, at),
        }
    stem = f"model.layers.{layer}.self_attn"
    if name == "qwen3_next":
        rows = torch.tensor([h * 2 * d + i for h in heads for i in range(2 * d)])
        return {f"{stem}.q_proj.weight": (0, rows), f"{stem}.o_proj.weight": (1, at)}
    fused = "qkv_proj" if name == "phi3" else "q_proj"
    return {f"{stem}.{fused}.weight": (0, at), f"{stem}.o_proj.weight": (1, at)}


def train(model, entry, steps=6, accumulate=1, optimizer=None, clip=1.0, loss=None):
    """AdamW with weight decay, on random tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(trained) if optimizer else torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    model.train()
    for step in range(steps * accumulate):
        inputs = entry.make_inputs(batch=2, seed=step).kwargs
        found = model(**inputs, labels=inputs["input_ids"]).loss / accumulate
        found.backward()
        if (step + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(trained, clip)
            opt.step()
            opt.zero_grad()
    return model.eval()
