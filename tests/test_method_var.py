"""VAR against its formula on full rows: sinks by residual stream, a gate per layer, head and query, and what is moved where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive_forms
import pytest
import torch
from compat import logits, one_thread, silent
from method_cases import CACHES, PADDINGS, compare, inputs_of, recipe_of, token_columns
from naive import Call, Naive
from torch import Tensor
from zoo import IMAGE, ZOO

import headpatch
from headpatch import RecipeError, UnsupportedModelError
from headpatch.adapters.huggingface import fused

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

RECYCLE = {0: 0.4, 2: 1.0, 3: 0.7}
DIMS, TAU = (0, 5, 17), 1.7
GIVEN: dict[str, Any] = {
    "sink_dimensions": list(DIMS),
    "sink_threshold": TAU,
    "min_visual_mass": 0.3,
    "min_nonsink_ratio": 0.6,
}


class Written:
    """The method on full rows; it taps the naive model's layers for what enters them.

    `gates` counts decisions, of those rows that it may edit at all.
    """

    def __init__(self, inputs: Any, require_sink: bool = True, **given: Any) -> None:
        self.inputs, self.given, self.require_sink = inputs, {**GIVEN, **given}, require_sink
        self.streams: dict[int, Tensor] = {}
        self.gates = {True: 0, False: 0}

    def prepare(self, naive: Naive) -> None:
        for i, layer in enumerate(naive.model.model.language_model.layers):
            layer.register_forward_pre_hook(self._keep(i))

    def _keep(self, layer: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def keep(module: Any, args: tuple[Any, ...]) -> None:
            if args[0].shape[1] > 1:
                self.streams[layer] = args[0]

        return keep

    def __call__(self, layer: int) -> Callable[[Call], Tensor]:
        first = token_columns(self.inputs)[0]
        prompt = self.inputs.prompt
        real = self.inputs.real[:, :prompt]
        image_ids = self.inputs.kwargs["input_ids"][:, :prompt] == IMAGE
        least, ratio = self.given["min_visual_mass"], self.given["min_nonsink_ratio"]

        def edit(call: Call) -> Tensor:
            p = call.p.clone()
            x = self.streams[layer]
            phi = x[..., list(self.given["sink_dimensions"])].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
            n, n_q = p.shape[3], p.shape[2]
            sinks, image = (
                torch.nn.functional.pad(m, (0, n - prompt))
                for m in ((phi >= self.given["sink_threshold"]) & real, image_ids)
            )
            assert (sinks & image).any() and (sinks & ~image).any() and (image & ~sinks).any()
            for b in range(p.shape[0]):
                in_s, in_v = sinks[b], image[b]
                for i in range(n_q):
                    column = n - n_q + i
                    if in_v[column] or column < first[b]:
                        continue
                    for h, r in RECYCLE.items():
                        row = p[b, h, i]
                        m_v, m_n, m_s = (float(row[mask].sum()) for mask in (in_v, in_v & ~in_s, in_s))
                        seen = bool((in_v & in_s & call.seen[b, 0, i]).any()) or not self.require_sink
                        opened = m_v >= least and m_v > 0 and m_n / m_v >= ratio and seen and m_n > 0
                        self.gates[opened] += 1
                        if opened:
                            old = row.clone()
                            row[in_s] = (1 - r) * old[in_s]
                            row[in_v & ~in_s] = old[in_v & ~in_s] + r * m_s * old[in_v & ~in_s] / m_n
                            torch.testing.assert_close(row.sum(), torch.ones((), dtype=row.dtype))
            return call.out(p)

        return edit


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("least", [0.0, 0.3, 0.6])
def test_prompt_and_decoding(least, padding):
    """Gates open and close within one batch, one layer and one head."""
    written = Written(inputs_of("llava", padding), min_visual_mass=least)
    data = recipe_of("var", RECYCLE, **{**GIVEN, "min_visual_mass": least})
    compare("llava", data, written, padding, prepare=written.prepare)
    assert min(written.gates.values()) > 3, written.gates


@pytest.mark.parametrize("least", [0.0, 0.3, 0.6])
def test_in_one_launch(least, monkeypatch):
    """What is handed to the kernel, prompt and steps."""
    asked = naive_forms.stand_in(monkeypatch)
    written = Written(inputs_of("llava", None), min_visual_mass=least)
    compare(
        "llava", recipe_of("var", RECYCLE, **{**GIVEN, "min_visual_mass": least}), written, prepare=written.prepare
    )
    assert asked and not any(asked)


@pytest.mark.parametrize("cache", CACHES)
def test_caches(cache):
    written = Written(inputs_of("llava", "left", 8))
    compare("llava", recipe_of("var", RECYCLE, **GIVEN), written, "left", cache, 8, prepare=written.prepare)


def test_nonsink_ratio():
    """A stricter ratio closes gates."""
    counts = []
    for ratio in (0.3, 0.95):
        written = Written(inputs_of("llava", None), min_nonsink_ratio=ratio)
        data = recipe_of("var", RECYCLE, **{**GIVEN, "min_nonsink_ratio": ratio})
        compare("llava", data, written, prepare=written.prepare, moves=0.0)
        counts.append(written.gates[True])
    assert counts[0] > counts[1]


def test_without_a_visual_sink():
    """By default such rows stay as they are; the paper's formula moves what the text sinks have."""
    inputs, model = inputs_of("llava", None, 0), ZOO["llava"].build(torch.float64)
    plain = logits(model, inputs.kwargs)
    stream: list[Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: stream.append(args[0]))
    logits(model, inputs.kwargs)
    handle.remove()
    x = stream[0]
    phi = x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    image = inputs.kwargs["input_ids"][0] == IMAGE
    spare = phi[:, ~image].amax((0, 1)) - phi[:, image].amax((0, 1))
    dim = int(spare.argmax())  # text is extreme there, and no image token is
    bound = float(phi[:, image, dim].max()) + 1e-6
    assert (phi[:, ~image, dim] > bound).any()
    given = {**GIVEN, "sink_dimensions": [dim], "sink_threshold": bound, "min_visual_mass": 0.0}
    recipe = recipe_of("var", RECYCLE, **given)
    recipe["patches"][0]["heads"] = {"0.*": 0.8}
    with headpatch.applied(model, recipe):
        torch.testing.assert_close(logits(model, inputs.kwargs), plain, rtol=0, atol=1e-9)
    recipe["patches"][0]["require_visual_sink"] = False
    with headpatch.applied(model, recipe):
        assert (logits(model, inputs.kwargs) - plain).abs().max() > 0.01


