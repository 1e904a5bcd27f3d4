"""Cache policies by position, in transformers: equal to a mask written out in float64, however the tokens come in."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from compat import logits, quiet_transformers
from kv_cases import RECENT, SINK, cache_of, duo, feed, full_heads, reference_logits, unbounded_layers, window_edit
from method_cases import inputs_of
from naive import Naive
from transformers import DynamicCache
from zoo import ZOO

import headpatch

pytestmark = pytest.mark.filterwarnings("error")
MODELS = (
    "llama",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gpt_oss",
    "whisper",
    "bart",
    "llava",
    "qwen3_next",
)
PADDINGS = (None, "left", "right")
CASES = [
    (entry, padding) for entry in MODELS for padding in PADDINGS if padding != "right" or entry in ("llama", "bart")
]


@pytest.fixture(autouse=True)
def silent():
    with quiet_transformers("is falling back to its reference"):
        yield


def reference(entry: str, inputs: Any, sink: int = SINK, recent: int = RECENT, edges: Any = None) -> Any:
    written = window_edit(full_heads(entry), inputs.real, sink, recent)
    return reference_logits(entry, inputs, written, unbounded_layers(entry), edges)


def close(found: Any, expected: Any, real: Any, entry: str = "llama") -> None:
    limit = 1e-8 if ZOO[entry].exact64 or ZOO[entry].attn[0] == "sdpa" else 2e-5
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=limit)


@pytest.mark.parametrize(("entry", "padding"), CASES)
def test_prompt_and_steps_equal_the_mask(entry, padding):
    inputs = inputs_of(entry, padding, continuation=9)
    width = inputs.real.shape[1]
    edges = [0, *range(inputs.prompt, width + 1)]
    # Its linear layers compute in float32, and otherwise in one call than step by step.
    expected = reference(entry, inputs, edges=edges if entry == "qwen3_next" else None)
    model = ZOO[entry].build(torch.float64, ZOO[entry].attn[0])
    plain = logits(model, inputs.kwargs)
    with headpatch.applied(model, duo(entry)):
        found = feed(entry, model, inputs, edges, cache_of(entry, model))
        without = logits(model, inputs.kwargs, use_cache=False)
    close(found, expected, inputs.real, entry)
    if entry != "qwen3_next":
        close(without, expected, inputs.real, entry)
    assert (expected - plain)[inputs.real].abs().max() > 1e-3, "the policy does nothing"
    assert torch.equal(logits(model, inputs.kwargs), plain)


@pytest.mark.parametrize("kind", ["bare", "own", "static"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("seed", range(2))
def test_chunks_mean_nothing(seed, padding, kind):
    rng = random.Random(f"{seed} {padding} {kind}")
    sink, recent = rng.choice([(0, 1), (0, 4), (1, 1), (2, 7), (5, 3), (11, 2)])
    inputs = inputs_of("llama", padding, continuation=40, seed=seed)
    expected = reference("llama", inputs, sink, recent)
    width = inputs.real.shape[1]
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, duo("llama", sink, recent)):
        for _ in range(2):
            cuts = sorted(rng.sample(range(1, width), rng.randrange(0, 12)))
            cache = None if kind == "own" else cache_of("llama", model, kind, width + 2)
            if cache is None:  # the cache that the model makes itself in the first call
                first = cuts[0] if cuts else width
                with torch.no_grad():
                    given = {k: v if v is None else v[:, :first] for k, v in inputs.kwargs.items()}
                    out = model(**given, use_cache=True)
                pieces = [out.logits]
                if cuts:
                    pieces.append(feed("llama", model, inputs, [*cuts, width], out.past_key_values))
                found = torch.cat(pieces, 1)
            else:
                found = feed("llama", model, inputs, [0, *cuts, width], cache)
            close(found, expected, inputs.real)


def test_long_prompts_run_in_folded_blocks(monkeypatch):
    """Many blocks of queries in one kernel call, a rest, a chunk on top: all equal the mask."""
    from headpatch.adapters.huggingface import kvattention

    monkeypatch.setattr(kvattention, "QUERIES", (4, 8))
    monkeypatch.setattr(kvattention, "FOLDED", 24)
    inputs = inputs_of("llama", None, continuation=117)
    for sink, recent in ((3, 5), (0, 2), (8, 8), (1, 21)):
        expected = reference("llama", inputs, sink, recent)
        model = ZOO["llama"].build(torch.float64)
        with headpatch.applied(model, duo("llama", sink, recent)):
            for edges in ([0, 130], [0, 61, 130], [0, 9, 10, 130]):
                close(feed("llama", model, inputs, edges, DynamicCache()), expected, inputs.real)


def test_an_eager_base_changes_nothing():
    """Its masks are additive, and always there."""
    inputs = inputs_of("llama", "left", continuation=6)
    expected = reference("llama", inputs)
    model = ZOO["llama"].build(torch.float64, "eager")
    with headpatch.applied(model, duo("llama")):
        found = feed("llama", model, inputs, [0, 7, 13, 14, 15, inputs.real.shape[1]], DynamicCache())
    close(found, expected, inputs.real)


@pytest.mark.parametrize("padding", [None, "left"])
def test_nothing_changes_up_to_the_window(padding):
    """T <= sink + recent: the logits of the untouched model, and its tokens."""
    inputs = inputs_of("llama", padding, continuation=7)
    model = ZOO["llama"].build(torch.float32)
    width = inputs.real.shape[1]
    plain = logits(model, inputs.kwargs)
    prompt = {k: v[:, : inputs.prompt] for k, v in inputs.kwargs.items() if k != "position_ids" and v is not None}
    prompt.setdefault("attention_mask", torch.ones_like(prompt["input_ids"]))
    tokens = model.generate(**prompt, max_new_tokens=20 - inputs.prompt, do_sample=False)
    with headpatch.applied(model, duo("llama", 4, 16)):
        found = feed("llama", model, inputs, [0, 5, *range(inputs.prompt, width + 1)], DynamicCache())
        assert (found - plain)[inputs.real].abs().max() <= 1e-4
        assert torch.equal(model.generate(**prompt, max_new_tokens=20 - inputs.prompt, do_sample=False), tokens)


def test_gradients_flow_as_through_the_mask():
    """Training without a cache: the same loss, and the same gradients, as with the mask."""
    inputs = inputs_of("llama", "left", continuation=5)
    kwargs = {**inputs.kwargs, "use_cache": False}
    model, naive = ZOO["llama"].build(torch.float64), Naive(ZOO["llama"])
    written = window_edit(full_heads("llama"), inputs.real)
    with headpatch.applied(model, duo("llama")), naive.edited({n: written(n) for n in naive.taps}) as other:
        losses = [m(**kwargs).logits[inputs.real].square().mean() for m in (model, other)]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert max(float(a.grad.abs().max()) for a, _ in pairs if a.grad is not None) > 1e-3
    for mine, its in pairs:
        torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-9)


def test_bfloat16_is_near():
    inputs = inputs_of("llama", "left", continuation=8)
    expected = reference("llama", inputs)
    model = ZOO["llama"].build(torch.bfloat16)
    with headpatch.applied(model, duo("llama")):
        edges = [0, *range(inputs.prompt, inputs.real.shape[1] + 1)]
        found = feed("llama", model, inputs.to(torch.bfloat16), edges, DynamicCache())
    assert (found.double() - expected)[inputs.real].abs().mean() < 0.05


def test_pairs_of_edges_are_all_there():
    """The random cuts above really contain single steps, chunks inside the sinks and chunks longer than the ring."""
    rng, kinds = random.Random(0), set()
    for _ in range(100):
        cuts = sorted(rng.sample(range(1, 53), rng.randrange(0, 12)))
        for i, j in itertools.pairwise([0, *cuts, 53]):
            kinds |= {("step", j - i == 1), ("in sinks", j <= 5), ("long", j - i > 7)}
    assert len(kinds) == 6
