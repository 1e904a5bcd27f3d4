"""Where a streaming head keeps which token: the first `sink` in slots of their own, all later ones in a ring.

    slot(p) = p                            for p < sink
    slot(p) = sink + (p - sink) % ring     for p >= sink

Positions p count a row's real tokens. While no more than ``sink + ring`` have been seen, slot(p) = p. Which order the slots are
read in means nothing to attention, because keys are stored after the rotary embedding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["band", "read", "slot_of", "slot_positions", "write"]


def slot_of(position: int, sink: int, ring: int) -> int:
    """Slot of one position."""
    return position if position < sink else sink + (position - sink) % ring


def _runs(start: int, stop: int, sink: int, ring: int) -> list[tuple[int, int, int]]:
    """Positions start..stop as (position, slot, length) of neighbours; no more than `ring` of them may lie in the ring."""
    runs = []
    while start < stop:
        slot = slot_of(start, sink, ring)
        end = sink if start < sink else sink + ring
        length = min(stop - start, end - slot)
        runs.append((start, slot, length))
        start += length
    return runs


def write(buffer: Tensor, new: Tensor, past: int, sink: int, ring: int) -> None:
    """Put the tokens at positions past, past + 1, ... into their slots, in place.

    Parameters
    ----------
    buffer
        [b, h, slots, d].
    new
        [b, h, m, d]; of more than a ring's length, the last ones stay.
    """
    stop = past + new.shape[2]
    ranges = [(past, min(stop, sink)), (max(past, sink, stop - ring), stop)]
    for first, last in ranges:
        for position, slot, length in _runs(first, last, sink, ring):
            at = position - past
            buffer[:, :, slot : slot + length] = new[:, :, at : at + length]


def read(buffer: Tensor, start: int, stop: int, sink: int, ring: int) -> list[Tensor]:
    """The tokens at positions start..stop, in order, as views [b, h, *, d] to be joined; all of them must still be held."""
    return [buffer[:, :, slot : slot + length] for _, slot, length in _runs(start, stop, sink, ring)]


def slot_positions(lengths: Tensor, slots: int, sink: int, ring: int) -> Tensor:
    """Which position each slot holds after `lengths` tokens [b]: int64 [b, slots], negative where it holds none yet."""
    slot = torch.arange(slots, device=lengths.device)
    last = (lengths - 1)[:, None]
    # The last position that is congruent to the slot; before the ring's first turn, that is the slot itself or nothing.
    ringed = last - (last - slot) % ring
    ringed = torch.where(ringed >= sink, ringed, -1)
    return torch.where(slot < sink, torch.where(slot <= last, slot, -1), ringed)


def band(queries: int, sink: int, recent: int, device: torch.device) -> Tensor:
    """Which of [sinks | window] each of `queries` neighbouring queries sees: bool [1, 1, queries, sink + recent - 1 + queries].

    The window's first key is the oldest that the first of them sees.
    """
    if torch.compiler.is_compiling():
        return _band(queries, sink, recent, device)
    return _kept_band(queries, sink, recent, device)


def _band(queries: int, sink: int, recent: int, device: torch.device) -> Tensor:
    row = torch.arange(queries, device=device)[:, None]
    column = torch.arange(recent - 1 + queries, device=device)
    inside = (column >= row) & (column < row + recent)
    return torch.cat([inside.new_ones(queries, sink), inside], 1)[None, None]


_kept_band = lru_cache(maxsize=16)(_band)
