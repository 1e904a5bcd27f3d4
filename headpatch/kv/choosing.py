"""What policies that choose tokens have in common: scores from the prompt's last queries, budgets across heads, the choice itself.

:class:`ObservationWindow` is what those share that keep the prompt's best tokens by such scores (`snapkv`, `ada_kv`).

Letters: H query heads, K KV heads, G = H / K, n tokens of the prompt, w queries of the observation window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import Operands, param
from headpatch.policies import SelectionMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BUCKETS", "ObservationWindow", "check_kernel", "choose", "even_out", "share_out", "window_scores"]

BUCKETS = 4
"""Different lengths that the heads of a layer may have: heads of one length are stored, and attended to, together."""


@dataclass(frozen=True)
class ObservationWindow(SelectionMethod):
    """Heads keep the window, the first `sink` tokens, and the best of the others by :func:`window_scores`."""

    window: int = param(64, ge=1, le=4096, help="last tokens of the prompt whose queries choose; always kept")
    kernel: int = param(5, ge=1, le=255, help="width of the pooling over neighbouring tokens; odd")
    pool: Literal["avg", "max"] = param("avg", help="how neighbours are pooled")
    sink: int = param(0, ge=0, le=2**20, help="first tokens that are always kept")

    needs: ClassVar[tuple[str, ...]] = ("kv_selection", "window_scores")

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def keeps(self, operand: str) -> bool:
        return operand == "first_token" and self.sink > 0

    def select(self, operands: Operands) -> tuple[Tensor, ...]:
        import torch

        attention = operands["window_scores"]
        n, heads, kv_heads = attention.shape[-1], attention.shape[1], operands["k"].shape[1]
        count = max(self.budget(n), self.window + self.sink)
        if count >= n:
            return (torch.arange(n, device=attention.device),) * kv_heads
        scores = window_scores(attention, heads // kv_heads, self.window, self.kernel, self.pool, self.over_group)
        return choose(scores, self.counts(scores, count), self.sink, self.window, n)

    @property
    def over_group(self) -> str:
        """How scores of the query heads that share a KV head become one."""
        return "mean"

    def counts(self, scores: Tensor, count: int) -> list[int]:
        """Tokens that each head keeps, window and sinks included, `count` on average; scores are [K, n - window]."""
        return [count] * scores.shape[0]


def check_kernel(kernel: int) -> None:
    """ValueError unless a pooling of this width has a middle."""
    if kernel % 2 == 0:
        raise ValueError(f"kernel {kernel} is even; an odd width has a middle")


def window_scores(attention: Tensor, groups: int, window: int, kernel: int, pool: str, reduce: str) -> Tensor:
    """Importance of each token before the window, as its last queries see it.

        s[h, j] = reduce over the group's query heads of pool over |i| <= kernel // 2 of mean over the window's rows of A[h, :, j + i]

    Parameters
    ----------
    attention
        [1, H, w, n], causal softmax rows of the prompt's last w queries, fp32 or fp64.
    groups
        G.
    window
        w; the last `window` tokens have no score.
    kernel, pool
        Width of the pooling (odd), and ``avg`` or ``max``. Its edges count what is there, zeros beyond.
    reduce
        ``mean`` or ``max`` over the query heads that share a KV head.

    Returns
    -------
    Tensor
        [K, n - window].
    """
    from torch.nn import functional

    rows = attention[0, :, :, : attention.shape[-1] - window].mean(1)
    smooth = functional.avg_pool1d if pool == "avg" else functional.max_pool1d
    pooled = smooth(rows[None], kernel, stride=1, padding=kernel // 2)[0]
    grouped = pooled.unflatten(0, (-1, groups))
    return grouped.mean(1) if reduce == "mean" else grouped.amax(1)


def choose(scores: Tensor, counts: Sequence[int], first: int, last: int, length: int) -> tuple[Tensor, ...]:
    """The best-scored tokens of each head, between those that all keep.

    Parameters
    ----------
    scores
        [K, m] of the tokens at positions 0..m; those of the first `first` mean nothing.
    counts
        Tokens that each head keeps in all, at least ``first + last`` and at most `length`.
    first, last
        Tokens at either end that every head keeps.
    length
        n.

    Returns
    -------
    tuple of Tensor
        Ascending positions per head. Of equal scores the earlier token wins.
    """
    import torch

    end = length - last
    middle = scores[:, first:end]
    order = middle.sort(dim=-1, descending=True, stable=True).indices + first
    head = torch.arange(first, device=scores.device)
    tail = torch.arange(end, length, device=scores.device)
    return tuple(
        torch.cat([head, order[k, : count - first - last].sort().values, tail]) for k, count in enumerate(counts)
    )


def share_out(scores: Tensor, total: int, floor: float) -> list[int]:
    """Heads' shares of `total` tokens: those among the best of all heads together, mixed with equal shares.

        c_h = hits of head h among the `total` best scores of all heads
        share_h = (1 - floor) c_h + floor total / K           rounded so that the sum stays `total`

    Parameters
    ----------
    scores
        [K, m].
    total
        At most K m.
    floor
        0: the best of all heads decide; 1: equal shares.
    """
    import torch

    heads, m = scores.shape
    best = scores.flatten().sort(descending=True, stable=True).indices[:total] // m
    hits = torch.bincount(best, minlength=heads).double()
    wanted = ((1 - floor) * hits + floor * total / heads).clamp_max(m).tolist()
    return _rounded(wanted, total, m)


def _rounded(wanted: Sequence[float], total: int, most: int) -> list[int]:
    """Whole numbers up to `most` near `wanted` that add up to `total`: largest remainders first, earlier heads first."""
    shares = [int(x) for x in wanted]
    order = sorted(range(len(wanted)), key=lambda h: (shares[h] - wanted[h], h))
    missing = total - sum(shares)
    while missing > 0:
        before = missing
        for h in order:
            if missing and shares[h] < most:
                shares[h] += 1
                missing -= 1
        if missing == before:
            break
    return shares


def even_out(counts: Sequence[int], buckets: int = BUCKETS) -> list[int]:
    """`counts` with at most `buckets` different values: neighbours in size get their mean (rounded down), so the sum stays nearly.

    The split is the one with the least squared change.
    """
    order = sorted(range(len(counts)), key=lambda h: counts[h])
    ranked = [counts[h] for h in order]
    n = len(ranked)
    total, squares = [0], [0]
    for x in ranked:
        total.append(total[-1] + x)
        squares.append(squares[-1] + x * x)

    def cost(i: int, j: int) -> float:
        part = total[j] - total[i]
        return squares[j] - squares[i] - part * part / (j - i)

    # best[b][j]: the least cost of the first j in at most b runs, and where the last run starts
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * n]
    for _ in range(min(buckets, n)):
        row = [(0.0, 0)]
        row += [min((best[-1][i][0] + cost(i, j), i) for i in range(j)) for j in range(1, n + 1)]
        best.append(row)
    result, stop = [0] * n, n
    for runs in range(len(best) - 1, 0, -1):
        if not stop:
            break
        start = best[runs][stop][1]
        for place in range(start, stop):
            result[order[place]] = (total[stop] - total[start]) // (stop - start)
        stop = start
    return result
