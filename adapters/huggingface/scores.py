"""Attention whose scores are edited: the scores of one block of queries at a time, in the open."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headpatch.adapters.huggingface.cells import OperandsAt, Owned, Segments
from headpatch.adapters.huggingface.lse import products, repeat_kv, score_dtype
from headpatch.adapters.huggingface.mass import Call, blocks_of, unedited
from headpatch.adapters.huggingface.plan import Edit
from headpatch.methods.base import MassMethod, ScoresMethod
from headpatch.scores import attention_of, edit_attention, edit_scores

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.operands import OperandServer

__all__ = ["explicit", "first_acted_on", "first_edited"]


def explicit(
    call: Call, edits: tuple[Edit, ...], segments: Segments, owned: Owned, operands: OperandsAt,
    weights_of: tuple[int, int] | None = None, since: int = 0,
) -> Tensor:  # fmt: skip
    """Attention with scores edits (and any mass edits beside them), a block of queries' scores at a time.

    No edit acts on queries before `since`: the ordinary kernel attends for those. With `weights_of` (start, stop) nothing is attended
    to: the attention weights of these queries alone, [b, H, stop - start, n].
    """
    step = 256
    if since >= call.q.shape[2]:
        return unedited(call).transpose(1, 2).contiguous()
    n_q, n_k, dtype = call.q.shape[2], call.seen.keys, score_dtype(call.q)
    k, v = call.k[:, :, :n_k], call.v[:, :, :n_k]
    fused = n_q == 1 and torch.compiler.is_compiling()
    if not fused:
        k, v = repeat_kv(k.to(dtype), call.groups), repeat_kv(v.to(dtype), call.groups)
    blocks = [unedited(call)[:, :, :since]] if since else []
    ranges = [(since + i, since + j) for i, j in blocks_of(n_q - since, step)]
    for start, stop in [weights_of] if weights_of else ranges:
        q = call.q[:, :, start:stop]
        scores = (_dot(q, k) if fused else torch.matmul(q.to(dtype), k.transpose(2, 3))) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        all_seen = call.seen.kind in ("causal", "tail") and start == n_q - 1  # by the last query
        mask = None if all_seen else call.seen.block(start, stop)
        if mask is not None:
            low = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
            scores = scores.masked_fill(~mask if low is None else mask < low, -math.inf)
            scores = scores if low is None else scores + mask.clamp_min(low).to(dtype)
        masks = [s[..., :n_k] for s in segments(start, stop)]
        acting = [(e, [masks[s] for s in owned[i]], operands(e, start, stop)) for i, e in enumerate(edits)]
        if call.sinks is None and all(e.method.family == "mass" for e in edits):
            p = edit_attention(attention_of(scores), acting, fused)
        else:
            p = attention_of(edit_scores(scores, acting, fused), call.sinks)
        if weights_of:
            return p
        blocks.append((_sum(p, v) if fused else torch.matmul(p, v)).to(call.q.dtype))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()


# One query in a compiled call. Scores are wanted in fp32, and no copies of keys and values. Shares may have the values' own type, as
# they have inside fused kernels.


def _dot(q: Tensor, k: Tensor) -> Tensor:
    """[b, H, 1, n] in at least fp32, of q [b, H, 1, d] and k [b, K, n, d]."""
    b, heads, _, d = q.shape
    grouped = q.reshape(b, k.shape[1], -1, d)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        scores = products(grouped, k)
    else:  # fused with the reading of the keys
        wide = score_dtype(q)
        scores = (grouped.to(wide).unsqueeze(3) * k.to(wide).unsqueeze(2)).sum(-1)
    return scores.reshape(b, heads, 1, -1)


def _sum(p: Tensor, v: Tensor) -> Tensor:
    """[b, H, 1, d] of p [b, H, 1, n] and v [b, K, n, d]."""
    b, heads, _, n = p.shape
    return torch.matmul(p.reshape(b, v.shape[1], -1, n).to(v.dtype), v).reshape(b, heads, 1, -1)


def first_acted_on(server: OperandServer, edits: tuple[Edit, ...]) -> int:
    """The first query of a call that any of these mass edits can change, in any row, as far as their methods say.

    Waits for the device once in a prompt's call, and never in a step.
    """
    rows, n_q = server.known_rows(), server.call.q.shape[2]
    if n_q == 1 or torch.compiler.is_compiling() or rows.begins_at() > 0:
        return 0
    for edit in edits:
        if edit.key in rows.acted_on:
            continue
        method, first = edit.method, 0
        if isinstance(method, MassMethod):
            where = method.acts_on({name: server.get(name) for name in method.needs})
            if where is not None:
                first = int(torch.nn.functional.pad(where, (0, 1), value=True).to(torch.uint8).argmax(1).min())
        rows.acted_on[edit.key] = first
    return min(rows.acted_on[edit.key] for edit in edits)


def first_edited(server: OperandServer, edits: tuple[Edit, ...]) -> int:
    """The first query of a call that any of these edits changes, in any row, as far as their methods' `span` says.

    Waits for the device once in a prompt's call, and never in a step.
    """
    rows, n_q = server.known_rows(), server.call.q.shape[2]
    starts = [e.method.span[0] if isinstance(e.method, ScoresMethod) else None for e in edits]
    if (
        n_q == 1
        or None in starts
        or torch.compiler.is_compiling()
        or (rows.first is not None and rows.first.ndim != 1)
    ):
        return 0
    if rows.prompt_end is None:
        length = server.prompt_len()
        first = torch.zeros_like(length) if rows.first is None else rows.first.to(length.device)
        rows.prompt_end = int((first.repeat_interleave(len(length) // len(first), 0) + length).min())
    start = rows.prompt_end - rows.begins_at() + min(s for s in starts if s is not None)
    return min(max(start, 0), n_q)
