"""What the Hugging Face adapter refuses, and that a refusal changes nothing: running models, threads, gone models, other models."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from compat import A, B, C, fingerprint, ids, left_padded, logits, new_tokens, one_thread, recipe, silent
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from zoo import BOS, PAD, ZOO

import headpatch
from headpatch import EngineError, HeadpatchError, UnsupportedModelError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build()


# -------------------------------------------------------------------------------------------------------- running models


class _InProcessor(LogitsProcessor):
    """Does something after the third token."""

    def __init__(self, do: Any) -> None:
        self.do, self.step, self.error = do, 0, None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.step += 1
        if self.step == 3:
            try:
                self.do()
            except Exception as error:
                self.error = error
        return scores


class _InStreamer(_InProcessor, BaseStreamer):
    def put(self, value: Any) -> None:
        self(None, None)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("where", ["processor", "streamer"])
@pytest.mark.parametrize("what", ["apply", "remove", "observe", "train", "other_thread", "inner"])
def test_a_running_generate_refuses_changes_and_goes_on(model, where, what):
    """The call raises by name inside the loop; tokens and model are as if it had not been made."""
    handle = headpatch.apply(model, A)
    prompt = ids(1)
    expected, before = new_tokens(model, prompt), fingerprint(model)

    def other_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(handle.remove).result()

    do = {
        "apply": lambda: headpatch.apply(model, B),
        "remove": handle.remove,
        "observe": lambda: headpatch.observe(model, "lse").__enter__(),
        "train": lambda: handle.strengths(trainable=True),
        "other_thread": other_thread,
        "inner": lambda: headpatch.apply(model.model, B),
    }[what]
    run = _InProcessor(do) if where == "processor" else _InStreamer(do)
    given = {"logits_processor": LogitsProcessorList([run])} if where == "processor" else {"streamer": run}
    found = new_tokens(model, prompt, **given)
    assert isinstance(run.error, HeadpatchError)
    if what != "inner":
        assert "while the model is running" in str(run.error) and "generate()" in str(run.error)
    assert torch.equal(found, expected) and fingerprint(model) == before
    assert [h.recipe.digest for h in headpatch.handles(model)] == [handle.recipe.digest]
    assert torch.equal(new_tokens(model, prompt), expected)


def test_apply_inside_a_forward_raises_and_leaves_the_model_plain(model):
    plain, before = logits(model), fingerprint(model)
    errors = []

    def hook(module: Any, args: Any) -> None:
        with pytest.raises(
            HeadpatchError, match=r"cannot apply a recipe while the model is running \(forward\(\)"
        ) as caught:
            headpatch.apply(model, A)
        errors.append(caught.value)

    watch = model.model.layers[1].register_forward_pre_hook(hook)
    assert torch.equal(logits(model), plain)
    watch.remove()
    assert errors and fingerprint(model) == before


def test_a_forward_in_another_thread_refuses_changes(model):
    inside, go_on = threading.Event(), threading.Event()

    def hook(module: Any, args: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    watch = model.model.layers[1].register_forward_pre_hook(hook)
    plain = logits(ZOO["llama"].build())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model)
        assert inside.wait(30)
        with pytest.raises(HeadpatchError, match="while the model is running"):
            headpatch.apply(model, A)
        go_on.set()
        assert torch.equal(running.result(), plain)
    watch.remove()
    headpatch.apply(model, A).remove()


# --------------------------------------------------------------------------------------------------------------- threads


def test_concurrent_forwards_of_one_patched_model(model):
    """Each thread's rows stay its own: batches with other paddings, long loops."""
    batches = [left_padded(lengths, seed) for seed, lengths in enumerate([(12, 7, 3), (3, 12), (5, 9, 12, 1)])]
    headpatch.apply(model, A)
    expected = [logits(model, b) for b in batches]
    tokens = [new_tokens(model, b) for b in batches]
    start = threading.Barrier(len(batches))

    def loop(i: int) -> bool:
        start.wait(30)
        good = all(torch.equal(logits(model, batches[i]), expected[i]) for _ in range(25))
        return good and all(torch.equal(new_tokens(model, batches[i]), tokens[i]) for _ in range(2))

    with ThreadPoolExecutor(len(batches)) as pool:
        assert all(pool.map(loop, range(len(batches))))


