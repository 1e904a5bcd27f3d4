"""Which attention kernels give a log-sum-exp on this GPU, whether it is right, and what they cost.

    python benchmarks/lse_probe_gpu.py [--budget 90] [--only right,prefill,decode]

A development aid, not part of `make bench`. Every probe stands alone: an error is printed as its first line and the next one
runs; past --budget seconds the rest is skipped. Errors are against fp32: `o` relative to the largest element, `L` absolute.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_probe import (
    CUDA,
    SOURCES,
    Probe,
    Source,
    aten,
    choice,
    cudnn,
    efficient,
    efficient_repeat,
    flash,
    flex,
    folded,
    graphed,
    ms,
    qkv,
    reference,
    sdpa,
    sections,
)  # fmt: skip
from torch import Tensor

from headpatch.kernels.first_token import merge_first_token


def check(
    probe: Probe, name: str, source: Source, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> None:
    """One line: errors of o and L, the shape of L, and what rows that see nothing report."""

    def run() -> str:
        scale, lq = q.shape[-1] ** -0.5, q.shape[2]
        o, lse = source(q, k, v, mask, causal, scale)
        shape, lse = tuple(lse.shape), lse[..., :lq].float()
        ways = ["bottom", "top"] if causal and lq != k.shape[2] else ["top" if causal else ""]
        said = []
        for way in ways:
            want, level = reference(q, k, v, mask, way, scale)
            seen = level > -1e4
            e = ((o.float() - want).abs().amax(-1)[seen].max() / want[seen].abs().max()).item()
            text = f"{way + ' ' if len(ways) > 1 else ''}{e:.1e} / {(lse - level)[seen].abs().max().item():.1e}"
            if not seen.all():
                text += f", empty rows: o {o.float().amax(-1)[~seen][0]:.3g} L {lse[~seen][0]:.3g}"
            said.append(text)
        return f"{'; '.join(said)} / {shape}"

    probe(name, run)


def right(probe: Probe) -> None:
    """Correctness of every source in the situations that an adapter meets."""
    print("\n== right: o error / LSE error / LSE shape")
    for name in SOURCES:
        unmasked(probe, name)
    for name in ("cudnn", "efficient", "efficient+repeat"):
        masked(probe, name)
    for d in (64, 80, 96, 256):
        q, k, v = qkv(2, 8, 2, 300, 300, d)
        for name in ("flash", "cudnn", "efficient+repeat"):
            check(probe, f"{name}: d {d}, slices", SOURCES[name], q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, True)
    q, k, v = qkv(2, 8, 2, 300, 300, 128, torch.float32)
    check(probe, "efficient+repeat: fp32", efficient_repeat, q, k, v, None, True)
    q, k, v = qkv(2, 8, 2, 1, 1001, 128)
    check(probe, "flash: decode, folded", folded(flash), q, k[:, :, 1:], v[:, :, 1:], None, False)


def unmasked(probe: Probe, name: str) -> None:
    source = SOURCES[name]
    q, k, v = qkv(2, 8, 2, 300, 300, 128)
    check(probe, f"{name}: grouped, causal", source, q, k, v, None, True)
    check(probe, f"{name}: complement slices [1:]", source, q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, True)
    check(probe, f"{name}: causal, lq 40 < lk 300 (which corner?)", source, q[:, :, -40:], k, v, None, True)
    q, k, v = qkv(2, 8, 2, 1, 1001, 128)
    check(probe, f"{name}: decode, k[:, :, 1:]", source, q, k[:, :, 1:], v[:, :, 1:], None, False)


def masked(probe: Probe, name: str) -> None:
    source, (b, H, n) = SOURCES[name], (2, 8, 300)
    pad = torch.tensor([0, 37], device=CUDA)
    mask = (torch.arange(1000, device=CUDA) >= pad[:, None])[:, None, None]
    q, k, v = qkv(b, H, 2, 1, 1000, 128)
    q1, k1, v1 = q, k[:, :, 1:], v[:, :, 1:]
    low = torch.finfo(q.dtype).min
    bias = torch.zeros(mask.shape, device=CUDA, dtype=q.dtype).masked_fill_(~mask, low)
    check(probe, f"{name}: decode, bool mask", source, q, k, v, mask.expand(b, H, 1, 1000), False)
    check(probe, f"{name}: decode, bool mask, folded", folded(source), q, k, v, mask, False)
    check(probe, f"{name}: decode, bool mask, 999 keys", source, q1, k1, v1, mask[..., 1:].expand(b, H, 1, 999), False)
    check(probe, f"{name}: decode, bias, stride 0", source, q, k, v, bias.expand(b, H, 1, 1000), False)
    check(probe, f"{name}: decode, bias, folded", folded(source), q, k, v, bias, False)
    check(
        probe, f"{name}: decode, bias [1:] (unaligned)", source, q1, k1, v1, bias[..., 1:].expand(b, H, 1, 999), False
    )
    room = bias[..., :999].expand(b, H, 1, 999)
    check(probe, f"{name}: decode, bias 999 in rows of 1000", source, q1, k1, v1, room, False)
    tight = bias[..., 1:].contiguous().expand(b, H, 1, 999)
    check(probe, f"{name}: decode, bias 999, contiguous", source, q1, k1, v1, tight, False)
    q, k, v = qkv(b, H, 2, n, n, 128)
    at = torch.arange(n, device=CUDA)
    causal = ((at[None] <= at[:, None]) & (at >= pad[:, None, None]))[:, None]
    check(probe, f"{name}: left-padded bool, empty rows", source, q, k, v, causal.expand(b, H, n, n), False)
    for word, value in (("min", low), ("inf", -math.inf)):
        wide = torch.zeros(b, 1, n, 304, device=CUDA, dtype=q.dtype)[..., :n].masked_fill_(~causal, value)
        check(probe, f"{name}: left-padded bias {word}, empty rows", source, q, k, v, wide.expand(b, H, n, n), False)


Timer = Callable[[Callable[[], Any]], float]


def baseline(
    probe: Probe, name: str, timer: Timer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> float:
    """Time of what transformers does untouched; the line says which kernel SDPA chose."""
    found = [math.nan]

    def run() -> str:
        found[0] = timer(lambda: sdpa(q, k, v, mask, causal, 0.1).transpose(1, 2).contiguous())
        return f"{found[0]:8.3f} ms = 1   ({choice(q, k, v, mask, causal)}{', repeat_kv' if mask is not None else ''})"

    probe(f"{name}: F.sdpa as transformers calls it", run)
    return found[0]


def against(probe: Probe, name: str, timer: Timer, base: float, run: Callable[[], Any]) -> None:
    def timed() -> str:
        t = timer(run)
        return f"{t:8.3f} ms   {t / base:6.3f}"

    probe(name, timed)


def prefill(probe: Probe) -> None:
    """Sources with and without the merge, beside SDPA."""
    print("\n== prefill, 32/8 heads, d 128, bf16: device ms and ratio to untouched SDPA")
    for b, n, reps in ((1, 4096, 15), (4, 4096, 9), (1, 32768, 5)):
        prefill_at(probe, b, n, reps)
    q, k, v = qkv(1, 32, 8, 4096, 4096, 128)
    base = baseline(probe, "4096 x 1", ms, q, k, v, None, True)
    mask = torch.ones(4096, 4096, device=CUDA, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1).clone()
    mask[0, :, :, :1024] = False
    p, x, y = qkv(2, 32, 8, 4096, 4096, 128)
    padded = baseline(probe, "4096 x 2, left-padded", ms, p, x, y, mask, False)
    bias = torch.zeros(mask.shape, device=CUDA, dtype=p.dtype).masked_fill_(~mask, torch.finfo(p.dtype).min)
    for word, m in (("bool", mask), ("bias", bias)):
        for name in ("cudnn", "efficient+repeat"):
            against(
                probe, f"4096 x 2, left-padded: {name}, {word}", ms, padded,
                lambda f=SOURCES[name], m=m: f(p, x, y, m.expand(2, 32, -1, -1), False, 0.1),
            )  # fmt: skip
    against(probe, "4096 x 1: flex (compiled)", ms, base, lambda: flex(q, k, v, None, True, 0.1))


def prefill_at(probe: Probe, b: int, n: int, reps: int) -> None:
    def timer(run: Callable[[], Any]) -> float:
        return ms(run, reps)

    gamma = torch.full((32,), 0.5, device=CUDA)
    q, k, v = qkv(b, 32, 8, n, n, 128)
    base = baseline(probe, f"{n} x {b}", timer, q, k, v, None, True)
    for name in ("flash", "cudnn", "varlen", "efficient+repeat"):
        f = SOURCES[name]

        def complement(f: Source = f) -> Tensor:
            o, lse = f(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, True, 0.1)
            return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True)

        def correction(f: Source = f) -> Tensor:
            o, lse = f(q, k, v, None, True, 0.1)
            return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=False, inplace=True)

        against(probe, f"{n} x {b}: {name}", timer, base, lambda f=f: f(q, k, v, None, True, 0.1))
        if name in ("flash", "cudnn"):
            against(probe, f"{n} x {b}: {name}, complement + merge", timer, base, complement)
            against(probe, f"{n} x {b}: {name}, correction in place", timer, base, correction)


def decode(probe: Probe) -> None:
    """One query at 16k keys; then steps with growing keys, where plans made per shape would show."""
    print("\n== decode at 16k, 32/8 heads, d 128, bf16: ms inside a CUDA graph and ratio to untouched SDPA")
    for b in (1, 16):
        decode_at(probe, b)
        static_at(probe, b)
    q, k, v = qkv(1, 32, 8, 1, 4200, 128)

    def growing(f: Callable[..., Any]) -> Callable[[], str]:
        def run() -> str:
            f(q, k[:, :, :4000], v[:, :, :4000])
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(1, 33):
                f(q, k[:, :, : 4000 + i], v[:, :, : 4000 + i])
            torch.cuda.synchronize()
            return f"{(time.perf_counter() - start) / 32 * 1e6:8.0f} us a step, keys growing (host included)"

        return run

    probe("growing: F.sdpa", growing(lambda q, k, v: sdpa(q, k, v, None, False, 0.1)))
    probe("growing: flash", growing(lambda q, k, v: flash(q, k, v, None, False, 0.1)))
    probe("growing: cudnn", growing(lambda q, k, v: cudnn(q, k, v, None, False, 0.1)))


def decode_at(probe: Probe, b: int) -> None:
    gamma = torch.full((32,), 0.5, device=CUDA)
    q, k, v = qkv(b, 32, 8, 1, 16384, 128)
    base = baseline(probe, f"decode x {b}", graphed, q, k, v, None, False)
    ways = {"flash": flash, "flash, folded": folded(flash), "cudnn": cudnn, "efficient, folded": folded(efficient)}
    for name, f in ways.items():

        def merged(f: Source = f) -> Tensor:
            o, lse = f(q, k[:, :, 1:], v[:, :, 1:], None, False, 0.1)
            return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True)

        against(probe, f"decode x {b}: {name}", graphed, base, lambda f=f: f(q, k, v, None, False, 0.1))
        against(probe, f"decode x {b}: {name}, [1:] + merge", graphed, base, merged)


def static_at(probe: Probe, b: int) -> None:
    """A static cache: the keys go on after the visible ones, a mask says where they end."""
    room = 16384 + 512
    q, k, v = qkv(b, 32, 8, 1, room, 128)
    mask = (torch.arange(room, device=CUDA) < 16384).expand(b, 1, 1, room).contiguous()
    bias = torch.zeros(b, 1, 1, room, device=CUDA, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    name = f"static cache x {b}"
    base = baseline(probe, name, graphed, q, k, v, mask, False)
    ways: dict[str, Callable[[], Any]] = {
        "efficient, bias, folded": lambda: folded(efficient)(q, k, v, bias, False, 0.1),
        "efficient, bias, repeat_kv": lambda: efficient_repeat(q, k, v, bias.expand(b, 32, 1, room), False, 0.1),
        "cudnn, bool mask": lambda: cudnn(q, k, v, mask, False, 0.1),
        "cudnn, bool mask, folded": lambda: folded(cudnn)(q, k, v, mask, False, 0.1),
        "cudnn, bias, folded": lambda: folded(cudnn)(q, k, v, bias, False, 0.1),
    }
    for word, run in ways.items():
        against(probe, f"{name}: {word}", graphed, base, run)
    # Flash over a static cache without a mask: rows packed as [b * room], the length used given per row.
    cq, ck = (torch.arange(b + 1, device=CUDA, dtype=torch.int32) * n for n in (1, room))
    used = torch.full((b,), 16384, device=CUDA, dtype=torch.int32)
    kk, vv = (x.transpose(1, 2).contiguous().view(-1, 8, 128) for x in (k, v))
    flat = q.transpose(1, 2).reshape(b, 32, 128)

    def seqused() -> Tensor:
        return aten._flash_attention_forward(
            flat, kk, vv, cq, ck, 1, room, 0.0, False, False, scale=0.1, seqused_k=used
        )[1]  # fmt: skip

    against(probe, f"{name}: flash varlen, seqused_k, [b, n, K, d] storage", graphed, base, seqused)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds, start-up included")
    parser.add_argument("--only", default="", help="comma-separated sections")
    args = parser.parse_args()
    sections({"right": right, "prefill": prefill, "decode": decode}, args.only, args.budget)
