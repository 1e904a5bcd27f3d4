"""The fused first-token kernel on this GPU: bandwidth against a copy's, host time of a call, torch.compile, tile sizes.

    python benchmarks/kernel_probe_gpu.py [--budget 60] [--only kernel,paged,layer,order,host,compile,tune]

A development aid, not part of `make bench`. The floor counts q and o read and the result written; heads 32/8, d 128, bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_probe import CUDA, Probe, aten, flash, graphed, ms, qkv, sdpa, sections
from torch import Tensor

from headpatch.kernels import first_token
from headpatch.kernels.first_token import merge_first_token, merge_first_token_paged
from headpatch.kernels.paged import PagedMerge

_COPY: list[float] = []


def copy_rate() -> float:
    """TB/s of a device-to-device copy of 512 MB, reads and writes counted; measured once."""
    if not _COPY:
        source = torch.randn(1 << 28, device=CUDA, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        _COPY.append(2 * source.numel() * 2 / ms(lambda: target.copy_(source)) / 1e9)
        print(f"a copy of 512 MB: {_COPY[0]:.2f} TB/s")
    return _COPY[0]


def arguments(b: int, lq: int, complement: bool) -> tuple[Any, ...]:
    """q, k, v, o, lse, gamma as an adapter has them."""
    q, k, v = qkv(b, 32, 8, lq, max(lq, 64), 128)
    rows = lq - 1 if complement and lq > 1 else lq
    o = torch.randn(b, rows, 32, 128, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
    return q, k, v, o, torch.randn(b, 32, rows, device=CUDA), torch.rand(32, device=CUDA) * 3


def rate(tokens: int, milliseconds: float) -> str:
    floor = 3 * tokens * 32 * 128 * 2 / milliseconds / 1e9
    return f"{milliseconds * 1e3:8.1f} us   {floor:5.2f} TB/s   {floor / copy_rate():5.2f} of a copy"


def kernel(probe: Probe) -> None:
    """The dense kernel."""
    print("\n== dense kernel")
    copy_rate()
    for b, n in ((1, 4096), (1, 32768), (16, 4096), (1, 1), (16, 1), (256, 1)):
        for complement, inplace in ((True, False), (False, False), (False, True)):

            def run(b: int = b, n: int = n, complement: bool = complement, inplace: bool = inplace) -> str:
                args = arguments(b, n, complement)

                def go(backend: str | None = None) -> Tensor:
                    return merge_first_token(
                        *args, scale=0.1, complement=complement, inplace=inplace, backend=backend
                    )  # fmt: skip

                text = ""
                if not inplace:
                    text = f"   vs plain torch {(go().float() - go('torch').float()).abs().max().item():.1e}"
                return rate(b * n, graphed(go) if n == 1 else ms(go, reps=9)) + text

            probe(f"{n} x {b}, {'complement' if complement else 'correction'}{', in place' if inplace else ''}", run)

    def masked() -> str:
        args = arguments(4, 4096, False)
        mask = torch.ones(4096, 4096, device=CUDA, dtype=torch.bool).tril()[None, None].expand(4, 1, -1, -1)
        first = torch.zeros(4, device=CUDA, dtype=torch.int64)
        return rate(
            4 * 4096, ms(lambda: merge_first_token(*args, scale=0.1, complement=True, mask=mask, first=first), reps=9)
        )

    probe("4096 x 4, complement, mask and first given", masked)


def paged(probe: Probe) -> None:
    """The paged kernel, in place."""
    print("\n== paged kernel, in place, 9 recipe slots")
    for rows, each in ((1, 1), (256, 1), (8, 1024), (16, 2048)):

        def run(rows: int = rows, each: int = each) -> str:
            T, blocks = rows * each, rows * 4 + 1
            q, o = (torch.randn(T, 32, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
            cache = torch.randn(blocks, 8, 16, 256, device=CUDA, dtype=torch.bfloat16)
            table = torch.arange(1, blocks, device=CUDA, dtype=torch.int32).view(rows, 4)
            start = torch.arange(rows + 1, device=CUDA, dtype=torch.int32) * each
            lens = torch.full((rows,), each + 40, device=CUDA, dtype=torch.int32)
            slot = torch.arange(blocks, device=CUDA, dtype=torch.int32) % 9
            gamma, lse = torch.rand(9, 32, device=CUDA) * 3, torch.randn(32, T, device=CUDA)

            def go(out: Tensor | None = None, backend: str | None = None) -> Tensor:
                return merge_first_token_paged(
                    q, cache[..., :128], cache[..., 128:], o, lse, gamma, scale=0.1, block_table=table,
                    query_start_loc=start, seq_lens=lens, block_slot=slot, out=out, backend=backend,
                )  # fmt: skip

            a, b = go(torch.empty_like(o)), go(torch.empty_like(o), "torch")
            error = (a.float() - b.float()).abs().max().item()
            return f"{rate(T, graphed(go))}   vs plain torch {error:.1e}"

        probe(f"{rows} rows of {each}", run)


def layer(probe: Probe) -> None:
    """What the edit adds to a layer of a serving engine: attention over a paged cache, edit, projection, again and again."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    print(
        "\n== paged decoding, us a layer in a CUDA graph of 30 and on the host, with FlashAttention 3 and a projection around it"
    )
    for name, H, K, d, hidden in (("SmolLM2", 9, 3, 64, 576), ("8B", 32, 8, 128, 4096)):
        for rows in (1, 256):
            found = _layers(flash_attn_varlen_func, H, K, d, hidden, rows)
            for which, (graph, cpu) in found.items():
                base = found["untouched"]
                text = f"{graph:7.2f} (+{graph - base[0]:5.2f})   host {cpu:7.1f} (+{cpu - base[1]:5.1f})"
                probe(f"{name} x {rows}: {which}", lambda text=text: text)


