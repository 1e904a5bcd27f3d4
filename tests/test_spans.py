"""Spans that callers give per row: token ranges, characters, substrings, through a fast tokenizer, padding and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compat import ids, left_padded, logits, one_thread, silent
from naive import define, of, patch, registered
from transformers import DynamicCache, StaticCache
from zoo import BOS, PAD, ZOO

import headpatch
from headpatch import EngineError, HeadpatchError
from headpatch.adapters.huggingface.spans import token_spans
from headpatch.operands import Segment

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

PROMPTS = ["the cat sat on the mat today", "a cat sat"]
WORDS = ["the", "cat", "sat", "on", "mat", "today", "a", "naïve", "résumé", "."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Whole words after a beginning-of-text token, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": PAD, "<s>": BOS, "<unk>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((1, 3), (1, 3)), ([1, 3], (1, 3)), ({"tokens": [0, 8]}, (0, 8)),
        ("the", (1, 2)), ("cat sat", (2, 4)), ("today", (7, 8)), ("the cat sat on the mat today", (1, 8)),
        ("at", (2, 3)), ("t sat on t", (2, 6)), (" ", None), ({"text": "mat"}, (6, 7)),
        ({"chars": [0, 3]}, (1, 2)), ({"chars": [2, 5]}, (1, 3)), ({"chars": [3, 4]}, None), ({"chars": [23, 28]}, (7, 8)),
    ],
)  # fmt: skip
def test_every_way_to_say_it(tokenizer, span, expected):
    """Words and characters count every token they touch; the first occurrence of a substring counts."""
    if expected is None:
        with pytest.raises(HeadpatchError, match=r"spans\[0\]\[0\]: no token of the prompt covers characters 3 to 4"):
            token_spans([[span]], PROMPTS[:1], tokenizer)
    else:
        assert token_spans([[span]], PROMPTS[:1], tokenizer) == [[expected]]


def test_characters_are_characters_not_bytes(tokenizer):
    assert token_spans([["résumé"], [{"chars": [2, 7]}]], ["naïve résumé .", "a naïve ."], tokenizer) == [
        [(2, 3)],
        [(2, 3)],
    ]


def test_spans_of_several_rows(tokenizer):
    found = token_spans([["sat", "cat", (0, 1)], []], PROMPTS, tokenizer)
    assert found == [[(0, 1), (2, 3), (3, 4)], []]


SPANNING = define(
    "mass", "spanning", constant=True, segments=lambda self: (Segment("spans"),), weights=lambda self, s: s[:, None]
)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_spans_move_with_the_padding_and_stay_in_decoding(tokenizer, entry, cache):
    """A left-padded batch is what each row alone is, step by step; two rows do not get each other's spans."""
    model = ZOO[entry].build(torch.float64)
    given = [["cat", "mat"], ["sat"]]
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.0-2": 6.0})))

        def run(rows: list[int]) -> torch.Tensor:
            batch = tokenizer([PROMPTS[r] for r in rows], padding=True, return_tensors="pt")
            kept = (
                DynamicCache(config=model.config)
                if cache == "dynamic"
                else StaticCache(config=model.config, max_cache_len=24)
            )
            mask = batch["attention_mask"]
            with handle.inputs(
                spans=[given[r] for r in rows], prompts=[PROMPTS[r] for r in rows], tokenizer=tokenizer
            ):
                found = []
                for i in range(6):
                    tokens = batch["input_ids"] if not i else ids(2, 1, i)[: len(rows)]
                    call = {
                        "input_ids": tokens, "attention_mask": mask,
                        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :],
                    }  # fmt: skip
                    found.append(logits(model, call, past_key_values=kept)[:, -1])
                    mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            return torch.stack(found, 1)

        both = run([0, 1])
        torch.testing.assert_close(both[:1], run([0]), rtol=0, atol=1e-9)
        short = run([1])  # its decoding steps are those of row 0: compare the prompt
        torch.testing.assert_close(both[1:, :1], short[:, :1], rtol=0, atol=1e-9)
        given[1] = ["a"]
        assert torch.equal(run([0, 1])[:1], both[:1]) and not torch.allclose(run([0, 1])[1:], both[1:], atol=1e-3)


