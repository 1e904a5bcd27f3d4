"""The first-token kernel on a GPU: torch.compile, CUDA graphs, full sizes, no synchronisation."""

import pytest
import torch
from kernel_cases import Case, Paged, close, needs_gpu

from headpatch.adapters.huggingface.plan import GENTLE
from headpatch.kernels.first_token import merge_first_token, merge_first_token_paged
from headpatch.kernels.paged import PagedMerge
from headpatch.kernels.step import merge_step

pytestmark = [pytest.mark.gpu, needs_gpu]
ROUNDING = {"rtol": 1.6e-2, "atol": 1e-2}
"""For bf16 results of the same formula: a compiler may lay the sum over a head's channels out differently."""


def cuda_case(lq=64, lk=64, d=128, dtype=torch.bfloat16):
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, o = (torch.randn(2, 32, lq, d, device="cuda", dtype=dtype, generator=gen) for _ in range(2))
    k, v = (torch.randn(2, 8, lk, d, device="cuda", dtype=dtype, generator=gen) for _ in range(2))
    lse = torch.randn(2, 32, lq, device="cuda", generator=gen)
    gamma = torch.rand(32, device="cuda", generator=gen) * 3
    return q, k, v, o, lse, gamma


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
        torch.testing.assert_close(got, f(*args), **ROUNDING)
    torch._dynamo.reset()


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


def test_one_dynamic_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    def f(q, k, v, o, lse, gamma):
        return merge_first_token(q, k, v, o, lse, gamma, scale=0.1, complement=True)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for lq, lk in ((64, 64), (80, 96), (33, 4097)):
        args = cuda_case(lq, lk)
        torch.testing.assert_close(compiled(*args), f(*args), **ROUNDING)
    assert counter.frame_count <= 3  # one a length at the most; torch 2.11 does not share them, 2.13 does
    torch._dynamo.reset()


def test_paged_kernel_compiles_and_captures():
    """Packed decode rows with two recipes: eager, compiled and replayed from a CUDA graph agree; tables may change in between."""
    rows, H, K, d = 5, 8, 2, 128
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, o = (torch.randn(rows, H, d, device="cuda", dtype=torch.bfloat16, generator=gen) for _ in range(2))
    cache = torch.randn(20, K, 16, 2 * d, device="cuda", dtype=torch.bfloat16, generator=gen)
    lse = torch.randn(H, rows, device="cuda", generator=gen)
    gamma = torch.rand(2, H, device="cuda", generator=gen) * 3
    table = torch.arange(1, 11, device="cuda", dtype=torch.int32).view(rows, 2)
    start = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    lens = torch.full((rows,), 20, device="cuda", dtype=torch.int32)
    slot = torch.arange(20, device="cuda", dtype=torch.int32) % 2

    def f(o, gamma):
        return merge_first_token_paged(
            q, cache[..., :d], cache[..., d:], o, lse, gamma, scale=0.1, block_table=table, query_start_loc=start,
            seq_lens=lens, block_slot=slot,
        )  # fmt: skip

    want = f(o.clone(), gamma)
    assert not torch.equal(want, o)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(o.clone(), gamma), want, **ROUNDING)
    torch._dynamo.reset()
    static = o.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f(static, gamma)
    for _ in range(2):
        static.copy_(o)
        graph.replay()
        torch.testing.assert_close(
            static, f(o.clone(), gamma), rtol=1e-2, atol=1e-2
        )  # bf16: a compiler may round once more
        gamma.fill_(2.0)


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
        torch.testing.assert_close(y, f(), rtol=1e-2, atol=1e-2)  # bf16: a compiler may round once more


def test_triton_equals_plain_torch_at_full_size():
    for lq, lk in ((4096, 4096), (1, 16384)):
        args = cuda_case(lq, lk)
        for complement in (True, False):
            got, want = (
                merge_first_token(*args, scale=128**-0.5, complement=complement, backend=b)
                for b in ("triton", "torch")
            )
            torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-2)