def test_another_thread_with_another_recipe_is_refused(model):
    handle = headpatch.apply(model, A)
    patched, before = logits(model), fingerprint(model)

    def other() -> None:
        with pytest.raises(HeadpatchError, match="another thread has a recipe on this model"):
            headpatch.apply(model, B)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(other).result()
    assert fingerprint(model) == before and torch.equal(logits(model), patched)
    handle.remove()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(headpatch.apply, model, B).result()
        with pytest.raises(HeadpatchError, match="another thread"):
            headpatch.apply(model, A)
        assert pool.submit(headpatch.apply, model, A).result().active  # its own thread may stack
    assert theirs.active
    headpatch.apply(model, C)  # that thread is over
    for h in headpatch.handles(model):
        h.remove()
    assert headpatch.handles(model) == []


def test_two_threads_with_a_model_each(model):
    twin = ZOO["llama"].build()

    def run(which: Any, what: dict[str, Any]) -> Any:
        with headpatch.applied(which, what):
            return [logits(which) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        found = [f.result() for f in (pool.submit(run, model, A), pool.submit(run, twin, B))]
    for results, what in zip(found, (A, B), strict=True):
        with headpatch.applied(model, what):
            assert all(torch.equal(r, logits(model)) for r in results)


def test_data_given_in_one_thread_is_not_seen_in_another(model):
    """inputs() is for the calls inside its with block, not for those of other threads."""
    handle = headpatch.apply(model, recipe("head_scaling", ["*.*"], scale=0.0, positions="decode"))
    expected = logits(model)
    with handle.inputs(prompt_len=[2, 3]):
        assert not torch.equal(logits(model), expected)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(logits, model).result(), expected)


def test_concurrent_generation_under_a_recipe_that_depends_on_the_prompt(model):
    """Each thread's prompt ends where it ends."""
    headpatch.apply(model, recipe("head_scaling", {"0.*": -1.0, "1.1": 3.0}, positions="decode"))
    prompts = [ids(1, 4), ids(3, 9, seed=1), left_padded((12, 7, 3), seed=2)]
    expected = [new_tokens(model, p) for p in prompts]
    start = threading.Barrier(len(prompts))

    def loop(i: int) -> bool:
        start.wait(30)
        return all(torch.equal(new_tokens(model, prompts[i]), expected[i]) for _ in range(5))

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert all(pool.map(loop, range(len(prompts))))


# ------------------------------------------------------------------------------------------------------------ gone models


def test_a_handle_whose_model_is_gone():
    """A handle keeps no model alive; without one it can do nothing, and says so."""
    model = ZOO["gpt2"].build()
    handle = headpatch.apply(model, A)
    assert "GPT2LMHeadModel, applied" in repr(handle)
    with handle.inputs(prompt_len=[3, 3]):
        logits(model)
    new_tokens(model)
    del model
    gc.collect()
    assert "model gone" in repr(handle) and not handle.active
    assert handle.recipe == headpatch.load_recipe(A)
    for call in (handle.report, handle.strengths, handle.inputs(prompt_len=[1]).__enter__):
        with pytest.raises(HeadpatchError, match="no longer exists; apply the recipe to a live model"):
            call()
    handle.remove()


def test_a_removed_handle_says_so(model):
    handle = headpatch.apply(model, A)
    handle.remove()
    for call in (handle.report, handle.strengths, handle.inputs(prompt_len=[1]).__enter__):
        with pytest.raises(HeadpatchError, match="was removed from its model; apply it again"):
            call()


# --------------------------------------------------------------------------------------------------- refusals at a call


@pytest.mark.parametrize("how", ["argument", "config"])
def test_output_attentions_raises_instead_of_missing(how):
    """Patched heads never build the matrix that was asked for."""
    model = ZOO["llama"].build(attn="eager")
    plain = model(ids(), output_attentions=True).attentions
    assert len(plain) == 2 and all(a is not None for a in plain)
    handle = headpatch.apply(model, recipe("zerotuning", {"1.0": 3.0}))
    if how == "config":
        model.config.output_attentions = True
    more = {"output_attentions": True} if how == "argument" else {}
    with pytest.raises(EngineError, match=r"layer text\.1: output_attentions asks for the attention matrix"):
        model(ids(), **more)
    handle.remove()
    for a, b in zip(model(ids(), **more).attentions, plain, strict=True):
        assert torch.equal(a, b)


