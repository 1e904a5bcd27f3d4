"""Which linear modules make up an attention layer of a transformers model, and which of their coordinates belong to which head.

The layout of separate projections follows from names and sizes. What does not follow from them (the order of a fused projection,
an output gate, latent attention) stands in a table of classes below; tests compare each entry with the queries, keys and values
that the attention kernel is given. Everything else is refused by name: a wrong guess would train heads nobody chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from headpatch.adapters.huggingface.discover import Attention, find_layout
from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.tune.engine import AttentionSites, Projection

__all__ = ["projections", "sites_of"]

BLOCKS = {"Phi3Attention": "qkv_proj", "GPT2Attention": "c_attn"}
"""Fused projections whose output is all queries, then all keys, then all values."""
INTERLEAVED = {"GPTNeoXAttention": "query_key_value"}
"""Fused projections whose output is, for each head in turn, its query, key and value."""
GATED = {"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"}
"""q_proj gives each head its query and then, as wide, the gate on its output."""
LATENT = {"DeepseekV2Attention", "DeepseekV3Attention"}
"""kv_b_proj gives each head its key (without the rotary part, which all heads share) and then its value."""
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
ROTARY = ("rotary_emb", "rotary_fn", "rotary_pos_emb")


def projections(root: nn.Module, part: str | None = None) -> dict[int, AttentionSites]:
    """The projections of every attention layer of one part, by layer.

    Raises
    ------
    UnsupportedModelError
        No such part, heads spread over ranks, or a layout that is not known.
    """
    layout = find_layout(root)
    name = part or layout.shape.main
    if name not in layout.shape.parts:
        raise UnsupportedModelError(f"this model has no part {name!r}; its parts: {', '.join(layout.shape.parts)}")
    return {layer: sites_of(where) for (p, layer), where in sorted(layout.attention.items()) if p == name}


def sites_of(where: Attention) -> AttentionSites:
    """The projections of one attention layer; UnsupportedModelError where its layout is not known."""
    if "tensor_parallel" in where.features:
        raise UnsupportedModelError(
            f"{where.path}: its heads are spread over ranks (tp_plan); load the model without it to tune heads"
        )
    found = tuple(_find(where))
    roles = {role for projection in found for role in projection.heads}
    if not {"q", "o"} <= roles:
        raise _unknown(where, f"no projection plays {' and '.join(sorted({'q', 'o'} - roles))}")
    _check_children(where, {projection.path for projection in found})
    gated = type(where.module).__name__ in GATED
    return AttentionSites(where.path, where.num_heads, where.num_kv_heads, found, _mixing(where), gated)


def _find(where: Attention) -> Iterator[Projection]:
    kind, heads, groups, d = type(where.module).__name__, where.num_heads, where.num_kv_heads, where.head_dim
    if kind in BLOCKS:
        q, k, v = _even(0, heads, d), _even(heads * d, groups, d), _even((heads + groups) * d, groups, d)
        yield _projection(where, BLOCKS[kind], "out", {"q": q, "k": k, "v": v}, (heads + 2 * groups) * d)
    elif kind in INTERLEAVED:
        split = {role: tuple(range((3 * h + i) * d, (3 * h + i + 1) * d) for h in range(heads))
                 for i, role in enumerate("qkv")}  # fmt: skip
        yield _projection(where, INTERLEAVED[kind], "out", split, 3 * heads * d)
    elif kind in LATENT:
        module: Any = where.module
        name = "q_proj" if module.q_lora_rank is None else "q_b_proj"
        wide = module.qk_nope_head_dim + module.qk_rope_head_dim
        yield _projection(where, name, "out", {"q": _even(0, heads, wide)}, heads * wide)
        n, both = module.qk_nope_head_dim, module.qk_nope_head_dim + module.v_head_dim
        keys = tuple(range(h * both, h * both + n) for h in range(heads))
        values = tuple(range(h * both + n, (h + 1) * both) for h in range(heads))
        yield _projection(where, "kv_b_proj", "out", {"k": keys, "v": values}, heads * both)
    else:
        width = 2 * d if kind in GATED else d
        for role, name, count, each in (("q", "q_proj", heads, width), ("k", "k_proj", groups, d),
                                        ("v", "v_proj", groups, d)):  # fmt: skip
            if getattr(where.module, name, None) is not None:
                yield _projection(where, name, "out", {role: _even(0, count, each)}, count * each)
    output = next((name for name in OUTPUTS if getattr(where.module, name, None) is not None), None)
    if output is not None:
        yield _projection(where, output, "in", {"o": _even(0, heads, d)}, heads * d)


def _even(start: int, count: int, width: int) -> tuple[range, ...]:
    return tuple(range(start + i * width, start + (i + 1) * width) for i in range(count))


def _projection(
    where: Attention, name: str, side: str, heads: dict[str, tuple[range, ...]], wanted: int
) -> Projection:
    module = getattr(where.module, name, None)
    if module is None:
        raise _unknown(where, f"there is no {name}")
    size, transposed = _size(module, side), type(getattr(module, "base_layer", module)).__name__ == "Conv1D"
    if size != wanted:
        raise _unknown(where, f"{name} has {size} {side}put coordinates, and {wanted} would fit its heads")
    return Projection(f"{where.path}.{name}", side, wanted, heads, transposed)


def _size(module: Any, side: str) -> int:
    """Features on one side of a linear module, quantised or not, or of the adapter layer around it."""
    found = getattr(module, f"{side}_features", None)
    if found is None and type(module).__name__ == "Conv1D":
        found = module.weight.shape[0 if side == "in" else 1]
    return int(found) if found is not None else -1


def _check_children(where: Attention, known: set[str]) -> None:
    """Whatever else an attention module holds could mix heads."""
    for name, child in where.module.named_children():
        harmless = isinstance(child, nn.Dropout | nn.Identity) or name in ROTARY or _is_norm(name)
        latent = type(where.module).__name__ in LATENT and name in (
            "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"
        )  # fmt: skip
        if not (harmless or latent or f"{where.path}.{name}" in known):
            raise _unknown(where, f"it has a module {name} ({type(child).__name__})")


def _is_norm(name: str) -> bool:
    return name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def _mixing(where: Attention) -> dict[str, str]:
    """Roles that a normalisation over all heads follows: there, a change of one head's projection rescales the others."""
    refused = {}
    for name, child in where.module.named_children():
        weight = getattr(child, "weight", None)
        if _is_norm(name) and not isinstance(child, nn.Identity) and (
            weight is None or tuple(weight.shape) != (where.head_dim,)
        ):  # fmt: skip
            over = "an unknown width" if weight is None else f"{tuple(weight.shape)} coordinates"
            refused[name[0]] = f"{name} normalises over {over}, so changing one head would rescale the others"
    return refused


