"""The paged first-token kernel, plain torch and Triton, against a naive float64 softmax per row."""

import math

import pytest
import torch
from kernel_cases import Paged, backends, close, device_of

from headpatch.kernels.first_token import merge_first_token_paged


@backends
@pytest.mark.parametrize("new", [True, False], ids=["new", "in place"])
@pytest.mark.parametrize("which", ["block_slot", "row_slot"])
@pytest.mark.parametrize("layout", ["nkbd", "nbkd"])
def test_paged_rows_with_their_own_recipes(backend, new, which, layout):
    case = Paged(layout=layout)
    y, want, before = case.run(backend, new, which)
    close(y, want, torch.float32, factor=30)
    first = slice(0, 5)  # row 0 has slot 0, the identity
    assert torch.equal(y[first], before[first])


@backends
def test_paged_decode_of_many_rows(backend):
    for H, K, d, slots in ((8, 2, 32, 17), (3, 3, 64, 3), (3, 3, 64, 33)):
        case = Paged(3, rows=tuple((1, 2 + 3 * i) for i in range(40)), padding=0, H=H, K=K, d=d, slots=slots)
        y, want, _ = case.run(backend, False)
        close(y, want, torch.float32, factor=30)


@backends
def test_paged_in_bf16(backend):
    case = Paged(5, dtype=torch.bfloat16)
    case.gamma.clamp_(min=0.5)
    y, want, _ = case.run(backend, False)
    close(y, want, torch.bfloat16, factor=4)


@backends
@pytest.mark.parametrize("which", ["block_slot", "row_slot"])
def test_paged_window_and_null_block(backend, which):
    """Where the first block has left the window it is the null block: nothing is read from it."""
    case = Paged(
        1, window=6, rows=((1, 2), (5, 9), (2, 7), (1, 17), (2, 40))
    )  # row 1 crosses the edge, row 2 ends on it
    y, want, before = case.run(backend, False, which)
    close(y, want, torch.float32, factor=30)
    if which == "block_slot":
        assert torch.equal(y[-4:], before[-4:])


@backends
def test_paged_block_ratio(backend):
    """The engine's block is two of the kernel's: slots are found by the engine's number."""
    case = Paged(2)
    case.block_slot = (torch.arange(len(case.block_slot) // 2 + 1) % 3).int()
    case.row_slot = case.block_slot[case.table[:, 0].long() // 2]
    assert len(case.row_slot.unique()) == 3
    y, want, _ = case.run(backend, False, block_ratio=2)
    close(y, want, torch.float32, factor=30)


@backends
def test_paged_cache_scales(backend):
    """A quantised cache holds keys and values divided by a scale each."""
    case = Paged(2)
    dev = device_of(backend)
    want = case.run(backend, False)[0]
    before, lse, _ = case.naive()
    o = before.float().to(dev)
    view = torch.cat([case.view[..., : case.d] / 4, case.view[..., case.d :] / 2], -1).to(dev)
    y = merge_first_token_paged(
        case.q.to(dev), view[..., : case.d], view[..., case.d :], o, lse.float().to(dev), case.gamma.to(dev),
        scale=case.scale, block_table=case.table.to(dev), query_start_loc=case.start.to(dev),
        seq_lens=case.seq_lens.to(dev), block_slot=case.block_slot.to(dev), head_scale=case.head_scale.to(dev),
        k_scale=torch.tensor(4.0, device=dev), v_scale=torch.tensor(2.0, device=dev), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-5)


@backends
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
