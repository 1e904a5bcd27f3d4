"""Cache policies on models with windows or two stacks, and on caches that users pass: exact, or refused by name."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, new_tokens, quiet_transformers
from kv_cases import RECENT, SINK, cache_of, duo, feed, full_heads, reference_logits, unbounded_layers, window_edit
from kv_choices import CASES, Reference, steps, with_positions
from method_cases import inputs_of
from naive import of
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from zoo import ZOO, chunk

import headpatch
from headpatch.adapters.huggingface.kvcache import KeptLayer
from headpatch.errors import EngineError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def silent():
    with quiet_transformers():
        yield


# --- models with windows in some layers


@pytest.mark.parametrize("case", ["snapkv", "ada_kv", "keydiff"])
@pytest.mark.parametrize("entry", ["gemma2", "gemma3"])
def test_choosing_leaves_layers_with_a_window_alone(entry, case):
    patch, keep = CASES[case]
    batch = with_positions(left_padded((24, 13)))
    reference = Reference(entry, keep)
    model = ZOO[entry].build(torch.float64)
    with headpatch.applied(model, of(patch)) as handle:
        cache = DynamicCache()
        real = batch["attention_mask"].bool()
        found = logits(model, batch, past_key_values=cache)
        torch.testing.assert_close(found[real], reference.prompt(batch)[real], rtol=0, atol=1e-8)
        for given in steps(batch, (1, 2, 1)):
            torch.testing.assert_close(
                logits(model, given, past_key_values=cache), reference.step(given), rtol=0, atol=1e-8
            )
        kept = [n for n, layer in enumerate(cache.layers) if isinstance(layer, KeptLayer)]
        assert kept == unbounded_layers(entry) == [r.layer for r in handle.report().layers]


@pytest.mark.parametrize("patch", [CASES["snapkv"][0], CASES["keydiff"][0]], ids=lambda p: p["method"])
def test_a_model_of_windows_alone_is_refused(patch):
    model = ZOO["mistral"].build()
    with pytest.raises(UnsupportedModelError, match="cannot be had with no_unbounded_layer"):
        headpatch.apply(model, of(patch))


@pytest.mark.parametrize("entry", ["gemma2", "gemma3"])
def test_generate_on_a_model_with_some_windows(entry):
    """Its own cache has layers of two kinds; tokens are those of a mask written out."""
    batch = left_padded((14, 6))
    model = ZOO[entry].build(torch.float64)
    with headpatch.applied(model, duo(entry)):
        tokens = new_tokens(model, batch, 12)
    everything = torch.cat([batch["input_ids"], tokens], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    given = with_positions({"input_ids": everything, "attention_mask": mask})
    inputs = dataclasses.replace(inputs_of(entry, None), kwargs=given, real=mask.bool())
    expected = reference_logits(entry, inputs, window_edit(full_heads(entry), mask), unbounded_layers(entry))
    first_choice(expected[:, batch["input_ids"].shape[1] - 1 : -1], tokens)


def first_choice(expected: torch.Tensor, tokens: torch.Tensor) -> None:
    chosen = expected.gather(-1, tokens[..., None])[..., 0]
    assert (expected.amax(-1) - chosen).max() < 1e-6


# --- encoder-decoders


@pytest.mark.parametrize("case", ["snapkv", "ada_kv", "keydiff"])
@pytest.mark.parametrize("entry", ["bart", "whisper"])
def test_choosing_in_a_decoder(entry, case):
    """Of its own tokens: cross-attention keeps the encoder's."""
    patch, keep = CASES[case]
    inputs = inputs_of(entry, None, continuation=16)
    edges = [16, 17, 18, 20, inputs.real.shape[1]]
    reference = Reference(entry, keep)
    model = ZOO[entry].build(torch.float64)
    kwargs = dict(inputs.kwargs)
    if entry == "bart":
        kwargs["decoder_attention_mask"] = inputs.real.long()
    with headpatch.applied(model, of(patch)):
        cache = cache_of(entry, model)
        given = chunk(ZOO[entry], kwargs, 0, 16)
        prompt = {**given, "decoder_attention_mask": inputs.real[:, :16].long()}
        torch.testing.assert_close(
            logits(model, given, past_key_values=cache), reference.prompt(prompt), rtol=0, atol=1e-8
        )
        for i, j in itertools.pairwise(edges):
            given = chunk(ZOO[entry], kwargs, i, j)
            torch.testing.assert_close(
                logits(model, given, past_key_values=cache), reference.step(given), rtol=0, atol=1e-8
            )
        assert isinstance(cache.self_attention_cache.layers[0], KeptLayer)
        assert not any(isinstance(layer, KeptLayer) for layer in cache.cross_attention_cache.layers)


