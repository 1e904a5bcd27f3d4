"""PASTA against its formula on full softmax rows: marked spans against the rest of the prompt, in the prompt and while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import ids, logits, one_thread, silent
from method_cases import (
    CACHES,
    PADDINGS,
    SPANS,
    amounts,
    compare,
    compare_part,
    everywhere,
    inputs_of,
    learned,
    on_rows,
    recipe_of,
    token_columns,
)
from naive import Call, Naive
from torch import Tensor
from transformers import DynamicCache
from zoo import ZOO

import headpatch
from headpatch import EngineError, RecipeError, UnsupportedModelError
from headpatch.adapters.huggingface import cells

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

ALPHAS = {0: 0.01, 2: 0.0, 3: 0.3}


def kinds(inputs: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """[b, 1, 1, n] marked keys, keys of the prompt, and first tokens, column by column."""
    first, length = token_columns(inputs)
    marked, prompt, start = (torch.zeros(len(first), n, dtype=torch.bool) for _ in range(3))
    for row, spans in enumerate(SPANS):
        at = int(first[row])
        start[row, at] = True
        for column in range(n):
            token = column - at
            marked[row, column] = any(a <= token < b for a, b in spans)
            prompt[row, column] = 0 <= token < length[row]
    return marked[:, None, None], prompt[:, None, None], start[:, None, None]


def written(inputs: Any, alphas: dict[int, float], target: float = 0.0, keep_first: bool = False) -> Any:
    """The method on full rows."""

    def row(p: Tensor, call: Call) -> Tensor:
        marked, prompt, start = kinds(inputs, p.shape[3])
        alpha = amounts(alphas, p.shape[1], 1.0)
        has_span = marked.any(-1, keepdim=True)
        if target:
            psi = (p * marked).sum(-1, keepdim=True)
            factor = torch.where(psi < target, target / psi.clamp_min(1e-300), 1.0)
            factor = torch.minimum(factor, 1 / alpha.clamp_min(1e-6))
            new = torch.where(marked, p * factor, p)
        else:
            beside = prompt & ~marked & has_span
            new = torch.where(beside & ~start if keep_first else beside, p * alpha, p)
        total = new.sum(-1, keepdim=True) + learned(p, call)
        return torch.where(total > 0, new / total.clamp_min(1e-300), p)

    return row


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "entry",
    ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "llava", "gpt_oss", "deepseek_v3"],
)  # fmt: skip
def test_prompt_and_decoding(entry, padding):
    """Windows that lose the spans, learned positions, grouped heads; a row whose span is its beginning, a row without one."""
    inputs = inputs_of(entry, padding, 6)
    compare(
        entry, recipe_of("pasta", ALPHAS), everywhere(written(inputs, ALPHAS)), padding, continuation=6, spans=SPANS
    )


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_caches(entry, cache):
    inputs = inputs_of(entry, "left", 8)
    compare(entry, recipe_of("pasta", ALPHAS), everywhere(written(inputs, ALPHAS)), "left", cache, 8, SPANS)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt_oss"])
def test_one_head(entry, padding):
    """The other heads take the ordinary kernel, and are what they were."""
    inputs = inputs_of(entry, padding, 6)
    compare(
        entry,
        recipe_of("pasta", {2: 0.05}),
        everywhere(written(inputs, {2: 0.05})),
        padding,
        "dynamic_config",
        6,
        SPANS,
    )


@pytest.mark.parametrize(
    ("entry", "part"),
    [("vit", "vision"), ("llava", "vision"), ("whisper", "encoder"), ("bart", "encoder"), ("bart", "decoder")],
)
def test_other_parts(entry, part):
    """Spans of patches, of sounds, of a source: each part counts its own tokens."""
    spans = [[(2, 4)], [(0, 1), (3, 5)]]

    def make(inputs: Any) -> Any:
        first = inputs.first[part]

        def row(p: Tensor, call: Call) -> Tensor:
            marked = torch.zeros(len(first), 1, 1, p.shape[3], dtype=torch.bool)
            for b, ranges in enumerate(spans):
                for a, z in ranges:
                    marked[b, ..., int(first[b]) + a : int(first[b]) + z] = True
            new = torch.where(marked, p, p * amounts(ALPHAS, 4, 1.0))
            total = new.sum(-1, keepdim=True)
            return torch.where(total > 0, new / total.clamp_min(1e-300), p)

        return everywhere(row)

    compare_part(entry, part, recipe_of("pasta", ALPHAS), make, spans)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("target", [0.2, 0.9])
def test_target_mass(target, padding):
    """Rows that look enough are left alone; alpha bounds the factor of the others."""
    inputs = inputs_of("qwen2", padding)
    data = recipe_of("pasta", ALPHAS, target_mass=target)
    compare("qwen2", data, everywhere(written(inputs, ALPHAS, target)), padding, spans=SPANS)


def test_target_mass_is_reached_as_its_paper_says():
    """psi' = target / (1 + target - psi) where it was below and the bound does not bite; untouched where it was above."""
    shares = torch.tensor([[0.05, 0.2, 0.6], [0.95, 0.8, 0.4]], dtype=torch.float64)[:, None, None]
    method = headpatch.Recipe.from_dict(recipe_of("pasta", {0: 1e-4}, target_mass=0.4)).patches[0].method
    new = method.reshare(shares, torch.tensor([1e-4], dtype=torch.float64), {})
    psi = shares[0, 0, 0]
    expected = torch.where(psi < 0.4, 0.4 / (1.4 - psi), psi)
    torch.testing.assert_close(new[0, 0, 0], expected)
    torch.testing.assert_close(new.sum(0), torch.ones(1, 1, 3, dtype=torch.float64))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_keep_first(padding):
    inputs = inputs_of("llama", padding)
    data = recipe_of("pasta", ALPHAS, keep_first=True)
    compare("llama", data, everywhere(written(inputs, ALPHAS, keep_first=True)), padding, spans=SPANS)


