"""A naive float64 reference of what a recipe means, written from the specification and from nothing else.

The same weights run in float64 with an attention function that materialises the whole score matrix, adds transformers' own eager
mask, takes the softmax over the full row and then edits that row, one patch after the other, in the plainest way there is. It
shares no code with headpatch: selectors, order and the meaning of each method are spelled out again below. Slow and quadratic on
purpose.

Semantics follow the base attention it is compared with: transformers' ``sdpa`` ignores soft-capping, ``eager`` applies it, so
the reference is told which base it stands for. Learned sink logits (gpt-oss) are one more column of the row, which takes its share
of the probability and is dropped after normalisation.

Edits are plain python: ``{part: {layer: [(kind, {head: strength}), ...]}}`` with kind ``zerotuning`` or ``head_scaling``; a
strength is a number or a scalar tensor (then gradients flow to it).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from zoo import Entry, Inputs, Part, output

Edits = Mapping[str, Mapping[int, Sequence[tuple[str, Mapping[int, Any]]]]]

NAME = "naive_float64"
"""Name of the registered attention function. It must not contain sdpa, flash, flex or eager: transformers looks for those."""


@dataclass
class State:
    """What the reference attention of one module knows.

    Attributes
    ----------
    part, layer
        Which attention module this is, from the zoo's tables.
    shared
        What changes from call to call, the same object for all modules of a model.
    """

    part: str
    layer: int
    shared: Shared


@dataclass
class Shared:
    """Edits and first tokens of the current call.

    Attributes
    ----------
    edits
        What to do; empty for the untouched model.
    first
        Part to the key index of the first real token, [b] or [b, q].
    softcap
        Whether the base that this stands for applies soft-capping.
    masses
        Filled with the first token's mass [b, H, q] before any edit, by (part, layer), when `record` is set.
    """

    edits: Edits = field(default_factory=dict)
    first: Mapping[str, Tensor] = field(default_factory=dict)
    softcap: bool = True
    record: bool = False
    masses: dict[tuple[str, int], Tensor] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------- row edits


def edit_first(row: Tensor, column: Tensor, gamma: Tensor) -> Tensor:
    """ZeroTuning on full softmax rows: multiply one column by gamma, renormalise.

    Parameters
    ----------
    row
        [b, H, q, n] probabilities; with a sink logit, its probability is one of the n.
    column
        [b, 1, q, n] bool, true at the first real token where the query row sees it.
    gamma
        [H].

    Returns
    -------
    Tensor
        Same shape. Rows that do not see the first token, and rows that see nothing else while gamma is 0, are unchanged.
    """
    weighted = torch.where(column, row * gamma[:, None, None], row)
    total = weighted.sum(-1, keepdim=True)
    return torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), row)


def edit_rows(row: Tensor, segments: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Any functional mass edit on full softmax rows.

    Parameters
    ----------
    row
        [..., q, n] probabilities.
    segments
        Disjoint bool masks broadcastable to `row`; what is in none of them is the rest.
    fn
        From shares [S + 1, ..., q] (the rest last) to new shares of the same sum.

    Returns
    -------
    Tensor
        Rows whose segments have the new shares; inside a segment proportions stay. Where a segment has no mass it gets none.
    """
    masks = [s.expand_as(row) for s in segments]
    rest = ~functools.reduce(torch.logical_or, masks, torch.zeros_like(row, dtype=torch.bool))
    masks.append(rest)
    shares = torch.stack([(row * m).sum(-1) for m in masks])
    changed = fn(shares)
    factor = torch.where(shares > 0, changed / torch.where(shares > 0, shares, 1.0), 0.0)
    return sum((row * m * f[..., None] for m, f in zip(masks, factor, strict=True)), torch.zeros_like(row))


def strengths(heads: Mapping[int, Any], num_heads: int, like: Tensor) -> Tensor:
    """[H] strengths with 1, the identity of both methods, where no head is named."""
    values = [heads.get(h, 1.0) for h in range(num_heads)]
    return torch.stack([v.to(like) if torch.is_tensor(v) else torch.tensor(v, dtype=like.dtype) for v in values])


# --------------------------------------------------------------------------------------------------------------- attention


def naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with everything written out: [b, H, q, d] queries in, [b, q, H, d] outputs and full rows out."""
    state: State = module._naive
    shared = state.shared
    assert not dropout, "the reference has no dropout"
    b, num_heads, q_len, _d = query.shape
    dtype = query.dtype
    # bfloat16 and float16 runs (the naive edit that published code does) take their softmax in float32, as transformers does.
    work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    groups = num_heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2) * scale).to(work)
    if softcap is not None and shared.softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    n = key.shape[2]
    if attention_mask is None:
        assert q_len == 1 or not getattr(module, "is_causal", False), f"causal layer without a mask: {state}"
        visible = torch.ones(1, 1, 1, n, dtype=torch.bool)
    elif attention_mask.dtype == torch.bool:
        visible = attention_mask
    else:
        visible = attention_mask > torch.finfo(torch.float16).min  # whatever dtype the mask was made in, -inf included
        scores = scores + torch.where(visible, attention_mask, 0.0).to(work)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = getattr(module, "sinks", None)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(work).view(1, -1, 1, 1).expand(b, -1, q_len, 1)], dim=-1)
    # Rows of padding queries may see nothing at all: -inf everywhere. They become zeros; nobody looks at them.
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    row = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)

    column = _first_column(shared.first.get(state.part), b, q_len, n, visible)
    if sinks is not None:
        column = torch.nn.functional.pad(column, (0, 1))
    if shared.record:
        shared.masses[state.part, state.layer] = (row * column).sum(-1).detach()
    patches = shared.edits.get(state.part, {}).get(state.layer, ())
    for kind, heads in patches:
        if kind == "zerotuning":
            row = edit_first(row, column, strengths(heads, num_heads, row))
    probabilities = row[..., :n].to(dtype)
    out = (probabilities @ value).transpose(1, 2)
    for kind, heads in patches:
        if kind == "head_scaling":
            out = out * strengths(heads, num_heads, out)[:, None]
        else:
            assert kind == "zerotuning", kind
    return out.contiguous(), probabilities


def _first_column(first: Tensor | None, b: int, q_len: int, n: int, visible: Tensor) -> Tensor:
    """[b, 1, q, n] bool: the first real token of each query row, where that row sees it."""
    if first is None:
        return torch.zeros(b, 1, q_len, n, dtype=torch.bool)
    if len(first) != b:  # beams: generate() repeats each row
        first = first.repeat_interleave(b // len(first), dim=0)
    per_query = first[:, None].expand(b, q_len) if first.ndim == 1 else first
    return (torch.arange(n) == per_query[:, None, :, None]) & visible


AttentionInterface.register(NAME, naive_attention)
AttentionMaskInterface.register(NAME, eager_mask)

# -------------------------------------------------------------------------------------------------------------- the models


class Reference:
    """The naive model of one zoo entry.

    Parameters
    ----------
    entry
        Which architecture.
    weights
        Dtype the weights are rounded to first.
    compute
        Dtype it runs in: float64, or bfloat16/float32 to see what the naive edit loses in that dtype.
    """

    def __init__(
        self, entry: Entry, weights: torch.dtype = torch.float32, compute: torch.dtype = torch.float64
    ) -> None:
        self.compute = compute
        self.model = wrap(entry.build(compute, NAME, weights=weights), entry.parts)

    def __call__(self, inputs: Inputs, edits: Edits | None = None, *, base: str = "sdpa", **kwargs: Any) -> Tensor:
        """Logits (or hidden states) of one forward over everything, without a cache."""
        with torch.no_grad(), self.under(inputs, edits, base=base):
            call = {**inputs.to(self.compute).kwargs, **kwargs}
            if hasattr(self.model.config, "use_cache") or hasattr(self.model.config.get_text_config(), "use_cache"):
                call["use_cache"] = False
            return output(self.model(**call))

    @contextlib.contextmanager
    def under(self, inputs: Inputs, edits: Edits | None, *, base: str = "sdpa", record: bool = False) -> Iterator[Any]:
        """The model itself, with these edits in force."""
        shared: Shared = self.model._naive_shared
        shared.edits, shared.first, shared.softcap, shared.record = edits or {}, inputs.first, base == "eager", record
        shared.masses.clear()
        try:
            yield self.model
        finally:
            shared.edits, shared.first, shared.record = {}, {}, False

    def masses(self, inputs: Inputs) -> dict[tuple[str, int], Tensor]:
        """The first token's mass [b, H, q] in each layer of the untouched model."""
        with torch.no_grad(), self.under(inputs, None, record=True) as model:
            model(**inputs.to(self.compute).kwargs)
            return dict(model._naive_shared.masses)


def wrap(model: Any, parts: Mapping[str, Part]) -> Any:
    """Let a model that was built with attention implementation :data:`NAME` know which module is which; in place."""
    shared = Shared()
    modules = dict(model.named_modules())
    for part, stack in parts.items():
        for layer, name in stack.modules.items():
            assert modules[name].config._attn_implementation == NAME, name
            modules[name]._naive = State(part, layer, shared)
    model._naive_shared = shared
    return model


@functools.cache
def reference(entry: Entry, weights: torch.dtype = torch.float32, compute: torch.dtype = torch.float64) -> Reference:
    """The reference of a zoo entry, built once per session."""
    return Reference(entry, weights, compute)


# ------------------------------------------------------------------------------------------------------ recipes as edits


def edits_of(recipes: Sequence[Mapping[str, Any]], parts: Mapping[str, Part], main: str) -> Edits:
    """What a list of recipe dicts, in the order they are applied, means for each head.

    Selectors are ``L.H`` with numbers, ranges with both ends in, or ``*``; later ones override earlier ones within a patch;
    ``*`` means all layers that have softmax heads.
    """
    edits: dict[str, dict[int, list[tuple[str, dict[int, float]]]]] = {}
    for recipe in recipes:
        for patch in recipe["patches"]:
            kind = patch["method"]
            name = {"zerotuning": "gamma", "head_scaling": "scale"}[kind]
            part = patch.get("part", main)
            chosen = patch["heads"]
            pairs = chosen.items() if isinstance(chosen, Mapping) else [(s, patch[name]) for s in chosen]
            by_layer: dict[int, dict[int, float]] = {}
            for selector, strength in pairs:
                layers, heads = selector.split(".")
                for layer in _numbers(layers, sorted(parts[part].modules)):
                    for head in _numbers(heads, range(parts[part].num_heads)):
                        by_layer.setdefault(layer, {})[head] = float(strength)
            for layer, strengths_ in by_layer.items():
                edits.setdefault(part, {}).setdefault(layer, []).append((kind, strengths_))
    return edits


def _numbers(text: str, everything: Sequence[int]) -> list[int]:
    """``3``, ``2-5`` or ``*``."""
    if text == "*":
        return list(everything)
    low, _, high = text.partition("-")
    return list(range(int(low), int(high or low) + 1))
