"""Triton source of :mod:`headpatch.kernels.affine`, which alone imports this, when needed. One program: a token, some heads."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows"])
def affine(
    OUT, FACTOR, SHIFT, START, STOP, ROW_SLOT, ROW_PROMPT, QUERY_START, SEQ_LENS,
    n_rows, o_t, o_h, f_s, s_s, s_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    # the row of the token: the last one that starts at or before it. In pure decode it is the token's own number
    guess = tl.minimum(t, n_rows - 1)
    found = (tl.load(QUERY_START + guess) <= t) & (t < tl.load(QUERY_START + guess + 1))
    lo = tl.where(found, guess, 0)
    hi = tl.where(found, guess, n_rows - 1)
    for _ in range(STEPS):
        mid = (lo + hi + 1) // 2
        up = tl.load(QUERY_START + mid) <= t
        lo = tl.where((lo < hi) & up, mid, lo)
        hi = tl.where((lo < hi) & (up == 0), mid - 1, hi)
    end = tl.load(QUERY_START + lo + 1)
    length = tl.load(SEQ_LENS + lo)
    slot = tl.load(ROW_SLOT + lo).to(tl.int64)
    mine = (t < end) & (length > 0) & (slot >= 0)
    slot = tl.maximum(slot, 0)
    position = (length - end + t).to(tl.int64) - tl.load(ROW_PROMPT + lo)
    mine = mine & (tl.load(START + slot) <= position) & (position < tl.load(STOP + slot))

    h = tl.program_id(1) * BH + tl.arange(0, BH)
    d = tl.arange(0, DP)
    ok = tl.where(mine, h, H) < H
    at = t.to(tl.int64) * o_t + (h.to(tl.int64) * o_h)[:, None] + d[None, :]
    inside = ok[:, None] & (d < D)[None, :]
    c = tl.load(FACTOR + slot * f_s + h, mask=ok, other=1.0)
    b = tl.zeros((BH, DP), tl.float32)
    if SHIFT is not None:
        b = tl.load(SHIFT + slot * s_s + (h.to(tl.int64) * s_h)[:, None] + d[None, :], mask=inside, other=0.0)
    changes = (c != 1.0) | (tl.max(tl.abs(b), axis=1) > 0.0)
    inside = inside & changes[:, None]
    o = tl.load(OUT + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, (o * c[:, None] + b).to(OUT.dtype.element_ty), mask=inside)
