"""Attention that also says its log-sum-exp: one small interface over what each device has.

``attend(q, k, v, ...) -> (o, L)`` with o [b, H, q, d] and L [b, H, q] (fp32, fp64 for fp64 inputs; natural log; -inf where a row
sees no key). The sources, best first; the first that can take the call is used:

* CPU: ``aten._scaled_dot_product_flash_attention_for_cpu``. Traps: no keys at all kills the process (SIGFPE); a row that is masked
  with -inf throughout reports L = 0; boolean masks are refused; ``is_causal`` aligns top-left; value width must equal key width.
* CUDA without a mask: ``aten._scaled_dot_product_cudnn_attention`` for prompts where cuDNN is the fastest (Hopper and later: half
  the time of the next, measured on an H200), else ``_scaled_dot_product_flash_attention``; with a mask:
  ``_scaled_dot_product_efficient_attention``. Traps: cuDNN with a mask gave wrong numbers or misaligned addresses; the
  efficient kernel turns finfo.min into -inf and then into garbage on rows that see nothing.
* Anywhere: :func:`attend_tiled`, plain torch over blocks of queries, O(n) memory, differentiable, soft-capping included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from headpatch.segments import log_sum_exp

__all__ = ["attend", "attend_last", "attend_tiled", "flash_for_cpu", "products", "queries_at_once", "repeat_kv", "score_dtype",
           "source"]  # fmt: skip

# torch's own bindings, where there are any: a third of what a call through torch.ops costs the host.
_flash = getattr(torch, "_scaled_dot_product_flash_attention", torch.ops.aten._scaled_dot_product_flash_attention)
flash_for_cpu = getattr(
    torch, "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)

HIDDEN = -1e30
"""Added to the scores of invisible keys. Finite after a kernel has multiplied it by log2(e), which finfo.min is not."""
FILL = 128
"""Rows of attention that keep a large GPU busy."""
BLOCK = 256
"""Queries that the tiled fallback handles at once."""
ROOM = 1 << 24
"""Numbers in a block on a GPU, where every block costs its launches: 64 MiB of fp32."""


def score_dtype(x: Tensor) -> torch.dtype:
    """fp32 for every input dtype but fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """[b, K, n, d] -> [b, K * groups, n, d]: each KV head once per query head that it serves."""
    if groups == 1:
        return x
    b, kv, n, d = x.shape
    return x[:, :, None].expand(b, kv, groups, n, d).reshape(b, kv * groups, n, d)


def products(q: Tensor, k: Tensor) -> Tensor:
    """[b, H, q, n] in at least fp32, of q [b, H, q, d] and k [b, H, n, d]; on a GPU without copies of either."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.unflatten(0, q.shape[:2])
    wide = score_dtype(q)
    return torch.matmul(q.to(wide), k.to(wide).transpose(2, 3))


def queries_at_once(q: Tensor, least: int, numbers: int) -> int:
    """Queries of a block: `least`, and on a GPU as many as there is room for where each takes so many `numbers`."""
    return least if q.device.type == "cpu" else max(least, ROOM // max(1, numbers) // 8 * 8)


def source(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> str:
    """Which source :func:`attend` uses: ``cpu_flash``, ``cuda_cudnn``, ``cuda_flash``, ``cuda_efficient`` or ``tiled``."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad or softcap is not None or q.shape[-1] != v.shape[-1] or k.shape[2] == 0:
        return "tiled"
    if q.device.type == "cpu":
        return "cpu_flash"
    if q.device.type == "cuda" and torch.version.hip is None and q.shape[-1] % 8 == 0:
        if mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
            return "cuda_cudnn" if q.shape[2] > 1 and q.shape[-1] <= 128 and _prefers_cudnn(q.device) else "cuda_flash"
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
    if name == "cuda_cudnn":
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out[0], out[1].squeeze(-1) if out[1].ndim == 4 else out[1]
    if name == "cuda_flash":
        # Grouped heads are native; any strides with contiguous rows will do. Torch 2.11's compiler does not trace the binding.
        flash = torch.ops.aten._scaled_dot_product_flash_attention if torch.compiler.is_compiling() else _flash
        out = flash(q, k, v, 0.0, causal, False, scale=scale)
        return out[0], out[1]
    bias = None
    if mask is not None:
        low = _hidden(q.dtype)
        if mask.dtype == torch.bool:
            # Finite and not -inf: the CPU kernel reports L = 0 for rows that are -inf throughout.
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, low)
        else:
            bias = mask.clamp_min(low)
    if name == "cpu_flash":
        o, lse = flash_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        o, lse = _efficient(q, k, v, bias, causal, scale)
    return o, lse if bias is None else _blind(lse, q.dtype)


def attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """:func:`attend` where the queries are the last of the keys' tokens: causal, without a mask."""
    past = k.shape[2] - q.shape[2]
    if past and source(q, k, v, None, softcap) in ("cuda_cudnn", "cuda_flash"):
        # This kernel aligns causality at the last query, whatever SDPA makes of that.
        flash = torch.ops.aten._scaled_dot_product_flash_attention if torch.compiler.is_compiling() else _flash
        out = flash(q, k, v, 0.0, True, False, scale=scale)
        return out[0], out[1]
    o, lse = attend(q, k[:, :, past:], v[:, :, past:], causal=True, scale=scale, softcap=softcap)
    if not past:
        return o, lse
    before, its_lse = attend(q, k[:, :, :past], v[:, :, :past], scale=scale, softcap=softcap)
    share = torch.sigmoid(its_lse - lse).unsqueeze(-1)
    return torch.lerp(o.to(share.dtype), before.to(share.dtype), share).to(o.dtype), torch.logaddexp(lse, its_lse)


def _hidden(dtype: torch.dtype) -> float:
    return max(HIDDEN, torch.finfo(dtype).min)


def _blind(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where every score is a hidden one."""
    return lse.masked_fill(lse < _hidden(dtype) / 2, -math.inf)


@functools.cache
def _has_fast_cudnn(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9 and torch.backends.cudnn.is_available()


def _prefers_cudnn(device: torch.device) -> bool:
    """Whether untouched SDPA would take cuDNN for a long prompt here."""
    if torch.compiler.is_compiling() or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return _has_fast_cudnn(device.index if device.index >= 0 else torch.cuda.current_device())


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and (bias is None or bias.shape[1] == 1):
        return _one_query(q, k, v, bias, scale, _run_efficient)
    return _run_efficient(q, repeat_kv(k, groups), repeat_kv(v, groups), bias, causal, scale)


Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, float], tuple[Tensor, Tensor]]


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """A decoding step on a kernel that knows neither grouped heads nor split keys.

    The query heads of a group become the queries of one attention, so that K and V need no copies; and where there are few rows,
    the keys are cut into pieces that stand side by side as further heads (views again), merged by their log-sum-exps.
    """
    b, heads, _, d = q.shape
    kv, n = k.shape[1:3]
    groups, pieces = heads // kv, _pieces(b * kv, n)
    q = q.reshape(b, kv, 1, groups, d).expand(-1, -1, pieces, -1, -1).reshape(b, kv * pieces, groups, d)
    k = k.unflatten(2, (pieces, n // pieces)).flatten(1, 2) if pieces > 1 else k
    v = v.unflatten(2, (pieces, n // pieces)).flatten(1, 2) if pieces > 1 else v
    if bias is not None:
        bias = bias.expand(b, 1, 1, n).reshape(b, 1, pieces, 1, n // pieces)
        bias = bias.expand(-1, kv, -1, groups, -1).reshape(b, kv * pieces, groups, n // pieces)
    o, lse = kernel(q, k, v, bias, False, scale)
    o, lse = o.reshape(b, kv, pieces, groups, -1), lse.reshape(b, kv, pieces, groups)
    if pieces > 1:
        total = torch.logsumexp(lse, 2)
        share = torch.exp(lse - total.unsqueeze(2)).unsqueeze(-1)
        o, lse = (o.to(share.dtype) * share).sum(2).to(o.dtype), total
    return o.reshape(b, heads, 1, -1), lse.reshape(b, heads, 1)


def _pieces(rows: int, keys: int) -> int:
    """Into how many pieces of equal, aligned length the keys are cut: enough to fill a GPU, none shorter than 256 keys."""
    best = 1
    for pieces in (2, 4, 8, 16, 32):
        if rows * best < FILL and keys % (pieces * 8) == 0 and keys // pieces >= 256:
            best = pieces
    return best


def _run_efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if bias is not None:
        n_k = bias.shape[-1]
        padded = -(-n_k // 8) * 8
        if padded != n_k or bias.stride(-2) % 8:
            # The kernel wants rows of the bias aligned; the extra columns are never read.
            wide = bias.new_zeros(*bias.shape[:-1], padded)
            wide[..., :n_k] = bias
            bias = wide[..., :n_k]
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], n_k)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out[0], out[1][..., : q.shape[2]]  # the log-sum-exp is padded to a multiple of 32 queries


def attend_tiled(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float,
    softcap: float | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`attend` in plain torch, `BLOCK` queries at a time: any device, dtype and width, differentiable, O(n) memory.

    With gradients each block is recomputed in the backward pass instead of stored. `bias` [b or 1, H, 1, n] is added to the
    scores (after soft-capping) and is differentiable too.
    """
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
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
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~seen, -math.inf)
        else:
            low = _hidden(mask.dtype)
            scores = scores + seen.clamp_min(low).to(compute)
    if start is not None:
        rows = torch.arange(n_q, device=q.device)[:, None] + start
        scores = scores.masked_fill(torch.arange(n_k, device=q.device) > rows, -math.inf)
    if n_k == 0:
        return q.new_zeros(b, heads, n_q, v.shape[-1]), scores.new_full((b, heads, n_q), -math.inf)
    lse = log_sum_exp(scores)
    blind = torch.isneginf(lse)
    # Softmax by hand: one that stays finite (and differentiable) on rows that see nothing.
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    out = torch.matmul(weights.view(b, kv, -1, n_k), v.to(compute)).view(b, heads, n_q, -1)
    return out.to(q.dtype), lse
