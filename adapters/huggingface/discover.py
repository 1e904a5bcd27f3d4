"""Where the attention heads of a transformers model are, without per-model code.

An attention module *routes* when its forward looks its kernel up in transformers' own table (``ALL_ATTENTION_FUNCTIONS``) by the
name in ``self.config``: that table is the seam this adapter uses. Modules that do not route are reported by name.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.heads import ModelShape, PartShape

__all__ = ["Attention", "Layout", "find_layout", "layout_of_config", "output_projection", "unwrap"]

CROSS = re.compile(r"encoder_attn|EncDecAttention|cross_?att", re.IGNORECASE)
VISION = re.compile(r"(^|[._])(vision|visual|image|vit)", re.IGNORECASE)
CLASS_TOKENS = {"class_embedding", "cls_token"}
ONE_BY_ONE = {"llava", "vipllava"}
"""Model types whose image tokens each stand for one patch; others pool patches, cut pictures into tiles or add tokens."""
STRATEGY = "vision_feature_select_strategy"
AUDIO = re.compile(r"(^|[._])(audio|speech)", re.IGNORECASE)


@dataclass
class Attention:
    """One attention module that routes.

    Attributes
    ----------
    path, module, part, layer
        Its name in the model, the module, the attention stack and the 0-based layer.
    stack_path, stack
        The innermost PreTrainedModel around it: the one whose forward receives the model-level mask.
    num_heads, num_kv_heads, head_dim
        Query heads, KV heads, width of one head's output.
    features
        What operands may be refused for: ``position_bias``, ``implementation_branch``, ``sharded``.
    """

    path: str
    module: nn.Module
    part: str
    layer: int
    stack_path: str
    stack: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    features: tuple[str, ...]


@dataclass
class Layout:
    """All attention modules of a model: those that route, by (part, layer), and the names of those that do not."""

    root: nn.Module
    attention: dict[tuple[str, int], Attention]
    silent: tuple[str, ...]
    shape: ModelShape


def unwrap(obj: Any) -> nn.Module:
    """The transformers model inside a pipeline, a PeftModel, a compiled module or another wrapper.

    Raises UnsupportedModelError where there is none.
    """
    from transformers import PreTrainedModel

    seen = obj
    for _ in range(8):
        if isinstance(seen, PreTrainedModel):
            return seen
        inner = next(
            (
                getattr(seen, name)
                for name in ("_orig_mod", "base_model", "module", "model")
                if isinstance(seen.__dict__.get(name) or getattr(seen, "_modules", {}).get(name), nn.Module)
                or (name == "model" and isinstance(getattr(seen, name, None), nn.Module))
            ),
            None,
        )
        if inner is None:
            break
        seen = inner
    raise UnsupportedModelError(f"found no transformers model in a {type(obj).__qualname__}; give the model itself")


def find_layout(root: nn.Module) -> Layout:
    """Resolve every attention module of `root`.

    Raises
    ------
    UnsupportedModelError
        No module routes, or two stacks of the model claim the same part.
    """
    from transformers import PreTrainedModel

    stacks: dict[str, nn.Module] = {n: m for n, m in root.named_modules() if isinstance(m, PreTrainedModel)}
    found: dict[tuple[str, int], Attention] = {}
    silent: list[str] = []
    owner: dict[str, str] = {}
    lengths: dict[str, int] = {}
    for path, module in root.named_modules():
        if not _routes(module):
            if "attention" in type(module).__name__.lower() and not isinstance(module, PreTrainedModel):
                silent.append(path)
            continue
        stack_path = max((s for s in stacks if s == "" or path.startswith(f"{s}.")), key=len, default="")
        stack = stacks.get(stack_path, root)
        part = _part(root, stack, path, module)
        if owner.setdefault(part, stack_path) != stack_path:
            raise UnsupportedModelError(
                f"{type(root).__name__} has several {part} stacks ({owner[part]}, {stack_path}); apply to one of them"
            )
        layer, depth = _layer(root, stack_path, path)
        while (part, layer) in found:  # nested stages (swin, segformer): number the layers in order
            layer = max(index for p, index in found if p == part) + 1
        lengths[part] = max(lengths.get(part, 0), depth, layer + 1)
        heads, kv = _head_counts(module)
        dim = _head_dim(module, heads)
        found[part, layer] = Attention(
            path, module, part, layer, stack_path, stack, heads, kv, dim, _features(root, module, part)
        )
    if not found:
        raise UnsupportedModelError(
            f"{type(root).__name__}: no attention module uses transformers' attention interface"
            + (f" (own softmax: {', '.join(silent[:4])})" if silent else "")
            + "; only models that do can be patched"
        )
    for where in found.values():
        if "no_image_tokens" not in where.features:
            where.features += _patch_features(root, found)
    paths = tuple(a.path for a in found.values())
    silent = [s for s in silent if not any(p.startswith(f"{s}.") or s.startswith(f"{p}.") for p in paths)]
    return Layout(root, found, tuple(silent), _shape(root, found, lengths))


def layout_of_config(config: Any) -> Layout:
    """The layout of the model that `config` describes, built without weights (on the meta device)."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            return find_layout(AutoModel.from_config(config))
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers builds no model from a {type(config).__name__}: {error}") from error


def _routes(module: nn.Module) -> bool:
    names = _code(module).co_names if _code(module) else ()
    return "ALL_ATTENTION_FUNCTIONS" in names and hasattr(getattr(module, "config", None), "_attn_implementation")


