"""Exactness through caches: decoding, static caches, chunked prefill, generate(), beams, windows.

What is compared with is always one float64 forward over the whole sequence, without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import (
    CACHES,
    Recipe,
    close,
    close_in_bf16,
    decode_sizes,
    edits_for,
    expected,
    make_cache,
    patched,
    recipes,
    run_cached,
    tolerance,
    usable,
)  # fmt: skip
from reference import reference
from test_exactness import BASES, LENGTHS, PADDED, one_thread
from transformers import GenerationMixin
from zoo import FULL, PAD, ZOO, Entry, Inputs, chunk, output

import headpatch

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

GENERATING = [p for p in BASES if p.values[0].generates]
SIDES = [None, "left", "right"]


def _stepwise(entry: Entry, attn: str, inputs: Inputs, sizes: Sequence[int], kind: str, applied: list[Recipe],
              dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    if not usable(entry, dtype, attn, None if inputs.real.all() else "left"):
        pytest.skip("the untouched model is not finite here")
    with patched(entry, dtype, attn, applied) as model:
        cache = make_cache(model, kind, inputs.real.shape[1] + 3)
        result = run_cached(model, entry, inputs, sizes, cache)
    close(result, expected(entry, inputs, applied, attn), inputs, tolerance(entry, dtype, attn))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("entry", "attn"), PADDED)
def test_decode(entry: Entry, attn: str, side: str | None, kind: str) -> None:
    """A padded prompt, then eight tokens one by one, through every kind of cache; windows move past the first token."""
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=8)
    _stepwise(entry, attn, inputs, decode_sizes(inputs), kind, recipes(entry, "stacked", seed=3))


@pytest.mark.parametrize("case", ["zero", "huge", "two_zerotuning_handles", "two_handles", "scaling"])
@pytest.mark.parametrize(("entry", "attn"), PADDED)
def test_decode_other_recipes(entry: Entry, attn: str, case: str) -> None:
    """The other recipes, left-padded, through the cache that the model makes itself."""
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side="left", continuation=4)
    _stepwise(entry, attn, inputs, decode_sizes(inputs), "default", recipes(entry, case, seed=4))


@pytest.mark.parametrize("kind", ["dynamic_config", "static"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("entry", [pytest.param(ZOO[n], id=n) for n in FULL if ZOO[n].caches])
def test_decode_fp64(entry: Entry, side: str | None, kind: str) -> None:
    """In float64 to ten digits: nothing is approximated on the decoding path."""
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=4)
    applied = recipes(entry, "stacked", seed=5)
    _stepwise(entry, entry.attn[0], inputs, decode_sizes(inputs), kind, applied, torch.float64)


@pytest.mark.parametrize("kind", ["dynamic_config", "static"])
@pytest.mark.parametrize(("entry", "attn"), PADDED)
def test_decode_bf16(entry: Entry, attn: str, kind: str) -> None:
    """Decoding in bfloat16 costs no more accuracy than bfloat16 itself does."""
    inputs = entry.make_inputs(lengths=[14, 12, 9, 5], padding_side="left", continuation=8, seed=3)
    applied = recipes(entry, "stacked", seed=3)

    def run(these: list[Recipe]) -> torch.Tensor:
        with patched(entry, torch.bfloat16, attn, these) as model:
            cache = make_cache(model, kind, inputs.real.shape[1] + 3)
            return run_cached(model, entry, inputs, decode_sizes(inputs), cache)

    close_in_bf16(run(applied), run([]), entry, inputs, applied, attn)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(("entry", "attn"), PADDED)
def test_chunked_prefill(entry: Entry, attn: str, side: str | None, kind: str) -> None:
    """The prompt in pieces of 3, then decoding. With left padding some rows are nothing but padding in the first piece."""
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=2)
    start = inputs.prompt - 4 if entry.kind == "image_text" else 0  # images must come in one piece
    rest = inputs.prompt - start
    sizes = [s for s in (start, *[3] * (rest // 3), rest % 3, 1, 1) if s]
    _stepwise(entry, attn, inputs, sizes, kind, recipes(entry, "per_head", seed=6))


def test_far_beyond_the_window() -> None:
    """Forty tokens past a window of eight: only full layers still see the first token, by any cache."""
    for name in ("mistral", "gemma2", "gemma3", "gpt_oss"):
        entry = ZOO[name]
        for kind in CACHES:
            inputs = entry.make_inputs(lengths=[7, 3], padding_side="left", continuation=40)
            _stepwise(entry, entry.attn[0], inputs, decode_sizes(inputs), kind, recipes(entry, "per_head"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", [None, "left"])
def test_decode_beside_linear_attention(side: str | None, attn: str) -> None:
    """Where only some layers have a key cache, and the first layer of the cache is none of them."""
    entry = ZOO["qwen3_next"]
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=6)
    applied = recipes(entry, "stacked", seed=5)
    with patched(entry, torch.float32, attn, applied) as model:
        cache = make_cache(model, "dynamic_config", 0)
        result = run_cached(model, entry, inputs, decode_sizes(inputs), cache)
    close(
        result, expected(entry, inputs, applied, attn), inputs, 5e-4
    )  # linear attention in float32 is off by 5e-5 as it is


def _generated(sequences: torch.Tensor, prompt: Inputs) -> Inputs:
    """Inputs of one forward over all but the last of the generated tokens."""
    ids = sequences[:, :-1]
    more = ids.shape[1] - prompt.prompt
    real = torch.nn.functional.pad(prompt.real, (0, more), value=True)
    positions = (real.long().cumsum(-1) - 1).clamp_min(0)
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": real.long()}
    return replace(prompt, kwargs=given, real=real)


def _generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    given = {k: v for k, v in inputs.kwargs.items() if k in ("input_ids", "attention_mask") and v is not None}
    with torch.no_grad():
        return model.generate(
            **given, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=PAD, **kwargs
        )


@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"use_cache": False}],
    ids=["dynamic", "static", "chunks", "no_cache"],
)  # fmt: skip
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(("entry", "attn"), GENERATING)
def test_generate(entry: Entry, attn: str, side: str | None, how: dict[str, Any]) -> None:
    """Greedy generate(): the logits of every step, and hence the tokens, are the reference's."""
    prompt = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    applied = recipes(entry, "stacked", seed=7)
    with patched(entry, torch.float32, attn, applied) as model:
        made = _generate(model, prompt, output_logits=True, **how)
    inputs = _generated(made.sequences, prompt)
    truth = expected(entry, inputs, applied, attn)[:, prompt.prompt - 1 :]
    steps = torch.stack(made.logits, dim=1)
    assert steps.shape == truth.shape
    assert (steps - truth).abs().max() <= 1e-4
    top = truth.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2e-4
    assert torch.equal(truth.argmax(-1)[clear], made.sequences[:, prompt.prompt :][clear])


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generate_from_images(attn: str, how: dict[str, Any]) -> None:
    """LLaVA: images in front, texts of different lengths, left-padded."""
    entry = ZOO["llava"]
    prompt, applied = entry.make_inputs(lengths=LENGTHS, padding_side="left"), recipes(entry, "stacked", seed=7)
    with patched(entry, torch.float32, attn, applied) as model:
        made = _generate(model, prompt, output_logits=True, pixel_values=prompt.kwargs["pixel_values"], **how)
    inputs = _generated(made.sequences, prompt)
    inputs.kwargs["pixel_values"] = prompt.kwargs["pixel_values"]
    truth = expected(entry, inputs, applied, attn)[:, prompt.prompt - 1 :]
    assert (torch.stack(made.logits, dim=1) - truth).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generate_from_sounds(attn: str, how: dict[str, Any]) -> None:
    """Whisper's three parts under the generate() of all encoder-decoders (its own wants timestamps and a real vocabulary)."""
    entry = ZOO["whisper"]
    prompt, applied = entry.make_inputs(lengths=[3, 3]), recipes(entry, "stacked", seed=7)
    given = {k: prompt.kwargs[k] for k in ("input_features", "decoder_input_ids")}
    with patched(entry, torch.float32, attn, applied) as model, torch.no_grad():
        made = GenerationMixin.generate(
            model, **given, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True,
            output_scores=True, pad_token_id=PAD, **how,
        )  # fmt: skip
    ids = made.sequences
    kwargs = {**prompt.kwargs, "decoder_input_ids": ids[:, :-1], "decoder_position_ids": None}
    real = torch.ones_like(ids[:, :-1], dtype=torch.bool)
    truth = expected(entry, replace(prompt, kwargs=kwargs, real=real), applied, attn)[:, prompt.prompt - 1 :]
    if "num_beams" not in how:
        assert (torch.stack(made.logits, dim=1) - truth).abs().max() <= 1e-4
    else:
        chosen = truth.log_softmax(-1).gather(-1, ids[:, prompt.prompt :, None])[..., 0]
        assert (chosen.sum(-1) / chosen.shape[1] - made.sequences_scores).abs().max() <= 1e-4


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(("entry", "attn"), GENERATING)
def test_beams(entry: Entry, attn: str, side: str | None) -> None:
    """Three beams: the same sequences and scores as the reference model under the same generate(), which keeps no cache."""
    prompt = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    applied = recipes(entry, "stacked", seed=8)
    beams = {"num_beams": 3, "output_scores": True}
    with patched(entry, torch.float32, attn, applied) as model:
        made = _generate(model, prompt, **beams)
    with reference(entry).under(prompt, edits_for(entry, applied), base=attn) as naive:
        truth = _generate(naive, prompt, use_cache=False, **beams)
        plain = None
    with reference(entry).under(prompt, None, base=attn) as naive:
        plain = _generate(naive, prompt, use_cache=False, **beams)
    assert torch.equal(made.sequences, truth.sequences)
    assert (made.sequences_scores - truth.sequences_scores).abs().max() <= 1e-4
    assert (plain.sequences_scores - truth.sequences_scores).abs().max() > 1e-2, "the recipe changes nothing here"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_two_batches_in_turns(name: str) -> None:
    """Two differently padded batches decoded in turns, each through its own cache: neither reads the other's first tokens."""
    entry = ZOO[name]
    attn = entry.attn[0]
    batches = [
        entry.make_inputs(lengths=[14, 9], padding_side="left", continuation=5),
        entry.make_inputs(lengths=[6, 12], padding_side="left", continuation=5, seed=1),
        entry.make_inputs(batch=1, lengths=[10], continuation=5, seed=2),
    ]
    applied = recipes(entry, "per_head", seed=9)
    results: list[list[torch.Tensor]] = [[] for _ in batches]
    with patched(entry, torch.float32, attn, applied) as model, torch.no_grad():
        caches = [make_cache(model, kind, 20) for kind in ("dynamic_config", "static", "dynamic")]
        for step in range(6):
            for i, inputs in enumerate(batches):
                start = 0 if step == 0 else inputs.prompt + step - 1
                call = chunk(entry, inputs.kwargs, start, inputs.prompt + step)
                results[i].append(output(model(**call, past_key_values=caches[i], use_cache=True)))
    for inputs, pieces in zip(batches, results, strict=True):
        close(torch.cat(pieces, dim=1), expected(entry, inputs, applied, attn), inputs, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cropped_cache(name: str) -> None:
    """Assisted decoding takes tokens back: the cache is cropped and other tokens follow."""
    entry = ZOO[name]
    inputs = entry.make_inputs(lengths=[7, 5], padding_side="left", continuation=6)
    other = entry.make_inputs(lengths=[7, 5], padding_side="left", continuation=6, seed=3)
    applied = recipes(entry, "per_head", seed=10)
    with patched(entry, torch.float32, "sdpa", applied) as model, torch.no_grad():
        cache = make_cache(model, "dynamic", 0)
        first = output(model(**chunk(entry, inputs.kwargs, 0, 7), past_key_values=cache, use_cache=True))
        model(**chunk(entry, other.kwargs, 7, 10), past_key_values=cache, use_cache=True)
        cache.crop(-3)
        rest = output(model(**chunk(entry, inputs.kwargs, 7, 13), past_key_values=cache, use_cache=True))
    close(torch.cat([first, rest], dim=1), expected(entry, inputs, applied, "sdpa"), inputs, 1e-4)


def test_tokens_are_not_reached_by_a_removed_patch() -> None:
    """After removal a cache-free forward is untouched even if a patched cache is still about."""
    entry = ZOO["llama"]
    inputs = entry.make_inputs(continuation=2)
    model = entry.build()
    handle = headpatch.apply(model, recipes(entry, "per_head")[0])
    run_cached(model, entry, inputs, decode_sizes(inputs), make_cache(model, "dynamic", 0))
    handle.remove()
    fresh = run_cached(model, entry, inputs, decode_sizes(inputs), make_cache(model, "dynamic", 0))
    close(fresh, reference(entry)(inputs), inputs, 1e-4)
