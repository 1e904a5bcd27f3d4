"""Throughput of a vLLM engine with every head of every layer patched, against one without headpatch, both alive on one GPU.

    python benchmarks/bench_vllm.py --model /path/to/model            # one recipe for all requests, and eight mixed
    python benchmarks/bench_vllm.py --model llama-8b                   # an 8B-shaped model with dummy weights
    python benchmarks/bench_vllm.py --model llama-8b --methods none act pasta   # edits of segments, in a tenth of the heads

The engines are measured alternately, at least seven pairs a case; a ratio is patched throughput over untouched throughput. Promised:
geometric mean at least 0.99, lower end of its 95 % interval at least 0.98. Start-up times and memory stand beside it. With
`--methods` nothing is promised: edited heads attend twice ("none": requests without a recipe in an engine that is armed for the
others).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAIRS = 7
MEAN, LOW = 0.99, 0.98
STUDENT = {6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179, 14: 2.145, 19: 2.093}
"""95 % quantile of Student's t by degrees of freedom."""


def recipes(layers: int, heads: int, count: int) -> dict[str, dict[str, Any]]:
    """Recipes that give every head of every layer a first-token weight of its own and a factor on its output."""
    rng = random.Random(4)
    made = {}
    for i in range(count):
        names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        patches = [
            {"method": "zerotuning", "heads": {name: round(rng.uniform(0.5, 2.0), 3) for name in names}},
            {"method": "head_scaling", "heads": {name: round(rng.uniform(0.8, 1.2), 3) for name in names}},
        ]
        made[f"r{i}"] = {"headpatch": 1, "patches": patches}
    return made


def segment_recipes(layers: int, heads: int) -> dict[str, dict[str, Any]]:
    """Recipes of segments in a tenth of the heads, others in each layer, by method."""
    count, rng = max(1, heads // 10), random.Random(4)
    names = [f"{layer}.{head}" for layer in range(layers) for head in rng.sample(range(heads), count)]
    act = {"method": "act", "heads": dict.fromkeys(names, 0.4), "threshold": 5.0, "threshold_per": "prompt_length"}
    pasta = {"method": "pasta", "heads": dict.fromkeys(names, 0.05)}
    return {name: {"headpatch": 1, "patches": [patch]} for name, patch in (("act", act), ("pasta", pasta))}


def llama_8b(folder: Path) -> Path:
    """A config of the shape of an 8B llama; weights are dummies."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Engine:
    """One engine, and what it takes to run a case on it."""

    def __init__(self, model: str, flag: Any, options: dict[str, Any]) -> None:
        from vllm import LLM

        # An engine without headpatch has none of its hooks: its processes load no plugin.
        before = os.environ.get("VLLM_PLUGINS")
        if flag is None:
            os.environ["VLLM_PLUGINS"] = ""
        started = time.perf_counter()
        extra = {} if flag is None else {"additional_config": {"headpatch": flag}}
        self.llm = LLM(model, **options, **extra)
        self.start_seconds = time.perf_counter() - started
        if flag is None:
            if before is None:
                del os.environ["VLLM_PLUGINS"]
            else:
                os.environ["VLLM_PLUGINS"] = before
        self.armed = flag is not None

    def run(self, prompts: Sequence[list[int]], tokens: int, names: Sequence[Any]) -> float:
        """Tokens a second over the whole batch, prompt and generated."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True,
                extra_args={"headpatch": name} if self.armed and name is not None else None,
            )
            for name in names
        ]  # fmt: skip
        gc.collect()
        gc.disable()  # two engines' objects lie in this process: a collection falls into whichever turn it likes
        started = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        gc.enable()
        return sum(len(p) + tokens for p in prompts) / seconds


