"""LoRA on chosen heads under what people train with: the Trainer, quantised bases, DistributedDataParallel; FSDP is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from tuning import spoil, train
from zoo import ZOO

from headpatch import tune
from headpatch.errors import EngineError, HeadpatchError
from headpatch.tune.guard import restriction_of

ENTRY = ZOO["llama"]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        ids = ENTRY.make_inputs(batch=1, seed=row).kwargs["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        weight_decay=0.1, max_grad_norm=0.1, learning_rate=0.02, disable_tqdm=True, seed=3, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def test_the_trainer_keeps_the_pattern_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer

    def fresh():
        torch.manual_seed(0)
        return tune.lora(ENTRY.build(), ["0.1", "1.2-3"], r=2)

    whole = fresh()
    trainer = Trainer(whole, arguments(tmp_path / "whole", max_steps=6, save_steps=3), train_dataset=Rows())
    trainer.train()
    tune.check(whole)
    resumed = fresh()
    trainer = Trainer(resumed, arguments(tmp_path / "again", max_steps=6, save_steps=3), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    tune.check(resumed)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name  # stopped after three steps, it ends where the uninterrupted run does
    tune.save(resumed, tmp_path / "adapter")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    ENTRY.build().save_pretrained(folder)
    return folder


def quantised(folder, bits):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_storage": torch.float32,
    }  # fmt: skip
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(checkpoint, tmp_path, bits):
    """Trained on a quantised base, the pattern is exact; merged on a clean one, the edit stays in its head."""
    import peft

    base = peft.prepare_model_for_kbit_training(quantised(checkpoint, bits), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    tuned = tune.lora(base, "1.2", r=2)
    before = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
    train(tuned, ENTRY, steps=3)
    assert all(
        not torch.equal(a, b) for a, b in zip(before, (p for p in tuned.parameters() if p.requires_grad), strict=True)
    )
    tune.check(tuned)
    with pytest.raises(EngineError, match=r"quantised.*load the base model in bfloat16 or float32"):
        tune.merge(tuned)
    tune.save(tuned, tmp_path)
    merged = tune.merge(tune.load(ENTRY.build(), tmp_path))
    for (name, value), after in zip(ENTRY.build().state_dict().items(), merged.state_dict().values(), strict=True):
        changed = value != after
        if name == "model.layers.1.self_attn.q_proj.weight":
            assert changed[32:48].any() and not changed[:32].any() and not changed[48:].any()
        elif name == "model.layers.1.self_attn.o_proj.weight":
            assert changed[:, 32:48].any() and not changed[:, :32].any() and not changed[:, 48:].any()
        else:
            assert not changed.any(), name


@pytest.fixture
def one_process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package here")
    if torch.distributed.is_initialized():  # an engine that ran inside this test process has left its own
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_keeps_the_pattern(one_process_group):
    tuned = tune.lora(ENTRY.build(), "1.2", r=2)
    train(nn.parallel.DistributedDataParallel(tuned), ENTRY, steps=3)
    tune.check(tuned)


def test_fully_shard_is_refused(one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tuned = tune.lora(ENTRY.build(), "1.2", r=2)
    fully_shard(tuned, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(EngineError, match="FSDP"):
        train(tuned, ENTRY, steps=1)


def test_deepspeed_is_refused():
    tuned = tune.lora(ENTRY.build(), "1.2", r=2)
    for _, weight, _ in restriction_of(tuned).factors():
        weight.ds_id = 7  # what ZeRO stage 3 puts on every parameter
    with pytest.raises(EngineError, match="DeepSpeed"):
        train(tuned, ENTRY, steps=1)


def test_flattened_parameters_are_refused():
    tuned = tune.lora(ENTRY.build(), "1.2", r=2)
    factor = tuned.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"]
    factor.weight = nn.Parameter(factor.weight.detach().flatten())
    with pytest.raises(EngineError, match="in the place of parameters"):
        tuned.train()(**ENTRY.make_inputs(batch=1).kwargs)


def test_switching_adapters_changes_nothing():
    """set_adapter switches gradients on and off; the hooks stay."""
    tuned = tune.lora(ENTRY.build(), "1.2", r=2)
    tuned.set_adapter("default", inference_mode=True)
    tuned.set_adapter("default")
    train(tuned, ENTRY, steps=2)
    tune.check(tuned)
    with pytest.raises(HeadpatchError, match="'other'"):
        tune.check(tuned, "other")


def test_merging_is_refused_for_an_adapter_that_strayed():
    tuned = spoil(tune.lora(ENTRY.build(), "1.2", r=2))
    with torch.no_grad():
        tuned.base_model.model.model.layers[1].self_attn.o_proj.lora_A["default"].weight[0, 0] = 1e-3
    for refused in (tune.merge, lambda model: tune.save(model, "never written")):
        with pytest.raises(HeadpatchError, match=r"o_proj has 0\.001 outside its mask"):
            refused(tuned)
    assert not Path("never written").exists()