def _layers(attend: Any, H: int, K: int, d: int, hidden: int, rows: int) -> dict[str, tuple[float, float]]:
    """Microseconds a layer by kind of edit: (in a graph, on the host)."""
    length, size = 640, 16
    each = length // size
    q = torch.randn(rows, H, d, device=CUDA, dtype=torch.bfloat16)
    cache = torch.randn(rows * each + 1, K, size, 2 * d, device=CUDA, dtype=torch.bfloat16)
    keys, values = (cache[..., i * d : (i + 1) * d].transpose(1, 2) for i in range(2))
    table = torch.arange(1, rows * each + 1, device=CUDA, dtype=torch.int32).view(rows, each)
    start = torch.arange(rows + 1, device=CUDA, dtype=torch.int32)
    lens = torch.full((rows,), length - 3, device=CUDA, dtype=torch.int32)
    slot = torch.arange(len(cache), device=CUDA, dtype=torch.int32) // each % 9
    gamma, scales = torch.rand(17, H, device=CUDA) * 1.5 + 0.5, torch.rand(17, H, device=CUDA) + 0.5
    weight = torch.randn(H * d, hidden, device=CUDA, dtype=torch.bfloat16)
    o, y = torch.empty_like(q), torch.empty(rows, hidden, device=CUDA, dtype=torch.bfloat16)
    shared: dict[str, Any] = {"scale": d**-0.5, "head_scale": scales, "block_slot": slot}
    views = cache[..., :d], cache[..., d:]
    merge = PagedMerge(*views, gamma, **shared)
    more = PagedMerge(*views, gamma.repeat(3, 1), **{**shared, "head_scale": scales.repeat(3, 1)})

    def run(edit: Callable[[Tensor], Any] | None) -> Callable[[], None]:
        def step() -> None:
            _, lse = attend(
                q, keys, values, max_seqlen_q=1, cu_seqlens_q=start, max_seqlen_k=length, seqused_k=lens, block_table=table,
                softmax_scale=d**-0.5, causal=True, out=o, return_softmax_lse=True, fa_version=3,
            )  # fmt: skip
            if edit is not None:
                edit(lse)
            torch.mm(o.view(rows, H * d), weight, out=y)

        return step

    kinds: dict[str, Callable[[Tensor], Any] | None] = {
        "untouched": None,
        "Triton's front end": lambda lse: merge_first_token_paged(
            q, *views, o, lse, gamma, block_table=table, query_start_loc=start, seq_lens=lens, **shared
        ),
        "kept, rows searched": lambda lse: merge(q, o, lse, table, start, lens, False),
        "kept, one token a row": lambda lse: merge(q, o, lse, table, start, lens, True),
        "the same with 51 slots": lambda lse: more(q, o, lse, table, start, lens, True),
    }
    found = {}
    for name, edit in kinds.items():
        step = run(edit)
        graph, cpu = graphed(step, 30) * 1e3, math.inf
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(30):
                step()
            cpu = min(cpu, (time.perf_counter() - begin) / 30 * 1e6)
        found[name] = graph, cpu
    return found


