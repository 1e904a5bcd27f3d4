"""Constant edits of head outputs at some positions of a request, over packed rows: one launch a layer, tables at fixed addresses.

For a token at position p of a row with slot s, whose prompt has n tokens,

    o[h] <- factor[s, h] o[h] + shift[s, h]        where  n + start[s] <= p < n + stop[s]

in fp32, and only in heads where that changes anything. All other tokens are left alone without being read, so that rows that are
behind their prompt's end cost next to nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.first_token import triton_available

__all__ = ["ALWAYS", "affine_rows"]

ALWAYS = 1 << 40
"""As `stop`: no bound; as ``-ALWAYS`` for `start`, too. Far from overflow when a length is added."""


def affine_rows(
    out: Tensor, factor: Tensor, shift: Tensor | None, start: Tensor, stop: Tensor, *, row_slot: Tensor, row_prompt: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, backend: str | None = None,
) -> None:  # fmt: skip
    """Edit `out` in place.

    Parameters
    ----------
    out
        [T, H, d], the rows' tokens one after the other; any strides, the last 1.
    factor, shift
        [slots, H] and [slots, H, d] fp32, the last dimensions contiguous; `shift` None for zeros.
    start, stop
        [slots] int64, counted from the end of the prompt; a slot with ``start >= stop`` edits nothing.
    row_slot, row_prompt
        [>= rows] int32 and int64: slot of each row, negative for none, and how long its prompt is.
    query_start_loc
        [rows + 1] int32: where each row's tokens begin; tokens from the last entry on are padding.
    seq_lens
        [rows] int32: tokens of the row with this call's; 0 for padding rows.
    backend
        "triton" or "torch"; None picks. Neither synchronises on a GPU.
    """
    rows = query_start_loc.shape[0] - 1
    if not out.shape[0] or not rows:
        return
    if backend == "triton" or (backend is None and triton_available(out.device)):
        _launch(out, factor, shift, start, stop, row_slot, row_prompt, query_start_loc, seq_lens)
        return
    t = torch.arange(out.shape[0], device=out.device, dtype=query_start_loc.dtype)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), t, right=True).clamp(max=rows - 1)
    end = query_start_loc[row + 1]
    slot = row_slot[row].long()
    position = (seq_lens[row] - end + t).long() - row_prompt[row]
    mine = (t < end) & (seq_lens[row] > 0) & (slot >= 0)
    slot = slot.clamp(min=0)
    mine = mine & (start[slot] <= position) & (position < stop[slot])
    if out.device.type == "cpu":  # where looking at the numbers costs nothing
        at = mine.nonzero()[:, 0]
        out[at] = _edited(out[at], factor, shift, slot[at])
    else:
        out.copy_(torch.where(mine[:, None, None], _edited(out, factor, shift, slot), out))


def _edited(out: Tensor, factor: Tensor, shift: Tensor | None, slot: Tensor) -> Tensor:
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    c = factor[slot].to(work)[..., None]
    new = out.to(work) * c
    changes = c != 1
    if shift is not None:
        b = shift[slot].to(work)
        new, changes = new + b, changes | (b != 0).any(-1, keepdim=True)
    return torch.where(changes, new.to(out.dtype), out)


@functools.cache
def _kernel() -> Any:
    from headpatch.kernels import _triton_affine

    return _triton_affine.affine


def _launch(
    out: Tensor, factor: Tensor, shift: Tensor | None, start: Tensor, stop: Tensor, row_slot: Tensor, row_prompt: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor,
) -> None:  # fmt: skip
    tokens, heads, d = out.shape
    rows = query_start_loc.shape[0] - 1
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (out, factor, *(() if shift is None else (shift,)))):
        raise ValueError("the last dimension of out, factor and shift must have stride 1")
    wide = max(16, 1 << (d - 1).bit_length())
    block = max(1, min(1 << (heads - 1).bit_length(), 2048 // wide))
    s_s, s_h = (0, 0) if shift is None else shift.stride()[:2]
    _kernel()[(tokens, -(-heads // block))](
        out, factor, shift, start, stop, row_slot, row_prompt, query_start_loc, seq_lens,
        rows, out.stride(0), out.stride(1), factor.stride(0), s_s, s_h,
        H=heads, D=d, DP=wide, BH=block, STEPS=-(-int(rows).bit_length() // 4) * 4, num_warps=4 if block * wide >= 1024 else 1,
    )  # fmt: skip
