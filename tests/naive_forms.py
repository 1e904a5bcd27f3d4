"""What headpatch/kernels/segments.py and columns.py do, on the whole map: the answer to their tests, and stand-ins on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface import fused, statistics
from headpatch.kernels.segments import Form


def attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[b, H, q, n] in float64; the queries are the last of the keys' tokens."""
    n_q, n = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * scale
    seen = torch.ones(n_q, n, dtype=torch.bool, device=q.device).tril(n - n_q)
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, masks: Sequence[Tensor], form: Form, strength: Tensor, scale: float,
    heads: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As its namesake."""
    p = attention(q, k, scale)
    every = torch.arange(q.shape[1], device=q.device) if heads is None else heads
    s = strength.double()[:, None, None]
    if form.name == "redistribute":
        image, sinks = masks
        masks = [image & ~sinks, image & sinks, sinks & ~image]
    inside = [mask.expand_as(p)[:, every] for mask in masks]
    chosen = p[:, every]
    mass = [(chosen * m).sum(-1, keepdim=True) for m in inside]
    if form.name == "calibrate":
        rest = 1 - mass[0]
        to_others = (1 - s * mass[0]) / rest.clamp_min(1e-12)
        new = torch.where(rest > 1e-12, chosen * torch.where(inside[0], s, to_others), chosen)
    else:
        assert form.spared is not None
        image = mass[0] + mass[1]
        gate = (image >= form.least) & (mass[0] >= form.ratio * image) & (mass[0] > 0) & ~form.spared[:, None, :, None]
        if form.strict:
            gate = gate & (mass[1] > 0)
        moved = gate * s
        gained = 1 + moved * (mass[1] + mass[2]) / mass[0].clamp_min(1e-300)
        new = chosen * torch.where(inside[0], gained, torch.where(inside[1] | inside[2], 1 - moved, 1.0))
    p = p.index_copy(1, every, new)
    edited = (p @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2).to(q.dtype).contiguous()
    return edited if out is None else out.index_copy_(2, every, edited[:, :, every])


def column_sums(q: Tensor, k: Tensor, counted: Tensor, scale: float, heads: Tensor | None = None) -> Tensor:
    """As its namesake."""
    p = attention(q, k, scale) * counted[:, None, :, None]
    return (p if heads is None else p[:, heads]).sum(2)


def stand_in(monkeypatch: Any) -> list[Tensor | None]:
    """Let the adapter take the kernels' way on a CPU; gives what it was asked to attend to: heads of each call."""
    asked: list[Tensor | None] = []
    monkeypatch.setattr(statistics, "takes", lambda q, k: True)
    monkeypatch.setattr(statistics, "column_sums", column_sums)

    def attend(q: Tensor, k: Tensor, v: Tensor, masks: Any, form: Form, strength: Tensor, scale: float,
               heads: Tensor | None = None, out: Tensor | None = None) -> Tensor:  # fmt: skip
        asked.append(heads)
        return attend_segments(q, k, v, masks, form, strength, scale, heads, out)

    monkeypatch.setattr(fused, "attends_segments", lambda q, k, v: True)
    monkeypatch.setattr(fused, "attend_segments", attend)
    return asked
