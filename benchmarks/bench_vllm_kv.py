"""A vLLM engine with a cache policy under which half (or another share) of the KV heads drop tokens, against one that keeps all.

    python benchmarks/bench_vllm_kv.py --model llama-8b --out results.json       # 8B shape, dummy weights; a CUDA device with vLLM
    python benchmarks/bench_vllm_kv.py --tiny                                     # the same steps on a model of nothing, on a CPU

Parts (``--only exact,decode,room``), each with engines of its own:

* exact: while no row is longer than ``sink + recent``, both engines say the same, token by token, alone and in a batch.
* decode: time per token of one request at several lengths, from a prompt that lies in the prefix cache, both engines alive, in turn.
  The bound is that of memory: bytes that must be read without and with the policy, weights included. Asked for: of the bound's gain
  at least 85 % at 128k and 60 % at 32k, and nothing lost at 8k (0.97). Beside it: blocks that a request holds against the
  arithmetic (within 3 % and the block that is being filled), and the floor that a measured copy bandwidth gives.
* kernels (not by default): what ran on the device in a step of one request, by kernel, at those lengths.
* room: at one size of memory, prompts of 32k, more than fit: requests that decode at once, and tokens a second. Asked for: 1.6 times
  as many.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_vllm import Engine, interval, llama_8b
from kv_shapes import bandwidth, cache_bytes, policy, randomise, tiny_model, weight_bytes

SHARES = {131072: 0.85, 32768: 0.6}
"""Share of the bound's gain that is asked for, by length; below the shortest, nothing may be lost."""
FLOOR = 0.97
MORE = 1.6
WITHIN = 0.03


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]


def generate(llm: Any, batch: Sequence[list[int]], tokens: int, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **options)
    found: list[Any] = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
    return found


# --- parts --------------------------------------------------------------------------------------------------------------


