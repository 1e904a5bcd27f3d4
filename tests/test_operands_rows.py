"""Operands that are one number per row, and what is refused: positions, prompt lengths, companions; models that cannot supply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import fingerprint, ids, left_padded, logits, one_thread, silent
from naive import Looking, define, of, patch, registered, steps
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch
from headpatch import EngineError, UnsupportedModelError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")
LAYERS = 2
LENGTHS = (12, 7, 3)


def _positions(it: Looking) -> list[tuple[list[Any], list[int]]]:
    """Positions and prompt lengths that layer 0 was given, call by call."""
    return [(given["position"].tolist(), given["prompt_len"].tolist()) for given in it.seen[::LAYERS]]


@pytest.mark.parametrize("entry", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static", "own"])
def test_position_and_prompt_len_of_left_padded_rows(entry, kind):
    """Positions count from the row's first real token; the prompt's length stays what it was when tokens are added."""
    batch = left_padded(LENGTHS)
    with Looking("position", "prompt_len", entry=entry, heads={"0-1.*": 2.0}) as it:
        config = it.model.config
        cache = {
            "dynamic": DynamicCache(), "dynamic_config": DynamicCache(config=config), "own": None,
            "static": StaticCache(config=config, max_cache_len=20),
        }[kind]  # fmt: skip
        for step in steps(batch, cache):
            if kind == "own":
                step["past_key_values"] = cache
                with torch.no_grad():
                    cache = it.model(**step, use_cache=True).past_key_values
            else:
                logits(it.model, step)
        found = _positions(it)
    assert found[0][0] == [list(range(n - 12, n)) for n in LENGTHS], "negative where there is padding"
    for i, (position, length) in enumerate(found[1:]):
        assert position == [[n + i] for n in LENGTHS]
        assert length == list(LENGTHS)
    assert found[0][1] == list(LENGTHS)


def test_position_and_prompt_len_of_right_padded_and_unpadded_rows():
    batch = left_padded(LENGTHS)
    right = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    for given, lengths in ((right, list(LENGTHS)), ({"input_ids": ids(2, 5)}, [5, 5])):
        with Looking("position", "prompt_len") as it:
            logits(it.model, given)
            width = given["input_ids"].shape[1]
            assert _positions(it) == [([list(range(width))] * len(lengths), lengths)]
            assert it.seen[0]["position"].dtype == it.seen[0]["prompt_len"].dtype == torch.int64


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}], ids=str)
def test_position_and_prompt_len_through_generate(more):
    """Chunks of a prompt know how long all of it is."""
    with Looking("position", "prompt_len") as it:
        it.model.generate(**left_padded(LENGTHS), max_new_tokens=4, do_sample=False, **more)
        found = _positions(it)
    assert all(length == list(LENGTHS) for _, length in found)
    columns = [[p for position, _ in found for p in position[row]] for row in range(3)]
    assert [c[12 - n :] for c, n in zip(columns, LENGTHS, strict=True)] == [list(range(n + 3)) for n in LENGTHS]
    assert len(found) == (6 if "prefill_chunk_size" in more else 4)


def test_position_and_prompt_len_under_beams():
    with Looking("position", "prompt_len") as it:
        it.model.generate(**left_padded(LENGTHS), max_new_tokens=3, do_sample=False, num_beams=2)
        found = _positions(it)
    assert all(length == [n for n in LENGTHS for _ in range(2)] for _, length in found)
    assert found[-1][0] == [[n + 1] for n in LENGTHS for _ in range(2)]


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_position_and_prompt_len_of_an_encoder_decoder(part):
    """Of queries: those of cross-attention are the decoder's, whatever the padding of its keys."""
    seen = []
    looking = define(
        "output", "looking", needs=("position", "prompt_len"),
        edit=lambda self, out, s, ops: (seen.append((ops["position"].tolist(), ops["prompt_len"].tolist())), out)[1],
    )  # fmt: skip
    model = ZOO["t5"].build()
    with registered(looking):
        headpatch.apply(model, of(patch(looking, {"0.0": 2.0}, part=part)))
        model.generate(**left_padded((10, 6)), max_new_tokens=3, do_sample=False)
    if part == "encoder":
        assert seen == [([list(range(10)), list(range(-4, 6))], [10, 6])]
    else:
        assert seen == [([[i], [i]], [1, 1]) for i in range(3)]


def test_prompt_len_given_by_hand():
    """Chunks fed by hand: the caller says how long the prompt is, and the rest of the request remembers it."""
    with Looking("position", "prompt_len") as it:
        cache = DynamicCache()
        with it.handle.inputs(prompt_len=torch.tensor([9, 9])):  # a list will do as well
            for i in range(0, 9, 3):
                logits(it.model, ids(2, 9)[:, i : i + 3], past_key_values=cache)
        logits(it.model, ids(2, 1), past_key_values=cache)
        assert _positions(it) == [([[0, 1, 2]] * 2, [9, 9]), ([[3, 4, 5]] * 2, [9, 9]), ([[6, 7, 8]] * 2, [9, 9]),
                                  ([[9]] * 2, [9, 9])]  # fmt: skip


