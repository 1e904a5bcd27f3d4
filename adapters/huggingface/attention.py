"""The attention function that patched modules call, registered under one name in transformers' attention interface.

A patched module has a private copy of its config that says ``headpatch``; the model's own config keeps its name, so masks, compile
checks and save_pretrained see the base implementation. What to do with the layer is in ``module._headpatch``.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headpatch.adapters.huggingface import cells, mass, scores
from headpatch.adapters.huggingface.fused import by_segments
from headpatch.adapters.huggingface.kvcall import kept_attention
from headpatch.adapters.huggingface.kvplan import Policy, part_of
from headpatch.adapters.huggingface.masks import Visible, visible
from headpatch.adapters.huggingface.operands import OperandServer
from headpatch.adapters.huggingface.outputs import edit_outputs
from headpatch.adapters.huggingface.plan import LayerPlan
from headpatch.adapters.huggingface.rows import Rows, StackHooks
from headpatch.errors import EngineError
from headpatch.kernels.step import can_merge_step

__all__ = ["NAME", "LayerState", "base_attention", "headpatch_attention"]

NAME = "headpatch"
HEAD_ATTR = "_headpatch"


@dataclass(eq=False)
class LayerState:
    """What one patched attention module carries.

    Attributes
    ----------
    name
        ``part.layer``, for messages and reports.
    part, layer, cache_layer
        Attention stack, 0-based layer, and the index under which its keys lie in the cache (None without one).
    num_heads, num_kv_heads
        As resolved; a call with other numbers raises.
    config
        The module's original config object: where the base implementation is read from, and what goes back on removal.
    plan
        The edits, or None while only observers are on.
    policy, parts, some
        The cache policy, if any; under one, the edits of the full and of the streaming heads, and of other sets of heads.
    hooks
        Of the stack around the module; they know the rows of the running call.
    observers
        Read-only recorders.
    calls
        Eager calls so far (compiled calls do not count: no Python state is touched in a traced path).
    traced
        How often a compiler traced this layer's patched path.
    number
        Its own, in this process.
    """

    name: str
    part: str
    layer: int
    cache_layer: int | None
    num_heads: int
    num_kv_heads: int
    config: Any
    plan: LayerPlan | None = None
    policy: Policy | None = None
    parts: tuple[LayerPlan | None, LayerPlan | None] = (None, None)
    some: dict[tuple[int, ...], LayerPlan | None] = field(default_factory=dict)
    hooks: StackHooks | None = None
    observers: list[Any] = field(default_factory=list)
    calls: int = 0
    traced: int = 0
    number: str = ""

    def __post_init__(self) -> None:
        self._enlist()

    def part_of(self, heads: tuple[int, ...]) -> LayerPlan | None:
        """The mass edits of these query heads, for calls of them alone."""
        if self.plan is None or not self.plan.edits_masses:
            return None
        if heads not in self.some:
            self.some[heads] = part_of(self.plan, heads)
        return self.some[heads]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enlist()  # a copy is another layer

    def _enlist(self) -> None:
        self.number = str(next(_NUMBERS))
        _STATES[self.number] = self


_NUMBERS = itertools.count()
_STATES: weakref.WeakValueDictionary[str, LayerState] = weakref.WeakValueDictionary()
"""Every live layer by number; a compiler that traces one can name it by that."""


def headpatch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of one patched module; arguments and results as transformers defines them for attention functions.

    query is [b, H, q, d], key and value [b, K, n, d]; returns ([b, q, H, d], weights or None).
    """
    state: LayerState | None = getattr(module, HEAD_ATTR, None)
    if state is None:
        raise EngineError(
            f"{type(module).__name__} uses the attention implementation {NAME!r} without being patched; its config was copied "
            "from a patched module. Give it a config of its own"
        )
    plan = state.plan
    if torch.compiler.is_compiling():
        _note_trace(state.number)
    else:
        state.calls += 1
    if state.policy is not None:
        given = (query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        return kept_attention(module, state, *given, _edited), None
    if plan is not None and plan.closed and attention_mask is None and not dropout and _is_eager_gpu(query):
        quick = _quick_step(state, plan, query, key, value, scaling, kwargs)
        if quick is not None:
            return quick, None
    rows = kwargs.pop("headpatch_rows", None) or (state.hooks.current() if state.hooks else None)
    edits_masses = plan is not None and plan.edits_masses
    if query.shape[1] != state.num_heads or key.shape[1] not in (state.num_kv_heads, state.num_heads):
        raise EngineError(
            f"layer {state.name}: attention was called with {query.shape[1]} query and {key.shape[1]} KV heads, the model has "
            f"{state.num_heads} and {state.num_kv_heads}; heads sharded over ranks are not supported here"
        )
    base = state.config._attn_implementation
    chosen_rows = plan is not None and rows is not None and plan.restricted(rows.known)
    over = plan is not None and plan.until is not None and rows is not None and rows.behind(plan.until)
    if not edits_masses and not state.observers and (plan is None or over or (plan.simple and not chosen_rows)):
        plan = None if over else plan
        out, weights = base_attention(
            module, state, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
        return (out if plan is None else edit_outputs(out, plan, None)), weights

    packed = kwargs.get("cache")
    if packed is not None and hasattr(packed, "update"):
        # Continuous batching updates its paged cache inside the attention function; what comes back is what is attended to.
        kwargs = dict(kwargs)
        cache = kwargs.pop("cache")
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        _refuse_packed(state)
        attention_mask, first = _packed_rows(attention_mask, query, kwargs, rows, state)
    else:
        first = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    seen = visible(attention_mask, base, query, key, causal, kwargs.get("sliding_window"))
    if first is None:
        first = _first_key(state, rows, seen, query, causal)
    eager = base == "eager"
    caps = eager or "flex" in base or "flash" in base  # SDPA leaves soft-capping out, and so must we
    ranges = None
    if (
        base == "sdpa"
        and seen.kind == "blocks"
        and causal
        and rows is not None
        and plan is not None
        and plan.first_weight is not None
    ):
        ranges = rows.causal_ranges(attention_mask)
    call = mass.Call(
        query, key, value, seen, float(scale), kwargs.get("softcap") if caps else None, kwargs.get("s_aux"),
        first or mass.FirstKey(), ranges,
    )  # fmt: skip
    server = OperandServer(module, state, call, rows)
    server.edited = edits_masses and first is not None
    weights = None
    if edits_masses and first is not None:
        assert plan is not None
        _refuse_at_call(state, module, dropout, rows, kwargs)
        out, scaled = _edited(call, plan, server, fuse_scale=not (state.observers or chosen_rows))
    else:
        scaled = False
        out, weights = base_attention(
            module, state, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    for observer in state.observers:
        observer.record(state, server, out)
    return (out if plan is None or scaled else edit_outputs(out, plan, server)), weights


def _is_eager_gpu(query: Tensor) -> bool:
    return query.is_cuda and not torch.compiler.is_compiling()


def _quick_step(
    state: LayerState, plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> Tensor | None:  # fmt: skip
    """An eager decoding step on a GPU with nothing unusual about it, where the host is what takes time; None: not such a step."""
    _, heads, n_q, width = query.shape
    kv_heads, n_k = key.shape[1:3]
    if n_q != 1 or n_k < 2 or heads != state.num_heads or kv_heads != state.num_kv_heads or width != value.shape[3]:
        return None
    rows = state.hooks.current() if state.hooks else None
    unusual = (
        torch.is_grad_enabled() or state.observers or _implementation(state.config) != "sdpa" or not can_merge_step(query)
        or (rows is not None and (rows.wants_weights or plan.restricted(rows.known) or not _at_start(rows, state)))
        or any(kwargs.get(name) is not None for name in ("cache", "s_aux", "position_bias", "output_attentions"))
    )  # fmt: skip
    if unusual:
        return None
    assert plan.first_weight is not None
    scale = width**-0.5 if scaling is None else float(scaling)
    device = query.device
    head_scale = None if plan.scale is None else plan.scale.to(device)
    return mass.step(query, key, value, plan.first_weight.to(device), head_scale, scale, plan.gentle)


def _implementation(config: Any) -> Any:
    """``config._attn_implementation``, past the attribute map that a config searches at every access."""
    try:
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return config._attn_implementation


def _at_start(rows: Rows, state: LayerState) -> bool:
    """Whether key 0 of this layer's cache is certainly column 0."""
    offset: Any = 0 if state.cache_layer is None or state.part == "cross" else rows.offsets.get(state.cache_layer, 0)
    return isinstance(offset, int) and offset == 0


def _edited(call: mass.Call, plan: LayerPlan, server: OperandServer | None, fuse_scale: bool) -> tuple[Tensor, bool]:
    """Output with edited masses, and whether constant output factors are in it already."""
    grad = torch.is_grad_enabled() and (
        plan.trainable or call.q.requires_grad or call.k.requires_grad or call.v.requires_grad
    )
    weight = plan.constants()[0] if plan.trainable else plan.first_weight
    if weight is not None:
        weight = weight.to(call.q.device)
        if grad:
            return mass.differentiable(call, weight), False
        if mass.biased_suits(call):
            return mass.biased(call, plan.first_bias(call.k.shape[2], weight)), False
        scale = plan.scale.to(call.q.device) if fuse_scale and plan.scale is not None else None
        return mass.first_token(call, weight, scale, plan.gentle), scale is not None
    assert server is not None
    edits = plan.attention
    # A compiled step is quickest in the open too: one query's scores are small, keys and values are read once for all cells.
    step = torch.compiler.is_compiling() and call.q.shape[2] == 1 and call.sinks is None
    in_the_open = step or any(e.method.family == "scores" for e in edits)
    if not in_the_open and plan.log_weights is not None and cells.biased_keys_suit(call):
        flags = server.key_flags(plan.segments[0])
        if flags is not None:
            some = edits[0].heads if cells.few_suit(call, edits[0].heads) else None
            return cells.by_key_bias(call, some, plan.bias_columns(call.q, call.scale, some is None), flags), False
    if in_the_open:
        masks = server.segment_masks(plan.segments)
        since = scores.first_edited(server, edits)
        return scores.explicit(call, edits, masks, plan.owned, server.operands_of, since=since), False
    return by_segments(call, plan, server), False


def base_attention(
    module: Any, state: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float,
    scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Call the implementation that the module would have used without us; `state` holds its `config`."""
    name = state.config._attn_implementation
    default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
    if is_causal is not None:
        kwargs = {**kwargs, "is_causal": is_causal}
    view = _View(module, state.config) if "flash" in name else module
    return function(view, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


class _View:
    """A module with its original config: flash kernels read their name from there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _first_key(
    state: LayerState, rows: Rows | None, seen: Visible, query: Tensor, causal: bool
) -> mass.FirstKey | None:
    """Where this layer's keys hold each row's first real token; None where the whole batch has lost it to the window."""
    offset: Any = 0
    if rows is not None and state.cache_layer is not None and state.part != "cross":
        offset = rows.offsets.get(state.cache_layer, 0)
    if seen.kind != "blocks":
        return None if offset > 0 else mass.FirstKey()
    if rows is None:
        raise EngineError(
            f"layer {state.name} was called outside its model's forward, with a mask: the first real token of each row is not "
            "known. Call the model, not its layers"
        )
    first = rows.cross_first if state.part == "cross" else rows.first
    batch = query.shape[0]
    if first is None:
        if causal:
            first = torch.zeros(batch, dtype=torch.long, device=query.device)
        else:
            last = seen.block(query.shape[2] - 1, query.shape[2])
            assert last is not None
            real = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
            first = real[:, 0, -1].to(torch.uint8).argmax(-1).expand(batch)
    first = first.to(query.device)
    if first.shape[0] != batch:
        if batch % first.shape[0]:
            raise EngineError(f"layer {state.name}: a mask of {first.shape[0]} rows for a batch of {batch}")
        first = first.repeat_interleave(batch // first.shape[0], 0)
    if isinstance(offset, int) and offset == 0:
        return mass.FirstKey(first)
    index = first - offset
    return mass.FirstKey(index.clamp_min(0), index < 0)


def _packed_rows(
    mask: Any, query: Tensor, kwargs: dict[str, Any], rows: Rows | None, state: LayerState
) -> tuple[Any, mass.FirstKey]:
    """Continuous batching packs all requests into one row: find each query's own first key."""
    if mask is None:
        raise EngineError(
            f"layer {state.name}: continuous batching without a mask (flash attention) is not supported; "
            "load the model with attn_implementation='sdpa' and auto_switch_to_flash off"
        )
    n_q = query.shape[2]
    q_ends, k_starts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"].long()
    request = torch.searchsorted(q_ends[1:].long(), torch.arange(n_q, device=query.device), right=True)
    request = request.clamp_max(k_starts.shape[0] - 2)
    index = k_starts[request]
    held = (k_starts[1:] - k_starts[:-1])[request]
    positions = rows.position_ids if rows is not None else None
    gone = None
    if positions is not None:
        last = positions.view(-1)[(q_ends[1:].long() - 1).clamp_min(0)][request]
        gone = (last + 1 > held)[None]
    return mask, mass.FirstKey(index[None], gone)


PER_REQUEST = frozenset({
    "spans", "beside_spans", "image_tokens", "image_queries", "column_sinks", "residual_sinks", "column_means", "window_scores",
    "prompt_len", "position", "without_image", "vision_salient",
})  # fmt: skip
"""Operands that need to know which request a packed token belongs to, and what came before it."""


def _refuse_packed(state: LayerState) -> None:
    asked = set(state.plan.needs if state.plan else ()).union(*(o.needs for o in state.observers))
    found = sorted(asked & PER_REQUEST)
    if state.plan and any(e.method.state for e in state.plan.edits):
        found.append("state of the prompt")
    if found:
        raise EngineError(
            f"layer {state.name}: operand {found[0]!r} cannot be had with continuous batching, which packs requests into one row; "
            "call generate() instead"
        )


def _refuse_at_call(
    state: LayerState, module: nn.Module, dropout: float, rows: Rows | None, kwargs: dict[str, Any]
) -> None:
    if dropout > 0 and module.training:
        raise EngineError(
            f"layer {state.name}: edits of attention masses are not defined under attention dropout ({dropout}); "
            "set attention_dropout to 0, or call model.eval()"
        )
    if kwargs.get("position_bias") is not None:
        raise EngineError(f"layer {state.name}: operand 'first_token' cannot be had with position_bias")
    if kwargs.get("output_attentions") or (rows is not None and rows.wants_weights):
        raise EngineError(
            f"layer {state.name}: output_attentions asks for the attention matrix, which patched heads never build; "
            "use headpatch.observe(), or take the patch off"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_trace(number: str) -> int:
    # Runs while a compiler traces, never in the compiled call. Some compilers pass nothing but constants, hence the number.
    state = _STATES.get(number)
    if state is not None:
        state.traced += 1
    return 0


AttentionInterface.register(NAME, headpatch_attention)
