"""SnapKV: each KV head keeps the tokens of the prompt that its last queries attend to.

The last w queries of a prompt, the observation window, show what a head will look for. With their attention A = softmax(Q_w K^T /
sqrt(d) + causal), [H, w, n], and C tokens to keep per KV head,

    s_h[j] = pool_5(mean over the w rows of A_h[:, j]),  j < n - w            averaged over the query heads that share a KV head
    keep     the w tokens of the window, the first `sink`, and the C - w - sink best of the others by s

and every generated token. Pooling spreads a high score over its neighbours, so that a fact is not kept in shreds.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469; code:
github.com/FasterDecoding/SnapKV.

Where this differs from the released code:

* Scores are averaged over the query heads of a group, and one KV head keeps one set. The released code repeats keys first and so
  keeps a set, and a copy, per query head.
* `sink` is new, and 0 by default, as there. Another patch that names the first token needs it to be at least 1.
* No budget below the window and the sinks; a prompt that is no longer than the budget stays whole.

The question must stand in the prompt's last tokens for this to work well: scores from other text say little about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.kv.choosing import choose, window_scores
from headpatch.methods.base import Operands, param
from headpatch.policies import SelectionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(SelectionMethod):
    """KV heads keep the tokens of the prompt that its last queries attend to most."""

    window: int = param(64, ge=1, le=4096, help="last tokens of the prompt whose queries choose; always kept")
    kernel: int = param(5, ge=1, le=255, help="width of the pooling over neighbouring tokens; odd")
    pool: Literal["avg", "max"] = param("avg", help="how neighbours are pooled")
    sink: int = param(0, ge=0, le=2**20, help="first tokens that are always kept")

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[tuple[str, ...]] = ("kv_selection", "window_scores")

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even; an odd width has a middle")

    def keeps(self, operand: str) -> bool:
        return operand == "first_token" and self.sink > 0

    def select(self, operands: Operands) -> tuple[Tensor, ...]:
        import torch

        attention = operands["window_scores"]
        n, heads, kv_heads = attention.shape[-1], attention.shape[1], operands["k"].shape[1]
        count = max(self.budget(n), self.window + self.sink)
        if count >= n:
            return (torch.arange(n, device=attention.device),) * kv_heads
        scores = window_scores(attention, heads // kv_heads, self.window, self.kernel, self.pool, "mean")
        return choose(scores, [count] * kv_heads, self.sink, self.window, n)
