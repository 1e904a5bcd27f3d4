"""Caches and memory of patched transformers models: what may be reused, what is refused, what is never built."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from compat import A, B, fingerprint, ids, left_padded, logits, new_tokens, one_thread, recipe, silent
from naive import define, of, patch, registered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from zoo import BOS, PAD, ZOO

import headpatch
from headpatch import EngineError
from headpatch.operands import Segment, first_token

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build()


# ---------------------------------------------------------------------------------------------------------------- caches


def _cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=48)
    return DynamicCache(config=model.config) if kind == "dynamic_config" else DynamicCache()


KINDS = pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static"])


@KINDS
@pytest.mark.parametrize("entry", ["llama", "mistral"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "applied_again"])
def test_a_conversation_over_several_turns(entry, kind, again):
    """A cache may be used on under the same recipe, also when the recipe was off between the turns."""
    model = ZOO[entry].build()
    handle = headpatch.apply(model, A)
    cache, text = _cache(kind, model), ids(1, 5)
    for turn in range(3):
        text = torch.cat([text, ids(1, 3, seed=turn)], 1)
        longer = new_tokens(model, text, 4, past_key_values=cache)
        assert torch.equal(longer, new_tokens(model, text, 4))
        text = torch.cat([text, longer], 1)
        if again:
            handle.remove()
            handle = headpatch.apply(model, A)


@KINDS
@pytest.mark.parametrize(
    ("first", "then"),
    [((), (A,)), ((A,), (B,)), ((A,), (A, B)), ((A, B), (B,)), ((A,), ()), ((A, B), ())],
    ids=["fresh_then_A", "A_then_B", "A_then_AB", "AB_then_B", "A_then_plain", "AB_then_plain"],
)
@pytest.mark.parametrize("twin", [None, "before", "after"])
def test_a_cache_of_another_recipe_is_refused(model, kind, first, then, twin):
    """Its keys and values would not fit. After reset() it is as good as new."""
    handles = [headpatch.apply(model, r) for r in first]
    cache = _cache(kind, model)
    logits(model, past_key_values=cache)
    if twin == "before":
        cache = copy.deepcopy(cache)
    wanted = list(then)
    for handle, what in zip(handles, first, strict=True):
        if what in wanted:
            wanted.remove(what)
        else:
            handle.remove()
    for what in wanted:
        headpatch.apply(model, what)
    if twin == "after":
        cache = copy.deepcopy(cache)
    before = fingerprint(model)
    length = int(cache.get_seq_length())
    for _ in range(2):
        with pytest.raises(EngineError, match=r"this cache was filled under .*empty cache"):
            logits(model, ids(2, 1), past_key_values=cache)
        assert int(cache.get_seq_length()) == length
    assert fingerprint(model) == before
    assert torch.equal(logits(model), logits(model, past_key_values=_cache("dynamic", model)))
    cache.reset()
    fresh = _cache(kind, model)
    for tokens in (ids(2, 7), ids(2, 1)):
        assert torch.equal(logits(model, tokens, past_key_values=cache), logits(model, tokens, past_key_values=fresh))


def test_a_cache_that_fits_again_is_taken_again(model):
    """A, then A and B, then A: what was refused in between goes on afterwards, unchanged."""
    headpatch.apply(model, A)
    one, other = DynamicCache(), DynamicCache()
    for cache in (one, other):
        logits(model, past_key_values=cache)
    with headpatch.applied(model, B), pytest.raises(EngineError, match="filled under another recipe"):
        logits(model, ids(2, 1), past_key_values=one)
    assert torch.equal(logits(model, ids(2, 1), past_key_values=one), logits(model, ids(2, 1), past_key_values=other))


def test_a_recipe_of_identities_shares_caches_with_the_plain_model(model):
    """Nothing is touched, so nothing is refused."""
    cache = DynamicCache()
    logits(model, past_key_values=cache)
    with headpatch.applied(model, recipe("zerotuning", ["*.*"], gamma=1.0)):
        logits(model, ids(2, 1), past_key_values=cache)
    logits(model, ids(2, 1), past_key_values=cache)


def test_observing_shares_caches_with_the_plain_model(model):
    cache = DynamicCache()
    logits(model, past_key_values=cache)
    with headpatch.observe(model, "lse", "0.0") as seen:
        logits(model, ids(2, 1), past_key_values=cache)
    assert len(seen["lse", "0.0"]) == 1
    logits(model, ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("inner", [DynamicCache, None], ids=["given", "own"])
def test_the_cache_of_an_encoder_decoder_is_refused_too(inner):
    model, entry = ZOO["whisper"].build(), ZOO["whisper"]
    given = entry.make_inputs().kwargs
    handle = headpatch.apply(model, recipe("zerotuning", {"*.*": 3.0}, part="decoder"))
    with torch.no_grad():
        more = {"past_key_values": EncoderDecoderCache(inner(), inner())} if inner else {}
        out = model(**given, use_cache=True, **more)
    step = {
        "encoder_outputs": (out.encoder_last_hidden_state,), "decoder_input_ids": ids(2, 1),
        "past_key_values": out.past_key_values,
    }  # fmt: skip
    logits(model, step)
    handle.remove()
    with pytest.raises(EngineError, match="filled under a headpatch recipe that is no longer"):
        logits(model, step)


def test_the_static_cache_that_generate_keeps(model):
    """generate() keeps its static cache on the model and resets it: patched, removed, patched otherwise."""
    batch = left_padded()
    expected = {"plain": new_tokens(model, batch)}
    for name, what in (("A", A), ("B", B)):
        with headpatch.applied(model, what):
            expected[name] = new_tokens(model, batch)
    for name in ("plain", "A", "A", "plain", "B", "A", "plain"):
        handle = None if name == "plain" else headpatch.apply(model, {"A": A, "B": B}[name])
        for _ in range(2):
            assert torch.equal(new_tokens(model, batch, cache_implementation="static"), expected[name]), name
        if handle is not None:
            handle.remove()


def test_prompt_lengths_do_not_outlive_a_reset(model):
    """State that was derived from one prompt is not used for the next one in the same cache."""
    headpatch.apply(model, recipe("head_scaling", {"0.*": -1.0, "1.1": 3.0}, positions="decode"))
    long, short = ids(1, 12), ids(1, 4, seed=1)
    cache = DynamicCache()
    for prompt in (long, short, long):
        steps = [logits(model, prompt, past_key_values=cache), logits(model, ids(1, 1), past_key_values=cache)]
        fresh = DynamicCache()
        assert torch.equal(steps[0], logits(model, prompt, past_key_values=fresh))
        assert torch.equal(steps[1], logits(model, ids(1, 1), past_key_values=fresh))
        cache.reset()
    for kind in ("static", None):
        for prompt in (long, short, long):
            found = new_tokens(model, prompt, cache_implementation=kind)
            assert torch.equal(found, new_tokens(model, prompt, past_key_values=DynamicCache()))


def test_a_recipe_that_depends_on_the_prompt_refuses_a_second_turn(model):
    headpatch.apply(model, recipe("head_scaling", {"0.*": -1.0}, positions="decode"))
    cache, text = DynamicCache(), ids(1, 5)
    longer = model.generate(text, past_key_values=cache, max_new_tokens=3, do_sample=False)
    with pytest.raises(
        EngineError, match="depend on the whole prompt cannot continue on a cache from an earlier turn"
    ):
        model.generate(torch.cat([longer, ids(1, 3)], 1), past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_caches_can_be_pickled_and_copied_while_patched(model):
    headpatch.apply(model, A)
    cache = DynamicCache()
    logits(model, past_key_values=cache)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        fresh = DynamicCache()
        logits(model, past_key_values=fresh)
        assert torch.equal(
            logits(model, ids(2, 1), past_key_values=twin), logits(model, ids(2, 1), past_key_values=fresh)
        )


# ---------------------------------------------------------------------------------------------------------------- memory


class _Large(TorchDispatchMode):
    """Counts, by dtype, the tensors of at least `size` elements in memory of their own that operations return."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= self.size * t.element_size():
                self.count[t.dtype] += t.untyped_storage().data_ptr() not in given
        return out


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("what", ["zerotuning", "stacked", "cells", "scores", "lse", "column_means"])
def test_nothing_of_the_size_queries_times_keys_is_built(padded, what):
    """At 4096 tokens, in inference. transformers' own boolean mask of a padded batch is the exception."""
    n = 4096
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=n, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2,
    )  # fmt: skip
    model, plain = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    batch = {"input_ids": ids(1, n)}
    if padded:
        batch = left_padded((n,)) | {"attention_mask": torch.ones(1, n, dtype=torch.long)}
        batch["input_ids"][0, :100], batch["attention_mask"][0, :100] = PAD, 0
    if what in ("zerotuning", "stacked"):
        headpatch.apply(model, recipe("zerotuning", ["*.*"], gamma=3.0))
        if what == "stacked":
            headpatch.apply(model, recipe("head_scaling", ["*.*"], scale=0.5, positions="decode"))
    halve = define(
        "mass",
        "halving",
        segments=lambda self: (first_token, Segment("column_sinks", (("threshold", 0.01),))),
        reshare=lambda self, shares, s, ops: torch.cat([shares[:1] / 2, shares[1:-1], shares[-1:] + shares[:1] / 2]),
    )
    shift = define(
        "scores", "shifting", segments=lambda self: (first_token,), transform=lambda self, scores, s, ops: scores + 1
    )
    with registered(halve, shift):
        if what in ("cells", "scores"):
            headpatch.apply(model, of(patch(halve if what == "cells" else shift, {"*.*": 2.0})))
    with _Large(n * n) as untouched:
        logits(plain, batch, use_cache=False)
    with _Large(n * n) as large:
        if what in ("lse", "column_means"):
            with headpatch.observe(model, what, "0.0") as seen:
                logits(model, batch, use_cache=False)
            assert seen[what, "0.0"][0].shape == (1, n)
        else:
            logits(model, batch, use_cache=False)
    if what not in ("lse", "column_means"):
        assert not large.count[torch.float32], "not even the float mask of the untouched kernel"
    assert large.count <= untouched.count
    assert untouched.count.total() == 0 or padded


def test_the_memory_test_sees_an_eager_matrix():
    """The watch above would have noticed."""
    model = ZOO["llama"].build(attn="eager")
    with _Large(200 * 200) as large:
        logits(model, ids(1, 200), use_cache=False)
    assert large.count[torch.float32] >= 2
