"""Patched models inside other people's wrappers: accelerate, PEFT, pipelines, bitsandbytes, checkpointing, other devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from compat import A, B, C, fingerprint, ids, left_padded, logits, new_tokens, one_thread, recipe, silent
from torch import Tensor, nn
from zoo import BOS, PAD, ZOO

import headpatch
from headpatch import HeadpatchError, UnsupportedModelError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def model() -> Any:
    return ZOO["llama"].build()


# ----------------------------------------------------------------------------------------------------------- accelerate

MAPS = {
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "disk"},
    "all_disk": {"": "disk"},
}  # fmt: skip


def _dispatch(model: Any, how: str, folder: Any) -> None:
    import accelerate

    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        accelerate.disk_offload(model, offload_dir=str(folder), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, MAPS[how], main_device="cpu", offload_dir=str(folder), force_hooks=True)


def _steps(model: Any) -> Tensor:
    """Logits of a prompt and of a few tokens after it, through a cache. (generate() warns about any model that is offloaded.)"""
    batch, found = left_padded(), []
    cache = transformers.DynamicCache()
    for token in (batch["input_ids"], ids(3, 1, seed=3), ids(3, 1, seed=4)):
        if found:
            batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        given = {"input_ids": token, "attention_mask": batch["attention_mask"]}
        found.append(logits(model, given, past_key_values=cache))
    return torch.cat(found, 1)


@pytest.mark.parametrize("how", ["disk", "cpu_offload", "disk_offload"])
@pytest.mark.parametrize("first", ["apply", "dispatch"])
def test_accelerate_dispatch(model, how, first, tmp_path):
    """Weights that lie on disk or are fetched for each call: patched before or after, and removed."""
    plain = logits(model, left_padded())
    with headpatch.applied(model, A), headpatch.applied(model, B):
        patched, steps = logits(model, left_padded()), _steps(model)
    if first == "dispatch":
        _dispatch(model, how, tmp_path)
        before = fingerprint(model)
    handles = [headpatch.apply(model, r) for r in (A, B)]
    if first == "apply":
        _dispatch(model, how, tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(logits(model, left_padded()), patched)
    assert torch.equal(_steps(model), steps)
    assert handles[0].report().fires and handles[0].report(self_check=True).fires
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, left_padded()), plain)
    if first == "dispatch":
        assert fingerprint(model) == before


def test_accelerate_hooks_taken_off_a_patched_model(model):
    import accelerate

    headpatch.apply(model, A)
    patched = logits(model)
    _dispatch(model, "cpu_offload", None)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), patched)
    headpatch.handles(model)[0].remove()


# ----------------------------------------------------------------------------------------------------------------- PEFT


def _lora(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def test_peft_model_and_its_base_are_one(model):
    """Handles put on through either are the same handles; the adapter's weights act and can be switched off."""
    plain = logits(model)
    wrapped = _lora(model)
    adapted = logits(wrapped)
    assert not torch.equal(adapted, plain)
    through = headpatch.apply(wrapped, A)
    inner = wrapped.get_base_model()
    assert headpatch.handles(inner) == headpatch.handles(wrapped) == [through]
    below = headpatch.apply(inner, B)
    assert len(headpatch.handles(wrapped)) == 2
    both = logits(wrapped)
    reference = _lora(ZOO["llama"].build())
    headpatch.apply(reference.get_base_model(), A)
    headpatch.apply(reference, B)
    assert torch.equal(logits(reference), both)
    with wrapped.disable_adapter():
        unadapted = logits(wrapped)
    bare = ZOO["llama"].build()
    with headpatch.applied(bare, A), headpatch.applied(bare, B):
        assert torch.equal(unadapted, logits(bare))
    through.remove()
    below.remove()
    assert torch.equal(logits(wrapped), adapted) and headpatch.handles(inner) == []


