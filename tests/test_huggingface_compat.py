"""The Hugging Face adapter leaves a model as usable as it was: stacking, copies, saving, switching kernels, threads, wrappers."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compat import RECIPES, A, B, C, fingerprint, ids, left_padded, logits, new_tokens, one_thread, recipe, silent
from naive import define, of, patch, registered
from torch import Tensor
from zoo import ZOO

import headpatch
from headpatch import HeadpatchError
from headpatch.operands import Segment

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build()


# ------------------------------------------------------------------------------------------------------------- stacking


def _alone(entry: str, applied: tuple[int, ...], known: dict[tuple[int, ...], Tensor]) -> Tensor:
    """Logits of a fresh model with just these recipes, in this order."""
    if applied not in known:
        fresh = ZOO[entry].build()
        for i in applied:
            headpatch.apply(fresh, RECIPES[i])
        known[applied] = logits(fresh, left_padded())
    return known[applied]


@pytest.mark.parametrize("entry", ["llama", "gpt2"])
def test_recipes_stack_and_come_off_in_any_order(entry):
    """After every step the model equals, bit for bit, a fresh one with the remaining recipes alone."""
    model, known = ZOO[entry].build(), {}
    before, plain = fingerprint(model), logits(model, left_padded())
    known[()] = plain
    assert len({float(_alone(entry, (i,), known).sum()) for i in range(3)} | {float(plain.sum())}) == 4
    for on in itertools.permutations(range(3)):
        for off in itertools.permutations(range(3)):
            applied: list[int] = []
            handles = {}
            for i in on:
                handles[i] = headpatch.apply(model, RECIPES[i])
                applied.append(i)
                assert torch.equal(logits(model, left_padded()), _alone(entry, tuple(applied), known))
            assert [h.recipe.patches for h in headpatch.handles(model)] == [handles[i].recipe.patches for i in on]
            for i in off:
                handles[i].remove()
                applied.remove(i)
                assert torch.equal(logits(model, left_padded()), _alone(entry, tuple(applied), known))
    assert fingerprint(model) == before
    assert headpatch.handles(model) == []


def test_one_recipe_twice_acts_twice_and_comes_off_once(model):
    first, second = headpatch.apply(model, A), headpatch.apply(model, A)
    both = logits(model)
    first.remove()
    first.remove()
    assert second.active and not first.active
    once = logits(model)
    assert not torch.equal(once, both)
    with headpatch.applied(model, A):
        torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), once)


def test_a_handle_that_is_off_means_no_other_recipe(model):
    """Removed twice, with another recipe on by then: that one stays."""
    first = headpatch.apply(model, A)
    first.remove()
    second = headpatch.apply(model, A)
    patched = logits(model)
    assert not first.active and second.active and first != second
    first.remove()
    with pytest.raises(HeadpatchError, match="was removed from its model"):
        first.report()
    assert second.active and torch.equal(logits(model), patched)
    twin = copy.deepcopy(model)
    second.remove()
    assert len(headpatch.handles(twin)) == 1 and torch.equal(logits(twin), patched)


def test_handles_are_equal_if_they_mean_the_same(model):
    one, two = headpatch.apply(model, A), headpatch.apply(model, A)
    assert headpatch.handles(model) == [one, two] and one in headpatch.handles(model)
    assert len({one, two, *headpatch.handles(model)}) == 2
    twin = copy.deepcopy(model)
    assert one not in headpatch.handles(twin) and len(headpatch.handles(twin)) == 2


def test_applied_takes_the_patch_off_however_the_block_ends(model):
    plain, before = logits(model), fingerprint(model)
    with pytest.raises(KeyError), headpatch.applied(model, A):
        raise KeyError
    assert fingerprint(model) == before and torch.equal(logits(model), plain)


def test_identity_strengths_touch_nothing(model):
    plain, before = logits(model), fingerprint(model)
    handle = headpatch.apply(model, recipe("zerotuning", ["*.*"], gamma=1.0))
    assert torch.equal(logits(model), plain)
    assert fingerprint(model).keys() == before.keys()
    assert handle.report().identity == 8
    handle.remove()
    assert fingerprint(model) == before


# ------------------------------------------------------------------------------------------------- models beside models


def test_two_models_that_share_a_config_object():
    config = ZOO["llama"].config()
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert first.model.layers[0].self_attn.config is second.model.layers[0].self_attn.config
    plain, before = logits(second), fingerprint(second)
    one = headpatch.apply(first, A)
    assert fingerprint(second) == before
    assert torch.equal(logits(second), plain) and headpatch.handles(second) == []
    two = headpatch.apply(second, B)
    patched = logits(second)
    one.remove()
    assert torch.equal(logits(first), plain) and torch.equal(logits(second), patched)
    two.remove()
    assert torch.equal(logits(second), plain) and fingerprint(second) == before


def _by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _by_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # noqa: TID251  (a whole model, which users do too)


COPIES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, _by_pickle, _by_torch_save], ids=["deepcopy", "pickle", "torch_save"]
)


@COPIES
def test_a_copy_of_a_patched_model_is_patched_on_its_own(model, duplicate):
    plain = logits(model, left_padded())
    headpatch.apply(model, A)
    original = headpatch.apply(model, B)
    patched = logits(model, left_padded())
    twin = duplicate(model)
    assert torch.equal(logits(twin, left_padded()), patched)
    assert [h.recipe.digest for h in headpatch.handles(twin)] == [h.recipe.digest for h in headpatch.handles(model)]

    for handle in headpatch.handles(twin):
        handle.remove()
    assert torch.equal(logits(twin, left_padded()), plain)
    assert not headpatch.handles(twin) and len(headpatch.handles(model)) == 2
    assert torch.equal(logits(model, left_padded()), patched)

    third = headpatch.apply(twin, C)
    assert torch.equal(logits(model, left_padded()), patched)
    original.remove()
    assert third.active and len(headpatch.handles(twin)) == 1
    third.remove()
    assert not [n for n, m in twin.named_modules() if any("headpatch" in key for key in m.__dict__)]
    assert torch.equal(logits(twin, left_padded()), plain)


@COPIES
def test_a_copy_has_hooks_of_its_own(model, duplicate):
    """Hooks that some operands need (the prompt's end, the residual stream) are copied with the model, and act for the copy."""
    plain = logits(model)
    method = define(
        "mass",
        "residual_damping",
        constant=True,
        segments=lambda self: (Segment("residual_sinks", (("dims", (0, 5)), ("threshold", 1.5))),),
        weights=lambda self, s: s[:, None],
    )
    recipes = [recipe("head_scaling", {"0.*": -1.0}, positions="decode")]
    with registered(method):
        if duplicate is copy.deepcopy:  # a method that was made in a function cannot be pickled
            recipes.append(of(patch(method, {"*.1": 6.0})))
        for one in recipes:
            headpatch.apply(model, one)
        tokens = new_tokens(model, left_padded())
        twin = duplicate(model)
        for handle in headpatch.handles(model):
            handle.remove()
        assert torch.equal(logits(model), plain)
        del model
        gc.collect()
        assert torch.equal(new_tokens(twin, left_padded()), tokens)
        for handle in headpatch.handles(twin):
            handle.remove()
        assert torch.equal(logits(twin), plain) and "_prefill" not in twin.__dict__
        assert fingerprint(twin).keys() == fingerprint(ZOO["llama"].build()).keys()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())


