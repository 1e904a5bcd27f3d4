"""Attention-mass algebra: what happens to one softmax row when segments of its keys get new shares. Pure tensor functions.

A row of attention over keys is a distribution. Split the keys into *cells* c with outputs ``o_c`` (attention restricted to the
cell) and log-sum-exps ``L_c``; then ``o = sum_c softmax(L)_c o_c``. Editing masses changes only those weights:
``o' = sum_c softmax(L + log w)_c o_c``. Several patches on one head act as if the full row had been edited one after the other:
their segments are intersected into cells, weights multiply through, and there is one normalisation at the end.

Shapes use the letters of :mod:`headpatch.operands`; C is the number of cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["augment", "cell_log_weights", "cells", "in_numbers", "include_sink", "log_sum_exp", "merge", "new_shares",
           "numbers_for", "partition"]  # fmt: skip

NEVER = -1e4
"""Stands for log(0) where a finite number is needed (a bias that a kernel adds to a score)."""


def log_sum_exp(scores: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, -inf where all scores are, with gradients of zero there (torch's own are NaN)."""
    blind = torch.isneginf(scores).all(-1)
    return torch.logsumexp(scores.masked_fill(blind.unsqueeze(-1), 0.0), -1).masked_fill(blind, -math.inf)


def include_sink(output: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Add a learned sink logit (a key with value zero) to an attention: (output [b, H, q, d], lse [b, H, q]), sink [H]."""
    both = torch.logaddexp(lse, sink.to(lse)[:, None])
    return output * torch.exp(lse - both).unsqueeze(-1).to(output.dtype), both


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor], log_weights: Tensor | None = None) -> Tensor:
    """``sum_c softmax(L + log w)_c o_c`` in at least fp32.

    Parameters
    ----------
    outputs
        C tensors [b, H, q, d].
    lses
        C tensors [b, H, q]; -inf where a row sees no key of the cell.
    log_weights
        [C, b, H, q] or broadcastable; None for no edit.

    Returns
    -------
    Tensor
        [b, H, q, d] in the outputs' dtype. Where every weighted cell is empty the unweighted row is returned: a row that sees
        nothing but an emptied segment stays as it is.
    """
    plain = torch.stack(list(lses))
    total = plain if log_weights is None else plain + log_weights
    emptied = torch.isneginf(total).all(0)
    total = torch.where(emptied, plain, total)
    # A row that sees no key at all (padding) must not become NaN.
    share = torch.softmax(total.masked_fill(torch.isneginf(total).all(0), 0.0), 0)
    out = sum((o.to(share.dtype) * w.unsqueeze(-1) for o, w in zip(outputs, share, strict=True)), torch.zeros(()))
    return out.to(outputs[0].dtype)


def cells(memberships: Sequence[Tensor]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Intersect segments into disjoint cells.

    Parameters
    ----------
    memberships
        One boolean mask of keys per segment, broadcastable to [b, H, q, n].

    Returns
    -------
    list
        One entry per cell: which segments it lies in, and its mask. The last is the rest, in no segment. All combinations are
        returned, empty ones included: which are empty is known to the device only, and asking would stop it.
    """
    found: list[tuple[tuple[int, ...], Tensor | None]] = [((), None)]
    for i, mask in enumerate(memberships):
        split: list[tuple[tuple[int, ...], Tensor | None]] = []
        for inside, cell in found:
            split.append(((*inside, i), mask if cell is None else cell & mask))
            split.append((inside, ~mask if cell is None else cell & ~mask))
        found = split
    if not memberships:
        raise ValueError("cells() needs at least one segment")
    return [(inside, cell) for inside, cell in found if cell is not None]


def partition(memberships: Sequence[Tensor]) -> list[Tensor]:
    """Disjoint masks of a single edit's segments, a key that lies in two belonging to the first; last, of the keys in none."""
    found = [memberships[0]]
    free = ~memberships[0]
    for mask in memberships[1:]:
        found.append(mask & free)
        free = free & ~mask
    return [*found, free]


def cell_log_weights(
    lses: Sequence[Tensor], cell_segments: Sequence[tuple[int, ...]],
    patches: Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]],
) -> Tensor:  # fmt: skip
    """Log weights of cells after several patches, each of which saw the row as the one before left it.

    Parameters
    ----------
    lses
        Per cell [b, H, q], of the untouched scores.
    cell_segments
        Per cell, the segments that it lies in.
    patches
        In order: the segments a patch names, and its function from shares [S + 1, b, H, q] (rest last) to new shares.

    Returns
    -------
    Tensor
        [C, b, H, q], to be added to `lses` before one softmax.
    """
    plain = torch.stack(list(lses))
    log_w = torch.zeros_like(plain)
    for names, reshare in patches:
        now = plain + log_w
        share = torch.softmax(now.masked_fill(torch.isneginf(now).all(0), 0.0), 0)
        owner = [next((i for i, s in enumerate(names) if s in inside), len(names)) for inside in cell_segments]
        before = torch.stack(
            [
                sum((share[c] for c in range(len(owner)) if owner[c] == i), torch.zeros_like(share[0]))
                for i in range(len(names) + 1)
            ]
        )
        after = reshare(before)
        # A segment without mass has no proportions to keep: its factor does not matter, but neither it nor its gradient may be
        # NaN. One that is emptied gets weight zero.
        live = (before > 0) & (after > 0)
        factor = torch.log(torch.where(live, after, 1.0)) - torch.log(torch.where(live, before, 1.0))
        factor = factor.masked_fill((before > 0) & ~(after > 0), -math.inf)
        log_w = log_w + torch.stack([factor[i] for i in owner])
    return log_w


