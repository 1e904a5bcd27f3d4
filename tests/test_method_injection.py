"""Soft injection and function vectors, against the formula row by row, and the behaviour that pins where they act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import fingerprint, ids, left_padded, logits, new_tokens, one_thread, silent
from injecting import ALPHA, injected, task, vectors
from method_cases import CACHES, PADDINGS, compare, inputs_of, token_columns
from naive import Naive
from torch import Tensor
from transformers import DynamicCache
from zoo import FULL, ZOO

import headpatch
from headpatch import EngineError, HeadpatchError, RecipeError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

V = {"0.1": 1.0, "1.2": -0.5}
TEXT = [name for name in FULL if list(ZOO[name].parts) == ["text"] and name != "deepseek_v3"]


def ends_of(padding: str | None, entry: str = "llama", continuation: int = 4) -> Tensor:
    """Column of each row's last prompt token."""
    first, length = token_columns(inputs_of(entry, padding, continuation))
    return first + length - 1


def outputs(model: Any, inputs: Any, layer: int = 0, **more: Any) -> Tensor:
    """[b, q, H, d] what enters a layer's output projection."""
    caught: list[Tensor] = []
    module = model.model.layers[layer].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    logits(model, inputs, **more)
    hook.remove()
    return caught[0].unflatten(-1, (4, -1))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cache", CACHES)
