"""What a call does, by torch's profiler: how long the device is busy, how often it is launched and waited for, what takes longest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["describe", "where_time_goes"]

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMalloc", "aten::item")


def where_time_goes(run: Callable[[], Any], device: torch.device, longest: int = 12) -> dict[str, Any]:
    """One call, profiled (which makes the host slower), and its time without the profiler, all in milliseconds.

    ``host`` and ``device`` list the longest by their own time: name, calls, milliseconds.
    """
    run()
    cuda = device.type == "cuda"
    _settle(device)
    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    _settle(device)
    wall = time.perf_counter() - started
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        run()
        _settle(device)
    events = seen.key_averages()
    on_host = sorted(((e.key, e.count, e.self_cpu_time_total / 1e3) for e in events), key=lambda x: -x[2])
    on_device = sorted(
        ((e.key, e.count, e.self_device_time_total / 1e3) for e in events if e.self_device_time_total),
        key=lambda x: -x[2],
    )
    return {
        "wall": 1e3 * wall, "host_returns_after": 1e3 * host, "device_busy": sum(ms for *_, ms in on_device),
        "launches": sum(n for name, n, _ in on_host if "Launch" in name),
        "waits": {name: n for name, n, _ in on_host if any(w in name for w in WAITS)},
        "host": on_host[:longest], "device": on_device[:longest],
    }  # fmt: skip


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe(found: dict[str, Any]) -> str:
    """For people."""
    times = f"{found['wall']:.1f} ms, {found['host_returns_after']:.1f} until the host is through"
    lines = [f"{times}; device busy {found['device_busy']:.1f}; {found['launches']} launches; waits {found['waits']}"]
    for where in ("host", "device"):
        lines += [f"  {where:6s} {ms:8.2f} ms {count:5d} x {name[:100]}" for name, count, ms in found[where]]
    return "\n".join(lines)