def new_shares(before: Tensor, reshare: Callable[[Tensor], Tensor], conserves: bool = False) -> Tensor:
    """Shares [C, b, H, q] after a single edit, whose function from shares to shares is `reshare`.

    A segment without mass has no proportions to keep: nothing can be given to it. A row that sees nothing but emptied segments stays
    as it is. Nothing is left to be done where `reshare` says of itself that it knows (``MassMethod.conserves``).
    """
    if conserves:
        return reshare(before)
    after = reshare(before).masked_fill(before <= 0, 0.0)
    total = after.sum(0)
    return torch.where(total > 0, after / total.clamp_min(torch.finfo(total.dtype).tiny), before)


def numbers_for(dtype: torch.dtype) -> int:
    """How many numbers of this type hold a logarithm: low precision cannot in one."""
    return 1 if dtype in (torch.float32, torch.float64) else 3


def in_numbers(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """`x` as :func:`numbers_for` tensors of `dtype` that add up to it: each takes what rounding left of those before."""
    found = [x.to(dtype)]
    while len(found) < numbers_for(dtype):
        x = x - found[-1]  # in x's own, wider type
        found.append(x.to(dtype))
    return found


def augment(
    q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor, members: Tensor, scale: float, multiple: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Extra head dimensions that add ``log_weights`` to the scores of segments: exact under any kernel, differentiable.

    ``q' = [q, log g / scale]``, ``k' = [k, 1{segment}]``, v padded with zeros.

    Parameters
    ----------
    q, k, v
        [b, H, q, d], [b, K, n, d], [b, K, n, d].
    log_weights
        [H, S], differentiable; -inf (weight zero) becomes a finite bias that no softmax can see through.
    members
        [b, n, S] 0/1.
    scale
        The scale that the kernel will multiply scores by.
    multiple
        Dimensions are padded to a multiple of this; kernels like aligned heads.
    """
    width = q.shape[-1]
    bias = torch.cat(in_numbers(log_weights.clamp_min(NEVER) / scale, q.dtype), -1)
    flags = members.to(k.dtype).repeat(1, 1, numbers_for(q.dtype))
    pad = -(width + bias.shape[-1]) % multiple
    q = torch.cat(
        [q, bias[None, :, None].expand(q.shape[0], -1, q.shape[2], -1), q.new_zeros(()).expand(*q.shape[:3], pad)], -1
    )
    k = torch.cat([k, flags[:, None].expand(-1, k.shape[1], -1, -1), k.new_zeros(()).expand(*k.shape[:3], pad)], -1)
    v = torch.cat([v, v.new_zeros(()).expand(*v.shape[:3], q.shape[-1] - v.shape[-1])], -1)
    return q, k, v
