"""Cache policies on a GPU, run by hand there: bfloat16 engines that drop tokens, against a float64 softmax under an explicit mask.

    cd /tmp && python .../tests/vllm/gpu_split.py --model /tmp/smollm2 --out $OUT

As gpu_parity.py, whose noise is measured here on an engine of its own that keeps everything: the mean difference in log-probability
from the reference may be no larger than that, or, since a model that has lost tokens is less sure of itself and feels rounding more,
than what bfloat16 transformers under the same mask show on the same tokens (a quarter more is allowed). Against the reference that
keeps everything it is far larger.
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
SINK, RECENT = 32, 64
PARTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash_small_steps": {"max_num_batched_tokens": 256},
    "flash_unequal": {"_unequal": True},
    "flash_eager": {"enforce_eager": True},
    "flash_v1": {"_env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "flash_no_caching": {"enable_prefix_caching": False},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    "every_head": {"_none": True},
    "triton": {"attention_backend": "TRITON_ATTN", "_unverified": True},
    "one_rank": {"_tiny": "1b"},
    "two_ranks": {"_tiny": "1b", "tensor_parallel_size": 2},
}
"""Engine options by part; names with an underscore are ours. `two_ranks` needs two GPUs, and is left out where there is one."""


def run_part(name: str, model: str, out: Path) -> dict[str, Any]:
    """One engine that keeps everything, one that does not, one batch of all prompts under all recipes, twice."""
    options = dict(PARTS[name])
    os.environ.update(options.pop("_env", {}))
    sys.path.insert(0, str(HERE))
    import torch
    from engine_cases import VOCABULARY, ask, differ, load, save_tiny, truth
    from gpu_parity import MEMORY, like, mean, outcome, text_prompts
    from split_cases import Kept, factors, wanted
    from vllm import LLM

    unequal, none, unverified, tiny = (
        options.pop(key, False) for key in ("_unequal", "_none", "_unverified", "_tiny")
    )
    if tiny:
        folder = out / f"model-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        model = str(save_tiny(folder, tiny, 8, 4))  # heads that two ranks can share
    config = json.loads((Path(model) / "config.json").read_text())
    layers, heads, kv = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    if none:
        full: dict[int, tuple[int, ...]] = {}
    elif unequal:
        full = {layer: tuple(range(kv))[: layer % (kv + 1)] for layer in range(layers)}
    else:
        full = {layer: tuple(sorted((layer + i) % kv for i in range(max(1, kv // 2)))) for layer in range(layers)}
    given = {
        "lean": Kept(SINK, RECENT, full),
        "edited": Kept(SINK, RECENT, full, gamma=factors(layers, heads, 0.5, 2.0, 1), scale=factors(layers, heads, 0.8, 1.2, 2)),
        "rows": Kept(SINK, RECENT, full, later=factors(layers, heads, 0.7, 1.3, 3)),
    }  # fmt: skip
    if tiny:
        prompts = [[(t * 7919 + i * 31) % VOCABULARY for t in range(110 + 45 * i)] for i in range(8)]
    else:
        prompts = [(ids * (1 + i % 4))[-(120 + 90 * i) :] for i, ids in enumerate(text_prompts(model))]
    shared: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": 512 if tiny else 1024, "max_num_seqs": 64, **MEMORY, "skip_tokenizer_init": True,
        "enable_prefix_caching": True, "seed": 0,
    }  # fmt: skip
    reference, rounded = load(Path(model)).cuda(), load(Path(model)).to(torch.bfloat16).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    uncut = LLM(model, **shared, additional_config={"headpatch": {}})
    plain = ask(uncut, [(ids, "none") for ids in prompts], 32)
    noise = mean(plain, [t.cpu() for t in truth(reference, plain, None)])
    flag = {"recipes": {n: kept.recipe() for n, kept in given.items()}, "default": "lean", "unverified": unverified}
    started = time.perf_counter()
    llm = LLM(model, **{**shared, **options}, additional_config={"headpatch": flag})
    seconds = time.perf_counter() - started
    rounds = []
    for _ in range(2):
        answers = ask(llm, [(ids, n) for ids in prompts for n in given], 32)
        found = {}
        for i, (n, kept) in enumerate(given.items()):
            mine = answers[i :: len(given)]
            tables = wanted(reference, mine, kept)
            everything = wanted(reference, mine, Kept(10**6, 1, {}, kept.gamma, kept.scale, kept.later))
            found[n] = {
                "mean": mean(mine, tables),
                "transformers_mean": mean(like(mine, wanted(rounded, mine, kept)), tables),
                "untouched_mean": mean(mine, everything),
                "worst": differ(mine, tables).worst,
            }
        rounds.append(found)
    bad = {
        n: r[n]["mean"]
        for r in rounds
        for n in given
        if not r[n]["mean"] <= SLACK * max(noise, r[n]["transformers_mean"]) + 1e-5
    }
    return outcome(llm, name, bad, noise, rounds, seconds)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from gpu_parity import main

    sys.exit(main(PARTS, run_part, __file__, __doc__))
