"""State that a method derives from the prompt: once per request, frozen at the prompt's end, kept with the cache.

Also what methods of several families on one layer are handed, and that requests do not see each other's state.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, one_thread, silent
from naive import Naive, define, field, of, patch, registered
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import HEAD_DIM, ZOO

import headpatch
from headpatch import EngineError
from headpatch.operands import Segment, first_token

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")
LENGTHS = (12, 7, 3)


class Remembering:
    """A method that derives something from the prompt and keeps what later calls get of it."""

    def __init__(self, needs: tuple[str, ...], derive: Any, family: str = "output", **members: Any) -> None:
        self.derived: list[dict[str, Tensor]] = []
        self.given: list[dict[str, Any]] = []

        def run(method: Any, operands: Any) -> dict[str, Tensor]:
            self.derived.append({k: v for k, v in operands.items() if isinstance(v, Tensor)})
            return derive(operands)

        def edit(method: Any, what: Tensor, strength: Tensor, operands: Any) -> Tensor:
            self.given.append(dict(operands))
            return what

        body = {"output": "edit", "mass": "reshare", "scores": "transform"}[family]
        self.method = define(
            family, "remembering", needs=needs, derive=run, state=("mark",), scope=property(lambda self: "prompt"),
            fields={"window": (int, field(3))}, **{body: edit}, **members,
        )  # fmt: skip


def _cache(kind: str, model: Any) -> Any:
    return (
        StaticCache(config=model.config, max_cache_len=24) if kind == "static" else DynamicCache(config=model.config)
    )


def _run(model: Any, cache: Any, extra: int = 3) -> list[Tensor]:
    batch = left_padded(LENGTHS)
    mask, found = batch["attention_mask"], [logits(model, batch, past_key_values=cache)]
    for i in range(extra):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        found.append(logits(model, {"input_ids": ids(3, 1, i), "attention_mask": mask}, past_key_values=cache))
    return found


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_state_is_derived_once_and_handed_back(kind):
    """One derivation per layer; every later step gets that very tensor."""
    it = Remembering(("column_means",), lambda ops: {"mark": ops["column_means"].sum(1)})
    model, naive = ZOO["llama"].build(torch.float64), Naive(ZOO["llama"])
    logits(naive.model, left_padded(LENGTHS))
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"*.1": 2.0})))
        _run(model, _cache(kind, model))
    assert len(it.derived) == 2 and len(it.given) == 8
    mask = left_padded(LENGTHS)["attention_mask"].bool()
    for layer in range(2):
        call = naive.calls(layer)[0]
        asked = call.seen & mask[:, None, :, None]
        means = (call.p * asked).sum(2) / asked.sum(2).clamp_min(1)
        marks = [given["mark"] for given in it.given[layer::2]]
        assert all(torch.equal(m, marks[0]) for m in marks) and len(marks) == 4
        torch.testing.assert_close(marks[0][:, :12], means.sum(1), rtol=0, atol=1e-9)
        assert marks[0].shape[0] == 3, "a leading row dimension"


@pytest.mark.parametrize(
    "needs",
    [
        ("q", "lse"),
        ("window_scores",),
        ("layer_input", "position", "prompt_len"),
        ("o_proj", "k", "v"),
        ("first_token",),
    ],
)
def test_state_may_be_derived_from_any_operand(needs):
    """What derive() is given is what reshare(), transform() and edit() are given."""
    it = Remembering(needs, lambda ops: {"mark": torch.ones(3)})
    model = ZOO["llama"].build(torch.float64)
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"*.1": 2.0})))
        logits(model, left_padded(LENGTHS), past_key_values=DynamicCache())
    for derived, given in zip(it.derived, it.given, strict=True):
        assert {*needs, "heads"} <= derived.keys()
        for name in needs:
            assert torch.equal(derived[name], given[name]), name


@pytest.mark.parametrize("family", ["mass", "scores"])
@pytest.mark.parametrize(
    "segment", [first_token, Segment("column_sinks", (("threshold", 0.2),)),
                Segment("residual_sinks", (("dims", (0, 1)), ("threshold", 1.5)))], ids=lambda s: s.kind,
)  # fmt: skip
def test_state_of_methods_that_name_segments(family, segment):
    """Segments with options are the adapter's business; derive() gets the operands in `needs`."""
    it = Remembering(("lse",), lambda ops: {"mark": ops["lse"].amax(-1)}, family, segments=lambda self: (segment,))
    model = ZOO["llama"].build(torch.float64)
    plain = logits(model, left_padded(LENGTHS))
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"*.1": 2.0})))
        found = _run(model, DynamicCache())[0]
    real = left_padded(LENGTHS)["attention_mask"].bool()
    torch.testing.assert_close(found[real], plain[real], rtol=0, atol=1e-8)
    assert len(it.derived) == 2 and {"lse", "heads"} <= it.derived[0].keys()
    marks = [given["mark"] for given in it.given if given["mark"].shape == (3, 4)]
    assert len(marks) == len(it.given) == 8


