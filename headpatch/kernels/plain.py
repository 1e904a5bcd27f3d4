"""The first-token kernels in plain torch: used where Triton is not, and what the Triton kernels are tested against.

Same arguments, same results, same rules as :mod:`headpatch.kernels.first_token`; arithmetic in fp32 (fp64 for fp64). Long prompts
are worked through in slices that stay in a CPU's cache, so that nothing of the size of q is allocated besides the result.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

EMPTY = -3.0e4
"""Scores and LSEs at or below this (finfo.min masks leave such) belong to keys that nobody sees."""
TINY = 1.0e-6
"""In correction mode a row whose denominator is smaller has no digits left; it stays as it is."""
SLICE = 1 << 18
"""Elements of q (b * H * d * queries) worked on at a time, where each slice takes many operations."""
LONGER = 8
"""By how much slices are longer where each takes two operations."""
ROWS = 64
"""Queries from which on a product for each row of the batch is worth its calls."""


def coefficients(
    s: Tensor, lse: Tensor, g: Tensor, sink: Tensor | None, seen: Tensor | None, complement: bool
) -> tuple[Tensor, Tensor]:
    """Return u and w of ``out = u * o + w * v0``, for scores `s` of the first token; all broadcast, `seen` None: everywhere."""
    full = (lse > EMPTY) & (lse < math.inf)
    if complement:
        x = s + g.log()
        if seen is not None:
            x = x.masked_fill(~seen, -math.inf)
        if sink is not None:
            rest = lse.masked_fill(~full, -math.inf)
            top = torch.maximum(torch.maximum(rest, x), sink)
            a, c = (rest - top).exp(), (x - top).exp()
            n = a + c + (sink - top).exp()
            return a / n, c / n
        e = x - lse.masked_fill(~full, 0.0)
        alone = ~full if seen is None else ~full & seen  # nothing but the first token: its value, whatever the weight
        return torch.sigmoid(-e).masked_fill(alone, 0.0), torch.sigmoid(e).masked_fill(alone, 1.0)
    shown = full if seen is None else full & seen
    total, u = lse, torch.ones_like(lse)
    if sink is not None:
        total = torch.logaddexp(lse, sink)
        u = (lse - total).exp().masked_fill(~full, 1.0)
    p = (s - total).exp().clamp(max=1.0).masked_fill(~shown, 0.0)
    a = (g - 1.0) * p
    good = 1.0 + a > TINY
    den = torch.where(good, 1.0 + a, 1.0)
    return torch.where(good, u / den, u), torch.where(good, a / den, 0.0)


def cap(s: Tensor, softcap: float) -> Tensor:
    """Soft-capped scores."""
    return softcap * torch.tanh(s / softcap) if softcap > 0 else s


def merge_dense(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, head_scale: Tensor | None, first: Tensor | None,
    mask: Tensor | None, sink: Tensor | None, scale: float, complement: bool, kv_offset: int, window: int, q_start: int,
    softcap: float, inplace: bool,
) -> Tensor:  # fmt: skip
    """As :func:`headpatch.kernels.first_token.merge_first_token`, arguments in one row."""
    b, H, lq, _ = q.shape
    shift = lq - o.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    if (
        lq == 1
        and complement
        and k.shape[2] > 1
        and first is mask is sink is None
        and not (kv_offset or window or inplace)
    ):
        return _one_query(q.to(work), k, v, o, lse.to(work), gamma.to(work), head_scale, scale, softcap)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, o, lse, gamma))
    whole = grad or torch.compiler.is_compiling()
    # Scores of one first token a row are small and had at once; a first token for each query has keys as large as q.
    at_once = not whole and (first is None or first.dim() == 1)
    size = lq if whole else max(1, (SLICE * LONGER if at_once else SLICE) // (b * H * q.shape[3]))
    out = None if whole else (o.transpose(1, 2) if inplace else q.new_empty((b, lq, H, o.shape[3]), dtype=o.dtype))
    g = gamma.to(work).view(1, H, 1)
    c = None if head_scale is None else head_scale.to(work).view(1, H, 1)
    z = None if sink is None else sink.to(work).view(1, H, 1)

    def shares(i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """u, w [b, H, j - i] and the first token's value [b, H, 1 or j - i, dv] for queries i:j."""
        k0, v0, bias, seen = _first_token(k, v, first, mask, kv_offset, window, q_start, lq, i, j)
        lc = lse[:, :, max(i - shift, 0) : j - shift].to(work)
        if i < shift:  # query 0 saw nothing else
            lc = torch.cat([lc.new_full((b, H, 1), -math.inf), lc], 2)
        s = cap(_scores(q[:, :, i:j], k0.to(work), whole) * scale, softcap)
        if bias is not None:
            s = s + bias
        u, w = coefficients(s, lc, g, z, seen, complement)
        if c is not None:
            u, w = u * c, w * c
        return u, w, _per_query_head(v0.to(work), H)

    every = shares(0, lq) if at_once else None
    pieces = []
    if whole:  # no range: its length would tie a compiler's graph to this number of queries
        edges = [0, shift, lq] if shift else [0, lq]
    else:
        edges = [0, *range(shift, lq, size), lq] if shift else [*range(0, lq, size), lq]
    for i, j in itertools.pairwise(edges):
        if i == j:
            continue
        if shift and i == 0:
            oc = torch.zeros((), dtype=work, device=q.device).expand(b, H, 1, o.shape[3])
        else:
            oc = o[:, :, i - shift : j - shift]
        u, w, v0 = shares(i, j) if every is None else (every[0][:, :, i:j], every[1][:, :, i:j], every[2])
        u, w = u.unsqueeze(-1), w.unsqueeze(-1)
        guard = True  # where o has no share it may be NaN; on a CPU one can look whether there is such a row
        if not whole and q.device.type == "cpu":
            guard = bool((u == 0).any())
        if out is None:
            y = oc.to(work) * u
            pieces.append(((y.masked_fill(u == 0, 0.0) if guard else y) + v0 * w).to(o.dtype).transpose(1, 2))
            continue
        target = out[:, i:j].transpose(1, 2)
        y = torch.mul(oc, u, out=target) if out.dtype == work and not guard else oc.to(work) * u
        if guard:
            y.masked_fill_(u == 0, 0.0)
        y.addcmul_(v0.expand_as(y), w)
        if y is not target:
            target.copy_(y)
    if out is not None:
        return out
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    if inplace:
        o.copy_(result.transpose(1, 2))
        return o.transpose(1, 2)
    return result.contiguous()


