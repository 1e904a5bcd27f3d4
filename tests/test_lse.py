"""Attention sources that no CPU runs by itself, and block masks, against plain attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from headpatch.adapters.huggingface import lse
from headpatch.adapters.huggingface.masks import visible


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The whole softmax in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Stands in for the CUDA kernel: one head per head, no groups."""
    assert q.shape[1] == k.shape[1]
    out: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out[0], out[1]


@pytest.mark.parametrize(
    ("batch", "keys", "pieces"), [(1, 4096, 16), (2, 1024, 4), (3, 700, 1), (64, 1024, 1), (1, 520, 1)]
)
def test_one_query_over_pieces_of_the_keys(batch: int, keys: int, pieces: int) -> None:
    """Folded heads and split keys give the attention of the whole, also where a piece is hidden throughout."""
    assert lse._pieces(batch * 2, keys) == pieces
    torch.manual_seed(keys)
    q, k, v = torch.randn(batch, 6, 1, 16), torch.randn(batch, 2, keys, 16), torch.randn(batch, 2, keys, 16)
    mask = torch.rand(batch, 1, 1, keys) < 0.5
    mask[..., : keys // 2] = False
    mask[..., -1] = True
    bias = torch.zeros(mask.shape).masked_fill(~mask, lse.HIDDEN)
    o, total = lse._one_query(q, k, v, bias, 0.25, cpu_kernel)
    want, want_total = plain(q, k, v, mask, 0.25)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), want_total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    """Their log-sum-exp is -inf and their output finite, from every source on this machine."""
    q, k, v = (torch.randn(1, 2, 5, 16).to(dtype) for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(-1)
    for given in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)):
        for o, total in (
            lse.attend(q, k, v, mask=given, scale=0.25), lse.attend(q, k, v, mask=given, scale=0.25, softcap=1e6),
        ):  # fmt: skip
            assert torch.isneginf(total[:, :, 0]).all() and total[:, :, 1:].isfinite().all()
            assert o.isfinite().all()


@pytest.mark.parametrize("queries", [1, 5, 24])
def test_the_last_queries(queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16)
    mask = torch.ones(queries, 24, dtype=torch.bool).tril(24 - queries)
    for found, wanted in zip(lse.attend_last(q, k, v, 0.3), plain(q, k, v, mask, 0.3), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_no_keys_at_all() -> None:
    """The CPU kernel would end the process."""
    o, total = lse.attend(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 0, 16), torch.randn(1, 2, 0, 16), scale=0.25)
    assert (o == 0).all() and torch.isneginf(total).all()


def test_block_masks_are_read_without_building_them_whole() -> None:
    """What a flex_attention base is given says the same as the mask it was made from."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8], dtype=torch.bool)

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & real[b, j]

    block = create_block_mask(mod, 2, None, 8, 8, device="cpu")
    q = torch.randn(2, 4, 8, 16)
    seen = visible(block, "flex_attention", q, q, True, None)
    want = torch.ones(8, 8, dtype=torch.bool).tril() & real[:, None, None]
    got = torch.cat([m for i in (0, 4) if (m := seen.block(i, i + 4)) is not None], 2)
    assert torch.equal(got, want)
