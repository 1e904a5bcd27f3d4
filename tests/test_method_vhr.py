"""Vision-aware head reinforcement against its formula, written out: prompts and prompts without their image as one naive batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compat import ids, logits, one_thread, quiet_transformers
from method_cases import inputs_of, recipe_of
from naive import Call, Naive, of
from test_method_image_families import FAMILIES, batch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import IMAGE, ZOO, Entry

import headpatch
from headpatch import EngineError, UnsupportedModelError

__all__ = ["one_thread"]
pytestmark = pytest.mark.filterwarnings("error")

ALPHAS = {0: 2.0, 1: 2.0, 2: 3.0, 3: 2.0}
NEW = 6
Options = dict[str, bool]


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """transformers has nothing to warn about, but for the defaults of its own SmolVLM."""
    with quiet_transformers("Model config: pad_token_id"):
        yield


def odd_ones(values: list[float]) -> list[bool]:
    edge = statistics.fmean(values) + statistics.stdev(values)
    return [v > edge for v in values]


def chosen(with_image: Tensor, without: Tensor, outliers: bool) -> list[bool]:
    """Heads of one layer, from outputs [H, d] at the last token of a prompt and of the same without its image."""
    change = [float((a - b).norm()) for a, b in zip(with_image, without, strict=True)]
    loud = [float(b.pow(2).sum()) for b in without]
    if outliers:
        far, high = odd_ones(change), odd_ones(loud)
        change = [0.0 if f and h else c for c, f, h in zip(change, far, high, strict=True)]
    return [c > statistics.median(change) for c in change]


class Reference:
    """The naive model: prompts and companions as one batch, then the prompts alone."""

    def __init__(
        self, entry: Entry, alphas: dict[int, float], outliers: bool = True, reinforce_reference: bool = True
    ):
        self.naive, self.alphas = Naive(entry), alphas
        self.outliers, self.reinforce_reference = outliers, reinforce_reference
        self.heads: dict[int, Tensor] = {}
        self.cache: Any = DynamicCache()

    def _factors(self, mine: Tensor) -> Tensor:
        """[b, 1, H, 1] from [b, H] bool."""
        alphas = torch.tensor([self.alphas.get(h, 1.0) for h in range(mine.shape[1])], dtype=torch.float64)
        return torch.where(mine, alphas, 1.0)[:, None, :, None]

    def prompt(self, given: dict[str, Any], beside: dict[str, Any], others: list[int | None]) -> Tensor:
        """Logits of the prompts; `beside` has the companions' rows under them, `others` says whose they are."""
        rows = len(given["input_ids"])
        ends = [int(m.nonzero()[-1]) for m in beside["attention_mask"]]

        def edit(layer: int) -> Callable[[Call], Tensor]:
            def run(call: Call) -> Tensor:
                out = call.out()
                mine = torch.zeros(len(out), out.shape[2], dtype=torch.bool)
                for row, other in enumerate(others):
                    if other is not None:
                        found = chosen(out[row, ends[row]], out[other, ends[other]], self.outliers)
                        mine[row] = torch.tensor(found)
                        if self.reinforce_reference:
                            mine[other] = mine[row]
                self.heads[layer] = mine[:rows]
                return out * self._factors(mine)

            return run

        with self.naive.edited({layer: edit(layer) for layer in self.naive.taps}) as model:
            found = logits(model, beside, past_key_values=self.cache)
        self.cache.batch_select_indices(torch.arange(rows))
        return found[:rows]

    def step(self, given: dict[str, Any]) -> Tensor:
        edits = {layer: lambda call, mine=mine: call.out() * self._factors(mine) for layer, mine in self.heads.items()}
        with self.naive.edited(edits) as model:
            return logits(model, given, past_key_values=self.cache)


