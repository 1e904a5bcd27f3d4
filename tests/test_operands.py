"""Each operand of the closed list, asked for by a method of a few lines, against attention written out in full.

The methods only look: they keep what they were given and return outputs as they were, so that the model runs as the naive one does.
Segments and edits are in test_operands_edits.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, one_thread, silent
from naive import Looking, Naive, define, of, patch, registered, steps
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from zoo import HEAD_DIM, HIDDEN, ZOO

import headpatch
from headpatch import EngineError
from headpatch.operands import OPERANDS
from headpatch.registry import find_adapter

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")
LAYERS = 2
LENGTHS = (12, 7, 3)


def naive_calls(entry: str, *calls: dict[str, Any]) -> Naive:
    """A naive model that ran these forwards."""
    naive = Naive(ZOO[entry])
    for call in calls:
        logits(naive.model, call)
    return naive


def test_the_adapter_says_of_every_operand_whether_it_has_it():
    supplies = find_adapter(ZOO["llama"].build()).supplies()
    assert supplies.keys() == OPERANDS.keys()
    assert all(supply.exact for supply in supplies.values())


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_q_k_v_and_lse(entry, padded):
    """What the kernel gets, and the log-sum-exp of its scores; in prefill and in decoding steps."""
    batch = left_padded(LENGTHS)
    if not padded:
        batch = {"input_ids": ids(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    naive = naive_calls(entry, *steps(batch, DynamicCache()))
    layers = len(naive.taps)
    with Looking("q", "k", "v", "lse", entry=entry) as it:
        for step in steps(batch, DynamicCache()):
            logits(it.model, step)
        assert it.seen and len(it.seen) == 5 * layers
        for i, given in enumerate(it.seen):
            call = naive.calls(i % layers)[i // layers]
            for name in ("q", "k", "v"):
                torch.testing.assert_close(given[name], getattr(call, name), rtol=0, atol=1e-9)
            real = call.seen.any(-1).expand_as(call.lse)
            assert given["lse"].shape == call.lse.shape and given["lse"].dtype == torch.float64
            torch.testing.assert_close(given["lse"][real], call.lse[real], rtol=0, atol=1e-9)
            assert given["lse"][~real].isneginf().all()
            rows = call.seen.any(-1)[:, 0, :, None, None].expand_as(given["output"])
            torch.testing.assert_close(given["output"][rows], call.out()[rows], rtol=0, atol=1e-9)


def test_lse_is_at_least_single_precision():
    """In bfloat16 models too; so are the outputs that a method edits."""
    with Looking("lse", "q", "k", model=ZOO["llama"].build(torch.bfloat16)) as it:
        logits(it.model)
        given = it.seen[0]
        assert given["q"].dtype == torch.bfloat16 and given["lse"].dtype == given["output"].dtype == torch.float32
        scores = given["q"].double() @ given["k"].double().repeat_interleave(2, 1).transpose(2, 3) * HEAD_DIM**-0.5
        exact = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
        # In half precision PyTorch's CPU kernel takes a quick exponential where the processor has AVX-512; rounding would cost 1e-2.
        torch.testing.assert_close(given["lse"].double(), exact, rtol=0, atol=1e-4)


def test_a_method_gets_its_heads_only():
    """`output`, `strength` and `heads` belong together; tensors that have a head dimension come with all heads."""
    with Looking("lse", heads={"0.3": 5.0, "0.1": 3.0, "1.2": 7.0}) as it:
        logits(it.model)
        first, second = it.seen
        assert first["heads"].tolist() == [1, 3] and first["strength"].tolist() == [3.0, 5.0]
        assert second["heads"].tolist() == [2] and second["strength"].tolist() == [7.0]
        assert first["output"].shape == (2, 12, 2, HEAD_DIM) and first["lse"].shape == (2, 4, 12)
        call = naive_calls("llama", {"input_ids": ids()}).calls(0)[0]
        torch.testing.assert_close(first["output"], call.out()[:, :, [1, 3]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", ["llama", "mistral"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_column_means(entry, padded):
    """Mean attention of each key over the real queries of the call that can see it: not over all, or early keys would win."""
    batch = left_padded(LENGTHS) if padded else {"input_ids": ids(3, 12)}
    mask = batch.get("attention_mask", torch.ones(3, 12)).bool()
    naive = naive_calls(entry, {**batch, "use_cache": False})
    with Looking("column_means", entry=entry) as it:
        logits(it.model, batch, use_cache=False)
        for layer, given in enumerate(it.seen):
            call = naive.calls(layer)[0]
            asked = call.seen & mask[:, None, :, None]
            expected = (call.p * asked).sum(2) / asked.sum(2).clamp_min(1)
            assert given["column_means"].shape == (3, 4, 12)
            torch.testing.assert_close(given["column_means"], expected, rtol=0, atol=1e-9)


def test_column_means_of_long_prompts_are_added_up_in_blocks():
    with Looking("column_means") as it:
        logits(it.model, ids(1, 600), use_cache=False)
        found = it.seen[0]["column_means"]
    call = naive_calls("llama", {"input_ids": ids(1, 600)}).calls(0)[0]
    torch.testing.assert_close(found, call.p.sum(2) / call.seen.sum(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_window_scores(window):
    """Attention of the last queries; the method's field `window` says how many."""
    batch = left_padded(LENGTHS)
    naive = naive_calls("llama", batch)
    with Looking("window_scores", window=window) as it:
        logits(it.model, batch)
        for layer, given in enumerate(it.seen):
            found, expected = given["window_scores"], naive.calls(layer)[0].p[:, :, -window:]
            assert found.shape == (3, 4, min(window, 12), 12)
            real = batch["attention_mask"].bool()[:, None, -window:, None].expand_as(found)
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", ["llama", "gpt2", "whisper"])
def test_layer_input(entry):
    """The residual stream that enters the layer, before its norm."""
    model, kept = ZOO[entry].build(torch.float64), {}
    layers = {"llama": "model.layers", "gpt2": "transformer.h", "whisper": "model.decoder.layers"}[entry]
    for i, layer in enumerate(model.get_submodule(layers)):
        layer.register_forward_pre_hook(lambda m, args, kwargs, i=i: kept.update({i: args[0]}), with_kwargs=True)
    inputs = ZOO[entry].make_inputs().to(torch.float64).kwargs
    with Looking("layer_input", model=model) as it:
        logits(model, inputs)
        assert len(it.seen) == LAYERS
        for layer, given in enumerate(it.seen):
            assert given["layer_input"].shape == (2, 14, HIDDEN)
            assert torch.equal(given["layer_input"], kept[layer])


