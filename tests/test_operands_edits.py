"""Segments and families: tiny methods that edit masses, scores and outputs, against the same edits of the full softmax in float64.

Several edits on a head must act as if the full row had been edited one after the other, whichever kernels do it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, one_thread, silent
from naive import Call, Naive, define, of, patch, registered, union
from reference import edit_rows
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch
from headpatch.operands import Segment, first_token

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

LENGTHS = (12, 7, 3)
SPANS: list[list[tuple[int, int]]] = [[(1, 3), (5, 8)], [(0, 2)], []]
SPAN = Segment("spans")
SPAN_REST = Segment("spans", minus=(first_token,))


# ------------------------------------------------------------------------------------------------------- naive edits


Masks = Callable[[Call], Sequence[Tensor]]


@dataclass
class Edit:
    """One patch, written out: `masks` gives its segments, [b or 1, 1 or H, 1, n] each."""

    family: str
    heads: dict[int, float]
    masks: Masks
    fn: Any

    def __call__(self, p: Tensor, lse: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Edited rows, and the log-sum-exp of the scores that they are the softmax of (masses change shares, not that)."""
        chosen = list(self.heads)
        amount = torch.tensor([self.heads[h] for h in chosen], dtype=p.dtype)
        masks = [m.expand_as(p)[:, chosen] for m in self.masks(call)]
        old, p, lse = p[:, chosen], p.clone(), lse.clone()
        if self.family == "scores":
            has = old > 0
            scores = (torch.log(torch.where(has, old, 1.0)) + lse[:, chosen, :, None]).masked_fill(~has, -math.inf)
            new = self.fn(scores.masked_fill(~masks[0], -math.inf), amount)
            new = torch.where(masks[0] & has, new, scores)
            p[:, chosen] = torch.softmax(new, -1).nan_to_num(0.0)
            lse[:, chosen] = torch.logsumexp(new, -1)
        else:
            changed = edit_rows(old, masks, lambda shares: self.fn(shares, amount))
            total = changed.sum(-1, keepdim=True)
            p[:, chosen] = torch.where(total > 0, changed / torch.where(total > 0, total, 1.0), old)
        return p, lse


def apply_all(edits: Sequence[Edit]) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        p, lse = call.p, call.lse
        for edit in edits:
            p, lse = edit(p, lse, call)
        return call.out(p)

    return run


def firsts(lengths: Sequence[int]) -> list[int]:
    return [max(lengths) - n for n in lengths]


