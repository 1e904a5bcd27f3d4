"""What engines whose cache drops tokens must answer: transformers with a plain float64 softmax under an explicit mask, in one call.

It shares no code with headpatch's adapters and knows no chunks, blocks, pieces or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from engine_cases import Answer, recipe
from torch import Tensor

import headpatch


@dataclass(frozen=True)
class Kept:
    """A cache policy, and edits beside it.

    `full`: by layer, the KV heads that keep everything. `gamma`, `scale`: [H] by layer, the factor on the first token's attention and
    on the head's output; `later`: [H] by layer, the factor on outputs from the prompt's end on.
    """

    sink: int
    recent: int
    full: Mapping[int, Sequence[int]]
    gamma: Mapping[int, Tensor] = field(default_factory=dict)
    scale: Mapping[int, Tensor] = field(default_factory=dict)
    later: Mapping[int, Tensor] = field(default_factory=dict)

    def policy(self) -> dict[str, Any]:
        """As a patch."""
        listed = [f"{layer}.{head}" for layer, heads in self.full.items() for head in heads]
        if not listed:
            return {"method": "streaming_llm", "sink": self.sink, "recent": self.recent}
        return {"method": "duo_attention", "sink": self.sink, "recent": self.recent, "full_kv_heads": listed}

    def recipe(self) -> dict[str, Any]:
        """As a recipe."""
        patches = [self.policy()]
        for method, heads, more in (
            ("zerotuning", self.gamma, {}), ("head_scaling", self.scale, {}), ("head_scaling", self.later, {"positions": "decode"}),
        ):  # fmt: skip
            values = {f"{layer}.{h}": round(float(v), 4) for layer, row in heads.items() for h, v in enumerate(row)}
            patches += [{"method": method, "heads": values, **more}] if values else []
        return recipe(*patches)


def factors(layers: int, heads: int, low: float, high: float, seed: int) -> dict[int, Tensor]:
    """[H] for each layer, of four digits."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(layers, heads, generator=generator, dtype=torch.float64) * (high - low) + low
    return {layer: (row * 1e4).round() / 1e4 for layer, row in enumerate(rows)}


def wanted(model: Any, answers: Sequence[Answer], kept: Kept) -> list[Tensor]:
    """Log-probabilities [tokens, vocabulary] of each answer's steps."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    tables = []
    try:
        for answer in answers:
            ALL_ATTENTION_FUNCTIONS["plain_windows"] = _attention(kept, len(answer.prompt))
            model.config._attn_implementation = "plain_windows"
            ids = torch.tensor([[*answer.prompt, *answer.tokens]], device=model.device)
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, len(answer.prompt) - 1 : -1]
            tables.append(logits.float().log_softmax(-1).cpu())
    finally:
        model.config._attn_implementation = before
    return tables


def _attention(kept: Kept, prompt: int) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, heads, group, n = module.layer_idx, q.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)[None]
        window = (j <= i) & ((j < kept.sink) | (i - j < kept.recent))
        outputs = []
        for h in range(heads):
            seen = (j <= i) if h // group in kept.full.get(layer, ()) else window
            scores = (q[:, h].double() @ k[:, h // group].double().transpose(-1, -2)) * scaling
            p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            if layer in kept.gamma:
                p = torch.cat([p[..., :1] * float(kept.gamma[layer][h]), p[..., 1:]], -1)
                p = p / p.sum(-1, keepdim=True)
            out = p @ v[:, h // group].double()
            out = out * (float(kept.scale[layer][h]) if layer in kept.scale else 1.0)
            if layer in kept.later:
                out = torch.where(i >= prompt, out * float(kept.later[layer][h]), out)
            outputs.append(out)
        return torch.stack(outputs, 2).to(q.dtype), None

    return attention


def pool(llm: Any) -> dict[str, Any]:
    """Blocks as the engine's scheduler counts them."""
    core = llm.llm_engine.engine_core
    found: dict[str, Any] = (
        core.call_utility("headpatch_pool") if hasattr(core, "call_utility") else core.engine_core.headpatch_pool()
    )
    return found


def supplied(adapter: str) -> bool:
    """Whether an adapter can do cache policies."""
    from headpatch.registry import adapters

    return any(a.name == adapter and "kv_windows" in a.supplies() for a in adapters())


def other_engine(model: Any, answers: Sequence[Answer], applied: Any) -> list[Tensor]:
    """The same from headpatch's transformers adapter, with a cache and token by token after the prompt."""
    tables = []
    with headpatch.applied(model, applied), torch.no_grad():
        for answer in answers:
            ids = torch.tensor([answer.prompt])
            out = model(ids, use_cache=True)
            rows = [out.logits[0, -1]]
            for token in answer.tokens[:-1]:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits[0, -1])
            tables.append(torch.stack(rows).float().log_softmax(-1))
    return tables
