"""A model whose attention is a mixture, head by head, of full attention and attention to the first and the last keys only.

    o_h = g_h full_h + (1 - g_h) near_h                       full, near: [1, n, H, d]; g: one per KV head, repeated over its group

For measuring what heads lose by the second, differentiably in g: weights stay as they are, the layers' own kernel computes the full
part, and the near part is one call of fused attention over blocks of queries, each with the keys it can see: memory grows with n, no
n x n matrix is made.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from headpatch.adapters.huggingface import attention as patched
from headpatch.adapters.huggingface.controller import NEVER_WITH, controller_of
from headpatch.adapters.huggingface.discover import Attention, find_layout
from headpatch.adapters.huggingface.lse import repeat_kv
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError

__all__ = ["Mixture", "near"]

NAME = "headpatch_mixture"
ATTRIBUTE = "_headpatch_mixture"


class _Layer:
    """What one attention module carries while a mixture runs: its config as it was, and the running mixture."""

    def __init__(self, where: Attention, mixture: Mixture) -> None:
        self.layer, self.config, self.mixture = where.layer, where.module.config, mixture
        self.groups = where.num_heads // where.num_kv_heads


class Mixture:
    """See :class:`headpatch.find.engine.Mixture`.

    Parameters
    ----------
    root
        A causal language model without recipes on it.
    first, recent
        Keys that near attention sees: the first ones, and the last ones up to the query's own.

    Raises
    ------
    UnsupportedModelError
        A layer's attention is more than a softmax over scores (position biases, soft-capping, learned sinks).
    HeadpatchError
        A recipe is on the model.
    """

    def __init__(self, root: Any, first: int, recent: int) -> None:
        if controller_of(root) is not None:
            raise HeadpatchError("a recipe is on this model, or it is being observed; take that off first")
        self.root, self.first, self.recent = root, first, recent
        self.layout = find_layout(root)
        self.device = root.get_input_embeddings().weight.device
        self.gates: Mapping[int, Tensor] = {}
        self.full: dict[int, Tensor] = {}
        self.own = False
        self.keep = False
        self.seen: dict[int, dict[str, Any]] | None = None
        main = self.layout.shape.main
        self.modules = {layer: a for (part, layer), a in self.layout.attention.items() if part == main}
        for where in self.modules.values():
            if problems := [NEVER_WITH[f] for f in where.features if f in NEVER_WITH]:
                raise UnsupportedModelError(f"layer {main}.{where.layer}: {problems[0]}")
        self.layers = self._probe()

    def _probe(self) -> dict[int, int]:
        """KV heads of each layer that sees the whole sequence; two tokens say how layers call their attention."""
        self.seen = {}
        with torch.no_grad(), self._on():
            token = next(t for t in range(2) if t != getattr(self.root.config, "pad_token_id", None))
            self._hidden(torch.full((1, 2), token, device=self.device))
        seen, self.seen = self.seen, None
        for layer, given in seen.items():
            for name in ("softcap", "s_aux", "position_bias", "cache"):
                if given.get(name) is not None:
                    raise UnsupportedModelError(
                        f"layer {layer}: attention with {name!r} cannot be mixed; its near part would not be that of the model"
                    )
        return {
            layer: self.modules[layer].num_kv_heads
            for layer, given in sorted(seen.items())
            if not given.get("sliding_window")
        }

    @torch.no_grad()
    def targets(self, ids: Sequence[int], reads: Sequence[int], keep: bool = True) -> Tensor:
        """Last hidden states [reads, D] of the model as it is; `keep` remembers each layer's full attention for :meth:`mixed`."""
        self.full, self.gates = {}, {}
        with self._on(keep=keep):
            return self._hidden(self._row(ids))[0, list(reads)]

    @contextlib.contextmanager
    def mixed(
        self, ids: Sequence[int], reads: Sequence[int], gates: Mapping[int, Tensor], recompute: bool = True
    ) -> Iterator[Tensor]:
        """The same under gates [K] by layer, differentiable in them; the way back must be gone inside the with block.

        Full attention is that of the last :meth:`targets` with `keep`, of the same tokens; without one it is computed from the
        mixed stream itself. `recompute` keeps only each layer's input for the way back, at the price of a second forward.
        """
        row = self._row(ids)
        self.gates, self.own = gates, not self.full
        if self.full and next(iter(self.full.values())).shape[1] != row.shape[1]:
            raise EngineError("the full attention that is kept belongs to other tokens")
        try:
            with self._frozen(), self._on(), self._recomputing(recompute):
                yield self._hidden(row)[0, list(reads)]
        finally:
            self.gates = {}

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    def _hidden(self, row: Tensor) -> Tensor:
        """[1, n, D] after the last norm: what the output embeddings get."""
        found: Tensor = self.root.base_model(input_ids=row, use_cache=False).last_hidden_state
        return found

    # --- what is changed for the length of one call ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _on(self, keep: bool = False) -> Iterator[None]:
        """The mixture in place of every layer's attention."""
        self.keep = keep
        for where in self.modules.values():
            module: Any = where.module
            own = copy.copy(module.config)
            own._attn_implementation_internal = NAME
            module.__dict__[ATTRIBUTE] = _Layer(where, self)
            module.config = own
        try:
            yield
        finally:
            for where in self.modules.values():
                module = where.module
                module.config = module.__dict__.pop(ATTRIBUTE).config

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        trained = [p for p in self.root.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    @contextlib.contextmanager
    def _recomputing(self, wanted: bool) -> Iterator[None]:
        """Transformers' own checkpointing of decoder layers, without the training mode of what is inside them."""
        layers = [m for m in self.root.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        before = [
            (m, m.training, m.__dict__.get("gradient_checkpointing"), m.__dict__.get("_gradient_checkpointing_func"))
            for m in layers
        ]
        for m in layers:
            m.__dict__.update(training=True, gradient_checkpointing=True, _gradient_checkpointing_func=again)
        try:
            yield
        finally:
            for m, training, on, function in before:
                m.__dict__["training"] = training
                for name, value in (("gradient_checkpointing", on), ("_gradient_checkpointing_func", function)):
                    if value is None:
                        m.__dict__.pop(name, None)
                    else:
                        m.__dict__[name] = value

    # --- one layer --------------------------------------------------------------------------------------------------------

    def attend(self, state: _Layer, q: Tensor, k: Tensor, v: Tensor, full: Any, scale: float) -> Tensor:
        """[1, n, H, d]: `full` computes the layer's own attention."""
        layer = state.layer
        gate = self.gates.get(layer)
        if gate is None:
            out: Tensor = full()
            if self.keep:
                self.full[layer] = out
            return out
        whole = full() if self.own else self.full[layer]
        part = near(q, k, v, scale, self.first, self.recent).transpose(1, 2)
        share = gate.to(whole.device, torch.promote_types(whole.dtype, torch.float32))
        share = share.repeat_interleave(state.groups)[:, None]
        return torch.lerp(part.to(share.dtype), whole.to(share.dtype), share.expand_as(whole)).to(whole.dtype)


def near(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, recent: int) -> Tensor:
    """Causal attention in which query i sees the keys j < first and i - recent < j <= i.

    Parameters
    ----------
    q, k, v
        [1, H, n, d], [1, K, n, d], [1, K, n, d_v].

    Returns
    -------
    Tensor
        [1, H, n, d_v].
    """
    heads, n, groups = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    if n <= first + recent:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    block = max(64, first + recent)
    count = -(-n // block)
    pad = count * block - n
    width = block + recent - 1

    def blocks(x: Tensor) -> Tensor:
        """[count, H, first + width, d]: the first keys, then those from recent - 1 before the block to its end."""
        near = nn.functional.pad(x[0], (0, 0, recent - 1, pad)).unfold(1, width, block).permute(1, 0, 3, 2)
        return torch.cat([x[:, :, :first].expand(count, -1, -1, -1), near], 2)

    queries = nn.functional.pad(q[0], (0, 0, 0, pad)).view(heads, count, block, -1).transpose(0, 1)
    at = torch.arange(count * block, device=q.device).view(count, block, 1)
    key = torch.arange(count, device=q.device)[:, None] * block - (recent - 1) + torch.arange(width, device=q.device)
    key = key[:, None]
    window = (key >= first) & (key > at - recent) & (key <= at)
    sinks = (torch.arange(first, device=q.device) <= at).expand(count, block, first)
    mask = torch.cat([sinks, window], -1)[:, None]
    out = nn.functional.scaled_dot_product_attention(queries, blocks(k), blocks(v), attn_mask=mask, scale=scale)
    return out.transpose(0, 1).reshape(1, heads, count * block, -1)[:, :, :n]


def mixture_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of one module of a mixture; arguments and results as transformers defines them for attention functions."""
    state: _Layer | None = module.__dict__.get(ATTRIBUTE)
    if state is None:
        raise EngineError(f"{type(module).__name__} uses the attention implementation {NAME!r} outside a mixture")
    if state.mixture.seen is not None:
        state.mixture.seen[state.layer] = kwargs
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    def full() -> Tensor:
        out, _ = patched.base_attention(
            module, state, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
        return out

    return state.mixture.attend(state, query, key, value, full, scale), None


AttentionInterface.register(NAME, mixture_attention)
