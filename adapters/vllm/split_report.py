"""What cutting the cache is worth: room for tokens as the engine counts it, and blocks that requests hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headpatch.adapters.vllm.worker import Worker

__all__ = ["capacity"]


def capacity(worker: Worker, kv_cache_config: Any) -> dict[str, Any]:
    """Room in a worker's cache, counted as vLLM counts it: requests of ``max_model_len`` that fit at once, in tokens.

    Returns
    -------
    dict
        ``blocks`` of the pool and ``block_bytes`` of each over all layers; per group ``kind``, ``block_size`` (tokens), ``layers``,
        and ``per_request``: the most blocks that a request of full length holds; ``tokens``, and ``unsplit_tokens`` that the same
        memory would hold if every head kept everything; ``split``, in words.
    """
    config = worker.vllm_config
    groups: list[dict[str, Any]] = []
    longest, block_bytes = int(config.model_config.max_model_len), 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        page = int(spec.page_size_bytes)
        block_bytes = max(block_bytes, page * len(group.layer_names))
        groups.append(
            {
                "kind": "window" if hasattr(spec, "sink_tokens") else "full", "block_size": int(spec.block_size),
                "layers": len(group.layer_names), "per_request": -(-int(spec.max_memory_usage_bytes(config)) // page),
            }
        )  # fmt: skip
    blocks = int(kv_cache_config.num_blocks)
    part, split = worker.shape.parts[worker.shape.main], worker.armed.split
    assert split is not None
    size = int(config.cache_config.block_size)
    width = worker.layers[0].cache().element_size() * 2
    uncut = sum(part.num_kv_heads[layer] // split.world * part.head_dim[layer] for layer in split.full) * width * size
    return {
        "blocks": blocks, "block_bytes": block_bytes, "groups": groups,
        "tokens": int(blocks / sum(g["per_request"] for g in groups) * longest),
        "unsplit_tokens": int(blocks * block_bytes // uncut / -(-longest // size) * longest), "split": split.describe(),
    }  # fmt: skip