def test_spans_far_behind_the_padding_of_a_sliding_layer():
    """A windowed cache holds 8 keys; the span among them is in column 200-odd, at token 3."""
    model = ZOO["mistral"].build(torch.float64)
    batch = left_padded((220, 5, 4))
    batch = {k: v[1:] for k, v in batch.items()}
    found = {}
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.*": 6.0})))
        for kind, cache in (("all", DynamicCache()), ("window", DynamicCache(config=model.config))):
            with handle.inputs(spans=[[(3, 5)], [(1, 4)]]):
                logits(model, batch, past_key_values=cache)
                mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
                found[kind] = logits(model, {"input_ids": ids(2, 1), "attention_mask": mask}, past_key_values=cache)
    torch.testing.assert_close(found["window"], found["all"], rtol=0, atol=1e-9)


def test_spans_through_generate_beams_and_chunks(tokenizer):
    model = ZOO["llama"].build(torch.float64)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.0-2": 6.0})))
        with handle.inputs(spans=[["cat", "mat"], ["sat"]], prompts=PROMPTS, tokenizer=tokenizer):
            greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
            assert torch.equal(
                model.generate(**batch, max_new_tokens=6, do_sample=False, prefill_chunk_size=3), greedy
            )
            beams = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=3)
        for row in range(2):
            alone = tokenizer(PROMPTS[row], return_tensors="pt")["input_ids"]
            spans = [[["cat", "mat"], ["sat"]][row]]
            with handle.inputs(spans=spans, prompts=[PROMPTS[row]], tokenizer=tokenizer):
                n = alone.shape[1]
                assert torch.equal(model.generate(alone, max_new_tokens=6, do_sample=False)[0, n:], greedy[row, 8:])
                assert torch.equal(
                    model.generate(alone, max_new_tokens=6, do_sample=False, num_beams=3)[0, n:], beams[row, 8:]
                )


def test_a_cache_belongs_to_the_spans_that_it_was_filled_under():
    """Scope request: another call's spans make other keys and values."""
    model = ZOO["llama"].build()
    method = define(
        "mass", "per_request", constant=True, segments=lambda self: (Segment("spans"),), weights=lambda self, s: s[:, None],
        scope=property(lambda self: "request"),
    )  # fmt: skip
    with registered(method):
        handle = headpatch.apply(model, of(patch(method, {"*.0": 6.0})))
        cache = DynamicCache()
        with handle.inputs(spans=[[(1, 3)], []]):
            logits(model, past_key_values=cache)
            logits(model, ids(2, 1), past_key_values=cache)
            with headpatch.observe(model, "lse", "0.0"):  # comes and goes between two steps of the request
                logits(model, ids(2, 1), past_key_values=cache)
        with headpatch.observe(model, "lse", "0.0"):
            pass
        with handle.inputs(spans=[[(1, 3)], []]):
            logits(model, ids(2, 1), past_key_values=cache)
        with handle.inputs(spans=[[(1, 4)], []]), pytest.raises(EngineError, match="filled under another recipe"):
            logits(model, ids(2, 1), past_key_values=cache)
        with handle.inputs(spans=[[(1, 3)], []]):
            logits(model, ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("how", ["forward", "cache", "generate", "chunks"])
def test_a_span_beyond_its_prompt_is_refused(how):
    """It would grow into what is generated."""
    model = ZOO["llama"].build()
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.0": 6.0})))
        batch = left_padded((12, 7, 3))
        good, bad = [[(0, 12)], [(0, 7)], [(1, 3)]], [[(0, 12)], [(0, 7)], [(1, 4)]]
        for spans in (good, bad):
            with handle.inputs(spans=spans):
                run = {
                    "forward": lambda: logits(model, batch, use_cache=False),
                    "cache": lambda: logits(model, batch, past_key_values=DynamicCache()),
                    "generate": lambda: model.generate(**batch, max_new_tokens=2, do_sample=False),
                    "chunks": lambda: model.generate(**batch, max_new_tokens=2, do_sample=False, prefill_chunk_size=4),
                }[how]
                if spans is good:
                    run()
                    continue
                with pytest.raises(EngineError, match=r"spans\[2\] ends at token 4, .*prompt has 3"):
                    run()
