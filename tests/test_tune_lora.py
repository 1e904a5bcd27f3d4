"""LoRA on chosen heads: what is trained is what was chosen, and nothing else, whatever trains it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from tuning import first_layer, seen, slices, spoil, train
from zoo import ZOO, output

import headpatch
from headpatch import tune
from headpatch.errors import HeadpatchError, RecipeError, UnsupportedModelError
from headpatch.tune.guard import restriction_of

LAYOUTS = ("llama", "qwen3", "phi3", "gemma3", "gpt2", "gpt_neox", "opt", "qwen3_next", "deepseek_v3", "bart", "vit")
"""Separate, fused in blocks, fused by heads, transposed, gated and latent projections; head_dim x heads is not the width in
qwen3. qwen3_next has its only softmax layer at 3."""


@pytest.mark.parametrize(
    ("name", "kv"), [*((name, "group") for name in LAYOUTS), ("llama", "none"), ("phi3", "none"), ("gpt_neox", "none")]
)
def test_the_kernel_sees_other_heads_unchanged(name, kv):
    """The tables of layouts, against what the attention kernel is given: the chosen head's tensors change, others' do not."""
    entry = ZOO[name]
    layer, part = first_layer(entry), entry.parts[entry.main]
    before = seen(entry.build(), entry, layer)
    after = seen(spoil(tune.lora(entry.build(), f"{layer}.1", r=2, kv=kv, roles=["q"])), entry, layer)
    group = part.num_heads // part.num_kv_heads
    for (operand, head), value in before.items():
        chosen = head == 1 if operand == "q" else kv == "group" and head // group == 1 // group
        assert torch.equal(value, after[operand, head]) != chosen, (operand, head)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_output_slice_is_the_head_s_own(name):
    """A trained o slice is without effect where its head writes nothing, and has one where it does."""
    entry = ZOO[name]
    layer = first_layer(entry)
    ablated = {
        "headpatch": 1,
        "patches": [{"method": "head_scaling", "heads": {f"{layer}.2": 0.0}, "part": entry.main}],
    }
    inputs = entry.make_inputs(batch=1).kwargs
    base, tuned = entry.build(), spoil(tune.lora(entry.build(), f"{layer}.2", r=2, roles=["o"]))
    with torch.no_grad():
        assert not torch.equal(output(base(**inputs)), output(tuned(**inputs)))
        with headpatch.applied(base, ablated), headpatch.applied(tuned, ablated):
            assert torch.equal(output(base(**inputs)), output(tuned(**inputs)))


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "qwen3_next"])
def test_merged_weights_differ_in_the_chosen_slices_alone(name, per_head):
    entry = ZOO[name]
    layer = first_layer(entry)
    base = entry.build().state_dict()
    base = {key: value.clone() for key, value in base.items()}
    torch.manual_seed(0)
    tuned = train(tune.lora(entry.build(), [f"{layer}.0", f"{layer}.3"], r=2, per_head=per_head), entry)
    inputs = entry.make_inputs(batch=2).kwargs
    with torch.no_grad():
        logits = tuned(**inputs).logits
    merged = tune.merge(tuned)
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, logits, atol=2e-4)
    expected = slices(entry, layer, (0, 3), name)
    after = merged.state_dict()
    assert after.keys() == base.keys()
    for key, value in base.items():
        if key not in expected:
            assert torch.equal(value, after[key]), key
            continue
        axis, index = expected[key]
        changed = (value != after[key]).any(1 - axis)
        assert set(changed.nonzero().flatten().tolist()) == set(index.tolist()), key


def bf16(entry):
    return tune.lora(entry.build(torch.bfloat16), "1.2", r=4)


def adapters_in_bf16(entry):
    return tune.lora(entry.build(torch.bfloat16), "1.2", r=4, autocast_adapter_dtype=False)


def checkpointed(entry):
    model = entry.build()
    model.gradient_checkpointing_enable()
    return tune.lora(model, "1.2", r=4)


def with_dropout(entry):
    return tune.lora(entry.build(), "1.2", r=4, lora_dropout=0.3, use_rslora=True)


def copied(entry):
    return copy.deepcopy(tune.lora(entry.build(), "1.2", r=4))


def pickled(entry):
    import io

    file = io.BytesIO()
    torch.save(tune.lora(entry.build(), "1.2", r=4), file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251  (our own bytes)


@pytest.mark.parametrize("make", [bf16, adapters_in_bf16, checkpointed, with_dropout, copied, pickled])
def test_the_zero_pattern_is_exact(make):
    """Accumulation, clipping, decay, low precision, checkpointing, dropout; copies, whose parameters have lost their hooks."""
    entry = ZOO["llama"]
    torch.manual_seed(1)
    tuned = make(entry)
    start = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    train(tuned, entry, steps=3, accumulate=2, clip=0.1)
    tune.check(tuned)
    for name, p in tuned.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, start[name]), f"{name} was not trained"
            assert p.isfinite().all()


def test_without_the_hook_the_pattern_would_break():
    """The tests above could fail."""
    entry = ZOO["llama"]
    tuned = tune.lora(entry.build(), "1.2", r=4)
    for hooks in [*(p._backward_hooks for p in tuned.parameters() if p._backward_hooks), tuned._forward_pre_hooks]:
        hooks.clear()
    train(tuned, entry, steps=2)
    with pytest.raises(HeadpatchError, match="changes heads that were not chosen"):
        tune.check(tuned)
    tune.apply_masks(tuned)
    tune.check(tuned)


def test_an_optimizer_that_adds_noise_is_kept_in_check():
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p) * 0.01)

    entry = ZOO["llama"]
    tuned, made = tune.lora(entry.build(), "1.2", r=4), []

    def optimizer(parameters):
        made.append(Noisy(parameters, lr=0.1))
        return made[0]

    train(tuned, entry, steps=2, optimizer=optimizer)
    with pytest.raises(HeadpatchError, match="not chosen"):
        tune.check(tuned)
    tune.apply_masks(tuned)
    handle = tune.guard_optimizer(tuned, made[0])
    train(tuned, entry, steps=2, optimizer=lambda _: made[0])
    tune.check(tuned)
    handle.remove()


def test_infinite_gradients_of_other_heads_do_not_pass():
    tuned = tune.lora(ZOO["llama"].build(), "1.2", r=4)
    for _, weight, masked in restriction_of(tuned).factors():
        (weight.sum() * torch.inf).backward()
        assert (weight.grad[~masked.keep] == 0).all()
        assert weight.grad[masked.keep].isinf().all()


@pytest.mark.parametrize("kv", ["none", "group_if_all", "group"])
def test_kv_policies(kv):
    entry = ZOO["llama"]  # heads 0 and 1 share KV head 0, heads 2 and 3 KV head 1
    tuned = tune.lora(entry.build(), ["1.0-1", "1.3"], r=2, kv=kv)
    found = tune.report(tuned)
    assert found.heads == {1: (0, 1, 3)}
    assert found.kv_heads == {"none": {}, "group_if_all": {1: (0,)}, "group": {1: (0, 1)}}[kv]
    assert found.also_touched == ({1: (2,)} if kv == "group" else {})
    assert ("1.2" in str(found)) == (kv == "group")
    before, after = seen(entry.build(), entry, 1), seen(spoil(tuned), entry, 1)
    changed = {h for h in range(4) if not torch.equal(before["v", h], after["v", h])}
    assert changed == {"none": set(), "group_if_all": {0, 1}, "group": {0, 1, 2, 3}}[kv]
    # q and o: r (D + n d) each; k and v: r (D + m d) each
    groups = {"none": 0, "group_if_all": 1, "group": 2}[kv]
    assert found.trainable == 2 * 2 * (64 + 3 * 16) + (2 * 2 * (64 + groups * 16) if groups else 0)


def test_per_head_factors_can_be_taken_apart():
    """Stacked factors: dropping one head's block of the adapter leaves exactly the others' changes."""
    entry = ZOO["llama"]
    tuned = spoil(tune.lora(entry.build(), "0.1-2", r=3, per_head=True, lora_alpha=6))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    assert a.shape == (6, 64) and scale == 2.0  # the strength is the rank's own, however many heads are stacked
    whole = layer.get_delta_weight("default")
    for i, head in enumerate((1, 2)):
        mine = scale * b[:, 3 * i : 3 * i + 3] @ a[3 * i : 3 * i + 3]
        rows = slice(head * 16, head * 16 + 16)
        assert torch.allclose(mine[rows], whole[rows], atol=1e-6)
        assert not mine[: rows.start].any() and not mine[rows.stop :].any()


def test_o_starts_as_large_as_it_would_alone():
    """Kept columns of A are drawn for the inputs that are kept: variance 1 / (3 |S| d), PEFT's own for that many inputs."""
    torch.manual_seed(0)
    tuned = tune.lora(ZOO["llama"].build(), "0.1", r=512, roles=["o"])
    a = tuned.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight
    kept = a[:, 16:32]
    assert kept.abs().max() <= 16**-0.5
    assert abs(float(kept.detach().var()) * 3 * 16 - 1) < 0.05
    assert not a[:, :16].any() and not a[:, 32:].any()