def test_prompt_and_decoding(padding, cache):
    """Each row at its own last token, once, whatever the padding; with right padding that is in the middle of the call."""
    arrays = vectors(list(ALPHA))
    compare("llama", task(arrays=arrays), injected(ALPHA, arrays, ends_of(padding)), padding, cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", TEXT)
def test_architectures(entry):
    width = 32 if entry == "qwen3" else 16
    arrays = vectors(list(ALPHA), width=width)
    recipe = task(arrays=arrays)
    written = injected(ALPHA, arrays, ends_of("left", entry))
    compare(entry, recipe, written, "left", moves=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", ["prompt_end", "last"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_function_vectors(positions, padding):
    arrays = vectors(list(V), "v", scale=0.5)
    recipe = task(V, arrays, method="function_vector", positions=positions)
    written = injected(V, arrays, ends_of(padding), add=True, stays=positions == "last")
    if positions == "last" and padding == "right":
        return  # generated tokens are not columns behind the prompt's end there
    compare("llama", recipe, written, padding)  # type: ignore[arg-type]


def test_a_second_task_in_the_same_file():
    """Arrays are found by the word that the patch names; both patches act on a head that both name, in order."""
    one, two = vectors(["1.1"], "t"), vectors(["1.1", "0.0"], "other", seed=5)
    recipe = task({"1.1": 0.5}, {**one, **two}, more=[
        {"method": "soft_injection", "heads": {"1.1": 0.25, "0.0": 1.0}, "array": "other"}
    ])  # fmt: skip
    model, inputs = ZOO["llama"].build(torch.float64), ids(2, 7)
    before = outputs(model, inputs, 0)
    with headpatch.applied(model, recipe):
        after = outputs(model, inputs, 1)[:, -1, 1]
        plain = outputs(model, inputs, 0)
    assert torch.equal(plain[:, :-1], before[:, :-1])
    torch.testing.assert_close(plain[:, -1, 0], two["other.0.0"].double().expand(2, -1))
    with headpatch.applied(model, task({"0.0": 1.0}, {"t.0.0": two["other.0.0"]})):
        base = outputs(model, inputs, 1)[:, -1, 1]
    torch.testing.assert_close(after, 0.75 * (0.5 * base + 0.5 * one["t.1.1"]) + 0.25 * two["other.1.1"])
    assert task({"1.1": 0.5}, one).digest != recipe.digest


def test_stacked_with_other_methods():
    """Output edits in recipe order: what was injected is then scaled; ZeroTuning acts on every position before."""
    arrays = vectors(["1.1"])
    scaled = task({"1.1": 1.0}, arrays, more=[
        {"method": "head_scaling", "heads": {"1.1": 3.0}}, {"method": "zerotuning", "heads": {"1.*": 5.0}}
    ])  # fmt: skip
    model, inputs = ZOO["llama"].build(torch.float64), ids(2, 9)
    zero = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"1.*": 5.0}}]}
    with headpatch.applied(model, zero):
        without = outputs(model, inputs, 1)
    with headpatch.applied(model, scaled):
        found = outputs(model, inputs, 1)
    torch.testing.assert_close(found[:, -1, 1], 3 * arrays["t.1.1"].double().expand(2, -1))
    torch.testing.assert_close(found[:, :-1, 1], 3 * without[:, :-1, 1])
    torch.testing.assert_close(found[:, :, 0], without[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_everywhere_and_removal_are_bit_equal(dtype):
    model, inputs = ZOO["llama"].build(dtype), left_padded()
    before, marks = logits(model, inputs), fingerprint(model)
    with headpatch.applied(model, task(dict.fromkeys(ALPHA, 0.0))):
        assert torch.equal(logits(model, inputs), before)
    with headpatch.applied(model, task()):
        assert not torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(model, inputs), before)
    assert fingerprint(model) == marks


def test_one_everywhere_is_the_task_whatever_the_prompt():
    heads = [f"{layer}.{h}" for layer in range(2) for h in range(4)]
    arrays = vectors(heads)
    model = ZOO["llama"].build()
    with headpatch.applied(model, task(dict.fromkeys(heads, 1.0), arrays)):
        for seed, length in ((0, 9), (1, 4), (2, 1)):  # a prompt of one token, too
            for layer in range(2):
                found = outputs(model, ids(2, length, seed), layer)[:, -1]
                wanted = torch.stack([arrays[f"t.{layer}.{h}"] for h in range(4)])
                assert torch.equal(found, wanted.expand(2, -1, -1))


def test_only_the_last_position_of_the_upper_layers_changes_in_the_cache():
    """Keys and values of layer 0, and of every other position, are the untouched model's; and decoding is, given the cache."""
    model, inputs = ZOO["llama"].build(torch.float64), left_padded()
    plain, cache = DynamicCache(), DynamicCache()
    logits(model, inputs, past_key_values=plain)
    following = {
        "input_ids": ids(3, 1, 9),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with headpatch.applied(model, task()):
        logits(model, inputs, past_key_values=cache)
        for layer, (a, b) in enumerate(zip(plain.layers, cache.layers, strict=True)):
            for name in ("keys", "values"):
                changed = (getattr(a, name) != getattr(b, name)).any(3).any(1)  # [b, n]
                assert not changed[:, :-1].any()
                assert changed[:, -1].all() == (layer > 0) and changed[:, -1].any() == (layer > 0)
        copy = DynamicCache()
        for layer, kept in enumerate(cache.layers):
            copy.update(kept.keys.clone(), kept.values.clone(), layer)
        found = logits(model, following, past_key_values=cache)
    assert torch.equal(found, logits(model, following, past_key_values=copy))


def test_the_order_of_rows_means_nothing():
    model, inputs = ZOO["llama"].build(torch.float64), left_padded((9, 9, 4))
    order = torch.tensor([2, 0, 1])
    with headpatch.applied(model, task()):
        found = logits(model, inputs)
        other = logits(model, {name: value[order] for name, value in inputs.items()})
    torch.testing.assert_close(other, found[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunked_prefill(chunk):
    """The last token may come alone, or in the middle of nothing: chunks of hand-fed prompts, and those of generate()."""
    model, inputs = ZOO["llama"].build(torch.float64), ids(2, 11)
    with headpatch.applied(model, task()) as handle:
        whole = logits(model, inputs)
        cache = DynamicCache()
        with handle.inputs(prompt_len=[11, 11]):
            parts = [logits(model, inputs[:, i : i + chunk], past_key_values=cache) for i in range(0, 11, chunk)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
        expected = new_tokens(model, inputs)
        assert torch.equal(new_tokens(model, inputs, prefill_chunk_size=chunk), expected)
        beams = [new_tokens(model, inputs, num_beams=2, **more) for more in ({}, {"cache_implementation": "static"})]
        assert torch.equal(*beams)
    assert not torch.equal(new_tokens(model, inputs), expected)


def test_later_turns():
    """A second turn on the first one's cache is refused; fed whole, its injection is at its own end and nowhere else."""
    model, first = ZOO["llama"].build(torch.float64), ids(1, 6)
    arrays = vectors(list(ALPHA))
    with headpatch.applied(model, task(arrays=arrays)):
        made = model.generate(first, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
        second = torch.cat([made.sequences, ids(1, 4, 5)[:, 1:]], 1)
        with pytest.raises(EngineError, match="earlier turn"):
            model.generate(second, past_key_values=made.past_key_values, max_new_tokens=2)
        found = logits(model, second)
    naive = Naive(ZOO["llama"])
    written = injected(ALPHA, arrays, torch.tensor([second.shape[1] - 1]))
    with naive.edited({layer: written(layer) for layer in naive.taps}) as other:
        torch.testing.assert_close(found, logits(other, second), rtol=0, atol=1e-9)


def test_one_task_per_row():
    """Four rows, three tasks and none, in one batch: each row as it would be alone; caches remember which rows they were."""
    tasks = [task(seed=1), task({"0.0": 1.0}, seed=2), task(V, method="function_vector", seed=3)]
    model, inputs = ZOO["llama"].build(torch.float64), left_padded((9, 6, 9, 3))
    rows = [2, None, 0, 1]
    expected = []
    for row, which in enumerate(rows):
        mine = {name: value[row : row + 1] for name, value in inputs.items()}
        if which is None:
            expected.append((logits(model, mine), new_tokens(model, mine)))
        else:
            with headpatch.applied(model, tasks[which]):
                expected.append((logits(model, mine), new_tokens(model, mine)))
    on = [headpatch.apply(model, recipe) for recipe in tasks]
    chosen = [None if which is None else on[which] for which in rows]
    with headpatch.by_row(chosen):
        found, cache = logits(model, inputs), DynamicCache()
        real = inputs["attention_mask"].bool()
        for row, (wanted, _) in enumerate(expected):
            torch.testing.assert_close(found[row][real[row]], wanted[0][real[row]], rtol=0, atol=1e-9)
        tokens = new_tokens(model, inputs)
        assert torch.equal(tokens, torch.cat([t for _, t in expected]))
        logits(model, inputs, past_key_values=cache)
    step = {
        "input_ids": ids(4, 1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with pytest.raises(EngineError, match="another recipe"), headpatch.by_row([on[0], None, None, None]):
        logits(model, step, past_key_values=cache)
    with headpatch.by_row(chosen):
        logits(model, step, past_key_values=cache)
        with pytest.raises(EngineError, match="4 entries, the batch has 2 rows"):
            logits(model, ids(2, 5))


def test_constant_scales_can_be_kept_to_rows():
    model, inputs = ZOO["llama"].build(torch.float64), ids(3, 8)
    plain = logits(model, inputs)
    handle = headpatch.apply(model, {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"0.*": 0.5}}]})
    every = logits(model, inputs)
    with handle.inputs(rows=[False, True, False]):
        found = logits(model, inputs)
    torch.testing.assert_close(found, torch.stack([plain[0], every[1], plain[2]]), rtol=0, atol=1e-9)
    other = headpatch.apply(model, {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"1.*": 3.0}}]})
    both = logits(model, inputs)
    with handle.inputs(rows=[True, True, False]):
        mixed = logits(model, inputs)
    handle.remove()
    torch.testing.assert_close(mixed, torch.cat([both[:2], logits(model, inputs)[2:]]), rtol=0, atol=1e-9)
    for rows, words in (
        ([True, 1, False], r"rows\[1\] is 1"),
        ("yes", "one entry per row"),
        ([], "one entry per row"),
    ):
        with pytest.raises(HeadpatchError, match=words), headpatch.applied(model, task()) as on, on.inputs(rows=rows):
            pass
    with pytest.raises(HeadpatchError, match="zerotuning does more"), other.inputs(rows=[True]):
        pass
    with pytest.raises(HeadpatchError, match="no row has a handle"), headpatch.by_row([None]):
        pass


def test_steps_behind_the_prompt_run_the_untouched_layers(monkeypatch):
    """Eager decoding does not even look at the edit; an edit that goes on is looked at in every step, beams and chunks included."""
    from headpatch.adapters.huggingface import attention

    real, calls = attention.edit_outputs, []
    monkeypatch.setattr(attention, "edit_outputs", lambda *args: calls.append(1) or real(*args))
    model, inputs = ZOO["llama"].build(), left_padded()
    for more, chunks in (({}, 1), ({"num_beams": 2}, 1), ({"prefill_chunk_size": 5}, 3)):
        with headpatch.applied(model, task()):
            calls.clear()
            new_tokens(model, inputs, count=6, **more)
            assert len(calls) == 2 * chunks
    with headpatch.applied(model, task({"0.1": 1.0}, method="function_vector", positions="last")):
        calls.clear()
        new_tokens(model, inputs, count=6)
        assert len(calls) == 6


def test_gradients_reach_the_strengths():
    """Against finite differences, in float64."""
    model, inputs = ZOO["llama"].build(torch.float64), left_padded((6, 4))
    for p in model.parameters():
        p.requires_grad_(False)
    handle = headpatch.apply(model, task({"0.1": 0.5, "1.2": 0.5}))
    alphas = handle.strengths(trainable=True)

    def loss() -> Tensor:
        return model(**inputs).logits[:, -1].log_softmax(-1)[:, 5].sum()

    found = torch.autograd.grad(loss(), list(alphas.values()))
    for alpha, grad in zip(alphas.values(), found, strict=True):
        with torch.no_grad():
            alpha += 1e-3
            high = loss()
            alpha -= 2e-3
            low = loss()
            alpha += 1e-3
        # The model's norms compute in float32, so the quotient has few digits.
        torch.testing.assert_close(grad[0], (high - low) / 2e-3, rtol=2e-3, atol=1e-5)


def test_compiled():
    """One graph; which rows an injection is for may change without another."""
    model, inputs = ZOO["llama"].build(), ids(2, 9)
    with headpatch.applied(model, task()) as handle:
        expected = logits(model, inputs)
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(run, inputs), expected, rtol=0, atol=1e-4)
        with handle.inputs(rows=[False, True]):
            found = logits(run, inputs)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
        assert (found[0] - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"t.0.1": torch.zeros(16)}, r"no array 't\.0\.2', the vector of head 0\.2"),
        (vectors(list(ALPHA), width=8), r"'t\.0\.1' is \(8,\)"),
        ({f"t.{head}": torch.zeros(16, dtype=torch.int64) for head in ALPHA}, "int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_touched(arrays, words):
    model = ZOO["llama"].build()
    marks = fingerprint(model)
    with pytest.raises(RecipeError, match=words) as caught:
        headpatch.apply(model, task(arrays=arrays))
    assert caught.value.key == "tensors.file"
    assert fingerprint(model) == marks
    with pytest.raises(RecipeError, match=words):
        task(arrays=arrays).check(model.config)


def test_a_recipe_in_memory_can_be_saved_pickled_and_loaded(tmp_path):
    import pickle

    recipe = task()
    again = pickle.loads(pickle.dumps(recipe))
    recipe.save(tmp_path / "task.yaml")
    loaded = headpatch.load_recipe(tmp_path / "task.yaml")
    assert recipe.digest == again.digest == loaded.digest
    for name, array in recipe.arrays().items():
        assert torch.equal(array, loaded.arrays()[name]) and torch.equal(array, again.arrays()[name])
    assert recipe.scope == "prompt" and "arrays" in recipe.needs
    with pytest.raises(RecipeError, match="SHA-256"):
        headpatch.Recipe.from_dict(recipe.to_dict(), arrays=b"\x02\0\0\0\0\0\0\0{}")