def test_prompt_len_of_a_prompt_that_was_not_seen_is_refused():
    """A cache from before the recipe was applied is refused as such; here it was filled under the same recipe elsewhere."""
    with Looking("prompt_len") as it:
        cache = DynamicCache()
        logits(it.model, past_key_values=cache)
        del cache.headpatch_state
        with pytest.raises(
            EngineError, match=r"layer text\.0: operand 'prompt_len' is derived from the prompt, which came in"
        ):
            logits(it.model, ids(2, 1), past_key_values=cache)


def test_without_image():
    """Each row's companion without the image, as given with the call."""
    with Looking("without_image", entry="llava") as it:
        with it.handle.inputs(without_image=[2, None, None]):
            logits(it.model, ids(3))
        assert it.seen[0]["without_image"].tolist() == [2, -1, -1]
        with pytest.raises(
            EngineError, match=r"layer text\.0: operand 'without_image' is needed. .*inputs\(without_image="
        ):
            logits(it.model, ids(3))
        with (
            it.handle.inputs(without_image=[1, None]),
            pytest.raises(EngineError, match="names 2 rows, the batch has 3"),
        ):
            logits(it.model, ids(3))


@pytest.mark.parametrize(
    "wrong", [[3, None, None], [-2, None, None], [0, None, None]], ids=["beyond", "negative", "itself"]
)
def test_a_companion_must_be_another_row_of_the_batch(wrong):
    with Looking("without_image", entry="llava") as it, pytest.raises(headpatch.HeadpatchError, match="without_image"):  # noqa: SIM117
        with it.handle.inputs(without_image=wrong):
            logits(it.model, ids(3))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "operand",
    ["first_token", "spans", "image_tokens", "column_sinks", "residual_sinks", "lse", "column_means", "window_scores"],
)
@pytest.mark.parametrize("part", ["decoder", "encoder", "cross"])
def test_position_bias_is_refused_by_name(operand, part):
    """T5 adds a bias to scores inside its attention, after what a patch would see."""
    model = ZOO["t5"].build()
    before = fingerprint(model)
    method = define("output", "asking", needs=(operand,))
    with (
        registered(method),
        pytest.raises(
            UnsupportedModelError,
            match=rf"\(asking\) on layer {part}\.0 \(T5Attention\): operand '{operand}' cannot be had with position_bias",
        ),
    ):
        headpatch.apply(model, of(patch(method, {"*.1": 2.0}, part=part)))
    assert fingerprint(model) == before


def test_what_position_bias_does_not_touch_is_supplied():
    """Queries, outputs and projections are what they are."""
    with Looking("q", "k", "v", "o_proj", "all_heads", "layer_input", "position", entry="t5") as it:
        logits(it.model, ZOO["t5"].make_inputs().to(torch.float64).kwargs)
        assert len(it.seen) == LAYERS


def test_a_forward_that_branches_on_the_implementation_is_refused_by_name():
    """GPT-2 with reordered upcasting asks whether it runs eagerly: another name would change it."""
    model = ZOO["gpt2"].build(attn="eager")
    assert headpatch.apply(model, of({"method": "head_scaling", "heads": {"0.1": 0.0}})).remove() is None
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    for name, heads in (("head_scaling", {"0.1": 0.0}), ("zerotuning", {"1.1": 2.0})):
        layer = next(iter(heads))[0]
        with pytest.raises(
            UnsupportedModelError,
            match=rf"\({name}\) on layer text\.{layer} \(GPT2Attention\): .*compares the implementation's",
        ):
            headpatch.apply(model, of({"method": name, "heads": heads}))


def test_tensor_parallel_models_are_refused_by_name():
    model = ZOO["llama"].build()
    model._tp_size = 2
    for name in ("head_scaling", "zerotuning"):
        with pytest.raises(UnsupportedModelError, match="heads are sharded over ranks"):
            headpatch.apply(model, of({"method": name, "heads": {"0.1": 3.0}}))


def test_what_is_refused_for_one_layer_leaves_all_layers_alone():
    """Patch 0 would be possible, patch 1 is not: nothing is patched."""
    model = ZOO["t5"].build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"patches\[1\] \(zerotuning\)"):
        headpatch.apply(
            model,
            of({"method": "head_scaling", "heads": {"0.1": 0.0}}, {"method": "zerotuning", "heads": {"0.1": 3.0}}),
        )
    assert fingerprint(model) == before and headpatch.handles(model) == []