def test_peft_merge_and_unload_keeps_the_patch(model):
    wrapped = _lora(model)
    headpatch.apply(wrapped, A)
    patched = logits(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), patched, rtol=0, atol=1e-4)
    assert len(headpatch.handles(merged)) == 1
    headpatch.handles(merged)[0].remove()
    assert not torch.allclose(logits(merged), patched, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_peft_adapters_train_on_a_patched_model(padded):
    """Gradients of LoRA weights equal those of the naive edit in eager autograd, here through finite logits differences."""
    wrapped = _lora(ZOO["llama"].build(torch.float64))
    for p in wrapped.parameters():
        p.data = p.data.double()
    headpatch.apply(wrapped, C)
    batch = left_padded() if padded else {"input_ids": ids()}
    wrapped.train()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        out = wrapped(**batch).logits
        loss = out[:, -1].logsumexp(-1).sub(out[:, -1, 5]).sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        assert any(float(p.grad.abs().max()) > 0 for p in trained.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_peft_state_dict_knows_nothing_of_the_patch(model, tmp_path):
    import peft

    wrapped = _lora(model)
    keys = set(peft.get_peft_model_state_dict(wrapped))
    headpatch.apply(wrapped, A)
    assert set(peft.get_peft_model_state_dict(wrapped)) == keys
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path).eval()
    for handle in headpatch.handles(wrapped):
        handle.remove()
    assert torch.equal(logits(again), logits(wrapped.eval()))


# ------------------------------------------------------------------------------------------------------------ pipelines


def _tokenizer() -> Any:
    """Whole words, no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<s>": BOS, "<unk>": 2} | {f"w{i}": i for i in range(3, 95)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_text_generation_pipeline_is_accepted(model, batch_size):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=_tokenizer(), device="cpu")
    pipe.generation_config.update(max_length=None, max_new_tokens=6, do_sample=False, temperature=1.0)
    texts = ["w5 w9 w33", "w7", "w8 w4 w20 w21 w22"]

    def run() -> list[str]:
        return [out[0]["generated_text"] for out in pipe(texts, batch_size=batch_size)]

    plain = run()
    handle = headpatch.apply(pipe, A)
    assert headpatch.handles(pipe) == headpatch.handles(model) == [handle]
    patched = run()
    assert patched != plain and handle.report().fires
    handle.remove()
    assert run() == plain
    with headpatch.applied(model, A):
        assert run() == patched


def test_what_holds_no_model_is_refused():
    """A wrapper around something else, an empty wrapper, a class."""
    for thing in (
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2)),
        object(),
        None,
        transformers.LlamaForCausalLM,
        "llama",
    ):
        with pytest.raises(UnsupportedModelError, match="no engine of headpatch's knows what to do with"):
            headpatch.apply(thing, A)


def test_a_module_that_holds_a_model_is_accepted(model):
    class Wrapper(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.module = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    wrapper = Wrapper(model)
    handle = headpatch.apply(wrapper, A)
    patched = logits(wrapper)
    assert headpatch.handles(model) == [handle]
    assert torch.equal(logits(model), patched)


# --------------------------------------------------------------------------------------------------------- bitsandbytes


def _quantise(model: Any, bits: int) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for name, old in list(layer.self_attn.named_children()):
            if bits == 8:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, new.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_layers(bits):
    """Quantised projections give queries and keys as any others do: the patch acts, and comes off."""
    model = _quantise(ZOO["llama"].build(), bits)
    try:
        plain = logits(model, left_padded())
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no {bits}-bit kernel for this CPU: {error}")
    plain = logits(model, left_padded())
    tokens = new_tokens(model, left_padded())
    assert not torch.allclose(plain, logits(ZOO["llama"].build(), left_padded()), atol=1e-3)
    kinds = {type(m).__name__ for m in model.modules()}
    assert f"Linear{'8bitLt' if bits == 8 else '4bit'}" in kinds
    handle, other = headpatch.apply(model, A), headpatch.apply(model, B)
    patched = logits(model, left_padded())
    assert not torch.allclose(patched, plain, atol=1e-2)
    assert handle.report().fires and handle.report(self_check=True).fires
    other.remove()
    handle.remove()
    assert torch.equal(logits(model, left_padded()), plain)
    assert torch.equal(new_tokens(model, left_padded()), tokens)


# ------------------------------------------------------------------------------------------------ gradient checkpointing


def _gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch, use_cache=False).logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights * batch.get("attention_mask", torch.ones(out.shape[:2]))[..., None]).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("entry", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing(entry, padded, reentrant):
    """The backward pass runs layers again after the model's forward is over: same edit, same gradients."""
    batch = left_padded() if padded else {"input_ids": ids()}
    model = ZOO[entry].build(torch.float64).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = _gradients(model, batch)
    headpatch.apply(model, A)
    headpatch.apply(model, B)
    expected = _gradients(model, batch)
    assert any(not torch.allclose(expected[n], plain[n]) for n in plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = _gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    for handle in headpatch.handles(model):
        handle.remove()
    for name, grad in _gradients(model, batch).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-9, atol=1e-12, msg=name)


# --------------------------------------------------------------------------------------------------------- other devices


@pytest.mark.parametrize("entry", ["llama", "mistral", "gemma2", "gpt_oss", "whisper", "vit"])
def test_the_fallback_of_other_devices(entry, monkeypatch):
    """Where a device has no kernel that reports its log-sum-exp, plain torch over tiles does it."""
    from headpatch.adapters.huggingface import lse

    model = ZOO[entry].build(torch.float64, ZOO[entry].attn[0])
    sides = [None, "left"] if ZOO[entry].caches else [None]
    batches = [ZOO[entry].make_inputs(lengths=[14, 5] if s else None, padding_side=s).to(torch.float64) for s in sides]
    part = {"whisper": "cross"}.get(entry, ZOO[entry].main)
    headpatch.apply(model, recipe("zerotuning", {"*.*": 5.0, "0.1": 0.0}, part=part))
    expected = [logits(model, b.kwargs)[b.real] for b in batches]
    monkeypatch.setattr(lse, "source", lambda *_: "tiled")
    for block in (256, 3):
        monkeypatch.setattr(lse, "BLOCK", block)
        for batch, wanted in zip(batches, expected, strict=True):
            torch.testing.assert_close(logits(model, batch.kwargs)[batch.real], wanted, rtol=0, atol=1e-9)


def test_meta_device():
    """Applying needs no weights; what is loaded later runs patched."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(ZOO["llama"].config()).eval()
    handle = headpatch.apply(model, A)
    headpatch.apply(model, B)
    out = model(ids().to("meta"))
    assert out.logits.shape == (2, 12, 96) and out.logits.device.type == "meta"
    assert handle.report().num_heads == 6
    handle.remove()
    twin = copy.deepcopy(model)
    assert len(headpatch.handles(twin)) == 1


def test_weights_loaded_into_a_patched_meta_model():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(ZOO["llama"].config()).eval()
    headpatch.apply(model, A)
    real = ZOO["llama"].build()
    model.load_state_dict(real.state_dict(), assign=True)
    model.model.rotary_emb = real.model.rotary_emb
    headpatch.apply(real, A)
    assert torch.equal(logits(model), logits(real))


def test_check_and_shape_from_a_config_build_no_weights():
    """A config of a model far larger than memory is enough to check a recipe."""
    config = transformers.LlamaConfig(
        num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8
    )
    found = headpatch.load_recipe(recipe("zerotuning", {"79.63": 2.0})).check(config)
    assert found.num_heads == 1
    with pytest.raises(headpatch.RecipeError, match=r"79\.64"):
        headpatch.load_recipe(recipe("zerotuning", {"79.64": 2.0})).check(config)
    with pytest.raises(UnsupportedModelError, match="a LlamaConfig describes a model but is none; give the model"):
        headpatch.apply(config, A)
    assert issubclass(UnsupportedModelError, HeadpatchError)
