"""Triton source of attention whose segments of keys get new shares, and of a look for extreme tokens. Imports triton: only
:mod:`headpatch.kernels.segments` and :mod:`headpatch.kernels.extreme` import this.

One program handles BM queries of one head. It walks over the keys twice: once for the segments' masses, once for the output, with
each key's weight multiplied by what its segment's new share is to the old one.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl


@triton.jit
def _scores(q, K, cols, there, past, rows, k_n, d, scale, D: tl.constexpr, EXACT: tl.constexpr):
    """[BM, BN] scores in base 2, -inf at keys behind the query."""
    k = tl.load(K + cols[None, :] * k_n + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
    x = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
    return tl.where(there[None, :] & (cols[None, :] <= past + rows[:, None]), x, float("-inf"))


@triton.jit
def _members(M0, M1, cols, there, FORM: tl.constexpr):
    """Which keys lie in each segment of a form."""
    in0 = tl.load(M0 + cols, mask=there, other=0) != 0
    in1 = tl.zeros_like(in0)
    in2 = tl.zeros_like(in0)
    if FORM == "redistribute":
        image = in0
        sinks = tl.load(M1 + cols, mask=there, other=0) != 0
        in0 = image & (sinks == 0)
        in1 = image & sinks
        in2 = sinks & (image == 0)
    return in0, in1, in2


_NUMBERS = ["m0_b", "m0_h", "m1_b", "m1_h", "s_b", "N", "n_q", "n_k", "scale", "least", "ratio"]


@triton.jit(do_not_specialize=["M0", "M1", "SPARED", "HEADS", "STRENGTH", *_NUMBERS])
def attend(
    Q, K, V, OUT, HEADS, STRENGTH, M0, M1, SPARED,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, y_b, y_h, y_t, m0_b, m0_h, m1_b, m1_h, s_b, N, n_q, n_k,
    scale, least, ratio,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FORM: tl.constexpr, STRICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b = (tl.program_id(1) // N).to(tl.int64)
    i = tl.program_id(1) % N
    h = i
    if HEADS is not None:
        h = tl.load(HEADS + i)
    h = h.to(tl.int64)
    g = tl.load(STRENGTH + i).to(tl.float32)
    M0 += b * m0_b + h * m0_h
    if M1 is not None:
        M1 += b * m1_b + h * m1_h
    K += b * k_b + (h // G) * k_h
    V += b * v_b + (h // G) * v_h

    rows = tile * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    ok = rows < n_q
    past = n_k - n_q
    end = tl.minimum(n_k, past + (tile + 1) * BM)
    q = tl.load(
        Q + b * q_b + h * q_h + rows[:, None] * q_t + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
    )

    top = tl.full([BM], float("-inf"), tl.float32)
    a0 = tl.zeros([BM], tl.float32)
    a1 = tl.zeros([BM], tl.float32)
    a2 = tl.zeros([BM], tl.float32)
    other = tl.zeros([BM], tl.float32)
    for start in range(0, end, BN):  # every query sees key 0, so that `top` is finite from the first block on
        cols = start + tl.arange(0, BN)
        there = cols < n_k
        x = _scores(q, K, cols, there, past, rows, k_n, d, scale, D, EXACT)
        in0, in1, in2 = _members(M0, M1, cols, there, FORM)
        higher = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - higher[:, None])
        faded = tl.exp2(top - higher)
        top = higher
        a0 = a0 * faded + tl.sum(tl.where(in0[None, :], p, 0.0), 1)
        if FORM == "redistribute":
            a1 = a1 * faded + tl.sum(tl.where(in1[None, :], p, 0.0), 1)
            a2 = a2 * faded + tl.sum(tl.where(in2[None, :], p, 0.0), 1)
        other = other * faded + tl.sum(tl.where((in0 | in1 | in2)[None, :], 0.0, p), 1)

    total = a0 + a1 + a2 + other
    w0 = tl.full([BM], 1.0, tl.float32)
    w1 = w0
    w2 = w0
    w_rest = w0
    if FORM == "redistribute":  # content, visual sinks and text sinks
        image = a0 + a1
        gate = (image >= least * total) & (a0 >= ratio * image) & (a0 > 0.0)
        if STRICT:
            gate = gate & (a1 > 0.0)
        spared = tl.load(SPARED + b * s_b + rows, mask=ok, other=1)
        moved = tl.where(gate & (spared == 0), g, 0.0)
        w0 = 1.0 + moved * (a1 + a2) / tl.where(a0 > 0.0, a0, 1.0)
        w1 = 1.0 - moved
        w2 = w1
    else:  # calibrate: sinks
        seen = other > 0.0  # or there is nobody to hand the sinks' attention to
        w0 = tl.where(seen, g, 1.0)
        w_rest = tl.where(seen, 1.0 + (1.0 - g) * a0 / tl.where(seen, other, 1.0), 1.0)
    w0 = tl.minimum(w0, 1e37)
    w_rest = tl.minimum(w_rest, 1e37)
    # Weighted probabilities of at most one, and no smaller than they need be: that the values' type holds well.
    most = tl.maximum(w0 * tl.minimum(a0, 1.0), w_rest * tl.minimum(other, 1.0))
    most = tl.maximum(most, tl.maximum(w1 * tl.minimum(a1, 1.0), w2 * tl.minimum(a2, 1.0)))
    w0 = w0 / most
    w1 = w1 / most
    w2 = w2 / most
    w_rest = w_rest / most

    y = tl.zeros([BM, DP], tl.float32)
    for start in range(0, end, BN):
        cols = start + tl.arange(0, BN)
        there = cols < n_k
        x = _scores(q, K, cols, there, past, rows, k_n, d, scale, D, EXACT)
        in0, in1, in2 = _members(M0, M1, cols, there, FORM)
        w = tl.where(in0[None, :], w0[:, None], w_rest[:, None])
        if FORM == "redistribute":
            w = tl.where(in1[None, :], w1[:, None], tl.where(in2[None, :], w2[:, None], w))
        p = tl.exp2(x - top[:, None]) * w
        v = tl.load(V + cols[:, None] * v_n + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        y = tl.dot(p.to(v.dtype), v, y, input_precision="ieee" if EXACT else "tf32")
    y = y * (most / total)[:, None]
    tl.store(
        OUT + b * y_b + h * y_h + rows[:, None] * y_t + d[None, :], y.to(OUT.dtype.element_ty),
        mask=ok[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["DIMS", "FOUND", "x_b", "x_t", "length", "square", "floor"])
def extreme(
    X, DIMS, FOUND, x_b, x_t, length, square, floor, W: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64)
    X += (at // length) * x_b + (at % length) * x_t
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, W, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(X + d, mask=d < W, other=0.0).to(tl.float32)
        total += x * x
    i = tl.arange(0, triton.next_power_of_2(COUNT))
    place = tl.load(DIMS + i, mask=i < COUNT, other=0)
    peak = tl.max(tl.abs(tl.load(X + place, mask=i < COUNT, other=0.0).to(tl.float32)), 0)
    tl.store(FOUND + at, peak * peak >= tl.sum(total, 0) * square + floor)
