"""Parity on a GPU, run by hand there: bfloat16 engines against a float32 reference, part by part, each in a process of its own.

    cd /tmp && python .../tests/vllm/gpu_parity.py --model /tmp/smollm2 --out $OUT

For each recipe: the mean difference in log-probability from transformers (float32, recipe applied) of the tokens that
the engine chose.
It may be no larger than what the untouched requests of the same batch show, which is the engine's own noise, or, since a recipe can
make a model more sensitive to rounding, than what bfloat16 (fp8) transformers with the same recipe show on the same tokens. A quarter
more is allowed. The same requests measured against the *untouched* reference show that the recipe matters.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SLACK = 1.25
PARTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash_one": {"_single": True},
    "flash_small_steps": {"max_num_batched_tokens": 256},
    "flash_eager": {"enforce_eager": True},
    "flash_v1": {"_env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "triton": {"attention_backend": "TRITON_ATTN"},
    "triton_eager": {"attention_backend": "TRITON_ATTN", "enforce_eager": True},
    "flex": {"attention_backend": "FLEX_ATTENTION"},
    "flex_eager": {"attention_backend": "FLEX_ATTENTION", "enforce_eager": True},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    "fp8_weights": {"quantization": "fp8"},
    "one_rank": {"_tiny": "1b"},
    "two_ranks": {"_tiny": "1b", "tensor_parallel_size": 2},
    "windowed_triton": {"_tiny": "windowed", "attention_backend": "TRITON_ATTN"},
    "windowed": {"_tiny": "windowed"},
    "float32_triton": {"_tiny": "llama", "attention_backend": "TRITON_ATTN", "dtype": "float32"},
    "float32_flex": {
        "_tiny": "llama",
        "attention_backend": "FLEX_ATTENTION",
        "dtype": "float32",
        "enforce_eager": True,
    },
}
"""Engine options by part; names with an underscore are ours. `two_ranks` needs two GPUs, and is left out where there is one."""
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30}
"""A size given outright is not measured, so that engines which share a GPU do not see each other's memory come and go."""