@pytest.mark.parametrize("given", [None, "pair"])
def test_generate_of_an_encoder_decoder(given):
    model = ZOO["bart"].build(torch.float64)
    source = ids(2, 9)
    more = {} if given is None else {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
    with headpatch.applied(model, duo("bart")) as handle:
        out = model.generate(input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=24,
                             min_new_tokens=24, do_sample=False, num_beams=1, **more)  # fmt: skip
        assert handle.report().cache.columns == 24
    inputs = inputs_of("bart", None)
    kwargs = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": out}
    real = torch.ones_like(out)
    inputs = dataclasses.replace(inputs, kwargs=kwargs, real=real.bool())
    expected = reference_logits("bart", inputs, window_edit(full_heads("bart"), real), unbounded_layers("bart"))
    expected[..., 2] = -torch.inf  # min_new_tokens forbids the end
    first_choice(expected[:, :-1], out[:, 1:])
    assert out.shape[1] > SINK + RECENT


# --- caches that users pass


class Rounded(QuantizedLayer):
    """transformers' quantised layer with a quantiser of our own: no backend is needed, and what it does is known."""

    levels = 0.0

    def _quantize(self, tensor, axis):
        return (tensor / self.levels).round().to(torch.int8) if self.levels else tensor.clone()

    def _dequantize(self, q_tensor):
        return q_tensor.double() * self.levels if self.levels else q_tensor


class Coarse(Rounded):
    levels = 0.05


def quantised(kind: type[QuantizedLayer], residual: int = 6) -> Any:
    return Cache(layers=[kind(residual_length=residual) for _ in range(2)])


def everything() -> dict[str, Any]:
    return {"headpatch": 1, "patches": [{"method": "duo_attention", "full_kv_heads": ["*.*"]}]}


def test_a_quantised_cache_that_loses_nothing_is_exact():
    """Full heads in transformers' own quantised layers, streaming ones beside them: the mask's logits."""
    inputs = inputs_of("llama", None, continuation=24)
    edges = [0, inputs.prompt, *range(inputs.prompt + 1, inputs.real.shape[1] + 1)]
    expected = reference_logits(
        "llama", inputs, window_edit(full_heads("llama"), inputs.real), unbounded_layers("llama")
    )
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, duo("llama")):
        found = feed("llama", model, inputs, edges, quantised(Rounded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_all_heads_in_a_quantised_cache_are_the_untouched_ones():
    inputs = inputs_of("llama", None, continuation=24)
    edges = [0, inputs.prompt, *range(inputs.prompt + 1, inputs.real.shape[1] + 1)]
    model = ZOO["llama"].build(torch.float64)
    expected = feed("llama", model, inputs, edges, quantised(Coarse))
    exact = feed("llama", model, inputs, edges, DynamicCache())
    with headpatch.applied(model, everything()):
        found = feed("llama", model, inputs, edges, quantised(Coarse))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - exact).abs().max() > 1e-4, "nothing was rounded"


def test_a_quantised_cache_holds_what_it_says():
    """int8 codes of the full heads, numbers of the residual, and the streaming ring."""
    model = ZOO["llama"].build(torch.float64)
    data = {"headpatch": 1, "patches": [{"method": "duo_attention", "full_kv_heads": ["*.1"], "sink": 2, "recent": 6}]}
    with headpatch.applied(model, data) as handle:
        cache = quantised(Coarse, residual=64)
        logits(model, ids(1, 40), past_key_values=cache)
        for _ in range(3):
            logits(model, ids(1, 1), past_key_values=cache)
        per_token = 2 * 16
        one_layer = per_token * (40 * 1 + 3 * 8) + per_token * 8 * 8
        assert handle.report().cache.stored == 2 * one_layer


def test_rows_of_a_quantised_cache_move_or_are_refused():
    """transformers reorders its quantised layers; it would repeat and choose rows of the unquantised rest alone."""
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, duo("llama")):
        moved, plain = quantised(Rounded), quantised(Rounded)
        for cache in (moved, plain):
            logits(model, ids(3, 15), past_key_values=cache)
        moved.reorder_cache(torch.tensor([2, 0, 1]))
        step = ids(1, 1, seed=4).repeat(3, 1)
        found, expected = (logits(model, step, past_key_values=c) for c in (moved, plain))
        torch.testing.assert_close(found, expected[[2, 0, 1]], rtol=0, atol=1e-9)
        for move in (lambda c: c.batch_repeat_interleave(2), lambda c: c.batch_select_indices(torch.tensor([1]))):
            with pytest.raises(
                EngineError, match="rows of a quantised cache can be reordered, not repeated or chosen"
            ):
                move(moved)
        with pytest.raises(EngineError, match="tokens cannot be taken back from a quantised cache"):
            moved.crop(-1)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=ZOO["llama"].config(), max_cache_len=40)])
