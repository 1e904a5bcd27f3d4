"""Memory and decoding speed of transformers under duo_attention, half and a quarter of the KV heads keeping every token.

    python benchmarks/bench_kv.py                    # on the GPU if there is one, else on the CPU
    python benchmarks/bench_kv.py --device cuda --lengths 8192,32768 --only static
    python benchmarks/bench_kv.py --quick            # three pairs, an eighth of the length

On the CPU: the cache of SmolLM2 (30 layers, 3 KV heads of width 64, fp32) at 8k, in a model that is narrow everywhere else, so that
a machine of two cores gets through it; random weights. On a GPU: the 8B shape (bf16, random weights) at 8k, 32k and 128k, prefilled
in chunks; decoding eager on a dynamic cache, and compiled on a static one with CUDA graphs.

Memory is the storage of every tensor that a prompt and some steps leave behind, spare slots included, against

    2 d s sum over layers of (F T + W min(T, sink + recent))

bytes (T tokens, F KV heads that keep all, W others, width d, s bytes per number); allowed are 3 % more, and the 256 tokens by
which the storage of the F heads grows. The peak of a prefill is what the allocator gave out above weights and what was there before.
A step can be faster by (weights + cache) / (weights + smaller cache) at most: that is the bound b beside the speed-up s, and the time
that a copy of this machine's bandwidth needs for the bytes stands beside it. (Eager decoding can go beyond it: transformers' dynamic
cache copies all of itself in every step, ours does not.) Promised on a GPU with static caches:
s - 1 >= 0.85 (b - 1) at 128k, >= 0.6 (b - 1) at 32k, s >= 0.97 at 8k. Writes benchmarks/results/kv_cpu.* or kv_cuda.*.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_hf import SHAPE_8B, allocated_peak, build_8b, twin
from common import PAIRS, RESULTS, Row, alternate, machine, write
from kv_shapes import bandwidth, weight_bytes
from torch import Tensor
from transformers import DynamicCache, StaticCache

import headpatch

SMOLLM2_CACHE = {
    "hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 128,
}  # fmt: skip
SINK, RECENT, BLOCK = 64, 256, 256
SHARES = {"half": 0.5, "a quarter": 0.25}
PROMISED = {131072: 0.85, 32768: 0.6}
STEPS = 8


@dataclass
class Held:
    """What one cache takes: bytes by arithmetic, allowed for growth, and measured; peaks of a prefill in one piece and in chunks."""

    name: str
    tokens: int
    exact: int
    growth: int
    found: int
    untouched: int
    peak: float
    peak_untouched: float
    chunk: int

    @property
    def verdict(self) -> str:
        return "pass" if self.exact <= self.found <= 1.03 * self.exact + self.growth else "FAIL"


def full_heads(layers: int, heads: int, share: float) -> dict[int, tuple[int, ...]]:
    """KV heads that keep every token, spread evenly over all."""
    chosen: dict[int, tuple[int, ...]] = dict.fromkeys(range(layers), ())
    for i in range(layers * heads):
        if int((i + 1) * share) > int(i * share):
            layer, head = divmod(i, heads)
            chosen[layer] = (*chosen[layer], head)
    return chosen


def recipe(full: dict[int, tuple[int, ...]]) -> dict[str, Any]:
    """These heads keep every token, all others a window."""
    listed = [f"{layer}.{head}" for layer, heads in full.items() for head in heads]
    patch = {"method": "duo_attention", "full_kv_heads": listed, "sink": SINK, "recent": RECENT}
    return {"headpatch": 1, "patches": [patch]}


def storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Every tensor storage on the device that is alive, by address. As long as this is kept, nothing new comes to lie there."""
    gc.collect()
    alive = [
        x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == device.type
    ]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in alive}