def cases(
    vocabulary: int, long: int, count: int, seed: int, methods: Sequence[str] = ()
) -> dict[str, tuple[Callable[[], list[list[int]]], int, Sequence[Any]]]:
    """Name -> (prompts, new each time; tokens to generate; what requests ask for, in turns)."""
    rng = random.Random(seed)

    def prompts(count: int, length: int) -> Callable[[], list[list[int]]]:
        return lambda: [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]

    if methods:
        fields = {"pasta": {"recipe": "pasta", "spans": [[10, 60]]}}
        return {
            f"{what}, {method}": (made, tokens, [fields.get(method, method)])
            for method in methods
            for what, made, tokens in (
                ("256 x (512 + 256)", prompts(256, 512), 256), ("1 x (512 + 256)", prompts(1, 512), 256),
                (f"prefill {count} x {long}", prompts(count, long), 1), (f"4 x ({long} + 128)", prompts(4, long), 128),
            )
        }  # fmt: skip
    one, mixed = ["r0"], [f"r{i}" for i in range(8)]
    return {
        "256 x (512 + 256), one recipe": (prompts(256, 512), 256, one),
        "256 x (512 + 256), eight mixed": (prompts(256, 512), 256, mixed),
        "1 x (512 + 256), one recipe": (prompts(1, 512), 256, one),
        f"prefill {count} x {long}, one recipe": (prompts(count, long), 1, one),
        f"prefill {count} x {long}, eight mixed": (prompts(count, long), 1, mixed),
    }


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios and its 95 % interval."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    t = STUDENT.get(len(logs) - 1, 2.1)
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def measure(
    untouched: Engine,
    patched: Engine,
    named: dict[str, tuple[Callable[[], list[list[int]]], int, Sequence[Any]]],
    pairs: int,
    only: Sequence[str],
    promised: bool,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All cases, each warmed up once and then measured in alternated pairs; what there is, is saved after each."""
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(n for part in only for n in named if part in n):
        make, tokens, asked = named[name]
        warm = make()
        names = [asked[i % len(asked)] for i in range(len(warm))]
        for engine in (untouched, patched):
            engine.run(warm, min(tokens, 32), names)
        rows = []
        for i in range(pairs):
            prompts, speeds = make(), {}
            order = (untouched, patched) if i % 2 else (patched, untouched)
            for engine in order:
                speeds[engine.armed] = engine.run(prompts, tokens, names)
            rows.append((speeds[False], speeds[True]))
        mean, low, high = interval([b / a for a, b in rows])
        found.append({
            "case": name, "untouched": statistics.median(a for a, _ in rows), "patched": statistics.median(b for _, b in rows),
            "ratio": mean, "low": low, "high": high, "pairs": rows, "passed": (mean >= MEAN and low >= LOW) if promised else None,
        })  # fmt: skip
        print(line(found[-1]), flush=True)
        save(found)
    return found


def line(row: dict[str, Any]) -> str:
    """One case, for people."""
    verdict = {True: "pass", False: "FAIL", None: ""}[row["passed"]]
    return (
        f"{row['case']:36s} {row['untouched']:10.0f} {row['patched']:10.0f} tokens/s  "
        f"{row['ratio']:.4f} ({row['low']:.4f}-{row['high']:.4f})  {verdict}"
    )


def memory() -> int:
    """Bytes in use on the device, by anybody."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write JSON; 0 where every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint, or llama-8b for dummy weights of that shape")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--long", type=int, default=7680, help="prompt length of the prefill cases")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the prefill cases")
    parser.add_argument("--share", type=float, default=0.4, help="share of the device's memory for each engine")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="cases whose name contains one of these, in this order"
    )
    parser.add_argument(
        "--methods", nargs="*", choices=["none", "act", "pasta"], default=[], help="edits of segments instead"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="engine option, as in attention_backend='\"TRITON_ATTN\"'",
    )
    given = parser.parse_args(arguments)
    import torch

    if given.model is None or not torch.cuda.is_available():
        print("not run: needs a CUDA device with vLLM, and --model")
        return 0
    # Here, by hand: the first engine's start says that no plugin is to be loaded, and a process is asked only once.
    from headpatch.adapters.vllm import register

    register()
    with tempfile.TemporaryDirectory() as temporary:
        dummy = given.model == "llama-8b"
        model = str(llama_8b(Path(temporary))) if dummy else given.model
        config = json.loads((Path(model) / "config.json").read_text())
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        options: dict[str, Any] = {
            "dtype": "bfloat16", "max_model_len": given.long + 256, "max_num_seqs": 256, "gpu_memory_utilization": given.share,
            "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0, "disable_log_stats": True,
            **({"load_format": "dummy"} if dummy else {}),
            **{name: json.loads(value) for name, value in (text.split("=", 1) for text in given.option)},
        }  # fmt: skip
        flag: dict[str, Any] = {"recipes": recipes(layers, heads, 8), "default": "r0"}
        if given.methods:
            flag = {"recipes": segment_recipes(layers, heads)}
        sizes = [memory()]
        untouched = Engine(model, None, options)
        sizes.append(memory())
        patched = Engine(model, flag, options)
        sizes.append(memory())
        report = patched.llm.collective_rpc("headpatch_report")[0]
        about = {
            "model": given.model, "options": {k: str(v) for k, v in options.items()}, **describe(),
            "start_seconds": {"untouched": untouched.start_seconds, "patched": patched.start_seconds},
            "memory_bytes": {"untouched": sizes[1] - sizes[0], "patched": sizes[2] - sizes[1]},
            "backends": sorted({f"{layer['backend']} ({layer['how']})" for layer in report["layers"]}), "checks": report["checks"],
        }  # fmt: skip
        print(f"start-up {untouched.start_seconds:.0f} s untouched (first, so it compiles), {patched.start_seconds:.0f} s patched; "
              f"memory {(sizes[1] - sizes[0]) / 2**30:.2f} and {(sizes[2] - sizes[1]) / 2**30:.2f} GiB; {about['device']}; "
              f"{', '.join(about['backends'])}; vLLM {about['vllm']}", flush=True)  # fmt: skip

        def save(found: list[dict[str, Any]]) -> None:
            if given.out:
                given.out.write_text(json.dumps({**about, "cases": found}, indent=1))

        rows = measure(
            untouched, patched, cases(config["vocab_size"], given.long, given.prompts, 7, given.methods), given.pairs, given.only,
            not given.methods, save,
        )  # fmt: skip
    return 0 if all(row["passed"] is not False for row in rows) else 1


def describe() -> dict[str, str]:
    """The machine and the versions."""
    import torch
    import vllm

    import headpatch

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "vllm": vllm.__version__,
        "headpatch": headpatch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
