"""Launching Triton kernels without Triton's analysis of their arguments, which costs the host more than the launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled", "launch"]

_compiled: dict[tuple[Any, ...], Callable[[tuple[int, int, int], tuple[Any, ...]], None]] = {}
"""Compiled kernels by name, device and whatever they were specialised on; nothing of a model is in them."""


def launch(
    kernel: Any, device: torch.device, key: tuple[Any, ...], grid: tuple[int, int, int], args: tuple[Any, ...],
    constants: dict[str, Any], warps: int = 4, stages: int = 3,
) -> None:  # fmt: skip
    """Run `kernel` over `grid`; the first call with a `key` compiles it.

    `key` must hold all that Triton would specialise on: dtypes, the constants, which arguments are None. Arguments that the kernel
    specialises on must always be alike in what Triton looks at: divisible by 16, and never 1.
    """
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*args, **constants)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, device, key, grid, args, constants, warps, stages)
    else:
        place = (kernel.fn.__name__, device.index, *key)
        if place not in _compiled:
            options = {"num_warps": warps, "num_stages": stages}
            _compiled[place] = compiled(kernel, grid, args, constants, options)
        _compiled[place](grid, args)


def compiled(
    kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, int]
) -> Callable[[tuple[int, int, int], tuple[Any, ...]], None]:
    """A function of a grid and arguments that launches `kernel`, compiled for arguments like these, on the current device."""
    tail = tuple(constants.values())
    made = kernel.warmup(*args, **constants, **options, grid=grid)
    made = made.result() if hasattr(made, "result") else made
    if hasattr(type(made), "__getitem__"):  # a kernel that can be launched as it is
        return lambda at, a: made[at](*a, *tail)
    return lambda at, a: kernel[at](*a, **constants, **options)
