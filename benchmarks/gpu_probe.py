"""Shared by the two GPU probes: one line a probe whatever happens in it, timers, and the attention sources that say their LSE."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CUDA = torch.device("cuda")
aten = torch.ops.aten
START = time.perf_counter()
Source = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, mask, causal, scale) -> o [b, H, lq, d], L [b, H, lq or more]."""


class Probe:
    """Prints one line per probe; an error is printed as its first line; nothing more is run past the budget."""

    def __init__(self, budget: float) -> None:
        self.budget = budget

    def __call__(self, name: str, run: Callable[[], str]) -> None:
        if time.perf_counter() - START > self.budget:
            print(f"{name:<60} skipped: out of time", flush=True)
            return
        try:
            text = run()
            torch.cuda.synchronize()
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"{type(error).__name__}: {first[:110]}"
        print(f"{name:<60} {text}", flush=True)


def sections(table: dict[str, Callable[[Probe], None]], only: str, budget: float) -> None:
    """Run the sections named in `only`, each on its own."""
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, cudnn {torch.backends.cudnn.version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
    probe = Probe(budget)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in only.split(",") if only else table:
            try:
                table[name](probe)
            except Exception as error:  # a section's own set-up
                print(f"section {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - START:.0f} s")


def ms(run: Callable[[], Any], reps: int = 15, warm: int = 3) -> float:
    """Median milliseconds between two events around one call."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def graphed(run: Callable[[], Any], calls: int = 20) -> float:
    """Milliseconds of one call inside a replayed CUDA graph of `calls`: device time without launch gaps."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return ms(graph.replay, reps=9, warm=2) / calls


def qkv(
    b: int, H: int, K: int, lq: int, lk: int, d: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """As a transformers layer hands them over: q (and v of a prompt) transposed views of [b, l, H, d], a cache contiguous."""
    q = torch.randn(b, lq, H, d, device=CUDA, dtype=dtype).transpose(1, 2)
    k = torch.randn(b, K, lk, d, device=CUDA, dtype=dtype)
    if lk == lq:
        return q, k, torch.randn(b, lk, K, d, device=CUDA, dtype=dtype).transpose(1, 2)
    return q, k, torch.randn(b, K, lk, d, device=CUDA, dtype=dtype)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """repeat_kv."""
    b, K, n, d = x.shape
    G = q.shape[1] // K
    return x if G == 1 else x[:, :, None].expand(b, K, G, n, d).reshape(b, K * G, n, d)


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float
) -> tuple[Tensor, Tensor]:
    """fp32 attention and LSE; `causal` is '', 'top' (left) or 'bottom' (right)."""
    s = q.float() @ repeated(k.float(), q).transpose(2, 3) * scale
    if causal:
        lq, lk = s.shape[-2:]
        seen = torch.ones(lq, lk, dtype=torch.bool, device=CUDA).tril(0 if causal == "top" else lk - lq)
        s = s.masked_fill(~seen, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.float()
    return s.softmax(-1) @ repeated(v.float(), q), s.logsumexp(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As transformers calls it: grouped heads without a mask, repeated ones with."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, repeated(k, q), repeated(v, q), mask, scale=scale)


def choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str:
    """Which kernel SDPA takes."""
    if mask is not None:
        k, v = repeated(k, q), repeated(v, q)
    code = int(torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=0.1, enable_gqa=mask is None))
    return {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(code, str(code))


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    assert mask is None, "flash takes no mask"
    o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return o, lse


def raw_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """aten._flash_attention_forward on [b, l, H, d], dense."""
    assert mask is None, "flash takes no mask"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
    return o.transpose(1, 2), lse


def efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """No repeat_kv: shows whether it takes grouped heads."""
    o, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, causal, scale=scale)
    return o, lse


def efficient_repeat(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return efficient(q, repeated(k, q), repeated(v, q), mask, causal, scale)


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, causal, False, scale=scale)
    return o, lse.squeeze(-1) if lse.dim() == 4 else lse


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    assert mask is None, "varlen takes no mask"
    (b, H, lq, d), (K, lk) = q.shape, k.shape[1:3]
    flat = [x.transpose(1, 2).reshape(-1, n, d) for x, n in ((q, H), (k, K), (v, K))]
    cq, ck = (torch.arange(b + 1, device=CUDA, dtype=torch.int32) * n for n in (lq, lk))
    kw: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    kw |= {"return_aux": AuxRequest(lse=True), "scale": scale}
    try:
        o, lse = varlen_attn(*flat, cq, ck, lq, lk, enable_gqa=True, **kw)
    except TypeError:  # torch 2.11 has no enable_gqa
        o, lse = varlen_attn(*flat, cq, ck, lq, lk, **kw)
    lse = lse.T if lse.shape[0] == H else lse  # [H, T] or [T, H]
    return o.view(b, lq, H, d).transpose(1, 2), lse.reshape(b, lq, H).transpose(1, 2)


_FLEX: dict[str, Any] = {}


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    assert mask is None, "not probed with a mask"
    compiled = _FLEX.setdefault("f", torch.compile(flex_attention, dynamic=False))
    block = None
    if causal:
        key = f"{q.shape[2]}.{k.shape[2]}"
        if key not in _FLEX:
            _FLEX[key] = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=CUDA)
        block = _FLEX[key]
    grouped = q.shape[1] != k.shape[1]
    o, aux = compiled(q, k, v, scale=scale, enable_gqa=grouped, block_mask=block, return_aux=AuxRequest(lse=True))
    return o, aux.lse


def folded(source: Source) -> Source:
    """One query per row: the G heads of a group as G rows of queries, so that K and V need no repeat."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        b, H, lq, d = q.shape
        assert lq == 1, "folds one query only"
        K = k.shape[1]
        if mask is not None:
            mask = mask.expand(b, K, H // K, mask.shape[-1])
        o, lse = source(q.reshape(b, K, H // K, d), k, v, mask, False, scale)
        return o.reshape(b, H, 1, d), lse[..., : H // K].reshape(b, H, 1)

    return run


SOURCES: dict[str, Source] = {
    "flash": flash, "raw_flash": raw_flash, "varlen": varlen, "cudnn": cudnn, "efficient": efficient,
    "efficient+repeat": efficient_repeat,
}  # fmt: skip
