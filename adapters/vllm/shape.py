"""Heads of the model that a vLLM config describes, known before any weight is loaded.

The workers compare every attention layer they build with this, so a model that is unlike its config stops the start.
"""

from __future__ import annotations

from typing import Any

from headpatch.errors import UnsupportedModelError
from headpatch.heads import ModelShape, PartShape

__all__ = ["model_shape"]

LINEAR = ("mamba", "linear", "recurrent", "conv", "ssm", "rwkv", "deltanet")


def model_shape(model_config: Any) -> ModelShape:
    """Heads of the language model.

    Parameters
    ----------
    model_config
        vLLM's ModelConfig.

    Raises
    ------
    UnsupportedModelError
        The config does not say how many heads there are.
    """
    text = model_config.hf_text_config
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _first(text, "num_attention_heads", "n_head", "n_heads", "num_heads")
    if layers is None or heads is None:
        raise UnsupportedModelError(f"vllm: the config of {model_config.model} does not name its layers and heads")
    kv = _first(text, "num_key_value_heads", "n_head_kv", "num_kv_heads")
    if kv is None or isinstance(kv, int):
        kv = int(model_config.get_total_num_kv_heads())
    kinds = _first(text, "layer_types", "layers_block_type") or ["attention"] * layers
    softmax = [not any(word in str(kind).lower() for word in LINEAR) for kind in kinds]
    if len(softmax) != layers:
        softmax = [True] * layers
    dim = int(model_config.get_head_size())
    counts = [_at(heads, i) if softmax[i] else 0 for i in range(layers)]
    part = PartShape(
        num_heads=tuple(counts),
        num_kv_heads=tuple(_at(kv, i) if n else 0 for i, n in enumerate(counts)),
        head_dim=tuple(dim if n else 0 for n in counts),
    )
    return ModelShape(
        str(getattr(model_config.hf_config, "model_type", "")), {"text": part}, "text", model_config.model
    )


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _number(config: Any, *names: str) -> int | None:
    value = _first(config, *names)
    return int(value) if value is not None else None


def _at(value: Any, layer: int) -> int:
    return int(value) if isinstance(value, int) else int(value[layer])
