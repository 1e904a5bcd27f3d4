"""Adapters of chosen heads on a GPU, run by hand there: bfloat16 engines with ``--enable-lora`` against plain PEFT in float32.

    cd /tmp && python .../tests/vllm/gpu_lora.py --model /tmp/smollm2 --out $OUT

As gpu_parity.py: an adapter trained on chosen heads and a recipe written as an adapter, without and with a recipe of the plug-in on
top, all in one batch. Log-probabilities may be no further from the reference than those of requests without an adapter, or than
bfloat16 PEFT with the same adapter and recipe; a quarter more is allowed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SLACK = 1.25
PARTS: dict[str, dict[str, Any]] = {"lora": {}, "lora_eager": {"enforce_eager": True}}


def adapters(model: str, layers: int, heads: int, out: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Adapter folders by name, and the recipe that is behind the exported one."""
    import torch
    from engine_cases import load, recipe

    import headpatch
    from headpatch import tune
    from headpatch.tune.guard import restriction_of

    # One head a layer, so little that a model is left: under factors of 0, 1.6 and -1 its log-probabilities are off by 1.1, and
    # rounding is amplified to 0.08 (bfloat16 PEFT: 0.08) in one engine and 0.13 (0.09) in another, which says nothing about either.
    scaled = recipe(
        {"method": "head_scaling", "heads": {f"{i}.{i % heads}": (0.0, 1.3, 0.7)[i % 3] for i in range(layers)}}
    )
    tuned = tune.lora(load(Path(model)), [f"{i}.{(i + 1) % heads}" for i in range(layers)], r=8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:  # strong enough to matter, weak enough to leave a model
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    restriction_of(tuned).clear()
    plain = load(Path(model))
    folders = {
        "trained": tune.save(tuned, out / "trained"),
        "exported": tune.to_lora(plain, tune.fold(headpatch.load_recipe(scaled), plain), out / "exported"),
    }
    return folders, scaled


def run_part(name: str, model: str, out: Path) -> dict[str, Any]:
    """One engine, one batch of all prompts with each adapter and each recipe, twice."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # test_lora brings the tests' conftest, which asks for less
    sys.path.insert(0, str(HERE))
    import torch
    from engine_cases import load, recipe, truth
    from gpu_parity import MEMORY, like, mean, outcome, text_prompts
    from peft import PeftModel
    from test_lora import ask
    from vllm import LLM

    gamma = recipe({"method": "zerotuning", "heads": {"*.*": 1.5}})
    started = time.perf_counter()
    llm = LLM(model, **{
        "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 64, **MEMORY, "skip_tokenizer_init": True, "seed": 0,
        "enable_prefix_caching": True, "enable_lora": True, "max_loras": 3, "max_lora_rank": 64,
        "additional_config": {"headpatch": {"recipes": {"gamma": gamma}}}, **PARTS[name],
    })  # fmt: skip
    seconds = time.perf_counter() - started
    # Not before the engine's process is there: forked from one whose threads have computed something, it waits for ever.
    config = json.loads((Path(model) / "config.json").read_text())
    folders, scaled = adapters(
        model, config["num_hidden_layers"], config["num_attention_heads"], out / f"adapters-{name}"
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts, jobs = text_prompts(model), [(a, r) for a in (None, *folders) for r in ("none", "gamma")]
    rounds = []
    for _ in range(2):
        answers = ask(
            llm, [(ids, field, folders.get(adapter or "")) for ids in prompts for adapter, field in jobs], 32
        )
        found = {}
        for i, (adapter, field) in enumerate(jobs):
            mine, given = answers[i :: len(jobs)], {"gamma": gamma}.get(field)
            tables = []
            for dtype in (torch.float32, torch.bfloat16):
                base = load(Path(model)).to(dtype).cuda()
                peft = (
                    base
                    if adapter is None
                    else PeftModel.from_pretrained(base, str(folders[adapter])).to(dtype).eval()
                )
                tables.append([t.cpu().float() for t in truth(peft, mine, given)])
            plain = [t.cpu() for t in truth(load(Path(model)).cuda(), mine, given)]
            found[f"{adapter or 'no adapter'}, {field}"] = {
                "mean": mean(mine, tables[0]), "transformers_mean": mean(like(mine, tables[1]), tables[0]),
                "untouched_mean": mean(mine, plain),
            }  # fmt: skip
            if (adapter, field) == ("exported", "none"):  # the file is the recipe
                known = [t.cpu() for t in truth(load(Path(model)).cuda(), mine, scaled)]
                found["exported, against its recipe"] = {**found["exported, none"], "mean": mean(mine, known)}
        rounds.append({"none": found["no adapter, none"], **found})
    noise = max(r["none"]["mean"] for r in rounds)
    bad = {
        n: x["mean"]
        for r in rounds
        for n, x in r.items()
        if not x["mean"] <= SLACK * max(noise, x["transformers_mean"]) + 1e-5
    }
    return outcome(llm, name, bad, noise, rounds, seconds)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from gpu_parity import main

    sys.exit(main(PARTS, run_part, __file__, __doc__))