def run_part(name: str, model: str, out: Path) -> dict[str, Any]:
    """One engine, one batch of all prompts under all recipes, twice."""
    options = dict(PARTS[name])
    os.environ.update(options.pop("_env", {}))
    sys.path.insert(0, str(HERE))
    import torch
    from engine_cases import VOCABULARY, ask, load, recipe, recipes, save_tasks, save_tiny, tiny_prompts, truth
    from vllm import LLM

    single, tiny = options.pop("_single", False), options.pop("_tiny", None)
    if tiny:
        folder = out / f"model-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        model = str(save_tiny(folder, tiny, *((8, 4) if tiny == "1b" else ())))  # heads that two ranks can share
    config = json.loads((Path(model) / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    given = recipes(layers, heads)
    given["rows"] = recipe(
        {"method": "head_scaling", "heads": {"1.*": 0.5, f"{layers - 1}.0-1": -1.0}, "positions": "decode"}
    )
    # Injected tasks, gentle enough that they do not make the model's own noise larger.
    dim = config.get("head_dim") or config["hidden_size"] // heads
    folder = out / f"tasks-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = save_tasks(folder, 8, layers, heads, dim, scale=0.2)
    given |= {"task": tasks["task0"], "vector": tasks["task7"]}  # type: ignore[dict-item]
    if tiny:
        prompts = tiny_prompts()
    else:
        prompts = [
            [1 + (t * 7919 + i * 31) % (config["vocab_size"] - 2) for t in range(40 + 25 * i)] for i in range(8)
        ]
        if (Path(model) / "tokenizer.json").exists():
            prompts = text_prompts(model)
    if single:
        prompts = prompts[:1]
    started = time.perf_counter()
    llm = LLM(model, **{
        "dtype": "bfloat16", "max_model_len": 1024 if not tiny else 512, "max_num_seqs": 64, **MEMORY,
        "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0,
        "additional_config": {"headpatch": {"recipes": given}}, **options,
    })  # fmt: skip
    seconds = time.perf_counter() - started
    reference = load(Path(model)).cuda()
    rounded = load(Path(model)).to(torch.float32 if options.get("dtype") == "float32" else torch.bfloat16).cuda()
    if options.get("quantization") == "fp8":
        round_to_fp8(rounded)
    torch.backends.cuda.matmul.allow_tf32 = False
    names: list[Any] = ["none", *given]
    rounds = []
    for _ in range(2):
        jobs = [(ids, n) for ids in prompts for n in names]
        answers = [a for job in jobs for a in ask(llm, [job], 32)] if single else ask(llm, jobs, 32)
        found = {}
        for i, n in enumerate(names):
            mine = answers[i :: len(names)]
            wanted = [t.cpu() for t in truth(reference, mine, None if n == "none" else given[n])]
            plain = [t.cpu() for t in truth(reference, mine, None)]
            rough = [t.cpu().float() for t in truth(rounded, mine, None if n == "none" else given[n])]
            found[n] = figures(mine, wanted, rough, plain)
        rounds.append(found)
    bad, noise = judge(rounds)
    return outcome(llm, name, bad, noise, rounds, seconds, vocabulary=VOCABULARY if tiny else config["vocab_size"])


def figures(answers: Any, exact: Any, rough: Any, plain: Any) -> dict[str, float]:
    """How far answers, and those of transformers in the engine's type, are from the reference; and from the untouched one."""
    from engine_cases import differ

    return {
        "mean": mean(answers, exact), "transformers_mean": mean(like(answers, rough), exact),
        "untouched_mean": mean(answers, plain), "worst": differ(answers, exact).worst,
    }  # fmt: skip


def judge(rounds: list[dict[str, Any]], more: float = 1e-5) -> tuple[dict[str, float], float]:
    """Recipes that are further off than the rule allows, and the noise of untouched requests."""
    noise = max(found["none"]["mean"] for found in rounds)
    bad = {
        n: values["mean"]
        for found in rounds
        for n, values in found.items()
        if n != "none" and not values["mean"] <= SLACK * max(noise, values["transformers_mean"]) + more
    }
    return bad, noise


def outcome(
    llm: Any, name: str, bad: dict[str, float], noise: float, rounds: list[dict[str, Any]], seconds: float, **more: Any
) -> dict[str, Any]:
    """What a part writes: its figures, and what the engine says of itself."""
    import torch

    engine, report = llm.llm_engine.vllm_config, llm.collective_rpc("headpatch_report")[0]
    return {
        "part": name, "passed": not bad, "bad": bad, "noise": noise, "rounds": rounds, "start_seconds": seconds,
        "checks": report["checks"], "slots": report["slots"], "cache": report.get("cache"), **more,
        "v2_runner": bool(getattr(engine, "use_v2_model_runner", False)), "graphs": str(engine.compilation_config.cudagraph_mode),
        "backends": sorted({f"{x['backend']} ({x['how']})" for x in report["layers"]}), "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def mean(answers: Any, tables: Any) -> float:
    """Mean absolute difference in log-probability of the chosen tokens."""
    gaps = [
        abs(seen[token] - float(table[step, token]))
        for answer, table in zip(answers, tables, strict=True)
        for step, (token, seen) in enumerate(zip(answer.tokens, answer.logprobs, strict=True))
    ]
    return sum(gaps) / len(gaps)


def like(answers: Any, tables: Any) -> list[Any]:
    """The same tokens with the log-probabilities of other tables."""
    from dataclasses import replace

    return [
        replace(answer, logprobs=[{token: float(table[step, token])} for step, token in enumerate(answer.tokens)])
        for answer, table in zip(answers, tables, strict=True)
    ]


def round_to_fp8(model: Any) -> None:
    """Weights and inputs of the layers' projections as an fp8 engine has them: e4m3 with one scale each."""
    import torch

    def rounded(x: Any) -> Any:
        scale = x.abs().max().float().clamp(min=1e-12) / 448
        return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))


def text_prompts(model: str) -> list[list[int]]:
    """Plain questions behind a shared beginning."""
    from transformers import AutoTokenizer

    start = (
        "You answer in plain words, think before you speak, and never invent facts about people, places or numbers. "
        * 3
    )
    asked = ("What is the capital of Poland?", "Why does bread rise?", "Name three colours.", "Who wrote Hamlet?",
             "How far is the moon?", "Write a line about rain.", "What is 12 times 7?", "Say hello in French.")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(start + question + "\nAnswer:")["input_ids"] for question in asked]


