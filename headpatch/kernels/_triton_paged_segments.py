"""Triton source of edited attention over a paged cache. Imports triton: only :mod:`headpatch.kernels.paged_segments` imports this.

A program has BM queries of one row and one head before it and walks over the keys once. Keys in the form's segment and the others are
summed apart, each under a maximum of its own, so that either may be next to nothing; what their shares become is settled at the end,
or, where several programs share a row's keys, in a second launch.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

LIVE = tl.constexpr(96)
FORM = tl.constexpr(97)
STRENGTH = tl.constexpr(98)
LEAST = tl.constexpr(99)
MARKED = tl.constexpr(100)
AMPLIFY_FROM = tl.constexpr(101)
THRESHOLD = tl.constexpr(102)
PER_LENGTH = tl.constexpr(103)
MIN_QUERIES = tl.constexpr(104)
LONE = tl.constexpr(105)
"""Places in a head's numbers; the first 96 are six tables by class (see :mod:`headpatch.kernels.paged_segments`)."""


@triton.jit
def _inside(BOUNDS, begin, count, steps, at):
    """Which of these positions lie in a row's ranges, whose bounds are ascending: an odd number of them at or before the position."""
    lo = tl.zeros_like(at)
    hi = lo + count
    for _ in range(steps):
        mid = (lo + hi) // 2
        left = lo < hi
        passed = tl.load(BOUNDS + begin + mid, mask=left, other=0) <= at
        lo = tl.where(left & passed, mid + 1, lo)
        hi = tl.where(left & (passed == 0), mid, hi)
    return lo % 2 == 1


@triton.jit
def _row_of(STARTS, tile, n_rows, BM: tl.constexpr, GAP: tl.constexpr, STEPS: tl.constexpr):
    """The row that a tile belongs to, where row r has its tiles from ``starts[r] // BM + GAP r`` on; 0 steps: one query a row."""
    lo = tile
    if STEPS > 0:
        lo = tile * 0
        hi = n_rows - 1
        for _ in range(STEPS):
            mid = (lo + hi + 1) // 2
            up = tl.load(STARTS + mid) // BM + GAP * mid <= tile
            lo = tl.where((lo < hi) & up, mid, lo)
            hi = tl.where((lo < hi) & (up == 0), mid - 1, hi)
    return lo


@triton.jit
def _faded(old, new):
    """What sums under an old maximum are multiplied by under a new one; both may be -inf."""
    return tl.where(new > float("-inf"), tl.exp2(old - tl.where(new > float("-inf"), new, 0.0)), 0.0)


@triton.jit
def _shares(E, top_s, sum_s, top_r, sum_r):
    """Logarithms, to base 2, of the factors of the form's segment and of the others, from their attention before the form."""
    form = tl.load(E + FORM)
    strength = tl.load(E + STRENGTH)
    top = tl.maximum(top_s, top_r)
    a = sum_s * _faded(top_s, top)
    b = sum_r * _faded(top_r, top)
    whole = tl.maximum(a + b, 1e-37)
    seen = b > 0.0  # or there is nobody to hand attention to
    # Factors of the two have the ratio that counts; of no use is what both share.
    calibrated = tl.where(strength > 0.0, tl.log2(tl.maximum(strength, 1e-37)), float("-inf"))
    calibrated = tl.where(seen, calibrated, 0.0)
    others = tl.where(seen, tl.log2(tl.maximum(whole - strength * a, 1e-37) / tl.where(seen, b, 1.0)), 0.0)
    wanted = tl.load(E + LEAST) * whole / tl.maximum(a, 1e-37)
    raised = tl.log2(tl.maximum(tl.minimum(wanted, 1.0 / tl.maximum(strength, 1e-6)), 1.0))
    in_s = tl.where(form == 1.0, calibrated, tl.where(form == 2.0, raised, 0.0))
    in_r = tl.where(form == 1.0, others, 0.0)
    return in_s, in_r