def first_mask(call: Call, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """[b, 1, 1, n]."""
    return torch.stack([union([(0, 1)], call.k.shape[2], f) for f in firsts(lengths)])[:, None, None]


def span_mask(call: Call, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """[b, 1, 1, n]."""
    rows = [union(spans, call.k.shape[2], f) for spans, f in zip(SPANS, firsts(lengths), strict=True)]
    return torch.stack(rows)[:, None, None]


# ------------------------------------------------------------------------------------------------------------- methods


def double_and_halve(self: Any, strength: Tensor) -> Tensor:
    return torch.stack([strength, 1 / strength], 1)


def weigh(columns: Callable[[Tensor], Tensor]) -> Any:
    """What constant weights do to shares."""

    def fn(shares: Tensor, amount: Tensor) -> Tensor:
        weights = torch.cat([columns(amount), torch.ones_like(amount)[:, None]], 1)
        new = shares * weights.t()[:, None, :, None]
        total = new.sum(0)
        return torch.where(total > 0, new / torch.where(total > 0, total, 1.0), shares)

    return fn


def borrow(shares: Tensor, amount: Tensor) -> Tensor:
    """The first segment gives part of its share to the second, where that has more than a tenth: gated, not constant."""
    given = (0.9 * shares[0] * (amount / (1 + amount))[:, None]).where(shares[1] > 0.1, 0.0)
    return torch.cat([(shares[0] - given)[None], (shares[1] + given)[None], shares[2:]])


def sharpen(scores: Tensor, amount: Tensor) -> Tensor:
    """PAI-like: away from zero in proportion."""
    return scores + 0.2 * amount[:, None, None] * scores.abs().masked_fill(scores.isneginf(), 0.0)


FIRST = define(
    "mass", "first_only", constant=True, segments=lambda self: (first_token,), weights=lambda self, s: s[:, None]
)
SPANNING = define("mass", "spanning", constant=True, segments=lambda self: (SPAN,), weights=lambda self, s: s[:, None])
WEIGHING = define(
    "mass", "weighing", constant=True, segments=lambda self: (first_token, SPAN_REST), weights=double_and_halve
)
BORROWING = define(
    "mass",
    "borrowing",
    segments=lambda self: (first_token, SPAN_REST),
    reshare=lambda self, shares, s, ops: borrow(shares, s),
)
SHARPENING = define(
    "scores", "sharpening", segments=lambda self: (SPAN,), transform=lambda self, scores, s, ops: sharpen(scores, s)
)
HEADS = {0: 3.0, 2: 5.0}
OTHER = {2: 0.25, 3: 2.0}
NAIVE: dict[Any, Callable[[dict[int, float]], Edit]] = {
    FIRST: lambda heads: Edit("mass", heads, lambda c: [first_mask(c)], weigh(lambda a: a[:, None])),
    SPANNING: lambda heads: Edit("mass", heads, lambda c: [span_mask(c)], weigh(lambda a: a[:, None])),
    WEIGHING: lambda heads: Edit(
        "mass",
        heads,
        lambda c: [first_mask(c), span_mask(c) & ~first_mask(c)],
        weigh(lambda a: double_and_halve(None, a)),
    ),
    BORROWING: lambda heads: Edit("mass", heads, lambda c: [first_mask(c), span_mask(c) & ~first_mask(c)], borrow),
    SHARPENING: lambda heads: Edit("scores", heads, lambda c: [span_mask(c)], sharpen),
}


def by_selector(heads: dict[int, float]) -> dict[str, float]:
    return {f"*.{h}": s for h, s in heads.items()}


def forwards(cache: Any, extra: int) -> Any:
    """A left-padded prompt and some tokens after it."""
    batch = left_padded(LENGTHS)
    mask = batch["attention_mask"]
    yield {**batch, "past_key_values": cache}
    for i in range(extra):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        yield {"input_ids": ids(3, 1, i), "attention_mask": mask, "past_key_values": cache}


def compare(entry: str, applied: Sequence[dict[str, Any]], edits: Sequence[Edit], cache: str, extra: int = 4) -> None:
    """Logits of a patched model and of the naive one, prefill and decode, where tokens are real."""
    model, naive = ZOO[entry].build(torch.float64), Naive(ZOO[entry])
    kept = StaticCache(config=model.config, max_cache_len=24) if cache == "static" else (
        DynamicCache(config=model.config) if cache == "dynamic_config" else DynamicCache()
    )  # fmt: skip
    handles = [headpatch.apply(model, data) for data in applied]
    real = left_padded(LENGTHS)["attention_mask"].bool()
    plain, moved = logits(ZOO[entry].build(torch.float64), left_padded(LENGTHS)), 0.0
    with handles[0].inputs(spans=SPANS), naive.edited(dict.fromkeys(naive.taps, apply_all(edits))) as other:
        for step, reference in zip(forwards(kept, extra), forwards(DynamicCache(), extra), strict=True):
            found, expected = logits(model, step), logits(other, reference)
            if found.shape[1] > 1:
                moved = float((expected - plain)[real].abs().max())
                found, expected = found[real], expected[real]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert moved > 0.05, "the edit does nothing"


CACHES = pytest.mark.parametrize("cache", ["dynamic", "dynamic_config", "static"])


@CACHES
@pytest.mark.parametrize("method", NAIVE, ids=lambda cls: cls.name)
@pytest.mark.parametrize("entry", ["llama", "mistral"])
def test_one_edit(entry, method, cache):
    """Constant and functional masses on one and two segments, transformed scores: in prefill and decode, through windows."""
    with registered(method):
        compare(entry, [of(patch(method, by_selector(HEADS)))], [NAIVE[method](HEADS)], cache, extra=8)


@pytest.mark.parametrize("method", [FIRST, SPANNING, BORROWING, SHARPENING], ids=lambda cls: cls.name)
@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2"])
def test_static_caches_are_wider_than_an_unpadded_prompt(entry, method):
    """Their unwritten slots belong to no segment, and take no share."""
    model, plain = ZOO[entry].build(torch.float64), ids(2, 10)
    with registered(method):
        handle = headpatch.apply(model, of(patch(method, by_selector(HEADS))))
        with handle.inputs(spans=[[(1, 4)], [(0, 2)]]):
            for kind in ("static", "dynamic"):
                cache = StaticCache(config=model.config, max_cache_len=30) if kind == "static" else DynamicCache()
                found = [logits(model, t, past_key_values=cache) for t in (plain, ids(2, 1), ids(2, 1, 1))]
                if kind == "static":
                    expected = found
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
            whole = logits(model, torch.cat([plain, ids(2, 1), ids(2, 1, 1)], 1), use_cache=False)
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-9)


PAIRS = [pair for pair in itertools.permutations(NAIVE, 2) if FIRST not in pair or pair[0] is FIRST]


@pytest.mark.parametrize("handles", [1, 2], ids=["one_recipe", "two_handles"])
@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda cls: cls.name)
def test_two_edits_act_one_after_the_other(one, two, handles):
    """On head 2 both, the second on what the first left; heads 0 and 3 have one each."""
    with registered(one, two):
        patches = [patch(one, by_selector(HEADS)), patch(two, by_selector(OTHER))]
        applied = [of(*patches)] if handles == 1 else [of(p) for p in patches]
        compare("llama", applied, [NAIVE[one](HEADS), NAIVE[two](OTHER)], "dynamic", extra=2)