def main(
    parts: dict[str, dict[str, Any]] = PARTS, run: Callable[[str, str, Path], dict[str, Any]] = run_part, script: str = __file__,
    about: str | None = __doc__,
) -> int:  # fmt: skip
    """Run all parts, or one in this process."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=parts)
    parser.add_argument("--parts", nargs="*", default=list(parts))
    parser.add_argument("--seconds", type=int, default=240, help="limit of one part")
    parser.add_argument("--jobs", type=int, default=1, help="parts that share the GPU")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part:
        faulthandler.dump_traceback_later(max(20, given.seconds - 10))  # where it stands, before its time is up
        try:
            result = run(given.part, given.model, given.out)
        except BaseException:
            result = {"part": given.part, "passed": False, "error": traceback.format_exc()[-4000:]}
        (given.out / f"parity-{given.part}.json").write_text(json.dumps(result, indent=1))
        sys.stdout.flush()
        os._exit(0)  # engines' processes end with this one
    count, runnable = gpus(), []
    for part in given.parts:
        if parts[part].get("tensor_parallel_size", 1) > count:
            print(f"{part:18s} not run: needs {parts[part]['tensor_parallel_size']} GPUs")
        else:
            runnable.append(part)

    def one(part: str) -> bool:
        path, log = given.out / f"parity-{part}.json", given.out / f"parity-{part}.log"
        path.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(script).resolve()),
            "--model",
            given.model,
            "--out",
            str(given.out),
            "--part",
            part,
            "--seconds",
            str(given.seconds),
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(given.seconds)
            except subprocess.TimeoutExpired:
                print(f"{part:18s} ran out of time")
            finally:  # engines, too: one that is left behind keeps its memory, and the next part's start fails
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        late = {"passed": False, "error": log.read_text(errors="replace")[-1500:]}
        result = json.loads(path.read_text()) if path.exists() else late
        print(summary(part, result), flush=True)
        return bool(result["passed"])

    with ThreadPoolExecutor(given.jobs) as pool:
        return 0 if all(list(pool.map(one, runnable))) else 1


def gpus() -> int:
    """GPUs of this machine; asked in another process, so that this one holds none."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def control(found: dict[str, float]) -> str:
    """What transformers showed under the same recipe, where that was measured."""
    return f"{found['transformers_mean']:.4f}; " if "transformers_mean" in found else ""


def summary(part: str, result: dict[str, Any]) -> str:
    """A line or two for people."""
    if "error" in result:
        return f"{part:18s} ERROR {result['error'].strip().splitlines()[-1][:300]}"
    last = result["rounds"][-1]
    cells = ", ".join(
        f"{n} {x['mean']:.4f} ({control(x)}untouched {x['untouched_mean']:.3f})"
        for n, x in last.items()
        if n != "none"
    )
    verdict = "pass" if result["passed"] else f"FAIL {result['bad']}"
    return (
        f"{part:18s} {verdict}; noise {result['noise']:.4f}; {cells}; {result['backends']}, V2 {result['v2_runner']}, "
        f"{result['graphs']}, start {result['start_seconds']:.0f} s, checks {[round(c['error'], 6) for c in result['checks']]}"
    )


if __name__ == "__main__":
    sys.exit(main())
