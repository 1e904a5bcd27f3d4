"""What the tests of single methods share: a zoo model under a recipe, next to the same model with the edit written out.

The written-out edit is a function from one attention call (see naive.py) to head outputs. It holds whole softmax rows in float64 and
is written from the method's formula alone; nothing here imports a method.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from compat import logits
from naive import Call, Naive
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import ZOO, Inputs, chunk

import headpatch

__all__ = [
    "CACHES", "LENGTHS", "PADDINGS", "SPANS", "Written", "amounts", "compare", "compare_part", "everywhere", "inputs_of", "learned",
    "on_rows", "recipe_of", "token_columns", "under",
]  # fmt: skip

LENGTHS = (13, 9, 5)
PADDINGS = (None, "left", "right")
CACHES = ("dynamic", "dynamic_config", "static")
SPANS: list[list[tuple[int, int]]] = [[(2, 4), (5, 8)], [(0, 2)], []]
"""Two spans, one that holds the first token, none."""

Row = Callable[[Tensor, Call], Tensor]
"""From softmax rows [b, H, q, n] to edited ones."""
Written = Callable[[int], Callable[[Call], Tensor]]
"""For a layer of a request: the edit of its calls, which may remember what the first of them was."""


def inputs_of(entry: str, padding: str | None, continuation: int = 4, seed: int = 0) -> Inputs:
    """Three rows of a zoo model's prompt and what follows it, in float64."""
    lengths = list(LENGTHS) if padding else [LENGTHS[0]] * len(LENGTHS)
    made = ZOO[entry].make_inputs(lengths=lengths, padding_side=padding, continuation=continuation, seed=seed)
    return made.to(torch.float64)


def token_columns(inputs: Inputs, part: str = "text") -> tuple[Tensor, Tensor]:
    """[b] column of each row's first real token, and [b] real tokens of its prompt."""
    return inputs.first[part], inputs.real[:, : inputs.prompt].sum(-1)


def recipe_of(method: str, strengths: Mapping[int, float], **parameters: Any) -> dict[str, Any]:
    """A recipe with one patch, the same in all layers: head -> strength."""
    heads = {f"*.{head}": value for head, value in strengths.items()}
    return {"headpatch": 1, "patches": [{"method": method, "heads": heads, **parameters}]}


def learned(p: Tensor, call: Call) -> Tensor | float:
    """[b, H, q, 1] what learned sinks take of each row; 0 in models without them."""
    return 0.0 if call.sinks is None else 1 - p.sum(-1, keepdim=True)


def everywhere(row: Row) -> Written:
    """A written-out edit that is the same in all layers and remembers nothing."""
    return lambda layer: on_rows(row)


def on_rows(*edits: Row) -> Callable[[Call], Tensor]:
    """Head outputs of rows edited one after the other."""

    def run(call: Call) -> Tensor:
        p = call.p
        for edit in edits:
            p = edit(p, call)
        return call.out(p)

    return run


def amounts(strengths: Mapping[int, float], num_heads: int, identity: float) -> Tensor:
    """[1, H, 1, 1] strengths, the identity where no head is named."""
    return torch.tensor([strengths.get(h, identity) for h in range(num_heads)], dtype=torch.float64).view(1, -1, 1, 1)


def compare_part(
    entry: str, part: str, data: dict[str, Any], written: Callable[[Inputs], Written], spans: Any = None
) -> None:
    """One forward of a model with several attention stacks, or of an image classifier, under a patch of one stack."""
    zoo = ZOO[entry]
    padding = "left" if zoo.kind in ("text_text", "speech") else None
    inputs = zoo.make_inputs(lengths=[9, 6] if padding else None, padding_side=padding).to(torch.float64)
    data["patches"][0]["part"] = part
    model, naive = zoo.build(torch.float64), Naive(zoo, part)
    plain = logits(model, inputs.kwargs)[inputs.real]
    make = written(inputs)
    with (
        under(headpatch.apply(model, data), spans),
        naive.edited({layer: make(layer) for layer in naive.taps}) as other,
    ):
        found, expected = logits(model, inputs.kwargs)[inputs.real], logits(other, inputs.kwargs)[inputs.real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert (expected - plain).abs().max() > 1e-3, "the edit does nothing"


@contextlib.contextmanager
def under(handle: Any, spans: Any) -> Iterator[None]:
    """With these spans, or with none."""
    with handle.inputs(spans=spans) if spans is not None else contextlib.nullcontext():
        yield


def compare(
    entry: str, data: dict[str, Any], written: Written, padding: str | None = None, cache: str = "dynamic",
    continuation: int = 4, spans: Sequence[Any] | None = None, limit: float = 1e-8, moves: float = 1e-3,
    prepare: Callable[[Naive], None] | None = None,
) -> None:  # fmt: skip
    """Logits of the patched model and of the written-out one, in the prompt and in every later token.

    Parameters
    ----------
    prepare
        Called with the naive model first.
    moves
        What the edit must at least change in the prompt's logits and in those of later tokens; otherwise the test means nothing.
    """
    zoo, inputs = ZOO[entry], inputs_of(entry, padding, continuation)
    model, naive, plain = (zoo.build(torch.float64, zoo.attn[0]), Naive(zoo), zoo.build(torch.float64, zoo.attn[0]))
    if prepare is not None:
        prepare(naive)
    width = inputs.real.shape[1]
    config = model.config.get_text_config(decoder=True)
    kept = StaticCache(config=config, max_cache_len=width + 3) if cache == "static" else (
        DynamicCache(config=config) if cache == "dynamic_config" else DynamicCache()
    )  # fmt: skip
    other, third = DynamicCache(), DynamicCache()
    handle, moved = headpatch.apply(model, data), []
    edges = [0, *range(inputs.prompt, width + 1)]
    with under(handle, spans), naive.edited({layer: written(layer) for layer in naive.taps}) as reference:
        for start, stop in itertools.pairwise(edges):
            call, real = chunk(zoo, inputs.kwargs, start, stop), inputs.real[:, start:stop]
            found = logits(model, call, past_key_values=kept)[real]
            expected = logits(reference, call, past_key_values=other)[real]
            torch.testing.assert_close(found, expected, rtol=0, atol=limit)
            moved.append(float((expected - logits(plain, call, past_key_values=third)[real]).abs().max()))
    assert moved[0] > moves and (continuation == 0 or max(moved[1:]) > moves), f"the edit does nothing: {moved}"