@COPIES
def test_a_copy_of_a_model_whose_patch_was_removed_is_plain(model, duplicate):
    plain = logits(model)
    headpatch.apply(model, A).remove()
    twin = duplicate(model)
    assert torch.equal(logits(twin), plain) and headpatch.handles(twin) == []


def test_a_copy_taken_inside_inputs_forgets_the_data_of_the_call(model):
    handle = headpatch.apply(model, A)
    with handle.inputs(prompt_len=[3, 4]):
        twin = copy.deepcopy(model)
    with headpatch.handles(twin)[0].inputs(prompt_len=[3, 4]):
        pass


def test_a_patched_model_can_be_unpickled_in_another_process(model, tmp_path):
    """Where nobody has imported headpatch: unpickling does, and registers what the model needs."""
    headpatch.apply(model, A)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1);"
        "model = pickle.loads(open(sys.argv[1], 'rb').read());"
        "out = torch.no_grad()(model)(torch.tensor(eval(sys.argv[2]))).logits;"
        "pickle.dump(out, open(sys.argv[3], 'wb'))"
    )
    args = [tmp_path / "model.pkl", repr(ids().tolist()), tmp_path / "out.pkl"]
    run = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.equal(pickle.loads(Path(args[2]).read_bytes()), logits(model))


# ----------------------------------------------------------------------------------------------------- saving, switching


@pytest.mark.parametrize("entry", ["llama", "llava"])
def test_save_pretrained_leaves_no_trace(entry, tmp_path):
    model = ZOO[entry].build()
    inputs = ZOO[entry].make_inputs().kwargs
    plain = logits(model, inputs)
    model.save_pretrained(tmp_path / "plain")
    headpatch.apply(model, A)
    headpatch.apply(model, B)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert "headpatch" not in json.dumps(model.config.to_dict())
    assert model.state_dict().keys() == ZOO[entry].build().state_dict().keys()
    again = type(model).from_pretrained(tmp_path / "patched").eval()
    assert headpatch.handles(again) == [] and torch.equal(logits(again, inputs), plain)


@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2", "llava", "whisper"])
def test_a_later_switch_of_the_attention_implementation_keeps_the_patch(entry):
    """eager and sdpa round differently, so bit equality tells which of them ran."""
    inputs = ZOO[entry].make_inputs(lengths=[14, 5], padding_side="left").kwargs
    by_name = {name: ZOO[entry].build(attn=name) for name in ("sdpa", "eager")}
    plain = {name: logits(m, inputs) for name, m in by_name.items()}
    for m in by_name.values():
        headpatch.apply(m, A)
    patched = {name: logits(m, inputs) for name, m in by_name.items()}
    scaled = {}
    for name, m in by_name.items():
        headpatch.handles(m)[0].remove()
        with headpatch.applied(m, B):
            scaled[name] = logits(m, inputs)
    assert not torch.equal(plain["sdpa"], plain["eager"]) and not torch.equal(scaled["sdpa"], scaled["eager"])

    model = ZOO[entry].build()
    first = headpatch.apply(model, B)
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        assert torch.equal(logits(model, inputs), scaled[name])
    first.remove()
    assert torch.equal(logits(model, inputs), plain["eager"])
    with headpatch.applied(model, A):
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits(model, inputs), patched["sdpa"])
        assert headpatch.handles(model)[0].report().fires
    assert torch.equal(logits(model, inputs), plain["sdpa"])


def test_moving_a_model_to_another_dtype_keeps_the_patch(model):
    """`.double()` after apply: the edit is as exact as in a model that was double before."""
    headpatch.apply(model, A)
    model.double()
    other = ZOO["llama"].build(torch.float64)
    headpatch.apply(other, A)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-6)
    for handle in headpatch.handles(model):
        handle.remove()
    other = ZOO["llama"].build()
    other.double()
    assert torch.equal(logits(model), logits(other))