def gap(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Worst difference in log-probability up to the first token that differs, tokens until then, and tokens in all."""
    worst, equal, steps = 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        x, y = a.outputs[0], b.outputs[0]
        steps += len(x.token_ids)
        for i, (s, t) in enumerate(zip(x.logprobs, y.logprobs, strict=True)):
            worst = max([worst, *(abs(s[token].logprob - t[token].logprob) for token in s.keys() & t.keys())])
            if x.token_ids[i] != y.token_ids[i]:  # from here on they say different things
                break
            equal += 1
    return {"worst": worst, "equal": equal, "steps": steps}


def exact(uncut: Any, cut: Any, config: dict[str, Any], keep: int) -> dict[str, Any]:
    """Both engines on prompts of which nothing is dropped; beside it, the uncut one alone against itself in a batch: rounding."""
    length, tokens = keep // 2, keep // 3
    batch = [ids[: max(1, length - 7 * i)] for i, ids in enumerate(prompts(12, length, config["vocab_size"], 3))]
    said = {
        (name, llm is cut): generate(llm, group, tokens, logprobs=4)
        for name, group in (("alone", batch[:1]), ("together", batch))
        for llm in (uncut, cut)
    }
    found: dict[str, Any] = {name: gap(said[name, True], said[name, False]) for name in ("alone", "together")}
    found["rounding"] = gap(said["alone", False], said["together", False][:1])
    found["passed"] = all(found[n]["worst"] <= 2 * found["rounding"]["worst"] + 1e-4 for n in ("alone", "together"))
    return found


def per_token(llm: Any, ids: list[int], few: int, many: int) -> float:
    """Seconds a token: a request of `many` tokens less one of `few`, both with their prompt in the prefix cache."""
    times = []
    for tokens in (few, many):
        started = time.perf_counter()
        generate(llm, [ids], tokens)
        times.append(time.perf_counter() - started)
    return max(times[1] - times[0], 1e-9) / (many - few)


def held_bytes(cut: Any, ids: list[int], tokens: int) -> tuple[int, int]:
    """Bytes of cache that one request holds when it has decoded for a while, and tokens it then has."""
    from vllm import SamplingParams

    core = cut.llm_engine
    core.add_request(
        "held", {"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    )
    last: list[int] = []
    while core.has_unfinished_requests():
        core.step()
        client = core.engine_core
        pool = (
            client.call_utility("headpatch_pool")
            if hasattr(client, "call_utility")
            else client.engine_core.headpatch_pool()
        )
        held = [
            blocks for group in pool["groups"] for request, (blocks, _) in group["held"].items() if "held" in request
        ]
        if held:
            last = held
    size = cut.collective_rpc("headpatch_report")[0]["cache"]["block_bytes"]
    return sum(last) * size, len(ids) + tokens


def decode(
    uncut: Any, cut: Any, config: dict[str, Any], given: argparse.Namespace, width: int, speed: float
) -> Iterator[dict[str, Any]]:
    """One length after the other."""
    keep = given.sink + given.recent
    for length in given.lengths:
        few, many = given.tokens
        ids = prompts(1, length - many - 1, config["vocab_size"], length)[0]
        for llm in (uncut, cut):
            generate(llm, [ids], few)  # into the prefix cache
            per_token(llm, ids, few, many)
        times: list[tuple[float, float]] = []
        for i in range(given.pairs):
            pair = {id(llm): per_token(llm, ids, few, many) for llm in ((uncut, cut) if i % 2 else (cut, uncut))}
            times.append((pair[id(uncut)], pair[id(cut)]))
        gain, low, high = interval([a / b for a, b in times])
        weights = weight_bytes(config, width)
        read = [weights + cache_bytes(config, width, length, n, keep) for n in (None, given.full)]
        bound = read[0] / read[1]
        asked = next((1 + share * (bound - 1) for at, share in SHARES.items() if length >= 0.9 * at), FLOOR)
        held, tokens = held_bytes(cut, ids, many)
        wanted = cache_bytes(config, width, tokens, given.full, keep)
        cache = cut.collective_rpc("headpatch_report")[0]["cache"]
        blocks = (
            sum(cache["block_bytes"] for _ in cache["groups"]) * 2
        )  # one that is being filled and one that is half out, a group
        yield {
            "length": length, "uncut_ms": 1e3 * statistics.median(a for a, _ in times),
            "cut_ms": 1e3 * statistics.median(b for _, b in times), "gain": gain, "low": low, "high": high, "bound": bound,
            "asked": asked, "floor_ms": [1e3 * n / speed for n in read], "pairs": times, "passed": gain >= asked,
            "held_bytes": held, "wanted_bytes": wanted, "memory_passed": held <= (1 + WITHIN) * wanted + blocks,
        }  # fmt: skip


def start_profile(worker: Any) -> None:
    """In an engine's process: note what runs from now on."""
    from torch.profiler import ProfilerActivity, profile

    where = ProfilerActivity.CUDA if worker.device.type == "cuda" else ProfilerActivity.CPU
    worker.bench_profile = profile(activities=[where])
    worker.bench_profile.__enter__()


def _short(name: str) -> str:
    """A kernel's name; of a template's, both ends say which it is."""
    return name if len(name) <= 130 else f"{name[:60]} ... {name[-65:]}"


def stop_profile(worker: Any) -> list[tuple[str, int, float]]:
    """Name, calls and microseconds of what ran, longest first."""
    profile, device = worker.bench_profile, worker.device.type
    profile.__exit__(None, None, None)
    del worker.bench_profile
    time_of = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    found = [(_short(e.key), e.count, float(getattr(e, time_of))) for e in profile.key_averages()]
    return sorted(found, key=lambda x: -x[2])[:40]


def kernels(
    uncut: Any, cut: Any, config: dict[str, Any], given: argparse.Namespace
) -> Iterator[tuple[int, str, list[Any]]]:
    """Length, engine, and what ran, a token; the last block of the prompt, which is computed again, is among it."""
    _, tokens = given.tokens
    for length in given.lengths:
        ids = prompts(1, length - tokens - 1, config["vocab_size"], length)[0]
        for name, llm in (("uncut", uncut), ("cut", cut)):
            generate(llm, [ids], 2)  # into the prefix cache
            llm.collective_rpc(start_profile)
            generate(llm, [ids], tokens)
            ran = llm.collective_rpc(stop_profile)[0]
            yield length, name, [(what, count / tokens, us / tokens) for what, count, us in ran]


def line(row: dict[str, Any]) -> str:
    """One length, for people."""
    speed, memory = ("pass" if row[name] else "FAIL" for name in ("passed", "memory_passed"))
    return (
        f"decode at {row['length']:7d}: {row['uncut_ms']:.3f} and {row['cut_ms']:.3f} ms a token, {row['gain']:.3f} "
        f"({row['low']:.3f}-{row['high']:.3f}) of a bound of {row['bound']:.3f}, asked {row['asked']:.3f}: {speed}; "
        f"holds {row['held_bytes'] / 2**20:.2f} MiB, arithmetic {row['wanted_bytes'] / 2**20:.2f}: {memory}"
    )


def room(llm: Any, config: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Requests that decode at once where more come than fit, and tokens a second."""
    from vllm import SamplingParams

    core = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=given.room_tokens, ignore_eos=True)
    for i, ids in enumerate(prompts(given.requests, given.room_length, config["vocab_size"], 11)):
        core.add_request(str(i), {"prompt_token_ids": ids}, params)
    at_once: list[int] = []
    seen: dict[str, int] = {}
    started = time.perf_counter()
    while core.has_unfinished_requests():
        grown = 0
        for output in core.step():
            count = len(output.outputs[0].token_ids)
            grown += count > seen.get(output.request_id, 0)
            seen[output.request_id] = count
        at_once.append(grown)
    seconds = time.perf_counter() - started
    total = given.requests * (given.room_length + given.room_tokens)
    return {"most": max(at_once), "tokens_a_second": total / seconds, "seconds": seconds,
            "room_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens}  # fmt: skip


# --- engines ------------------------------------------------------------------------------------------------------------


def close(*engines: Any) -> None:
    """End engines, so that the next ones have the memory."""
    import gc

    for engine in engines:
        engine.llm.llm_engine.engine_core.shutdown()
        del engine.llm
    gc.collect()


def run(
    given: argparse.Namespace, model: str, config: dict[str, Any], device: str, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The parts that were asked for; what there is, is saved after each step."""
    import torch

    width = 2 if device == "cuda" else 4
    options: dict[str, Any] = {
        "dtype": "bfloat16" if width == 2 else "float32", "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0,
        "disable_log_stats": True, "max_num_batched_tokens": given.chunk,
        **({"load_format": "dummy"} if device == "cuda" else {"enforce_eager": True, "block_size": 32}),
        **{name: json.loads(value) for name, value in (text.split("=", 1) for text in given.option)},
    }  # fmt: skip
    flag = {"recipe": policy(config, given.full, given.sink, given.recent)}
    result: dict[str, Any] = {}
    if {"exact", "decode", "kernels"} & set(given.only):
        pair = {**options, "max_model_len": max(given.lengths) + 64, "max_num_seqs": 16}
        pair |= {"gpu_memory_utilization": given.share} if device == "cuda" else {}
        uncut, cut = Engine(model, None, pair), Engine(model, flag, pair)
        report = cut.llm.collective_rpc("headpatch_report")[0]
        result["cache"], result["checks"] = report["cache"], report["checks"]
        result["backends"] = sorted({layer["backend"] for layer in report["layers"]})
        result["graphs"] = str(cut.llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
        result["v2_runner"] = bool(getattr(cut.llm.llm_engine.vllm_config, "use_v2_model_runner", False))
        print(
            f"{result['backends']}, graphs {result['graphs']}, V2 runner {result['v2_runner']}; {report['cache']['split']}",
            flush=True,
        )
        if "exact" in given.only:
            if device == "cuda":
                for engine in (uncut, cut):
                    engine.llm.apply_model(randomise)
            result["exact"] = exact(uncut.llm, cut.llm, config, given.sink + given.recent)
            print(f"exact: {result['exact']}", flush=True)
            save(result)
        if "decode" in given.only:
            result["bandwidth"] = bandwidth(device)
            print(f"copy bandwidth {result['bandwidth'] / 1e12:.2f} TB/s", flush=True)
            result["decode"] = []
            for row in decode(uncut.llm, cut.llm, config, given, width, result["bandwidth"]):
                print(line(row), flush=True)
                result["decode"].append(row)
                save(result)
        if "kernels" in given.only:
            result["kernels"] = []
            for length, name, ran in kernels(uncut.llm, cut.llm, config, given):
                print(f"{length} tokens, {name}: {sum(us for _, _, us in ran):.0f} us a token", flush=True)
                print("\n".join(f"  {count:7.1f} x {us:8.1f} us  {what}" for what, count, us in ran[:14]), flush=True)
                result["kernels"].append({"length": length, "engine": name, "ran": ran})
                save(result)
        close(uncut, cut)
    if "room" in given.only:
        one = {**options, "max_model_len": given.room_length + given.room_tokens + 8, "max_num_seqs": 64}
        one |= (
            {"gpu_memory_utilization": given.room_share}
            if device == "cuda"
            else {"num_gpu_blocks_override": given.room_blocks}
        )
        found = {}
        flags = {"uncut": None, "cut": flag}
        for name, its_flag in ((n, flags[n]) for n in given.room_engines):
            # On a CPU the room is counted in blocks, and a block of the cut engine holds half as many heads.
            half = {"num_gpu_blocks_override": given.room_blocks * config["num_key_value_heads"] // max(given.full, 1)}
            engine = Engine(model, its_flag, one if its_flag is None or device == "cuda" else {**one, **half})
            found[name] = room(engine.llm, config, given)
            close(engine)
            print(f"room, {name}: {found[name]}", flush=True)
            save({**result, "room": found})
            if device == "cuda":
                torch.cuda.empty_cache()
        result["room"] = found
        if len(found) == 2:
            times = found["cut"]["most"] / found["uncut"]["most"]
            result["room"] = {**found, "times": times, "passed": times >= MORE}
            print(
                f"room: {times:.2f} times as many requests at once: {'pass' if times >= MORE else 'FAIL'}", flush=True
            )
    return result


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write JSON; 0 where everything that was asked for was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a config, or llama-8b; weights are dummies")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of nothing and short prompts, on a CPU: do the steps work?"
    )
    parser.add_argument("--full", type=int, default=4, help="KV heads of each layer that keep everything")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131008])
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[16, 144], help="tokens of the two requests whose difference is timed"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    parser.add_argument(
        "--share", type=float, default=0.46, help="share of the device's memory for each of two engines"
    )
    parser.add_argument("--room-share", type=float, default=0.9)
    parser.add_argument("--room-length", type=int, default=32768)
    parser.add_argument("--room-tokens", type=int, default=512)
    parser.add_argument("--room-blocks", type=int, default=60, help="blocks of the uncut engine's cache, on a CPU")
    parser.add_argument("--room-engines", nargs="+", choices=("uncut", "cut"), default=["uncut", "cut"])
    parser.add_argument("--requests", type=int, default=32, help="more than fit")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["exact", "decode", "room"])
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="engine option")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    import torch

    device = "cpu" if given.tiny else "cuda"
    if not given.tiny and (given.model is None or not torch.cuda.is_available()):
        print("not run: needs a CUDA device with vLLM, and --model (or --tiny)")
        return 0
    if given.tiny:
        given.sink, given.recent, given.lengths, given.tokens, given.pairs, given.chunk = (
            32,
            64,
            [256, 512],
            [2, 10],
            2,
            64,
        )
        given.room_length, given.room_tokens, given.requests = 400, 60, 10
    import vllm

    import headpatch
    from headpatch.adapters.vllm import register

    about = {"model": "tiny" if given.tiny else given.model, "full": given.full, "sink": given.sink, "recent": given.recent,
             "chunk": given.chunk, "device": "cpu" if given.tiny else torch.cuda.get_device_name(), "torch": torch.__version__,
             "vllm": vllm.__version__, "headpatch": headpatch.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip

    def save(found: dict[str, Any]) -> None:
        if given.out:
            given.out.write_text(json.dumps({"about": about, **found}, indent=1))

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the engines get their weights by a function
    register()  # by hand: the first engine's start says that no plugin is to be loaded, and a process is asked only once
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = str(
            tiny_model(folder) if given.tiny else llama_8b(folder) if given.model == "llama-8b" else given.model
        )
        config = json.loads((Path(model) / "config.json").read_text())
        result = run(given, model, config, device, save)
    save(result)
    checks = [result.get("exact", {}).get("passed", True), result.get("room", {}).get("passed", True)]
    checks += [row["passed"] and row["memory_passed"] for row in result.get("decode", [])]
    return 0 if given.tiny or all(checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
