"""Edits of the attention to image tokens, against their formulas on full rows: a constant bias, and PAI's change of each score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compat import ids, logits, one_thread, silent
from method_cases import CACHES, PADDINGS, amounts, compare, everywhere, inputs_of, on_rows, recipe_of, token_columns
from naive import Call, Naive
from torch import Tensor
from transformers import DynamicCache
from zoo import IMAGE, ZOO

import headpatch
from headpatch import RecipeError, UnsupportedModelError
from headpatch.adapters.huggingface import scores as open_scores
from headpatch.scores import attention_of

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

AMOUNTS = {0: 0.5, 2: 1.5, 3: 0.2}
BIASES = {0: 1.5, 2: -3.0, 3: 0.5}
Row = Callable[[Tensor, Call], Tensor]


def image_keys(inputs: Any, n: int) -> Tensor:
    """[b, 1, 1, n], from the token ids of the whole request."""
    found = inputs.kwargs["input_ids"] == IMAGE
    return torch.nn.functional.pad(found, (0, max(0, n - found.shape[1])))[:, None, None, :n]


def columns_of(call: Call) -> Tensor:
    """[q] column of each query: the last ones of the keys. (Neither model here has a window.)"""
    return torch.arange(call.p.shape[3] - call.p.shape[2], call.p.shape[3])


def pai(inputs: Any, alphas: dict[int, float], last_only: bool = True) -> Row:
    """PAI on full rows: the scores themselves, then a softmax."""
    first, length = token_columns(inputs)

    def row(p: Tensor, call: Call) -> Tensor:
        inside = image_keys(inputs, p.shape[3])
        size = torch.where(torch.isinf(call.scores), 0.0, call.scores).abs()
        raised = torch.where(inside, call.scores + amounts(alphas, p.shape[1], 0.0) * size, call.scores)
        edited = torch.softmax(raised, -1).nan_to_num(0.0)
        late = columns_of(call) >= (first + length - 1)[:, None]
        return torch.where(late[:, None, :, None], edited, p) if last_only else edited

    return row


def bias(inputs: Any, biases: dict[int, float], text_only: bool = False) -> Row:
    """A constant bias on full rows."""

    def row(p: Tensor, call: Call) -> Tensor:
        inside = image_keys(inputs, p.shape[3])
        new = torch.where(inside, p * torch.exp(amounts(biases, p.shape[1], 0.0)), p)
        new = new / new.sum(-1, keepdim=True).clamp_min(1e-300)
        of_image = inside[:, 0, 0][:, columns_of(call)]
        return torch.where(of_image[:, None, :, None], p, new) if text_only else new

    return row


METHODS = {
    "pai": ("pai", AMOUNTS, {}, lambda inputs: pai(inputs, AMOUNTS)),
    "pai_all": ("pai", AMOUNTS, {"queries": "all"}, lambda inputs: pai(inputs, AMOUNTS, last_only=False)),
    "bias": ("image_bias", BIASES, {}, lambda inputs: bias(inputs, BIASES)),
    "bias_text": ("image_bias", BIASES, {"queries": "text"}, lambda inputs: bias(inputs, BIASES, text_only=True)),
}  # fmt: skip


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", METHODS)
def test_prompt_and_decoding(case, padding):
    """LLaVA, with the image after the first token of each row."""
    method, strengths, more, row = METHODS[case]
    inputs = inputs_of("llava", padding)
    compare("llava", recipe_of(method, strengths, **more), everywhere(row(inputs)), padding)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", METHODS)
def test_caches(case, cache):
    method, strengths, more, row = METHODS[case]
    inputs = inputs_of("llava", "left")
    compare("llava", recipe_of(method, strengths, **more), everywhere(row(inputs)), "left", cache)


@pytest.mark.parametrize("case", METHODS)
def test_several_images(case):
    """Two images in one row and one in the other, at different places."""
    method, strengths, more, row = METHODS[case]
    entry, g = ZOO["llava"], torch.Generator().manual_seed(3)
    tokens = torch.randint(2, IMAGE, (2, 44), generator=g)
    tokens[:, 0] = 1
    tokens[0, 1:17] = tokens[0, 20:36] = tokens[1, 9:25] = IMAGE
    pixels = torch.randn(3, 3, 16, 16, generator=g, dtype=torch.float64)

    class Inputs:
        kwargs, prompt, first = {"input_ids": tokens}, 44, {"text": torch.zeros(2, dtype=torch.long)}
        real = torch.ones(2, 44, dtype=torch.bool)

    given = {"input_ids": tokens, "pixel_values": pixels}
    model, naive = entry.build(torch.float64), Naive(entry)
    plain = logits(model, given)
    headpatch.apply(model, recipe_of(method, strengths, **more))
    one, two = DynamicCache(), DynamicCache()
    with naive.edited(dict.fromkeys(naive.taps, on_rows(row(Inputs)))) as other:
        found, expected = logits(model, given, past_key_values=one), logits(other, given, past_key_values=two)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        assert (expected - plain).abs().max() > 0.001
        for i in range(3):
            step = {"input_ids": ids(2, 1, i)}
            found, expected = logits(model, step, past_key_values=one), logits(other, step, past_key_values=two)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", METHODS)
def test_generating_64_tokens(case):
    method, strengths, more, row = METHODS[case]
    inputs = inputs_of("llava", "left", 0)
    given = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    naive, model = Naive(ZOO["llava"]), ZOO["llava"].build(torch.float64)
    headpatch.apply(model, recipe_of(method, strengths, **more))
    asked = {"max_new_tokens": 64, "do_sample": False}
    with naive.edited(dict.fromkeys(naive.taps, on_rows(row(inputs)))) as other:
        expected = other.generate(**given, **asked)
    # An image's placeholder may be generated: it is no image, and its key gets nothing.
    assert torch.equal(model.generate(**given, **asked), expected)


@pytest.mark.parametrize("case", ["pai", "bias"])
def test_stacked_with_other_methods(case):
    """Masses first change what scores then see; outputs come last."""
    method, strengths, more, row = METHODS[case]
    inputs, gamma, scale = inputs_of("llava", "left"), {0: 3.0, 1: 0.2, 2: 2.0}, {0: 0.5, 3: -1.0}
    first = token_columns(inputs)[0]

    def zero(p: Tensor, call: Call) -> Tensor:
        at = (torch.arange(p.shape[3]) == first[:, None])[:, None, None]
        new = torch.where(at, p * amounts(gamma, 4, 1.0), p)
        return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        run = on_rows(row(inputs), zero)
        return lambda call: run(call) * amounts(scale, 4, 1.0).view(1, 1, 4, 1)

    patches = [recipe_of(method, strengths, **more)["patches"][0], recipe_of("zerotuning", gamma)["patches"][0]]
    patches.append(recipe_of("head_scaling", scale)["patches"][0])
    compare("llava", {"headpatch": 1, "patches": patches}, of_layer, "left")


@pytest.mark.parametrize("case", METHODS)
def test_identity_and_removal_are_bit_equal(case):
    method, strengths, more, _ = METHODS[case]
    model, batch = ZOO["llava"].build(), inputs_of("llava", "left").to(torch.float32).kwargs
    plain = logits(model, batch)
    with headpatch.applied(model, recipe_of(method, dict.fromkeys(strengths, 0.0), **more)):
        assert torch.equal(logits(model, batch), plain)
    with headpatch.applied(model, recipe_of(method, strengths, **more)):
        assert not torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("case", METHODS)
def test_a_prompt_without_an_image_is_left_alone(case):
    method, strengths, more, _ = METHODS[case]
    model, tokens = ZOO["llava"].build(torch.float64), ids()
    plain = logits(model, tokens)
    headpatch.apply(model, recipe_of(method, strengths, **more))
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-9)


def test_what_is_refused():
    for method, strengths in (("pai", AMOUNTS), ("image_bias", BIASES)):
        with pytest.raises(UnsupportedModelError, match="operand 'image_tokens' cannot be had with position_bias"):
            headpatch.apply(ZOO["t5"].build(), recipe_of(method, strengths))
        with pytest.raises(UnsupportedModelError, match="operand 'image_tokens' cannot be had with no_image_tokens"):
            headpatch.apply(ZOO["llama"].build(), recipe_of(method, strengths))
    with pytest.raises(RecipeError, match="alpha"):
        headpatch.Recipe.from_dict(recipe_of("pai", {0: -0.5}))


@pytest.mark.parametrize(("padding", "rows"), [(None, 1), ("left", 1), ("right", 9)])
def test_prompt_rows_that_pai_leaves_alone_are_the_kernel_s(padding, rows, monkeypatch):
    """Scores lie open for the queries from the first end of a prompt on, and no others: lengths differ by eight."""
    seen: list[int] = []

    def watched(scores: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(scores.shape[2])
        return attention_of(scores, *args)

    monkeypatch.setattr(open_scores, "attention_of", watched)
    inputs = inputs_of("llava", padding, continuation=0)
    model = ZOO["llava"].build(torch.float64)
    headpatch.apply(model, recipe_of("pai", AMOUNTS))
    logits(model, {name: value for name, value in inputs.kwargs.items() if name != "position_ids"})
    assert seen == [rows] * model.config.text_config.num_hidden_layers
