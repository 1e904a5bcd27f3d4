"""Edits of attention to segments without an engine: rows against the full softmax in float64, and what is read off a prompt."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import _tokenizer
from segment_cases import (
    CALM,
    CASES,
    CHUNKS,
    FORMS,
    IMAGES,
    LAYER,
    LIVE,
    PROMPTS,
    SHAPE,
    STRENGTH,
    World,
    calibrated,
    columns,
    compare,
    faint_beside_spans,
    jumbled,
)  # fmt: skip
from torch import Tensor

from headpatch.adapters.vllm.one_step import hold, longest_prompt, too_many_images
from headpatch.adapters.vllm.plan import compile_recipe
from headpatch.adapters.vllm.prompts import image_ranges, span_ranges, text_of
from headpatch.adapters.vllm.supplies import check_supplied
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError
from headpatch.recipe import Recipe

WITHOUT_VLLM = True


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks"])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "window and cap", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_full_softmax(name: str, form: dict[str, Any], chunks: Any) -> None:
    patch, wanted = CASES[name]
    world = World([patch], **form)
    compare(world, wanted, chunks, LIVE.get(name, STRENGTH))


@pytest.mark.parametrize("form", FORMS[:2], ids=["plain", "window and cap"])
def test_sinks_are_found_in_the_prompt_and_stay(form: dict[str, Any]) -> None:
    world = World([CALM], **form)
    compare(world, calibrated, CHUNKS[0])
    found = next(iter(world.requests[0].kept.values()))
    assert found.shape == (len(STRENGTH), PROMPTS[0]) and 0 < int(found.sum()) < found.numel()
    # After preemption all of it comes again, in chunks and with what was generated: sinks are those of the prompt still.
    world.done = [0, 0, 0]
    compare(world, calibrated, [(9, 2, 3), (16, 12, 9)])


def test_sinks_are_not_guessed_from_a_part_of_the_prompt() -> None:
    with pytest.raises(EngineError, match="came in chunks"):
        World([CALM]).step((20, 1, 9))


def test_a_prompt_waits_until_a_step_takes_all_of_it() -> None:
    calls: list[int] = []

    def allocate(request: Any, count: int, **_: Any) -> str:
        calls.append(count)
        return "blocks"

    def request(computed: int = 0, preempted: int = 0, **wire: Any) -> Any:
        params = SimpleNamespace(extra_args={"headpatch": {"key": "x", **wire}} if wire else None)
        return SimpleNamespace(
            sampling_params=params, num_prompt_tokens=30, num_computed_tokens=computed, num_preemptions=preempted
        )

    held = hold(allocate)
    assert held(request(whole=True), 29) is None
    again = hold(allocate, again=True)  # what was derived lies beside the keys
    assert again(request(0, 1, whole=True), 29) is None and again(request(30, 1, whole=True), 1) == "blocks"
    calls.clear()
    others = [request(whole=True), request(30, whole=True), request(0, 1, whole=True), request(spans=[]), request()]
    assert [held(other, n) for other, n in zip(others, (30, 1, 12, 12, 12), strict=True)] == ["blocks"] * 5
    assert calls == [30, 1, 12, 12, 12]


def test_the_longest_prompt_of_an_engine() -> None:
    def config(drafts: int = 0, **scheduler: Any) -> Any:
        speculation = SimpleNamespace(max_num_new_slots_for_drafting=drafts)
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, **scheduler), speculative_config=speculation
        )

    assert longest_prompt(config()) == 64
    assert longest_prompt(config(4, long_prefill_token_threshold=0, max_num_scheduled_tokens=None)) == 60
    assert longest_prompt(config(long_prefill_token_threshold=16)) == 16
    feature = SimpleNamespace(mm_position=SimpleNamespace(length=40))
    assert too_many_images(config(encoder_cache_size=64), [feature] * 2)
    assert not too_many_images(config(encoder_cache_size=64), [feature])


def test_learned_sinks_keep_their_logit() -> None:
    patch, wanted = CASES["pai"]
    compare(World([patch], sinks=True), wanted, CHUNKS[0], LIVE["pai"])


def test_several_edits_of_a_layer_act_one_after_the_other() -> None:
    first = {"method": "zerotuning", "heads": {f"{LAYER}.{head}": 3.0 for head in STRENGTH}}
    bias = {"method": "image_bias", "heads": {f"{LAYER}.0-2": 0.7}}

    def both(world: World, r: int, n: int) -> Tensor:
        scores, _, _ = world.plain(r, n)
        for head in STRENGTH:
            scores[head, 1:, 0] += math.log(3.0)
        scores[:3] += 0.7 * columns(IMAGES, n)
        return world.softmax(faint_beside_spans(scores, r, n))

    compare(World([first, bias, CASES["pasta"][0]]), both, CHUNKS[1], {0, 1, 2, 5})


def test_a_layout_that_cannot_be_read_back_is_an_error() -> None:
    with pytest.raises(EngineError, match="operand 'k' cannot be had"):
        World([CASES["pasta"][0]], write=jumbled)


def test_constant_weights_stay_in_the_tables_of_other_layers() -> None:
    first = {"method": "zerotuning", "heads": {"*.1": 3.0}}
    recipe = Recipe.from_dict({"headpatch": 1, "patches": [first, CASES["pasta"][0]]})
    edits = compile_recipe(recipe, SHAPE)
    assert edits[0].weight is not None and not edits[0].segments
    assert edits[LAYER].weight is None and [e.method.name for e in edits[LAYER].segments] == ["zerotuning", "pasta"]


@pytest.mark.parametrize("name", CASES)
def test_beside_a_cut_cache_they_are_refused_by_operand(name: str) -> None:
    recipe = Recipe.from_dict({"headpatch": 1, "patches": [CASES[name][0]]})
    check_supplied(recipe)
    with pytest.raises(UnsupportedModelError, match="cannot be had with kv_windows"):
        check_supplied(recipe, frozenset({"kv_windows"}))


IDS = [3, 4, 5, 6, 4, 5]
TEXT = "t3 t4 t5 t6 t4 t5"


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([[1, 3]], [(1, 3)]), (["t4 t5"], [(1, 3)]), ([{"chars": [9, 14]}], [(3, 5)]), ([{"text": "5 t6"}], [(2, 4)]), ([], []),
        (["t6", [0, 1]], [(0, 1), (3, 4)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "prompt", [TEXT, {"prompt_token_ids": IDS}, {"prompt": TEXT}, {"prompt": "what a template made"}]
)
def test_spans_of_a_prompt(prompt: Any, spans: Any, wanted: Any) -> None:
    """Where the text is not what the tokens say, the tokens count."""
    assert span_ranges(spans, IDS, text_of(prompt), _tokenizer()) == wanted


def test_spans_that_cannot_be_had() -> None:
    for spans, tokenizer, message in (
        (["t9"], _tokenizer(), "does not occur"), ([[2, 9]], None, "ends at token 9, and the prompt has 6"),
        (["t4"], None, "need the engine's tokenizer"), ("t4", None, "give a list"), ([5], None, "is no span"),
    ):  # fmt: skip
        with pytest.raises(HeadpatchError, match=message):
            span_ranges(spans, IDS, TEXT, tokenizer)
    with pytest.raises(HeadpatchError, match="cannot be traced back"):
        span_ranges(["t4"], [700, 3], None, _tokenizer())


def test_images_of_a_prompt() -> None:
    """Only the positions that take an image's embeddings, and only images."""

    def feature(modality: str, offset: int, length: int, mask: Any = None) -> Any:
        place = SimpleNamespace(offset=offset, length=length, is_embed=None if mask is None else torch.tensor(mask))
        return SimpleNamespace(modality=modality, mm_position=place)

    features = [
        feature("image", 10, 3),
        feature("audio", 20, 5),
        feature("image", 2, 5, [False, True, True, False, True]),
    ]
    assert image_ranges(features) == [(3, 5), (6, 7), (10, 13)]
    assert image_ranges(None) == []
