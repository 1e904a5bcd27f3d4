"""Segments that an adapter finds itself: sinks by attention and by residual stream, image tokens; against masks found by hand."""

from __future__ import annotations

import pytest
import torch
from compat import ids, left_padded, logits, one_thread, silent
from naive import Call, Naive, define, of, patch, registered
from test_operands_edits import CACHES, HEADS, LENGTHS, Edit, apply_all, by_selector, compare, forwards, weigh
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import IMAGE, ZOO

import headpatch
from headpatch import EngineError, UnsupportedModelError
from headpatch.operands import Segment

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


# --------------------------------------------------------------------------------------------------------------- sinks


@CACHES
def test_column_sinks(cache):
    """Per head, from the prompt's own attention; the same keys in every later step."""
    threshold = 0.12
    sinks = Segment("column_sinks", (("threshold", threshold),))
    method = define(
        "mass", "column_damping", constant=True, segments=lambda self: (sinks,), weights=lambda self, s: s[:, None]
    )
    frozen: dict[int, Tensor] = {}
    mask = left_padded(LENGTHS)["attention_mask"].bool()

    def masks(call: Call) -> list[Tensor]:
        n, layer = call.k.shape[2], len(frozen) if call.q.shape[2] > 1 else turn[0] % 2
        if call.q.shape[2] > 1:
            asked = call.seen & mask[:, None, :, None]
            frozen[layer] = (call.p * asked).sum(2) / asked.sum(2).clamp_min(1) > threshold
            assert frozen[layer].any() and not frozen[layer].all()
        else:
            turn[0] += 1
        return [torch.nn.functional.pad(frozen[layer], (0, n - 12))[:, :, None]]

    turn = [0]
    edit = Edit("mass", HEADS, masks, weigh(lambda a: a[:, None]))
    with registered(method):
        compare("llama", [of(patch(method, by_selector(HEADS)))], [edit], cache)


@CACHES
def test_residual_sinks(cache):
    """Keys whose residual stream is extreme in one of some dimensions, against its own root mean square."""
    dims, threshold = (0, 5, 17), 1.5
    sinks = Segment("residual_sinks", (("dims", dims), ("threshold", threshold)))
    method = define(
        "mass", "residual_damping", constant=True, segments=lambda self: (sinks,), weights=lambda self, s: s[:, None]
    )
    streams: list[Tensor] = []
    naive = Naive(ZOO["llama"])
    for layer in naive.model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: streams.append(args[0]) if args[0].shape[1] > 1 else None)
    mask = left_padded(LENGTHS)["attention_mask"].bool()
    count = [0]

    def masks(call: Call) -> list[Tensor]:
        x = streams[count[0] % 2]
        count[0] += 1
        extreme = x[..., list(dims)].abs().amax(-1) / x.square().mean(-1).add(1e-6).sqrt() >= threshold
        assert (extreme & mask).any() and not (extreme | ~mask).all()
        return [torch.nn.functional.pad(extreme & mask, (0, call.k.shape[2] - 12))[:, None, None]]

    edit = Edit("mass", HEADS, masks, weigh(lambda a: a[:, None]))
    model = ZOO["llama"].build(torch.float64)
    kept = StaticCache(config=model.config, max_cache_len=24) if cache == "static" else DynamicCache()
    with registered(method), naive.edited(dict.fromkeys(naive.taps, apply_all([edit]))) as other:
        headpatch.apply(model, of(patch(method, by_selector(HEADS))))
        for step, reference in zip(forwards(kept, 3), forwards(DynamicCache(), 3), strict=True):
            found, expected = logits(model, step), logits(other, reference)
            real = mask if found.shape[1] > 1 else torch.ones(3, 1, dtype=torch.bool)
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-8)


