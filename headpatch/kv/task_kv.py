"""Task-KV: KV heads that say something of their own keep the whole prompt; the others keep its ends and what matters between.

**Built from second-hand notes**: neither the paper's full text nor code could be read. What is marked [ours] fills gaps.

At the end of the prompt, per layer r of R, with the attention A of its last L queries, [H, L, n]:

    C_h     = pool_7(mean over the L rows of A_h)                      averaged over a KV head's query heads [ours]
    s_h     = sum over the t best tokens i of C_h of C_h[i] v_h[i]     the head's semantic vector
    delta_h = || s_h - mean over heads of s ||                         Euclidean [ours]
    f       = round(K beta - (K beta - m) r / (R - 1))                 heads farthest from the mean, fewer with depth
    k       = (B - n f) / (K - f) - sink - recent                      B = budget * K

The f heads with the largest delta keep all n tokens. Every other head keeps the first `sink`, the last `recent` and the k best
between them by C; where k would be negative, `recent` gives way [ours]. Afterwards every token is kept.

Source: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads", arXiv 2501.15113.

`nearest` of the f heads may be those nearest to the mean, which the notes mention without a number; 0 by default [ours]. K counts
KV heads; the publication does not say what it counts under grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.kv.choosing import check_kernel, choose, window_scores
from headpatch.methods.base import Operands, param
from headpatch.policies import SelectionMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskKV(SelectionMethod):
    """KV heads far from a layer's semantic centre keep the whole prompt, the others its ends and what matters between."""

    window: int = param(32, ge=1, le=4096, help="last tokens of the prompt whose queries choose")
    kernel: int = param(7, ge=1, le=255, help="width of the average pooling over neighbouring tokens; odd")
    semantic: int = param(256, ge=1, le=2**20, help="best tokens whose values make a head's semantic vector")
    sink: int = param(16, ge=0, le=2**20, help="first tokens that every head keeps")
    recent: int = param(256, ge=1, le=2**24, help="last tokens that every head keeps")
    beta: float = param(
        0.25, ge=0.0, le=1.0, help="share of the first layer's heads that keep everything; below `ratio`"
    )
    least: int = param(1, ge=0, le=1024, help="heads of the last layer that keep everything")
    nearest: int = param(
        0, ge=0, le=1024, help="how many of the heads that keep everything are those nearest to the centre"
    )

    name: ClassVar[str] = "task_kv"
    needs: ClassVar[tuple[str, ...]] = ("kv_selection", "window_scores", "v", "depth")

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if not self.size and self.beta >= self.ratio:
            raise ValueError(
                f"beta {self.beta} is not below ratio {self.ratio}: nothing would be left for the other heads"
            )

    def keeps(self, operand: str) -> bool:
        return operand == "first_token" and self.sink > 0

    def whole_heads(self, kv_heads: int, layer: int, layers: int) -> int:
        """f: heads of a layer that keep the whole prompt."""
        first = kv_heads * self.beta
        f = first if layers < 2 else first - (first - self.least) * layer / (layers - 1)
        return min(kv_heads, max(0, int(f + 0.5)))

    def select(self, operands: Operands) -> tuple[Tensor, ...]:
        import torch

        attention, v = operands["window_scores"], operands["v"][0]
        n, heads, kv_heads = attention.shape[-1], attention.shape[1], v.shape[0]
        whole = torch.arange(n, device=v.device)
        f = self.whole_heads(kv_heads, *operands["depth"])
        if n < self.window + self.sink + self.recent or f == kv_heads or self.budget(n) >= n:
            return (whole,) * kv_heads
        scores = window_scores(attention, heads // kv_heads, 0, self.kernel, "avg", "mean")
        best = scores.topk(min(self.semantic, n), -1)
        vectors = (
            best.values[..., None] * v.float().gather(1, best.indices[..., None].expand(-1, -1, v.shape[-1]))
        ).sum(1)
        order = (vectors - vectors.mean(0)).norm(dim=-1).sort(descending=True, stable=True).indices.tolist()
        near = min(self.nearest, f)
        kept = {*order[: f - near], *(order[len(order) - near :] if near else ())}
        quota = max(1, (self.budget(n) * kv_heads - n * f) // (kv_heads - f))
        sink = min(self.sink, quota)
        recent = min(self.recent, max(0, quota - sink))
        chosen = choose(scores, [max(quota, sink + recent)] * kv_heads, sink, recent, n)
        return tuple(whole if h in kept else chosen[h] for h in range(kv_heads))
