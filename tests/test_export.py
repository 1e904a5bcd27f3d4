"""Edits as weights: a LoRA adapter or a checkpoint does what the recipe does, in engines that know nothing of it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import yaml
from tiny_model import RECIPE, save_tiny_model
from tuning import first_layer
from zoo import ZOO, output

import headpatch
from headpatch import cli, tune
from headpatch.errors import EngineError, HeadpatchError, RecipeError

LAYOUTS = ("llama", "qwen3", "phi3", "gemma2", "gpt2", "gpt_neox", "qwen3_next", "deepseek_v3", "bart")


def scaling(layer, part=None, **heads):
    patch = {"method": "head_scaling", "heads": {f"{layer}.{h}": s for h, s in heads.items()} or {f"{layer}.0": 0.0}}
    return headpatch.Recipe.from_dict({"headpatch": 1, "patches": [{**patch, "part": part} if part else patch]})


def recipe_for(entry):
    """Ablation, amplification and reversal; twice on one head; and every head of a layer where that exceeds no rank."""
    layer, last = first_layer(entry), list(entry.parts[entry.main].modules)[-1]
    patches = [
        {"method": "head_scaling", "heads": {f"{layer}.0": 0.0, f"{layer}.2": 1.7}},
        {"method": "head_scaling", "heads": {f"{layer}.2": 0.5, f"{last}.3": -1.2}},
    ]
    return headpatch.Recipe.from_dict({"headpatch": 1, "patches": patches})


def run(model, inputs):
    with torch.no_grad():
        return output(model(**inputs.kwargs))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("to", ["lora", "weights"])
def test_the_export_does_what_the_recipe_does(name, to, tmp_path):
    entry = ZOO[name]
    recipe, inputs = recipe_for(entry), entry.make_inputs(batch=2, lengths=[14, 9], padding_side="left")
    model = entry.build(torch.float64, attn="sdpa")
    inputs = inputs.to(torch.float64)
    untouched = run(model, inputs)
    with headpatch.applied(model, recipe):
        wanted = run(model, inputs)
    edit = tune.fold(recipe, model)
    assert edit.num_heads == 3
    if to == "lora":
        tune.to_lora(model, edit, tmp_path)
        assert torch.equal(run(model, inputs), untouched)  # the model is read, not changed
        got = run(
            peft.PeftModel.from_pretrained(model, str(tmp_path), autocast_adapter_dtype=False).double().eval(), inputs
        )
    else:
        tune.to_weights(model, edit)
        got = run(model, inputs)
    # the adapter's numbers are float32, the weights float64
    assert (got - wanted)[inputs.real].abs().max() <= (1e-5 if to == "lora" else 1e-10)
    assert (untouched - wanted)[inputs.real].abs().max() > 0.1


def test_a_checkpoint_on_disk(tmp_path):
    entry = ZOO["llama"]
    model, recipe, inputs = entry.build(), recipe_for(entry), entry.make_inputs()
    with headpatch.applied(model, recipe):
        wanted = run(model, inputs)
    tune.to_weights(model, tune.fold(recipe, model))
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    assert torch.allclose(run(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), wanted, atol=1e-4)


def test_a_whole_layer_takes_the_smaller_rank(tmp_path):
    """qwen3 of the zoo has 4 x 32 coordinates and a width of 64: the change of all heads has rank 64, not 128."""
    entry = ZOO["qwen3"]
    model, inputs = entry.build(), entry.make_inputs()
    recipe = headpatch.Recipe.from_dict(
        {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"0.*": 0.3, "1.1": 2.0}}]}
    )
    with headpatch.applied(model, recipe):
        wanted = run(model, inputs)
    tune.to_lora(model, tune.fold(recipe, model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 64
    assert not config["rank_pattern"]
    assert torch.allclose(run(peft.PeftModel.from_pretrained(model, str(tmp_path)).eval(), inputs), wanted, atol=1e-4)


def test_a_rank_beyond_the_engine_s_is_refused(tmp_path):
    model = ZOO["llama"].build()
    with pytest.raises(
        HeadpatchError, match=r"layer 0 needs a LoRA of rank 32: 2 heads of 16 coordinates; the limit is 24"
    ):
        tune.to_lora(model, tune.fold(recipe_for(ZOO["llama"]), model), tmp_path / "x", max_rank=24)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"method": "zerotuning", "heads": {"0.1": 2.0}}, "depends on what each input attends to"),
        ({"method": "head_scaling", "heads": {"0.1": 2.0}, "positions": "last"}, "not change all positions"),
    ],
)
def test_what_depends_on_the_input_is_refused(patch, words):
    recipe = headpatch.Recipe.from_dict(
        {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"1.0": 0.0}}, patch]}
    )
    with pytest.raises(RecipeError, match=rf"patches\[1\].*{words}"):
        tune.fold(recipe, ZOO["llama"].build())


def test_an_identity_is_nothing_to_export(tmp_path):
    model = ZOO["llama"].build()
    edit = tune.fold(scaling(0, **{"1": 1.0}), model)
    for export in (lambda: tune.to_lora(model, edit, tmp_path), lambda: tune.to_weights(model, edit)):
        with pytest.raises(HeadpatchError, match="nothing to export"):
            export()


def test_weights_that_others_share_are_left_alone():
    model = ZOO["llama"].build()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.o_proj.weight = first.o_proj.weight
    before = first.o_proj.weight.clone()
    with pytest.raises(EngineError, match="shares its weights"):
        tune.to_weights(model, tune.fold(scaling(0), model))
    assert torch.equal(first.o_proj.weight, before)


def test_agreement_is_measured():
    torch.manual_seed(0)
    untouched, wanted = torch.randn(2, 5, 7)
    found = tune.compare_logits(untouched, wanted, wanted + 3.0)
    assert found.difference < 1e-6 and found.same_tokens == 1.0 and found.effect > 0.1
    worse = tune.compare_logits(untouched, wanted, untouched)
    assert worse.difference == pytest.approx(found.effect) and worse.same_tokens < 1.0


# --- the command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(capsys, monkeypatch, folder):
    monkeypatch.setenv("COLUMNS", "200")

    def call(recipe, *more):
        status = cli.main(["export", str(recipe), "--model", str(folder), "--device", "cpu", *map(str, more)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "scaled.yaml"
    data = {**RECIPE, "patches": [{"method": "head_scaling", "heads": {"1.2": 0.0, "2.0": 1.5}}]}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("to", ["lora", "weights"])
def test_the_command_writes_and_compares(command, recipe, folder, tmp_path, to):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "exported"
    status, said, wrong = command(recipe, "--to", to, "-o", out)
    assert (status, wrong) == (0, "")
    assert "2 heads of tiny" in said
    assert "largest difference in log-probability" in said and "same token at 100.00%" in said
    assert ("--max-lora-rank 16 " in said) == (to == "lora")
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        with headpatch.applied(base, str(recipe)):
            wanted = base(ids).logits
        if to == "lora":
            exported = peft.PeftModel.from_pretrained(base, str(out)).eval()
        else:
            exported = AutoModelForCausalLM.from_pretrained(out).eval()
            assert (out / "tokenizer.json").is_file()
        assert torch.allclose(exported(ids).logits, wanted, atol=1e-4)
    status, _, wrong = command(recipe, "--to", to, "-o", out)
    assert status == 2 and "not an empty folder" in wrong


def test_a_comparison_that_fails_is_status_1(command, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("headpatch.tune.export.to_weights", lambda model, edit: None)
    status, said, _ = command(recipe, "--to", "weights", "-o", tmp_path / "x")
    assert status == 1
    assert "does not do what the recipe does" in said


def test_the_command_refuses_with_the_reason(command, tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    status, _, wrong = command(path, "--to", "lora", "-o", tmp_path / "x")
    assert status == 2
    assert "zerotuning cannot become weights" in wrong and "plug-in" in wrong
    assert not (tmp_path / "x").exists()
    status, _, wrong = command(path, "--to", "onnx", "-o", tmp_path / "x")
    assert status == 2 and "choose lora or weights" in wrong
