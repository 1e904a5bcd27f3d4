"""A quick score for streaming heads: how much of a head's output goes when it sees the first and the last keys only.

Behind a long text with passkeys, at the queries i of their questions and answers (one forward pass per sample, no training),

    score of KV head k = mean over samples, queries and the query heads h of its group of  |full_h - near_h|^2 / (|full_h|^2 +
    |near_h|^2)

where full_h = sum_j p_j v_j, [d], and near_h the same over the keys j < sink and i - recent < j <= i, p renormalised. 0: nothing is
lost; 1: the two have nothing to do with each other. Each head is looked at alone, in the untouched model: what heads could do for
each other is not seen, which the trained gates (:mod:`headpatch.find.gates`) do see.

The idea of scoring heads on the fly, without training, is kvpress's (``DuoAttentionPress(on_the_fly_scoring=True)``), whose score is
another: the area under the cumulated attention of a text's mean query over repetitions of its mean key, before and after rotation.
That one cannot see sinks or content; this one is what streaming takes from the output itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headpatch.api import observe
from headpatch.errors import HeadpatchError
from headpatch.find.engine import open_bench
from headpatch.find.haystack import Haystack, generated
from headpatch.find.passkeys import Passkeys, sample
from headpatch.find.provenance import versions
from headpatch.find.ranking import HeadScores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["near_loss"]

BUDGET = 1 << 26
"""Attention weights that may be held at once, over all heads."""


def near_loss(
    model: Any, tokenizer: Any, keys: Passkeys | None = None, *, samples: int = 8, sink: int = 128, recent: int = 256,
    haystack: Haystack = generated, model_name: str | None = None,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> HeadScores:  # fmt: skip
    """Measure every KV head of the model's main part that sees the whole sequence; nothing about the model is changed.

    Raises
    ------
    HeadpatchError
        Samples do not fit, or lie within `sink` and `recent` altogether.
    """
    import torch

    keys = keys or Passkeys()
    if keys.longest <= sink + recent:
        raise HeadpatchError(
            f"samples of at most {keys.longest} tokens are all within {sink} first and {recent} last keys"
        )
    bench = open_bench(model, tokenizer)
    part = bench.shape.parts[bench.shape.main]
    total = {layer: torch.zeros(part.num_heads[layer], dtype=torch.float64) for layer in part.softmax_layers()}
    queries, windows = 0, set[int]()
    for number in range(samples):
        progress("samples", number, samples)
        hidden, reads = sample(bench, haystack, keys, number)
        session = bench.session()
        session.feed(hidden.ids[: reads.start])
        step = max(1, BUDGET // (sum(part.num_heads) * len(hidden.ids)))
        for start in range(reads.start, reads.stop, step):
            ids = hidden.ids[start : min(start + step, reads.stop)]
            with observe(model, ("window_scores", "v"), "*.*", window=len(ids)) as seen:
                session.feed(ids)
            for layer, found in total.items():
                heads = range(part.num_heads[layer])
                weights = torch.stack([seen["window_scores", f"{layer}.{h}"][-1][0] for h in heads])
                values = torch.stack([seen["v", f"{layer}.{h}"][-1][0] for h in heads])
                if values.shape[1] < session.length:
                    windows.add(layer)
                    continue
                found += _lost(weights, values, start, sink, recent).cpu()
            queries += len(ids)
    progress("samples", samples, samples)
    kept = {layer: t / queries for layer, t in total.items() if layer not in windows}
    if not kept:
        raise HeadpatchError("every layer of this model sees a window of tokens only: there is nothing to save")
    scores = {layer: t.view(part.num_kv_heads[layer], -1).mean(1) for layer, t in kept.items()}
    about: dict[str, Any] = {
        "data": {**haystack.about(), "needles": "passkeys"}, "samples": samples, "lengths": [keys.shortest, keys.longest],
        "passkeys": [keys.count, keys.words], "sink": sink, "recent": recent, "chat": keys.chat, "seed": keys.seed,
        **versions(bench.about()),
    }  # fmt: skip
    name = model_name or bench.about()["model"]
    values_ = {layer: tuple(t.tolist()) for layer, t in scores.items()}
    return HeadScores("output lost by near attention", "kv", values_, about, bench.shape.to_block(name))


def _lost(weights: Tensor, values: Tensor, start: int, sink: int, recent: int) -> Tensor:
    """[H] sums over queries start, start + 1, ... of the distance; weights are [H, q, n], values [H, n, d]."""
    import torch

    q, n = weights.shape[1:]
    i = start + torch.arange(q, device=weights.device)[:, None]
    j = torch.arange(n, device=weights.device)
    seen = (j <= i) & ((j < sink) | (j > i - recent))
    values = values.to(weights.dtype)
    full = weights @ values
    near = (
        (weights * seen) @ values / (weights * seen).sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    )
    apart = (full - near).square().sum(-1)
    size = full.square().sum(-1) + near.square().sum(-1)
    return (apart / size.clamp_min(torch.finfo(weights.dtype).tiny)).double().sum(-1)
