"""Attention that keys receive, in two launches and without a map: Triton's against the whole map in float64."""

from __future__ import annotations

import naive_forms
import pytest
import torch
from kernel_cases import CUDA, triton_runs

from headpatch.kernels.columns import column_sums
from headpatch.kernels.segments import takes

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]  # the interpreter has no bf16
LARGE = [(1024, 1024, 8, 2, 128), (300, 900, 4, 4, 256)] if CUDA else []
SHAPES = [(70, 70, 4, 2, 16), (1, 130, 4, 4, 48), (40, 140, 4, 1, 32), *LARGE]
"""Queries, keys, query heads, KV heads, width."""


@triton_runs
@pytest.mark.parametrize("heads", [None, [1], [0, 3]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_sums(shape, dtype, heads):
    """Probabilities of numbers that are exact in either type, so that only fp32's own rounding is left."""
    queries, keys, count, kv, width = shape
    made = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, n, h, width, generator=made).to(DEVICE, dtype).transpose(1, 2)
        for h, n in ((count, queries), (kv, keys))
    )
    counted = (torch.rand(2, queries, generator=made) > 0.2).to(DEVICE)
    counted[1, -1] = True
    some = None if heads is None else torch.tensor(heads, device=DEVICE)
    p = naive_forms.attention(q, k, width**-0.5)
    p = p if some is None else p[:, some]
    want = (p * counted[:, None, :, None]).sum(2)
    got = column_sums(q, k, counted, width**-0.5, some)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    one_row = column_sums(q[1:], k[1:], counted[1:], width**-0.5, some)
    torch.testing.assert_close(one_row, got[1:], rtol=0, atol=0)


def test_where_the_kernels_do_not_run():
    x = torch.zeros(1, 2, 8, 16)
    assert not takes(x, x)