def order(probe: Probe) -> None:
    """The edit's own time behind FlashAttention 3 in a prompt, by the order in which its programs go over tokens and heads.

    What attention wrote last may still lie in the second-level cache, and half of what the edit reads is just that.
    """
    print(
        "\n== paged kernel behind FlashAttention 3 in prompts: us of the edit alone, median of 20, by the order of its programs"
    )
    for name, H, K, d, hidden, rows, each in (
        ("8B, 16 x 512", 32, 8, 128, 4096, 16, 512),
        ("8B, 1 x 7680", 32, 8, 128, 4096, 1, 7680),
        ("SmolLM2, 16 x 512", 9, 3, 64, 576, 16, 512),
    ):
        for which, changes in VARIANTS.items():
            probe(f"{name}: {which}", lambda s=(H, K, d, hidden, rows, each), x=changes: _behind(*s, x))


NUMBER = "    pid = tl.program_id(0)\n    r = tl.arange(0, BT * GB)\n"
_LAST = "    pid = tl.num_programs(0) - 1 - pid\n"
_TOKENS = "tl.cdiv(n_tokens, BT)"
_HEADS = f"    pid = pid % ({_TOKENS}) * (KH * ((G + GB - 1) // GB)) + pid // ({_TOKENS})\n"
READ = "q = tl.load(Q + at_q, mask=look[:, None] & (d < D)[None, :], other=0.0"
WRITE = "        mask=write[:, None] & (dv < DV)[None, :],\n    )  # fmt: skip"
VARIANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "as it is": (),
    "last tokens first": ((NUMBER, NUMBER.replace("    r =", _LAST + "    r =")),),
    "head by head": ((NUMBER, NUMBER.replace("    r =", _HEADS + "    r =")),),
    "head by head, last first": ((NUMBER, NUMBER.replace("    r =", _LAST + _HEADS + "    r =")),),
    "queries read once": ((READ, READ + ', eviction_policy="evict_first"'),),
    "queries read once, results streamed": (
        (READ, READ + ', eviction_policy="evict_first"'),
        (WRITE, WRITE.replace("\n    )", ' cache_modifier=".cs",\n    )')),
    ),
}
"""What is put where in the kernel's source."""


