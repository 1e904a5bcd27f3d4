"""Ada-KV: SnapKV's scores, and a budget that heads share by need.

A head whose attention is spread over the prompt needs more tokens than one that looks at a few. With SnapKV's scores s_h[j] (see
`headpatch/kv/snapkv.py`), K KV heads and C' = C - w - sink tokens to choose per head on average,

    c_h = tokens of head h among the K C' best of all heads of the layer together
    C_h = (1 - safeguard) c_h + safeguard C'                          rounded so that the sum stays K C'

and head h keeps its C_h best, the window's w tokens and the first `sink`. No head starves: `safeguard` of the budget is equal.

Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv
2407.11550; code: github.com/FFY0/AdaKV. Window, kernel and maximum pooling are its defaults.

Where this differs from the released code:

* Lengths are evened out: a layer's heads get at most four different ones, the mean of neighbours in size, so that heads of one
  length lie in one dense block. The layer's sum is kept, but for less than a token a head.
* Scores are per KV head (`reduce`), and so are budgets and copies.
* The released code makes a new flat cache in every step; here blocks grow in place.
* Rows of a batch are chosen for one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.kv.choosing import ObservationWindow, even_out, share_out
from headpatch.methods.base import param

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaKV(ObservationWindow):
    """KV heads keep the tokens that the prompt's last queries attend to most; heads of a layer share one budget."""

    window: int = param(32, ge=1, le=4096, help="last tokens of the prompt whose queries choose; always kept")
    kernel: int = param(7, ge=1, le=255, help="width of the pooling over neighbouring tokens; odd")
    pool: Literal["avg", "max"] = param("max", help="how neighbours are pooled")
    reduce: Literal["mean", "max"] = param("mean", help="over the query heads that share a KV head")
    safeguard: float = param(0.2, ge=0.0, le=1.0, help="part of the budget that all heads share equally; 1 is SnapKV")

    name: ClassVar[str] = "ada_kv"

    @property
    def over_group(self) -> str:
        return self.reduce

    def counts(self, scores: Tensor, count: int) -> list[int]:
        forced = self.window + self.sink
        shares = share_out(scores[:, self.sink :], scores.shape[0] * (count - forced), self.safeguard)
        return [forced + c for c in even_out(shares)]