@pytest.mark.parametrize(
    ("entry", "path", "name"),
    [("llama", "model.layers.1.self_attn", "o_proj"), ("gpt2", "transformer.h.1.attn", "c_proj"),
     ("opt", "model.decoder.layers.1.self_attn", "out_proj"), ("gpt_neox", "gpt_neox.layers.1.attention", "dense"),
     ("vit", "layers.1.attention", "o_proj"), ("whisper", "model.decoder.layers.1.self_attn", "out_proj"),
     ("gemma2", "model.layers.1.self_attn", "o_proj")],
)  # fmt: skip
def test_o_proj(entry, path, name):
    """[H, d, D]: what each head writes adds up to what the projection returns, for Linear and Conv1D weights alike."""
    model, kept = ZOO[entry].build(torch.float64), []
    projection = model.get_submodule(f"{path}.{name}")
    projection.register_forward_hook(lambda m, args, out: kept.append(out))
    with Looking("o_proj", model=model, heads={"1.*": 2.0}) as it:
        logits(model, ZOO[entry].make_inputs().to(torch.float64).kwargs)
        given = it.seen[0]
        heads, width = given["output"].shape[2:]
        assert given["o_proj"].shape == (heads, width, HIDDEN)
        written = torch.einsum("bqhd,hdD->bqD", given["output"], given["o_proj"])
        bias = 0.0 if projection.bias is None else projection.bias
        torch.testing.assert_close((written + bias).view_as(kept[0]), kept[0], rtol=0, atol=1e-9)


def test_o_proj_of_a_lora_layer_is_that_of_its_base():
    import peft

    model = ZOO["llama"].build(torch.float64)
    base = model.model.layers[0].self_attn.o_proj.weight.clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with Looking("o_proj", model=wrapped) as it:
        logits(wrapped)
        assert torch.equal(it.seen[0]["o_proj"], base.t().reshape(4, HEAD_DIM, HIDDEN))


def test_o_proj_of_a_quantised_layer_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    model = ZOO["llama"].build()
    old = model.model.layers[1].self_attn.o_proj
    new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    model.model.layers[1].self_attn.o_proj = new.to("cpu")
    try:
        logits(model)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit kernel for this CPU: {error}")
    with (
        Looking("o_proj", model=model) as it,
        pytest.raises(EngineError, match=r"layer text\.1: operand 'o_proj': .*quantised"),
    ):
        logits(it.model)


def test_all_heads():
    """Outputs of every head of the layer, whichever heads the patch names."""
    naive = naive_calls("llama", {"input_ids": ids()})
    with Looking("all_heads", heads={"*.2": 2.0}) as it:
        logits(it.model)
        for layer, given in enumerate(it.seen):
            assert given["all_heads"].shape == (2, 12, 4, HEAD_DIM) and given["output"].shape == (2, 12, 1, HEAD_DIM)
            torch.testing.assert_close(given["all_heads"], naive.calls(layer)[0].out(), rtol=0, atol=1e-9)


def test_arrays(tmp_path):
    """The recipe's own tensors, by name, on the model's device; from the recipe's folder only."""
    import hashlib

    arrays = {"direction": torch.arange(HEAD_DIM, dtype=torch.float32), "table": torch.ones(2, 3, dtype=torch.int64)}
    save_file(arrays, tmp_path / "task.safetensors")
    sha = hashlib.sha256((tmp_path / "task.safetensors").read_bytes()).hexdigest()

    def edit(method: Any, output: Tensor, strength: Tensor, operands: Any) -> Tensor:
        assert operands["arrays"].keys() == arrays.keys()
        assert torch.equal(operands["arrays"]["table"], arrays["table"])
        return output + strength[:, None] * operands["arrays"]["direction"]

    method = define("output", "adding", needs=("arrays",), edit=edit)
    model = ZOO["llama"].build(torch.float64)
    with registered(method):
        data = of(patch(method, {"0.1": 0.5, "1.0": 1.0})) | {"tensors": {"file": "task.safetensors", "sha256": sha}}
        recipe = headpatch.Recipe.from_dict(data, folder=tmp_path)
        with headpatch.applied(model, recipe):
            found = logits(model)
        naive = Naive(ZOO["llama"])

        def add(call: Any) -> Tensor:
            out = call.out()
            out[:, :, 1] += 0.5 * arrays["direction"]
            return out

        with naive.edited({0: add}) as other:
            torch.testing.assert_close(found, logits(other), rtol=0, atol=1e-9)
