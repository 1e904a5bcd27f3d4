"""Mass edits of segments without a mask: two passes of the ordinary kernel say what masked cells say, and take few calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import ids, one_thread, silent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from zoo import ZOO

import headpatch
from headpatch.adapters.huggingface import cells
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import Call, FirstKey, unedited
from headpatch.adapters.huggingface.plan import Edit
from headpatch.methods.act import AttentionCalibration
from headpatch.methods.pasta import Pasta
from headpatch.registry import get_method
from headpatch.segments import new_shares

__all__ = ["one_thread", "silent"]

H, K, N, D = 4, 2, 48, 16


def edited(
    strengths: list[dict[int, float]], queries: int, dtype: torch.dtype, monkeypatch: Any, masked: bool
) -> Tensor:
    """Attention under ACT on some keys and, where there is a second edit, PASTA with a target on others, which overlap."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, D, dtype=torch.float64) for h, n in ((H, queries), (K, N), (K, N)))
    q, k, v = (x.bfloat16().to(dtype) for x in (q * 2, k, v))
    seen = Visible("causal", N, N, q.device) if queries > 1 else Visible("all", 1, N, q.device)
    call = Call(q, k, v, seen, D**-0.5, None, None, FirstKey())
    column = torch.arange(N)
    segments = [((column % 5 == 1) | (column == 0)).view(1, 1, 1, N), ((column > 3) & (column < 20)).view(1, 1, 1, N)]
    methods = [AttentionCalibration(), Pasta(target_mass=0.7)]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    edits = tuple(
        Edit(method, torch.tensor(list(of)), torch.tensor(list(of.values()), dtype=arithmetic), ("test", i))
        for i, (method, of) in enumerate(zip(methods, strengths, strict=False))
    )
    taken, inner = [], cells._in_two_passes
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(cells, "_in_two_passes", lambda *given: taken.append(1) or inner(*given))
        if masked:
            patched.setattr(cells, "biased_keys_suit", lambda call: False)
        found = cells.by_cells(
            call, edits, lambda i, j: segments[: len(edits)], ((0,), (1,))[: len(edits)], lambda e, i, j: {}
        )
    assert bool(taken) == (not masked)
    return found.double()


CASES = [
    [{0: 0.3, 1: 0.0, 2: 0.9, 3: 0.5}],
    [{1: 0.0}],
    [{0: 0.3, 1: 0.0, 3: 0.5}, {1: 0.1, 2: 0.01, 3: 0.4}],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [N, 1])
@pytest.mark.parametrize("strengths", CASES)
def test_two_passes_say_what_masks_say(strengths, queries, dtype, monkeypatch):
    exact = edited(strengths, queries, torch.float64, monkeypatch, True)
    found, other = ((edited(strengths, queries, dtype, monkeypatch, masked) - exact).abs() for masked in (False, True))
    assert found.isfinite().all()
    if dtype in (torch.float64, torch.float32):
        assert found.max() <= (1e-12 if dtype == torch.float64 else 3e-6)
    else:
        assert found.mean() <= 1.2 * other.mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("since", [1, 20, N - 1, N])
def test_queries_that_no_edit_acts_on_are_spared(since, dtype):
    """An edit that begins at a query is the whole edit from there on, and none before."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, N, D, dtype=torch.float64).bfloat16().to(dtype) for h in (H, K, K))
    call = Call(q, k, v, Visible("causal", N, N, q.device), D**-0.5, None, None, FirstKey())
    segment = (torch.arange(N) % 5 == 1).view(1, 1, 1, N)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    edit = Edit(AttentionCalibration(), torch.arange(H), torch.full((H,), 0.3, dtype=arithmetic), ("test", 0))
    asked: list[tuple[int, int]] = []

    def run(since: int) -> Tensor:
        given = lambda e, i, j: asked.append((i, j)) or {}  # noqa: E731
        return cells.by_cells(call, (edit,), lambda i, j: [segment], ((0,),), given, since).double()

    whole, found, plain = run(0), run(since), unedited(call).transpose(1, 2).double()
    assert asked == [(0, N), (since, N)][: 2 if since < N else 1]
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-2}
    torch.testing.assert_close(found[:, since:], whole[:, since:], **close)
    torch.testing.assert_close(found[:, :since], plain[:, :since], **close)
    assert since == N or (whole[:, :since] - plain[:, :since]).abs().max() > (0.01 if since > 1 else -1)


@pytest.mark.parametrize("name", ["act", "var"])
def test_methods_that_say_that_they_conserve(name):
    """The sum stays what it was, and what has no attention gets none: for shares of all kinds, empty segments included."""
    given: dict[str, Any] = {"sink_dimensions": (1,)} if name == "var" else {}
    for least in (0.0, 0.2) if name == "var" else (0.0,):
        method = get_method(name)(
            **given, **({"min_visual_mass": least, "require_visual_sink": False} if given else {})
        )
        assert method.conserves
        shares = torch.rand(len(method.segments()) + 1, 3, 2, 400, dtype=torch.float64)
        shares *= torch.rand(shares.shape) > 0.4
        shares[-1, :, :, :5] += 0.1
        shares = shares[:, :, :, (shares.sum(0) > 0).all((0, 1))]
        shares /= shares.sum(0)
        operands = {"image_queries": torch.rand(3, shares.shape[3]) > 0.5}
        new = method.reshare(shares, torch.tensor([0.0, 0.7], dtype=torch.float64), operands)
        torch.testing.assert_close(new.sum(0), shares.sum(0))
        assert (new[shares == 0] == 0).all() and (new >= 0).all() and not torch.equal(new, shares)
        assert torch.equal(new_shares(shares, lambda s, new=new: new, True), new)
        torch.testing.assert_close(new_shares(shares, lambda s, new=new: new), new)


class Count(TorchDispatchMode):
    """How many calls reach the dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


# What a layer may take beyond the untouched one, views included; on a GPU each that is no view is a launch of some microseconds.
MOST = {"act": (70, 56), "pasta": (20, 20)}
RECIPES: dict[str, dict[str, Any]] = {
    "act": {"heads": {"*.1": 0.4}, "threshold": 2.0, "threshold_per": "prompt_length"},
    "pasta": {"heads": {"*.1": 0.01}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_takes_few_calls(name):
    """Counted between models of one and of more layers, so that what is done once in a call is left out."""

    def calls(layers: int, patched: bool) -> list[int]:
        config = ZOO["llama"].config()
        config.num_hidden_layers = layers
        model = LlamaForCausalLM(config).eval()
        if patched:
            handle = headpatch.apply(model, {"headpatch": 1, "patches": [{"method": name, **RECIPES[name]}]})
        given = handle.inputs(spans=[[(3, 9)]]) if patched and name == "pasta" else torch.no_grad()
        found = []
        with torch.no_grad(), given:
            tokens = ids(1, 300)
            cache = model(tokens).past_key_values  # what is kept with a plan is made here
            model(tokens[:, :1], past_key_values=cache)
            for n in (300, 1):
                with Count() as count:
                    cache = model(tokens[:, :n], past_key_values=None if n > 1 else cache).past_key_values
                found.append(count.calls)
        return found

    for at, most in enumerate(MOST[name]):
        more = [calls(layers, True)[at] - calls(layers, False)[at] for layers in (1, 3)]
        assert (more[1] - more[0]) / 2 <= most, ("prompt", "step")[at]
