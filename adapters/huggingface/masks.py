"""Which keys each query of a call can see, whatever form the base implementation keeps that in.

transformers hands attention functions a boolean or additive 4-D mask, a 2-D mask (flash), a BlockMask (flex), or nothing with
``is_causal``. :class:`Visible` answers the two questions that edits ask, a block of queries at a time, so that nothing of the
size queries x keys is stored beyond what transformers stored itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Visible", "causal_ranges", "visible"]

BLOCK = 1024
"""Mask rows that are read at once."""


@dataclass(frozen=True)
class Visible:
    """Visibility of keys.

    Attributes
    ----------
    kind
        ``all`` (every query sees every key), ``causal`` (queries and keys are equal in number, query i sees keys 0..i), ``tail``
        (causal, and the queries are the last of the keys' tokens) or ``blocks`` (ask :meth:`block`).
    """

    kind: str
    queries: int
    keys: int
    device: torch.device
    get: Callable[[int, int], Tensor] | None = None

    def block(self, start: int, stop: int) -> Tensor | None:
        """[b or 1, 1 or H, stop - start, n]: bool (True: visible), or float to be added to scores; None where all are visible."""
        if self.get is not None:
            return self.get(start, stop)
        if self.kind == "all":
            return None
        rows = torch.arange(start, stop, device=self.device)[:, None] + (self.keys - self.queries)
        return (torch.arange(self.keys, device=self.device) <= rows)[None, None]


def visible(mask: object, base: str, q: Tensor, k: Tensor, causal: bool, window: int | None) -> Visible:
    """Build a :class:`Visible` from what transformers passed to the attention function.

    Parameters
    ----------
    mask
        None, a Tensor or a BlockMask.
    base
        Name of the base implementation (``sdpa``, ``eager``, ``flash_attention_2``, ``flex_attention``).
    q, k
        [b, H, q, d] and [b, K, n, d].
    causal
        What the module says; only counts where the mask does not.
    window
        Sliding window of the layer, for bases that get no 4-D mask.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    flash = "flash" in base
    if mask is None and not flash:
        if n_q == 1 or not causal:
            return Visible("all", n_q, n_k, q.device)
        return Visible(
            "causal", n_q, n_q, q.device
        )  # the base aligns top-left: keys beyond n_q are unwritten static slots
    if isinstance(mask, Tensor) and mask.ndim == 4:
        dense = mask[..., :n_k]
        return Visible("blocks", n_q, n_k, q.device, lambda i, j: dense[:, :, i:j] if dense.shape[2] > 1 else dense)
    if mask is not None and not isinstance(mask, Tensor):
        mod, device = mask.mask_mod, q.device  # type: ignore[attr-defined]
        batch = torch.arange(q.shape[0], device=device)[:, None, None, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        cols = torch.arange(n_k, device=device)

        def from_mod(i: int, j: int) -> Tensor:
            rows = torch.arange(i, j, device=device)[:, None]
            return torch.broadcast_to(mod(batch, head, rows, cols), (q.shape[0], 1, j - i, n_k))

        return Visible("blocks", n_q, n_k, q.device, from_mod)
    real = mask.to(torch.bool)[:, None, None, -n_k:] if isinstance(mask, Tensor) else None
    windowed = window is not None and n_k > window
    if real is None and not windowed and (not causal or n_q == 1):
        return Visible("all", n_q, n_k, q.device)
    if real is None and not windowed and n_q == n_k:
        return Visible("causal", n_q, n_k, q.device)

    def by_position(i: int, j: int) -> Tensor:
        # Flash kernels align bottom-right: the last query sees the last key.
        rows = torch.arange(i + n_k - n_q, j + n_k - n_q, device=q.device)[:, None]
        cols = torch.arange(n_k, device=q.device)
        seen = (cols <= rows) if causal else torch.ones_like(cols <= rows)
        if window is not None and windowed:
            seen = seen & (cols > rows - window)
        return seen[None, None] if real is None else seen[None, None] & real

    return Visible("blocks", n_q, n_k, q.device, by_position)


def causal_ranges(mask: Tensor, real: Tensor) -> list[tuple[int, int]] | None:
    """Start and end of each row's tokens where `mask` says nothing but causality among them, as padding alone makes it.

    Parameters
    ----------
    mask
        [b, 1, n, >= n] bool, True: visible.
    real
        [b, n] bool, the model-level mask.

    Returns
    -------
    list or None
        One (start, stop) a row; None where the mask holds anything else (a window, packed sequences, holes), or a row is empty.
        Waits for the device once.
    """
    b, n = real.shape
    if mask.dtype != torch.bool or mask.shape[:3] != (b, 1, n) or mask.shape[3] < n:
        return None
    column = torch.arange(n, device=real.device)
    start, count = real.to(torch.uint8).argmax(-1), real.sum(-1)
    within = (column >= start[:, None]) & (column < (start + count)[:, None])
    same = (within == real).all() & ~mask[..., n:].any()
    for i in range(0, n, BLOCK):
        rows = column[i : i + BLOCK, None]
        expected = (column <= rows) & real[:, None]
        same = same & ((mask[:, 0, i : i + BLOCK, :n] == expected) | ~real[:, i : i + BLOCK, None]).all()
    found = torch.stack([start, start + count, same.expand(b)]).tolist()
    ranges = list(zip(found[0], found[1], strict=True))
    return ranges if all(found[2]) and all(i < j for i, j in ranges) else None