class Bench:
    """One model untouched, and twins of it on the same weights under each share of full heads."""

    def __init__(self, model: Any, device: torch.device, args: argparse.Namespace, name: str, chunk: int) -> None:
        self.device, self.plain, self.name, self.chunk = device, model, name, chunk
        self.pairs, self.seed = 3 if args.quick else PAIRS, args.seed
        config = model.config
        self.width = next(model.parameters()).element_size()
        self.full = {
            label: full_heads(config.num_hidden_layers, config.num_key_value_heads, share) for label, share in SHARES.items()
        }  # fmt: skip
        self.patched = {}
        for label, full in self.full.items():
            self.patched[label] = twin(model)
            headpatch.apply(self.patched[label], recipe(full))
        self.rows: list[Row] = []
        self.held: list[Held] = []
        self.notes: list[str] = []
        self.speed = bandwidth(device.type)
        self.notes.append(f"{name}: a copy moves {self.speed / 1e9:.1f} GB/s, read and written")

    def bytes(self, tokens: int, full: dict[int, tuple[int, ...]] | None) -> int:
        """Bytes of keys and values by arithmetic."""
        config = self.plain.config
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        kept = heads * layers * tokens
        if full is not None:
            kept = sum(len(h) * tokens + (heads - len(h)) * min(tokens, SINK + RECENT) for h in full.values())
        return 2 * self.width * config.head_dim * kept

    def ids(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(5, self.plain.config.vocab_size, (1, length), generator=generator).to(self.device)

    def filled(self, model: Any, length: int, cache: Any = None, chunk: int = 0) -> Any:
        """A cache with `length` tokens."""
        cache = DynamicCache(config=model.config) if cache is None else cache
        ids, chunk = self.ids(length), chunk or self.chunk
        for i in range(0, length, chunk):
            model(ids[:, i : i + chunk], past_key_values=cache, logits_to_keep=1)
        return cache

    def peak(self, run: Callable[[], Any]) -> float:
        """Peak bytes during one call, above what was there before."""
        gc.collect()
        if self.device.type == "cpu":
            return float(allocated_peak(run))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def memory(self, length: int, chunks: tuple[int, ...]) -> None:
        """Storage and peaks, by share of full heads and length of the prompt's pieces."""
        for model in self.patched.values():
            self.filled(model, 1024)  # masks that are made once
        for chunk in chunks:
            untouched = self.peak(lambda chunk=chunk: self.filled(self.plain, length, chunk=chunk))
            for label, model in self.patched.items():
                before, made = storages(self.device), []
                peak = self.peak(
                    lambda model=model, made=made, chunk=chunk: made.append(self.filled(model, length, chunk=chunk))
                )
                for _ in range(3):
                    model(self.ids(1), past_key_values=made[0])
                new = [s.nbytes() for at, s in storages(self.device).items() if at not in before]
                found = sum(n for n in new if n > 4096)
                full = self.full[label]
                growth = 2 * self.width * self.plain.config.head_dim * BLOCK * sum(map(len, full.values()))
                tokens = length + 3
                self.held.append(
                    Held(f"{self.name}, {label} of the heads full", tokens, self.bytes(tokens, full), growth, found,
                         self.bytes(tokens, None), peak, untouched, chunk)
                )  # fmt: skip
                print(self.held[-1], self.held[-1].verdict, flush=True)
                del made, before

    def weights(self) -> int:
        """Bytes of weights that a step reads."""
        config = self.plain.config
        known = {k: getattr(config, k) for k in ("hidden_size", "num_key_value_heads", "num_attention_heads", "head_dim",
                 "intermediate_size", "num_hidden_layers", "vocab_size")}  # fmt: skip
        return weight_bytes(known, self.width)

    def row(self, label: str, how: str, length: int, runs: list[Callable[[], None]], static: bool, warm: int) -> None:
        """One comparison with its bound."""
        sizes = [self.weights() + self.bytes(length, full) for full in (None, self.full[label])]
        bound = sizes[0] / sizes[1]
        row = alternate(
            f"{self.name}, {label} of the heads full: decode at {length}, {how}", *runs, self.device, per=STEPS, warm=warm,
            pairs=self.pairs,
        )  # fmt: skip
        speedup, share = 1 / row.ratio, (1 / row.ratio - 1) / (bound - 1)
        floors = [f"{size / self.speed * 1e3:.2f}" for size in sizes]
        row.notes = f"speed-up {speedup:.2f}, at most {bound:.2f}: {100 * share:.0f} % of what is to be gained; a read of the bytes "
        row.notes += f"takes {floors[0]} and {floors[1]} ms"
        if static and self.device.type == "cuda":
            least = 1 + PROMISED[length] * (bound - 1) if length in PROMISED else 0.97
            row.bound = 1 / least
        self.rows.append(row)
        print(f"{row.name}: {row.ratio:.3f} ({row.low:.3f}-{row.high:.3f}) {row.notes}", flush=True)

    def decode_eager(self, length: int) -> None:
        """Plain eager decoding on dynamic caches, which grow by some tokens meanwhile."""
        token = self.ids(1)
        plain = self.filled(self.plain, length)
        for label, model in self.patched.items():
            caches = [plain, self.filled(model, length)]

            def runs(which: int, model: Any = model, caches: list[Any] = caches) -> Callable[[], None]:
                def run() -> None:
                    for _ in range(STEPS):
                        (model if which else self.plain)(token, past_key_values=caches[which])

                return run

            self.row(label, "eager, dynamic cache", length, [runs(0), runs(1)], False, 2)

    def decode_static(self, length: int) -> None:
        """Compiled decoding on static caches, as generate() does it: CUDA graphs, the mask made outside. Half of the heads only:
        that is what is promised, and compilation takes long."""
        token, room = self.ids(1), length + 512
        for label, patched in [*self.patched.items()][:1]:
            torch._dynamo.reset()
            runs = []
            for model in (self.plain, patched):
                cache = self.filled(model, length, StaticCache(config=model.config, max_cache_len=room))
                mode = "reduce-overhead" if self.device.type == "cuda" else None
                step = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)
                mask = torch.zeros(1, 1, 1, room, dtype=torch.bool, device=self.device)
                mask[..., : length + 1] = True
                position = torch.full((1, 1), length, device=self.device)

                def run(
                    step: Any = step, cache: Any = cache, mask: Tensor = mask, position: Tensor = position
                ) -> None:
                    for _ in range(STEPS):
                        torch.compiler.cudagraph_mark_step_begin()
                        step(token, attention_mask=mask, position_ids=position, past_key_values=cache)
                    for layer in cache.layers:
                        getattr(layer, "counter", getattr(layer, "cumulative_length", None)).fill_(length)

                runs.append(run)
            self.row(label, "static cache, torch.compile", length, runs, True, 3)