def test_spans_that_change_nothing():
    """None, and all of the prompt: those rows are as they were; what is generated keeps its weight in both."""
    inputs, model, plain = (
        inputs_of("llama", None, 3),
        ZOO["llama"].build(torch.float64),
        ZOO["llama"].build(torch.float64),
    )
    handle = headpatch.apply(model, recipe_of("pasta", ALPHAS))
    tokens = inputs.kwargs["input_ids"]
    one, two = DynamicCache(), DynamicCache()
    with handle.inputs(spans=[[], [(0, 13)], [(4, 6)]]):
        for piece in (tokens[:, :13], tokens[:, 13:14], tokens[:, 14:15]):
            found, was = logits(model, piece, past_key_values=one), logits(plain, piece, past_key_values=two)
            torch.testing.assert_close(found[:2], was[:2], rtol=0, atol=1e-9)
            assert (found[2] - was[2]).abs().max() > 0.01


def test_several_spans_are_one_factor():
    """Not alpha to the power of their number: cutting a span in two makes no difference, nor does naming it twice."""
    model, batch = ZOO["llama"].build(torch.float64), inputs_of("llama", "left").kwargs
    handle, found = headpatch.apply(model, recipe_of("pasta", ALPHAS)), []
    for spans in ([(1, 4)], [(1, 2), (2, 4)], [(1, 4), (1, 4)], [(1, 3), (2, 4)]):
        with handle.inputs(spans=[spans, spans, spans]):
            found.append(logits(model, batch))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_generating_64_tokens():
    inputs = inputs_of("llama", "left", 0)
    given = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask")}
    naive, model = Naive(ZOO["llama"]), ZOO["llama"].build(torch.float64)
    handle = headpatch.apply(model, recipe_of("pasta", ALPHAS))
    asked = {"max_new_tokens": 64, "do_sample": False}
    with naive.edited(dict.fromkeys(naive.taps, on_rows(written(inputs, ALPHAS)))) as other:
        expected = other.generate(**given, **asked)
    with handle.inputs(spans=SPANS):
        found = [model.generate(**given, **asked, **more) for more in ({}, {"prefill_chunk_size": 4})]
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert not torch.equal(found[0], ZOO["llama"].build(torch.float64).generate(**given, **asked))


@pytest.mark.parametrize("first", ["pasta", "zerotuning"])
def test_stacked_with_other_methods(first):
    """The whole prompt's rest contains the first token: both weights count, one normalisation."""
    inputs, gamma, scale = inputs_of("llama", "left"), {0: 3.0, 1: 0.2}, {0: 0.5, 3: -1.0}
    steer = written(inputs, ALPHAS)

    def zero(p: Tensor, call: Call) -> Tensor:
        start = kinds(inputs, p.shape[3])[2]
        new = torch.where(start, p * amounts(gamma, 4, 1.0), p)
        return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

    def of_layer(layer: int) -> Any:
        run = on_rows(steer, zero) if first == "pasta" else on_rows(zero, steer)
        return lambda call: run(call) * amounts(scale, 4, 1.0).view(1, 1, 4, 1)

    patches = [recipe_of("pasta", ALPHAS)["patches"][0], recipe_of("zerotuning", gamma)["patches"][0]]
    patches = patches if first == "pasta" else patches[::-1]
    patches.append(recipe_of("head_scaling", scale)["patches"][0])
    compare("llama", {"headpatch": 1, "patches": patches}, of_layer, "left", spans=SPANS)


