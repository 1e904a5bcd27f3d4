"""Attention with new shares of segments in one launch, and extreme tokens of a stream: Triton's against the whole map in float64."""

from __future__ import annotations

import naive_forms
import pytest
import torch
from kernel_cases import CUDA, triton_runs
from torch import Tensor

from headpatch.kernels.extreme import extreme
from headpatch.kernels.segments import Form, attend_segments, attends_segments
from headpatch.methods.act import AttentionCalibration
from headpatch.methods.var import VisualAttentionRedistribution

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]  # the interpreter has no bf16
WITHIN = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [
    (70, 70, 4, 2, 16),
    (1, 130, 4, 4, 48),
    (40, 140, 4, 1, 32),
    *([(1024, 1024, 8, 2, 128), (300, 900, 4, 4, 256)] if CUDA else []),
]
"""Queries, keys, query heads, KV heads, width."""


def case(
    shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> tuple[list[Tensor], list[Tensor], Form, Tensor, float]:
    """q, k, v; masks; form; strengths; scale. Two rows, sinks of their own in each row and, for ACT, in each head."""
    queries, keys, heads, kv, width = shape
    made = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, n, h, width, generator=made).to(DEVICE, dtype).transpose(1, 2)
        for h, n in ((heads, queries), (kv, keys), (kv, keys))
    ]
    column = torch.arange(keys, device=DEVICE)
    sinks = torch.stack([column % 7 == 0, column % 5 == 2])[:, None, None]
    strength = torch.rand(heads, generator=made).to(DEVICE)
    if name == "calibrate":
        some = (torch.rand(1, heads, 1, 1, generator=made) > 0.3).to(DEVICE)
        return tensors, [sinks & some], Form(name, ()), strength, width**-0.5
    image = ((column >= 6) & (column < keys // 2)).expand(2, keys)
    form = Form(name, (), 0.2, 0.7, True, image[:, keys - queries :])
    return tensors, [image[:, None, None], sinks], form, strength, width**-0.5


@triton_runs
@pytest.mark.parametrize("name", ["calibrate", "redistribute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_against_the_whole_map(shape, dtype, name):
    (q, k, v), masks, form, strength, scale = case(shape, dtype, name)
    want = naive_forms.attend_segments(q, k, v, masks, form, strength, scale)
    neutral = torch.full_like(strength, 1.0 if name == "calibrate" else 0.0)
    untouched = naive_forms.attend_segments(q, k, v, masks, form, neutral, scale)
    assert (want - untouched).abs().max() > 2 * WITHIN[dtype]
    got = attend_segments(q, k, v, masks, form, strength, scale)
    assert got.is_contiguous() and got.dtype == dtype
    assert (got - want).abs().max() <= WITHIN[dtype]
    assert (attend_segments(q, k, v, masks, form, neutral, scale) - untouched).abs().max() <= WITHIN[dtype]


@triton_runs
def test_triton_on_some_heads_leaves_the_others():
    (q, k, v), masks, form, strength, scale = case(SHAPES[0], DTYPES[-1], "redistribute")
    every = attend_segments(q, k, v, masks, form, strength, scale)
    heads = torch.tensor([0, 3], device=DEVICE)
    out = torch.full_like(every, 7.0)
    assert attend_segments(q, k, v, masks, form, strength[heads], scale, heads, out) is out
    assert torch.equal(out[:, :, heads], every[:, :, heads])
    assert bool((out[:, :, [1, 2]] == 7.0).all())


@triton_runs
def test_triton_row_that_sees_nothing_but_sinks():
    """Its attention has nowhere to go."""
    (q, k, v), _, form, strength, scale = case(SHAPES[0], DTYPES[-1], "calibrate")
    masks = [(torch.arange(70, device=DEVICE) < 20).view(1, 1, 1, -1)]
    got = attend_segments(q, k, v, masks, form, 0 * strength, scale)
    untouched = naive_forms.attend_segments(q, k, v, masks, form, torch.ones_like(strength), scale)
    assert (got[:, :20] - untouched[:, :20]).abs().max() <= WITHIN[q.dtype]
    want = naive_forms.attention(q, k, scale)[..., 20:]
    want = (want / want.sum(-1, keepdim=True))[:, :, 20:] @ v.double().repeat_interleave(2, 1)[:, :, 20:]
    assert (got[:, 20:] - want.transpose(1, 2)).abs().max() <= WITHIN[q.dtype]


@triton_runs
@pytest.mark.parametrize("name", ["calibrate", "redistribute"])
def test_triton_segment_of_next_to_no_attention(name):
    """What it is given goes to it all the same: 3e-8 of a row become a third of it, beyond what a half holds beside one."""
    (q, k, v), _, _, strength, scale = case(SHAPES[0], DTYPES[-1], name)
    column = torch.arange(70, device=DEVICE)
    least = (column >= 3) & (column < 6)  # the lowest scores of most rows
    q, k = torch.full_like(q, 1.0), torch.where(least[:, None], -17.0 * scale, 0.0).to(k).expand_as(k).contiguous()
    rest = (~least).view(1, 1, 1, -1)
    if name == "calibrate":
        masks, form = [rest], Form(name, ())
    else:
        masks = [(least | (column == 1)).view(1, 1, 1, -1), (column < 2).view(1, 1, 1, -1)]
        form = Form(name, (), 0.0, 0.0, False, torch.zeros(2, 70, dtype=torch.bool, device=DEVICE))
    given = torch.full_like(strength, 0.65)
    want = naive_forms.attend_segments(q, k, v, masks, form, given, scale)
    got = attend_segments(q, k, v, masks, form, given, scale)
    assert (got - want)[:, 6:].abs().max() <= WITHIN[q.dtype]
    assert (want - v.double().mean(2)[:, None].repeat_interleave(2, 2))[:, 60:].abs().max() > 0.1


@pytest.mark.parametrize("least", [0.0, 0.3])
@pytest.mark.parametrize("strict", [True, False])
def test_forms_are_what_methods_say_of_themselves(least, strict):
    """`form` and `reshare` of one method, on the same map."""
    torch.manual_seed(0)
    (q, k, v), (image, sinks), _, strength, scale = case(SHAPES[0], torch.float64, "redistribute")
    if not strict:
        sinks = sinks & ~(image & (torch.arange(70, device=DEVICE) < 33))  # early rows see none in the image
    p = naive_forms.attention(q, k, scale)
    spared = {"image_queries": torch.rand(2, 70, device=DEVICE) > 0.7}
    var = VisualAttentionRedistribution((1,), 0.0, 20.0, least, 0.6, strict)
    of_var = [image & ~sinks, image & sinks, sinks & ~image]
    for method, inside, masks in ((AttentionCalibration(), [sinks], [sinks]), (var, of_var, [image, sinks])):
        inside.append(~sum(inside, torch.zeros_like(sinks)))
        before = torch.stack([(p * m).sum(-1) for m in inside])
        ratio = torch.where(before > 0, method.reshare(before, strength.double(), spared) / before, 1.0)
        assert (ratio != 1).any()
        want = sum(p * m * r.unsqueeze(-1) for m, r in zip(inside, ratio, strict=True)) @ v.repeat_interleave(2, 1)
        form = method.form(spared)
        assert len(form.segments) == len(masks)
        got = naive_forms.attend_segments(q, k, v, masks, form, strength, scale)
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=1e-12)


def test_forms_that_do_not_fit():
    (q, k, v), masks, form, strength, scale = case(SHAPES[0], torch.float32, "redistribute")
    with pytest.raises(ValueError, match="form 'calibrate' has 1 masks, 2 were given"):
        attend_segments(q, k, v, masks, Form("calibrate", ()), strength, scale)
    with pytest.raises(ValueError, match="needs to know which queries are spared"):
        attend_segments(q, k, v, masks, form._replace(spared=None), strength, scale)
    with pytest.raises(ValueError, match="give out"):
        attend_segments(q, k, v, masks, form, strength, scale, torch.tensor([0]))
    assert attends_segments(q, k, v) is False  # fp32


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="asks which CUDA tensors the kernel takes, and there is no CUDA device")
def test_what_the_kernel_takes():
    """Rows that begin at odd places, other widths and wide numbers go another way."""
    x = torch.zeros(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert attends_segments(x, x, x)
    assert not attends_segments(x.float(), x.float(), x.float())
    assert not attends_segments(x, x, x[..., :32])
    assert not attends_segments(x, torch.zeros(2, 4, 64, 72, device="cuda", dtype=x.dtype)[..., 4:68], x)
    assert not attends_segments(*[torch.zeros(2, 4, 64, 72, device="cuda", dtype=x.dtype)] * 3)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=triton_runs)])
@pytest.mark.parametrize("width", [96, 6000])
def test_extreme_tokens(backend, width):
    device = DEVICE if backend == "triton" else "cpu"
    x = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))
    x[0, 3, 5], x[1, 2, 7], x[1, 4, 6] = 60.0, -45.0, 90.0
    x[1, 8] = 0.0  # far below the floor
    dims, x = torch.tensor([5, 7, 9]), x.to(torch.float16 if width == 96 else torch.float32)
    wide = x.double()
    for threshold in (2.0, 5.0):
        want = wide[..., dims].abs().amax(-1) >= threshold * (wide.square().mean(-1) + 1e-6).sqrt()
        assert want.any() and not want.all()
        got = extreme(x.to(device), dims.to(device), threshold, backend)
        assert torch.equal(got.cpu(), want)
        part = extreme(x.to(device)[:, 2:5], dims.to(device), threshold, backend)
        assert torch.equal(part.cpu(), want[:, 2:5])