def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    gamma: Tensor,
    head_scale: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Complement mode for a decoding step without a mask, in as few operations as there can be: each costs every layer its launch."""
    (b, H, _, d), K = q.shape, k.shape[1]
    s = torch.matmul(q.view(b, K, H // K, d), k[:, :, :1].to(q.dtype).transpose(2, 3)).view(b, H, 1)
    w = torch.sigmoid(torch.sub(torch.add(gamma.log().view(1, H, 1), cap(s * scale, softcap)), lse)).unsqueeze(-1)
    out = torch.lerp(o.to(q.dtype), _per_query_head(v[:, :, :1].to(q.dtype), H), w)
    if head_scale is not None:
        out = out * head_scale.to(q.dtype).view(1, H, 1, 1)
    return out.to(o.dtype).view(b, 1, H, o.shape[3])


def _first_token(
    k: Tensor, v: Tensor, first: Tensor | None, mask: Tensor | None, kv_offset: int, window: int, q_start: int, lq: int,
    i: int, j: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Key and value [b, K, 1 or j - i, d] of the first token for queries i:j, its mask values, and who sees it ([b, ?, ?])."""
    b, K, lk, _ = k.shape
    seen: Tensor | None = None
    if first is None:
        index = torch.full((1, 1), -kv_offset, dtype=torch.int64, device=k.device)
        inside = 0 <= -kv_offset < lk
        start = -kv_offset if inside else 0
        k0, v0 = k[:, :, start : start + 1], v[:, :, start : start + 1]
        if not inside:
            seen = torch.zeros((1, 1, 1), dtype=torch.bool, device=k.device)
    else:
        index = first.to(torch.int64) - kv_offset
        index = index[:, None] if first.dim() == 1 else (index[:, i:j] if index.shape[1] > 1 else index)
        seen = ((index >= 0) & (index < lk))[:, None]
        at = index.clamp(0, lk - 1).expand(b, -1)[:, None, :, None]
        k0 = k.gather(2, at.expand(b, K, at.shape[2], k.shape[3]))
        v0 = v.gather(2, at.expand(b, K, at.shape[2], v.shape[3]))
    if window > 0:
        near = (torch.arange(q_start + i, q_start + j, device=k.device) - index < window)[:, None]
        seen = near if seen is None else seen & near
    bias = None
    if mask is not None:
        part = mask[:, :, i:j] if mask.shape[2] > 1 else mask
        rows, n = max(part.shape[0], index.shape[0]), max(part.shape[2], index.shape[1])
        at = index.clamp(0, lk - 1).expand(rows, n)[:, None, :, None].expand(rows, part.shape[1], n, 1)
        m = part.expand(rows, -1, n, -1).gather(3, at).squeeze(3)
        if m.dtype != torch.bool:
            bias = m
            m = m > EMPTY
        seen = m if seen is None else seen & m
    return k0, v0, bias, seen


