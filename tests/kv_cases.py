"""What the tests of cache policies share: the same model with a mask per head written out, and ways to feed a cache.

A streaming head's query at position i sees position p iff p < sink or i - recent < p <= i, positions counted in real tokens. The
reference keeps every key, holds whole softmax rows in float64, and knows nothing of rings, groups or chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from compat import logits
from method_cases import Written
from naive import Call, Naive
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from zoo import ZOO, Inputs, chunk

__all__ = [
    "RECENT",
    "SINK",
    "cache_of",
    "duo",
    "feed",
    "full_heads",
    "reference_logits",
    "unbounded_layers",
    "visible",
    "window_edit",
]

SINK, RECENT = 3, 5


def unbounded_layers(entry: str) -> list[int]:
    """Layers of the main part without a window of their own."""
    zoo = ZOO[entry]
    config: Any = zoo.config()
    types = getattr(config.get_text_config(decoder=True), "layer_types", None)
    layers = list(zoo.parts[zoo.main].modules)
    if entry == "mistral":
        return []
    return [n for n in layers if types is None or types[n] == "full_attention"]


def full_heads(entry: str) -> dict[int, tuple[int, ...]]:
    """KV heads that keep all: in turn one, none, all, some; head 0 in layers with a window, where it means nothing."""
    part = ZOO[entry].parts[ZOO[entry].main]
    count = part.num_kv_heads
    choices = itertools.cycle([(count - 1,), (), tuple(range(count)), tuple(range(0, count, 2))])
    return dict.fromkeys(part.modules, (0,)) | dict(zip(unbounded_layers(entry), choices, strict=False))


def duo(entry: str, sink: int = SINK, recent: int = RECENT, **more: Any) -> dict[str, Any]:
    """A recipe with :func:`full_heads`."""
    listed = [f"{layer}.{head}" for layer, heads in full_heads(entry).items() for head in heads]
    return {
        "headpatch": 1,
        "patches": [{"method": "duo_attention", "full_kv_heads": listed, "sink": sink, "recent": recent, **more}],
    }


def visible(call: Call, real: Tensor, full: Sequence[int], sink: int, recent: int) -> Tensor:
    """[b, H, q, n] what each head's queries see; `real` is [b, columns], this call's included."""
    n, n_q, groups = call.seen.shape[-1], call.seen.shape[-2], call.q.shape[1] // call.k.shape[1]
    position = real[:, :n].long().cumsum(-1) - 1
    key, query = position[:, None, :], position[:, n - n_q :, None]
    window = (key < sink) | (key > query - recent)
    heads = [window | (head // groups in full) for head in range(call.q.shape[1])]
    return call.seen & torch.stack(heads, 1)


def window_edit(full: dict[int, tuple[int, ...]], real: Tensor, sink: int = SINK, recent: int = RECENT) -> Written:
    """The written-out policy."""

    def of_layer(layer: int) -> Any:
        def run(call: Call) -> Tensor:
            seen = visible(call, real.to(torch.bool), full[layer], sink, recent)
            scores = call.scores.masked_fill(~seen, -torch.inf)
            total = torch.logsumexp(scores, -1, keepdim=True)
            if call.sinks is not None:
                total = torch.logaddexp(total, call.sinks.to(total)[None, :, None, None])
            return call.out(torch.exp(scores - total).nan_to_num(0.0))

        return run

    return of_layer


def feed(entry: str, model: Any, inputs: Inputs, edges: Sequence[int], cache: Any) -> Tensor:
    """Logits of all positions, fed in the pieces between `edges` through one cache."""
    zoo = ZOO[entry]
    return torch.cat(
        [logits(model, chunk(zoo, inputs.kwargs, i, j), past_key_values=cache) for i, j in itertools.pairwise(edges)],
        1,
    )


def reference_logits(
    entry: str, inputs: Inputs, written: Written, layers: Sequence[int], edges: Sequence[int] | None = None
) -> Tensor:
    """Logits of the written-out model: in one call without a cache, or in pieces with an ordinary one."""
    naive = Naive(ZOO[entry])
    with naive.edited({layer: written(layer) for layer in layers}) as model:
        if edges is not None:
            return feed(entry, model, inputs, edges, cache_of(entry, model))
        return logits(model, inputs.kwargs, use_cache=False)


def cache_of(entry: str, model: Any, kind: str = "dynamic", length: int = 64) -> Any:
    """An empty cache: ``dynamic`` (with the model's config), ``bare`` (without) or ``static``."""

    def one() -> Any:
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=length)
        return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()

    return EncoderDecoderCache(one(), DynamicCache()) if ZOO[entry].kind in ("speech", "text_text") else one()
