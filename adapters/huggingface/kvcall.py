"""One attention call of a layer under a cache policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import mass
from headpatch.adapters.huggingface.kvattention import attend_groups, attend_slices, plain
from headpatch.adapters.huggingface.kvparts import Kept, fresh
from headpatch.adapters.huggingface.kvrows import Chunk, read_chunk
from headpatch.adapters.huggingface.masks import BLOCK, visible
from headpatch.adapters.huggingface.operands import OperandServer
from headpatch.adapters.huggingface.outputs import edit_outputs
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.plan import LayerPlan
    from headpatch.adapters.huggingface.rows import Rows

__all__ = ["kept_attention"]

Edited = Callable[..., tuple[Tensor, bool]]


def kept_attention(
    module: nn.Module, state: LayerState, query: Tensor, key: Any, value: Any, mask: Any, dropout: float,
    scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any], edited: Edited,
) -> Tensor:  # fmt: skip
    """Output [b, q, H, d]; arguments as of an attention function, `key` a :class:`Kept` where there is a cache.

    `edited` runs a call with the constant edits of a plan.
    """
    policy, plan = state.policy, state.plan
    assert policy is not None
    rows: Rows | None = kwargs.pop("headpatch_rows", None) or (state.hooks.current() if state.hooks else None)
    if rows is None:
        raise EngineError(f"layer {state.name} was called outside its model's forward; call the model, not its layers")
    base = state.config._attn_implementation
    _refuse(state, module, dropout, rows, is_causal, kwargs)
    if isinstance(key, Kept):
        kept, chunk = key, _chunk(rows)
    else:
        if rows.kept is not None and rows.kept.chunk is not None:
            raise EngineError(f"layer {state.name}: the model did not hand on what its cache returned")
        chunk = rows.chunk = rows.chunk or read_chunk(rows, rows.mask)
        kept = fresh(policy, chunk, key, value)
    if query.shape[1] != state.num_heads or kept.k.shape[1] != state.num_kv_heads:
        raise EngineError(
            f"layer {state.name}: attention was called with {query.shape[1]} query and {kept.k.shape[1]} KV heads, the model has "
            f"{state.num_heads} and {state.num_kv_heads}; heads sharded over ranks are not supported here"
        )
    _check_mask(state, mask, base, query, chunk, rows)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    caps = base == "eager" or "flex" in base or "flash" in base  # SDPA leaves soft-capping out, and so must we
    more = (scale, kwargs.get("softcap") if caps else None, kwargs.get("s_aux"))
    if kept.slices:

        def run_of(heads: tuple[int, ...]) -> Callable[[mass.Call], Tensor]:
            return _run(state.part_of(heads), edited)

        out = attend_slices(query, kept, *more, run_of)
    else:
        full, streaming = (_run(part, edited) for part in state.parts)
        out = attend_groups(policy, query, kept, *more, (full, streaming))
    if kept.after is not None:
        kept.after(module, state, rows, query, *more)
    if plan is None and not state.observers:
        return out
    call = mass.Call(
        query, kept.k, kept.v, visible(None, base, query, kept.k, True, None), scale, None, None, mass.FirstKey()
    )
    server = OperandServer(module, state, call, rows)
    for observer in state.observers:
        observer.record(state, server, out)
    return out if plan is None else edit_outputs(out.contiguous(), plan, server)


def _run(part: LayerPlan | None, edited: Edited) -> Callable[[mass.Call], Tensor]:
    if part is None:
        return plain
    return lambda call: edited(call, part, None, fuse_scale=False)[0]


def _chunk(rows: Rows) -> Chunk:
    if rows.kept is None or rows.kept.chunk is None:
        raise EngineError("a cache under a cache policy was filled outside a call of its model")
    return rows.kept.chunk


def _refuse(
    state: LayerState, module: nn.Module, dropout: float, rows: Rows, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    why = None
    if dropout > 0 and module.training:
        why = f"a cache policy is not defined under attention dropout ({dropout}); set attention_dropout to 0, or call model.eval()"
    elif kwargs.get("position_bias") is not None:
        why = "operand 'kv_windows' cannot be had with position_bias"
    elif kwargs.get("output_attentions") or rows.wants_weights:
        why = "output_attentions asks for the attention matrix, which a cache policy never builds; use headpatch.observe()"
    elif kwargs.get("cache") is not None:
        why = "operand 'kv_windows' cannot be had with continuous batching, whose pages hold all heads alike; call generate() instead"
    elif kwargs.get("sliding_window") is not None:
        why = "this layer has a window of its own, which the model's config does not say"
    elif is_causal is False:
        why = "a cache policy needs causal attention"
    if why is not None:
        raise EngineError(f"layer {state.name}: {why}")


def _check_mask(state: LayerState, mask: Any, base: str, query: Tensor, chunk: Chunk, rows: Rows) -> None:
    """Raise where a layer's mask says something else than causality among real tokens: images that see ahead, say.

    Once a call and mask; a decoding step, which nothing comes after, needs no look. Not in a traced call, which may not branch.
    """
    if mask is None or chunk.queries == 1 or torch.compiler.is_compiling() or ("flash" in base and mask.ndim == 2):
        return
    known = (id(mask), "causal")
    if known in rows.ranges:
        return
    keys, device = chunk.past + chunk.queries, query.device
    stand_in = query.new_empty(1, 1, keys, 0)
    seen = visible(mask, base, query, stand_in, True, None)
    columns = torch.arange(keys, device=device)
    real = None if chunk.real is None else chunk.real.to(device)
    for i in range(0, chunk.queries, BLOCK):
        j = min(i + BLOCK, chunk.queries)
        found = seen.block(i, j)
        if found is None:
            continue
        found = found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2
        at = columns[chunk.past + i : chunk.past + j, None]
        expected = (columns <= at)[None, None]
        if real is not None:  # what padding asks for means nothing
            expected = (expected & real[:, None, None]) | ~real[:, None, chunk.past + i : chunk.past + j, None]
            found = found | ~real[:, None, chunk.past + i : chunk.past + j, None]
        if not bool((found == expected).all()):
            raise EngineError(
                f"layer {state.name}: its mask is not plain causality (tokens that see ahead, or not all of what is before them), "
                "which a cache policy cannot keep to"
            )
    rows.ranges[known] = (mask, None)