def beside(given: dict[str, Any], image: int = IMAGE) -> tuple[dict[str, Any], list[int | None]]:
    """The rows, and under them those with an image once more, without it: token by token."""
    tokens, mask = given["input_ids"], given["attention_mask"]
    rows, width = tokens.shape
    others: list[int | None] = [None] * rows
    made, real, at = [], [], []
    for row in range(rows):
        kept = [int(t) for t, m in zip(tokens[row], mask[row], strict=True) if m and t != image]
        if len(kept) < int(mask[row].sum()):
            others[row] = rows + len(made)
            gap = width - len(kept)
            made.append([0] * gap + kept)
            real.append([0] * gap + [1] * len(kept))
            at.append([0] * gap + list(range(len(kept))))
    found = dict(given)
    found["input_ids"] = torch.cat([tokens, torch.tensor(made)])
    found["attention_mask"] = torch.cat([mask, torch.tensor(real)])
    if "mm_token_type_ids" in given:
        found["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros(len(made), width).long()])
    if "position_ids" in given:
        more = torch.tensor(at).expand(*given["position_ids"].shape[:-2], -1, -1)
        found["position_ids"] = torch.cat([given["position_ids"], more], -2)
    return found, others


def prompts(entry: str, padding: str | None) -> dict[str, Any]:
    """Three rows of LLaVA with an image each."""
    inputs = inputs_of(entry, padding, continuation=0)
    return {**inputs.kwargs, "attention_mask": inputs.real.long()}


def generated(model: Any, given: dict[str, Any], new: int = NEW, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens [b, new] and logits [b, new, vocabulary] of greedy decoding, as the model gives them (generate() rounds to float32)."""
    seen: list[Tensor] = []
    rows, width = given["input_ids"].shape
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output.logits[:rows, -1]))
    tokens = model.generate(**given, max_new_tokens=new, do_sample=False, **options)
    hook.remove()
    return tokens[:, width:], torch.stack(seen, 1)


def positions_of(model: Any, given: dict[str, Any]) -> Tensor:
    """Positions of a prompt, in as many axes as the model has."""
    mask = given["attention_mask"]
    plain = (mask.cumsum(-1) - 1).clamp_min(0)
    if "image_grid_thw" not in given:
        return plain
    axes, _ = model.model.get_rope_index(
        given["input_ids"], mm_token_type_ids=given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"],
        attention_mask=mask,
    )  # fmt: skip
    return torch.cat([plain[None], axes])


def check(
    entry: Entry, given: dict[str, Any], alphas: dict[int, float], new: int = NEW, cache: Any = None, **options: bool
) -> None:
    """generate() under the recipe gives the reference's logits and tokens, which differ from the untouched model's."""
    model = entry.build(torch.float64)
    plain, _ = generated(model, given, new)
    headpatch.apply(model, recipe_of("vhr", alphas, **options))
    more = {} if cache is None else {"past_key_values": cache(model)}
    tokens, found = generated(model, given, new, **more)

    reference = Reference(entry, alphas, **options)
    places = positions_of(reference.naive.model, given)
    both, others = beside({**given, "position_ids": places})
    expected = [reference.prompt(given, both, others)[:, -1]]
    mask, at = given["attention_mask"], places[..., -1:]
    for i in range(new - 1):
        mask, at = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1), at + 1
        call = {"input_ids": tokens[:, i : i + 1], "attention_mask": mask, "position_ids": at}
        expected.append(reference.step(call)[:, -1])
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=0, atol=1e-8)
    assert torch.equal(tokens, torch.stack(expected, 1).argmax(-1))
    changed = torch.stack(list(reference.heads.values()))
    assert changed.any(-1).any(0)[[r for r, o in enumerate(others) if o is not None]].all(), "nothing was chosen"
    assert not changed.all(-1).any(), "at most half of the heads"
    assert new < 20 or not torch.equal(tokens, plain), "the edit does nothing"


@pytest.mark.parametrize("padding", [None, "left"])
def test_generate(padding):
    check(ZOO["llava"], prompts("llava", padding), ALPHAS)


@pytest.mark.parametrize("options", [{"outliers": False}, {"reinforce_reference": False}], ids=lambda o: next(iter(o)))
def test_options(options):
    check(ZOO["llava"], prompts("llava", "left"), ALPHAS, **options)


def test_some_candidates():
    """The median is that of all heads, candidates or not."""
    check(ZOO["llava"], prompts("llava", None), {1: 2.0, 3: 2.0})


def test_many_tokens():
    check(ZOO["llava"], prompts("llava", "left"), dict.fromkeys(range(4), 4.0), new=64)


@pytest.mark.parametrize("kind", ["static", "own"])
def test_caches(kind):
    def make(model: Any) -> Any:
        config = model.config.get_text_config()
        return StaticCache(config=config, max_cache_len=40) if kind == "static" else DynamicCache()

    check(ZOO["llava"], prompts("llava", "left"), ALPHAS, cache=make)


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, padded):
    """One image and two, on each family's own kind of positions."""
    given, _ = batch(family, padded)
    check(FAMILIES[family], given, ALPHAS)


def test_a_row_without_an_image_is_left_alone():
    model = ZOO["llava"].build(torch.float64)
    given = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    plain = generated(model, given)
    headpatch.apply(model, recipe_of("vhr", ALPHAS))
    for old, new in zip(plain, generated(model, given), strict=True):
        assert torch.equal(old, new)


def test_each_row_for_itself():
    """A batch gives what its rows give one by one."""
    model, given = ZOO["llava"].build(torch.float64), prompts("llava", None)
    headpatch.apply(model, recipe_of("vhr", ALPHAS))
    _, together = generated(model, given)
    images = len(given["pixel_values"]) // 3
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in given.items() if key != "pixel_values"}
        alone["pixel_values"] = given["pixel_values"][row * images : (row + 1) * images]
        torch.testing.assert_close(generated(model, alone)[1][0], together[row], rtol=0, atol=1e-8)


def test_beams_share_their_prompt_s_choice():
    model, given = ZOO["llava"].build(torch.float64), prompts("llava", "left")
    headpatch.apply(model, recipe_of("vhr", ALPHAS))
    made = model.generate(
        **given, max_new_tokens=NEW, num_beams=3, num_return_sequences=3, do_sample=False, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    cache = made.past_key_values
    kept = [value for key, value in cache.headpatch_state.items() if key[-1] == "selected"]
    assert len(kept) == 2 and all(len(value) == 9 for value in kept)
    assert all(torch.equal(value[i], value[i - i % 3]) for value in kept for i in range(9))
    # The best beam's probability is what the same tokens get when they are read one by one.
    best = made.sequences[::3]
    width = given["input_ids"].shape[1]
    for row in range(3):
        alone = {k: v[row : row + 1] for k, v in given.items()}
        found = model.generate(
            **alone, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
            prefix_allowed_tokens_fn=lambda _, seen, row=row: [int(best[row, len(seen)])],
        )  # fmt: skip
        assert torch.equal(found.sequences[0, width:], best[row, width:])
        steps = zip(found.logits, best[row, width:], strict=True)
        total = sum(float(step[0].log_softmax(-1)[token]) for step, token in steps)
        assert total / NEW == pytest.approx(float(made.sequences_scores[3 * row]), abs=1e-6)


def test_stacked():
    """ZeroTuning before it and a scale behind it: what is measured is what the first patches left."""
    entry, given = ZOO["llava"], prompts("llava", "left")
    model = entry.build(torch.float64)
    first = {"method": "zerotuning", "heads": {"*.*": 3.0}}
    scale = {"method": "head_scaling", "heads": {"*.1": 0.5}}
    headpatch.apply(model, of(first, scale, {"method": "vhr", "heads": {"*.*": 2.0}}))
    _, found = generated(model, given, 2)

    both, others = beside({**given, "position_ids": positions_of(model, given)})
    naive, heads, cache = Naive(entry), {}, DynamicCache()
    starts = both["attention_mask"].argmax(-1)

    def edit(layer: int) -> Callable[[Call], Tensor]:
        def run(call: Call) -> Tensor:
            p, n = call.p, call.p.shape[-1]
            weight = torch.ones(len(p), 1, 1, n, dtype=torch.float64)
            weight[torch.arange(len(p)), 0, 0, starts[: len(p)]] = 3.0
            p = p * weight
            out = call.out(p / p.sum(-1, keepdim=True).clamp_min(1e-300))
            out = out * torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=torch.float64)[:, None]
            if layer not in heads:
                heads[layer] = torch.zeros(len(out), 4, dtype=torch.bool)
                for row, other in enumerate(others):
                    heads[layer][row] = torch.tensor(chosen(out[row, -1], out[other, -1], True))
                    heads[layer][other] = heads[layer][row]
            return out * torch.where(heads[layer][: len(out)], 2.0, 1.0)[:, None, :, None]

        return run

    with naive.edited({layer: edit(layer) for layer in naive.taps}) as other:
        expected = logits(other, both, past_key_values=cache)[:3, -1]
        torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-8)
        cache.batch_select_indices(torch.arange(3))
        mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        call = {"input_ids": expected.argmax(-1, keepdim=True), "attention_mask": mask}
        call["position_ids"] = mask.sum(-1, keepdim=True) - 1
        torch.testing.assert_close(found[:, 1], logits(other, call, past_key_values=cache)[:, -1], rtol=0, atol=1e-8)


