"""Models spread over devices: by layers (device_map), where a recipe is exact; by heads (tp_plan), which is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headpatch

RECIPE: dict[str, Any] = {
    "headpatch": 1,
    "patches": [
        {"method": "zerotuning", "heads": {"0.*": 0.3, "1.1": 3.0, "2.*": 2.0, "3.5": 0.0}},
        {"method": "head_scaling", "heads": ["0.2", "1.7", "2.0", "3.4"], "scale": 0.0},
    ],
}

RANK = """
import sys
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import headpatch
from headpatch.errors import UnsupportedModelError
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
before = [(name, id(module.config)) for name, module in model.named_modules() if hasattr(module, "config")]
try:
    headpatch.apply(model, {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"0.5": 0.0}}]})
    print("APPLIED")
except UnsupportedModelError as error:
    print("REFUSED", error)
after = [(name, id(module.config)) for name, module in model.named_modules() if hasattr(module, "config")]
print("UNTOUCHED" if before == after else "TOUCHED")
dist.destroy_process_group()
"""


def model(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    """Four layers of eight query and four KV heads, saved in `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2)
    made.save_pretrained(folder)
    return made


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_are_exact(tmp_path: Path) -> None:
    """Half of the layers on each: strengths are where their layer is, and the answer is that of one device."""
    plain = model(tmp_path)
    halves = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    halves |= {f"model.layers.{i}": i // 2 for i in range(4)}
    spread = LlamaForCausalLM.from_pretrained(tmp_path, device_map=halves, dtype=torch.float32)
    assert {p.device.index for p in spread.parameters()} == {0, 1}
    ids = torch.randint(1, 128, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        untouched = spread(ids.cuda(), attention_mask=mask.cuda()).logits
        with headpatch.applied(plain, RECIPE), headpatch.applied(spread, RECIPE):
            want = plain(ids, attention_mask=mask).logits
            found = spread(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
            answers = [
                m.generate(ids[:1].to(m.device), max_new_tokens=20, do_sample=False).cpu() for m in (plain, spread)
            ]
        assert float((found - want)[mask.bool()].abs().max()) < 1e-3
        assert torch.equal(*answers)
        assert torch.equal(spread(ids.cuda(), attention_mask=mask.cuda()).logits, untouched)


@pytest.mark.slow
def test_heads_over_ranks_are_refused_by_name(tmp_path: Path) -> None:
    """transformers' own tensor parallelism on two CPU processes: nothing is touched on either rank."""
    model(tmp_path)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("REFUSED") == 2, done.stdout
    assert done.stdout.count("heads are sharded over ranks") == 2
    assert done.stdout.count("UNTOUCHED") == 2
