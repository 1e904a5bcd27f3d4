"""The first-token kernels, plain torch and Triton, against a naive float64 softmax that is edited row by row."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from headpatch.kernels.first_token import merge_first_token, merge_first_token_paged, triton_available

HAS_TRITON = importlib.util.find_spec("triton") is not None
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_TRITON = "Triton is not installed" if not HAS_TRITON else "no CUDA device, and TRITON_INTERPRET=1 is not set"
triton_runs = pytest.mark.skipif(not (HAS_TRITON and (CUDA or INTERPRETED)), reason=NO_TRITON)
needs_gpu = pytest.mark.skipif(not (CUDA and HAS_TRITON), reason="no CUDA device with Triton")

GAMMAS = (0.0, 1e-4, 0.05, 0.5, 1.0, 3.0, 100.0)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=["torch", pytest.param("triton", marks=triton_runs)])
def backend(request):
    return request.param


def device_of(backend):
    return "cuda" if backend == "triton" and CUDA else "cpu"


def make(gen, *shape, dtype=torch.float32, sd=1.0):
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) * sd).to(dtype)


class Case:
    """Random attention in which query (row, i) sees `visible` and the first token of the row (or query) is `first`."""

    def __init__(
        self, seed=0, b=2, H=6, K=2, lq=5, lk=9, d=16, dv=None, dtype=torch.float32, visible=None, first=None, bias=None,
        softcap=0.0, sink=False, sd=1.5,
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(seed)
        dv = dv or d
        self.b, self.H, self.K, self.lq, self.lk, self.dtype, self.softcap = b, H, K, lq, lk, dtype, softcap
        self.scale = d**-0.5
        self.q = make(gen, b, H, lq, d, dtype=dtype, sd=sd)
        self.k = make(gen, b, K, lk, d, dtype=dtype, sd=sd)
        self.v = make(gen, b, K, lk, dv, dtype=dtype)
        self.gamma = torch.tensor([GAMMAS[(i + seed) % len(GAMMAS)] for i in range(H)])
        self.head_scale = torch.where(torch.arange(H) % 3 == 1, 1.0, make(gen, H)).float()
        self.sink = make(gen, H).float() if sink else None
        self.visible = torch.ones(b, 1, lq, lk, dtype=torch.bool) if visible is None else visible
        self.first = torch.zeros(b, lq, dtype=torch.long) if first is None else first.view(b, -1).expand(b, lq)
        self.bias = bias

    def scores(self):
        G = self.H // self.K
        s = self.q.double() @ self.k.double().repeat_interleave(G, 1).transpose(2, 3) * self.scale
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        if self.bias is not None:
            s = s + self.bias.double()
        return s.masked_fill(~self.visible, -math.inf)

    def column(self):
        """[b, 1, lq, lk] bool: the first token's key, wherever it is."""
        return (torch.arange(self.lk) == self.first[:, None, :, None]) & torch.ones(1, 1, self.lq, 1, dtype=torch.bool)

    def attention(self, complement):
        """What an attention kernel without sinks would have given: o (NaN where a row is empty) and its LSE."""
        s = self.scores()
        if complement:
            s = s.masked_fill(self.column(), -math.inf)
        lse = s.logsumexp(-1)
        o = s.softmax(-1) @ self.v.double().repeat_interleave(self.H // self.K, 1)
        return o.to(self.dtype), lse.to(torch.promote_types(self.dtype, torch.float32))

    def expected(self):
        """[b, lq, H, dv] float64."""
        s = self.scores()
        if self.sink is not None:
            z = self.sink.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)
            p = torch.cat([s, z], -1).softmax(-1)[..., :-1]
        else:
            p = s.softmax(-1)
        at = self.column() & self.visible
        p0 = p.masked_fill(~at, 0.0).sum(-1, keepdim=True)
        g = self.gamma.double().view(1, -1, 1, 1)
        den = 1 + (g - 1) * p0
        only = at.sum(-1, keepdim=True).bool() & (self.visible.sum(-1, keepdim=True) == 1)
        if self.sink is None:
            den, g = torch.where(only, 1.0, den), torch.where(only, 1.0, g)
        p = torch.where(at, g * p, p) / den
        o = p @ self.v.double().repeat_interleave(self.H // self.K, 1)
        return (o * self.head_scale.double().view(1, -1, 1, 1)).transpose(1, 2)

    def run(self, backend, complement, inplace=False, change=lambda o, lse: (o, lse), **kwargs):
        dev = device_of(backend)
        o, lse = change(*self.attention(complement))
        self.o = o = o.to(dev)
        if self.sink is not None:
            kwargs["sink"] = self.sink.to(dev)
        kwargs = {n: x.to(dev) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        y = merge_first_token(
            self.q.to(dev), self.k.to(dev), self.v.to(dev), o, lse.to(dev), self.gamma.to(dev), scale=self.scale,
            complement=complement, head_scale=self.head_scale.to(dev), softcap=self.softcap, inplace=inplace,
            backend=backend, **kwargs,
        )  # fmt: skip
        assert y.shape == (self.b, self.lq, self.H, self.v.shape[-1])
        assert y.dtype == self.dtype
        if inplace:
            assert y.data_ptr() == o.data_ptr()
        else:
            assert y.is_contiguous()
        return y.cpu()


def close(y, want, dtype, rows=None, factor=1.0):
    """Every element within the dtype's tolerance, relative to the largest of its row."""
    y, want = (y, want) if rows is None else (y[rows], want[rows])
    assert torch.isfinite(y).all()
    error = ((y.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp(min=1.0)).max().item()
    assert error <= TOLERANCE[dtype] * factor, error


SHAPES = {
    "mha": {"H": 4, "K": 4},
    "gqa": {"H": 6, "K": 2},  # groups of 3: not a power of two
    "mqa": {"H": 5, "K": 1},
    "wide head": {"H": 4, "K": 2, "d": 80},
    "narrow head": {"H": 4, "K": 2, "d": 8},
    "two widths": {"H": 4, "K": 2, "d": 24, "dv": 16},
    "decode": {"H": 8, "K": 2, "lq": 1, "lk": 12},
    "several tiles": {"H": 4, "K": 2, "lq": 150, "lk": 151, "d": 64, "b": 1},
    "one key": {"H": 4, "K": 2, "lq": 1, "lk": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_complement_is_exact_for_every_gamma(backend, shape, dtype):
    for seed in range(3):
        case = Case(seed, dtype=dtype, **shape)
        close(case.run(backend, True), case.expected(), dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_correction(backend, shape, inplace):
    for seed in range(3):
        case = Case(seed, **shape)
        case.gamma.clamp_(min=0.05)  # below, correction is not promised to keep its digits
        close(case.run(backend, False, inplace), case.expected(), torch.float32, factor=30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_correction_in_half_precision(backend, dtype):
    case = Case(1, dtype=dtype)
    case.gamma.clamp_(min=0.5)
    close(case.run(backend, False), case.expected(), dtype, factor=4)


def test_fp64_stays_fp64():
    for complement in (True, False):
        case = Case(dtype=torch.float64)
        case.gamma.clamp_(min=0.0 if complement else 0.05)
        close(case.run("torch", complement), case.expected(), torch.float64, factor=1 if complement else 10)


def test_causal_prompt_without_its_first_row(backend):
    """o and lse start at query 1; query 0 sees the first token alone and gets its value."""
    for lq, d in ((7, 16), (200, 64), (1, 16)):
        case = Case(lq=lq, lk=lq, d=d, visible=torch.ones(lq, lq, dtype=torch.bool).tril()[None, None].expand(2, 1, lq, lq))
        y = case.run(backend, True, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:]))
        close(y, case.expected(), torch.float32)
        v0 = case.v[:, :, 0].repeat_interleave(3, 1) * case.head_scale[:, None]
        torch.testing.assert_close(y[:, 0], v0, rtol=0, atol=0)


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "correction"])
@pytest.mark.parametrize("kind", ["bool", "additive", "shared", "finfo.min"])
def test_masks_and_first_tokens_of_padded_rows(backend, complement, kind):
    """Left-padded rows, causal inside; only the first token's column of the mask is read."""
    b, n = 3, 8
    pad = torch.tensor([0, 3, 7])
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = ((j <= i) & (j >= pad[:, None, None]))[:, None]
    if kind == "shared":  # one mask for the batch, [1, 1, lq, lk]
        pad, visible = torch.tensor([2, 2, 2]), visible[1:2] & (j >= 2)
    real = visible.any(-1).expand(b, 1, n)[:, 0]
    case = Case(b=b, lq=n, lk=n, visible=visible.expand(b, 1, n, n), first=pad)
    if not complement:
        case.gamma.clamp_(min=0.05)
    mask = visible
    if kind in ("additive", "finfo.min"):
        mask = torch.where(visible, 0.0, -math.inf if kind == "additive" else torch.finfo(torch.float32).min)

    def as_kernels_leave_it(o, lse):
        return (o.nan_to_num(0.5), lse.clamp(min=torch.finfo(torch.float32).min)) if kind == "finfo.min" else (o, lse)

    y = case.run(backend, complement, first=pad, mask=mask, change=as_kernels_leave_it)
    close(y, case.expected(), torch.float32, rows=real, factor=1 if complement else 30)


def test_additive_mask_values_enter_the_score(backend):
    """ALiBi-like biases per head, also on the first token."""
    bias = -torch.rand(2, 6, 5, 9, generator=torch.Generator().manual_seed(1)) * 3
    for complement in (True, False):
        case = Case(bias=bias)
        case.gamma.clamp_(min=0.05)
        close(case.run(backend, complement, mask=bias), case.expected(), torch.float32, factor=30)


def test_mask_longer_than_the_keys(backend):
    """A static cache's mask goes on after the keys that the kernel was given."""
    case = Case()
    mask = torch.ones(2, 1, 5, 40, dtype=torch.bool)
    close(case.run(backend, True, mask=mask), case.expected(), torch.float32)


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "correction"])
def test_sliding_window(backend, complement):
    n, window = 9, 4
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    case = Case(lq=n, lk=n, visible=((j <= i) & (i - j < window))[None, None].expand(2, 1, n, n))
    case.gamma.clamp_(min=0.05)
    y = case.run(backend, complement, window=window)
    close(y, case.expected(), torch.float32, factor=30)
    # decode after the window has gone past: the last query alone
    late = Case(lq=1, lk=n, visible=((j <= n - 1) & (n - 1 - j < window))[None, None].expand(2, 1, 1, n))
    y = late.run(backend, complement, window=window, q_start=n - 1)
    close(y, late.expected(), torch.float32)
    # and with the window's keys only: the first token lies before k
    plain = Case(lq=1, lk=3)
    y = plain.run(backend, False, first=torch.zeros(2, dtype=torch.long), kv_offset=5)
    o = plain.attention(False)[0] * plain.head_scale.view(1, -1, 1, 1)
    torch.testing.assert_close(y, o.transpose(1, 2))


def test_kv_offset_counts_back(backend):
    case = Case(first=torch.tensor([2, 5]))
    close(case.run(backend, True, first=torch.tensor([12, 15]), kv_offset=10), case.expected(), torch.float32)


def test_packed_rows_have_a_first_token_per_query(backend):
    lens = (3, 1, 4)
    n = sum(lens)
    start = torch.repeat_interleave(torch.tensor([0, 3, 4]), torch.tensor(lens))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = ((j <= i) & (j >= start[:, None]))[None, None]
    for complement in (True, False):
        case = Case(b=1, lq=n, lk=n, visible=visible, first=start)
        if not complement:
            case.gamma.clamp_(min=0.05)
        y = case.run(backend, complement, first=start[None], mask=visible)
        close(y, case.expected(), torch.float32, factor=30)


def test_softcap(backend):
    for complement in (True, False):
        case = Case(softcap=2.0, sd=3.0)
        case.gamma.clamp_(min=0.05)
        close(case.run(backend, complement), case.expected(), torch.float32, factor=30)


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "correction"])
def test_sink_logits_take_their_share(backend, complement):
    n = 6
    case = Case(lq=n, lk=n, sink=True, visible=torch.ones(n, n, dtype=torch.bool).tril()[None, None].expand(2, 1, n, n))
    if not complement:
        case.gamma.clamp_(min=0.05)
    y = case.run(backend, complement)
    close(y, case.expected(), torch.float32, factor=1 if complement else 30)
    if complement:
        y = case.run(backend, True, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:]))
        close(y, case.expected(), torch.float32)