@pytest.mark.parametrize(
    ("heads", "top", "expected"),
    [
        ("1.2", None, {1: (2,)}),
        (["0.0-1", "1.3"], None, {0: (0, 1), 1: (3,)}),
        ({0: [3], 1: (0, 1)}, None, {0: (3,), 1: (0, 1)}),
        ([(1, 0), (0, 2)], None, {0: (2,), 1: (0,)}),
        ({"0.1": 0.2, "1.1": 0.9, "1.3": 0.5}, 2, {1: (1, 3)}),
        ([("0.1", 0.2), ("1.1", 0.9)], 1, {1: (1,)}),
        (["1.3", "0.2", "0.0"], 2, {0: (2,), 1: (3,)}),
        ({"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"0.*": 2.0, "1.1": 0.5}}]}, None,
         {0: (0, 1, 2, 3), 1: (1,)}),
    ],
)  # fmt: skip
def test_heads_can_be_said_in_many_ways(heads, top, expected):
    assert tune.report(tune.lora(ZOO["llama"].build(), heads, r=1, top=top)).heads == expected


@pytest.mark.parametrize(
    ("heads", "options", "error", "words"),
    [
        ("9.0", {}, RecipeError, "layer 9"),
        ([], {}, RecipeError, "no heads"),
        ([(0, -1)], {}, RecipeError, "no pair"),
        ({"0.1": 1.0}, {}, HeadpatchError, "top="),
        ({"0.1": float("nan")}, {"top": 1}, HeadpatchError, "finite"),
        ("0.1", {"use_dora": True}, HeadpatchError, "a row of the output projection spans all heads"),
        ("0.1", {"init_lora_weights": "pissa"}, HeadpatchError, "pissa"),
        ("0.1", {"modules_to_save": ["lm_head"]}, HeadpatchError, "modules_to_save"),
        ("0.1", {"bias": "all"}, HeadpatchError, "bias"),
        ("0.1", {"kv": "all"}, HeadpatchError, "group_if_all"),
        ("0.1", {"roles": ["k"]}, HeadpatchError, "roles"),
        ("0.1", {"r": 0}, HeadpatchError, "rank"),
        ("0.1", {"part": "vision"}, RecipeError, "vision"),
    ],
)
def test_what_cannot_be_done_is_said(heads, options, error, words):
    model = ZOO["llama"].build()
    with pytest.raises(error, match=words):
        tune.lora(model, heads, **options)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_second_adapter_is_refused():
    tuned = tune.lora(ZOO["llama"].build(), "0.1")
    with pytest.raises(HeadpatchError, match="already has adapters"):
        tune.lora(tuned, "0.2")
    with pytest.raises(HeadpatchError, match="not restricted"):
        tune.check(peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(target_modules=["q_proj"])))


def test_a_norm_over_all_heads_is_seen():
    """OLMo 2 normalises queries over all heads at once: a change of one head's rows would rescale every other."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="q_norm normalises over"):
        tune.lora(Olmo2ForCausalLM(config), "0.1")
    assert tune.report(tune.lora(Olmo2ForCausalLM(config), "0.1", roles=["o"])).trainable == 8 * (16 + 64)


def test_unknown_layouts_are_refused():
    model = ZOO["llama"].build()
    model.model.layers[1].self_attn.mixer = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn .*module mixer"):
        tune.lora(model, "0.1")
    model = ZOO["llama"].build()
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 96)
    with pytest.raises(UnsupportedModelError, match="q_proj has 96"):
        tune.lora(model, "0.1")
    with pytest.raises(UnsupportedModelError):
        tune.lora(nn.Linear(4, 4), "0.1")
