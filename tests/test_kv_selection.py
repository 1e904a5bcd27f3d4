"""Policies that choose tokens: what they keep, against choices written out row by row and head by head in float64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, new_tokens, quiet_transformers
from kv_choices import CASES, Reference, least_alike, steps, with_positions
from naive import Call, Naive, of
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch
from headpatch.errors import EngineError, RecipeError
from headpatch.kv.choosing import even_out, share_out
from headpatch.kv.task_kv import TaskKV

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def silent():
    with quiet_transformers():
        yield


# Of two heads, both are equally far from their mean: Task-KV needs more.
PAIRS = [(case, entry) for case in CASES for entry in ("llama", "gpt2") if case != "task_kv" or entry == "gpt2"]


@pytest.mark.parametrize("lengths", [(30, 30), (34, 21, 9)])
@pytest.mark.parametrize(("case", "entry"), PAIRS)
def test_later_tokens_see_what_was_chosen(case, entry, lengths):
    patch, keep = CASES[case]
    batch = with_positions(left_padded(lengths))
    reference = Reference(entry, keep)
    model = ZOO[entry].build(torch.float64)
    real = batch["attention_mask"].bool()
    with headpatch.applied(model, of(patch)):
        cache = DynamicCache()
        torch.testing.assert_close(
            logits(model, batch, past_key_values=cache)[real], reference.prompt(batch)[real], rtol=0, atol=1e-8
        )
        moved = 0.0
        for given in steps(batch, (1, 1, 4, 1, 2)):
            found, expected = logits(model, given, past_key_values=cache), reference.step(given)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
            moved += float(expected.abs().max())
        plain = ZOO[entry].build(torch.float64)
        other = DynamicCache()
        logits(plain, batch, past_key_values=other)
        first = next(iter(steps(batch, (1,))))
        cache = DynamicCache()
        logits(model, batch, past_key_values=cache)
        change = logits(plain, first, past_key_values=other) - logits(model, first, past_key_values=cache)
        assert change.abs().max() > 1e-4, "the policy does nothing"


@pytest.mark.parametrize("case", CASES)
def test_chunks_of_a_prompt_mean_nothing(case):
    """generate() says how long the prompt is; the window's queries may come from several chunks."""
    batch = left_padded((34, 21, 9))
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, of(CASES[case][0])) as handle:
        whole = new_tokens(model, batch, 10)
        for size in (2, 7, 33):
            assert torch.equal(new_tokens(model, batch, 10, prefill_chunk_size=size), whole)
        cache, given = DynamicCache(), with_positions(batch)
        with handle.inputs(prompt_len=[34, 21, 9]):
            for i, j in ((0, 11), (11, 30), (30, 34)):
                piece = {k: v[:, :j] if k == "attention_mask" else v[:, i:j] for k, v in given.items()}
                last = logits(model, piece, past_key_values=cache)[:, -1]
        assert torch.equal(last.argmax(-1), whole[:, 0])
        assert all(layer.blocks for layer in cache.layers)


def test_rows_are_chosen_for_one_by_one():
    """A row's tokens and what it keeps are the same alone and in a batch."""
    batch = left_padded((34, 21, 9))
    model = ZOO["llama"].build(torch.float64)
    for patch, _ in CASES.values():
        with headpatch.applied(model, of(patch)):
            together = new_tokens(model, batch, 8)
            for row, length in enumerate((34, 21, 9)):
                alone = {k: v[row : row + 1, 34 - length :] for k, v in batch.items()}
                assert torch.equal(new_tokens(model, alone, 8)[0], together[row])