@triton.jit
def _settled(
    E, top_s, sum_s, top_r, sum_r, pre_top_s, pre_sum_s, pre_top_r, pre_sum_r, HAS_POST: tl.constexpr
):  # fmt: skip
    """What the sums over the segment and over the others are multiplied by, and their sum then."""
    if HAS_POST:
        in_s, in_r = _shares(E, pre_top_s, pre_sum_s, pre_top_r, pre_sum_r)
    else:
        in_s, in_r = _shares(E, top_s, sum_s, top_r, sum_r)
    whole = tl.maximum(top_s + in_s, top_r + in_r)
    f_s = _faded(top_s + in_s, whole)
    f_r = _faded(top_r + in_r, whole)
    return f_s, f_r, sum_s * f_s + sum_r * f_r


@triton.jit
def _joined(top, total, P):
    """A maximum and a sum under it, with those that lie at `P`: both new, and what outputs of the two sides are multiplied by."""
    found = tl.load(P)
    higher = tl.maximum(top, found)
    kept = _faded(top, higher)
    more = _faded(found, higher)
    return higher, total * kept + tl.load(P + 1) * more, kept, more


_PLACES = [
    "HEADS", "EDITS", "ROW_SLOT", "ROW_PROMPT", "RANGES", "BOUNDS", "STARTS", "LENGTHS", "TABLE", "MARKS", "MARK_OF", "PARTS",
]  # fmt: skip
_NUMBERS = ["n_rows", "t_r", "e_s", "e_h", "m_b", "m_h", "scale", "softcap", "window"]