def test_companions_that_the_caller_made():
    """A plain forward: without companions an error, with them what generate() does."""
    model, given = ZOO["llava"].build(torch.float64), prompts("llava", None)
    handle = headpatch.apply(model, recipe_of("vhr", ALPHAS))
    with pytest.raises(
        EngineError,
        match=r"operand 'without_image' is needed. generate\(\) without an assistant makes .*inputs\(without_image=",
    ):
        logits(model, given)
    _, expected = generated(model, given, 1)
    both, others = beside(given)
    with handle.inputs(without_image=[*others, None, None, None]):
        found = logits(model, both)[:3, -1]
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=1e-8)


def test_listed_is_a_factor():
    """No companion, no state: head_scaling of the listed heads, for every prompt."""
    given = prompts("llava", "left")
    model, other = ZOO["llava"].build(torch.float64), ZOO["llava"].build(torch.float64)
    handle = headpatch.apply(model, recipe_of("vhr", ALPHAS, selection="listed"))
    headpatch.apply(other, recipe_of("head_scaling", ALPHAS))
    assert torch.equal(logits(model, given), logits(other, given))
    assert handle.recipe.patches[0].method.scope == "prefix"


def test_off_and_identity_are_bit_equal():
    model, given = ZOO["llava"].build(torch.float64), prompts("llava", "left")
    tokens, plain = generated(model, given)
    with headpatch.applied(model, recipe_of("vhr", dict.fromkeys(range(4), 1.0))):
        assert torch.equal(generated(model, given)[1], plain)
    with headpatch.applied(model, recipe_of("vhr", ALPHAS)):
        assert not torch.equal(generated(model, given)[1], plain)
    found = generated(model, given)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], plain)
    assert "_prefill" not in model.__dict__