def test_no_synchronisation():
    args = cuda_case(16)
    merge_first_token(*args, scale=0.1, complement=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_first_token(*args, scale=0.1, complement=True)
        merge_first_token(*args, scale=0.1, complement=False, inplace=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("H", "K", "d"), [(6, 2, 16), (7, 1, 80), (4, 4, 128)])
def test_step_equals_the_reference(dtype, complement, scaled, H, K, d):
    """One query a row, several shapes, lengths and strides through one compiled kernel."""
    for seed, lk in enumerate((2, 9, 33)):
        case = Case(seed=seed, b=3, H=H, K=K, lq=1, lk=lk, d=d, dtype=dtype)
        o, lse = (x.cuda() for x in case.attention(complement))
        k, v = (torch.cat([x, torch.zeros_like(x)], 2).cuda()[:, :, :lk] for x in (case.k, case.v))  # room behind
        gamma = case.gamma.clamp_min(GENTLE).cuda() if not complement else case.gamma.cuda()
        case.gamma = gamma.cpu()
        if not scaled:
            case.head_scale = torch.ones_like(case.head_scale)
        got = merge_step(
            case.q.cuda(), k, v, o, lse.contiguous(), gamma, case.scale, complement, case.head_scale.cuda() if scaled else None
        )  # fmt: skip
        assert got.data_ptr() == o.data_ptr()
        close(got.cpu(), case.expected(), dtype)


def test_step_captures_and_follows_its_tables():
    q, k, v, o, lse, gamma = cuda_case(1, 33)
    want = {g: merge_first_token(q, k, v, o, lse, gamma.fill_(g), scale=0.1, complement=True) for g in (0.5, 3.0)}
    static = o.clone()
    merge_step(q, k, v, static, lse, gamma, 0.1, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge_step(q, k, v, static, lse, gamma, 0.1, True)
    for g, expected in want.items():
        gamma.fill_(g)
        static.copy_(o)
        graph.replay()
        torch.testing.assert_close(static.transpose(1, 2), expected, **ROUNDING)


@pytest.mark.parametrize("which", ["block_slot", "row_slot"])
@pytest.mark.parametrize("one", [False, True])
def test_a_layer_s_merge_equals_the_reference(which, one):
    """Rows of several lengths, and one token each with padding behind, through kernels that are kept."""
    rows = {} if not one else {"rows": ((1, 2), (1, 5), (1, 1), (1, 40), (0, 0), (0, 0)), "padding": 2}
    many = {"rows": tuple((1, 2 + i % 9) for i in range(70)), "padding": 0}
    for seed, shape in enumerate((rows, rows, many)):
        case = Paged(seed, **shape)
        case.by_block = which == "block_slot"
        before, lse, want = case.naive()
        o, view, table = before.float().cuda(), case.view.cuda(), getattr(case, which).cuda()
        merge = PagedMerge(
            view[..., : case.d], view[..., case.d :], case.gamma.cuda(), scale=case.scale, head_scale=case.head_scale.cuda(),
            **{which: table},
        )  # fmt: skip
        for _ in range(2):
            o.copy_(before)
            merge(
                case.q.cuda(), o, lse.float().cuda(), case.table.cuda(), case.start.cuda(), case.seq_lens.cuda(), one
            )
            close(o.cpu(), want, torch.float32, factor=30)


def test_a_layer_s_merge_captures_behind_another_kernel():
    """Replayed behind the kernel that writes what it edits; tables may change in between."""
    rows, H, K, d = 5, 8, 2, 128
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, source = (torch.randn(rows, H, d, device="cuda", dtype=torch.bfloat16, generator=gen) for _ in range(2))
    cache = torch.randn(20, K, 16, 2 * d, device="cuda", dtype=torch.bfloat16, generator=gen)
    lse = torch.randn(H, rows, device="cuda", generator=gen) + 4
    gamma = torch.rand(2, H, device="cuda", generator=gen) * 3
    table = torch.arange(1, 11, device="cuda", dtype=torch.int32).view(rows, 2)
    start = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    lens = torch.full((rows,), 20, device="cuda", dtype=torch.int32)
    slot = torch.arange(20, device="cuda", dtype=torch.int32) % 2
    keys, values = cache[..., :d], cache[..., d:]
    merge = PagedMerge(keys, values, gamma, scale=0.1, block_slot=slot)
    o = torch.empty_like(source)

    def step():
        torch.add(source, 0, out=o)
        merge(q, o, lse, table, start, lens, True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
        want = merge_first_token_paged(
            q, keys, values, source.clone(), lse, gamma, scale=0.1, block_table=table, query_start_loc=start, seq_lens=lens,
            block_slot=slot,
        )  # fmt: skip
        torch.testing.assert_close(o, want, **ROUNDING)
        gamma.mul_(1.5)
