"""Edits of attention to segments without an engine: rows against the full softmax in float64, and what is read off a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import _tokenizer
from torch import Tensor

from headpatch.adapters.vllm.cpu_keys import CpuKeys
from headpatch.adapters.vllm.one_step import hold, longest_prompt, too_many_images
from headpatch.adapters.vllm.plan import compile_recipe
from headpatch.adapters.vllm.prompts import image_ranges, span_ranges, text_of
from headpatch.adapters.vllm.running import Running
from headpatch.adapters.vllm.segment_edits import edit_segments
from headpatch.adapters.vllm.supplies import check_supplied
from headpatch.adapters.vllm.tables import NOBODY, Tables
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError
from headpatch.heads import ModelShape, PartShape
from headpatch.recipe import Recipe

WITHOUT_VLLM = True
H, K, D, SIZE, BLOCKS, LAYER = 6, 2, 8, 4, 40, 1
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

    def __init__(self, patches: list[dict[str, Any]], dtype: torch.dtype = torch.float32, window: int = 0, softcap: float = 0.0,
                 sinks: bool = False, write: Callable[..., None] = transposed) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        recipe = Recipe.from_dict({"headpatch": 1, "patches": patches})
        self.tables = Tables(SHAPE, [[range(H)]] * 2, 2, BLOCKS, 8, torch.device("cpu"))
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
        self.keys = CpuKeys(self.patch, self.cache)
        self.done = [0, 0, 0]

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
        edit_segments(self.patch, self.keys, out, torch.cat(parts), self.cache, self.table, starts, lengths)
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


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks"])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "window and cap", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_full_softmax(name: str, form: dict[str, Any], chunks: Any) -> None:
    patch, wanted = CASES[name]
    world = World([patch], **form)
    compare(world, wanted, chunks, LIVE.get(name, STRENGTH))


@pytest.mark.parametrize("form", FORMS[:2], ids=["plain", "window and cap"])
def test_sinks_are_found_in_the_prompt_and_stay(form: dict[str, Any]) -> None:
    world = World([CALM], **form)
    compare(world, calibrated, CHUNKS[0])
    found = next(iter(world.requests[0].kept.values()))
    assert found.shape == (len(STRENGTH), PROMPTS[0]) and 0 < int(found.sum()) < found.numel()
    # After preemption all of it comes again, in chunks and with what was generated: sinks are those of the prompt still.
    world.done = [0, 0, 0]
    compare(world, calibrated, [(9, 2, 3), (16, 12, 9)])


def test_sinks_are_not_guessed_from_a_part_of_the_prompt() -> None:
    with pytest.raises(EngineError, match="came in chunks"):
        World([CALM]).step((20, 1, 9))


def test_a_prompt_waits_until_a_step_takes_all_of_it() -> None:
    calls: list[int] = []

    def allocate(request: Any, count: int, **_: Any) -> str:
        calls.append(count)
        return "blocks"

    def request(computed: int = 0, preempted: int = 0, **wire: Any) -> Any:
        params = SimpleNamespace(extra_args={"headpatch": {"key": "x", **wire}} if wire else None)
        return SimpleNamespace(
            sampling_params=params, num_prompt_tokens=30, num_computed_tokens=computed, num_preemptions=preempted
        )

    held = hold(allocate)
    assert held(request(whole=True), 29) is None
    others = [request(whole=True), request(30, whole=True), request(0, 1, whole=True), request(spans=[]), request()]
    assert [held(other, n) for other, n in zip(others, (30, 1, 12, 12, 12), strict=True)] == ["blocks"] * 5
    assert calls == [30, 1, 12, 12, 12]


def test_the_longest_prompt_of_an_engine() -> None:
    def config(drafts: int = 0, **scheduler: Any) -> Any:
        speculation = SimpleNamespace(max_num_new_slots_for_drafting=drafts)
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, **scheduler), speculative_config=speculation
        )

    assert longest_prompt(config()) == 64
    assert longest_prompt(config(4, long_prefill_token_threshold=0, max_num_scheduled_tokens=None)) == 60
    assert longest_prompt(config(long_prefill_token_threshold=16)) == 16
    feature = SimpleNamespace(mm_position=SimpleNamespace(length=40))
    assert too_many_images(config(encoder_cache_size=64), [feature] * 2)
    assert not too_many_images(config(encoder_cache_size=64), [feature])


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


def test_learned_sinks_keep_their_logit() -> None:
    patch, wanted = CASES["pai"]
    compare(World([patch], sinks=True), wanted, CHUNKS[0], LIVE["pai"])


def test_several_edits_of_a_layer_act_one_after_the_other() -> None:
    first = {"method": "zerotuning", "heads": {f"{LAYER}.{head}": 3.0 for head in STRENGTH}}
    bias = {"method": "image_bias", "heads": {f"{LAYER}.0-2": 0.7}}

    def both(world: World, r: int, n: int) -> Tensor:
        scores, _, _ = world.plain(r, n)
        for head in STRENGTH:
            scores[head, 1:, 0] += math.log(3.0)
        scores[:3] += 0.7 * columns(IMAGES, n)
        return world.softmax(faint_beside_spans(scores, r, n))

    compare(World([first, bias, CASES["pasta"][0]]), both, CHUNKS[1], {0, 1, 2, 5})


def test_a_layout_that_cannot_be_read_back_is_an_error() -> None:
    with pytest.raises(EngineError, match="operand 'k' cannot be had"):
        World([CASES["pasta"][0]], write=jumbled)


def test_constant_weights_stay_in_the_tables_of_other_layers() -> None:
    first = {"method": "zerotuning", "heads": {"*.1": 3.0}}
    recipe = Recipe.from_dict({"headpatch": 1, "patches": [first, CASES["pasta"][0]]})
    edits = compile_recipe(recipe, SHAPE)
    assert edits[0].weight is not None and not edits[0].segments
    assert edits[LAYER].weight is None and [e.method.name for e in edits[LAYER].segments] == ["zerotuning", "pasta"]


@pytest.mark.parametrize("name", CASES)
def test_on_gpus_they_are_refused_by_operand(name: str) -> None:
    recipe = Recipe.from_dict({"headpatch": 1, "patches": [CASES[name][0]]})
    check_supplied(recipe)
    with pytest.raises(
        UnsupportedModelError, match=r"operand '(spans|beside_spans|image_tokens)' cannot be had with gpu"
    ):
        check_supplied(recipe, frozenset({"gpu"}))
    with pytest.raises(UnsupportedModelError, match="cannot be had with kv_windows"):
        check_supplied(recipe, frozenset({"kv_windows"}))


IDS = [3, 4, 5, 6, 4, 5]
TEXT = "t3 t4 t5 t6 t4 t5"


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([[1, 3]], [(1, 3)]), (["t4 t5"], [(1, 3)]), ([{"chars": [9, 14]}], [(3, 5)]), ([{"text": "5 t6"}], [(2, 4)]), ([], []),
        (["t6", [0, 1]], [(0, 1), (3, 4)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "prompt", [TEXT, {"prompt_token_ids": IDS}, {"prompt": TEXT}, {"prompt": "what a template made"}]
)
def test_spans_of_a_prompt(prompt: Any, spans: Any, wanted: Any) -> None:
    """Where the text is not what the tokens say, the tokens count."""
    assert span_ranges(spans, IDS, text_of(prompt), _tokenizer()) == wanted


def test_spans_that_cannot_be_had() -> None:
    for spans, tokenizer, message in (
        (["t9"], _tokenizer(), "does not occur"), ([[2, 9]], None, "ends at token 9, and the prompt has 6"),
        (["t4"], None, "need the engine's tokenizer"), ("t4", None, "give a list"), ([5], None, "is no span"),
    ):  # fmt: skip
        with pytest.raises(HeadpatchError, match=message):
            span_ranges(spans, IDS, TEXT, tokenizer)
    with pytest.raises(HeadpatchError, match="cannot be traced back"):
        span_ranges(["t4"], [700, 3], None, _tokenizer())


def test_images_of_a_prompt() -> None:
    """Only the positions that take an image's embeddings, and only images."""

    def feature(modality: str, offset: int, length: int, mask: Any = None) -> Any:
        place = SimpleNamespace(offset=offset, length=length, is_embed=None if mask is None else torch.tensor(mask))
        return SimpleNamespace(modality=modality, mm_position=place)

    features = [
        feature("image", 10, 3),
        feature("audio", 20, 5),
        feature("image", 2, 5, [False, True, True, False, True]),
    ]
    assert image_ranges(features) == [(3, 5), (6, 7), (10, 13)]
    assert image_ranges(None) == []
