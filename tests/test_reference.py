"""The reference itself is checked: it equals untouched models, it does what the specification says, and it can tell wrong from right.

Everything here runs without an adapter. Without these tests an exactness test could pass because both sides do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import CACHES, CASES, FP32, close, decode_sizes, edits_for, forward, make_cache, recipes, run_cached, usable
from reference import edit_first, edit_rows, edits_of, reference
from torch import Tensor
from zoo import FULL, ZOO, Entry, Part

ENTRIES = [pytest.param(entry, id=name) for name, entry in ZOO.items()]
FULL_ENTRIES = [pytest.param(ZOO[name], id=name) for name in FULL]
LENGTHS = [14, 9, 5]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_untouched_models_agree(entry: Entry, side: str | None) -> None:
    """Without edits the reference is transformers' own model, under every attention implementation and padding."""
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    for attn in entry.attn:
        for dtype, limit in ((torch.float64, 1e-11), (torch.float32, FP32)):
            if usable(entry, dtype, attn, side):
                limit = 1e-5 if dtype == torch.float64 and attn == "eager" and not entry.exact64 else limit
                close(forward(entry.build(dtype, attn), inputs), reference(entry)(inputs, base=attn), inputs, limit)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("entry", [p for p in ENTRIES if p.values[0].caches])
def test_untouched_models_agree_when_cached(entry: Entry, side: str | None, kind: str) -> None:
    """Steps through a cache are one forward over everything: the exactness tests rest on that being true of transformers."""
    if (entry.name, kind) == ("qwen3_next", "dynamic") or (entry.name == "qwen3_next" and side == "right"):
        pytest.skip("linear attention needs a cache that knows the config, and cannot skip padding in the middle")
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side, continuation=6)
    model = entry.build(torch.float32, entry.attn[0])
    cache = make_cache(model, kind, inputs.real.shape[1] + 3)
    steps = run_cached(model, entry, inputs, decode_sizes(inputs), cache)
    limit = 5 * FP32 if entry.name == "qwen3_next" else FP32
    close(steps, reference(entry)(inputs, base=entry.attn[0]), inputs, limit)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("entry", FULL_ENTRIES)
def test_tolerance_has_power(entry: Entry, case: str) -> None:
    """Every case moves logits by 100 tolerances or more, and so does the same edit at the wrong first token.

    The naive edit in float32 is well inside the tolerance, so it is not too tight either.
    """
    side = "left" if entry.caches else None
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side)
    edits = edits_for(entry, recipes(entry, case))
    ref, base = reference(entry), entry.attn[0]
    right = ref(inputs, edits, base=base)
    distance = (right - ref(inputs, base=base))[inputs.real].abs().max()
    assert distance > 100 * FP32
    single = reference(entry, torch.float32, torch.float32)(inputs, edits, base=base)
    close(single, right, inputs, FP32 / 2)
    if case != "scaling":
        shifted = replace(inputs, first={part: first + 1 for part, first in inputs.first.items()})
        assert (ref(shifted, edits, base=base) - right)[inputs.real].abs().max() > 100 * FP32
        if side:  # column 0, whatever the padding: the classic mistake
            padded = replace(inputs, first={part: torch.zeros_like(first) for part, first in inputs.first.items()})
            assert (ref(padded, edits, base=base) - right)[1:][inputs.real[1:]].abs().max() > 100 * FP32


@pytest.mark.parametrize("entry", FULL_ENTRIES)
def test_first_token_has_mass(entry: Entry) -> None:
    """In every part of every model some head gives the first token more than a fifth of its attention, somewhere beyond row 0."""
    masses = reference(entry).masses(entry.make_inputs())
    for part in entry.parts:
        assert max(float(m[:, :, 1:].max()) for (p, _), m in masses.items() if p == part) > 0.2
    if entry.plant is not None:  # a real sink: the first token takes nearly everything in places
        assert max(float(m[:, :, 1:].max()) for m in masses.values()) > 0.999


@pytest.mark.parametrize("entry", FULL_ENTRIES)
def test_one_head_at_a_time(entry: Entry) -> None:
    """Each head of each layer and part matters on its own: an edit of the wrong head, or of a whole KV group, cannot hide."""
    inputs, ref, base = entry.make_inputs(), reference(entry), entry.attn[0]
    untouched = ref(inputs, base=base)
    for part, stack in entry.parts.items():
        for layer in stack.modules:
            for head in range(stack.num_heads):
                for kind, strength in (("zerotuning", 5.0), ("zerotuning", 0.1), ("head_scaling", 0.5)):
                    changed = ref(inputs, {part: {layer: [(kind, {head: strength})]}}, base=base)
                    assert (changed - untouched).abs().max() > 10 * FP32, (part, layer, head, kind, strength)


def _unnormalised(row: Tensor, column: Tensor, gamma: Tensor) -> Tensor:
    return torch.where(column, row * gamma[:, None, None], row)


def _by_kv_head(row: Tensor, column: Tensor, gamma: Tensor) -> Tensor:
    return edit_first(row, column, gamma[torch.arange(len(gamma)) % 2])


