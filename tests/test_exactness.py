"""Every method, on every architecture, equals a naive float64 edit of the full softmax: one forward over everything.

Caches, generation and unusual inputs are in test_exactness_caches.py and test_exactness_inputs.py; the reference and the power of the
tolerances are checked in test_reference.py.
"""

from __future__ import annotations

import pytest
import torch
from exact import (
    CASES,
    Recipe,
    close,
    close_in_bf16,
    expected,
    forward,
    make_cache,
    patched,
    recipes,
    run_cached,
    tolerance,
    usable,
)
from torch import Tensor
from zoo import FULL, PARTIAL, REFUSED, ZOO, Entry, output

import headpatch

pytestmark = pytest.mark.usefixtures("one_thread")

BASES = [pytest.param(ZOO[name], attn, id=f"{name}-{attn}") for name in FULL for attn in ZOO[name].attn]
PADDED = [p for p in BASES if p.values[0].caches]
LENGTHS = [14, 9, 5]


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("entry", "attn"), BASES)
def test_prefill(entry: Entry, attn: str, case: str, dtype: torch.dtype) -> None:
    """One forward over two rows of equal length, no mask given."""
    if not usable(entry, dtype, attn, None):
        pytest.skip("the untouched model is not finite here")
    inputs, applied = entry.make_inputs(), recipes(entry, case)
    with patched(entry, dtype, attn, applied) as model:
        close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, tolerance(entry, dtype, attn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", ["per_head", "stacked", "zero"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("entry", "attn"), PADDED)
def test_padded(entry: Entry, attn: str, side: str, case: str, dtype: torch.dtype) -> None:
    """Three rows of different lengths: each row's first *real* token counts."""
    if not usable(entry, dtype, attn, side):
        pytest.skip("the untouched model is not finite here")
    inputs, applied = entry.make_inputs(lengths=LENGTHS, padding_side=side), recipes(entry, case, seed=1)
    with patched(entry, dtype, attn, applied) as model:
        close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, tolerance(entry, dtype, attn))


@pytest.mark.parametrize(
    ("entry", "attn", "part"),
    [pytest.param(*p.values, part, id=f"{p.id}-{part}") for p in BASES for part in p.values[0].parts
     if len(p.values[0].parts) > 1],
)  # fmt: skip
def test_one_part(entry: Entry, attn: str, part: str) -> None:
    """A patch of one attention stack leaves the others alone; without ``part`` it means the main one."""
    inputs, applied = entry.make_inputs(), recipes(entry, "stacked", parts=[part])
    with patched(entry, torch.float32, attn, applied) as model:
        close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, 1e-4)


@pytest.mark.parametrize(("entry", "attn"), BASES)
def test_with_gradients_on(entry: Entry, attn: str) -> None:
    """The path that training takes gives the same numbers. Padded: the hardest masks."""
    side = "left" if entry.caches else None
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    applied = recipes(entry, "stacked")
    with patched(entry, torch.float32, attn, applied) as model:
        result = output(model(**inputs.kwargs))
        assert result.requires_grad
        close(result.detach(), expected(entry, inputs, applied, attn), inputs, 1e-4)


@pytest.mark.parametrize("case", ["per_head", "scaling", "stacked"])
@pytest.mark.parametrize(("entry", "attn"), BASES)
def test_bf16(entry: Entry, attn: str, case: str) -> None:
    """In bfloat16 an edit costs no more accuracy than bfloat16 itself does."""
    side = "left" if entry.caches else None
    lengths = [14, 12, 9, 5] if side else None
    inputs = entry.make_inputs(batch=4, lengths=lengths, padding_side=side, seed=2)
    applied = recipes(entry, case, seed=2)
    with patched(entry, torch.bfloat16, attn, []) as model:
        plain = forward(model, inputs)
    with patched(entry, torch.bfloat16, attn, applied) as model:
        close_in_bf16(forward(model, inputs), plain, entry, inputs, applied, attn)