def _unknown(where: Attention, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where.path} ({type(where.module).__name__}): headpatch does not know which weights belong to which head: {what}"
    )


def add_output_biases(root: Any, paths: list[str]) -> None:
    """Give the named output projections a bias of zeros, and the config what makes the checkpoint load with it.

    Raises
    ------
    EngineError
        The architecture has no such bias: a checkpoint with one would lose it on loading.
    """
    import copy

    import torch

    missing = [path for path in paths if root.get_submodule(path).bias is None]
    if not missing:
        return
    config = copy.deepcopy(root.config)
    if not hasattr(config, "attention_bias"):
        raise _no_bias(root, missing[0])
    config.attention_bias = True
    with torch.device("meta"):
        twin = type(root)(config)
    if any(getattr(twin.get_submodule(path), "bias", None) is None for path in missing):
        raise _no_bias(root, missing[0])
    for path, module in twin.named_modules():
        mine = root.get_submodule(path)
        if getattr(module, "bias", None) is not None and getattr(mine, "bias", module) is None:
            like = mine.weight
            mine.bias = nn.Parameter(
                torch.zeros(module.bias.shape, dtype=like.dtype, device=like.device), requires_grad=False
            )
    root.config.attention_bias = True


def _no_bias(root: Any, path: str) -> EngineError:
    return EngineError(
        f"{path} of {type(root).__name__} has no bias, and the architecture has no option for one: learned biases "
        "cannot become weights of this model"
    )
