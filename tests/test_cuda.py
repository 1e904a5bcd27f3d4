"""What only a GPU shows: CUDA's attention kernels, the fused kernel inside the adapter, CUDA graphs, flex, bitsandbytes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from exact import edits_for, expected, recipes
from reference import reference
from torch import Tensor
from transformers import BitsAndBytesConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from zoo import ZOO, Entry, Inputs, output

import headpatch
from headpatch.adapters.huggingface import cells, fused
from headpatch.adapters.huggingface.lse import attend_last, attend_tiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [14, 9, 5]
PADDED = ["llama", "qwen3", "mistral", "gemma2", "gpt2"]


def on_gpu(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs on the device."""
    given = inputs.to(dtype).kwargs
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}


def off_by(model: Any, entry: Entry, inputs: Inputs, applied: list[dict[str, Any]], attn: str) -> float:
    """Largest logit difference to the float64 reference on real tokens."""
    with torch.no_grad():
        actual = output(model(**on_gpu(inputs, model.dtype))).double().cpu()
    want = (
        expected(entry, inputs, applied, attn)
        if applied
        else reference(entry)(inputs, edits_for(entry, []), base=attn)
    )
    return float((actual - want)[inputs.real].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["uniform", "zero", "huge", "per_head", "stacked", "two_zerotunings"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_forward(name: str, side: str | None, case: str, dtype: torch.dtype) -> None:
    """Flash without a mask, efficient attention with one. bf16 may be off by what the untouched model is off by, and half again."""
    entry = ZOO[name]
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side=side) if side else entry.make_inputs()
    model = entry.build(dtype, "sdpa").cuda()
    noise = off_by(model, entry, inputs, [], "sdpa")
    applied = recipes(entry, case)
    handles = [headpatch.apply(model, r) for r in applied]
    error = off_by(model, entry, inputs, applied, "sdpa")
    for handle in handles:
        handle.remove()
    assert error <= (1e-4 if dtype == torch.float32 else 1.5 * noise + 0.05), (error, noise)
    assert off_by(model, entry, inputs, [], "sdpa") == noise


@pytest.mark.parametrize("gamma", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_decode_bf16(name: str, gamma: float) -> None:
    """Decoding token by token is off by what the untouched model's decoding is off by, and half again."""
    entry = ZOO[name]
    inputs = entry.make_inputs()
    model = entry.build(torch.bfloat16, "sdpa").cuda()
    ids = inputs.kwargs["input_ids"].cuda()

    def stepwise() -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            pieces = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
        return torch.cat(pieces, 1).double().cpu()

    applied = [{"headpatch": 1, "patches": [{"method": "zerotuning", "heads": ["*.*"], "gamma": gamma}]}]
    noise = float((stepwise() - reference(entry)(inputs, edits_for(entry, []), base="sdpa")).abs().max())
    with headpatch.applied(model, applied[0]):
        error = float((stepwise() - expected(entry, inputs, applied, "sdpa")).abs().max())
    assert error <= 1.5 * noise + 0.05, (error, noise)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_static_decode_under_cuda_graphs(mode: str) -> None:
    """Compiled decoding on a static cache equals eager decoding, in one graph."""
    entry = ZOO["llama"]
    model = entry.build(torch.float32, "sdpa").cuda()
    handle = headpatch.apply(model, recipes(entry, "stacked")[0])
    ids = torch.randint(2, 90, (2, 12), device="cuda")
    eager = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=-1)
    cache = StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, fullgraph=True, mode=None if mode == "default" else mode)
    with torch.no_grad():
        tokens = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for i in range(23):
            mask = torch.zeros(2, 1, 1, 64, dtype=torch.bool, device="cuda")
            mask[..., : 13 + i] = True
            position = torch.full((2, 1), 12 + i, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            out = step(tokens[-1], attention_mask=mask, position_ids=position, past_key_values=cache)
            tokens.append(out.logits[:, -1:].argmax(-1).clone())
    assert torch.equal(torch.cat(tokens, 1), eager[:, 12:])
    assert handle.report().fires


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Any) -> None:
    """Quantised weights: q, k, v arrive computed, so the edit equals the one on the same quantised model in the eager reference."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float16, device_map={"": 0}
    ).eval()
    ids = torch.randint(2, 90, (2, 16), device="cuda")
    recipe = {"headpatch": 1, "patches": [
        {"method": "zerotuning", "heads": {"*.*": 0.3}}, {"method": "head_scaling", "heads": ["1.0"], "scale": 0.0},
    ]}  # fmt: skip
    with torch.no_grad():
        before = model(ids).logits
        outputs: list[Tensor] = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, a: outputs.append(a[0].float())
        )
        with headpatch.observe(model, ["q", "k", "v"], ["0.*"]) as seen, headpatch.applied(model, recipe) as handle:
            after = model(ids).logits
            assert handle.report(self_check=True).fires
        hook.remove()
        assert not torch.equal(before, after)
        assert torch.equal(before, model(ids).logits)
    for head in range(4):
        q, k, v = (seen[name, f"0.{head}"][0].double() for name in "qkv")
        scores = (q @ k.transpose(1, 2) * 32**-0.5).masked_fill(
            torch.ones(16, 16, device="cuda").triu(1).bool(), -torch.inf
        )
        p = scores.softmax(-1)
        p[..., 0] *= 0.3
        want = (p / p.sum(-1, keepdim=True)) @ v
        got = outputs[0].unflatten(-1, (4, 32))[:, :, head]
        assert (got - want).abs().max() <= 5e-3 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize(("queries", "keys", "width"), [(37, 100, 128), (413, 1024, 144), (1, 64, 64)])
def test_the_last_queries(queries: int, keys: int, width: int) -> None:
    """The flash kernel aligns causality at the last query; SDPA aligns it at the first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, width).cuda().bfloat16() for h, n in ((4, queries), (2, keys), (2, keys)))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).cuda()[None, None]
    wanted = attend_tiled(q.double(), k.double(), v.double(), mask=mask, scale=0.1)
    o, lse = attend_last(q, k, v, 0.1)
    torch.testing.assert_close(o.double(), wanted[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("method", "given"), [
    ("act", {"threshold": 1.5, "threshold_per": "prompt_length"}), ("pasta", {}), ("pasta", {"target_mass": 0.6}),
    ("var", {"sink_dimensions": [0, 5, 17], "sink_threshold": 1.7, "min_visual_mass": 0.1, "min_nonsink_ratio": 0.3}),
])  # fmt: skip
@pytest.mark.parametrize("in_one_launch", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_masses_of_a_prompt(
    method: str, given: dict[str, Any], small: bool, in_one_launch: bool, monkeypatch: Any
) -> None:
    """bf16 prompts and a step behind them on CUDA's kernels, against the same model and recipe in float64 on the CPU."""
    monkeypatch.setattr(cells, "is_small", lambda call: small)
    ways = {"by_form": fused.by_form, "by_cells": fused.by_cells}
    taken = []
    for name, way in ways.items():
        monkeypatch.setattr(fused, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    if not in_one_launch:
        monkeypatch.setattr(fused, "attends_segments", lambda q, k, v: False)
    entry = ZOO["llava" if method == "var" else "llama"]
    if method == "var":
        kwargs = entry.make_inputs().kwargs
        heads: Any = {"*.0": 0.4, "*.2": 1.0, "*.3": 0.7}
    else:
        kwargs, heads = {"input_ids": torch.arange(2 * 96).reshape(2, 96) % 64}, {"*.1": 0.4}
    recipe = {"headpatch": 1, "patches": [{"method": method, "heads": heads, **given}]}

    def run(device: str, dtype: torch.dtype, edited: bool = True) -> Tensor:
        model, cache = entry.build(torch.float64).to(device, dtype), DynamicCache()
        given = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "attention_mask"}
        on = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in given.items()}
        with contextlib.ExitStack() as stack, torch.no_grad():
            if edited:
                handle = stack.enter_context(headpatch.applied(model, recipe))
                if method == "pasta":
                    stack.enter_context(handle.inputs(spans=[[(3, 30)]] * 2))
            found = [model(**on, past_key_values=cache).logits]
            found.append(model(input_ids=on["input_ids"][:, -1:], past_key_values=cache).logits)
        return torch.cat(found, 1).double().cpu()

    exact = run("cpu", torch.float64)
    untouched = run("cpu", torch.float64, False)
    taken.clear()
    off = run("cuda", torch.bfloat16) - exact
    if method in ("act", "var"):
        assert ("by_cells" in taken) != in_one_launch, taken
    noise = run("cuda", torch.bfloat16, False) - untouched
    assert off.abs().mean() <= 1.5 * noise.abs().mean() + 0.005 * exact.std()
    assert off.abs().mean() < 0.5 * (untouched - exact).abs().mean()


def test_gradients_on_the_gpu() -> None:
    """Gradients with padding are finite, and those of the strengths equal the CPU's in fp32."""
    entry = ZOO["llama"]
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side="left")
    grads = []
    for device in ("cpu", "cuda"):
        model = entry.build(torch.float32, "sdpa").to(device)
        handle = headpatch.apply(model, recipes(entry, "uniform")[0])
        strengths = handle.strengths(trainable=True)
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.kwargs.items()}
        output(model(**given))[inputs.real.to(device)].square().mean().backward()
        grads.append([s.grad.cpu() for s in strengths.values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
