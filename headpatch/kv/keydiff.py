"""KeyDiff: each KV head keeps the keys that are least like the others.

Without looking at any query: with k_j the keys of a head as attention gets them, [n, d], and m the mean of the normalised keys,

    s[j] = -cos(k_j, m)                     keep the first `sink`, the last `recent`, and the best others by s, C in all

Distinct keys tend to be those that queries look for. Because no query is needed, the choice can be made again while decoding: with
`every` > 0, each time so many tokens were generated, every head goes back to its budget.

Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments", arXiv 2504.15364 (no official code was found; the formula is that of NVIDIA/kvpress, which says so too).

Where this differs: the paper drops keys block by block while the prompt comes in, so that a prompt never takes more than its
budget; here the whole prompt is there once, and what is dropped depends on no chunking. `sink` and `recent` are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.kv.choosing import choose
from headpatch.methods.base import Operands, param
from headpatch.policies import SelectionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyDiff(SelectionMethod):
    """KV heads keep the keys that are least like the mean of all."""

    sink: int = param(4, ge=0, le=2**20, help="first tokens that are always kept")
    recent: int = param(32, ge=1, le=2**24, help="last tokens that are always kept")
    every: int = param(
        0, ge=0, le=2**24, help="generated tokens after which a head is cut back to its budget; 0: never"
    )

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[tuple[str, ...]] = ("kv_selection", "k")

    @property
    def interval(self) -> int:
        return self.every

    def keeps(self, operand: str) -> bool:
        return operand == "first_token" and self.sink > 0

    def select(self, operands: Operands) -> tuple[Tensor, ...]:
        keys = operands["k"][0]
        return tuple(self.thin(k, keys.shape[1]) for k in keys)

    def thin(self, keys: Tensor, seen: int) -> Tensor:
        import torch
        from torch.nn import functional

        held = keys.shape[0]
        count = max(self.budget(seen), self.sink + self.recent)
        if count >= held:
            return torch.arange(held, device=keys.device)
        normal = functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        scores = -functional.cosine_similarity(normal, normal.mean(0, keepdim=True), dim=-1)
        return choose(scores[None], [count], self.sink, self.recent, held)[0]
