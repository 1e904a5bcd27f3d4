"""Keys and values of single rows, read back out of the paged cache of vLLM's CPU kernels.

Those kernels keep each block of keys in the order that suits the machine (transposed on x86, otherwise elsewhere), and say so
nowhere. The order is therefore learnt from the kernel that writes: numbered keys are written into a block of their own, and where
each number came to lie is where that element is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["CpuKeys", "write_cache"]

DIGIT = 256
"""Whole numbers up to this are exact in every dtype that a cache may have."""


class CpuKeys:
    """Reads the cache of one layer."""

    def __init__(self, patch: LayerPatch, cache: Tensor) -> None:
        self.patch = patch
        self.order = {name: self._learn(cache, name) for name in ("key", "value")}

    def _learn(self, cache: Tensor, name: str) -> Tensor | None:
        """Where element (token, channel) of a block lies, [size * d] int64; None where they lie in order."""
        _, heads, size, width = cache.shape
        d = width // 2
        number = torch.arange(size * d).view(size, 1, d).expand(size, heads, d)
        digits: list[Tensor] = []
        rest = number
        while len(digits) < 3:  # blocks of up to 16 million elements
            given = (rest % DIGIT).to(cache.dtype).contiguous()
            scratch = torch.zeros(1, heads, size, width, dtype=cache.dtype)
            write_cache(self.patch, given, given, scratch, torch.arange(size))
            part = scratch.view(1, heads, 2 * size, d).chunk(2, dim=2)[name == "value"]
            digits.append(part.reshape(heads, size * d).to(torch.int64))
            rest = rest // DIGIT
        found = sum((digit * DIGIT**i for i, digit in enumerate(digits)), torch.zeros_like(digits[0]))
        order = found[0].argsort()
        if not torch.equal(found[:, order], torch.arange(size * d).expand(heads, -1)):
            raise EngineError(
                f"layer {self.patch.index}: operand '{name[0]}' cannot be had: this machine's kernel keeps blocks in a form "
                "that headpatch cannot read back"
            )
        return None if torch.equal(order, torch.arange(size * d)) else order

    def read(self, cache: Tensor, blocks: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, each [heads, blocks * size, d].

        Parameters
        ----------
        cache
            [blocks, K, size, 2 d] as the kernel gets it.
        blocks
            int64, in the order of their tokens.
        heads
            KV heads, int64; may repeat.
        """
        _, kv_heads, size, width = cache.shape
        whole = cache.view(len(cache), kv_heads, 2 * size, width // 2)
        found = []
        for part, order in zip(whole.chunk(2, dim=2), (self.order["key"], self.order["value"]), strict=True):
            taken = part[blocks[:, None], heads[None]].flatten(2)  # [blocks, heads, size * d]
            taken = taken if order is None else taken.index_select(2, order)
            found.append(taken.view(len(blocks), len(heads), size, -1).transpose(0, 1).flatten(1, 2))
        return found[0], found[1]


def write_cache(patch: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, K, d] into a cache as the engine does before attention."""
    update = getattr(patch.impl, "do_kv_cache_update", None)
    if update is None:
        raise EngineError(f"layer {patch.index}: the {patch.backend} backend does not say how it writes its cache")
    update(patch.layer, key, value, cache, slots)
