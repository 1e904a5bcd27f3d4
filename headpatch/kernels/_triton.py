"""Triton source of the first-token kernels. Imports triton: only :mod:`headpatch.kernels.first_token` imports this, when needed.

One program handles BT query tokens times GB query heads of one KV head, so that the first token's key and value are read once
a program in the dense kernel and stay in L1 in the paged one; traffic is then reading q and o and writing the result.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

# Two numbers recur below. Scores and LSEs at or below -3e4 (finfo.min masks) belong to keys that nobody sees. And in correction
# mode a row whose denominator is under 1e-6 has no digits left; it stays as it is. first_token.py has the same two by name.


@triton.jit
def _coefficients(s, lse, g, sink, seen, HAS_SINK: tl.constexpr, COMPLEMENT: tl.constexpr):
    """u, w of  out = u * o + w * v0  for each row; all arguments are [rows] in fp32 (`seen` is boolean)."""
    full = (lse > -3.0e4) & (lse < float("inf"))
    if COMPLEMENT:
        x = tl.where(seen, s + tl.log(g), float("-inf"))
        if HAS_SINK:
            rest = tl.where(full, lse, float("-inf"))
            top = tl.maximum(tl.maximum(rest, x), sink)
            a = tl.exp(rest - top)
            c = tl.exp(x - top)
            n = a + c + tl.exp(sink - top)
            u = a / n
            w = c / n
        else:
            e = x - tl.where(full, lse, 0.0)
            u = 1.0 / (1.0 + tl.exp(e))
            w = 1.0 / (1.0 + tl.exp(-e))
            alone = (full == 0) & seen  # nothing but the first token: its value, whatever the weight
            u = tl.where(alone, 0.0, u)
            w = tl.where(alone, 1.0, w)
    else:
        total = lse
        u = tl.full(s.shape, 1.0, tl.float32)
        if HAS_SINK:
            top = tl.maximum(lse, sink)
            total = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
            u = tl.where(full, tl.exp(lse - total), 1.0)
        p = tl.minimum(tl.exp(tl.where(seen & full, s - total, float("-inf"))), 1.0)
        a = (g - 1.0) * p
        den = 1.0 + a
        good = den > 1.0e-6
        w = tl.where(good, a / den, 0.0)
        u = tl.where(good, u / den, u)
    return u, w


@triton.jit(do_not_specialize=["lq", "lk", "kv_offset", "q_start", "window"])
def dense(
    Q, K, V, AO, LSE, OUT, GAMMA, HEAD_SCALE, FIRST, MASK, SINK,
    lq, lk, kv_offset, q_start, window, scale, softcap,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_t, l_b, l_h, l_t, y_b, y_h, y_t, m_b, m_h, m_t, m_n, f_b, f_t,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BT: tl.constexpr, GB: tl.constexpr, SHIFT: tl.constexpr, COMPLEMENT: tl.constexpr, INPLACE: tl.constexpr,
    PER_QUERY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASK_BOOL: tl.constexpr,
):  # fmt: skip
    HB: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    kv = (pid // HB) % KH
    r = tl.arange(0, BT * GB)
    t = (pid // (HB * KH)) * BT + r // GB
    in_group = (pid % HB) * GB + r % GB
    h = kv * G + in_group
    ok = (t < lq) & (in_group < G)
    t = t.to(tl.int64)
    h = h.to(tl.int64)
    kv = kv.to(tl.int64)

    g = tl.load(GAMMA + h, mask=ok, other=1.0).to(tl.float32)
    hs = tl.full(g.shape, 1.0, tl.float32)
    if HEAD_SCALE is not None:
        hs = tl.load(HEAD_SCALE + h, mask=ok, other=1.0).to(tl.float32)
    if INPLACE and not COMPLEMENT and SINK is None:
        ok = ok & ((g != 1.0) | (hs != 1.0))

    # which key is the row's first token, and does the query see it
    if FIRST is None:
        i = tl.full(t.shape, 0, tl.int64) - kv_offset
    elif PER_QUERY:
        i = tl.load(FIRST + b * f_b + t * f_t, mask=ok, other=-1).to(tl.int64) - kv_offset
    else:
        i = tl.full(t.shape, 0, tl.int64) + tl.load(FIRST + b * f_b).to(tl.int64) - kv_offset
    seen = ok & (i >= 0) & (i < lk)
    if WINDOW:
        seen = seen & (q_start + t - i < window)
    bias = tl.full(g.shape, 0.0, tl.float32)
    if MASK is not None:
        m = tl.load(MASK + b * m_b + h * m_h + t * m_t + i * m_n, mask=seen, other=0)
        if MASK_BOOL:
            seen = seen & (m != 0)
        else:
            bias = m.to(tl.float32)
            seen = seen & (bias > -3.0e4)

    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    rest = ok & (t >= SHIFT)
    q = tl.load(
        Q + (b * q_b + h * q_h + t * q_t)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
    )
    o = tl.load(
        AO + (b * o_b + h * o_h + (t - SHIFT) * o_t)[:, None] + dv[None, :],
        mask=rest[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    lse = tl.load(LSE + b * l_b + h * l_h + (t - SHIFT) * l_t, mask=rest, other=float("-inf")).to(tl.float32)
    if PER_QUERY:
        k0 = tl.load(
            K + (b * k_b + kv * k_h + i * k_n)[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
        )
        v0 = tl.load(
            V + (b * v_b + kv * v_h + i * v_n)[:, None] + dv[None, :],
            mask=seen[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        s = tl.sum(q.to(tl.float32) * k0.to(tl.float32), axis=1)
        v0 = v0.to(tl.float32)
    else:  # one first token for the whole program
        j = -kv_offset
        if FIRST is not None:
            j = tl.load(FIRST + b * f_b).to(tl.int64) - kv_offset
        there = (j >= 0) & (j < lk)
        j = tl.where(there, j, 0).to(tl.int64)
        k0 = tl.load(K + b * k_b + kv * k_h + j * k_n + d, mask=d < tl.where(there, D, 0), other=0.0)
        v0 = tl.load(V + b * v_b + kv * v_h + j * v_n + dv, mask=dv < tl.where(there, DV, 0), other=0.0)
        s = tl.sum(q.to(tl.float32) * k0.to(tl.float32)[None, :], axis=1)
        v0 = v0.to(tl.float32)[None, :]
    s = s * scale
    if SOFTCAP:
        s = softcap * (2.0 / (1.0 + tl.exp(-2.0 * s / softcap)) - 1.0)
    s = s + bias
    sink = s
    if SINK is not None:
        sink = tl.load(SINK + h, mask=ok, other=0.0).to(tl.float32)

    u, w = _coefficients(s, lse, g, sink, seen, SINK is not None, COMPLEMENT)
    y = tl.where((u == 0.0)[:, None], 0.0, o.to(tl.float32) * (u * hs)[:, None]) + v0 * (w * hs)[:, None]
    tl.store(
        OUT + (b * y_b + h * y_h + t * y_t)[:, None] + dv[None, :], y.to(OUT.dtype.element_ty),
        mask=ok[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "LSE",
        "BLOCK_TABLE",
        "QUERY_START",
        "SEQ_LENS",
        "n_tokens",
        "n_rows",
        "block_ratio",
        "window",
        "l_h",
    ]
)
def paged(
    Q, KC, VC, AO, LSE, OUT, BLOCK_TABLE, QUERY_START, SEQ_LENS, GAMMA, HEAD_SCALE, BLOCK_SLOT, ROW_SLOT, SINK, K_SCALE, V_SCALE,
    n_tokens, n_rows, block_ratio, window, scale, softcap,
    q_t, q_h, k_b, k_h, k_d, v_b, v_h, v_d, o_t, o_h, l_t, l_h, y_t, y_h, b_r, g_s, s_s,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BT: tl.constexpr, GB: tl.constexpr, COMPLEMENT: tl.constexpr, INPLACE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    # Decoding (BT is 1) waits for memory, not for traffic: what can be asked for at once is, needed or not. Prefill reads less.
    EARLY: tl.constexpr = BT == 1
    pid = tl.program_id(0)
    r = tl.arange(0, BT * GB)
    if SPAN:  # heads of any KV heads
        SB: tl.constexpr = (KH * G + GB - 1) // GB
        t = (pid // SB) * BT + r // GB
        h = (pid % SB) * GB + r % GB
        kv = h // G
        inside = (t < n_tokens) & (h < KH * G)
    else:
        HB: tl.constexpr = (G + GB - 1) // GB
        kv = r * 0 + (pid // HB) % KH
        t = (pid // (HB * KH)) * BT + r // GB
        in_group = (pid % HB) * GB + r % GB
        h = kv * G + in_group
        inside = (t < n_tokens) & (in_group < G)
    ok = inside

    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    at_q = (t.to(tl.int64) * q_t + h.to(tl.int64) * q_h)[:, None] + d[None, :]
    at_o = (t.to(tl.int64) * o_t + h.to(tl.int64) * o_h)[:, None] + dv[None, :]
    at_lse = t.to(tl.int64) * l_t + h.to(tl.int64) * l_h
    if EARLY:  # what needs no look-up first, so that it does not stand behind one
        q = tl.load(Q + at_q, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        o = tl.load(AO + at_o, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        lse = tl.load(LSE + at_lse, mask=inside, other=float("-inf")).to(tl.float32)
    ALL: tl.constexpr = EARLY and SLOTS <= 32  # all recipes' numbers, before it is known whose they should be
    if ALL:
        every = tl.arange(0, triton.next_power_of_2(SLOTS))
        there = (every < SLOTS)[:, None] & inside[None, :]
        g_all = tl.load(GAMMA + every[:, None] * g_s + h[None, :], mask=there, other=1.0).to(tl.float32)
        if HEAD_SCALE is not None:
            hs_all = tl.load(HEAD_SCALE + every[:, None] * s_s + h[None, :], mask=there, other=1.0).to(tl.float32)

    # the row of each token: the last one that starts at or before it. In pure decode (STEPS is 0) it is the token's own number
    lo = tl.minimum(t, n_rows - 1)
    start = tl.load(QUERY_START + lo, mask=ok, other=0)
    end = tl.load(QUERY_START + lo + 1, mask=ok, other=0)
    if STEPS > 0:
        found = (start <= t) & (t < end)
        hi = tl.where(found, lo, n_rows - 1)
        lo = tl.where(found, lo, 0)
        for _ in range(STEPS):
            mid = (lo + hi + 1) // 2
            up = tl.load(QUERY_START + mid, mask=ok & (lo < hi), other=0) <= t
            lo = tl.where((lo < hi) & up, mid, lo)
            hi = tl.where((lo < hi) & (up == 0), mid - 1, hi)
        start = tl.load(QUERY_START + lo, mask=ok, other=0)
        end = tl.load(QUERY_START + lo + 1, mask=ok, other=0)
    length = tl.load(SEQ_LENS + lo, mask=ok, other=0)
    block = tl.load(BLOCK_TABLE + lo.to(tl.int64) * b_r, mask=ok, other=0)
    if ROW_SLOT is not None:
        slot = tl.load(ROW_SLOT + lo, mask=ok, other=-1).to(tl.int64)
    position = length - end + t
    ok = ok & (start <= t) & (t < end) & (length > 0)

    near = ok & (block > 0)  # rows whose first key can be read
    at_k = (block.to(tl.int64) * k_b + kv.to(tl.int64) * k_h)[:, None] + (d * k_d)[None, :]
    at_v = (block.to(tl.int64) * v_b + kv.to(tl.int64) * v_h)[:, None] + (dv * v_d)[None, :]
    if EARLY:
        k0 = tl.load(KC + at_k, mask=near[:, None] & (d < D)[None, :], other=0.0)
        v0 = tl.load(VC + at_v, mask=near[:, None] & (dv < DV)[None, :], other=0.0).to(tl.float32)
    if ROW_SLOT is None:
        ok = near
        slot = tl.load(BLOCK_SLOT + block // block_ratio, mask=ok, other=-1).to(tl.int64)
    ok = ok & (slot >= 0)
    hs = tl.full(lo.shape, 1.0, tl.float32)
    if ALL:
        mine = every[:, None] == slot[None, :]
        g = tl.where(ok, tl.sum(tl.where(mine, g_all, 0.0), axis=0), 1.0)
        if HEAD_SCALE is not None:
            hs = tl.where(ok, tl.sum(tl.where(mine, hs_all, 0.0), axis=0), 1.0)
    else:
        g = tl.load(GAMMA + slot * g_s + h, mask=ok, other=1.0).to(tl.float32)
        if HEAD_SCALE is not None:
            hs = tl.load(HEAD_SCALE + slot * s_s + h, mask=ok, other=1.0).to(tl.float32)
    if not EARLY:
        lse = tl.load(LSE + at_lse, mask=ok, other=float("-inf")).to(tl.float32)
    seen = ok & (block > 0)
    if WINDOW:
        seen = seen & (position < window)
    keep = ok  # rows to compute; with a fresh output, all others are copied
    if not COMPLEMENT:
        seen = seen & (position > 0)
        keep = keep & (lse > -3.0e4) & (lse < float("inf"))
        if SINK is None:
            keep = keep & ((hs != 1.0) | (seen & (g != 1.0)))
    if INPLACE:
        write = keep
    else:
        write = inside
    hs = tl.where(keep, hs, 1.0)

    look = seen & keep
    if not EARLY:
        q = tl.load(Q + at_q, mask=look[:, None] & (d < D)[None, :], other=0.0)
        o = tl.load(AO + at_o, mask=write[:, None] & (dv < DV)[None, :], other=0.0)
        k0 = tl.load(KC + at_k, mask=look[:, None] & (d < D)[None, :], other=0.0)
        v0 = tl.load(VC + at_v, mask=look[:, None] & (dv < DV)[None, :], other=0.0).to(tl.float32)
    s = tl.sum(q.to(tl.float32) * k0.to(tl.float32), axis=1) * scale
    if K_SCALE is not None:
        s = s * tl.load(K_SCALE).to(tl.float32)
    if V_SCALE is not None:
        v0 = v0 * tl.load(V_SCALE).to(tl.float32)
    if SOFTCAP:
        s = softcap * (2.0 / (1.0 + tl.exp(-2.0 * s / softcap)) - 1.0)
    sink = s
    if SINK is not None:
        sink = tl.load(SINK + h, mask=ok, other=0.0).to(tl.float32)

    u, w = _coefficients(s, lse, g, sink, look, SINK is not None, COMPLEMENT)
    u = tl.where(keep, u, 1.0)
    w = tl.where(keep, w, 0.0)
    y = tl.where((u == 0.0)[:, None], 0.0, o.to(tl.float32) * (u * hs)[:, None])
    y += tl.where((w == 0.0)[:, None], 0.0, v0 * (w * hs)[:, None])  # a value that nobody looks at may be anything
    tl.store(
        OUT + (t.to(tl.int64) * y_t + h.to(tl.int64) * y_h)[:, None] + dv[None, :], y.to(OUT.dtype.element_ty),
        mask=write[:, None] & (dv < DV)[None, :],
    )  # fmt: skip


_STEP = [
    "Q",
    "K",
    "V",
    "AO",
    "LSE",
    "GAMMA",
    "HEAD_SCALE",
    "q_b",
    "q_h",
    "k_b",
    "k_h",
    "v_b",
    "v_h",
    "o_b",
    "o_h",
    "l_b",
    "scale",
]


@triton.jit(do_not_specialize=_STEP)
def step(
    Q, K, V, AO, LSE, GAMMA, HEAD_SCALE, q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h, l_b, scale,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    GB: tl.constexpr, COMPLEMENT: tl.constexpr,
):  # fmt: skip
    HB: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    kv = pid // HB
    in_group = (pid % HB) * GB + tl.arange(0, GB)
    ok = in_group < G
    h = kv * G + in_group
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    g = tl.load(GAMMA + h, mask=ok, other=1.0).to(tl.float32)
    hs = tl.full(g.shape, 1.0, tl.float32)
    if HEAD_SCALE is not None:
        hs = tl.load(HEAD_SCALE + h, mask=ok, other=1.0).to(tl.float32)
    if not COMPLEMENT:
        ok = ok & ((g != 1.0) | (hs != 1.0))
    q = tl.load(Q + (b * q_b + h * q_h)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    k0 = tl.load(K + b * k_b + kv.to(tl.int64) * k_h + d, mask=d < D, other=0.0)
    v0 = tl.load(V + b * v_b + kv.to(tl.int64) * v_h + dv, mask=dv < DV, other=0.0).to(tl.float32)
    at = (b * o_b + h * o_h)[:, None] + dv[None, :]
    inside = ok[:, None] & (dv < DV)[None, :]
    o = tl.load(AO + at, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(LSE + b * l_b + h, mask=ok, other=float("-inf")).to(tl.float32)
    s = tl.sum(q.to(tl.float32) * k0.to(tl.float32)[None, :], axis=1) * scale
    u, w = _coefficients(s, lse, g, s, ok, False, COMPLEMENT)
    y = tl.where((u == 0.0)[:, None], 0.0, o * (u * hs)[:, None]) + v0[None, :] * (w * hs)[:, None]
    tl.store(AO + at, y.to(AO.dtype.element_ty), mask=inside)
