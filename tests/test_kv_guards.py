"""What a cache policy cannot do exactly is refused by name; what it leaves behind is nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from compat import A, fingerprint, ids, left_padded, logits, new_tokens, quiet_transformers, recipe
from kv_cases import duo
from naive import of
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from zoo import ZOO

import headpatch
from headpatch.errors import EngineError, HeadpatchError, RecipeError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("error")
STREAM = {"headpatch": 1, "patches": [{"method": "streaming_llm", "sink": 2, "recent": 4}]}


@pytest.fixture(autouse=True)
def silent():
    with quiet_transformers():
        yield


@pytest.fixture
def model():
    return ZOO["llama"].build()


# --- models


@pytest.mark.parametrize(
    ("entry", "part", "feature"),
    [
        ("deepseek_v3", None, "keys_after_update"), ("mistral", None, "no_unbounded_layer"), ("t5", None, "position_bias"),
        ("vit", None, "no_kv_cache"), ("bart", "encoder", "no_kv_cache"), ("bart", "cross", "no_kv_cache"),
        ("llava", "vision", "no_kv_cache"),
    ],
)  # fmt: skip
def test_models_that_cannot_are_refused_by_name(entry, part, feature):
    model = ZOO[entry].build(attn=ZOO[entry].attn[0])
    before = fingerprint(model)
    patch = {**STREAM["patches"][0], **({"part": part} if part else {})}
    with pytest.raises(
        UnsupportedModelError,
        match=rf"patches\[0\] \(streaming_llm\) .*operand 'kv_windows' cannot be had with {feature}",
    ):
        headpatch.apply(model, of(patch))
    assert fingerprint(model) == before


def test_attention_that_touches_what_the_cache_returned_is_seen():
    """By its source, before anything is patched."""
    from transformers.models.llama.modeling_llama import (
        ALL_ATTENTION_FUNCTIONS,
        LlamaAttention,
        eager_attention_forward,
    )

    from headpatch.adapters.huggingface.kvdetect import _uses

    class Touching(torch.nn.Module):
        def forward(self, query, key, value, past_key_values=None):
            key, value = past_key_values.update(key, value, 0)
            key = key * 2
            attend = ALL_ATTENTION_FUNCTIONS.get_interface("x", eager_attention_forward)
            return attend(self, query, key, value, None)

    class Guarded(torch.nn.Module):
        def forward(self, query, key, value, past_key_values=None):
            key, value = past_key_values.update(key, value, 0)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface("x", eager_attention_forward)
            if self.option and query is not None:
                return self.other(query, key, value)
            return attend(self, query, key, value, None)

    class Hidden(torch.nn.Module):
        def forward(self, query, key, value, past_key_values=None):
            both = past_key_values.update(key, value, 0)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface("x", eager_attention_forward)
            return attend(self, query, *both, None)

    assert _uses(LlamaAttention) == ((), False)
    assert _uses(Touching)[0] == ((),) * len(_uses(Touching)[0]) != ()
    assert set(_uses(Guarded)[0]) == {("option",)}
    assert _uses(Hidden) == (None, False)


def test_tensor_parallel_models_are_refused(model):
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match="heads are sharded over ranks"):
        headpatch.apply(model, STREAM)


def test_layers_with_a_window_are_left_alone_and_named():
    model = ZOO["gemma2"].build()
    with headpatch.applied(model, duo("gemma2")) as handle:
        new_tokens(model, count=3)
        report = handle.report()
        assert report.windowed == (0, 2)
        assert "layers 0, 2 have a window of their own: their cache is left as it is" in str(report)
        assert [layer.layer for layer in report.layers] == [1, 3]


@pytest.mark.parametrize("selector", ["0.2", "2.0"])
def test_wrong_kv_heads_name_the_key(model, selector):
    data = {"headpatch": 1, "patches": [{"method": "duo_attention", "full_kv_heads": [selector]}]}
    with pytest.raises(RecipeError, match=rf'patches\[0\]\.full_kv_heads\["{selector}"\]'):
        headpatch.apply(model, data)


def test_a_recipe_for_another_gqa_layout_names_the_shape(model):
    data = {**duo("llama"), "model": {"num_kv_heads": 4}}
    with pytest.raises(RecipeError, match=r"model\.num_kv_heads: the recipe says 4, the model has 2"):
        headpatch.apply(model, data)


# --- other patches


def test_policies_of_two_handles_are_refused(model):
    with headpatch.applied(model, STREAM):
        before = fingerprint(model)
        with pytest.raises(RecipeError, match="already has a cache policy"):
            headpatch.apply(model, duo("llama"))
        assert fingerprint(model) == before


def test_patches_whose_keys_could_be_dropped_are_refused(model):
    pasta = {"method": "pasta", "heads": {"*.*": 0.5}}
    with headpatch.applied(model, of(pasta)), pytest.raises(RecipeError, match="pasta needs 'beside_spans'"):
        headpatch.apply(model, STREAM)
    late = {"headpatch": 1, "patches": [{**STREAM["patches"][0], "sink": 0}]}
    with (
        headpatch.applied(model, late),
        pytest.raises(RecipeError, match=r"zerotuning needs .*let streaming_llm keep it"),
    ):
        headpatch.apply(model, A)


def test_observing_keys_is_refused(model):
    with headpatch.applied(model, STREAM):
        with headpatch.observe(model, ["output"], ["0.*"]) as seen:
            logits(model)
        assert seen["output", "0.1"][0].shape[1] == ids().shape[1]
        with (
            headpatch.observe(model, ["lse"], ["0.*"]),
            pytest.raises(EngineError, match=r"layer text\.0: 'lse' cannot be observed under a cache policy"),
        ):
            logits(model)


# --- caches


def filled(model: Any, cache: Any = None) -> Any:
    cache = DynamicCache() if cache is None else cache
    logits(model, past_key_values=cache)
    return cache


def test_a_cache_that_was_filled_without_the_policy_is_refused(model):
    cache = filled(model)
    with headpatch.applied(model, STREAM), pytest.raises(EngineError, match="filled under no recipe"):
        logits(model, past_key_values=cache)
    logits(model, past_key_values=cache)


def test_a_cache_under_a_policy_is_refused_once_it_is_off(model):
    with headpatch.applied(model, STREAM):
        cache = filled(model)
    with pytest.raises(EngineError, match="no longer on the model"):
        logits(model, past_key_values=cache)
    with headpatch.applied(model, duo("llama")), pytest.raises(EngineError, match="filled under another recipe"):
        logits(model, past_key_values=cache)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_emptied_cache_serves_whatever_is_on(model, kind):
    """Its layers are exchanged again, and in the end they are its own."""
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    fresh = {"dynamic": DynamicCache, "static": lambda: StaticCache(config=model.config, max_cache_len=20)}[kind]
    for data in (STREAM, duo("llama"), recipe("head_scaling", {"0.1": 0.5}), None):
        handle = headpatch.apply(model, data) if data else None
        found = [logits(model, past_key_values=cache), logits(model, ids(2, 1), past_key_values=cache)]
        other = fresh()
        for one in found:
            assert torch.equal(one, logits(model, ids() if one.shape[1] > 1 else ids(2, 1), past_key_values=other))
        cache.reset()
        if handle:
            handle.remove()
    assert {type(layer).__module__ for layer in cache.layers} == {"transformers.cache_utils"}


def test_a_cache_does_not_work_on_a_model_without_the_recipe(model):
    twin = ZOO["llama"].build()
    with headpatch.applied(model, STREAM):
        cache = filled(model)
        with pytest.raises(EngineError, match=r"outside a call of its model|only the model that the cache policy"):
            logits(twin, ids(2, 3), past_key_values=cache)


def test_caches_that_cannot_hold_groups_are_refused(model):
    class Odd(transformers.cache_utils.DynamicLayer):
        pass

    offloaded = DynamicCache()
    offloaded.offloading = True
    with headpatch.applied(model, STREAM):
        with pytest.raises(EngineError, match="an offloaded cache does not go with a cache policy"):
            logits(model, past_key_values=offloaded)
        with pytest.raises(EngineError, match="cache layer 0 is a Odd, which cannot hold head groups"):
            logits(model, past_key_values=Cache(layer_class_to_replicate=Odd))
        with pytest.raises(EngineError, match="a static cache of 10 columns holds 0 and was given 12 more"):
            logits(model, past_key_values=StaticCache(config=model.config, max_cache_len=10))
        static = filled(model, StaticCache(config=model.config, max_cache_len=14))
        with pytest.raises(EngineError, match="tokens cannot be taken back from a static cache"):
            static.crop(-1)


def test_out_of_memory_says_what_was_needed(model):
    data = {"headpatch": 1, "patches": [{"method": "duo_attention", "full_kv_heads": ["*.0"]}]}
    with (
        headpatch.applied(model, data),
        pytest.raises(
            EngineError,
            match=r"out of memory: cache layer 0 needs [0-9,]+ MiB for 1000000000000 tokens of 1 KV heads on cpu",
        ),
    ):
        logits(model, past_key_values=StaticCache(config=model.config, max_cache_len=10**12))


# --- masks


def test_masks_that_are_not_padding_are_refused(model):
    tokens = ids()
    dense = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with headpatch.applied(model, STREAM):
        with pytest.raises(EngineError, match="a ready-made 4-D attention_mask does not say which tokens are real"):
            logits(model, {"input_ids": tokens, "attention_mask": dense})
        packed = torch.tensor([[*range(5), *range(7)]]).repeat(2, 1)
        with pytest.raises(EngineError, match="position_ids pack several sequences into a row"):
            logits(model, {"input_ids": tokens, "position_ids": packed}, use_cache=False)


def test_masks_must_stay_what_they_were(model):
    batch = left_padded()
    more = torch.ones(3, 1, dtype=torch.long)
    with headpatch.applied(model, STREAM):
        cache = DynamicCache()
        logits(model, batch, past_key_values=cache)
        with pytest.raises(EngineError, match="filled with padded rows: give their attention_mask in every call"):
            logits(model, {"input_ids": ids(3, 1)}, past_key_values=cache)
        with pytest.raises(
            EngineError, match="attention_mask has 3 columns; the cache holds 12 and the call brings 1"
        ):
            logits(model, {"input_ids": ids(3, 1), "attention_mask": torch.ones(3, 3)}, past_key_values=cache)
        changed = batch["attention_mask"].clone()
        changed[0, 3] = 0
        with pytest.raises(EngineError, match="names other tokens of earlier calls as real"):
            logits(
                model, {"input_ids": ids(3, 1), "attention_mask": torch.cat([changed, more], 1)}, past_key_values=cache
            )


def test_a_layer_s_own_mask_is_read(model, monkeypatch):
    """Models that let image tokens see ahead build such masks inside."""
    from transformers.models.llama import modeling_llama

    real = modeling_llama.create_causal_mask

    def seeing_ahead(**kwargs: Any) -> Any:
        n = kwargs["inputs_embeds"].shape[1]
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        mask[..., 2:6, 2:6] = True
        return mask

    with headpatch.applied(model, STREAM):
        monkeypatch.setattr(modeling_llama, "create_causal_mask", seeing_ahead)
        with pytest.raises(EngineError, match="its mask is not plain causality"):
            logits(model)
        monkeypatch.setattr(modeling_llama, "create_causal_mask", real)
        logits(model)


def test_calls_that_cannot_be_exact_are_refused(model):
    with headpatch.applied(model, STREAM):
        with pytest.raises(EngineError, match="output_attentions asks for the attention matrix"):
            logits(model, output_attentions=True)
        angles = (torch.zeros(1, 4, 16), torch.zeros(1, 4, 16))
        with pytest.raises(HeadpatchError, match="outside its model's forward"):
            model.model.layers[0](torch.zeros(1, 4, 64), position_embeddings=angles)
    training = ZOO["llama"].build()
    for layer in training.model.layers:
        layer.self_attn.attention_dropout = 0.1
    training.train()
    with headpatch.applied(training, STREAM), pytest.raises(EngineError, match="not defined under attention dropout"):
        training(ids())


# --- nothing stays


def test_removal_leaves_the_model_as_it_was(model):
    before, plain = fingerprint(model), logits(model)
    tokens = new_tokens(model)
    handle = headpatch.apply(model, duo("llama"))
    assert "_prepare_cache_for_generation" in model.__dict__
    new_tokens(model)

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        logits(model)
    hook.remove()
    handle.remove()
    assert "_prepare_cache_for_generation" not in model.__dict__
    assert fingerprint(model) == before
    assert torch.equal(logits(model), plain)
    assert torch.equal(new_tokens(model), tokens)


def test_copies_carry_the_policy(model):
    with headpatch.applied(model, duo("llama")):
        expected, tokens = logits(model, ids(2, 20)), new_tokens(model, ids(2, 20))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, ids(2, 20)), expected)
            assert torch.equal(new_tokens(other, ids(2, 20)), tokens)
            (handle,) = headpatch.handles(other)
            handle.remove()
            assert not torch.equal(logits(other, ids(2, 20)), expected)
    assert not torch.equal(logits(model, ids(2, 20)), expected)
