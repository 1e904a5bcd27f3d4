"""Edited attention over a paged cache: Triton's against the full softmax in float64, rows under recipes of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import CUDA, close, triton_runs
from torch import Tensor

from headpatch.kernels import paged_segments
from headpatch.kernels.paged_segments import CLASSES, FORM_NUMBERS, NEVER, RANGES, SCALARS, WIDTH, PagedSegments

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
H, K, SIZE, SLOTS = 6, 2, 16, 3
PARTS = 3
"""Programs that share a row's keys."""
Range = tuple[int, int]


class Batch:
    """Rows (slot, tokens of this call, tokens in all, prompt, spans, images) of a paged cache, and tables of edits."""

    def __init__(
        self, rows: list[tuple[int, int, int, int, list[Range], list[Range]]], dtype: torch.dtype = torch.float32,
        d: int = 32, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.made = torch.Generator().manual_seed(seed)
        self.rows, self.dtype, self.d, self.options = rows, dtype, d, options
        tokens, total = sum(row[1] for row in rows), [row[2] for row in rows]
        self.q = self.random(tokens, H, d) * 1.5
        self.k, self.v = ([self.random(n, K, d) for n in total] for _ in range(2))
        blocks = [-(-n // SIZE) for n in total]
        # Nothing beyond a row may be read.
        self.cache = torch.full((sum(blocks) + 1, K, SIZE, 2 * d), math.nan, dtype=dtype)
        order = (torch.randperm(sum(blocks), generator=self.made) + 1).int()
        self.table = torch.zeros(len(rows), max(blocks) + 1, dtype=torch.int32)
        for r, count in enumerate(blocks):
            self.table[r, :count], order = order[:count], order[count:]
            for at in range(total[r]):
                place = int(self.table[r, at // SIZE])
                self.cache[place, :, at % SIZE] = torch.cat([self.k[r][at], self.v[r][at]], -1)
        self.starts = torch.tensor([0, *torch.tensor([row[1] for row in rows]).cumsum(0)], dtype=torch.int32)
        self.lengths = torch.tensor(total, dtype=torch.int32)
        self.edits = torch.zeros(SLOTS, H, WIDTH)
        self.edits[..., SCALARS["amplify_from"]] = -1e9
        self.edits[..., SCALARS["strength"]] = 1.0
        self.edits[..., 80:96] = 1.0
        self.marks = torch.zeros(len(self.cache), H, SIZE, dtype=torch.uint8) if options.pop("marks", False) else None
        self.scale = d**-0.5

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.made).to(self.dtype)

    def number(self, slot: int, head: int, **given: float) -> Tensor:
        """An edit is there, with these scalars; its row of the table."""
        for name, value in {"live": 1.0, **given}.items():
            self.edits[slot, head, SCALARS[name]] = value
        return self.edits[slot, head]

    def weigh(self, slot: int, head: int, table: int = 0) -> None:
        """Random weights of all classes, for one of the tables."""
        self.number(slot, head)[table * CLASSES : (table + 1) * CLASSES] = (
            torch.randn(CLASSES, generator=self.made) * 2
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        ranges, bounds = torch.zeros(len(self.rows) + 2, RANGES, dtype=torch.int32), list[int]()
        for r, row in enumerate(self.rows):
            for place, found in ((0, row[4]), (3, row[5])):
                flat = [bound for pair in found for bound in pair]
                ranges[r, place : place + 3] = torch.tensor([len(bounds), len(flat), len(flat).bit_length()])
                bounds += flat
        return ranges, torch.tensor([*bounds, 0], dtype=torch.int32)

    def make(self) -> PagedSegments:
        ranges, bounds = self.tables()
        cache = self.cache.to(DEVICE)
        self.out = torch.full((len(self.q), H, self.d), 7.0, dtype=self.dtype, device=DEVICE)
        marks = None if self.marks is None else self.marks.to(DEVICE)
        return PagedSegments(
            cache[..., : self.d], cache[..., self.d :], self.edits.to(DEVICE),
            heads=torch.arange(H, dtype=torch.int32, device=DEVICE),
            row_slot=torch.tensor([row[0] for row in self.rows], dtype=torch.int32, device=DEVICE),
            row_prompt=torch.tensor([row[3] for row in self.rows], device=DEVICE), ranges=ranges.to(DEVICE), bounds=bounds.to(DEVICE),
            scratch=torch.full((paged_segments.scratch_numbers(self.d),), math.nan, device=DEVICE), scale=self.scale, marks=marks,
            mark_of=None if marks is None else torch.arange(H, dtype=torch.int32, device=DEVICE), **self.options,
        )  # fmt: skip

    def run(self, one: bool = False) -> Tensor:
        kernel = self.make()
        given = [x.to(DEVICE) for x in (self.table, self.starts, self.lengths)]
        if self.marks is not None:
            kernel.mark(self.q.to(DEVICE), self.lse().to(DEVICE), *given)
            self.marks = kernel.marks.cpu()
        kernel(self.q.to(DEVICE), self.out, *given, one)
        return self.out.cpu()

    def scores(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """[H, q, n] scores in float64, which keys are seen, and the queries' positions."""
        begin, stop = self.starts[r : r + 2].tolist()
        n = self.rows[r][2]
        k = self.k[r].double().repeat_interleave(H // K, 1)
        x = torch.einsum("qhd,nhd->hqn", self.q[begin:stop].double(), k) * self.scale
        if softcap := self.options.get("softcap"):
            x = softcap * torch.tanh(x / softcap)
        at, j = torch.arange(n - (stop - begin), n), torch.arange(n)
        seen = j <= at[:, None]
        if window := self.options.get("window"):
            seen = seen & (at[:, None] - j < window)
        return x, seen, at

    def lse(self) -> Tensor:
        parts = []
        for r in range(len(self.rows)):
            x, seen, _ = self.scores(r)
            parts.append(x.masked_fill(~seen, -math.inf).logsumexp(-1))
        return torch.cat(parts, 1).float()

    def sinks(self, r: int, h: int, e: Tensor) -> Tensor:
        """[n] keys whose mean attention is high, of a prompt that is row r whole."""
        n, prompt = self.rows[r][2], self.rows[r][3]
        x, seen, _ = self.scores(r)
        p = x.masked_fill(~seen, -math.inf).softmax(-1)[h, :prompt]
        queries = seen[:prompt].sum(0)
        limit = float(e[SCALARS["threshold"]]) / (prompt if e[SCALARS["per_length"]] else 1)
        found = (p.sum(0) / queries.clamp_min(1) > limit) & (queries >= e[SCALARS["min_queries"]])
        return found & (torch.arange(n) < prompt)

    def want(self) -> Tensor:
        out = torch.full((len(self.q), H, self.d), 7.0, dtype=torch.float64)
        for r, (slot, _, n, prompt, spans, images) in enumerate(self.rows):
            for h in range(H):
                e = self.edits[slot, h].double()
                if slot < 0 or not n or not e[SCALARS["live"]]:
                    continue
                p = self.attention(r, h, e, n, prompt, spans, images)
                v = self.v[r].double().repeat_interleave(H // K, 1)
                out[self.starts[r] : self.starts[r + 1], h] = p @ v[:, h]
        return out

    def attention(
        self, r: int, h: int, e: Tensor, n: int, prompt: int, spans: list[Range], images: list[Range]
    ) -> Tensor:
        x, seen, at = self.scores(r)
        x, j = x[h], torch.arange(n)
        in_span, in_image = (
            torch.tensor([any(a <= i < b for a, b in found) for i in range(n)]) for found in (spans, images)
        )
        beside = (j < prompt) & ~in_span & bool(spans)
        kind = (j == 0).int() + 2 * in_span + 4 * beside + 8 * in_image
        late = at >= prompt + e[SCALARS["amplify_from"]]
        x = torch.where(late[:, None], x + e[64:80][kind] * x.abs(), x).masked_fill(~seen, -math.inf)

        def weighted(p: Tensor, text: int, image: int) -> Tensor:
            w = torch.where(in_image[at][:, None], e[image : image + 16][kind], e[text : text + 16][kind]).exp2()
            w = torch.where(w <= 2.0**NEVER, 0.0, w)
            total = (p * w).sum(-1, keepdim=True)
            return torch.where(total > 0, p * w / total.clamp_min(1e-300), p)

        p = weighted(x.softmax(-1), 0, 16)
        member = e[80:96][kind].bool()
        if e[SCALARS["marked"]]:
            member = member & self.sinks(r, h, e)
        share, s = (p * member).sum(-1, keepdim=True), float(e[SCALARS["strength"]])
        if e[SCALARS["form"]] == FORM_NUMBERS["calibrate"]:
            whole = (p * ~member).sum(-1, keepdim=True) > 0
            new = torch.where(member, s * p, p * (1 - s * share) / (1 - share).clamp_min(1e-300))
            p = torch.where(whole, new, p)
        elif e[SCALARS["form"]] == FORM_NUMBERS["raise"]:
            factor = (e[SCALARS["least"]] / share.clamp_min(1e-300)).clamp(max=1 / max(s, 1e-6)).clamp_min(1)
            p = torch.where(member, factor * p, p)
            p = p / p.sum(-1, keepdim=True)
        return weighted(p, 32, 48)


WHOLE, CHUNK, DECODE = (
    (0, 40, 40, 37, [(3, 7), (20, 21)], []),
    (1, 9, 70, 64, [], [(5, 30)]),
    (2, 1, 55, 50, [(9, 33)], [(0, 4), (6, 9)]),
)
NOBODYS, EMPTY = (-1, 5, 12, 12, [(1, 3)], []), (0, 0, 0, 0, [], [])
OPTIONS = ["plain", "softcap", "window"]
MIXED = [WHOLE, NOBODYS, CHUNK, DECODE, EMPTY]
FEW = MIXED[1:]
"""Fewer tokens, where each takes a program more."""


@pytest.fixture(autouse=True)
def programs(request, monkeypatch):
    """How many programs share a row's keys: few, or the interpreter takes minutes."""
    monkeypatch.setattr(
        paged_segments,
        "PARTS",
        request.node.callspec.params.get("shared", 1) if hasattr(request.node, "callspec") else PARTS,
    )


def check(batch: Batch, one: bool = False) -> None:
    got, want = batch.run(one), batch.want()
    assert torch.isfinite(got).all()
    close(got, want, batch.dtype, factor=40)
    same = want == 7.0
    assert same.any() and (got[same] == 7.0).all()  # heads and rows without an edit keep their bits


@triton_runs
@pytest.mark.parametrize(
    ("options", "shared"), [({}, 1), ({"softcap": 5.0}, PARTS), ({"window": 12}, PARTS)], ids=OPTIONS
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_weights(dtype, options, shared):
    batch = Batch(MIXED if shared == 1 else FEW, dtype, forms=False, **options)
    for slot in range(3):
        for head in range(1, H):
            batch.weigh(slot, head)
            batch.weigh(slot, head, 1)
    batch.edits[:3, 2, 0:16] = NEVER  # nothing is left, so nothing changes
    batch.edits[:3, 3, 4:8] = NEVER
    check(batch)


@triton_runs
@pytest.mark.parametrize("late", [-1e9, -1.0, 2.0])
def test_triton_raised_scores(late):
    batch = Batch(MIXED)
    for slot in range(3):
        batch.number(slot, 1, amplify_from=late)[64 + 8 : 80] = 0.4
        batch.number(slot, 4, amplify_from=late)[64:80] = 0.9
        batch.weigh(slot, 4)
    check(batch)


@triton_runs
@pytest.mark.parametrize(("dtype", "shared"), [(DTYPES[0], PARTS), (DTYPES[-1], 1)], ids=["shared", "half"])
@pytest.mark.parametrize("form", sorted(FORM_NUMBERS))
def test_triton_forms(form, dtype, shared):
    """Of each kind of keys, with weights before and behind, and where a row sees nothing but the segment."""
    batch = Batch(MIXED if shared == 1 else FEW, dtype)
    for slot in range(3):
        for head, strength in ((1, 0.0), (2, 0.4), (3, 1.0), (4, 0.02), (5, 0.7)):
            e = batch.number(slot, head, form=FORM_NUMBERS[form], strength=strength, least=0.6)
            e[80:96] = (torch.arange(16) & (2, 4, 8, 1, 2)[head - 1] > 0).float()
            if head > 3:
                batch.weigh(slot, head)
            if head == 5:
                batch.weigh(slot, head, 2)
                batch.weigh(slot, head, 3)
    check(batch)


@triton_runs
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 12}], ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_marks(dtype, options):
    """Prompts that come whole are marked by the heads' own attention; tokens that were generated behind them are no sinks."""
    batch = Batch([WHOLE, NOBODYS, (1, 50, 50, 50, [], []), (1, 1, 1, 1, [], [])], dtype, marks=True, **options)
    for slot in range(2):
        for head, per_length in ((1, 0.0), (2, 1.0), (3, 0.0)):
            limit = (3.0 if per_length else 0.12) if options.get("window") else 1.6 if per_length else 0.05
            e = batch.number(
                slot, head, form=1.0, strength=0.3, marked=1.0, threshold=limit, per_length=per_length, min_queries=3
            )
            e[80:96] = (torch.arange(16) & 1 == 0).float()
        batch.number(slot, 4, form=1.0, strength=0.5, marked=1.0, threshold=0.2, min_queries=1, lone=1.0)
    found = [int(batch.sinks(r, h, batch.edits[0, h]).sum()) for r in (0, 2) for h in (1, 2, 3)]
    assert all(0 < n < 40 for n in found)
    check(batch)


@triton_runs
@pytest.mark.parametrize("shared", [1, PARTS], ids=["alone", "shared"])
def test_triton_decode(shared):
    """One token a row, rows that a graph pads, and marks that an earlier call made."""
    prompt = Batch([WHOLE, (1, 50, 50, 50, [], [])], marks=True)
    for slot in range(2):
        prompt.number(slot, 1, form=1.0, strength=0.3, marked=1.0, threshold=0.06, min_queries=1)[80:96] = 1.0
        prompt.weigh(slot, 2)
        prompt.weigh(slot, 2, 1)
    check(prompt)
    later = Batch([(0, 1, 40, 37, WHOLE[4], []), (1, 1, 50, 50, [], []), (*NOBODYS[:1], 1, 12, 12, [], [])])
    later.k[:2], later.v[:2], later.edits, later.marks = prompt.k, prompt.v, prompt.edits, prompt.marks
    later.q[:2] = prompt.q[[39, 89]]
    cache = torch.full((len(prompt.cache) + 1, *prompt.cache.shape[1:]), 0.5)
    cache[:-1] = prompt.cache
    marks = torch.ones(len(cache), H, SIZE, dtype=torch.uint8)
    marks[:-1] = prompt.marks
    later.table = torch.cat([prompt.table, torch.full_like(prompt.table[:1], len(cache) - 1)])
    later.table = torch.cat([later.table, later.table.new_zeros(2, later.table.shape[1])])
    later.cache, later.marks = cache, None
    later.rows += [(-1, 0, 0, 0, [], [])] * 2
    later.starts = torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32)
    later.lengths = torch.tensor([40, 50, 12, 0, 0], dtype=torch.int32)
    later.q = torch.cat([later.q, later.q.new_zeros(2, H, later.d)])
    later.marks = marks
    kernel = later.make()
    kernel(later.q.to(DEVICE), later.out, *(x.to(DEVICE) for x in (later.table, later.starts, later.lengths)), True)
    got, want = later.out.cpu(), prompt.want()[[39, 89]]
    close(got[:2], want, torch.float32, factor=40)
    assert (got[2:] == 7.0).all()


def test_widths_that_no_kernel_takes():
    with pytest.raises(ValueError, match="wide"):
        Batch([WHOLE], d=24).make()


def test_programs_share_keys_where_there_are_few():
    kernel = Batch([WHOLE]).make()
    assert kernel.parts(1) == paged_segments.PARTS
    assert kernel.parts(paged_segments.ENTRIES) == 1
    assert kernel.parts(20) > 1
    assert kernel.parts(20) * 20 * H <= paged_segments.ENTRIES
