"""The sink metric against whole attention maps, and sink dimensions of models that have them by construction, or have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat import fingerprint, ids, logits, one_thread, silent
from naive import Naive
from zoo import BOS, ZOO

from headpatch import HeadpatchError
from headpatch.find.sink_dimensions import sink_dimensions
from headpatch.find.sinks import sink_metric

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

PROMPTS = ids(5, 30).tolist()
PERIOD, DIMENSION = 40, 11


@pytest.mark.parametrize("entry", ["llama", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("position", [0, 3])
def test_the_metric_is_that_of_whole_maps(entry, position):
    model, naive = ZOO[entry].build(torch.float64), Naive(ZOO[entry])
    before = fingerprint(model)
    found = sink_metric(model, PROMPTS, tokens=24, eps=0.1, position=position)
    assert fingerprint(model) == before
    share, alphas = 0.0, {}
    for row in PROMPTS:
        naive.clear()
        logits(naive.model, torch.tensor([row[:24]]), use_cache=False)
        for layer in naive.taps:
            call = naive.calls(layer)[0]
            alpha = call.p[0, :, :, position].sum(-1) / call.seen[0, 0, :, position].sum()
            for head, value in enumerate(alpha.tolist()):
                alphas.setdefault(f"{layer}.{head}", []).append(value)
    assert found.alphas.keys() == alphas.keys()
    for head, values in alphas.items():
        torch.testing.assert_close(found.alphas[head], torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-9)
        share += sum(v > 0.1 for v in values) / len(values) / len(alphas)
    assert found.value == pytest.approx(share)
    assert found.heads() == [h for h, values in alphas.items() if sum(v > 0.1 for v in values) >= len(values) / 2]
    assert found.mean == pytest.approx(sum(map(sum, alphas.values())) / len(alphas) / len(PROMPTS))


def test_the_metric_knows_a_model_with_a_planted_sink():
    """The first token has most of the attention there; a later one does not."""
    model = ZOO["llama"].build()
    assert sink_metric(model, PROMPTS, tokens=24, heads="0.*").value == 1.0
    assert sink_metric(model, PROMPTS, tokens=24, heads="0.*", position=5).value == 0.0


def with_sinks(attended: bool = True) -> Any:
    """A model whose first token, and one other, are extreme in one dimension; all queries look for it, or none does."""
    model = ZOO["qwen3"].build()
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, DIMENSION] = 0.0
        table[:, 12] = 3.0
        table[[BOS, PERIOD], DIMENSION] = 60.0
        for layer in model.model.layers:
            attention, d = layer.self_attn, layer.self_attn.head_dim
            slow = slice(d // 2 - 1, None, d)  # the slowest rotary pair of each head: distance does not turn it
            attention.k_proj.weight[slow, DIMENSION] = 8.0 if attended else 0.0
            attention.q_proj.weight[slow, 12] = 8.0 if attended else 0.0
            attention.q_norm.weight[:], attention.k_norm.weight[:] = 2.0, 2.0
    return model


def prompts() -> list[list[int]]:
    rows = ids(6, 20, seed=4)
    rows[rows == PERIOD] = PERIOD + 1
    rows[:, 9] = PERIOD
    return rows.tolist()


def test_dimensions_that_were_planted_are_found():
    found = sink_dimensions(with_sinks(), prompts())
    assert found.dimensions == (DIMENSION,)
    assert found.threshold == pytest.approx(0.3125 * 8) and found.width == 64 and found.lift > 3


def test_models_without_them_are_refused():
    with pytest.raises(HeadpatchError, match="shows no sink dimensions: none is extreme at the first token"):
        sink_dimensions(ZOO["qwen3"].build(), prompts(), threshold=6.0)
    plain = [[t if t != PERIOD else PERIOD + 1 for t in row] for row in prompts()]
    with pytest.raises(HeadpatchError, match="shows no sink dimensions: none is extreme at any later token"):
        sink_dimensions(with_sinks(), plain, threshold=5.0)
    with pytest.raises(
        HeadpatchError, match=r"tokens extreme in 11 receive .* times an even share of attention, less than 3"
    ):
        sink_dimensions(with_sinks(attended=False), prompts())


def test_bad_prompts_are_refused():
    model = ZOO["llama"].build()
    with pytest.raises(HeadpatchError, match="prompt 0 has 30 tokens, the metric is over 64"):
        sink_metric(model, PROMPTS)
    with pytest.raises(HeadpatchError, match="position 9 is outside the prompts; give 0 to 4"):
        sink_metric(model, PROMPTS, tokens=5, position=9)
    for call in (sink_metric, sink_dimensions):
        with pytest.raises(HeadpatchError, match="no prompts were given"):
            call(model, [])