@triton.jit(do_not_specialize=[*_PLACES, *_NUMBERS])
def attend(
    Q, K, V, OUT, HEADS, EDITS, ROW_SLOT, ROW_PROMPT, RANGES, BOUNDS, STARTS, LENGTHS, TABLE, MARKS, MARK_OF, PARTS,
    q_t, q_h, k_b, k_h, k_n, v_b, v_h, v_n, y_t, y_h, n_rows, t_r, e_s, e_h, m_b, m_h, scale, softcap, window,
    G: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEPS: tl.constexpr, HAS_FORM: tl.constexpr, HAS_POST: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    place = tl.program_id(1)
    row = _row_of(STARTS, tile, n_rows, BM, 1, STEPS)
    slot = tl.load(ROW_SLOT + row).to(tl.int64)
    if slot < 0:
        return
    h = tl.load(HEADS + place)
    E = EDITS + slot * e_s + h * e_h
    if tl.load(E + LIVE) == 0.0:
        return
    first = tl.load(STARTS + row)
    count = tl.load(STARTS + row + 1) - first
    t0 = 0
    if STEPS > 0:
        t0 = (tile - (first // BM + row)) * BM
    n = tl.load(LENGTHS + row)
    if (t0 >= count) | (n <= 0):
        return
    begin = n - count
    prompt = tl.load(ROW_PROMPT + row).to(tl.int32)
    spans = tl.load(RANGES + row * 8)
    span_count = tl.load(RANGES + row * 8 + 1)
    span_steps = tl.load(RANGES + row * 8 + 2)
    images = tl.load(RANGES + row * 8 + 3)
    image_count = tl.load(RANGES + row * 8 + 4)
    image_steps = tl.load(RANGES + row * 8 + 5)
    marked = tl.load(E + MARKED)
    lone = tl.load(E + LONE)
    late = tl.load(E + AMPLIFY_FROM)
    mark_of = 0
    if MARKS is not None:
        mark_of = tl.load(MARK_OF + h)

    i = t0 + tl.arange(0, BM)
    ok = i < count
    at = begin + i
    d = tl.arange(0, DP)
    kv = (h // G).to(tl.int64)
    q = tl.load(
        Q + (first + i).to(tl.int64)[:, None] * q_t + h * q_h + d[None, :],
        mask=ok[:, None] & (d < D)[None, :],
        other=0.0,
    )
    image_query = _inside(BOUNDS, images, image_count, image_steps, at)
    amplified = at.to(tl.float32) >= prompt.to(tl.float32) + late  # from the beginning where that is far below zero

    end = tl.minimum(n, begin + t0 + BM)
    low = 0
    if WINDOW:
        low = tl.maximum(0, begin + t0 - window + 1)
    from_key = low // BN * BN
    to_key = end
    if SPLIT:
        parts = tl.num_programs(2)
        each = tl.cdiv(tl.cdiv(end - from_key, BN), parts) * BN
        from_key += tl.program_id(2) * each
        to_key = tl.minimum(end, from_key + each)

    top_r = tl.full([BM], float("-inf"), tl.float32)
    sum_r = tl.zeros([BM], tl.float32)
    y_r = tl.zeros([BM, DP], tl.float32)
    top_s = top_r
    sum_s = sum_r
    pre_top_r = top_r
    pre_sum_r = sum_r
    pre_top_s = top_r
    pre_sum_s = sum_r
    if HAS_FORM:
        y_s = tl.zeros([BM, DP], tl.float32)
    TABLE += row.to(tl.int64) * t_r
    for start in range(from_key, to_key, BN):
        j = start + tl.arange(0, BN)
        there = (j < to_key) & (j >= low)
        block = tl.load(TABLE + j // SIZE, mask=there, other=0).to(tl.int64)
        in_block = j % SIZE
        at_k = block * k_b + kv * k_h + in_block * k_n
        k = tl.load(K + at_k[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        x = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
        if SOFTCAP:
            x = softcap * (2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0)
        x = x * 1.4426950408889634
        seen = there[None, :] & (j[None, :] <= at[:, None]) & ok[:, None]
        if WINDOW:
            seen = seen & (at[:, None] - j[None, :] < window)

        in_span = _inside(BOUNDS, spans, span_count, span_steps, j)
        in_image = _inside(BOUNDS, images, image_count, image_steps, j)
        beside = (j < prompt) & (in_span == 0) & (span_count > 0)
        kind = (j == 0).to(tl.int32) + 2 * in_span.to(tl.int32) + 4 * beside.to(tl.int32) + 8 * in_image.to(tl.int32)
        factor = tl.load(E + 64 + kind)
        x = tl.where(amplified[:, None], x + factor[None, :] * tl.abs(x), x)
        x = tl.where(seen, x, float("-inf"))
        x += tl.where(image_query[:, None], tl.load(E + 16 + kind)[None, :], tl.load(E + kind)[None, :])
        if HAS_FORM:
            member = tl.load(E + 80 + kind) != 0.0
            if MARKS is not None:
                mark = tl.load(MARKS + block * m_b + mark_of * m_h + in_block, mask=there & (j < prompt), other=0) != 0
                mark = tl.where(prompt == 1, (j == 0) & (j < lone), mark)
                member = member & tl.where(marked != 0.0, mark, member)
            if HAS_POST:
                inside = tl.where(member[None, :], x, float("-inf"))
                beyond = tl.where(member[None, :], float("-inf"), x)
                higher = tl.maximum(pre_top_s, tl.max(inside, 1))
                pre_sum_s = pre_sum_s * _faded(pre_top_s, higher) + tl.sum(_faded(inside, higher[:, None]), 1)
                pre_top_s = higher
                higher = tl.maximum(pre_top_r, tl.max(beyond, 1))
                pre_sum_r = pre_sum_r * _faded(pre_top_r, higher) + tl.sum(_faded(beyond, higher[:, None]), 1)
                pre_top_r = higher
                x += tl.where(image_query[:, None], tl.load(E + 48 + kind)[None, :], tl.load(E + 32 + kind)[None, :])
        v = tl.load(
            V + (block * v_b + kv * v_h + in_block * v_n)[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :],
            other=0.0,
        )  # fmt: skip
        if HAS_FORM and tl.max(member.to(tl.int32), 0) > 0:
            inside = tl.where(member[None, :], x, float("-inf"))
            higher = tl.maximum(top_s, tl.max(inside, 1))
            p = _faded(inside, higher[:, None])
            faded = _faded(top_s, higher)
            sum_s = sum_s * faded + tl.sum(p, 1)
            y_s = tl.dot(p.to(v.dtype), v, y_s * faded[:, None], input_precision="ieee" if EXACT else "tf32")
            top_s = higher
            x = tl.where(member[None, :], float("-inf"), x)
        higher = tl.maximum(top_r, tl.max(x, 1))
        p = _faded(x, higher[:, None])
        faded = _faded(top_r, higher)
        sum_r = sum_r * faded + tl.sum(p, 1)
        y_r = tl.dot(p.to(v.dtype), v, y_r * faded[:, None], input_precision="ieee" if EXACT else "tf32")
        top_r = higher

    t = (first + i).to(tl.int64)
    wide = ok[:, None] & (d < D)[None, :]
    if SPLIT:
        PARTS += ((t * tl.num_programs(1) + place) * tl.num_programs(2) + tl.program_id(2)) * (8 + 2 * DP)
        tl.store(PARTS, top_r, mask=ok)
        tl.store(PARTS + 1, sum_r, mask=ok)
        tl.store(PARTS[:, None] + 8 + d[None, :], y_r, mask=wide)
        if HAS_FORM:
            tl.store(PARTS + 2, top_s, mask=ok)
            tl.store(PARTS + 3, sum_s, mask=ok)
            tl.store(PARTS[:, None] + (8 + DP) + d[None, :], y_s, mask=wide)
            if HAS_POST:
                tl.store(PARTS + 4, pre_top_r, mask=ok)
                tl.store(PARTS + 5, pre_sum_r, mask=ok)
                tl.store(PARTS + 6, pre_top_s, mask=ok)
                tl.store(PARTS + 7, pre_sum_s, mask=ok)
    else:
        if HAS_FORM:
            f_s, f_r, total = _settled(
                E, top_s, sum_s, top_r, sum_r, pre_top_s, pre_sum_s, pre_top_r, pre_sum_r, HAS_POST
            )
            y = y_s * f_s[:, None] + y_r * f_r[:, None]
        else:
            y = y_r
            total = sum_r
        y = y / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(OUT + t[:, None] * y_t + h * y_h + d[None, :], y.to(OUT.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=[*_PLACES, *_NUMBERS])
def finish(
    OUT, HEADS, EDITS, ROW_SLOT, STARTS, LENGTHS, PARTS, y_t, y_h, n_rows, e_s, e_h, parts,
    D: tl.constexpr, DP: tl.constexpr, STEPS: tl.constexpr, HAS_FORM: tl.constexpr, HAS_POST: tl.constexpr,
):  # fmt: skip
    """Put together what the programs of `attend` found that shared the keys of one token and head."""
    t = tl.program_id(0)
    place = tl.program_id(1)
    row = _row_of(STARTS, t, n_rows, 1, 0, STEPS)
    slot = tl.load(ROW_SLOT + row).to(tl.int64)
    if slot < 0:
        return
    h = tl.load(HEADS + place)
    E = EDITS + slot * e_s + h * e_h
    if tl.load(E + LIVE) == 0.0:
        return
    if (t < tl.load(STARTS + row)) | (t >= tl.load(STARTS + row + 1)) | (tl.load(LENGTHS + row) <= 0):
        return
    d = tl.arange(0, DP)
    PARTS += (t.to(tl.int64) * tl.num_programs(1) + place) * parts * (8 + 2 * DP)
    top_r = tl.full([], float("-inf"), tl.float32)
    sum_r = tl.full([], 0.0, tl.float32)
    y_r = tl.zeros([DP], tl.float32)
    top_s = tl.full([], float("-inf"), tl.float32)
    sum_s = tl.full([], 0.0, tl.float32)
    y_s = tl.zeros([DP], tl.float32)
    pre_top_r = tl.full([], float("-inf"), tl.float32)
    pre_sum_r = tl.full([], 0.0, tl.float32)
    pre_top_s = tl.full([], float("-inf"), tl.float32)
    pre_sum_s = tl.full([], 0.0, tl.float32)
    for part in range(parts):
        P = PARTS + part * (8 + 2 * DP)
        top_r, sum_r, kept, more = _joined(top_r, sum_r, P)
        y_r = y_r * kept + tl.load(P + 8 + d) * more
        if HAS_FORM:
            top_s, sum_s, kept, more = _joined(top_s, sum_s, P + 2)
            y_s = y_s * kept + tl.load(P + (8 + DP) + d) * more
            if HAS_POST:
                pre_top_r, pre_sum_r, kept, more = _joined(pre_top_r, pre_sum_r, P + 4)
                pre_top_s, pre_sum_s, kept, more = _joined(pre_top_s, pre_sum_s, P + 6)
    y = y_r
    total = sum_r
    if HAS_FORM:
        f_s, f_r, total = _settled(E, top_s, sum_s, top_r, sum_r, pre_top_s, pre_sum_s, pre_top_r, pre_sum_r, HAS_POST)
        y = y_s * f_s + y_r * f_r
    y = y / tl.where(total > 0.0, total, 1.0)
    tl.store(OUT + t.to(tl.int64) * y_t + h * y_h + d, y.to(OUT.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=[*_PLACES, *_NUMBERS, "LSE", "l_t", "l_h"])
def find_sinks(
    Q, K, LSE, HEADS, EDITS, ROW_SLOT, ROW_PROMPT, STARTS, LENGTHS, TABLE, MARKS, MARK_OF,
    q_t, q_h, k_b, k_h, k_n, l_t, l_h, n_rows, t_r, e_s, e_h, m_b, m_h, scale, softcap, window,
    G: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Mark keys of prompts that come whole in this call: BN of one row, by the attention that one head's queries give them."""
    tile = tl.program_id(0)
    row = _row_of(STARTS, tile, n_rows, BN, 1, STEPS)
    slot = tl.load(ROW_SLOT + row).to(tl.int64)
    if slot < 0:
        return
    h = tl.load(HEADS + tl.program_id(1))
    E = EDITS + slot * e_s + h * e_h
    if (tl.load(E + LIVE) == 0.0) | (tl.load(E + MARKED) == 0.0):
        return
    first = tl.load(STARTS + row)
    count = tl.load(STARTS + row + 1) - first
    if tl.load(LENGTHS + row) != count:  # the prompt came before
        return
    prompt = tl.minimum(tl.load(ROW_PROMPT + row).to(tl.int32), count)
    t0 = (tile - (first // BN + row)) * BN
    if t0 >= prompt:
        return
    j = t0 + tl.arange(0, BN)
    there = j < prompt
    d = tl.arange(0, DP)
    in_block = j % SIZE
    block = tl.load(TABLE + row.to(tl.int64) * t_r + j // SIZE, mask=there, other=0).to(tl.int64)
    kv = (h // G).to(tl.int64)
    at_k = block * k_b + kv * k_h + in_block * k_n
    k = tl.load(K + at_k[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
    received = tl.zeros([BN], tl.float32)
    stop = prompt
    if WINDOW:
        stop = tl.minimum(prompt, t0 + BN + window)
    for start in range(t0, stop, BN):
        i = start + tl.arange(0, BN)
        ok = i < prompt
        t = (first + i).to(tl.int64)
        q = tl.load(Q + t[:, None] * q_t + h * q_h + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        lse = tl.load(LSE + t * l_t + h * l_h, mask=ok, other=0.0).to(tl.float32)
        x = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
        if SOFTCAP:
            x = softcap * (2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0)
        seen = ok[:, None] & there[None, :] & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (i[:, None] - j[None, :] < window)
        received += tl.sum(tl.where(seen, tl.exp(tl.where(seen, x - lse[:, None], 0.0)), 0.0), 0)
    queries = prompt - j
    if WINDOW:
        queries = tl.minimum(queries, window)
    threshold = tl.load(E + THRESHOLD)
    threshold = tl.where(tl.load(E + PER_LENGTH) != 0.0, threshold / prompt, threshold)
    found = (received / tl.maximum(queries, 1) > threshold) & (queries >= tl.load(E + MIN_QUERIES))
    MARKS += block * m_b + tl.load(MARK_OF + h).to(tl.int64) * m_h + in_block
    tl.store(MARKS, found.to(tl.uint8), mask=there)