def _scores(q: Tensor, k0: Tensor, whole: bool) -> Tensor:
    """<q, k0> [b, H, l] in k0's dtype for q [b, H, l, d] and k0 [b, K, 1 or l, d]; `whole`: as a compiler can trace it."""
    (b, H, n, d), K = q.shape, k0.shape[1]
    if k0.shape[2] == 1 and not whole and n > ROWS:
        # One product a row of the batch: q keeps its strides, which a product of four dimensions would copy. Small slices are
        # converted at a time.
        k0 = _per_query_head(k0, H)
        size = n if q.dtype == k0.dtype else max(1, SLICE // (H * d))
        cuts = range(0, n, size)
        rows = [
            torch.cat([torch.bmm(k0[r], q[r, :, i : i + size].to(k0.dtype).transpose(1, 2)) for i in cuts], 2)
            for r in range(b)
        ]
        return torch.stack(rows).view(b, H, n)
    q = q.to(k0.dtype)
    grouped = q.view(b, K, H // K, n, d) if H > K else q.unsqueeze(2)
    if k0.shape[2] == 1:
        s = torch.matmul(grouped, k0.unsqueeze(2).transpose(3, 4)).squeeze(-1)
    else:
        s = (grouped * k0.unsqueeze(2)).sum(-1)
    return s.reshape(b, H, n)


def _per_query_head(x: Tensor, H: int) -> Tensor:
    """[b, K, n, d] -> [b, H, n, d], small: n is 1 unless rows are packed."""
    return x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], 1)


def merge_paged(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, o: Tensor, lse: Tensor, out: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, gamma: Tensor, head_scale: Tensor | None, block_slot: Tensor | None,
    row_slot: Tensor | None, sink: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, scale: float,
    complement: bool, block_ratio: int, window: int, softcap: float,
) -> None:  # fmt: skip
    """As :func:`headpatch.kernels.first_token.merge_first_token_paged`, arguments in one row; writes `out`."""
    T, H, d = q.shape
    K, rows = key_cache.shape[1], block_table.shape[0]
    if T == 0 or rows == 0:
        return
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    start = query_start_loc[: rows + 1]
    t = torch.arange(T, device=q.device, dtype=start.dtype)
    row = torch.searchsorted(start[1:].contiguous(), t, right=True).clamp(max=rows - 1)
    length, end = seq_lens[row], start[row + 1]
    ok = (start[row] <= t) & (t < end) & (length > 0)
    position = length - end + t
    block = block_table[row, 0].long()
    if row_slot is not None:
        slot = row_slot[row].long()
    else:
        assert block_slot is not None  # checked by the caller
        ok = ok & (block > 0)
        slot = block_slot[block.clamp(min=0) // block_ratio].long()
    ok = ok & (slot >= 0)
    slot = slot.clamp(min=0)
    seen = ok & (block > 0)
    if window > 0:
        seen = seen & (position < window)
    if not complement:
        seen = seen & (position > 0)
    ok, seen, level = ok[:, None], seen[:, None], lse.transpose(0, 1).to(work)  # [T, 1], [T, 1], [T, H]
    keep = ok if complement else ok & (level > EMPTY) & (level < math.inf)

    at = block.clamp(min=0)
    k0, v0 = key_cache[at, :, 0].to(work), value_cache[at, :, 0].to(work)  # [T, K, d]
    s = (q.to(work).view(T, K, H // K, d) * k0.unsqueeze(2)).sum(-1).view(T, H) * scale
    if k_scale is not None:
        s = s * k_scale.to(work)
    if v_scale is not None:
        v0 = v0 * v_scale.to(work)
    z = None if sink is None else sink.to(work).view(1, H)
    u, w = coefficients(cap(s, softcap), level, gamma[slot].to(work), z, seen & keep, complement)
    c = torch.ones_like(u) if head_scale is None else head_scale[slot].to(work)
    one = torch.ones_like(u)
    u, w, c = torch.where(keep, u, one), torch.where(keep, w, 0.0), torch.where(keep, c, one)
    y = (o.to(work) * (u * c).unsqueeze(-1)).masked_fill(u.unsqueeze(-1) == 0, 0.0)
    y = y.view(T, K, H // K, -1) + v0.unsqueeze(2) * (w * c).view(T, K, H // K, 1)
    out.copy_(y.view(T, H, -1))