def test_generating_64_tokens():
    inputs = inputs_of("llava", "left", 0)
    given = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    naive, model, written = Naive(ZOO["llava"]), ZOO["llava"].build(torch.float64), Written(inputs)
    written.prepare(naive)
    headpatch.apply(model, recipe_of("var", RECYCLE, **GIVEN))
    asked = {"max_new_tokens": 64, "do_sample": False}
    with naive.edited({layer: written(layer) for layer in naive.taps}) as other:
        expected = other.generate(**given, **asked)
    assert torch.equal(model.generate(**given, **asked), expected)
    assert min(written.gates.values()) > 3


@pytest.mark.parametrize("first", ["var", "zerotuning"])
def test_stacked_with_other_methods(first):
    """The gate sees the row as the method before it left it."""
    inputs, gamma, scale = inputs_of("llava", "left"), {0: 3.0, 1: 0.2, 2: 0.5}, {0: 0.5, 3: -1.0}
    written, columns = Written(inputs), token_columns(inputs)[0]

    def weights(n: int) -> Tensor:
        at = (torch.arange(n) == columns[:, None])[:, None, None]
        amount = torch.tensor([gamma.get(h, 1.0) for h in range(4)], dtype=torch.float64).view(1, 4, 1, 1)
        return torch.where(at, amount, 1.0)

    class Rows:
        """A call whose attention is these rows, and that hands back edited ones."""

        def __init__(self, call: Call, p: Tensor) -> None:
            self.p, self.seen = p, call.seen

        def out(self, p: Tensor) -> Tensor:
            return p

    def of_layer(layer: int) -> Callable[[Call], Tensor]:
        move: Any = written(layer)

        def zero(p: Tensor) -> Tensor:
            new = p * weights(p.shape[3])
            return new / new.sum(-1, keepdim=True).clamp_min(1e-300)

        def edit(call: Call) -> Tensor:
            p = zero(move(Rows(call, call.p))) if first == "var" else move(Rows(call, zero(call.p)))
            factor = torch.tensor([scale.get(h, 1.0) for h in range(4)], dtype=torch.float64)
            return call.out(p) * factor[:, None]

        return edit

    patches = [recipe_of("var", RECYCLE, **GIVEN)["patches"][0], recipe_of("zerotuning", gamma)["patches"][0]]
    patches = patches if first == "var" else patches[::-1]
    patches.append(recipe_of("head_scaling", scale)["patches"][0])
    compare("llava", {"headpatch": 1, "patches": patches}, of_layer, "left", prepare=written.prepare)
    assert min(written.gates.values()) > 3