def test_sinks_of_a_prompt_in_chunks_are_refused():
    """They depend on the whole prompt: a chunk does not show it."""
    sinks = Segment("column_sinks", (("threshold", 0.1),))
    method = define(
        "mass", "column_damping", constant=True, segments=lambda self: (sinks,), weights=lambda self, s: s[:, None]
    )
    model = ZOO["llama"].build()
    with registered(method):
        headpatch.apply(model, of(patch(method, {"*.*": 3.0})))
        with pytest.raises(
            EngineError, match=r"needs the whole prompt in one call, and it came in chunks; turn chunked prefill off"
        ):
            model.generate(**left_padded(LENGTHS), max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
        model.generate(**left_padded(LENGTHS), max_new_tokens=2, do_sample=False)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("turns", [1, 2])
def test_image_tokens(turns):
    """Keys of image placeholders, wherever they stand in the row; with a second image in a later turn, too."""
    images = Segment("image_tokens")
    method = define(
        "mass", "looking_at", constant=True, segments=lambda self: (images,), weights=lambda self, s: s[:, None]
    )
    entry = ZOO["llava"]
    inputs = entry.make_inputs(lengths=[9, 5], padding_side="left").to(torch.float64)
    batch, shown = dict(inputs.kwargs), []
    later = entry.make_inputs(lengths=[4, 4], seed=5).to(torch.float64).kwargs
    naive = Naive(entry)

    def masks(call: Call) -> list[Tensor]:
        everything = torch.cat(shown, 1)
        return [
            torch.nn.functional.pad(everything == IMAGE, (0, call.k.shape[2] - everything.shape[1]))[:, None, None]
        ]

    edit = Edit("mass", HEADS, masks, weigh(lambda a: a[:, None]))
    model, kept, reference = entry.build(torch.float64), DynamicCache(), DynamicCache()
    calls = [batch, {"input_ids": ids(2, 1)}, {"input_ids": ids(2, 1, 1)}]
    calls += [{k: later[k] for k in ("input_ids", "pixel_values")}, {"input_ids": ids(2, 1, 2)}] if turns == 2 else []
    mask = inputs.kwargs["attention_mask"]
    with registered(method), naive.edited(dict.fromkeys(naive.taps, apply_all([edit]))) as other:
        headpatch.apply(model, of(patch(method, by_selector(HEADS))))
        for i, call in enumerate(calls):
            shown.append(call["input_ids"])
            if i:
                mask = torch.cat([mask, torch.ones_like(call["input_ids"])], 1)
                call = {
                    **call,
                    "attention_mask": mask,
                    "position_ids": (mask.cumsum(-1) - 1)[:, -call["input_ids"].shape[1] :],
                }
            found = logits(model, call, past_key_values=kept)
            expected = logits(other, call, past_key_values=reference)
            real = inputs.real if not i else torch.ones_like(call["input_ids"], dtype=torch.bool)
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-8)


def test_image_tokens_of_embeddings_are_refused():
    """Without token ids nobody knows which embeddings are the image's; those of an earlier call do not count."""
    images = Segment("image_tokens")
    method = define(
        "mass", "looking_at", constant=True, segments=lambda self: (images,), weights=lambda self, s: s[:, None]
    )
    model, inputs = ZOO["llava"].build(), ZOO["llava"].make_inputs().kwargs
    with registered(method):
        headpatch.apply(model, of(patch(method, {"*.*": 3.0})))
        logits(model, inputs)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(EngineError, match=r"layer text\.0: operand 'image_tokens' needs input_ids in the call"):
            logits(model, {"inputs_embeds": embedded})


def test_image_tokens_of_a_model_without_images_are_refused():
    images = Segment("image_tokens")
    method = define(
        "mass", "looking_at", constant=True, segments=lambda self: (images,), weights=lambda self, s: s[:, None]
    )
    model = ZOO["llama"].build()
    refusal = pytest.raises(UnsupportedModelError, match="operand 'image_tokens' cannot be had with no_image_tokens")
    with registered(method):
        with refusal:
            headpatch.apply(model, of(patch(method, {"*.*": 3.0})))
        with refusal:  # the vision tower has patches, not tokens
            headpatch.apply(ZOO["llava"].build(), of(patch(method, {"*.*": 3.0}, part="vision")))
