"""Models for measurements of KV caches, and what the arithmetic says about them."""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any

__all__ = ["bandwidth", "cache_bytes", "policy", "randomise", "tiny_model", "weight_bytes"]


def policy(config: dict[str, Any], full: int, sink: int, recent: int) -> dict[str, Any]:
    """A recipe: the first `full` KV heads of every layer keep everything."""
    heads = [] if full == 0 else [f"*.0-{full - 1}"]
    name = "duo_attention" if heads else "streaming_llm"
    listed = {"full_kv_heads": heads} if heads else {}
    return {"headpatch": 1, "patches": [{"method": name, "sink": sink, "recent": recent, **listed}]}


def tiny_model(folder: Path) -> Path:
    """A model of the 8B shape's kind with small numbers in it, and random weights."""
    import transformers
    from bench_vllm import llama_8b

    llama_8b(folder)
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.update({
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 32,
        "vocab_size": 512, "max_position_embeddings": 4096, "dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
    })  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def randomise(model: Any) -> None:
    """Weights by which attention matters: dummy ones are so small that nothing does. The same for every engine."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
                size = 2.0 if "q_proj" in name or "k_proj" in name or "qkv" in name else 1.0
                weight.normal_(0.0, size / weight.shape[1] ** 0.5, generator=generator)


def weight_bytes(config: dict[str, Any], width: int) -> int:
    """Bytes of weights that a decoding step reads: everything but the table of embeddings."""
    d, kv = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    q = config["num_attention_heads"] * config["head_dim"]
    layer = 2 * d * q + 2 * d * kv + 3 * d * config["intermediate_size"]
    return width * (config["num_hidden_layers"] * layer + d * config["vocab_size"])


def cache_bytes(config: dict[str, Any], width: int, tokens: int, full: int | None, keep: int) -> int:
    """Bytes of keys and values of one row; `full` None: every head keeps everything."""
    heads = config["num_key_value_heads"]
    kept = heads * tokens if full is None else full * tokens + (heads - full) * min(tokens, keep)
    return int(2 * width * config["head_dim"] * config["num_hidden_layers"] * kept)


def bandwidth(device: str) -> float:
    """Bytes a second of a copy, read and written."""
    import torch

    size = 2**30 if device == "cuda" else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size / min(times)
