"""Generation with patched transformers models: beams, assistants, continuous batching, chunks; tokens as greedy decoding gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compat import A, B, C, ids, left_padded, new_tokens, one_thread, silent
from naive import define, of, patch, registered
from zoo import PAD, WINDOW, ZOO

import headpatch
from headpatch.operands import Segment, first_token

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build()


@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2"])
def test_beams(entry):
    """Each row's beams are those of the row alone, patched; static and dynamic caches agree."""
    model, batch = ZOO[entry].build(), left_padded((9, 6, 2))
    plain = new_tokens(model, batch, num_beams=3)
    headpatch.apply(model, A)
    headpatch.apply(model, B)
    found = new_tokens(model, batch, num_beams=3)
    assert not torch.equal(found, plain)
    assert torch.equal(new_tokens(model, batch, num_beams=3, cache_implementation="static"), found)
    for row, length in enumerate((9, 6, 2)):
        alone = {k: v[row : row + 1, 9 - length :] for k, v in batch.items()}
        assert torch.equal(new_tokens(model, alone, num_beams=3), found[row : row + 1])


@pytest.mark.parametrize("assistant", ["plain", "patched", "same", "lookup"])
@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_assisted_decoding(entry, assistant):
    """Candidates may come from anywhere: tokens are those of greedy decoding of the patched model."""
    model, prompt = ZOO[entry].build(), ids(1, 6)
    prompt[0, 3:] = prompt[0, :3]  # something to look up
    plain = new_tokens(model, prompt, 14)
    headpatch.apply(model, A)
    headpatch.apply(model, B)
    greedy = new_tokens(model, prompt, 14)
    assert not torch.equal(greedy, plain)
    helper = model if assistant == "same" else ZOO[entry].build()
    if assistant == "patched":
        headpatch.apply(helper, C)
    more = {"prompt_lookup_num_tokens": 3} if assistant == "lookup" else {"assistant_model": helper}
    assert torch.equal(new_tokens(model, prompt, 14, **more), greedy)
    assert torch.equal(new_tokens(model, prompt, 14), greedy)


@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_assisting_a_plain_model_with_a_patched_one(entry):
    model, helper, prompt = ZOO[entry].build(), ZOO[entry].build(), ids(1, 6)
    headpatch.apply(helper, A)
    assert torch.equal(new_tokens(model, prompt, 12, assistant_model=helper), new_tokens(model, prompt, 12))


def packed(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[str | None]]:
    """Tokens and errors of generate_batch, which packs requests into one row."""
    config = transformers.GenerationConfig(
        max_new_tokens=WINDOW + 3, do_sample=False, eos_token_id=-1, pad_token_id=PAD
    )
    # Left to itself, the paged cache takes all memory there is.
    pages = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=24, max_batch_tokens=64)
    found = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=pages, progress_bar=False
    )
    order = sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))
    return [found[key].generated_tokens for key in order], [found[key].error for key in order]


@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_continuous_batching(entry):
    """Each request comes out as alone, through a window that moves past the first token; closed forms and all others."""
    model = ZOO[entry].build()
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 1, 2 * WINDOW + 3)]
    halve = define("mass", "halving", segments=lambda self: (first_token,),
                   reshare=lambda self, shares, s, ops: torch.cat([shares[:1] / 2, shares[1:] + shares[:1] / 2]))  # fmt: skip
    shift = define(
        "scores", "shifting", segments=lambda self: (first_token,), transform=lambda self, scores, s, ops: scores + 1
    )
    scale = define(
        "output", "scaling", needs=("lse",), edit=lambda self, out, s, ops: out * ops["lse"].mT[..., :1, None].tanh()
    )

    def alone() -> list[list[int]]:
        return [new_tokens(model, torch.tensor([p]), WINDOW + 3)[0].tolist() for p in prompts]

    plain = alone()
    assert packed(model, prompts)[0] == plain
    with registered(halve, shift, scale):
        for what in (
            [A, B],
            [of(patch(halve, {"*.*": 2.0}))],
            [of(patch(shift, {"*.*": 2.0}), patch(scale, {"0.2": 2.0}))],
        ):
            handles = [headpatch.apply(model, r) for r in what]
            patched = alone()
            assert patched != plain
            assert packed(model, prompts)[0] == patched
            assert handles[0].report().fires
            for handle in handles:
                handle.remove()
    assert packed(model, prompts)[0] == plain


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("operand", ["prompt_len", "column_sinks", "window_scores"])
def test_what_continuous_batching_cannot_have_is_refused_by_name(model, operand, count, caplog):
    """Also for a single request, where the packed row looks like any other."""
    sinks = Segment("column_sinks", (("threshold", 0.1),))
    method = (
        define("mass", "asking", constant=True, segments=lambda self: (sinks,), weights=lambda self, s: s[:, None])
        if operand == "column_sinks" else define("output", "asking", needs=(operand,), edit=lambda self, out, s, ops: out)
    )  # fmt: skip
    with registered(method):
        headpatch.apply(model, of(patch(method, {"*.1": 2.0})))
        found, errors = packed(model, [ids(1, n)[0].tolist() for n in (5, 3, 9)[:count]])
    assert found == [[]] * count
    assert all(f"operand '{operand}' cannot be had with continuous batching" in error for error in errors)


def test_chunked_prefill(model):
    batch = left_padded((13, 8, 2))
    headpatch.apply(model, A)
    expected = new_tokens(model, batch)
    for size in (1, 4, 13, 20):
        assert torch.equal(new_tokens(model, batch, prefill_chunk_size=size), expected)
