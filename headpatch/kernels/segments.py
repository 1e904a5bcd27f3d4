"""Attention with new shares for segments of its keys, in one launch: for prompts whose time goes by in the host's launches.

A row's attention is a distribution over keys; a form says which shares its segments get instead (see :mod:`headpatch.segments` for
the algebra, and :class:`headpatch.methods.base.MassMethod` for who asks). Forms:

* ``calibrate`` (one segment S, strength beta): ``beta P`` for S, and what is left of one for the others; a row that sees nothing
  but S stays as it is. ACT's.
* ``redistribute`` (the image's tokens I and the sinks S, strength r; N are the image's others, ``I - S``): where ``m_I >= least``,
  ``m_N >= ratio m_I``, the row sees a sink in the image (`strict`) and its query is not spared, r of what S gets goes to N. VAR's.

Two more are known to :mod:`headpatch.kernels.paged_segments` alone: ``raise`` (one segment, strength 1 / bound: a segment that
gets less than `least` is multiplied by what brings it there, at most by the bound), and, of scores, ``amplify`` (each is raised by
strength times its own size). ``weigh`` says that a method's constant weights act on queries that are not spared.

Keys are read twice, masses and weights are held in fp32, nothing of the size queries x keys is stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headpatch.kernels.first_token import triton_available
from headpatch.kernels.launch import launch
from headpatch.operands import Segment

__all__ = ["FORMS", "Form", "attend_segments", "attends_segments", "outer", "padded", "takes"]

FORMS = {"calibrate": 1, "redistribute": 2}
"""How many masks of keys each form has that :func:`attend_segments` knows."""
WIDEST = 256


class Form(NamedTuple):
    """Which form, of which segments, with its numbers; `spared` [b, q] bool are queries that stay as they are."""

    name: str
    segments: tuple[Segment, ...]
    least: float = 0.0
    ratio: float = 0.0
    strict: bool = False
    spared: Tensor | None = None


def attends_segments(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`attend_segments` runs where `q` lies and takes these tensors: see :func:`takes`; all of one width."""
    return q.shape[-1] == v.shape[-1] and takes(q, k, v)


def takes(q: Tensor, *others: Tensor) -> bool:
    """Whether kernels that read whole prompts run where `q` [b, H, q, d] lies, not under a compiler, and take it and `others`.

    Half precision on an NVIDIA GPU from Ampere on (older ones have too little shared memory), at most 256 wide, rows that begin at
    multiples of 16 numbers.
    """
    return (
        q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()
        and triton_available(q.device) and _recent(q.device.index) and q.shape[-1] <= WIDEST and not q.shape[-1] % 16
        and all(_aligned(x) for x in (q, *others))
    )  # fmt: skip


@functools.cache
def _recent(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def _aligned(x: Tensor) -> bool:
    """What the kernel is compiled for: rows that begin at multiples of 16 bytes and 16 numbers, and offsets of 32 bits."""
    b, h, t, last = x.stride()
    return (
        last == 1
        and not (h | t | (b if x.shape[0] > 1 else 0)) & 15
        and not x.data_ptr() & 15
        and x.shape[2] * t < 1 << 31
    )


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, masks: Sequence[Tensor], form: Form, strength: Tensor, scale: float,
    heads: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention in which segments of keys have the shares that `form` gives them.

    Parameters
    ----------
    q
        [b, H, q, d], where :func:`attends_segments` holds; the queries are the last of the keys' tokens.
    k, v
        [b, K, n, d], K a divisor of H.
    masks
        Keys of the form's segments, [b or 1, H or 1, 1, n] bool.
    strength
        fp32: [H], or [h] of the listed `heads`.
    scale
        Softmax scale.
    heads
        int64 [h] query heads to compute; None for all.
    out
        [b, q, H, d]: where to write, other heads are left as they are; None for a new tensor, which needs `heads` to be None.

    Returns
    -------
    Tensor
        [b, q, H, d].
    """
    b, total, n_q, d = q.shape
    n_k = k.shape[2]
    if len(masks) != FORMS[form.name]:
        raise ValueError(f"form {form.name!r} has {FORMS[form.name]} masks, {len(masks)} were given")
    if form.name == "redistribute" and form.spared is None:
        raise ValueError("form 'redistribute' needs to know which queries are spared")
    if out is None:
        if heads is not None:
            raise ValueError("heads beside those that are computed need somewhere to be: give out")
        out = q.new_empty(b, n_q, total, d)
    count = total if heads is None else len(heads)
    masks = [_by_key(m) for m in masks]
    spared = None if form.spared is None else _by_key(form.spared)
    at = [n for m in masks for n in (m.stride(0) if m.shape[0] > 1 else 0, m.stride(1) if m.shape[1] > 1 else 0)]
    missing = 2 - len(masks)
    wide = padded(d)
    bm, bn, warps, stages = _tile(n_q, wide)
    constants = {
        "G": total // k.shape[1], "D": d, "DP": wide, "BM": bm, "BN": bn, "FORM": form.name, "STRICT": form.strict,
        "EXACT": q.dtype == torch.float32,
    }  # fmt: skip
    y_b, y_t, y_h, _ = out.stride()
    args = (
        q, k, v, out, heads, strength, *masks, *(None,) * missing, spared,
        *outer(q), *outer(k), *outer(v), 0 if b == 1 else y_b, y_h, y_t, *at, *(0, 0) * missing,
        spared.stride(0) if spared is not None and spared.shape[0] > 1 else 0, count, n_q, n_k,
        scale * math.log2(math.e), form.least, form.ratio,
    )  # fmt: skip
    key = (q.dtype, constants["G"], d, bm, form.name, form.strict, heads is None)
    grid = (-(-n_q // bm), b * count, 1)
    launch(_kernels().attend, q.device, key, grid, args, constants, warps, stages)
    return out


def _tile(n_q: int, wide: int) -> tuple[int, int, int, int]:
    """(queries and keys of a program's step, warps, stages)."""
    if n_q <= 16:
        return 16, 64, 4, 2
    return (128, 32, 4, 3) if wide <= 128 else (64, 32, 4, 2)  # measured on an H100 at a width of 128


def _by_key(mask: Tensor) -> Tensor:
    """A mask whose last dimension has stride 1."""
    return mask if mask.stride(-1) == 1 or mask.shape[-1] == 1 else mask.contiguous()


def padded(width: int) -> int:
    """What a kernel has in place of a head's width: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def outer(x: Tensor) -> tuple[int, int, int]:
    """Strides of row, head and token, [b, h, n, d]; 0 for a single row."""
    b, h, t, _ = x.stride()
    return (0 if x.shape[0] == 1 else b), h, t


@functools.cache
def _kernels() -> Any:
    from headpatch.kernels import _triton_segments

    return _triton_segments