def test_state_is_a_request_s_own():
    """Two caches, taken in turns, and a copy of one: each has the state of its own prompt."""
    it = Remembering(("prompt_len",), lambda ops: {"mark": ops["prompt_len"] * 10})
    model = ZOO["llama"].build()
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"0.1": 2.0})))
        one, two = DynamicCache(), DynamicCache()
        logits(model, ids(1, 5), past_key_values=one)
        logits(model, ids(1, 9), past_key_values=two)
        three = copy.deepcopy(two)
        for cache in (one, two, one, three):
            logits(model, ids(1, 1), past_key_values=cache)
    assert [given["mark"].item() for given in it.given] == [50, 90, 50, 90, 50, 90]


def test_state_of_a_recipe_that_was_off_in_between():
    """The same recipe, applied again: the request goes on with the state it had."""
    it = Remembering(("prompt_len",), lambda ops: {"mark": ops["prompt_len"] * 10})
    model, cache = ZOO["llama"].build(), DynamicCache()
    with registered(it.method):
        for tokens in (ids(1, 5), ids(1, 1), ids(1, 1)):
            with headpatch.applied(model, of(patch(it.method, {"0.1": 2.0}))):
                logits(model, tokens, past_key_values=cache)
    assert [given["mark"].item() for given in it.given] == [50, 50, 50]


def test_two_patches_of_one_method_have_a_state_each():
    it = Remembering(("q",), lambda ops: {"mark": ops["heads"][None].float() + 0 * ops["q"][:, 0, :1, 0]})
    model = ZOO["llama"].build()
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"0.1": 2.0}), patch(it.method, {"0.2": 2.0})))
        cache = DynamicCache()
        for tokens in (ids(2, 5), ids(2, 1)):
            logits(model, tokens, past_key_values=cache)
    assert [given["mark"][0, 0].item() for given in it.given] == [1.0, 2.0, 1.0, 2.0]


def test_state_without_a_cache_is_that_of_the_call():
    it = Remembering(("prompt_len",), lambda ops: {"mark": ops["prompt_len"]})
    model = ZOO["llama"].build()
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"0.1": 2.0})))
        for n in (4, 9, 4):
            logits(model, ids(1, n), use_cache=False)
    assert [given["mark"].item() for given in it.given] == [4, 9, 4]


def test_state_of_a_prompt_in_chunks_is_refused():
    it = Remembering(("q",), lambda ops: {"mark": ops["q"][:, 0, 0, 0]})
    model = ZOO["llama"].build()
    with registered(it.method):
        headpatch.apply(model, of(patch(it.method, {"0.1": 2.0})))
        with pytest.raises(EngineError, match=r"layer text\.0: operand 'mark' needs the whole prompt in one call"):
            model.generate(**left_padded(LENGTHS), max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
        assert model.generate(**left_padded(LENGTHS), max_new_tokens=2, do_sample=False).shape == (3, 14)


def test_all_heads_of_a_later_output_edit_are_those_an_earlier_one_left():
    """Output edits stack in order."""
    seen = []

    def look(method: Any, output: Tensor, strength: Tensor, operands: Any) -> Tensor:
        seen.append((output.clone(), operands["all_heads"].clone()))
        return output

    looking = define("output", "looking", needs=("all_heads",), edit=look)
    doubling = define("output", "doubling", edit=lambda self, output, strength, operands: output * 2)
    model, naive = ZOO["llama"].build(torch.float64), Naive(ZOO["llama"])
    logits(naive.model, {"input_ids": ids()})
    out = naive.calls(0)[0].out()
    with registered(looking, doubling):
        for order, factor in (([doubling, looking], 2.0), ([looking, doubling], 1.0)):
            with headpatch.applied(model, of(*(patch(cls, {"0.1": 3.0}) for cls in order))):
                logits(model)
            (output, everything) = seen.pop()
            torch.testing.assert_close(output, out[:, :, 1:2] * factor, rtol=0, atol=1e-9)
            torch.testing.assert_close(everything[:, :, 1], out[:, :, 1] * factor, rtol=0, atol=1e-9)
            torch.testing.assert_close(everything[:, :, [0, 2, 3]], out[:, :, [0, 2, 3]], rtol=0, atol=1e-9)
    assert out.shape[-1] == HEAD_DIM