def test_strides_are_honoured(backend):
    """The layouts that occur: [b, l, H, d] storage, a slice of a longer cache, a padded LSE."""
    case, same = Case(H=4, K=2), Case(H=4, K=2)
    want = same.run(backend, True)
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        room = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1] + 1, x.shape[3] + 8), 9.0)
        view = room.transpose(1, 2)[:, : x.shape[1], : x.shape[2], : x.shape[3]]
        view.copy_(x)
        setattr(case, name, view)

    def roomy(o, lse):
        wide = torch.full((*lse.shape[:2], 32), math.inf)
        wide[:, :, : lse.shape[2]] = lse
        return o.transpose(1, 2).contiguous().transpose(1, 2), wide

    torch.testing.assert_close(case.run(backend, True, change=roomy), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.run(backend, True, change=roomy, inplace=True), want, rtol=1e-6, atol=1e-6)


def test_identity_is_bit_equal_in_correction_mode(backend):
    for dtype in (torch.float32, torch.bfloat16):
        for inplace in (False, True):
            case = Case(dtype=dtype)
            case.gamma.fill_(1.0)
            case.head_scale.fill_(1.0)
            before = case.attention(False)[0].transpose(1, 2)
            assert torch.equal(case.run(backend, False, inplace), before)


def test_untouched_heads_are_bit_equal_in_correction_mode(backend):
    case = Case(dtype=torch.bfloat16)
    case.gamma[:3], case.head_scale[:3] = 1.0, 1.0
    y = case.run(backend, False, True)
    assert torch.equal(y[:, :, :3], case.attention(False)[0].transpose(1, 2)[:, :, :3])
    assert not torch.equal(y[:, :, 3:], case.attention(False)[0].transpose(1, 2)[:, :, 3:])


