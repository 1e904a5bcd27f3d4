"""Adapters of chosen heads on disk: PEFT's own files, which plain PEFT loads, and the heads beside them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import peft
import pytest
import torch
from tuning import spoil, train
from zoo import ZOO

from headpatch import tune
from headpatch.errors import EngineError, HeadpatchError


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_plain_peft_loads_what_is_saved(name, per_head, tmp_path):
    entry = ZOO[name]
    torch.manual_seed(0)
    tuned = train(
        tune.lora(entry.build(), ["0.1", "1.0-2"], r=2, per_head=per_head, use_rslora=per_head), entry, steps=4
    )
    inputs = entry.make_inputs(batch=2).kwargs
    tune.save(tuned, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(entry.build(), str(tmp_path / "adapter")).eval()
    ours = tune.load(entry.build(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = tuned(**inputs).logits
        assert torch.equal(plain(**inputs).logits, expected)
        assert torch.equal(ours(**inputs).logits, expected)
    facts = json.loads((tmp_path / "adapter" / "headpatch_heads.json").read_text())
    assert facts["heads"] == ["0.1", "1.0-2"]
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()).keys() <= known | {"peft_version"}


def test_layers_without_chosen_heads_are_not_in_the_file(tmp_path):
    from safetensors import safe_open

    tune.save(tune.lora(ZOO["mistral"].build(), "1.0", r=2), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    stem = "base_model.model.model.layers.1.self_attn"
    assert names == {f"{stem}.{p}.lora_{x}.weight" for p in ("q_proj", "o_proj") for x in "AB"}


def test_training_goes_on_from_a_file(tmp_path):
    entry = ZOO["llama"]
    tuned = train(tune.lora(entry.build(), "1.2", r=2, per_head=True), entry, steps=2)
    tune.save(tuned, tmp_path)
    again = tune.load(entry.build(), tmp_path, trainable=True)
    before = [p.detach().clone() for p in again.parameters() if p.requires_grad]
    train(again, entry, steps=2)
    tune.check(again)
    assert all(
        not torch.equal(a, b) for a, b in zip(before, (p for p in again.parameters() if p.requires_grad), strict=True)
    )
    assert str(tune.report(again)) == str(tune.report(tuned))
    with pytest.raises(HeadpatchError, match="another model"):
        tune.load(ZOO["qwen3"].build(), tmp_path)
    (tmp_path / "headpatch_heads.json").unlink()
    with pytest.raises(HeadpatchError, match="is not there"):
        tune.load(entry.build(), tmp_path)


def test_a_file_that_reaches_beyond_its_heads_is_refused(tmp_path):
    entry = ZOO["llama"]
    tuned = spoil(tune.lora(entry.build(), "1.2", r=2))
    tune.save(tuned, tmp_path)
    path = tmp_path / "headpatch_heads.json"
    path.write_text(path.read_text().replace('"1.2"', '"1.3"'))
    with pytest.raises(HeadpatchError, match="does not name"):
        tune.load(entry.build(), tmp_path)
    path.write_text("{}")
    with pytest.raises(HeadpatchError, match="format 1"):
        tune.load(entry.build(), tmp_path)


def test_importing_is_light_and_peft_is_asked_for_by_name(monkeypatch):
    code = "import sys; from headpatch import tune; tune.__all__; print(*(set(sys.modules) & {'torch', 'peft', 'transformers'}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split()
    assert set(tune.__all__) <= set(dir(tune))
    assert all(getattr(tune, name).__doc__ for name in tune.__all__)
    model = ZOO["llama"].build()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EngineError, match=r"headpatch\[tune\]"):
        tune.lora(model, "0.1")
