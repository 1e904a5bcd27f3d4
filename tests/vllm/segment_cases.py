"""Rows of a batch whose attention to segments is edited, with the full softmax in float64 beside them: tests of the vLLM adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.cpu_keys import CpuKeys
from headpatch.adapters.vllm.running import Running
from headpatch.adapters.vllm.segment_edits import edit_segments
from headpatch.adapters.vllm.tables import NOBODY, Tables
from headpatch.heads import ModelShape, PartShape
from headpatch.recipe import Recipe

H, K, D, SIZE, BLOCKS, LAYER = 6, 2, 16, 4, 40, 1
SHAPE = ModelShape("llama", {"text": PartShape((H, H), (K, K), (D, D))}, "text")
PROMPTS, SPANS, IMAGES = (21, 14, 9), ((2, 6), (10, 11)), ((3, 7), (9, 12))


def transposed(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes a cache as x86 kernels do: blocks of keys by channel, of values by token."""
    nb, heads, size, width = cache.shape
    keys, values = cache.view(nb, heads, 2 * size, width // 2).chunk(2, dim=2)
    for token, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, size)
        for head in range(heads):
            keys[block, head].view(width // 2, size)[:, place] = key[token, head]
            values[block, head, place] = value[token, head]


def jumbled(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes every key into the same place."""
    cache.fill_(float(key.flatten()[-1]))


class World:
    """Three rows in a paged cache: two under the recipe, one under none."""

    device, in_numbers = torch.device("cpu"), False

    def __init__(self, patches: list[dict[str, Any]], dtype: torch.dtype = torch.float32, window: int = 0, softcap: float = 0.0,
                 sinks: bool = False, write: Callable[..., None] = transposed) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        recipe = Recipe.from_dict({"headpatch": 1, "patches": patches})
        self.tables = Tables(SHAPE, [[range(H)]] * 2, 2, BLOCKS, 16, self.device, segments=self.in_numbers)
        slot = self.tables.put(recipe)
        self.requests = [Running(s, n, SPANS, IMAGES) for s, n in zip((slot, NOBODY, slot), PROMPTS, strict=True)]
        self.q, self.k, self.v = (
            [torch.randn(n + 6, h, D, generator=generator).mul(1.5).to(dtype) for n in PROMPTS] for h in (H, K, K)
        )
        self.cache = torch.zeros(BLOCKS, K, SIZE, 2 * D, dtype=dtype)
        self.cache[0] = math.nan  # the null block
        order = torch.randperm(BLOCKS - 1, generator=generator) + 1
        self.table = torch.zeros(3, 8, dtype=torch.int32)
        for r in range(3):
            self.table[r] = order[8 * r : 8 * r + 8]
        self.sinks = torch.randn(H, generator=generator) if sinks else None
        impl = SimpleNamespace(do_kv_cache_update=write, sinks=self.sinks)
        self.patch: Any = SimpleNamespace(
            worker=SimpleNamespace(tables=self.tables, batch=self.requests), impl=impl, layer=SimpleNamespace(), index=LAYER, start=0,
            num_heads=H, num_kv_heads=K, head_dim=D, scale=D**-0.5, softcap=softcap, window=window, backend="FAKE",
        )  # fmt: skip
        self.done = [0, 0, 0]
        self.prepare()

    def prepare(self) -> None:
        self.keys = CpuKeys(self.patch, self.cache)

    def edit(self, out: Tensor, query: Tensor, starts: Tensor, lengths: Tensor) -> None:
        edit_segments(self.patch, self.keys, out, query, self.cache, self.table, starts, lengths)

    def step(self, counts: tuple[int, ...]) -> tuple[Tensor, list[slice]]:
        """Outputs [T, H, d] of so many more tokens of each row; what nobody edits is 7."""
        write, parts, rows = self.patch.impl.do_kv_cache_update, [], []
        for r, count in enumerate(counts):
            begin, end = self.done[r], self.done[r] + count
            slots = [int(self.table[r, p // SIZE]) * SIZE + p % SIZE for p in range(begin, end)]
            write(None, self.k[r][begin:end], self.v[r][begin:end], self.cache, torch.tensor(slots))
            parts.append(self.q[r][begin:end])
            rows.append(slice(sum(counts[:r]), sum(counts[: r + 1])))
            if self.patch.window:  # blocks that have left the window go to somebody else
                gone = max(0, begin - self.patch.window + 1) // SIZE
                self.cache[self.table[r, :gone].long()] = math.nan
        self.done = [a + b for a, b in zip(self.done, counts, strict=True)]
        out = torch.full((sum(counts), H, D), 7.0, dtype=self.q[0].dtype)
        starts, lengths = torch.tensor([0, *torch.tensor(counts).cumsum(0)]), torch.tensor(self.done)
        self.edit(out, torch.cat(parts), starts, lengths)
        return out, rows

    def plain(self, r: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [H, n, n] (-inf: not seen), values [H, n, d] and learned sinks' share of nothing, in float64."""
        q, k, v = (x[r][:n].double() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        scores = torch.einsum("qhd,nhd->hqn", q, k) * D**-0.5
        if self.patch.softcap:
            scores = self.patch.softcap * torch.tanh(scores / self.patch.softcap)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        hidden = j > i
        if self.patch.window:
            hidden = hidden | (i - j >= self.patch.window)
        return (
            scores.masked_fill(hidden, -math.inf),
            v.transpose(0, 1),
            self.softmax(scores.masked_fill(hidden, -math.inf)),
        )

    def softmax(self, scores: Tensor) -> Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        column = self.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def columns(ranges: Any, n: int) -> Tensor:
    found = torch.zeros(n, dtype=torch.bool)
    for start, stop in ranges:
        found[start:stop] = True
    return found


Wanted = Callable[[World, int, int], Tensor]
STRENGTH = {0: 0.0, 2: 0.3, 5: 0.6}


def faint_beside_spans(scores: Tensor, r: int, n: int) -> Tensor:
    """Scores [H, n, n] with the prompt outside the spans made fainter, in place; rows that would see nothing stay."""
    beside = ~columns(SPANS, n) & (torch.arange(n) < PROMPTS[r])
    for head, alpha in STRENGTH.items():
        old = scores[head]
        new = old + torch.where(beside, math.log(alpha) if alpha else -math.inf, 0.0)
        scores[head] = torch.where(torch.isneginf(new).all(-1, keepdim=True), old, new)
    return scores


def pasta(world: World, r: int, n: int) -> Tensor:
    """[H, n, n] attention."""
    scores, _, _ = world.plain(r, n)
    return world.softmax(faint_beside_spans(scores, r, n))


def aimed(world: World, r: int, n: int) -> Tensor:
    _, _, p = world.plain(r, n)
    mark = columns(SPANS, n).double()
    for head, alpha in STRENGTH.items():
        psi = (p[head] * mark).sum(-1, keepdim=True)
        f = (0.5 / psi.clamp_min(1e-300)).clamp_max(1 / max(alpha, 1e-6)).clamp_min(1.0)
        edited = p[head] * (1 + (f - 1) * mark)
        p[head] = edited / edited.sum(-1, keepdim=True)
    return p


def images(world: World, r: int, n: int) -> Tensor:
    scores, _, _ = world.plain(r, n)
    image = columns(IMAGES, n)
    for head, bias in STRENGTH.items():
        scores[head] += bias * (image[None] & ~image[:, None])
    return world.softmax(scores)


def attended(world: World, r: int, n: int) -> Tensor:
    scores, _, _ = world.plain(r, n)
    edited = columns(IMAGES, n)[None] & (torch.arange(n) >= PROMPTS[r] - 1)[:, None]
    for head, alpha in STRENGTH.items():
        scores[head] = torch.where(
            edited & ~torch.isneginf(scores[head]), scores[head] + alpha * scores[head].abs(), scores[head]
        )
    return world.softmax(scores)


def calibrated(world: World, r: int, n: int) -> Tensor:
    length = PROMPTS[r]
    _, _, p = world.plain(r, max(n, length))
    for head, beta in STRENGTH.items():
        sees = (p[head, :length] > 0).sum(0)
        sinks = (p[head, :length].sum(0) / sees.clamp_min(1) > 0.15) & (sees >= 2)
        sinks[length:] = sinks[0] = False
        mass = (p[head] * sinks).sum(-1, keepdim=True)
        edited = torch.where(sinks, beta * p[head], p[head] * (1 + (1 - beta) * mass / (1 - mass)))
        p[head] = torch.where(mass < 1 - 1e-9, edited, p[head])
    return p[:, :n, :n]


def heads(**more: Any) -> dict[str, Any]:
    return {"heads": {f"{LAYER}.{head}": value for head, value in STRENGTH.items()}, **more}


CASES: dict[str, tuple[dict[str, Any], Wanted]] = {
    "pasta": (heads(method="pasta"), pasta),
    "target": (heads(method="pasta", target_mass=0.5), aimed),
    "image_bias": (heads(method="image_bias", queries="text"), images),
    "pai": (heads(method="pai"), attended),
}
LIVE = {"image_bias": {2, 5}, "pai": {2, 5}}
"""Heads where a strength of zero does nothing are the kernel's."""
CALM = heads(method="act", threshold=0.15, min_queries=2)
FORMS: list[dict[str, Any]] = [{}, {"window": 6, "softcap": 4.0}, {"dtype": torch.bfloat16}]
CHUNKS = [[PROMPTS, (1, 1, 1), (3, 1, 2)], [(9, 14, 3), (9, 1, 6), (4, 1, 1), (1, 1, 1)]]


def compare(world: World, wanted: Wanted, chunks: Any, chosen: Any = STRENGTH) -> None:
    bound = 2e-5 if world.q[0].dtype == torch.float32 else 3e-2
    for counts in chunks:
        out, rows = world.step(counts)
        for r in (0, 2):
            n = world.done[r]
            p = wanted(world, r, n)
            _, v, plain = world.plain(r, n)
            o = torch.einsum("hqn,hnd->qhd", p, v)[n - counts[r] :]
            for head in range(H):
                if head in chosen:
                    torch.testing.assert_close(out[rows[r], head].double(), o[:, head], atol=bound, rtol=bound)
                else:
                    assert bool((out[rows[r], head] == 7).all())  # the kernel's own
        assert bool((out[rows[1]] == 7).all())
    assert float((p - plain).abs().max()) > 0.05  # the last step was edited indeed