def _behind(H: int, K: int, d: int, hidden: int, rows: int, each: int, changes: tuple[tuple[str, str], ...]) -> str:
    """Run one variant of the kernel in a layer and read its time from the profiler."""
    from torch.profiler import ProfilerActivity, profile
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from headpatch.kernels import _triton

    source = Path(_triton.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"variant_{abs(hash(source))}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        variant = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = variant
        spec.loader.exec_module(variant)
        kept, _triton.paged = _triton.paged, variant.paged
        try:
            run = _layer(flash_attn_varlen_func, H, K, d, hidden, rows, each)
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                for _ in range(20):
                    run()
                torch.cuda.synchronize()
        finally:
            _triton.paged = kept
    times = [e.device_time for e in trace.events() if e.name.startswith("paged")]
    size = 3 * rows * each * H * d * 2
    middle = statistics.median(times)
    return f"{middle:7.2f} us ({min(times):.2f}-{max(times):.2f})   {size / middle / 1e6:5.2f} TB/s"


def _layer(attend: Any, H: int, K: int, d: int, hidden: int, rows: int, each: int) -> Callable[[], None]:
    """Attention over a paged cache, edit, projection, for prompts."""
    size, T = 16, rows * each
    blocks = -(-each // size)
    q = torch.randn(T, H, d, device=CUDA, dtype=torch.bfloat16)
    cache = torch.randn(rows * blocks + 1, K, size, 2 * d, device=CUDA, dtype=torch.bfloat16)
    keys, values = (cache[..., i * d : (i + 1) * d].transpose(1, 2) for i in range(2))
    table = torch.arange(1, rows * blocks + 1, device=CUDA, dtype=torch.int32).view(rows, blocks)
    start = torch.arange(rows + 1, device=CUDA, dtype=torch.int32) * each
    lens = torch.full((rows,), each, device=CUDA, dtype=torch.int32)
    slot = torch.arange(rows, device=CUDA, dtype=torch.int32) % 9
    gamma, scales = torch.rand(17, H, device=CUDA) * 1.5 + 0.5, torch.rand(17, H, device=CUDA) + 0.5
    weight = torch.randn(H * d, hidden, device=CUDA, dtype=torch.bfloat16)
    o, y = torch.empty_like(q), torch.empty(T, hidden, device=CUDA, dtype=torch.bfloat16)
    merge = PagedMerge(
        cache[..., :d], cache[..., d:], gamma, scale=d**-0.5, head_scale=scales, row_slot=slot, rows=256
    )

    def run() -> None:
        _, lse = attend(
            q, keys, values, max_seqlen_q=each, cu_seqlens_q=start, max_seqlen_k=each, seqused_k=lens, block_table=table,
            softmax_scale=d**-0.5, causal=True, out=o, return_softmax_lse=True, fa_version=3,
        )  # fmt: skip
        merge(q, o, lse, table, start, lens)
        torch.mm(o.view(T, H * d), weight, out=y)

    return run


def host(probe: Probe) -> None:
    """What a call costs the host: what counts in plain eager decoding."""
    print("\n== host time of one call, us (decode shape, device idle)")
    q, k, v, o, lse, gamma = arguments(1, 1, True)
    kw: dict[str, Any] = {"scale": 0.1, "complement": True}

    def both() -> Tensor:
        a, b = flash(q, k[:, :, 1:], v[:, :, 1:], None, False, 0.1)
        return merge_first_token(q, k, v, a, b, gamma, **kw)

    calls: dict[str, Callable[[], Any]] = {
        "F.sdpa + transpose + contiguous": lambda: sdpa(q, k, v, None, False, 0.1).transpose(1, 2).contiguous(),
        "aten flash on [1:]": lambda: flash(q, k[:, :, 1:], v[:, :, 1:], None, False, 0.1),
        "merge_first_token": lambda: merge_first_token(q, k, v, o, lse, gamma, **kw),
        "merge_first_token, in place": lambda: merge_first_token(q, k, v, o, lse, gamma, inplace=True, **kw),
        "the same in plain torch": lambda: merge_first_token(q, k, v, o, lse, gamma, backend="torch", **kw),
        "aten flash on [1:] + merge": both,
    }
    for name, call in calls.items():

        def timed(call: Callable[[], Any] = call) -> str:
            for _ in range(20):
                call()
            best = math.inf
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    call()
                best = min(best, (time.perf_counter() - start) / 100)
            return f"{best * 1e6:8.1f} us"

        probe(name, timed)


def compiled(probe: Probe) -> None:
    """One graph, inlined, equal numbers; also under CUDA graphs."""
    print("\n== torch.compile(fullgraph=True), flash + merge")

    def f(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        s = 1 if q.shape[2] > 1 else 0
        q = q * 1.0
        o, lse, *_ = aten._scaled_dot_product_flash_attention(
            q[:, :, s:], k[:, :, 1:], v[:, :, 1:], 0.0, s == 1, False, scale=0.1
        )
        return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True) * 1.0

    for mode in ("default", "reduce-overhead"):
        for n in (1, 256):

            def run(mode: str = mode, n: int = n) -> str:
                q, k, v, _, _, gamma = arguments(1, n, True)
                torch._dynamo.reset()
                g = torch.compile(f, fullgraph=True, mode=mode)
                for _ in range(3):
                    got = g(q, k, v, gamma).clone()
                error = (got.float() - f(q, k, v, gamma).float()).abs().max().item()
                return f"difference {error:.1e}, {ms(lambda: g(q, k, v, gamma)) * 1e3:.1f} us a call"

            probe(f"{n} queries, mode {mode}", run)


def tune(probe: Probe) -> None:
    """Tile sizes and threads of the dense kernel, long prompt."""
    print("\n== tile (elements a program) x elements a thread, 32768 x 1 complement")
    kept = first_token._TILE, first_token._PER_THREAD
    args = arguments(1, 32768, True)
    for tile in (2048, 4096, 8192):
        for each in (16, 32, 64):

            def run(tile: int = tile, each: int = each) -> str:
                first_token._TILE, first_token._PER_THREAD = tile, each
                first_token.tile.cache_clear()
                return rate(32768, ms(lambda: merge_first_token(*args, scale=0.1, complement=True), reps=9))

            probe(f"tile {tile}, {each} a thread", run)
    first_token._TILE, first_token._PER_THREAD = kept
    first_token.tile.cache_clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds, start-up included")
    parser.add_argument("--only", default="", help="comma-separated sections")
    args = parser.parse_args()
    table = {
        "kernel": kernel,
        "paged": paged,
        "layer": layer,
        "order": order,
        "host": host,
        "compile": compiled,
        "tune": tune,
    }
    sections(table, args.only, args.budget)