def _code(module: nn.Module) -> Any:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _part(root: Any, stack: Any, path: str, module: nn.Module) -> str:
    parts = path.split(".")
    if CROSS.search(parts[-1]) or getattr(module, "is_cross_attention", False) is True:
        return "cross"
    if getattr(root.config, "is_encoder_decoder", False):
        if any("decoder" in p for p in parts):
            return "decoder"
        if any("encoder" in p for p in parts):
            return "encoder"
    main_input = getattr(stack, "main_input_name", "input_ids")
    if VISION.search(path) or main_input == "pixel_values":
        return "vision"
    if AUDIO.search(path) or main_input in ("input_features", "input_values"):
        return "audio"
    return "text"


def _layer(root: nn.Module, stack_path: str, path: str) -> tuple[int, int]:
    """Layer number and length of the list that holds the layers."""
    inside = path[len(stack_path) :].lstrip(".").split(".")
    for i, name in enumerate(inside):
        if name.isdigit():
            holder = root.get_submodule(".".join(filter(None, [stack_path, *inside[:i]])))
            return int(name), len(list(holder.children()))
    return 0, 1


def _first(obj: Any, *names: str) -> Any:
    return next((v for n in names if (v := getattr(obj, n, None)) is not None), None)


def _head_counts(module: Any) -> tuple[int, int]:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    heads = _first(module, *names) or _first(module.config, *names, "encoder_attention_heads")
    groups = _first(module, "num_key_value_groups")
    kv = _first(module, "num_key_value_heads")
    if kv is None and groups is not None:
        kv = heads // groups
    if kv is None:
        kv = _first(module.config, "num_key_value_heads") or heads
    return int(heads), int(kv)


def _head_dim(module: Any, heads: int) -> int:
    dim = _first(module, "v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
    return int(dim or _first(module.config, "head_dim") or module.config.hidden_size // heads)


def _features(root: Any, module: Any, part: str) -> tuple[str, ...]:
    found = []
    code = _code(module)
    if "position_bias" in (*code.co_varnames, *code.co_names) or hasattr(module, "has_relative_attention_bias"):
        found.append("position_bias")
    compares = {c for const in code.co_consts for c in (const if isinstance(const, tuple) else (const,))}
    # GPT-2 asks for "eager" only to upcast scores, which matters only if that was switched on.
    harmless = hasattr(module, "reorder_and_upcast_attn") and not module.reorder_and_upcast_attn
    if compares & {"sdpa", "eager"} and not harmless:
        found.append("implementation_branch")
    if int(getattr(root, "_tp_size", None) or 1) > 1:
        found.append("tensor_parallel")
    if not _has_image_tokens(root.config, part):
        found.append("no_image_tokens")
    return tuple(found)


def _has_image_tokens(config: Any, part: str) -> bool:
    """Whether images stand in this part's sequence, as placeholder tokens whose embeddings the model replaces."""
    named = _first(config, "image_token_id", "image_token_index") is not None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Layers that attend across to the image (Mllama) leave a single marker in the sequence, which stands for nothing.
    return named and part in ("text", "encoder") and not getattr(inner, "cross_attention_layers", None)


def _patch_features(root: Any, found: dict[tuple[str, int], Attention]) -> tuple[str, ...]:
    """What keeps attention inside the vision tower from being told of image tokens."""
    tower = next((a.stack for (part, _), a in found.items() if part == "vision"), None)
    names = [] if tower is None else [name.rsplit(".", 1)[-1] for name, _ in tower.named_parameters()]
    if not CLASS_TOKENS & set(names):
        return ("no_class_token",)
    # "full" makes a token of the class token, too.
    single = root.config.model_type in ONE_BY_ONE and getattr(root.config, STRATEGY, "default") == "default"
    return () if single else ("merged_patches",)


def _shape(root: Any, found: dict[tuple[str, int], Attention], lengths: dict[str, int]) -> ModelShape:
    parts = {}
    for part, depth in lengths.items():
        rows = [found.get((part, layer)) for layer in range(depth)]
        parts[part] = PartShape(
            num_heads=tuple(a.num_heads if a else 0 for a in rows),
            num_kv_heads=tuple(a.num_kv_heads if a else 0 for a in rows),
            head_dim=tuple(a.head_dim if a else 0 for a in rows),
        )
    main = next(p for p in ("text", "decoder", "encoder", "vision", "audio", "cross") if p in parts)
    config = root.config
    return ModelShape(getattr(config, "model_type", ""), parts, main, getattr(config, "_name_or_path", None) or None)


def output_projection(module: nn.Module, num_heads: int, name: str) -> Tensor:
    """[H, d, D] slice of the output projection that each head writes through; EngineError where it cannot be read."""
    for attribute in ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "o"):
        projection = getattr(module, attribute, None)
        projection = getattr(projection, "base_layer", projection)
        weight = getattr(projection, "weight", None)
        if weight is None:
            continue
        if not weight.is_floating_point() or weight.ndim != 2:
            raise EngineError(f"layer {name}: operand 'o_proj': {attribute} is quantised, its columns cannot be read")
        rows = weight if type(projection).__name__ == "Conv1D" else weight.t()
        return rows.reshape(num_heads, -1, rows.shape[-1])
    raise EngineError(f"layer {name}: operand 'o_proj': found no output projection in {type(module).__name__}")