def test_gamma_zero_on_a_row_that_sees_only_the_first_token(backend):
    case = Case(lq=1, lk=1)
    case.gamma.zero_()
    for complement in (True, False):
        y = case.run(backend, complement)
        want = case.v.repeat_interleave(3, 1) * case.head_scale.view(1, -1, 1, 1)
        torch.testing.assert_close(y, want.transpose(1, 2))


def test_bad_shapes_are_refused():
    case = Case()
    with pytest.raises(ValueError, match="does not fit"):
        case.run("torch", True, change=lambda o, lse: (o[:, :, 2:], lse[:, :, 2:]))
    with pytest.raises(ValueError, match="does not fit"):
        case.run("torch", False, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:]))
    with pytest.raises(ValueError, match="block_slot and row_slot"):
        Paged().run("torch", False, which="neither")


def test_plain_torch_compiles_whole():
    case = Case(visible=torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, 1, 5, 5), lq=5, lk=5)
    o, lse = case.attention(True)
    o, lse = o[:, :, 1:], lse[:, :, 1:]

    def f(q, k, v, o, lse):
        return merge_first_token(
            q, k, v, o, lse, case.gamma, scale=case.scale, complement=True, head_scale=case.head_scale
        )

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(case.q, case.k, case.v, o, lse)
    close(y, case.expected(), torch.float32)


