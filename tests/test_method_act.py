"""ACT against its formula on full softmax rows: sinks of the prompt, per row and head, and what becomes of their attention."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import naive_forms
import pytest
import torch
from compat import ids, logits, one_thread, silent
from method_cases import (
    CACHES,
    PADDINGS,
    amounts,
    compare,
    compare_part,
    inputs_of,
    learned,
    recipe_of,
    token_columns,
)  # fmt: skip
from naive import Call, Naive
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM
from zoo import SOURCE, ZOO

import headpatch
from headpatch import EngineError, RecipeError, UnsupportedModelError
from headpatch.adapters.huggingface import cells, mass

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

BETAS = {0: 0.4, 2: 0.0, 3: 0.8}
FOUND: list[Tensor] = []
"""Sinks that the reference found, for tests that must know that there are some."""


def written(
    inputs: Any, betas: dict[int, float], tau: float = 0.1, per_length: bool = False, keep_first: bool = True, least: int = 1
) -> Callable[[int], Callable[[Call], Tensor]]:  # fmt: skip
    """The method on full rows: for every row of the batch, head and key, one after the other."""
    first, length = token_columns(inputs)
    real = inputs.real[:, : inputs.prompt]

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        sinks: list[Tensor] = []

        def find(call: Call) -> Tensor:
            p, found = call.p, torch.zeros(call.p.shape[0], call.p.shape[1], call.p.shape[3], dtype=torch.bool)
            for b in range(p.shape[0]):
                for h in range(p.shape[1]):
                    for k in range(p.shape[3]):
                        rows = call.seen[b, 0, :, k] & real[b]
                        if rows.sum() < least or (keep_first and k == first[b]):
                            continue
                        bound = tau / float(length[b]) if per_length else tau
                        found[b, h, k] = p[b, h, rows, k].mean() > bound
            FOUND.append(found)
            return found

        def edit(call: Call) -> Tensor:
            if not sinks:
                sinks.append(find(call))
            p = call.p
            inside = torch.nn.functional.pad(sinks[0], (0, p.shape[3] - sinks[0].shape[2]))[:, :, None]
            beta = amounts(betas, p.shape[1], 1.0)
            mass = torch.where(inside, p, 0.0).sum(-1, keepdim=True)
            others = torch.where(inside, 0.0, p).sum(-1, keepdim=True) + learned(p, call)
            factor = 1 + (1 - beta) * mass / torch.where(others > 0, others, 1.0)  # 1 - P, without cancellation
            edited = torch.where(inside, beta * p, p * factor)
            return call.out(torch.where(others > 0, edited, p))

        return edit

    return of_layer


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "entry",
    ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "llava", "gpt_oss", "deepseek_v3"],
)  # fmt: skip
def test_prompt_and_decoding(entry, padding):
    """Windows, learned positions, grouped heads, value widths of their own; sinks of the prompt stay sinks afterwards."""
    FOUND.clear()
    inputs = inputs_of(entry, padding)
    compare(entry, recipe_of("act", BETAS), written(inputs, BETAS), padding)
    assert any(f[:, h].any() for f in FOUND for h in BETAS)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt_oss"])
def test_one_head(entry, cache, padding):
    """The other heads take the ordinary kernel, and are what they were."""
    betas = {1: 0.1}
    compare(
        entry, recipe_of("act", betas, threshold=0.05), written(inputs_of(entry, padding), betas, 0.05), padding, cache
    )


@pytest.mark.parametrize("betas", [BETAS, {1: 0.1}, {0: 0.5, 1: 0.1, 2: 0.0, 3: 0.9}])
def test_in_one_launch(betas, monkeypatch):
    """What is handed to the kernel, prompts and steps: for all heads, or for few of them beside the ordinary kernel."""
    asked = naive_forms.stand_in(monkeypatch)
    compare("llama", recipe_of("act", betas), written(inputs_of("llama", None), betas))
    assert asked and all((heads is None) == (len(betas) > 1) for heads in asked)


def test_memory_grows_with_the_prompt_and_not_with_its_square():
    """At 8192 tokens one map of one head would be 256 MiB; the largest block that is held is a small part of that."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    config = ZOO["llama"].config()
    config.max_position_embeddings, config.num_hidden_layers = 8192, 1
    model = LlamaForCausalLM(config).eval()
    headpatch.apply(model, recipe_of("act", {1: 0.4}, threshold=2.0, threshold_per="prompt_length"))
    tokens = ids(1, 8192)
    with torch.no_grad(), Watch():
        model.model(tokens, use_cache=False)
    assert largest <= 64 * 2**20, f"{largest / 2**20:.0f} MiB"