def test_identity_and_removal_are_bit_equal():
    model, batch = ZOO["llama"].build(), inputs_of("llama", "left").to(torch.float32).kwargs
    plain = logits(model, batch)
    with headpatch.applied(model, recipe_of("pasta", {0: 1.0, 1: 1.0})):
        assert torch.equal(logits(model, batch), plain)
    with headpatch.applied(model, recipe_of("pasta", ALPHAS)) as handle, handle.inputs(spans=SPANS):
        assert not torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


def test_cross_attention_steers_towards_spans_of_the_source():
    """There every key is prompt, and spans count the encoder's tokens."""
    entry, alphas = ZOO["bart"], {0: 0.1, 3: 0.5}
    inputs = entry.make_inputs(lengths=[9, 6], padding_side="left").to(torch.float64)
    spans = [[(2, 5)], []]
    starts = inputs.first["cross"]

    def row(p: Tensor, call: Call) -> Tensor:
        marked = torch.zeros(2, 1, 1, p.shape[3], dtype=torch.bool)
        marked[0, ..., int(starts[0]) + 2 : int(starts[0]) + 5] = True
        beside = ~marked & torch.tensor([True, False])[:, None, None, None]
        new = torch.where(beside, p * amounts(alphas, 4, 1.0), p)
        return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

    data = recipe_of("pasta", alphas)
    data["patches"][0]["part"] = "cross"
    model, naive = entry.build(torch.float64), Naive(entry, "cross")
    plain = logits(model, inputs.kwargs)
    with (
        headpatch.apply(model, data).inputs(spans=spans),
        naive.edited(dict.fromkeys(naive.taps, on_rows(row))) as other,
    ):
        found, expected = logits(model, inputs.kwargs)[inputs.real], logits(other, inputs.kwargs)[inputs.real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert (expected - plain[inputs.real]).abs().max() > 0.01


def test_what_is_refused():
    model = ZOO["llama"].build()
    headpatch.apply(model, recipe_of("pasta", {0: 0.5}))
    with pytest.raises(EngineError, match="operand 'spans' is needed and none were given"):
        logits(model)
    with pytest.raises(UnsupportedModelError, match="operand 'beside_spans' cannot be had with position_bias"):
        headpatch.apply(ZOO["t5"].build(), recipe_of("pasta", {0: 0.5}))
    with pytest.raises(RecipeError, match="alpha"):
        headpatch.Recipe.from_dict(recipe_of("pasta", {0: -0.1}))
    with pytest.raises(RecipeError, match="keep_first says nothing beside target_mass"):
        headpatch.Recipe.from_dict(recipe_of("pasta", {0: 0.5}, target_mass=0.2, keep_first=True))


def test_a_cache_made_for_other_spans_is_refused():
    model = ZOO["llama"].build()
    handle = headpatch.apply(model, recipe_of("pasta", {0: 0.5}))
    cache, tokens = DynamicCache(), inputs_of("llama", None).kwargs["input_ids"]
    with handle.inputs(spans=[[(1, 3)]] * 3):
        logits(model, tokens[:, :13], past_key_values=cache)
    with handle.inputs(spans=[[(2, 3)]] * 3), pytest.raises(EngineError, match="another recipe"):
        logits(model, tokens[:, 13:14], past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("heads", [{1: 0.01}, {0: 0.01, 1: 0.3, 2: 1e-6, 3: 0.9}])
def test_a_weight_in_the_keys_is_the_weight_of_a_cell(dtype, heads, small, monkeypatch):
    """Prompts without a mask take the ordinary kernel with wider queries and keys, everything else attends to cells: as exact. All
    heads do so where that takes fewer launches and a GPU would wait for them.
    """
    calls, by_key_bias, tokens = [], cells.by_key_bias, ids(2, 40)
    monkeypatch.setattr(cells, "by_key_bias", lambda *given: calls.append(given[1]) or by_key_bias(*given))
    monkeypatch.setattr(cells, "is_small", lambda call: small)

    def run(dtype: torch.dtype, masked: bool) -> Tensor:
        model = ZOO["llama"].build(torch.float64).to(dtype)
        handle = headpatch.apply(model, recipe_of("pasta", heads))
        with monkeypatch.context() as patched, torch.no_grad(), handle.inputs(spans=[[(3, 9)], []]):
            if masked:
                patched.setattr(cells, "biased_keys_suit", lambda call: False)
            return logits(model, {"input_ids": tokens}).double()

    exact = run(torch.float64, True)
    assert not calls
    found = (run(dtype, False) - exact).abs().mean()
    assert len(calls) == ZOO["llama"].config().num_hidden_layers
    assert all((of is None) == (small or len(heads) > 1) for of in calls)
    assert found <= 1.2 * (run(dtype, True) - exact).abs().mean() + 1e-12