@pytest.mark.parametrize(("entry", "attn"), BASES)
def test_removed(entry: Entry, attn: str) -> None:
    """Handles come off in any order, and the model is bit for bit what it was: forward and through a cache."""
    side = "left" if entry.caches else None
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=3 if side else 0)
    model = entry.build(torch.float32, attn)

    def run() -> list[Tensor]:
        results = [forward(model, inputs)]
        if entry.caches:
            sizes = [inputs.prompt, 1, 1, 1]
            results.append(run_cached(model, entry, inputs, sizes, make_cache(model, "dynamic_config", 20)))
        return results

    before = run()
    first = headpatch.apply(model, recipes(entry, "stacked")[0])
    second = headpatch.apply(model, recipes(entry, "uniform")[0])
    both = run()
    assert not any(torch.equal(a, b) for a, b in zip(before, both, strict=True)), "the patch does nothing"
    first.remove()
    close(forward(model, inputs), expected(entry, inputs, recipes(entry, "uniform"), attn), inputs, 1e-4)
    second.remove()
    second.remove()  # does nothing
    assert headpatch.handles(model) == []
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


@pytest.mark.parametrize(("entry", "attn"), BASES)
def test_identity(entry: Entry, attn: str) -> None:
    """Strength 1 of both methods is bit-equal to the untouched model."""
    side = "left" if entry.caches else None
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    patches = [
        {"method": method, "part": part, "heads": ["*.*"], name: 1.0}
        for part in entry.parts for method, name in (("zerotuning", "gamma"), ("head_scaling", "scale"))
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = entry.build(dtype, attn)
        before = forward(model, inputs)
        with headpatch.applied(model, {"headpatch": 1, "patches": patches}):
            assert torch.equal(before, forward(model, inputs))


def test_other_heads_stay() -> None:
    """In a layer where one head is edited, outputs of the others (before the projection mixes them) stay, up to rounding."""
    entry = ZOO["llama"]
    inputs, seen = entry.make_inputs(), []
    for patches in (
        [],
        [{"method": "zerotuning", "heads": {"0.2": 3.0}}, {"method": "head_scaling", "heads": {"0.2": 2.0}}],
    ):
        applied: list[Recipe] = [{"headpatch": 1, "patches": patches}] if patches else []
        with patched(entry, torch.float32, "sdpa", applied) as model:
            hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
            forward(model, inputs)
            hook.remove()
    before, after = (x.unflatten(-1, (4, 16)) for x in seen)
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    others = [0, 1, 3]
    torch.testing.assert_close(before[:, :, others], after[:, :, others], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, attn: str) -> None:
    """Where the first token's share cannot be had exactly, ZeroTuning is refused with a reason, and nothing is touched."""
    entry = ZOO[name]
    inputs, model = entry.make_inputs(), entry.build(torch.float32, attn)
    before = forward(model, inputs)
    for part in entry.parts:
        recipe = {"headpatch": 1, "patches": [{"method": "zerotuning", "part": part, "heads": {"0.0": 2.0}}]}
        with pytest.raises((headpatch.UnsupportedModelError, headpatch.RecipeError)) as error:
            headpatch.apply(model, recipe)
        reason = str(error.value).lower()
        assert "first_token" in reason, reason
        assert "position_bias" in reason or "position bias" in reason, reason
    assert headpatch.handles(model) == []
    assert torch.equal(before, forward(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REFUSED)
def test_scaling_where_zerotuning_is_refused(name: str, attn: str, dtype: torch.dtype) -> None:
    """Head scaling needs nothing of the attention and works there."""
    entry = ZOO[name]
    inputs = entry.make_inputs()
    applied = recipes(entry, "scaling")
    with patched(entry, dtype, attn, applied) as model:
        close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, tolerance(entry, dtype, attn))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PARTIAL)
def test_linear_attention_layers(name: str, attn: str) -> None:
    """``*`` means the layers that have softmax heads; naming another layer is an error."""
    entry = ZOO[name]
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side="left")
    for case in ("uniform", "scaling"):
        applied = recipes(entry, case)
        with patched(entry, torch.float32, attn, applied) as model:
            close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, 5e-4)
    model = entry.build(torch.float32, attn)
    for heads in (["0.0"], {"2.*": 2.0}):
        patch = {"method": "zerotuning", "heads": heads} | ({"gamma": 2.0} if isinstance(heads, list) else {})
        with pytest.raises(headpatch.RecipeError):
            headpatch.apply(model, {"headpatch": 1, "patches": [patch]})
    assert headpatch.handles(model) == []


def test_soft_capping_follows_the_base() -> None:
    """Gemma-2: eager caps its scores and sdpa does not, so the same recipe has two right answers, and they differ."""
    entry = ZOO["gemma2"]
    inputs, applied = entry.make_inputs(), recipes(entry, "uniform")
    capped, plain = (expected(entry, inputs, applied, base) for base in ("eager", "sdpa"))
    assert (capped - plain).abs().max() > 0.1