def test_generate_takes_an_empty_cache_of_the_user(make):
    batch = left_padded((14, 9))
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, duo("llama")):
        expected = new_tokens(model, batch, 20)
        cache = make()
        assert torch.equal(new_tokens(model, batch, 20, past_key_values=cache), expected)
        assert all(isinstance(layer, KeptLayer) for layer in cache.layers)


def test_generate_refuses_a_cache_that_was_filled_before():
    model = ZOO["llama"].build(torch.float64)
    cache = DynamicCache()
    logits(model, ids(1, 10), past_key_values=cache)
    again = {"input_ids": ids(1, 14), "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    with headpatch.applied(model, duo("llama")), pytest.raises(EngineError, match="filled under no recipe"):
        new_tokens(model, again, 4, past_key_values=cache)


# --- memory that is not there


@pytest.fixture
def scarce(monkeypatch):
    """Keys and values of more than a number of elements cannot be allocated."""
    real = torch.zeros

    def limit(most):
        def zeros(*size, **more):
            shape = size[0] if len(size) == 1 and isinstance(size[0], tuple) else size
            if len(shape) == 4 and shape[-1] == 16 and torch.Size(shape).numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return real(*size, **more)

        monkeypatch.setattr(torch, "zeros", zeros)

    yield limit
    monkeypatch.setattr(torch, "zeros", real)


def test_out_of_memory_while_growing_is_an_error_and_a_smaller_call_works(scarce):
    model = ZOO["llama"].build()
    expected = logits(model, ids(1, 10))
    with headpatch.applied(model, duo("llama", 2, 64)):
        scarce(300 * 16)
        cache = DynamicCache()
        logits(model, ids(1, 250), past_key_values=cache)
        with pytest.raises(
            EngineError, match=r"out of memory: cache layer 0 needs .* MiB for 512 tokens of 1 KV heads"
        ):
            logits(model, ids(1, 20), past_key_values=cache)
        assert logits(model, ids(1, 10), past_key_values=DynamicCache()).isfinite().all()
    assert torch.equal(logits(model, ids(1, 10)), expected)


def test_out_of_memory_while_choosing_is_an_error(scarce):
    model = ZOO["llama"].build()
    with headpatch.applied(model, of({"method": "keydiff", "size": 400, "sink": 1, "recent": 4})):
        scarce(2 * 600 * 16)
        with pytest.raises(
            EngineError, match=r"out of memory: cache layer 0 needs .* MiB for 512 tokens of 2 KV heads"
        ):
            logits(model, ids(2, 450), past_key_values=DynamicCache())
        assert logits(model, ids(1, 10), past_key_values=DynamicCache()).isfinite().all()