def test_queries_that_are_never_edited_are_spared(monkeypatch):
    """Where a GPU would be busy, the kernel passes begin at the first query behind an image of any row; in steps, nowhere else."""
    begun: list[int] = []
    inner = fused.by_cells
    monkeypatch.setattr(fused, "by_cells", lambda *given: begun.append(given[5]) or inner(*given))
    entry, batch = ZOO["llava"], inputs_of("llava", None).to(torch.float64).kwargs
    image = batch["input_ids"] == IMAGE
    model = entry.build(torch.float64)
    headpatch.apply(model, recipe_of("var", RECYCLE, **GIVEN))
    with torch.no_grad():
        wanted = model(**batch, use_cache=True)
        monkeypatch.setattr(fused, "spares_queries", lambda call: True)
        found = model(**batch, use_cache=True)
        step = model(batch["input_ids"][:, -1:], past_key_values=found.past_key_values).logits
        same = model(batch["input_ids"][:, -1:], past_key_values=wanted.past_key_values).logits
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(step, same, rtol=0, atol=1e-11)
    behind = ((image.cumsum(1) > 0) & ~image).int().argmax(1)
    assert set(begun) == {0, int(behind.min())} and behind.min() > 2


def test_identity_and_removal_are_bit_equal():
    model, batch = ZOO["llava"].build(), inputs_of("llava", "left").to(torch.float32).kwargs
    plain = logits(model, batch)
    with headpatch.applied(model, recipe_of("var", dict.fromkeys(RECYCLE, 0.0), **GIVEN)):
        assert torch.equal(logits(model, batch), plain)
    with headpatch.applied(model, recipe_of("var", RECYCLE, **GIVEN)):
        assert not torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


def test_shares_keep_their_sum():
    """Over random shares: the edited ones sum to what they did, none is negative, and the rest is not touched."""
    method = headpatch.Recipe.from_dict(recipe_of("var", {0: 0.5}, **GIVEN)).patches[0].method
    shares = torch.rand(4, 2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(0)
    shares[1, :, :, :10] = 0.0
    queries = torch.zeros(2, 50, dtype=torch.bool)
    queries[1, 20:] = True
    amount = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    new = method.reshare(shares, amount, {"image_queries": queries})
    torch.testing.assert_close(new.sum(0), shares.sum(0))
    assert (new >= 0).all() and torch.equal(new[3], shares[3])
    assert torch.equal(new[:, :, :, :10], shares[:, :, :, :10]) and torch.equal(
        new[:, 1, :, 20:], shares[:, 1, :, 20:]
    )
    assert not torch.equal(new, shares)


def test_what_is_refused():
    with pytest.raises(RecipeError, match="sink_dimensions"):
        headpatch.Recipe.from_dict(recipe_of("var", RECYCLE))
    with pytest.raises(RecipeError, match="at least one dimension"):
        headpatch.Recipe.from_dict(recipe_of("var", RECYCLE, sink_dimensions=[]))
    with pytest.raises(UnsupportedModelError, match="operand 'image_tokens' cannot be had with position_bias"):
        headpatch.apply(ZOO["t5"].build(), recipe_of("var", RECYCLE, **GIVEN))
    with pytest.raises(UnsupportedModelError, match="operand 'image_tokens' cannot be had with no_image_tokens"):
        headpatch.apply(ZOO["llama"].build(), recipe_of("var", RECYCLE, **GIVEN))
