"""Attention that also says its log-sum-exp: one small interface over what each device has.

``attend(q, k, v, ...) -> (o, L)`` with o [b, H, q, d] and L [b, H, q] (fp32, fp64 for fp64 inputs; natural log; -inf where a row sees no
key). The sources, best first; the first that can take the call is used:

* CPU: ``aten._scaled_dot_product_flash_attention_for_cpu``. Traps: no keys at all kills the process (SIGFPE); a row that is masked
  with -inf throughout reports L = 0; boolean masks are refused; ``is_causal`` aligns top-left; value width must equal key width.
* CUDA without a mask: ``aten._scaled_dot_product_flash_attention``; with one: ``_scaled_dot_product_efficient_attention``.
* Anywhere: :func:`attend_tiled`, plain torch over blocks of queries, O(n) memory, differentiable, soft-capping included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

__all__ = ["attend", "attend_tiled", "repeat_kv", "score_dtype", "source"]

BLOCK = 256
"""Queries that the tiled fallback handles at once."""


def score_dtype(x: Tensor) -> torch.dtype:
    """fp32 for every input dtype but fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """[b, K, n, d] -> [b, K * groups, n, d]: each KV head once per query head that it serves."""
    if groups == 1:
        return x
    b, kv, n, d = x.shape
    return x[:, :, None].expand(b, kv, groups, n, d).reshape(b, kv * groups, n, d)


def source(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> str:
    """Which source :func:`attend` uses for this call: ``cpu_flash``, ``cuda_flash``, ``cuda_efficient`` or ``tiled``."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad or softcap is not None or q.shape[-1] != v.shape[-1] or k.shape[2] == 0:
        return "tiled"
    if q.device.type == "cpu":
        return "cpu_flash"
    if q.device.type == "cuda" and torch.version.hip is None and q.shape[-1] % 8 == 0:
        if mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
            return "cuda_flash"
        if q.dtype in (torch.float16, torch.bfloat16, torch.float32):
            return "cuda_efficient"
    return "tiled"


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention output and log-sum-exp.

    Parameters
    ----------
    q, k, v
        [b, H, q, d], [b, K, n, d], [b, K, n, dv]; K divides H.
    mask
        [b or 1, H or 1, q, n]: bool (True: visible), or float to be added to the scores; None for all visible.
    causal
        Only with q == n and without a mask: query i sees keys 0..i.
    scale, softcap
        Scores are ``softcap * tanh(scale * q.k / softcap)``.

    Returns
    -------
    (o, L)
        [b, H, q, dv] in q's dtype and [b, H, q]. Where a row sees no key, o is finite and L is -inf.
    """
    name = source(q, k, v, mask, softcap)
    if name == "tiled":
        o, lse = attend_tiled(q, k, v, mask=mask, causal=causal, scale=scale, softcap=softcap)
        return o, lse if mask is None else _blind(lse, q.dtype)
    if name == "cuda_flash":
        # Grouped heads are native; any strides with contiguous rows will do.
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out[0], out[1]
    bias = None
    if mask is not None:
        bias = mask
        if mask.dtype == torch.bool:
            # finfo.min and not -inf: the CPU kernel reports L = 0 for rows that are -inf throughout.
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, torch.finfo(q.dtype).min)
    if name == "cpu_flash":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        o, lse = _efficient(q, k, v, bias, causal, scale)
    return o, lse if bias is None else _blind(lse, q.dtype)


def _blind(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where every visible score is a masked one (finfo.min of the model's dtype)."""
    return lse.masked_fill(lse < torch.finfo(dtype).min / 2, -math.inf)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    b, heads, n_q, _ = q.shape
    fold = groups > 1 and n_q == 1 and (bias is None or bias.shape[1] == 1)
    if fold:
        # One query per row: the heads of a group become rows of one attention, and K, V need no copies.
        q = q.reshape(b, k.shape[1], groups, -1)
    else:
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    if bias is not None:
        n_k = bias.shape[-1]
        padded = -(-n_k // 8) * 8
        if padded != n_k or bias.stride(-2) % 8:
            # The kernel wants rows of the bias aligned; the extra columns are never read.
            wide = bias.new_zeros(*bias.shape[:-1], padded)
            wide[..., :n_k] = bias
            bias = wide[..., :n_k]
        bias = bias.expand(b, q.shape[1], q.shape[2], n_k)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    o, lse = out[0], out[1][..., : q.shape[2]]  # the log-sum-exp is padded to a multiple of 32 queries
    if fold:
        o, lse = o.reshape(b, heads, 1, -1), lse.reshape(b, heads, 1)
    return o, lse


def attend_tiled(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float,
    softcap: float | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`attend` in plain torch, `BLOCK` queries at a time: any device, dtype and width, differentiable, O(n) memory.

    With gradients each block is recomputed in the backward pass instead of stored. `bias` [b or 1, H, 1, n] is added to the
    scores (after soft-capping) and is differentiable too.
    """
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, bias)
    )
    outs, lses = [], []
    for i in range(0, q.shape[2], BLOCK):
        block = q[:, :, i : i + BLOCK]
        seen = None if mask is None else mask[:, :, i : i + BLOCK]
        args: tuple[Any, ...] = (block, k, v, seen, i if causal else None, scale, softcap, bias)
        if needs_grad:
            o, lse = torch.utils.checkpoint.checkpoint(_block, *args, use_reentrant=False)
        else:
            o, lse = _block(*args)
        outs.append(o)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None, scale: float, softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, heads, n_q, d = q.shape
    kv, n_k = k.shape[1:3]
    if start is not None:
        k, v, n_k = k[:, :, : start + n_q], v[:, :, : start + n_q], min(n_k, start + n_q)
        bias = None if bias is None else bias[..., :n_k]
    compute = score_dtype(q)
    grouped = q.reshape(b, kv, -1, d).to(compute)
    scores = torch.matmul(grouped, k.to(compute).transpose(2, 3)).view(b, heads, n_q, n_k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(compute)
    if mask is not None:
        seen = mask[..., :n_k]
        scores = scores.masked_fill(~seen, -math.inf) if mask.dtype == torch.bool else scores + seen.to(compute)
    if start is not None:
        rows = torch.arange(n_q, device=q.device)[:, None] + start
        scores = scores.masked_fill(torch.arange(n_k, device=q.device) > rows, -math.inf)
    if n_k == 0:
        return q.new_zeros(b, heads, n_q, v.shape[-1]), scores.new_full((b, heads, n_q), -math.inf)
    lse = torch.logsumexp(scores, -1)
    blind = torch.isneginf(lse)
    # Softmax by hand: one that stays finite (and differentiable) on rows that see nothing.
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    out = torch.matmul(weights.view(b, kv, -1, n_k), v.to(compute)).view(b, heads, n_q, -1)
    return out.to(q.dtype), lse
