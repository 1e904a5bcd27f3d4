"""Trainable numbers on head outputs, LoFiT, and their way out as recipes, biases and LoRA."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

import headpatch
from headpatch import tune
from headpatch.errors import EngineError, HeadpatchError

ENTRY = ZOO["llama"]


def logits(model, entry=ENTRY):
    with torch.no_grad():
        return model(**entry.make_inputs(batch=2).kwargs).logits


def batches(entry=ENTRY, rows=6):
    found = []
    for seed in range(rows):
        ids = entry.make_inputs(batch=2, seed=seed).kwargs["input_ids"]
        found.append({"input_ids": ids, "labels": ids})
    return found


def spoil(vectors, seed=0, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in vectors.parameters():
            value.copy_(torch.randn(value.shape, generator=g) * scale)
    return vectors


@pytest.mark.parametrize("kind", ["scale", "gain", "bias"])
def test_what_is_observed_is_what_the_formula_says(kind):
    """Layer 1's own output projection, computed by hand from the observed head outputs."""
    model = ENTRY.build()
    with spoil(tune.HeadVectors(model, ["1.0", "1.3"], kind=kind)) as vectors:
        caught = []
        hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, args, out: caught.append(out))
        with headpatch.observe(model, ["output"], "1.*") as seen:
            logits(model)
        hook.remove()
    z = torch.stack([seen["output", f"1.{h}"][0] for h in range(4)], 2)  # [b, q, H, d]
    row = {0: vectors.values[1][0], 3: vectors.values[1][1]}
    for head, numbers in row.items():
        z[:, :, head] = z[:, :, head] + numbers if kind == "bias" else (1 + numbers) * z[:, :, head]
    expected = z.flatten(2) @ model.model.layers[1].self_attn.o_proj.weight.T
    assert torch.allclose(caught[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["scale", "gain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_removal_are_bit_equal(kind, dtype):
    model = ENTRY.build(dtype)
    model.lm_head.weight.requires_grad_(False)
    before, trained = logits(model), [p.requires_grad for p in model.parameters()]
    with tune.HeadVectors(model, "*.*", kind=kind, std=0.0) as vectors:
        assert torch.equal(logits(model), before)
        assert not any(p.requires_grad for p in model.parameters())
        spoil(vectors)
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    vectors.remove()


def test_a_learned_scale_is_a_recipe(tmp_path):
    """Trained down from the untouched loss, and the recipe does the same on a fresh model, after a trip through a file."""
    model, data = ENTRY.build(), batches()
    vectors = tune.HeadVectors(model, ["0.1", "1.*"], kind="scale", std=0.0)
    optimizer = torch.optim.AdamW(vectors.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(5):
        total = sum(model(**batch).loss for batch in data) / len(data)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0] - 0.03
    assert all(p.grad is None for p in model.parameters())
    wanted = logits(model)
    vectors.to_recipe("tiny/learned", "Learned.").save(tmp_path / "learned.yaml")
    with headpatch.applied(ENTRY.build(), str(tmp_path / "learned.yaml")) as handle:
        assert handle.recipe.model["num_kv_heads"] == 2
    fresh = ENTRY.build()
    headpatch.apply(fresh, str(tmp_path / "learned.yaml"))
    assert torch.allclose(logits(fresh), wanted, atol=1e-5)
    with pytest.raises(HeadpatchError, match="vector per head"):
        tune.HeadVectors(ENTRY.build(), "0.1", kind="gain").to_recipe()


def test_a_scale_of_another_part_says_so():
    entry = ZOO["bart"]
    vectors = tune.HeadVectors(entry.build(), "0.1", kind="scale", part="cross")
    recipe = spoil(vectors).to_recipe()
    assert recipe.patches[0].part == "cross"
    recipe.check(entry.build())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_biases_become_biases_of_the_output_projection(name, tmp_path):
    """Llama gets attention_bias with zeros for q, k and v; GPT-2, GPT-NeoX and gpt-oss have one. The checkpoint loads plainly."""
    entry = ZOO[name]
    model = entry.build(attn=entry.attn[0])
    vectors = spoil(tune.HeadVectors(model, ["0.1-2", "1.0"], kind="bias"), scale=0.3)
    wanted = logits(model, entry)
    vectors.remove()
    assert (logits(model, entry) - wanted).abs().max() > 0.05
    tune.to_weights(model, tune.fold(vectors, model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation=entry.attn[0]).eval()
    again.config._experts_implementation = "eager"
    assert torch.allclose(logits(again, entry), wanted, atol=1e-4)


def test_biases_that_no_checkpoint_could_hold_are_refused(tmp_path):
    model = ZOO["phi3"].build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edit = tune.fold(spoil(tune.HeadVectors(model, "0.1", kind="bias")), model)
    with pytest.raises(EngineError, match="no option for one"):
        tune.to_weights(model, edit)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(HeadpatchError, match="a LoRA adapter cannot hold them"):
        tune.to_lora(model, edit, tmp_path)


def test_gains_and_biases_together(tmp_path):
    """A bias learned on top of gains folds with the weights as they were before."""
    model = ENTRY.build()
    gains = spoil(tune.HeadVectors(model, "0.1-2", kind="gain"))
    biases = spoil(tune.HeadVectors(model, ["0.2-3"], kind="bias"), seed=1)
    wanted = logits(model)
    edit = tune.fold(gains, model).then(tune.fold(biases, model))
    biases.remove()
    gains.remove()
    assert edit.num_heads == 3
    tune.to_weights(model, edit)
    assert torch.allclose(logits(model), wanted, atol=1e-4)


def test_gains_become_a_lora(tmp_path):
    import peft

    model = ENTRY.build()
    gains = spoil(tune.HeadVectors(model, ["0.1", "1.0-2"], kind="gain"))
    wanted = logits(model)
    gains.remove()
    tune.to_lora(model, tune.fold(gains, model), tmp_path)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
    assert adapted.peft_config["default"].r == 48
    assert torch.allclose(logits(adapted), wanted, atol=1e-4)


# --- LoFiT ----------------------------------------------------------------------------------------------------------------------


def planted(entry=ENTRY):
    """Data whose labels are the model's own, with a gain on head 1.2 alone: that head is the one to find."""
    model = entry.build()
    recipe = {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"1.2": 2.5}}]}
    data = []
    for seed in range(3):
        ids = entry.make_inputs(batch=4, seed=seed).kwargs["input_ids"]
        with torch.no_grad(), headpatch.applied(model, recipe):
            data.append({"input_ids": ids, "target": model(ids).logits.softmax(-1)})
    return data


def imitation(model, batch):
    return -(batch["target"] * model(batch["input_ids"]).logits.log_softmax(-1)).sum(-1).mean()


def test_lofit_finds_the_head_and_tunes_it():
    model, data, steps = ENTRY.build(), planted(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        untouched = float(sum(imitation(model, batch) for batch in data)) / len(data)
    found = tune.lofit(
        model, data, top=1, loss=imitation, epochs=5, lr=4e-2, l1=1e-4, bias_lr=2e-2, progress=steps.append
    )
    assert found.heads == ("1.2",)
    assert max(found.ranking, key=found.ranking.get) == "1.2" and len(found.ranking) == 8
    assert found.sized.keys() == found.ranking.keys() and max(found.sized, key=found.sized.get) == "1.2"
    assert found.vectors.heads == {1: (2,)} and found.vectors.kind == "bias"
    assert found.losses["select"][-1] < found.losses["select"][0] < untouched + 1e-3
    assert found.losses["tune"][-1] < found.losses["tune"][0]
    assert [s.step for s in steps] == [*range(1, 16)] * 2
    assert steps[14].stage == "select" and steps[-1].stage == "tune" and steps[-1].seconds_left == 0
    found.vectors.remove()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [4, 10])
def test_a_stopped_run_ends_where_a_whole_one_does(tmp_path, after):
    """Stopped in the middle of an epoch, of either stage: the epochs that were done are not done again."""
    data, count = batches(rows=3), []

    def stop(step):
        count.append(step)
        if len(count) == after:
            raise StoppedError

    options = {"top": 2, "epochs": 2, "seed": 5}
    whole = tune.lofit(ENTRY.build(), data, **options)
    model, work = ENTRY.build(), tmp_path / "run.work"
    with pytest.raises(StoppedError):
        tune.lofit(model, data, **options, work=work, progress=stop)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    done = []
    again = tune.lofit(model, data, **options, work=work, progress=done.append)
    assert len(done) == 12 - (after - 1) // 3 * 3
    assert again.heads == whole.heads and again.losses == whole.losses
    for layer, value in whole.vectors.values.items():
        assert torch.equal(value, again.vectors.values[layer])
    again.vectors.remove()
    with pytest.raises(HeadpatchError, match="other settings"):
        tune.lofit(model, data, **{**options, "seed": 6}, work=work)
    with pytest.raises(HeadpatchError, match="other settings"):
        tune.lofit(model, [*data[:2], batches(rows=4)[3]], **options, work=work)
    work.write_bytes(b"not a safetensors file")
    with pytest.raises(HeadpatchError, match="cannot be read"):
        tune.lofit(model, data, **options, work=work)


def test_sizes_are_those_of_the_heads_outputs():
    model, inputs = ENTRY.build(), ENTRY.make_inputs(batch=2).kwargs
    with spoil(tune.HeadVectors(model, ["1.0", "1.3"])) as vectors:
        sizes = vectors.sizes(lambda: model(**inputs))
        with headpatch.observe(model, ["output"], "1.*") as seen:
            logits(model)
        for row, head in enumerate((0, 3)):
            expected = seen["output", f"1.{head}"][0].abs().mean((0, 1))
            assert torch.allclose(sizes[1][row], expected, atol=1e-5)
            assert vectors.scores(sizes)[f"1.{head}"] == pytest.approx(
                float((vectors.values[1][row].detach() * expected).norm()), rel=1e-4
            )
    assert vectors._seen is None


def test_lofit_says_what_is_wrong():
    model = ENTRY.build()
    with pytest.raises(HeadpatchError, match="at least one batch"):
        tune.lofit(model, [], top=1)
    with pytest.raises(HeadpatchError, match="loss is nan"):
        tune.lofit(model, batches(rows=1), top=1, loss=lambda m, batch: m(**batch).loss * torch.nan)
    with pytest.raises(HeadpatchError, match="choose scale"):
        tune.HeadVectors(model, kind="both")
    assert not any(m._forward_pre_hooks for m in model.modules())