def test_gradients_of_plain_torch():
    """Differentiable in q, k, v, o, lse, gamma and the scales; checked numerically."""
    case = Case(b=1, H=2, K=1, lq=3, lk=4, d=4, dtype=torch.float64)
    o, lse = case.attention(True)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, o, lse, torch.tensor([0.5, 2.0]).double())]

    def f(*xs):
        return merge_first_token(*xs, scale=0.5, complement=True)

    assert torch.autograd.gradcheck(f, inputs)


# --- paged --------------------------------------------------------------------------------------------------------------


class Paged:
    """Rows of several lengths in a block cache with slots; the naive answer is computed row by row."""

    def __init__(
        self, seed=0, rows=((5, 9), (1, 4), (0, 0), (3, 3), (1, 17), (2, 40)), H=6, K=2, d=16, dtype=torch.float32,
        padding=3, slots=3, window=0, layout="nkbd",
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(seed)
        self.rows, self.H, self.K, self.d, self.bs, self.window, self.dtype = rows, H, K, d, 4, window, dtype
        self.T = sum(n for n, _ in rows) + padding
        blocks_of = [-(-length // self.bs) for _, length in rows]
        ids = torch.randperm(sum(blocks_of) + 2, generator=gen) + 1  # block 0 is the null block
        self.table = torch.zeros(len(rows), max(blocks_of) + 1, dtype=torch.int32)
        shape = {"nkbd": (len(ids) + 1, K, self.bs, 2 * d), "nbkd": (len(ids) + 1, self.bs, K, 2 * d)}[layout]
        self.cache = make(gen, *shape, dtype=dtype, sd=1.2)
        self.view = self.cache if layout == "nkbd" else self.cache.transpose(1, 2)
        used = 0
        for r, n in enumerate(blocks_of):
            self.table[r, :n] = ids[used : used + n].int()
            used += n
        if window:  # rows past the window lost their first block
            for r, (n, length) in enumerate(rows):
                if length - n >= window:
                    self.table[r, 0] = 0
        counts = torch.tensor([0, *(n for n, _ in rows)])
        self.start = counts.cumsum(0).int()
        self.seq_lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
        self.row_slot = torch.arange(len(rows)).remainder(slots).int()
        self.block_slot = torch.full((len(ids) + 1,), -1, dtype=torch.int32)
        for r in range(len(rows)):
            if blocks_of[r]:
                self.block_slot[self.table[r, 0]] = self.row_slot[r]
        self.gamma = torch.tensor([[GAMMAS[(s * 3 + h) % len(GAMMAS)] for h in range(H)] for s in range(slots)]).clamp(min=0.05)
        self.head_scale = make(gen, slots, H).float()
        self.gamma[0], self.head_scale[0] = 1.0, 1.0  # slot 0: no recipe
        self.q = make(gen, self.T, H, d, dtype=dtype, sd=1.2)
        self.scale = d**-0.5

    by_block = True

    def naive(self):
        """(outputs, LSE) before and outputs after the edit, float64; padding tokens get 7."""
        before, after = (torch.full((self.T, self.H, self.d), 7.0, dtype=torch.float64) for _ in range(2))
        lse = torch.full((self.H, self.T), math.inf, dtype=torch.float64)
        t = 0
        for r, (n, length) in enumerate(self.rows):
            for i in range(n):
                pos = length - n + i
                low = max(0, pos - self.window + 1) if self.window else 0
                s, v = [], []
                for j in range(low, pos + 1):
                    kv = self.view[self.table[r, j // self.bs].long(), :, j % self.bs].double()
                    kv = kv.repeat_interleave(self.H // self.K, 0)
                    s.append((self.q[t].double() * kv[:, : self.d]).sum(-1) * self.scale)
                    v.append(kv[:, self.d :])
                s, v = torch.stack(s, 1), torch.stack(v, 1)
                p = s.softmax(1)
                lse[:, t] = s.logsumexp(1)
                before[t] = (p[..., None] * v).sum(1)
                g, c = self.gamma[self.row_slot[r]].double(), self.head_scale[self.row_slot[r]].double()
                if low == 0 and pos > 0:
                    p = torch.cat([p[:, :1] * g[:, None], p[:, 1:]], 1)
                    p = p / p.sum(1, keepdim=True)
                lost = self.table[r, 0] == 0
                after[t] = (p[..., None] * v).sum(1) * (1.0 if lost and self.by_block else c[:, None])
                t += 1
        return before, lse, after

    def run(self, backend, new, which="block_slot", **kwargs):
        self.by_block = which == "block_slot"
        dev = device_of(backend)
        before, lse, after = self.naive()
        o = before.to(self.dtype).to(dev)
        keep = o.clone()
        out = torch.full_like(o, math.nan) if new else None
        slots = {} if which == "neither" else {which: getattr(self, which).to(dev)}
        view = self.view.to(dev)
        y = merge_first_token_paged(
            self.q.to(dev), view[..., : self.d], view[..., self.d :], o, lse.float().to(dev), self.gamma.to(dev),
            scale=self.scale, block_table=self.table.to(dev), query_start_loc=self.start.to(dev),
            seq_lens=self.seq_lens.to(dev), head_scale=self.head_scale.to(dev), window=self.window, out=out,
            backend=backend, **slots, **kwargs,
        )  # fmt: skip
        assert y is (o if out is None else out)
        n = sum(m for m, _ in self.rows)
        assert torch.equal(y[n:], keep[n:])  # padding tokens
        return y.cpu(), after, keep.cpu()


@pytest.mark.parametrize("new", [True, False], ids=["new", "in place"])
@pytest.mark.parametrize("which", ["block_slot", "row_slot"])
@pytest.mark.parametrize("layout", ["nkbd", "nbkd"])
def test_paged_rows_with_their_own_recipes(backend, new, which, layout):
    case = Paged(layout=layout)
    y, want, before = case.run(backend, new, which)
    close(y, want, torch.float32, factor=30)
    first = slice(0, 5)  # row 0 has slot 0, the identity
    assert torch.equal(y[first], before[first])


def test_paged_decode_of_many_rows(backend):
    for H, K, d in ((8, 2, 32), (3, 3, 64)):
        case = Paged(3, rows=tuple((1, 2 + 3 * i) for i in range(20)), padding=0, H=H, K=K, d=d)
        y, want, _ = case.run(backend, False)
        close(y, want, torch.float32, factor=30)


def test_paged_in_bf16(backend):
    case = Paged(5, dtype=torch.bfloat16)
    case.gamma.clamp_(min=0.5)
    y, want, _ = case.run(backend, False)
    close(y, want, torch.bfloat16, factor=4)


@pytest.mark.parametrize("which", ["block_slot", "row_slot"])
def test_paged_window_and_null_block(backend, which):
    """Where the first block has left the window it is the null block: nothing is read from it."""
    case = Paged(1, window=6)
    y, want, before = case.run(backend, False, which)
    close(y, want, torch.float32, factor=30)
    if which == "block_slot":
        assert torch.equal(y[-4:], before[-4:])


def test_paged_block_ratio_and_cache_scales(backend):
    case = Paged(2)
    case.block_slot = case.block_slot.new_full((len(case.block_slot),), 2)  # every block of any size: slot 2
    case.row_slot[:] = 2
    dev = device_of(backend)
    half = Paged(2)
    half.block_slot, half.row_slot = case.block_slot[: len(case.block_slot) // 2 + 1], case.row_slot
    y, want, _ = half.run(backend, False, block_ratio=2)
    close(y, want, torch.float32, factor=30)
    full = case.view.clone()
    want = case.run(backend, False)[0]
    case.view = torch.cat([full[..., : case.d] / 4, full[..., case.d :] / 2], -1)
    before, lse, _ = half.naive()
    o = before.float().to(dev)
    view = case.view.to(dev)
    y = merge_first_token_paged(
        case.q.to(dev), view[..., : case.d], view[..., case.d :], o, lse.float().to(dev), case.gamma.to(dev),
        scale=case.scale, block_table=case.table.to(dev), query_start_loc=case.start.to(dev),
        seq_lens=case.seq_lens.to(dev), block_slot=case.block_slot.to(dev), head_scale=case.head_scale.to(dev),
        k_scale=torch.tensor(4.0, device=dev), v_scale=torch.tensor(2.0, device=dev), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-5)


def test_paged_skips_tokens_without_a_finite_lse(backend):
    case = Paged(4)
    dev = device_of(backend)
    before, lse, _ = (x.float() for x in case.naive())
    lse[:, 6:9] = math.nan
    o = before.to(dev)
    merge_first_token_paged(
        case.q.to(dev), case.view[..., : case.d].to(dev), case.view[..., case.d :].to(dev), o, lse.to(dev), case.gamma.to(dev),
        scale=case.scale, block_table=case.table.to(dev), query_start_loc=case.start.to(dev),
        seq_lens=case.seq_lens.to(dev), block_slot=case.block_slot.to(dev), backend=backend,
    )  # fmt: skip
    assert torch.equal(o[6:9].cpu(), before[6:9])
    assert torch.isfinite(o).all()


# --- only on the real thing ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TRITON or CUDA or INTERPRETED, reason="needs Triton, no CUDA device, and not being inside itself")
@pytest.mark.slow
def test_triton_kernel_in_the_interpreter():
    """Run this file again with Triton's interpreter, which must be chosen before Triton is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def cuda_case(lq=64, lk=64, d=128, dtype=torch.bfloat16):
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, o = (torch.randn(2, 32, lq, d, device="cuda", dtype=dtype, generator=gen) for _ in range(2))
    k, v = (torch.randn(2, 8, lk, d, device="cuda", dtype=dtype, generator=gen) for _ in range(2))
    lse = torch.randn(2, 32, lq, device="cuda", generator=gen)
    gamma = torch.rand(32, device="cuda", generator=gen) * 3
    return q, k, v, o, lse, gamma


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_whole_on_the_gpu(complement, inplace, mode):
    """One graph, the same numbers, and the kernel inlined rather than called as an opaque op."""

    def f(q, k, v, o, lse, gamma):
        y = merge_first_token(q, k, v, o + 0, lse, gamma, scale=0.1, complement=complement, inplace=inplace)
        return y * 1.0

    compiled = torch.compile(f, fullgraph=True, mode=mode)
    for lq in (1, 64):
        args = cuda_case(lq)
        for _ in range(4):
            got = compiled(*args).clone()
        torch.testing.assert_close(got, f(*args), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.gpu
@needs_gpu
def test_compiled_graph_launches_the_kernel_itself():
    from torch._inductor.utils import run_and_get_code

    def f(q, k, v, o, lse, gamma):
        return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True)

    args = cuda_case(64)
    _, code = run_and_get_code(torch.compile(f, fullgraph=True), *args)
    text = "\n".join(code)
    assert "def dense" in text
    assert "torch.ops.headpatch" not in text
    torch._dynamo.reset()


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_follows_its_tables():
    """Captured once; new strengths written into the same table take effect on replay, without a synchronisation."""
    q, k, v, o, lse, gamma = cuda_case(1)

    def f():
        return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True)

    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = f()
    for value in (0.0, 1.0, 7.0):
        gamma.fill_(value)
        graph.replay()
        torch.testing.assert_close(y, f(), rtol=0, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_triton_equals_plain_torch_at_full_size():
    for lq, lk in ((4096, 4096), (1, 16384)):
        args = cuda_case(lq, lk)
        for complement in (True, False):
            got, want = (
                merge_first_token(*args, scale=128**-0.5, complement=complement, backend=b) for b in ("triton", "torch")
            )
            torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_no_synchronisation():
    args = cuda_case(16)
    merge_first_token(*args, scale=0.1, complement=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_first_token(*args, scale=0.1, complement=True)
        merge_first_token(*args, scale=0.1, complement=False, inplace=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_which_devices_have_the_kernel():
    assert not triton_available(torch.device("cpu"))
    assert triton_available(torch.device("cuda")) == HAS_TRITON