def test_output_attentions_of_scaled_heads_are_the_untouched_ones():
    """Scaling outputs leaves attention as it is: the base's matrices come through."""
    model = ZOO["llama"].build(attn="eager")
    plain = model(ids(), output_attentions=True).attentions
    with headpatch.applied(model, recipe("head_scaling", {"1.*": 0.0})):
        for a, b in zip(model(ids(), output_attentions=True).attentions, plain, strict=True):
            assert torch.equal(a, b)


def test_attention_dropout_in_training_is_refused(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    headpatch.apply(model, A)
    logits(model)
    model.train()
    with pytest.raises(EngineError, match=r"layer text\.0: .* attention dropout \(0\.1\); set attention_dropout to 0"):
        model(ids())
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    model(ids()).logits.sum().backward()


def test_an_attention_module_called_outside_its_model(model):
    """Without its model's forward nobody knows where a padded row begins."""
    headpatch.apply(model, A)
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 64)
    cos_sin = model.model.rotary_emb(x, torch.arange(5)[None])
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(EngineError, match="outside its model's forward"):
        layer(x, position_embeddings=cos_sin, attention_mask=mask)


def test_an_error_inside_a_forward_leaves_nothing_behind(model):
    """The call's cache is not kept alive, and the next call is not affected."""
    headpatch.apply(model, A)
    patched, cache = logits(model), DynamicCache()

    def fail(*_: Any) -> None:
        raise KeyError

    watch = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        logits(model, past_key_values=cache)
    watch.remove()
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert torch.equal(logits(model), patched)


def test_a_copied_config_does_not_smuggle_the_patch(model):
    """A module that got a patched module's config without being patched says so."""
    headpatch.apply(model, A)
    other = ZOO["llama"].build()
    other.model.layers[0].self_attn.config = model.model.layers[0].self_attn.config
    with pytest.raises(EngineError, match="without being patched"):
        logits(other)


# ------------------------------------------------------------------------------------------------------- other models

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96}
_OWN_SOFTMAX = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=BOS, eos_token_id=2
        )
    ),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(num_hidden_layers=2, **_SMALL)),
}


@pytest.mark.parametrize("name", _OWN_SOFTMAX)
@pytest.mark.parametrize("how", ["apply", "observe", "check", "handles"])
def test_a_model_with_its_own_softmax_is_refused_by_name(name, how):
    model = _OWN_SOFTMAX[name]().eval()
    before = fingerprint(model)
    call = {
        "apply": lambda: headpatch.apply(model, A),
        "observe": lambda: headpatch.observe(model, "lse").__enter__(),
        "check": lambda: headpatch.load_recipe(A).check(model),
        "handles": lambda: headpatch.handles(model),
    }[how]
    if how == "handles":
        assert call() == []
        return
    first = next(n for n, _ in model.named_modules() if n.split(".")[-1] in ("attn", "self_attention"))
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}: no attention module uses .*{first}"):
        call()
    assert fingerprint(model) == before


def test_a_model_without_attention_is_refused():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=1, intermediate_size=64
        )
    )
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM: no attention module uses"):
        headpatch.apply(model, A)


def test_modules_that_do_not_route_are_reported():
    """GIT: its vision tower routes, its text layers have a softmax of their own."""
    config = transformers.GitConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
            "patch_size": 8,
        },
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, bos_token_id=BOS,
        pad_token_id=PAD, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GitForCausalLM(config).eval()
    handle = headpatch.apply(model, recipe("head_scaling", {"0.1": 0.0}, part="vision"))
    silent = handle.report().silent
    assert {f"git.encoder.layer.{i}.attention.self" for i in range(2)} <= set(silent)
    assert all(name.startswith("git.encoder.layer.") for name in silent)
    assert all(name in str(handle.report()) for name in silent)
    with pytest.raises(headpatch.RecipeError, match="no part 'text'"):
        headpatch.apply(model, recipe("head_scaling", {"0.1": 0.0}, part="text"))


def test_a_model_patched_through_its_inner_stack_is_not_patched_again_from_outside(model):
    """Two controllers on one module would undo each other in the wrong order."""
    inner = headpatch.apply(model.model, A)
    patched, before = logits(model), fingerprint(model)
    with pytest.raises(HeadpatchError, match=r"already patched through another object"):
        headpatch.apply(model, B)
    assert fingerprint(model) == before and torch.equal(logits(model), patched)
    inner.remove()
    with headpatch.applied(model, A):
        assert torch.equal(logits(model), patched)
