"""observe(): what it records is what a model with attention written out in full computes, and nothing changes by looking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import A, B, C, fingerprint, ids, left_padded, logits, new_tokens, one_thread, recipe, silent
from naive import Naive
from transformers import DynamicCache
from zoo import HEAD_DIM, HIDDEN, IMAGE, ZOO

import headpatch
from headpatch import HeadpatchError, RecipeError, UnsupportedModelError
from headpatch.operands import OPERANDS

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

LENGTHS = (12, 7, 3)
PER_HEAD = ("q", "k", "v", "lse", "column_means", "window_scores", "o_proj")
PER_LAYER = (
    "layer_input", "position", "prompt_len", "first_token", "spans", "beside_spans", "image_tokens", "image_queries", "without_image",
)  # fmt: skip
NOT_OBSERVED = {
    "arrays",
    "all_heads",
    "column_sinks",
    "residual_sinks",
    "vision_salient",
    "kv_windows",
    "kv_selection",
    "depth",
}


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build(torch.float64)


def test_every_operand_is_observed_here_or_refused():
    assert {*PER_HEAD, *PER_LAYER, *NOT_OBSERVED} == OPERANDS.keys()


@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_values_per_head(entry, padded):
    """One tensor per head and call; keys and values are those of the KV head that serves the query head."""
    model, naive = ZOO[entry].build(torch.float64), Naive(ZOO[entry])
    batch = left_padded(LENGTHS) if padded else {"input_ids": ids(3, 12)}
    logits(naive.model, batch, use_cache=False)
    names = ("output", "q", "k", "v", "lse", "column_means", "window_scores")
    with headpatch.observe(model, names, ["0.1", "1.2-3"], window=3) as seen:
        logits(model, batch, use_cache=False)
    heads = {"0.1": (0, 1), "1.2": (1, 2), "1.3": (1, 3)}
    assert seen.keys() == {(name, head) for name in names for head in heads}
    real = batch.get("attention_mask", torch.ones(3, 12)).bool()
    for selector, (layer, head) in heads.items():
        call = naive.calls(layer)[0]
        kv = head * call.k.shape[1] // call.q.shape[1]
        asked = call.seen[:, 0] & real[:, :, None]
        means = (call.p[:, head] * asked).sum(1) / asked.sum(1).clamp_min(1)
        expected = {
            "output": call.out()[:, :, head], "q": call.q[:, head], "k": call.k[:, kv], "v": call.v[:, kv],
            "lse": call.lse[:, head], "column_means": means, "window_scores": call.p[:, head, -3:],
        }  # fmt: skip
        rows = {"output": real, "lse": real, "window_scores": real[:, -3:]}
        for name in names:
            (found,) = seen[name, selector]
            assert found.shape == expected[name].shape and not found.requires_grad
            chosen = rows.get(name, torch.ones(found.shape[:2], dtype=torch.bool))
            torch.testing.assert_close(found[chosen], expected[name][chosen], rtol=0, atol=1e-9)


def test_values_per_layer(model):
    """Operands of a whole layer are kept once, under the layer."""
    streams = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
    names = ("layer_input", "position", "prompt_len", "first_token")
    with headpatch.observe(model, names, "*.0") as seen:
        logits(model, left_padded(LENGTHS))
    assert seen.keys() == {(name, layer) for name in names for layer in "01"}
    for layer in range(2):
        assert torch.equal(seen["layer_input", str(layer)][0], streams[layer])
        assert seen["layer_input", str(layer)][0].shape == (3, 12, HIDDEN)
        assert seen["position", str(layer)][0].tolist() == [list(range(n - 12, n)) for n in LENGTHS]
        assert seen["prompt_len", str(layer)][0].tolist() == list(LENGTHS)
        first = seen["first_token", str(layer)][0].expand(3, 1, 12, 12)
        assert [row.nonzero().unique().tolist() for row in first[:, 0, -1]] == [[12 - n] for n in LENGTHS]


def test_spans_and_companions_that_the_call_was_given():
    model = ZOO["llava"].build()
    handle = headpatch.apply(model, A)
    with (
        headpatch.observe(model, ["spans", "without_image"], "1.0") as seen,
        handle.inputs(spans=[[(0, 2), (5, 6)], [(6, 7)], []], without_image=[1, None, 0]),
    ):
        logits(model, left_padded(LENGTHS))
    (found,) = seen["spans", "1"]
    assert found.shape == (3, 1, 1, 12)
    assert [row.nonzero()[:, 0].tolist() for row in found[:, 0, 0]] == [[0, 1, 5], [11], []]
    assert seen["without_image", "1"][0].tolist() == [1, -1, 0]


def test_image_tokens():
    model, inputs = ZOO["llava"].build(), ZOO["llava"].make_inputs(lengths=[9, 5], padding_side="left").kwargs
    with headpatch.observe(model, "image_tokens", "0.0") as seen:
        logits(model, inputs)
    assert torch.equal(seen["image_tokens", "0"][0][:, 0, 0], inputs["input_ids"] == IMAGE)


def test_o_proj(model):
    with headpatch.observe(model, ["o_proj", "output"], "1.*") as seen:
        logits(model)
    weight = model.model.layers[1].self_attn.o_proj.weight
    for head in range(4):
        (found,) = seen["o_proj", f"1.{head}"]
        assert torch.equal(found, weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].t())


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross", "vision"])
def test_other_parts(part):
    """Encoders, cross-attention, vision towers: by `part`."""
    entry = ZOO["llava" if part == "vision" else "whisper"]
    model, naive, inputs = entry.build(torch.float64), Naive(entry, part), entry.make_inputs().to(torch.float64).kwargs
    logits(naive.model, inputs)
    with headpatch.observe(model, ["output", "lse"], "0.2", part=part) as seen:
        logits(model, inputs)
    call = naive.calls(0)[0]
    torch.testing.assert_close(seen["output", "0.2"][0], call.out()[:, :, 2], rtol=0, atol=1e-9)
    torch.testing.assert_close(seen["lse", "0.2"][0], call.lse[:, 2], rtol=0, atol=1e-9)


def test_each_forward_adds_one_tensor(model):
    """Prefill, then one per generated token."""
    with headpatch.observe(model, ["lse", "k"], "0.0") as seen:
        model.generate(**left_padded(LENGTHS), max_new_tokens=5, do_sample=False)
        assert [t.shape for t in seen["lse", "0.0"]] == [(3, 12)] + [(3, 1)] * 4
        assert [t.shape[1] for t in seen["k", "0.0"]] == [12, 13, 14, 15, 16]
    assert seen["lse", "1.0"] == [] and ("lse", "1.0") not in seen


# ------------------------------------------------------------------------------------------------------------ read-only


def test_looking_changes_nothing(model):
    """Bit for bit, in forward and generate; hooks are gone afterwards, however the block ends."""
    model.float()
    before, plain, tokens = fingerprint(model), logits(model, left_padded()), new_tokens(model, left_padded())
    everything = ("output", *PER_HEAD, "layer_input", "position", "prompt_len", "first_token")
    with headpatch.observe(model, everything, "*.*") as seen:
        assert torch.equal(logits(model, left_padded()), plain)
        assert torch.equal(new_tokens(model, left_padded()), tokens)
        assert seen
    assert fingerprint(model) == before
    with pytest.raises(KeyError), headpatch.observe(model, everything, "*.*"):
        raise KeyError
    assert fingerprint(model) == before and torch.equal(logits(model, left_padded()), plain)
    count = len(seen["lse", "0.0"])
    logits(model)
    assert len(seen["lse", "0.0"]) == count


def test_what_was_recorded_is_not_shared_with_the_model(model):
    """Writing to a record does not reach weights, caches or the running call."""
    plain = logits(model)
    with headpatch.observe(model, ["k", "o_proj", "layer_input", "output"], "*.*") as seen:
        logits(model)
    for tensors in seen.values():
        for t in tensors:
            t.zero_()
    assert torch.equal(logits(model), plain)


def test_gradients_flow_as_before(model):
    def grads() -> list[Any]:
        model.zero_grad()
        model(**left_padded(), use_cache=False).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = grads()
    with headpatch.observe(model, ["output", "lse"], "*.*"):
        assert all(torch.equal(a, b) for a, b in zip(grads(), plain, strict=True))


@pytest.mark.parametrize("applied", [[A], [B], [A, B], [C], [B, A, C]], ids=["A", "B", "AB", "C", "BAC"])
def test_looking_at_a_patched_model_changes_nothing(applied):
    """Bit for bit, too; the patches stay when the observer goes."""
    model = ZOO["llama"].build()
    handles = [headpatch.apply(model, r) for r in applied]
    patched, before = logits(model, left_padded()), fingerprint(model)
    with headpatch.observe(model, ["output", "lse", "q"], "*.*"):
        assert torch.equal(logits(model, left_padded()), patched)
    assert fingerprint(model) == before and torch.equal(logits(model, left_padded()), patched)
    assert len(headpatch.handles(model)) == len(handles)


def test_what_is_seen_of_a_patched_model(model):
    """Scores as they are before any edit; outputs with edited masses, before output edits."""
    naive = Naive(ZOO["llama"])
    with headpatch.observe(model, ["output", "lse"], "0.*") as plain:
        logits(model)
    with (
        headpatch.applied(model, recipe("zerotuning", {"0.0": 9.0})),
        headpatch.applied(model, recipe("head_scaling", {"0.*": 5.0})),
        headpatch.observe(model, ["output", "lse"], "0.*") as seen,
    ):
        logits(model)
    logits(naive.model, ids())
    call = naive.calls(0)[0]
    p = call.p.clone()
    p[:, 0, :, 0] *= 9.0
    p = p / p.sum(-1, keepdim=True)
    for head in range(4):
        assert torch.equal(seen["lse", f"0.{head}"][0], plain["lse", f"0.{head}"][0])
        torch.testing.assert_close(seen["output", f"0.{head}"][0], call.out(p)[:, :, head], rtol=0, atol=1e-9)


def test_observers_stack(model):
    """Two at once, in and out in any order, with patches coming and going between."""
    before = fingerprint(model)
    first = headpatch.observe(model, "lse", "0.0")
    one = first.__enter__()
    second = headpatch.observe(model, ["lse", "output"], "*.1")
    two = second.__enter__()
    handle = headpatch.apply(model, A)
    logits(model)
    first.__exit__(None, None, None)
    handle.remove()
    logits(model)
    second.__exit__(None, None, None)
    assert fingerprint(model) == before
    assert len(one["lse", "0.0"]) == 1 and len(two["lse", "1.1"]) == len(two["output", "0.1"]) == 2


def test_a_copy_made_while_looking_is_not_looked_at(model):
    import copy

    with headpatch.observe(model, "lse", "*.*") as seen:
        twin = copy.deepcopy(model)
        logits(twin)
        assert not seen
        logits(model)
        assert len(seen["lse", "0.0"]) == 1
    assert torch.equal(logits(twin), logits(model))
    headpatch.apply(twin, A).remove()
    assert not [n for n, m in twin.named_modules() if any("headpatch" in key for key in m.__dict__)]


def test_caches_are_the_plain_model_s(model):
    cache, other = DynamicCache(), DynamicCache()
    with headpatch.observe(model, "column_means", "*.*"):
        logits(model, past_key_values=cache)
    logits(model, past_key_values=other)
    assert torch.equal(
        logits(model, ids(2, 1), past_key_values=cache), logits(model, ids(2, 1), past_key_values=other)
    )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("operands", "heads", "more", "error", "words"),
    [
        (["outputs"], "*.*", {}, HeadpatchError, "cannot observe 'outputs'; did you mean 'output'"),
        (["weight"], "*.*", {}, HeadpatchError, "cannot observe 'weight'; "),
        (["lse", ""], "*.*", {}, HeadpatchError, "cannot observe ''"),
        ([3], "*.*", {}, HeadpatchError, "cannot observe 3"),
        ([None], "*.*", {}, HeadpatchError, "cannot observe None"),
        ([["lse"]], "*.*", {}, HeadpatchError, "cannot observe"),
        ([], "*.*", {}, HeadpatchError, "name at least one operand"),
        (["arrays"], "*.*", {}, HeadpatchError, "cannot observe 'arrays'"),
        (["all_heads"], "*.*", {}, HeadpatchError, "cannot observe 'all_heads'"),
        (["column_sinks"], "*.*", {}, HeadpatchError, "depend on a threshold: observe 'column_means'"),
        (["residual_sinks"], "*.*", {}, HeadpatchError, "depend on dimensions and a threshold: observe 'layer_input'"),
        ("lse", "2.0", {}, RecipeError, r"layer 2 of selector '2.0' does not exist \(layers are 0-1\)"),
        ("lse", ["0.0", "0.4"], {}, RecipeError, r"head 4 of selector '0.4' does not exist in layer 0"),
        ("lse", "0", {}, RecipeError, "'0' is not a selector"),
        ("lse", [0.1], {}, RecipeError, "a selector is a string, this is the number 0.1"),
        ("lse", 0.1, {}, HeadpatchError, "a selector"),
        ("lse", None, {}, HeadpatchError, "a selector"),
        ("lse", [], {}, HeadpatchError, "no heads"),
        ("lse", "*.*", {"part": "vision"}, HeadpatchError, "the model has no part 'vision'; it has text"),
        ("lse", "*.*", {"part": 3}, HeadpatchError, "the model has no part 3"),
        ("window_scores", "*.*", {"window": 0}, HeadpatchError, "window"),
        ("window_scores", "*.*", {"window": -3}, HeadpatchError, "window"),
        ("window_scores", "*.*", {"window": "wide"}, HeadpatchError, "window"),
        ("weights", "*.*", {"queries": []}, HeadpatchError, "queries"),
        ("weights", "*.*", {"queries": [True]}, HeadpatchError, "queries"),
        ("lse", "*.*", {"windw": 3}, TypeError, "windw"),
    ],
)  # fmt: skip
def test_wrong_requests(model, operands, heads, more, error, words):
    """Refused before anything is touched."""
    before = fingerprint(model)
    with pytest.raises(error, match=words), headpatch.observe(model, operands, heads, **more):
        pass
    assert fingerprint(model) == before


def test_observing_needs_what_methods_need():
    """An operand that a layer cannot supply is refused by operand and layer."""
    model = ZOO["t5"].build()
    before = fingerprint(model)
    with (
        pytest.raises(
            UnsupportedModelError, match=r"layer decoder\.0 \(T5Attention\): operand 'lse' cannot be had with"
        ),
        headpatch.observe(model, "lse", "*.*"),
    ):
        pass
    assert fingerprint(model) == before
    with headpatch.observe(model, "output", "*.*") as seen:
        logits(model, ZOO["t5"].make_inputs().kwargs)
    assert len(seen) == 8


def test_a_forward_that_branches_on_the_implementation_cannot_be_observed():
    """Looking gives it another implementation name, which changes it."""
    model = ZOO["gpt2"].build(attn="eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    plain, before = logits(model), fingerprint(model)
    with (
        pytest.raises(
            UnsupportedModelError, match=r"layer text\.0 \(GPT2Attention\): .*compares the implementation's name"
        ),
        headpatch.observe(model, "output", "*.*"),
    ):
        pass
    assert torch.equal(logits(model), plain) and fingerprint(model) == before
