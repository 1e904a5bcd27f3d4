"""The kernel that attends with new shares of segments, by the size of its programs; and what launches ask of the host.

    python benchmarks/segments_probe_gpu.py            # a CUDA device with Triton; half a minute

32 heads, 128 wide, bfloat16, causal. Microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

from headpatch.kernels import launch, segments
from headpatch.kernels.columns import column_sums
from headpatch.kernels.extreme import extreme
from headpatch.kernels.segments import Form, attend_segments

TILES = [
    (128, 64, 8, 3),
    (128, 64, 4, 3),
    (64, 64, 4, 3),
    (128, 32, 4, 3),
    (128, 128, 8, 2),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
]
"""Queries, keys, warps, stages."""
HEADS, WIDTH = 32, 128
SCALE = WIDTH**-0.5


def device_us(run: Callable[[], Any], times: int = 30) -> float:
    """Of the device, in a row of calls."""
    for _ in range(3):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / times * 1e3


def host_us(run: Callable[[], Any], times: int = 300) -> float:
    """Of the host, which does not wait for the device."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    took = time.perf_counter() - started
    torch.cuda.synchronize()
    return took / times * 1e6


def calls(rows: int, length: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    q, k, v = (
        torch.randn(rows, length, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    column = torch.arange(length, device="cuda")
    image = ((column >= 35) & (column < 611)).expand(rows, length)
    at, sinks = image[:, None, None], (column % 50 == 0).expand(rows, 1, 1, length)
    strength, heads = torch.full((HEADS,), 0.6, device="cuda"), torch.tensor([3, 9, 20], device="cuda")
    counted, dims = torch.ones(rows, length, dtype=torch.bool, device="cuda"), torch.tensor([1, 2], device="cuda")
    stream = torch.randn(rows, length, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    one, two = Form("calibrate", ()), Form("redistribute", (), 0.2, 0.5, True, image)
    return {
        "untouched": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "redistribute": lambda: attend_segments(q, k, v, [at, sinks], two, strength, SCALE),
        "calibrate": lambda: attend_segments(q, k, v, [sinks], one, strength, SCALE),
        "sums of columns, three heads": lambda: column_sums(q, k, counted, SCALE, heads),
        "extreme": lambda: extreme(stream, dims, 20.0),
        "extreme in torch": lambda: extreme(stream, dims, 20.0, "torch"),
        "one comparison": lambda: at > sinks,
    }


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        print("not run: needs a CUDA device with Triton")
        return
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    for rows, length in ((1, 1024), (4, 1024), (1, 4096)):
        some = calls(rows, length)
        words = [f"{name} {device_us(run):.0f}" for name, run in some.items()]
        for tile in TILES:
            launch._compiled.clear()  # the number of warps is not part of a kernel's key
            with mock.patch.object(segments, "_tile", return_value=tile):
                words.append(f"{tile} {device_us(some['redistribute']):.0f}")
        launch._compiled.clear()
        print(f"{rows} x {length}: " + "; ".join(words), flush=True)
    print("host: " + "; ".join(f"{name} {host_us(run):.1f}" for name, run in calls(1, 16).items()))


if __name__ == "__main__":
    main()
