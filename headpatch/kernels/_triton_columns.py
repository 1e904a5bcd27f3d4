"""Triton source of the attention that keys receive. Imports triton: only :mod:`headpatch.kernels.columns` imports this.

Rows are normalised first (`rows`: a log-sum-exp for each query), then every program of `columns` adds up BN keys' attention over the
queries that see them: the map is made twice in pieces, and nowhere stored.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

from headpatch.kernels._triton_segments import _scores


@triton.jit
def _place(HEADS, N):
    """Row of the batch, place of the head among those asked for, and its id."""
    b = (tl.program_id(1) // N).to(tl.int64)
    i = tl.program_id(1) % N
    h = i
    if HEADS is not None:
        h = tl.load(HEADS + i)
    return b, i, h.to(tl.int64)


@triton.jit(do_not_specialize=["HEADS", "LSE", "N", "n_q", "n_k", "scale"])
def rows(
    Q, K, HEADS, LSE, q_b, q_h, q_t, k_b, k_h, k_n, N, n_q, n_k, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, _, h = _place(HEADS, N)
    K += b * k_b + (h // G) * k_h
    at = tile * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    ok = at < n_q
    past = n_k - n_q
    q = tl.load(Q + b * q_b + h * q_h + at[:, None] * q_t + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, tl.minimum(n_k, past + (tile + 1) * BM), BN):
        cols = start + tl.arange(0, BN)
        x = _scores(q, K, cols, cols < n_k, past, at, k_n, d, scale, D, EXACT)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher
    tl.store(LSE + tl.program_id(1).to(tl.int64) * n_q + at, top + tl.log2(total), mask=ok)


@triton.jit(do_not_specialize=["HEADS", "LSE", "COUNTED", "SUMS", "c_b", "N", "n_q", "n_k", "scale"])
def columns(
    Q, K, HEADS, LSE, COUNTED, SUMS, q_b, q_h, q_t, k_b, k_h, k_n, c_b, N, n_q, n_k, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)  # the first keys are seen by most queries
    b, _, h = _place(HEADS, N)
    Q += b * q_b + h * q_h
    K += b * k_b + (h // G) * k_h
    LSE += tl.program_id(1).to(tl.int64) * n_q
    cols = tile * BN + tl.arange(0, BN)
    there = cols < n_k
    past = n_k - n_q
    d = tl.arange(0, DP)
    received = tl.zeros([BN], tl.float32)
    begin = tl.maximum(0, tile * BN - past) // BM * BM  # earlier queries see none of these keys
    for start in range(begin, n_q, BM):
        at = start + tl.arange(0, BM)
        ok = at < n_q
        q = tl.load(Q + at[:, None] * q_t + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        lse = tl.load(LSE + at, mask=ok, other=0.0)
        counts = (tl.load(COUNTED + b * c_b + at, mask=ok, other=0) != 0) & ok
        x = _scores(q, K, cols, there, past, at, k_n, d, scale, D, EXACT)
        received += tl.sum(tl.where(counts[:, None], tl.exp2(x - lse[:, None]), 0.0), 0)
    tl.store(SUMS + tl.program_id(1).to(tl.int64) * n_k + cols, received, mask=there)
