"""What policies keep that choose tokens, row by row and head by head in float64; and models whose other tokens are hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from compat import ids, logits
from kv_cases import cache_of, unbounded_layers
from naive import Call, Naive
from torch import Tensor
from zoo import ZOO

Keep = Callable[[Tensor, Tensor, Tensor, int, int], list[list[int]]]
"""From one row's attention [H, n, n], keys and values [K, n, d], layer and layers to kept positions per KV head."""


def pooled(attention: Tensor, kv: int, groups: int, w: int, kernel: int, pool: str, cut: int) -> list[float]:
    """Scores of the tokens before `cut` for one KV head, by the formula."""
    n = attention.shape[-1]
    total = [0.0] * cut
    for g in range(groups):
        rows = attention[kv * groups + g, n - w :, :]
        mean = [float(rows[:, j].mean()) for j in range(cut)]
        for j in range(cut):
            near = [mean[i] if 0 <= i < cut else None for i in range(j - kernel // 2, j + kernel // 2 + 1)]
            if pool == "avg":
                total[j] += sum(x or 0.0 for x in near) / kernel / groups
            else:
                total[j] += max(x for x in near if x is not None) / groups
    return total


def best(scores: list[float], count: int, first: int, end: int) -> list[int]:
    return sorted(sorted(range(first, end), key=lambda j: (-scores[j], j))[:count])


def snapkv(size: int, w: int, kernel: int, sink: int = 0, pool: str = "avg") -> Keep:
    def keep(attention: Tensor, k: Tensor, v: Tensor, layer: int, layers: int) -> list[list[int]]:
        n, kv_heads = k.shape[1], k.shape[0]
        count = max(min(size, n), w + sink)
        if count >= n:
            return [list(range(n))] * kv_heads
        found = []
        for h in range(kv_heads):
            scores = pooled(attention, h, len(attention) // kv_heads, w, kernel, pool, n - w)
            found.append([*range(sink), *best(scores, count - w - sink, sink, n - w), *range(n - w, n)])
        return found

    return keep


def ada(size: int, w: int, kernel: int, floor: float, sink: int) -> Keep:
    def keep(attention: Tensor, k: Tensor, v: Tensor, layer: int, layers: int) -> list[list[int]]:
        n, kv_heads = k.shape[1], k.shape[0]
        count = max(min(size, n), w + sink)
        if count >= n:
            return [list(range(n))] * kv_heads
        scores = [pooled(attention, h, len(attention) // kv_heads, w, kernel, "max", n - w) for h in range(kv_heads)]
        each = count - w - sink
        ranked = sorted(((s, h) for h in range(kv_heads) for s in scores[h][sink:]), key=lambda x: -x[0])
        hits = [sum(h == mine for _, mine in ranked[: each * kv_heads]) for h in range(kv_heads)]
        shares = [(1 - floor) * c + floor * each for c in hits]
        whole = [math.floor(s) for s in shares]
        for h in sorted(range(kv_heads), key=lambda h: (whole[h] - shares[h], h))[: each * kv_heads - sum(whole)]:
            whole[h] += 1
        return [[*range(sink), *best(scores[h], whole[h], sink, n - w), *range(n - w, n)] for h in range(kv_heads)]

    return keep


def least_alike(keys: Tensor, count: int, sink: int, recent: int) -> list[int]:
    n = len(keys)
    count = max(min(count, n), sink + recent)
    if count >= n:
        return list(range(n))
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    scores = [-float(u @ mean / mean.norm()) for u in unit]
    return [*range(sink), *best(scores, count - sink - recent, sink, n - recent), *range(n - recent, n)]


def keydiff(size: int, sink: int, recent: int) -> Keep:
    return lambda attention, k, v, layer, layers: [least_alike(keys, size, sink, recent) for keys in k]


def task(ratio: float, w: int, t: int, sink: int, recent: int, beta: float, least: int) -> Keep:
    def keep(attention: Tensor, k: Tensor, v: Tensor, layer: int, layers: int) -> list[list[int]]:
        n, kv_heads = k.shape[1], k.shape[0]
        f = math.floor(kv_heads * beta - (kv_heads * beta - least) / (layers - 1) * layer + 0.5)
        if n < w + sink + recent or f == kv_heads:
            return [list(range(n))] * kv_heads
        scores = [pooled(attention, h, len(attention) // kv_heads, w, 7, "avg", n) for h in range(kv_heads)]
        vectors = []
        for h in range(kv_heads):
            top = sorted(range(n), key=lambda j: (-scores[h][j], j))[:t]
            vectors.append(sum(scores[h][j] * v[h, j] for j in top))
        mean = torch.stack(vectors).mean(0)
        far = sorted(range(kv_heads), key=lambda h: -float((vectors[h] - mean).norm()))[:f]
        budget = int(n * ratio) * kv_heads
        middle = (budget - n * f) // (kv_heads - f) - sink - recent
        tail = recent if middle >= 0 else recent + middle
        return [
            list(range(n)) if h in far
            else [*range(sink), *best(scores[h], max(middle, 0), sink, n - tail), *range(n - tail, n)]
            for h in range(kv_heads)
        ]  # fmt: skip

    return keep


CASES: dict[str, tuple[dict[str, Any], Keep]] = {
    "snapkv": ({"method": "snapkv", "size": 12, "window": 4, "kernel": 3}, snapkv(12, 4, 3)),
    "snapkv_sinks": (
        {"method": "snapkv", "size": 14, "window": 5, "kernel": 5, "sink": 2, "pool": "max"}, snapkv(14, 5, 5, 2, "max"),
    ),
    "ada_kv": ({"method": "ada_kv", "size": 11, "window": 4, "kernel": 3, "sink": 1}, ada(11, 4, 3, 0.2, 1)),
    "ada_kv_free": ({"method": "ada_kv", "size": 9, "window": 3, "safeguard": 0.0}, ada(9, 3, 7, 0.0, 0)),
    "keydiff": ({"method": "keydiff", "size": 10, "sink": 2, "recent": 3}, keydiff(10, 2, 3)),
    "task_kv": (
        {"method": "task_kv", "ratio": 0.7, "window": 4, "semantic": 6, "sink": 2, "recent": 4, "beta": 0.5, "least": 0},
        task(0.7, 4, 6, 2, 4, 0.5, 0),
    ),
}  # fmt: skip


class Reference:
    """The zoo model step by step, with the prompt's tokens hidden that were not chosen."""

    def __init__(self, entry: str, keep: Keep) -> None:
        self.naive, self.keep = Naive(ZOO[entry]), keep
        self.layers, self.cache = unbounded_layers(entry), cache_of(entry, self.naive.model, "bare")

    def prompt(self, batch: dict[str, Tensor]) -> Tensor:
        found = logits(self.naive.model, batch, past_key_values=self.cache)
        mask = batch["decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"].bool()
        self.hidden: dict[int, Tensor] = {}
        for layer in self.layers:
            (call,) = self.naive.calls(layer)
            b, kv_heads, n, _ = call.k.shape
            hidden = torch.ones(b, kv_heads, n, dtype=torch.bool)
            for row in range(b):
                at = mask[row].nonzero().squeeze(-1)
                attention = call.p[row][:, at][:, :, at]
                chosen = self.keep(attention, call.k[row, :, at], call.v[row, :, at], layer, len(self.naive.taps))
                for head, kept in enumerate(chosen):
                    hidden[row, head, at[kept]] = False
            self.hidden[layer] = hidden
        return found

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        def edit(layer: int) -> Any:
            def run(call: Call) -> Tensor:
                gone = self.hidden[layer].repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
                seen = call.seen.expand(-1, call.q.shape[1], -1, -1).clone()
                seen[..., : gone.shape[-1]] &= ~gone[:, :, None]
                return call.out(call.scores.masked_fill(~seen, -torch.inf).softmax(-1))

            return run

        with self.naive.edited({layer: edit(layer) for layer in self.layers}) as model:
            return logits(model, batch, past_key_values=self.cache)


def steps(batch: dict[str, Tensor], widths: tuple[int, ...]) -> Any:
    mask = batch["attention_mask"]
    for i, width in enumerate(widths):
        mask = torch.cat([mask, torch.ones(len(mask), width, dtype=torch.long)], 1)
        positions = (mask.cumsum(-1) - 1)[:, -width:]
        yield {"input_ids": ids(len(mask), width, seed=9 + i), "attention_mask": mask, "position_ids": positions}


def with_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)}