def _last_query_only(row: Tensor, column: Tensor, gamma: Tensor) -> Tensor:
    last = torch.arange(row.shape[2]) == row.shape[2] - 1
    return torch.where(last[:, None], edit_first(row, column, gamma), row)


def _without_sink(row: Tensor, column: Tensor, gamma: Tensor) -> Tensor:
    keys = edit_first(row[..., :-1] / row[..., :-1].sum(-1, keepdim=True), column[..., :-1], gamma)
    return torch.cat([keys * row[..., :-1].sum(-1, keepdim=True), row[..., -1:]], dim=-1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("llama", _unnormalised), ("llama", _by_kv_head), ("llama", _last_query_only), ("gpt_oss", _without_sink)],
)
def test_wrong_maths_is_noticed(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults in the arithmetic that adapters can have: each is 100 tolerances away from right."""
    entry = ZOO[name]
    inputs, edits = entry.make_inputs(), edits_for(entry, recipes(entry, "per_head"))
    right = reference(entry)(inputs, edits)
    monkeypatch.setattr("reference.edit_first", wrong)
    assert (reference(entry)(inputs, edits) - right).abs().max() > 100 * FP32


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_wrong_first_tokens_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sliding layers the window's start is not the first token; and rows that cannot see it must not be edited."""
    entry = ZOO[name]
    inputs, edits = entry.make_inputs(), edits_for(entry, recipes(entry, "per_head"))
    right = reference(entry)(inputs, edits)

    def window_start(first: Tensor, b: int, q_len: int, n: int, visible: Tensor) -> Tensor:
        return torch.arange(n) == visible.int().argmax(-1, keepdim=True)

    monkeypatch.setattr("reference._first_column", window_start)
    assert (reference(entry)(inputs, edits) - right).abs().max() > 100 * FP32


def test_zerotuning_is_a_logit_bias() -> None:
    """Multiplying a probability by gamma and renormalising is adding ln(gamma) to its score: an exact identity."""
    g = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 4, 5, 7, generator=g, dtype=torch.float64)
    column = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    column[0, ..., 2] = column[1, ..., 0] = True
    gamma = torch.tensor([0.01, 1.0, 3.0, 100.0], dtype=torch.float64)
    biased = torch.softmax(scores + column * gamma.log()[:, None, None], dim=-1)
    torch.testing.assert_close(edit_first(scores.softmax(-1), column, gamma), biased, rtol=0, atol=1e-15)


def test_zerotuning_as_a_mass_edit() -> None:
    """The general form, shares of segments to new shares of the same sum, gives the same rows."""
    g = torch.Generator().manual_seed(1)
    row = torch.randn(2, 4, 5, 7, generator=g, dtype=torch.float64).softmax(-1)
    column = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    column[..., 1] = True
    gamma = torch.tensor([0.0, 0.3, 3.0, 100.0], dtype=torch.float64)

    def reshare(shares: torch.Tensor) -> torch.Tensor:
        first = gamma[:, None] * shares[0] / (1 + (gamma[:, None] - 1) * shares[0])
        return torch.stack([first, 1 - first])

    torch.testing.assert_close(edit_rows(row, [column], reshare), edit_first(row, column, gamma), rtol=0, atol=1e-15)
    torch.testing.assert_close(edit_rows(row, [column], lambda shares: shares), row, rtol=0, atol=1e-15)


def test_rows_that_stay() -> None:
    """gamma 0 leaves a row that sees only the first token alone, and empties the column everywhere else."""
    row = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]], dtype=torch.float64)
    column = torch.tensor([True, False]).expand(1, 1, 2, 2)
    edited = edit_first(row, column, torch.zeros(1, dtype=torch.float64))
    assert edited.tolist() == [[[[1.0, 0.0], [0.0, 1.0]]]]
    blind = edit_first(row, torch.zeros_like(column), torch.full((1,), 9.0, dtype=torch.float64))
    assert torch.equal(blind, row)


def test_selectors_as_edits() -> None:
    """The recipe reader of the reference: ranges with both ends in, stars, later selectors over earlier ones, order kept."""
    parts = {"text": Part.of("x.{}", 4, 4, 2, only=(1, 3))}
    patches = [
        {"method": "zerotuning", "heads": {"*.*": 2.0, "1.1-2": 3.0, "1.2": 0.5}},
        {"method": "head_scaling", "heads": ["3.0", "1.3"], "scale": 0.0},
    ]
    edits = edits_of([{"headpatch": 1, "patches": patches[:1]}], parts, "text")
    assert edits == {
        "text": {
            1: [("zerotuning", {0: 2.0, 1: 3.0, 2: 0.5, 3: 2.0})],
            3: [("zerotuning", {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0})],
        }
    }
    edits = edits_of([{"headpatch": 1, "patches": patches[1:]}], parts, "text")
    assert edits["text"][3] == [("head_scaling", {0: 0.0})]
    assert edits["text"][1] == [("head_scaling", {3: 0.0})]
