"""PAINT against its formula on full rows: local and summary tokens chosen from the vision tower's own softmax, written out."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from compat import fingerprint, ids, logits, one_thread, silent
from method_cases import CACHES, PADDINGS, amounts, compare, everywhere, inputs_of, on_rows, recipe_of, token_columns
from naive import Call, Naive, of
from test_method_image import columns_of
from test_method_image_families import FAMILIES
from torch import Tensor
from transformers import DynamicCache
from zoo import IMAGE, ZOO, Entry

import headpatch
from headpatch import EngineError, HeadpatchError, RecipeError, UnsupportedModelError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS = {0: 1.0, 2: 2.0, 3: 0.5}
# Tiny towers have two layers, and attention that is almost even: a low fence finds summary tokens all the same.
SETTINGS: dict[str, Any] = {
    "alpha": 0.7, "beta": 0.4, "local_share": 0.3, "local_layer": 0, "summary_layer": -1, "summary_fence": 0.2
}  # fmt: skip
Row = Callable[[Tensor, Call], Tensor]


VIP = Entry(
    "vipllava",
    lambda: transformers.VipLlavaConfig(
        text_config=ZOO["llava"].config().text_config, vision_config=ZOO["llava"].config().vision_config,
        image_token_index=IMAGE, vision_feature_layers=[-2, -1],
    ),
    "VipLlavaForConditionalGeneration", ZOO["llava"].parts,
)  # fmt: skip


def class_rows(pixels: Tensor, layer: int, entry: Entry = ZOO["llava"]) -> list[list[float]]:
    """Attention of the class token to each patch in a layer of the tower, summed over heads: a list for each image."""
    tower = Naive(entry, "vision")
    with torch.no_grad():
        tower.model.model.vision_tower(pixels)
    rows = tower.calls(layer % 2)[0].p[:, :, 0, 1:].sum(1)
    return [[float(value) for value in row] for row in rows]


def quartile(values: list[float], part: float) -> float:
    """Of sorted values, between neighbours in proportion."""
    place = part * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def sets_of(
    entry: Entry, pixels: Tensor, share: float, local: int, summary: int, fence: float
) -> list[tuple[set[int], set[int]]]:
    """For each image, its local and its summary patches."""
    found = []
    for near, far in zip(*(class_rows(pixels, layer, entry) for layer in (local, summary)), strict=True):
        ranked = sorted(far)
        q1, q3 = quartile(ranked, 0.25), quartile(ranked, 0.75)
        collected = {k for k, value in enumerate(far) if value > q3 + fence * (q3 - q1)}
        best = sorted(range(len(near)), key=lambda k: -near[k])[: math.floor(share * len(near))]
        found.append((set(best) - collected, collected))
    return found


def marked(tokens: Tensor, sets: list[tuple[set[int], set[int]]]) -> tuple[Tensor, Tensor]:
    """[b, t] bool each: local and summary tokens, images in reading order."""
    local, summary = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    image, patch = 0, 0
    for row in range(tokens.shape[0]):
        for column in range(tokens.shape[1]):
            if tokens[row, column] == IMAGE:
                local[row, column], summary[row, column] = patch in sets[image][0], patch in sets[image][1]
                image, patch = (image, patch + 1) if patch < 15 else (image + 1, 0)
    return local, summary


def painted(
    tokens: Tensor,
    pixels: Tensor,
    first: Tensor,
    length: Tensor,
    weights: dict[int, float],
    settings: dict[str, Any],
    entry: Entry = ZOO["llava"],
) -> Row:
    """The method on full rows."""
    names = ("local_share", "local_layer", "summary_layer", "summary_fence")
    local, summary = marked(tokens, sets_of(entry, pixels, *(settings[n] for n in names)))
    assert local.any() and summary.any(), "the test means nothing"

    def row(p: Tensor, call: Call) -> Tensor:
        n = p.shape[3]
        near, far = (
            torch.nn.functional.pad(m, (0, max(0, n - m.shape[1])))[:, None, None, :n] for m in (local, summary)
        )
        factor = settings["alpha"] * near.double() + settings["beta"] * far.double()
        size = torch.where(torch.isinf(call.scores), 0.0, call.scores).abs()
        raised = call.scores + amounts(weights, p.shape[1], 0.0) * factor * size
        late = columns_of(call) >= (first + length - 1)[:, None]
        return torch.where(late[:, None, :, None], torch.softmax(raised, -1).nan_to_num(0.0), p)

    return row


def row_of(inputs: Any, weights: dict[int, float] = WEIGHTS, **more: Any) -> Row:
    tokens = inputs.kwargs["input_ids"][:, : inputs.prompt]  # a placeholder that follows is no image
    return painted(tokens, inputs.kwargs["pixel_values"], *token_columns(inputs), weights, {**SETTINGS, **more})


def recipe(weights: dict[int, float] = WEIGHTS, **more: Any) -> dict[str, Any]:
    return recipe_of("paint", weights, **{**SETTINGS, **more})


@pytest.mark.parametrize("padding", PADDINGS)
def test_prompt_and_decoding(padding):
    compare("llava", recipe(), everywhere(row_of(inputs_of("llava", padding))), padding)


@pytest.mark.parametrize("cache", CACHES)
def test_caches(cache):
    compare("llava", recipe(), everywhere(row_of(inputs_of("llava", "left"))), "left", cache)


@pytest.mark.parametrize(
    "more",
    [
        {"beta": 0.0}, {"local_share": 1.0}, {"local_layer": -1, "summary_layer": 0}, {"alpha": 2.0, "summary_fence": 0.0},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_options(more):
    compare("llava", recipe(**more), everywhere(row_of(inputs_of("llava", "left"), **more)), "left")


def several_images() -> tuple[Tensor, Tensor]:
    """Two images in one row, one in the other, and none in the third."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, IMAGE, (3, 44), generator=g)
    tokens[:, 0] = 1
    tokens[0, 1:17] = tokens[0, 20:36] = tokens[1, 9:25] = IMAGE
    return tokens, torch.randn(3, 3, 16, 16, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("entry", [ZOO["llava"], VIP], ids=str)
def test_several_images(entry):
    tokens, pixels = several_images()
    row = painted(tokens, pixels, torch.zeros(3, dtype=torch.long), torch.full((3,), 44), WEIGHTS, SETTINGS, entry)
    given = {"input_ids": tokens, "pixel_values": pixels}
    model, naive = entry.build(torch.float64), Naive(entry)
    plain = logits(model, given)
    headpatch.apply(model, recipe())
    one, two = DynamicCache(), DynamicCache()
    with naive.edited(dict.fromkeys(naive.taps, on_rows(row))) as other:
        found, expected = logits(model, given, past_key_values=one), logits(other, given, past_key_values=two)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        moved = (expected - plain).abs().amax((1, 2))
        assert moved[:2].min() > 1e-3 and moved[2] < 1e-9, "the row without an image is left alone"
        for i in range(3):
            step = {"input_ids": ids(3, 1, i)}
            found, expected = logits(model, step, past_key_values=one), logits(other, step, past_key_values=two)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_generating_64_tokens():
    """generate() encodes the pictures before it calls the model."""
    inputs = inputs_of("llava", "left", 0)
    given = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    strong = dict.fromkeys(WEIGHTS, 5.0)
    naive, model = Naive(ZOO["llava"]), ZOO["llava"].build(torch.float64)
    asked = {"max_new_tokens": 64, "do_sample": False}
    plain = model.generate(**given, **asked)
    headpatch.apply(model, recipe(strong))
    with naive.edited(dict.fromkeys(naive.taps, on_rows(row_of(inputs, strong)))) as other:
        expected = other.generate(**given, **asked)
    assert torch.equal(model.generate(**given, **asked), expected)
    assert not torch.equal(expected, plain), "the edit does nothing"


def test_beams_share_their_prompt_s_images():
    """Rows of one prompt are its beams, and its pictures were encoded once: two of them in the first row."""
    tokens, pixels = several_images()
    model, naive = ZOO["llava"].build(torch.float64), Naive(ZOO["llava"])
    asked = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    plain = model.generate(**given, **asked)
    strong, first, length = dict.fromkeys(WEIGHTS, 5.0), torch.zeros(3, dtype=torch.long), torch.full((3,), 44)
    one = painted(tokens, pixels, first, length, strong, SETTINGS)

    def of_beams(p: Tensor, call: Call) -> Tensor:
        """The formula row by row: every second row is a prompt's."""
        halves = []
        for beam in range(2):
            part = Call(*(x[beam::2] for x in (call.q, call.k, call.v, call.seen, call.scores)))
            halves.append(one(p[beam::2], part))
        return torch.stack(halves, 1).flatten(0, 1)

    with naive.edited(dict.fromkeys(naive.taps, on_rows(of_beams))) as other:
        expected = other.generate(**given, **asked)
    headpatch.apply(model, recipe(strong))
    assert torch.equal(model.generate(**given, **asked), expected)
    assert not torch.equal(expected, plain), "the edit does nothing"


def test_stacked_with_other_methods():
    """Masses first change what scores then see; outputs come last."""
    inputs, gamma, scale = inputs_of("llava", "left"), {0: 3.0, 1: 0.2, 2: 2.0}, {0: 0.5, 3: -1.0}
    first, row = token_columns(inputs)[0], row_of(inputs)

    def zero(p: Tensor, call: Call) -> Tensor:
        at = (torch.arange(p.shape[3]) == first[:, None])[:, None, None]
        new = torch.where(at, p * amounts(gamma, 4, 1.0), p)
        return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        run = on_rows(row, zero)
        return lambda call: run(call) * amounts(scale, 4, 1.0).view(1, 1, 4, 1)

    both = (recipe(), recipe_of("zerotuning", gamma), recipe_of("head_scaling", scale))
    compare("llava", of(*(one["patches"][0] for one in both)), of_layer, "left")


def test_the_tower_under_an_edit_of_its_own():
    """The class token's attention is read as the tower's own patches leave it; here in the layer above the patched one."""
    inputs, scale = inputs_of("llava", None), {"0.*": 0.2}
    tower = Naive(ZOO["llava"], "vision")
    with tower.edited({0: lambda call: call.out() * 0.2}) as other, torch.no_grad():
        other.model.vision_tower(inputs.kwargs["pixel_values"])
    changed = tower.calls(1)[0].p[:, :, 0, 1:].sum(1)
    model = ZOO["llava"].build(torch.float64)
    headpatch.apply(model, of(
        {"method": "head_scaling", "part": "vision", "heads": scale},
        recipe(local_layer=1, local_share=0.5, summary_fence=1e4)["patches"][0],
    ))  # fmt: skip
    cache = DynamicCache()
    logits(model, inputs.kwargs, past_key_values=cache)
    (kept,) = (v for k, v in cache.headpatch_state.items() if k[0] == "vision_salient" and ("share", 0.5) in k)
    expected = changed >= changed.sort(-1, descending=True).values[:, 7:8]
    assert torch.equal(kept[:, 1:17], expected)
    untouched = torch.tensor(class_rows(inputs.kwargs["pixel_values"], 1))
    assert not torch.equal(expected, untouched >= untouched.sort(-1, descending=True).values[:, 7:8])


def test_identity_and_removal_are_bit_equal():
    model, batch = ZOO["llava"].build(), inputs_of("llava", "left").to(torch.float32).kwargs
    plain = logits(model, batch)
    before = fingerprint(model)  # transformers leaves hooks of its own behind in the first call
    with headpatch.applied(model, recipe(dict.fromkeys(WEIGHTS, 0.0))):
        assert torch.equal(logits(model, batch), plain)
    with headpatch.applied(model, recipe()) as handle:
        assert not torch.equal(logits(model, batch), plain)
        assert {layer.part for layer in handle.report().layers} == {"text"}
        seen = model.model.get_image_features(batch["pixel_values"])
    assert torch.equal(logits(model, batch), plain) and fingerprint(model) == before
    own = model.model.get_image_features(batch["pixel_values"])
    assert torch.equal(torch.stack(list(seen.pooler_output)), torch.stack(list(own.pooler_output))), (
        "the tower is watched"
    )


def test_copies_carry_it():
    model, batch = ZOO["llava"].build(), inputs_of("llava", "left").to(torch.float32).kwargs
    headpatch.apply(model, recipe())
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    expected = logits(model, batch)
    for other in others:
        assert torch.equal(logits(other, batch), expected)


def test_the_self_check_reaches_it():
    model = ZOO["llava"].build()
    checks = headpatch.apply(model, recipe()).report(self_check=True).self_check
    assert checks and all(check.passed for check in checks)


def test_a_prompt_without_an_image_is_left_alone():
    model, tokens = ZOO["llava"].build(torch.float64), ids()
    plain = logits(model, tokens)
    headpatch.apply(model, recipe())
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-9)


