"""Attention whose scores are edited: the scores of one block of queries at a time, in the open."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import repeat_kv, score_dtype
from headpatch.adapters.huggingface.mass import Call, OperandsAt, Owned, Segments, blocks_of
from headpatch.adapters.huggingface.plan import Edit
from headpatch.scores import attention_of, edit_scores

__all__ = ["explicit"]


def explicit(
    call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt,
    weights_of: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Attention with scores edits (and any mass edits beside them), a block of queries' scores at a time.

    With `weights_of` (start, stop) nothing is attended to: the attention weights of these queries alone, [b, H, stop - start, n].
    """
    step = 256
    n_q, n_k, dtype = call.q.shape[2], call.seen.keys, score_dtype(call.q)
    k = repeat_kv(call.k[:, :, :n_k], call.groups).to(dtype)
    v = repeat_kv(call.v[:, :, :n_k], call.groups).to(dtype)
    blocks = []
    for start, stop in [weights_of] if weights_of else blocks_of(n_q, step):
        scores = torch.matmul(call.q[:, :, start:stop].to(dtype), k.transpose(2, 3)) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        mask = call.seen.block(start, stop)
        if mask is not None:
            low = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
            scores = scores.masked_fill(~mask if low is None else mask < low, -math.inf)
            scores = scores if low is None else scores + mask.clamp_min(low).to(dtype)
        masks = [s[..., :n_k] for s in segments(start, stop)]
        acting = [(e, [masks[s] for s in owned[i]], operands(e, start, stop)) for i, e in enumerate(edits)]
        p = attention_of(edit_scores(scores, acting), call.sinks)
        if weights_of:
            return p
        blocks.append(torch.matmul(p, v).to(call.q.dtype))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()