def test_five_edits_on_all_heads():
    everywhere = dict.fromkeys(range(4), 2.0)
    with registered(*NAIVE):
        for order in (list(NAIVE), list(NAIVE)[::-1]):
            compare(
                "llama", [of(*(patch(cls, by_selector(everywhere)) for cls in order))],
                [NAIVE[cls](everywhere) for cls in order], "dynamic_config", extra=1,
            )  # fmt: skip


def test_gradients_of_functional_edits():
    """Through shares, segments without mass and padding: equal to autograd of the written-out edit."""
    for order in ([BORROWING], [WEIGHING, BORROWING], [SHARPENING, BORROWING]):
        grads = []
        with registered(*order):
            model, naive = ZOO["llama"].build(torch.float64), Naive(ZOO["llama"])
            handle = headpatch.apply(model, of(*(patch(cls, by_selector(HEADS)) for cls in order)))
            edits = [NAIVE[cls](HEADS) for cls in order]
            with handle.inputs(spans=SPANS), naive.edited(dict.fromkeys(naive.taps, apply_all(edits))) as other:
                for one in (model, other):
                    out = one(**left_padded(LENGTHS), use_cache=False).logits
                    real = left_padded(LENGTHS)["attention_mask"].bool()
                    (out[real] * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
                    grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            assert grad.isfinite().all(), name
            torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-8, msg=name)


def test_low_precision_stays_close():
    """The same edits in bfloat16 are as close to float64 as the untouched model is."""
    with registered(*NAIVE):
        data = of(*(patch(cls, by_selector(HEADS)) for cls in NAIVE))
        found = {}
        for dtype in (torch.float64, torch.bfloat16):
            model = ZOO["llama"].build(dtype, weights=torch.bfloat16)
            plain = logits(model, left_padded(LENGTHS))
            with headpatch.apply(model, data).inputs(spans=SPANS):
                found[dtype] = (plain.double(), logits(model, left_padded(LENGTHS)).double())
        real = left_padded(LENGTHS)["attention_mask"].bool()
        errors = [float((a - b)[real].abs().mean()) for a, b in zip(*found.values(), strict=True)]
        assert errors[1] < 3 * errors[0]


def test_weight_zero_of_everything_visible_leaves_the_row():
    """Row 2 and the first queries see nothing but the emptied segment."""
    everything = [[(0, n)] for n in LENGTHS]
    with registered(SPANNING):
        model = ZOO["llama"].build(torch.float64)
        plain = logits(model, left_padded(LENGTHS))
        handle = headpatch.apply(model, of(patch(SPANNING, by_selector(dict.fromkeys(range(4), 0.0)))))
        with handle.inputs(spans=everything):
            found = logits(model, left_padded(LENGTHS))
    real = left_padded(LENGTHS)["attention_mask"].bool()
    torch.testing.assert_close(found[real], plain[real], rtol=0, atol=1e-9)