def test_pictures_that_were_encoded_before():
    """Under the recipe they carry what was seen; made without it, or by something else, they are refused."""
    inputs = inputs_of("llava", None)
    model, given = ZOO["llava"].build(torch.float64), dict(inputs.kwargs)
    early = model.model.get_image_features(given["pixel_values"])
    headpatch.apply(model, recipe())
    expected = logits(model, given)
    outputs = model.model.get_image_features(given.pop("pixel_values"))
    model.model.get_image_features(torch.zeros(1, 3, 16, 16, dtype=torch.float64))  # others, later
    if "mm_encoder_outputs" in type(model).forward.__code__.co_varnames:
        assert torch.equal(logits(model, {**given, "mm_encoder_outputs": {"image": outputs}}), expected)
        with pytest.raises(EngineError, match="'vision_salient': the vision tower did not run for this call"):
            logits(model, {**given, "mm_encoder_outputs": {"image": early}})
    with pytest.raises(EngineError, match="'vision_salient': the vision tower did not run for this call"):
        logits(model, given)


def test_what_cannot_be_is_refused():
    def refused(model: Any, words: str, **more: Any) -> None:
        before = fingerprint(model)
        with pytest.raises(UnsupportedModelError, match=words):
            headpatch.apply(model, recipe(**more))
        assert fingerprint(model) == before

    operand = "operand 'vision_salient' cannot be had with"
    refused(ZOO["t5"].build(), f"{operand} position_bias")
    refused(ZOO["llama"].build(), f"{operand} no_image_tokens")
    refused(FAMILIES["qwen2_5_vl"].build(), f"{operand} no_class_token")
    refused(ZOO["llava"].build(), "the vision tower has 2 layers, and layer -3 is none of them", summary_layer=-3)
    refused(ZOO["llava"].build(), "the vision tower has 2 layers, and layer 2 is none of them", local_layer=2)
    config = ZOO["llava"].config()
    config.vision_feature_select_strategy = "full"
    refused(type(ZOO["llava"].build())(config), f"{operand} merged_patches")
    with pytest.raises(RecipeError, match="weight"):
        headpatch.Recipe.from_dict(recipe({0: -0.5}))

    model = ZOO["llava"].build(torch.float64)
    headpatch.apply(model, recipe())
    inputs = inputs_of("llava", None, 0)
    given = {**inputs.kwargs, "attention_mask": inputs.real.long()}
    with pytest.raises(EngineError, match="'vision_salient' needs the whole prompt in one call"):
        model.generate(**given, max_new_tokens=1, do_sample=False, prefill_chunk_size=20)
    with (
        pytest.raises(HeadpatchError, match="observe 'weights' of query 0"),
        headpatch.observe(model, ["vision_salient"], "*.*"),
    ):
        pass
    assert model.generate(**given, max_new_tokens=1, do_sample=False).shape == (3, 30), "it goes on after an error"


def test_an_image_in_a_later_turn_of_generate():
    """Pictures that generate() encodes itself are pictures, after a cache as before it."""
    model, (tokens, pixels) = ZOO["llava"].build(torch.float64), several_images()
    tokens, pixels = tokens[1:2], pixels[2:]
    headpatch.apply(model, recipe_of("image_bias", {0: 2.0, 1: -1.0}))
    whole = logits(model, {"input_ids": tokens, "pixel_values": pixels})[:, -1]
    cache = DynamicCache()
    logits(model, tokens[:, :5], past_key_values=cache)
    made = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels, past_key_values=cache,
        max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(made.logits[0].double(), whole, rtol=0, atol=1e-5)
