"""generate() under a cache policy: nobody passes a cache, and what comes out is what a mask written out in full gives."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from compat import ids, left_padded, new_tokens, quiet_transformers
from kv_cases import RECENT, SINK, duo, full_heads, window_edit
from naive import Naive
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch
from headpatch.errors import EngineError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def silent(request):
    with quiet_transformers(*(["Passing `generation_config` together with"] if "assist" in request.node.name else [])):
        yield


def full_forward(batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, new, vocabulary] that decided each of the new tokens, from one masked pass over everything."""
    everything = torch.cat([batch["input_ids"], tokens], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    naive = Naive(ZOO["llama"])
    written = window_edit(full_heads("llama"), mask)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with naive.edited({n: written(n) for n in naive.taps}) as model, torch.no_grad():
        logits = model(input_ids=everything, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, batch["input_ids"].shape[1] - 1 : -1]


def check(batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    """Every token is the masked reference's first choice."""
    logits = full_forward(batch, tokens)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 1e-6


@pytest.mark.parametrize("lengths", [(12, 12), (14, 9, 2)])
@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
def test_greedy_tokens_are_the_mask_s(lengths, more):
    batch = left_padded(lengths)
    model = ZOO["llama"].build(torch.float64)
    plain = new_tokens(model, batch, 24)
    with headpatch.applied(model, duo("llama")) as handle:
        found = new_tokens(model, batch, 24, **more)
        check(batch, found)
        assert handle.report().fires
    assert not torch.equal(found, plain)
    assert torch.equal(new_tokens(model, batch, 24), plain)


def test_beams_take_their_cache_along():
    """The best beam's score is the sum of log-probabilities that the masked reference gives its tokens."""
    batch = left_padded((12, 8))
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, duo("llama")):
        out = model.generate(
            **batch, max_new_tokens=20, num_beams=4, num_return_sequences=4, do_sample=False, return_dict_in_generate=True,
            output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    repeated = {k: v.repeat_interleave(4, 0) for k, v in batch.items()}
    p = full_forward(repeated, tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(p, out.sequences_scores.double(), rtol=0, atol=1e-4)
    assert len({tuple(t) for t in tokens.tolist()}) == len(tokens)


@pytest.mark.parametrize("draft", [2, 6, 20])
def test_assisted_decoding_takes_tokens_back(draft):
    batch = {"input_ids": ids(1, 11), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    model, assistant = ZOO["llama"].build(torch.float64), ZOO["llama"].build(torch.float64)
    assistant.lm_head.weight.data += 0.1 * torch.randn(
        assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assistant.generation_config.num_assistant_tokens = draft
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    with headpatch.applied(model, duo("llama")):
        expected = new_tokens(model, batch, 40)
        found = new_tokens(model, batch, 40, assistant_model=assistant)
        check(batch, found)
        assert torch.equal(found, expected)
        looked = new_tokens(model, batch, 40, prompt_lookup_num_tokens=draft)
        assert torch.equal(looked, expected)


def test_an_assistant_can_be_the_one_with_the_policy():
    batch = {"input_ids": ids(1, 11), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    model, assistant = ZOO["llama"].build(torch.float64), ZOO["llama"].build(torch.float64)
    expected = new_tokens(model, batch, 30)
    with headpatch.applied(assistant, duo("llama")):
        assert torch.equal(new_tokens(model, batch, 30, assistant_model=assistant), expected)


def test_turns_continue_on_the_cache():
    model = ZOO["llama"].build(torch.float64)
    first, second = ids(2, 13), ids(2, 9, seed=1)
    with headpatch.applied(model, duo("llama")):
        out = model.generate(
            input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=12, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        everything = torch.cat([out.sequences, second], 1)
        cache = out.past_key_values
        again = {"input_ids": everything, "attention_mask": torch.ones_like(everything)}
        found = new_tokens(model, again, 16, past_key_values=cache)
        check(again, found)
        assert torch.equal(found, new_tokens(model, again, 16))
        assert cache.get_seq_length() == everything.shape[1] + 15
        held = cache.layers[1].streaming
        assert cache.layers[1].policy.streaming
        assert held[0].shape[2] == SINK + RECENT


def test_copies_of_a_cache_go_their_own_ways():
    model = ZOO["llama"].build(torch.float64)
    prompt = ids(2, 15)
    with headpatch.applied(model, duo("llama")), torch.no_grad():
        cache = DynamicCache()
        model(prompt, past_key_values=cache)
        one, two = copy.deepcopy(cache), copy.deepcopy(cache)
        steps = [ids(2, 1, seed=n) for n in range(12)]
        for step in steps:
            model(step, past_key_values=one)
        logits = [model(step, past_key_values=two).logits for step in steps]
        torch.testing.assert_close(model(torch.cat(steps, 1), past_key_values=cache).logits, torch.cat(logits, 1))
        loaded = pickle.loads(pickle.dumps(two))
        assert loaded.layers[0].ledger is loaded.layers[1].ledger


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_can_be_chosen_and_repeated(kind):
    model = ZOO["llama"].build(torch.float64)
    batch = left_padded((14, 9, 4))
    with headpatch.applied(model, duo("llama")), torch.no_grad():

        def run(rows: list[int], move: Any) -> torch.Tensor:
            cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
            model(**batch, past_key_values=cache)
            move(cache)
            mask = batch["attention_mask"][rows]
            pieces = []
            for step, width in enumerate((1, 1, 3, 1)):
                mask = torch.cat([mask, torch.ones(len(rows), width, dtype=torch.long)], 1)
                tokens = ids(1, width, seed=step).repeat(len(rows), 1)
                pieces.append(model(tokens, attention_mask=mask, past_key_values=cache).logits)
            return torch.cat(pieces, 1)

        plain = run([0, 1, 2], lambda cache: None)
        for rows, move in (
            ([2, 0, 1], lambda c: c.reorder_cache(torch.tensor([2, 0, 1]))),
            ([1, 1], lambda c: c.batch_select_indices(torch.tensor([1, 1]))),
            ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
        ):
            torch.testing.assert_close(run(rows, move), plain[rows], rtol=0, atol=1e-9)


def test_reset_starts_over():
    model = ZOO["llama"].build(torch.float64)
    prompt = ids(2, 15)
    with headpatch.applied(model, duo("llama")), torch.no_grad():
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=20)):
            once = [model(x, past_key_values=cache).logits for x in (prompt, prompt[:, :1], prompt[:, :1])]
            cache.reset()
            again = [model(x, past_key_values=cache).logits for x in (prompt, prompt[:, :1], prompt[:, :1])]
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_tokens_are_taken_back_or_it_is_refused():
    model = ZOO["llama"].build(torch.float64)
    tokens = ids(1, 60)
    with headpatch.applied(model, duo("llama")), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for recorded, most in ((False, 1), (True, 257)):
            for start, count in itertools.product((6, 9, 30, 59), (1, 2, 5)):
                if count >= start:
                    continue
                cache = DynamicCache()
                if recorded:
                    model(tokens[:, :1], past_key_values=cache)
                    cache.activate_past_recording()
                    model(tokens[:, 1:start], past_key_values=cache)
                else:
                    model(tokens[:, :start], past_key_values=cache)
                held = start <= SINK + RECENT  # nothing has been dropped
                if not held and count > most:
                    with pytest.raises(
                        EngineError, match=f"cannot take back {count} tokens: .* keep the last {RECENT}"
                    ):
                        cache.crop(-count)
                    continue
                cache.crop(-count)
                assert cache.get_seq_length() == start - count
                found = model(tokens[:, start - count :], past_key_values=cache).logits
                torch.testing.assert_close(found, expected[:, start - count :], rtol=0, atol=1e-9)


def test_recording_can_start_on_a_filled_cache():
    model = ZOO["llama"].build(torch.float64)
    tokens = ids(1, 60)
    with headpatch.applied(model, duo("llama")), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = DynamicCache()
        model(tokens[:, :30], past_key_values=cache)
        cache.activate_past_recording()
        model(tokens[:, 30:37], past_key_values=cache)
        cache.crop(-6)
        found = torch.cat([model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(31, 60)], 1)
        torch.testing.assert_close(found, expected[:, 31:], rtol=0, atol=1e-9)
        with pytest.raises(EngineError, match="cannot take back"):
            cache.crop(-45)