def test_beams_take_their_choice_along():
    model = ZOO["llama"].build(torch.float64)
    batch = left_padded((30,))
    with headpatch.applied(model, of(CASES["ada_kv"][0])):
        out = model.generate(
            **batch, max_new_tokens=12, num_beams=3, num_return_sequences=3, do_sample=False, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    reference = Reference("llama", CASES["ada_kv"][1])
    rows = {k: v.repeat_interleave(3, 0) for k, v in batch.items()}
    scores = reference.prompt(with_positions(rows))[:, -1:].log_softmax(-1)
    tokens, total = out.sequences[:, 30:], torch.zeros(3, dtype=torch.float64)
    mask = rows["attention_mask"]
    for i in range(12):
        total += scores[:, -1].gather(-1, tokens[:, i : i + 1])[:, 0]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        given = {
            "input_ids": tokens[:, i : i + 1],
            "attention_mask": mask,
            "position_ids": mask.sum(-1, keepdim=True) - 1,
        }
        scores = reference.step(given).log_softmax(-1)
    torch.testing.assert_close(total, out.sequences_scores.double(), rtol=0, atol=1e-4)


def test_heads_are_cut_back_while_decoding():
    """KeyDiff with `every`: a list of positions per head, cut back each time, gives the same tokens."""
    size, sink, recent, every, n = 10, 2, 3, 4, 24
    model = ZOO["llama"].build(torch.float64)
    batch = with_positions(left_padded((n,)))
    patch = {"method": "keydiff", "size": size, "sink": sink, "recent": recent, "every": every}
    naive, cache = Naive(ZOO["llama"]), DynamicCache()
    expected = [logits(naive.model, batch, past_key_values=cache)]
    held = {
        layer: [least_alike(keys, size, sink, recent) for keys in naive.calls(layer)[0].k[0]] for layer in naive.taps
    }
    keys = {layer: naive.calls(layer)[0].k[0] for layer in naive.taps}
    found_cache = DynamicCache()
    with headpatch.applied(model, of(patch)):
        found = [logits(model, batch, past_key_values=found_cache)]
        for i, given in enumerate(steps(batch, (1,) * 13)):
            for heads in held.values():
                for mine in heads:
                    mine.append(n + i)

            def edit(layer: int) -> Any:
                def run(call: Call) -> Tensor:
                    keys[layer] = call.k[0]
                    seen = torch.zeros_like(call.scores, dtype=torch.bool)
                    for head in range(call.q.shape[1]):
                        seen[0, head, 0, held[layer][head * call.k.shape[1] // call.q.shape[1]]] = True
                    return call.out(call.scores.masked_fill(~seen, -torch.inf).softmax(-1))

                return run

            with naive.edited({layer: edit(layer) for layer in naive.taps}) as other:
                expected.append(logits(other, given, past_key_values=cache))
            found.append(logits(model, given, past_key_values=found_cache))
            if (i + 1) % every == 0:
                for layer, heads in held.items():
                    for h, mine in enumerate(heads):
                        heads[h] = [mine[j] for j in least_alike(keys[layer][h, mine], size, sink, recent)]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=0, atol=1e-8)
    assert found_cache.layers[0].blocks[0].used == size + 1


def test_first_token_weights_go_with_a_policy_that_keeps_it():
    zero = {"method": "zerotuning", "heads": {"*.0": 3.0, "*.3": 0.0}}
    patch = CASES["ada_kv"][0]
    batch = with_positions(left_padded((30, 19)))
    model = ZOO["llama"].build(torch.float64)
    with pytest.raises(RecipeError, match=r"zerotuning needs 'first_token', and snapkv may drop keys of it"):
        headpatch.apply(model, of(CASES["snapkv"][0], zero))
    whole = {"method": "ada_kv", "size": 1000, "sink": 1}
    given = list(steps(batch, (1, 1, 3)))
    with headpatch.applied(model, of(zero)):
        cache = DynamicCache()
        expected = [
            logits(model, batch, past_key_values=cache),
            *(logits(model, g, past_key_values=cache) for g in given),
        ]
    with headpatch.applied(model, of(zero, whole)):
        cache = DynamicCache()
        found = [
            logits(model, batch, past_key_values=cache),
            *(logits(model, g, past_key_values=cache) for g in given),
        ]
    for one, other in zip(found, expected, strict=True):
        keep = batch["attention_mask"].bool() if one.shape[1] > 3 else slice(None)
        torch.testing.assert_close(one[keep], other[keep], rtol=0, atol=1e-9)
    with headpatch.applied(model, of(patch, zero)):
        both = new_tokens(model, batch, 6)
    assert both.shape == (2, 6)


def test_memory_is_the_budget():
    model = ZOO["llama"].build()
    model.config.max_position_embeddings = 4096
    with headpatch.applied(model, of({"method": "ada_kv", "ratio": 0.25, "window": 16})) as handle:
        logits(model, ids(2, 2000), past_key_values=(cache := DynamicCache()))
        held = handle.report().cache
        kept = [[b.used for b in layer.blocks for _ in b.rows for _ in b.heads] for layer in cache.layers]
        assert all(abs(sum(lengths) - 2 * 2 * 500) < 2 * 2 * 2 for lengths in kept)
        assert held.stored <= 2 * (2 * 2 * (500 + 256)) * 2 * 16 * 4
        assert held.untouched == 2 * 2 * 2 * 2000 * 2 * 16 * 4


def test_assisted_decoding_is_refused():
    """It feeds the first drafts with the prompt: where that ends cannot be seen."""
    model, assistant = ZOO["llama"].build(), ZOO["llama"].build()
    with (
        headpatch.applied(model, of(CASES["ada_kv"][0])),
        pytest.raises(EngineError, match="does not go with assisted decoding"),
    ):
        new_tokens(model, left_padded((30,)), 16, assistant_model=assistant)


def test_what_cannot_be_is_refused():
    model = ZOO["llama"].build()
    patch = CASES["snapkv"][0]
    with headpatch.applied(model, of(patch)) as handle:
        with pytest.raises(
            EngineError, match="cache layer 0 is a StaticLayer: a policy that chooses tokens needs a DynamicCache"
        ):
            logits(model, past_key_values=StaticCache(config=model.config, max_cache_len=30))
        cache = DynamicCache()
        logits(model, ids(1, 20), past_key_values=cache)
        with pytest.raises(EngineError, match="cannot continue on a cache from an earlier turn"):
            new_tokens(model, ids(1, 30), past_key_values=cache)
        logits(model, ids(1, 2), past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(
            EngineError, match="cannot take back 1 tokens: a policy has chosen what to keep 0 tokens ago"
        ):
            cache.crop(-1)
        with handle.inputs(prompt_len=[7]), pytest.raises(EngineError, match="ends where the prompt ends"):
            logits(model, ids(1, 20), past_key_values=DynamicCache())
    for bad, message in (
        *(({"method": name, "kernel": 4}, "kernel 4 is even") for name in ("snapkv", "ada_kv", "task_kv")),
        ({"method": "task_kv", "beta": 0.6}, "beta 0.6 is not below ratio 0.5"),
        ({**patch, "heads": ["*.*"]}, "heads: unknown key"),
        ({**patch, "ratio": 0.0}, "ratio: 0.0 is out of range"),
    ):
        with pytest.raises(RecipeError, match=message):
            headpatch.Recipe.from_dict(of(bad))


# --- budgets


def test_evened_out_lengths_are_the_best_split():
    rng = random.Random(0)
    for _ in range(60):
        counts = [rng.randrange(0, 60) for _ in range(rng.randrange(1, 8))]
        buckets = rng.randrange(1, 5)
        found = even_out(counts, buckets)
        assert len(set(found)) <= buckets
        assert sum(counts) - len(counts) < sum(found) <= sum(counts)
        ranked = sorted(counts)

        def cost(cuts: tuple[int, ...], ranked: list[int] = ranked) -> float:
            parts = [ranked[i:j] for i, j in itertools.pairwise((0, *cuts, len(ranked)))]
            return sum(sum((x - sum(p) / len(p)) ** 2 for x in p) for p in parts if p)

        least = min(
            cost(cuts)
            for m in range(min(buckets, len(counts)))
            for cuts in itertools.combinations(range(1, len(counts)), m)
        )
        groups: dict[int, list[int]] = {}
        for before, after in zip(counts, found, strict=True):
            groups.setdefault(after, []).append(before)
        mine = sum(sum((x - sum(g) / len(g)) ** 2 for x in g) for g in groups.values())
        assert mine <= least + 1e-9


def test_shares_add_up():
    generator = torch.Generator().manual_seed(0)
    for floor in (0.0, 0.2, 1.0):
        for total in (0, 1, 17, 40):
            scores = torch.rand(5, 8, generator=generator)
            shares = share_out(scores, total, floor)
            assert sum(shares) == total
            assert all(0 <= s <= 8 for s in shares)
            if floor == 1.0:
                assert max(shares) - min(shares) <= 1


def test_fewer_whole_heads_with_depth():
    method = TaskKV(beta=0.25, least=4)
    assert [method.whole_heads(32, layer, 32) for layer in (0, 15, 31)] == [8, 6, 4]
    assert TaskKV(beta=0.4, least=1).whole_heads(8, 0, 1) == 3
