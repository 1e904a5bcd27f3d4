"""The dense first-token kernel, plain torch and Triton, against a naive float64 softmax that is edited row by row."""

import math
from pathlib import Path

import pytest
import torch
from kernel_cases import HAS_TRITON, Case, Paged, backends, close, outside_interpreter, run_in_interpreter

from headpatch.kernels import plain
from headpatch.kernels.first_token import merge_first_token, triton_available

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


@backends
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_complement_is_exact_for_every_gamma(backend, shape, dtype):
    for seed in range(3):
        case = Case(seed, dtype=dtype, **shape)
        close(case.run(backend, True), case.expected(), dtype)


@backends
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_correction(backend, shape, inplace):
    for seed in range(3):
        case = Case(seed, **shape)
        case.gamma.clamp_(min=0.05)  # below, correction is not promised to keep its digits
        close(case.run(backend, False, inplace), case.expected(), torch.float32, factor=30)


@backends
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


@backends
def test_causal_prompt_without_its_first_row(backend):
    """o and lse start at query 1; query 0 sees the first token alone and gets its value."""
    for lq, d in ((7, 16), (200, 64), (1, 16)):
        case = Case(
            lq=lq, lk=lq, d=d, visible=torch.ones(lq, lq, dtype=torch.bool).tril()[None, None].expand(2, 1, lq, lq)
        )
        y = case.run(backend, True, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:]))
        close(y, case.expected(), torch.float32)
        v0 = case.v[:, :, 0].repeat_interleave(3, 1) * case.head_scale[:, None]
        torch.testing.assert_close(y[:, 0], v0, rtol=0, atol=0)


@backends
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


@backends
def test_additive_mask_values_enter_the_score(backend):
    """ALiBi-like biases per head, also on the first token."""
    bias = -torch.rand(2, 6, 5, 9, generator=torch.Generator().manual_seed(1)) * 3
    for complement in (True, False):
        case = Case(bias=bias)
        case.gamma.clamp_(min=0.05)
        close(case.run(backend, complement, mask=bias), case.expected(), torch.float32, factor=30)


@backends
def test_mask_longer_than_the_keys(backend):
    """A static cache's mask goes on after the keys that the kernel was given."""
    case = Case()
    mask = torch.ones(2, 1, 5, 40, dtype=torch.bool)
    close(case.run(backend, True, mask=mask), case.expected(), torch.float32)


@backends
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


@backends
def test_kv_offset_counts_back(backend):
    case = Case(first=torch.tensor([2, 5]))
    close(case.run(backend, True, first=torch.tensor([12, 15]), kv_offset=10), case.expected(), torch.float32)


@backends
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


@backends
def test_softcap(backend):
    for complement in (True, False):
        case = Case(softcap=2.0, sd=3.0)
        case.gamma.clamp_(min=0.05)
        close(case.run(backend, complement), case.expected(), torch.float32, factor=30)


@backends
@pytest.mark.parametrize("complement", [True, False], ids=["complement", "correction"])
def test_sink_logits_take_their_share(backend, complement):
    n = 6
    case = Case(
        lq=n, lk=n, sink=True, visible=torch.ones(n, n, dtype=torch.bool).tril()[None, None].expand(2, 1, n, n)
    )
    if not complement:
        case.gamma.clamp_(min=0.05)
    y = case.run(backend, complement)
    close(y, case.expected(), torch.float32, factor=1 if complement else 30)
    if complement:
        y = case.run(backend, True, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:]))
        close(y, case.expected(), torch.float32)


@backends
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


@backends
def test_identity_is_bit_equal_in_correction_mode(backend):
    for dtype in (torch.float32, torch.bfloat16):
        for inplace in (False, True):
            case = Case(dtype=dtype)
            case.gamma.fill_(1.0)
            case.head_scale.fill_(1.0)
            before = case.attention(False)[0].transpose(1, 2)
            assert torch.equal(case.run(backend, False, inplace), before)


@backends
def test_untouched_heads_are_bit_equal_in_correction_mode(backend):
    case = Case(dtype=torch.bfloat16)
    case.gamma[:3], case.head_scale[:3] = 1.0, 1.0
    y = case.run(backend, False, True)
    assert torch.equal(y[:, :, :3], case.attention(False)[0].transpose(1, 2)[:, :, :3])
    assert not torch.equal(y[:, :, 3:], case.attention(False)[0].transpose(1, 2)[:, :, 3:])


@backends
def test_gamma_zero_on_a_row_that_sees_only_the_first_token(backend):
    case = Case(lq=1, lk=1)
    case.gamma.zero_()
    for complement in (True, False):
        y = case.run(backend, complement)
        want = case.v.repeat_interleave(3, 1) * case.head_scale.view(1, -1, 1, 1)
        torch.testing.assert_close(y, want.transpose(1, 2))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_long_prompts_in_slices_are_the_same(monkeypatch, size):
    """Plain torch works through a prompt in slices; where they end must not matter."""
    n = 13
    visible = torch.ones(n, n, dtype=torch.bool).tril()[None, None].expand(2, 1, n, n)
    case = Case(lq=n, lk=n, visible=visible)
    calls = {
        "prompt": lambda: case.run("torch", True, change=lambda o, lse: (o[:, :, 1:], lse[:, :, 1:])),
        "mask": lambda: case.run("torch", True, mask=visible, first=torch.tensor([0, 0])),
        "per query": lambda: case.run("torch", True, mask=visible, first=torch.zeros(2, n, dtype=torch.long)),
        "window": lambda: case.run("torch", False, window=5),
        "in place": lambda: case.run("torch", False, True),
    }
    want = {name: call() for name, call in calls.items()}
    monkeypatch.setattr(plain, "SLICE", size * case.b * case.H * 16)
    for name, call in calls.items():
        torch.testing.assert_close(call(), want[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("complement", [True, False])
def test_long_prompts_in_few_large_slices(monkeypatch, dtype, complement):
    """Scores are had at once, those of half precision converted slice by slice; queries and outputs are views of rows of heads."""
    monkeypatch.setattr(plain, "SLICE", 50 * 6 * 16)
    monkeypatch.setattr(plain, "LONGER", 3)
    case = Case(lq=230, lk=230, dtype=dtype)
    case.visible[1, :, :, :2] = False  # a padded row, whose first token is not its first key
    case.first[1] = 2
    case.gamma.clamp_(min=0.2)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    y = case.run("torch", complement, first=case.first[:, 0])
    want = case.expected()
    real = case.visible.any(-1).squeeze(1)
    close(y[real], want[real], dtype, factor=30 if dtype != torch.bfloat16 else 4)


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


@outside_interpreter
@pytest.mark.slow
def test_triton_kernel_in_the_interpreter():
    names = ("columns", "paged", "segments")
    run_in_interpreter("triton", __file__, *(Path(__file__).with_name(f"test_kernels_{name}.py") for name in names))


def test_which_devices_have_the_kernel():
    assert not triton_available(torch.device("cpu"))
    assert triton_available(torch.device("cuda")) == HAS_TRITON
