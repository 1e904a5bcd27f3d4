"""Random attention for the tests of the first-token kernels, with its naive float64 answer: dense and paged."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from headpatch.kernels.first_token import merge_first_token, merge_first_token_paged

HAS_TRITON = importlib.util.find_spec("triton") is not None
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_TRITON = "Triton is not installed" if not HAS_TRITON else "no CUDA device, and TRITON_INTERPRET=1 is not set"
triton_runs = pytest.mark.skipif(not (HAS_TRITON and (CUDA or INTERPRETED)), reason=NO_TRITON)
needs_gpu = pytest.mark.skipif(not (CUDA and HAS_TRITON), reason="no CUDA device with Triton")

outside_interpreter = pytest.mark.skipif(
    not HAS_TRITON or CUDA or INTERPRETED,
    reason="with a CUDA device the kernels run themselves; the interpreter needs Triton, and does not start itself again",
)


def run_in_interpreter(words, *files):
    """Run tests again in Triton's interpreter, which must be chosen before Triton is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", words, "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


GAMMAS = (0.0, 1e-4, 0.05, 0.5, 1.0, 3.0, 100.0)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=triton_runs)])


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


class Paged:
    """Rows of several lengths in a block cache with slots; the naive answer is computed row by row."""

    def __init__(
        self, seed=0, rows=((5, 9), (1, 4), (2, 0), (0, 0), (3, 3), (1, 17), (2, 40)), H=6, K=2, d=16, dtype=torch.float32,
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
        self.gamma = torch.tensor([[GAMMAS[(s * 3 + h) % len(GAMMAS)] for h in range(H)] for s in range(slots)]).clamp(
            min=0.05
        )
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
                if not length:  # a padding row of a captured graph: whatever its tokens hold stays
                    lse[:, t] = 0.5
                    t += 1
                    continue
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