def measure(args: argparse.Namespace) -> None:
    """Everything that the device is for, written after each job."""
    device = torch.device(args.device)
    if args.device == "cpu":
        length = 1024 if args.quick else 8192
        bench = Bench(
            build_8b(30, device, torch.float32, args.seed, **SMOLLM2_CACHE), device, args, "SmolLM2's cache", length
        )
        jobs = [
            lambda: bench.memory(length, (length,)),
            lambda: bench.decode_eager(length),
            lambda: bench.memory(length, (1024,)),
        ]
    else:
        lengths = [int(n) for n in args.lengths.split(",")]
        shape = {**SHAPE_8B, "max_position_embeddings": max(lengths) + 1024, "head_dim": 128}
        bench = Bench(
            build_8b(args.layers, device, torch.bfloat16, args.seed, **shape), device, args, "8B shape", 8192
        )
        parts = {
            "memory": lambda n: bench.memory(n, (8192,)), "static": bench.decode_static, "eager": bench.decode_eager,
        }  # fmt: skip
        # Memory before anything is compiled: CUDA graphs keep and give back storage that nobody here sees. Then whole lengths, one
        # after the other: a machine that is taken back has shown something.
        wanted = args.only.split(",")
        order = [("memory", n) for n in lengths] + [(name, n) for n in lengths for name in ("static", "eager")]
        jobs = [partial(parts[name], n) for name, n in order if name in wanted]
    for i, job in enumerate(jobs):
        try:
            job()
        except Exception as error:  # a benchmark that stops half-way has measured nothing
            bench.notes.append(f"job {i} failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            print(bench.notes[-1], flush=True)
        save(bench, args)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def held_table(held: list[Held]) -> str:
    """Markdown; MiB."""
    lines = [
        "| cache | tokens | arithmetic | measured | of untouched | prompt in pieces of | peak of prefill | untouched | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for h in held:
        exact, found, peak, plain = (f"{x / 2**20:.1f}" for x in (h.exact, h.found, h.peak, h.peak_untouched))
        lines.append(
            f"| {h.name} | {h.tokens} | {exact} MiB | {found} MiB ({100 * (h.found / h.exact - 1):+.1f} %) | "
            f"{h.found / h.untouched:.3f} | {h.chunk} | {peak} MiB | {plain} MiB | {h.verdict} |"
        )
    return "\n".join(lines)


def save(bench: Bench, args: argparse.Namespace) -> None:
    """Write both files as far as they have come."""
    about = {**machine(torch.device(args.device)), "seed": args.seed, "sink": SINK, "recent": RECENT}
    stem = f"kv_{args.device}{'_quick' if args.quick else ''}"
    write(stem, bench.rows, about, bench.notes, args.out)
    path = args.out / f"{stem}.json"
    data = json.loads(path.read_text()) | {"memory": [{**asdict(h), "verdict": h.verdict} for h in bench.held]}
    path.write_text(json.dumps(data, indent=1) + "\n")
    page = args.out / f"{stem}.md"
    page.write_text(f"{page.read_text()}\n## Memory\n\n{held_table(bench.held)}\n")
    print(f"\n{held_table(bench.held)}")


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="8192,32768,131072", help="prompts of the GPU's part, comma-separated")
    parser.add_argument("--only", default="memory,static,eager", help="parts of the GPU's part, comma-separated")
    parser.add_argument("--layers", type=int, default=32, help="layers of the 8B shape (CUDA only)")
    parser.add_argument("--quick", action="store_true", help="three pairs; on the CPU 1,024 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with torch.no_grad():
        measure(args)


if __name__ == "__main__":
    main()