PARTS = [
    ("vit", "vision"),
    ("llava", "vision"),
    *((e, p) for e in ("whisper", "bart") for p in ("encoder", "decoder", "cross")),
]


@pytest.mark.parametrize(("entry", "part"), PARTS)
@pytest.mark.parametrize("per_length", [False, True])
def test_other_parts(entry, part, per_length):
    """Queries that see everything; queries of one sequence and keys of another, each with its own padding."""
    data = recipe_of("act", BETAS, threshold=1.2 if per_length else 0.08)
    data["patches"][0]["threshold_per"] = "prompt_length" if per_length else "fixed"
    tau = 1.2 if per_length else 0.08
    compare_part(entry, part, data, lambda inputs: written(seen_by(inputs, part), BETAS, tau, per_length))


def seen_by(inputs: Any, part: str) -> Any:
    """First keys and real queries of a part, under the names that :func:`written` reads."""
    kwargs = inputs.kwargs
    mask = kwargs.get("attention_mask") if part == "encoder" else kwargs.get("decoder_attention_mask")
    if part in ("vision", "encoder") and mask is None:
        length = 17 if part == "vision" else SOURCE  # patches and the class token
        mask = torch.ones(len(inputs.real), length, dtype=torch.long)
    return SimpleNamespace(first={"text": inputs.first[part]}, real=mask.bool(), prompt=mask.shape[1])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_caches(entry, cache):
    compare(entry, recipe_of("act", BETAS), written(inputs_of(entry, "left", 8), BETAS), "left", cache, 8)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("more", "spelled"),
    [
        ({"threshold": 0.05}, {"tau": 0.05}),
        ({"threshold": 1.2, "threshold_per": "prompt_length"}, {"tau": 1.2, "per_length": True}),
        ({"keep_first": False, "threshold": 0.3}, {"keep_first": False, "tau": 0.3}),
        ({"min_queries": 4, "threshold": 0.05}, {"least": 4, "tau": 0.05}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_parameters(more, spelled, padding):
    """Each changes which keys are sinks, and the reference with it."""
    inputs = inputs_of("llama", padding)
    sets = []
    for given in ({}, spelled):
        FOUND.clear()
        naive = Naive(ZOO["llama"])
        with naive.edited({layer: written(inputs, BETAS, **given)(layer) for layer in naive.taps}) as model:
            logits(model, {k: v[:, : inputs.prompt] for k, v in inputs.kwargs.items()})
        sets.append([f.clone() for f in FOUND])
    assert not all(map(torch.equal, *sets))
    compare("llama", recipe_of("act", BETAS, **more), written(inputs, BETAS, **spelled), padding)


def test_long_prompts_are_read_in_blocks():
    """Column means over more queries than are held at once, as the full map has them; without a sink, and with some."""
    model, naive, prompt = ZOO["llama"].build(torch.float64), Naive(ZOO["llama"]), ids(2, 700)

    class Long:
        first, real, prompt = {"text": torch.zeros(2, dtype=torch.long)}, torch.ones(2, 700, dtype=torch.bool), 700

    def quick(layer: int) -> Callable[[Call], Tensor]:
        def edit(call: Call) -> Tensor:
            p = call.p
            sinks = (p.sum(2) / call.seen.sum(2) > 4 / 700) & (torch.arange(700) > 0)
            assert sinks.any() and not sinks.all()
            mass = (p * sinks[:, :, None]).sum(-1, keepdim=True)
            edited = torch.where(sinks[:, :, None], 0.4 * p, p * (1 - 0.4 * mass) / (1 - mass))
            return call.out(edited)

        return edit

    plain = logits(model, prompt, use_cache=False)
    headpatch.apply(
        model, recipe_of("act", dict.fromkeys(range(4), 0.4), threshold=4.0, threshold_per="prompt_length")
    )
    with naive.edited({layer: quick(layer) for layer in naive.taps}) as other:
        expected = logits(other, prompt, use_cache=False)
    torch.testing.assert_close(logits(model, prompt, use_cache=False), expected, rtol=0, atol=1e-8)
    assert (expected - plain).abs().max() > 0.01


def test_generating_64_tokens():
    """generate() with left padding, against the written-out model generating by itself."""
    inputs = inputs_of("llama", "left", 0)
    given = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask")}
    naive, model = Naive(ZOO["llama"]), ZOO["llama"].build(torch.float64)
    headpatch.apply(model, recipe_of("act", BETAS))
    asked = {"max_new_tokens": 64, "do_sample": False}
    with naive.edited({layer: written(inputs, BETAS)(layer) for layer in naive.taps}) as other:
        expected = other.generate(**given, **asked)
    found = model.generate(**given, **asked)
    assert torch.equal(found, expected)
    assert not torch.equal(found, ZOO["llama"].build(torch.float64).generate(**given, **asked))


@pytest.mark.parametrize("first", ["act", "zerotuning"])
def test_stacked_with_other_methods(first):
    """Sinks are those of the untouched scores; masses change one method after the other, outputs last."""
    inputs, gamma, scale = inputs_of("llama", "left"), {0: 3.0, 1: 0.2}, {0: 0.5, 3: -1.0}
    columns = token_columns(inputs)[0]
    act = written(inputs, BETAS)

    def zero(p: Tensor) -> Tensor:
        at = (torch.arange(p.shape[3]) == columns[:, None])[:, None, None]
        new = torch.where(at, p * amounts(gamma, 4, 1.0), p)
        return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        calibrate, rows = act(layer), []

        class Rows:
            """The call, with `out` keeping the edited rows; and with these rows as its attention."""

            def __init__(self, call: Call, p: Tensor | None = None) -> None:
                self.seen, self.p, self.sinks = call.seen, call.p if p is None else p, call.sinks

            def out(self, p: Tensor) -> Tensor:
                rows.append(p)
                return p

        sinks_found: list[bool] = []

        def edit(call: Call) -> Tensor:
            if not sinks_found:
                calibrate(Rows(call))  # type: ignore[arg-type]  # finds its sinks in the untouched rows
                sinks_found.append(True)
            p = call.p if first == "act" else zero(call.p)
            calibrate(Rows(call, p))  # type: ignore[arg-type]
            p = rows[-1] if first == "zerotuning" else zero(rows[-1])
            return call.out(p) * amounts(scale, 4, 1.0).view(1, 1, 4, 1)

        return edit

    patches = [recipe_of("act", BETAS)["patches"][0], recipe_of("zerotuning", gamma)["patches"][0]]
    patches = patches if first == "act" else patches[::-1]
    patches.append(recipe_of("head_scaling", scale)["patches"][0])
    compare("llama", {"headpatch": 1, "patches": patches}, of_layer, "left")


def test_identity_and_removal_are_bit_equal():
    model, batch = ZOO["llama"].build(), inputs_of("llama", "left").to(torch.float32).kwargs
    plain = logits(model, batch)
    with headpatch.applied(model, recipe_of("act", {0: 1.0, 1: 1.0})):
        assert torch.equal(logits(model, batch), plain)
    with headpatch.applied(model, recipe_of("act", BETAS)):
        assert not torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


def test_single_precision_and_bfloat16():
    batch = inputs_of("llama", "left")
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = ZOO["llama"].build(dtype, weights=torch.bfloat16)
        plain = logits(model, batch.to(dtype).kwargs)
        headpatch.apply(model, recipe_of("act", BETAS))
        found[dtype] = (plain.double()[batch.real], logits(model, batch.to(dtype).kwargs).double()[batch.real])
    exact = found.pop(torch.float64)
    assert (found[torch.float32][1] - exact[1]).abs().max() < 1e-4
    errors = [(a - b).abs().mean() for a, b in zip(found[torch.bfloat16], exact, strict=True)]
    assert errors[1] < 3 * errors[0]


def test_a_request_keeps_its_own_sinks():
    """Two caches taken in turns, and a copy of a batch that is cut to one row."""
    model = ZOO["llama"].build(torch.float64)
    headpatch.apply(model, recipe_of("act", BETAS))
    both, one = DynamicCache(), DynamicCache()
    prompts = ids(2, 12)
    logits(model, prompts, past_key_values=both)
    logits(model, prompts[1:], past_key_values=one)
    for i in range(3):
        two = logits(model, ids(2, 1, i)[:1].expand(2, 1), past_key_values=both)
        alone = logits(model, ids(2, 1, i)[:1], past_key_values=one)
        torch.testing.assert_close(two[1:], alone, rtol=0, atol=1e-9)


def test_what_is_refused():
    with pytest.raises(RecipeError, match="beta"):
        headpatch.Recipe.from_dict(recipe_of("act", {0: 1.5}))
    with pytest.raises(RecipeError, match="threshold"):
        headpatch.Recipe.from_dict(recipe_of("act", {0: 0.5}, threshold=0.0))
    with pytest.raises(UnsupportedModelError, match="operand 'column_sinks' cannot be had with position_bias"):
        headpatch.apply(ZOO["t5"].build(), recipe_of("act", {0: 0.5}))
    model = ZOO["llama"].build()
    headpatch.apply(model, recipe_of("act", {0: 0.5}))
    with pytest.raises(EngineError, match="needs the whole prompt in one call"):
        model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=2, prefill_chunk_size=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [{1: 0.2}, {0: 0.2, 2: 0.0}, {0: 0.4, 1: 0.2, 2: 0.1, 3: 0.0}])
def test_ones_in_keys_and_values_are_masks(dtype, heads, monkeypatch):
    """Prompts without a mask take the ordinary kernel, and say in the keys which cell they are in; as exact as with a mask. Cells
    that differ between the query heads of a KV head cannot be said there (the last case). Where the sinks were found on the heads'
    whole attention, that is edited.
    """
    tokens, many = ids(2, 40), len(heads) > 2

    def run(dtype: torch.dtype, how: str) -> Tensor:
        model = ZOO["llama"].build(torch.float64).to(dtype)
        headpatch.apply(model, recipe_of("act", heads, threshold=1.5, threshold_per="prompt_length"))
        taken: list[str] = []

        def noting(name: str) -> Any:
            inner = getattr(cells, name)
            return lambda *given: taken.append(name) or inner(*given)

        with monkeypatch.context() as patched, torch.no_grad():
            for name in ("_in_two_passes", "_on_attention"):
                patched.setattr(cells, name, noting(name))
            if how != "attention":
                patched.setattr(mass.Call, "attention_of", lambda call, heads: None)
            if how == "masks":
                patched.setattr(cells, "biased_keys_suit", lambda call: False)
            found = logits(model, {"input_ids": tokens}).double()
        expected = {"masks": set(), "passes": set() if many else {"_in_two_passes"}, "attention": {"_on_attention"}}
        assert set(taken) == expected[how]
        return found

    exact = run(torch.float64, "masks")
    other = (run(dtype, "masks") - exact).abs()
    for how in ("passes", "attention"):
        found = (run(dtype, how) - exact).abs()
        if dtype != torch.bfloat16:
            assert found.max() <= (1e-4 if dtype == torch.float32 else 1e-11)
        # (In half precision a sink may be one to one run and none to another.)
        assert found.median() <= 1.2 * other.median() + 1e-12