def test_what_cannot_be_is_refused():
    given = prompts("llava", None)
    model = ZOO["llava"].build(torch.float64)
    with headpatch.applied(model, recipe_of("vhr", ALPHAS)):
        with pytest.raises(
            EngineError, match="'without_image': the prompt must come in one call; turn chunked prefill off"
        ):
            generated(model, given, prefill_chunk_size=4)
        embeds = model.get_input_embeddings()(given["input_ids"])
        with pytest.raises(EngineError, match="'without_image': the prompt comes as embeddings"):
            model.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], max_new_tokens=1)
        one = {key: value[: len(value) // 3] for key, value in given.items()}
        with pytest.raises(EngineError, match=r"'without_image' is needed. generate.. without an assistant"):
            model.generate(**one, max_new_tokens=4, prompt_lookup_num_tokens=2, do_sample=False)
        assert generated(model, given, 1)[0].shape == (3, 1), "it goes on after an error"
    with pytest.raises(UnsupportedModelError, match="without_image"):
        headpatch.apply(ZOO["llama"].build(), recipe_of("vhr", ALPHAS))
    windows = {"method": "streaming_llm", "sink": 2, "recent": 4}
    with (
        pytest.raises(headpatch.HeadpatchError, match="no state that is derived from the prompt"),
        headpatch.applied(model, of(windows, {"method": "vhr", "heads": {"*.*": 2.0}})),
    ):
        pass


def test_spans_beside_it():
    """PASTA's spans are given for the prompts; the companions' are the same text."""
    entry, given = ZOO["llava"], prompts("llava", None)
    model = entry.build(torch.float64)
    width = given["input_ids"].shape[1]
    spans = [[(width - 3, width - 1)], [(0, 1)], []]
    handle = headpatch.apply(model, of(
        {"method": "pasta", "heads": {"*.0": 0.1}}, {"method": "vhr", "heads": {"*.*": 2.0}},
    ))  # fmt: skip
    with handle.inputs(spans=spans):
        _, found = generated(model, given, 1)
    both, others = beside(given)
    gap = int((given["input_ids"] == IMAGE).sum(-1)[0])
    mine = [[(width - 3 - gap, width - 1 - gap)], [(0, 1)], []]
    with handle.inputs(spans=[*spans, *mine], without_image=[*others, None, None, None]):
        expected = logits(model, both)[:3, -1]
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-8)
