"""Edits of attention to segments as GPUs get them: numbers in tables, and one kernel for all rows. Against the full softmax, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from kernel_cases import CUDA, outside_interpreter, run_in_interpreter, triton_runs
from segment_cases import (
    CALM,
    CASES,
    CHUNKS,
    FORMS,
    IMAGES,
    LAYER,
    LIVE,
    PROMPTS,
    SHAPE,
    SIZE,
    SPANS,
    STRENGTH,
    H,
    World,
    aimed,
    calibrated,
    columns,
    compare,
)  # fmt: skip
from torch import Tensor

from headpatch.adapters.vllm.flag import check_fits
from headpatch.adapters.vllm.frontend import Entry, FrontEnd
from headpatch.adapters.vllm.gpu_segments import GpuSegments
from headpatch.adapters.vllm.plan import LayerEdits, RowEdit, compile_recipe
from headpatch.adapters.vllm.row_ranges import MOST, RowRanges, ranges_needed
from headpatch.adapters.vllm.running import Running
from headpatch.adapters.vllm.segment_numbers import check_layers, marks_of, numbers
from headpatch.errors import UnsupportedModelError
from headpatch.kernels import paged_segments
from headpatch.kernels.paged_segments import SCALARS
from headpatch.methods.base import MassMethod, strength
from headpatch.operands import Segment
from headpatch.recipe import Recipe

WITHOUT_VLLM = True
GPU = frozenset({"gpu"})


def plainly(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes keys and values as GPU kernels do."""
    cache[slots // SIZE, :, slots % SIZE] = torch.cat([key, value], -1)


class GpuWorld(World):
    """The same rows, read by the kernel."""

    device, in_numbers = torch.device("cuda" if CUDA else "cpu"), True

    def __init__(self, patches: list[dict[str, Any]], **options: Any) -> None:
        if options.get("dtype") == torch.bfloat16 and not CUDA:  # the interpreter has none
            options["dtype"] = torch.float16
        super().__init__(patches, write=plainly, **options)

    def prepare(self) -> None:
        worker = self.patch.worker
        worker.armed = SimpleNamespace(recipes={"all": None}, later_segments=False)
        worker.scratch, worker.ranges = {}, RowRanges(16, 3, self.device)
        self.there = self.cache.to(self.device)
        self.patch.cache = lambda: self.there
        self.patch.layer_device = lambda: self.device
        self.patch.layer = SimpleNamespace(dtype=self.cache.dtype)
        self.segments = GpuSegments(self.patch)
        rows = [(request.slot, request.prompt) for request in self.requests]
        self.tables.order(rows)
        worker.ranges.order(self.requests)

    def edit(self, out: Tensor, query: Tensor, starts: Tensor, lengths: Tensor) -> None:
        self.there.copy_(self.cache)
        given = [x.to(self.device, torch.int32) for x in (self.table, starts, lengths)]
        there = out.to(self.device)
        counts = starts.diff()
        one = bool((counts == 1).all())
        self.segments(query.to(self.device), there, self.lse(counts).to(self.device), *given, one)
        out.copy_(there)

    def lse(self, counts: Tensor) -> Tensor:
        """[H, T], as the backend's kernel gives it."""
        parts = [
            self.plain(r, self.done[r])[0].logsumexp(-1)[:, self.done[r] - int(count) :]
            for r, count in enumerate(counts)
        ]
        return torch.cat(parts, 1).float()


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs share a row's keys: more take the interpreter minutes."""
    monkeypatch.setattr(paged_segments, "PARTS", 2)
    monkeypatch.setattr(GpuSegments, "_warm", lambda self, row_slot: None)


@outside_interpreter
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_interpreter("triton", __file__, Path(__file__).parents[1] / "test_kernels_paged_segments.py")


@triton_runs
@pytest.mark.parametrize(("name", "form", "chunks"), [
    (name, FORMS[i % 3], CHUNKS[i % 2]) for i, name in enumerate(CASES)
], ids=list(CASES))  # fmt: skip
def test_triton_rows_equal_the_full_softmax(name: str, form: dict[str, Any], chunks: Any) -> None:
    patch, wanted = CASES[name]
    compare(GpuWorld([patch], **form), wanted, chunks, LIVE.get(name, STRENGTH))


@triton_runs
@pytest.mark.parametrize("form", FORMS[:2], ids=["plain", "window and cap"])
def test_triton_sinks_are_found_in_the_prompt_and_stay(form: dict[str, Any]) -> None:
    world = GpuWorld([CALM], **form)
    compare(world, calibrated, CHUNKS[0])
    assert world.segments.marks is not None and 0 < int(world.segments.marks.sum()) < 3 * sum(PROMPTS)
    # After preemption the whole prompt comes again, with what was generated.
    world.done = [0, 0, 0]
    world.segments.marks.fill_(1)
    compare(world, calibrated, [(25, 16, 12)])


@triton_runs
def test_triton_several_edits_of_a_head_act_one_after_the_other() -> None:
    """Weights before a target and behind it."""
    first = {"method": "zerotuning", "heads": {f"{LAYER}.{head}": 3.0 for head in STRENGTH}}
    bias = {"method": "image_bias", "heads": {f"{LAYER}.0-2": 0.7}}

    def weighted(p: Tensor) -> Tensor:
        return p / p.sum(-1, keepdim=True)

    class Before(World):
        """Attention that the target sees."""

        def __init__(self, world: World) -> None:
            self.world = world

        def plain(self, r: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
            scores, v, _p = self.world.plain(r, n)
            for head in STRENGTH:
                scores[head, 1:, 0] += math.log(3.0)
            return scores, v, scores.softmax(-1)

    def both(world: World, r: int, n: int) -> Tensor:
        p = aimed(Before(world), r, n)
        factor = torch.where(columns(IMAGES, n), math.exp(0.7), 1.0)
        p[:3] = weighted(p[:3] * factor)
        return p

    compare(GpuWorld([first, CASES["target"][0], bias]), both, CHUNKS[1], {0, 1, 2, 5})


def plan(*patches: dict[str, Any]) -> Any:
    return compile_recipe(Recipe.from_dict({"headpatch": 1, "patches": list(patches)}), SHAPE)[LAYER].segments


def test_numbers_of_heads_without_an_edit_are_not_live() -> None:
    made = numbers(plan(CALM), H)
    assert made[:, SCALARS["live"]].nonzero()[:, 0].tolist() == sorted(STRENGTH)
    assert marks_of(made).nonzero()[:, 0].tolist() == sorted(STRENGTH)
    assert not marks_of(numbers(plan(CASES["target"][0]), H)).any()


def test_rows_that_see_emptied_keys_alone_keep_the_other_weights() -> None:
    first = {"method": "zerotuning", "heads": {f"{LAYER}.0": 0.5}}
    made = numbers(plan(first, CASES["pasta"][0]), H)[0]  # alpha is 0 there
    assert float(made[5] - made[4]) == -1.0  # the first token beside the spans, and any other
    assert float(made[4]) == paged_segments.NEVER


@dataclass(frozen=True)
class Odd(MassMethod):
    """Shares that no form has."""

    size: float = strength(0.0, help="how odd")
    name: ClassVar[str] = "odd_shares"

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("first_token"),)

    def reshare(self, shares: Tensor, strength: Tensor, operands: Any) -> Tensor:
        return shares.flip(0)


def test_a_method_without_a_form_is_refused() -> None:
    edits = {LAYER: LayerEdits(segments=[RowEdit(Odd(), torch.tensor([2]), torch.ones(1))])}
    with pytest.raises(
        UnsupportedModelError, match=f"x.yaml: layer {LAYER}: method 'odd_shares' is none of what the kernel takes"
    ):
        check_layers(edits, "x.yaml")


def heads(method: str, value: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "heads": {f"{LAYER}.2": value}, **more}


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "two forms": ([CALM, CASES["target"][0]], "head 0 shares that depend on its attention, and the kernel knows one"),
    "raised late": (
        [heads("image_bias", 1.0), heads("pai", 0.5)],
        "raises scores of head 2, which another patch edits before",
    ),
    "emptied twice": ([heads("pasta", 0.0), heads("zerotuning", 0.0)], "two patches take all attention .* head 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_number_says_is_refused_with_the_head(name: str) -> None:
    patches, message = REFUSED[name]
    recipe = Recipe.from_dict({"headpatch": 1, "patches": patches}, source="my.yaml")
    check_fits(recipe, SHAPE, frozenset())  # on CPUs any of them is exact
    with pytest.raises(UnsupportedModelError, match=f"my.yaml: layer {LAYER}: .*{message}"):
        check_fits(recipe, SHAPE, GPU)


@pytest.mark.parametrize("name", CASES)
def test_all_methods_of_segments_are_numbers(name: str) -> None:
    check_fits(Recipe.from_dict({"headpatch": 1, "patches": [CASES[name][0]]}), SHAPE, GPU)


def test_ranges_are_ascending_and_apart() -> None:
    ranges = RowRanges(4, 2, torch.device("cpu"))
    ranges.order([Running(0, 30, ((8, 9), (2, 5), (4, 6)), IMAGES), Running(1, 9, (), ((1, 2),))])
    assert ranges.bounds[:10].tolist() == [2, 6, 8, 9, 3, 7, 9, 12, 1, 2]
    assert ranges.rows[:2, :6].tolist() == [[0, 4, 3, 4, 4, 3], [8, 0, 0, 8, 2, 2]]
    assert ranges_needed(SPANS, ((1, 2), (2, 5))) == 3


def test_more_ranges_than_the_tables_hold_are_a_bad_request() -> None:
    front = object.__new__(FrontEnd)
    front.tokenizer = None
    entry = Entry(Recipe.from_dict({"headpatch": 1, "patches": [CASES["pasta"][0]]}), None)
    ids = list(range(3 * MOST))
    spans = [[2 * i, 2 * i + 1] for i in range(MOST + 1)]
    assert len(front.wire(entry, {"spans": spans[1:]}, ids, None, None)["spans"]) == MOST
    with pytest.raises(ValueError, match=f"may be {MOST} separate ranges of tokens, these are {MOST + 1}"):
        front.wire(entry, {"spans": spans}, ids, None, None)


def test_learned_sinks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="learned sink logits"):
        GpuWorld([CASES["pai"][0]], sinks=True)
