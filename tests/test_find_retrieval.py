"""Retrieval scores: a head that copies by construction is found, whichever it is, and what is counted is what heads look at."""

from __future__ import annotations

import copying
import pytest
import torch
from compat import fingerprint, ids, logits, one_thread, silent
from naive import Naive
from zoo import ZOO

import headpatch
from headpatch import HeadpatchError
from headpatch.find.engine import open_bench
from headpatch.find.needles import Needle
from headpatch.find.retrieval import Probe, _strongest, recall, retrieval_heads

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

PROBE = Probe((100, 150), (0.0, 0.5, 1.0), 1, needle=copying.NEEDLE, max_new_tokens=8)


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 2), (2, 3)])
def test_the_head_that_copies_is_found(layer, head):
    model = copying.model(layer, head)
    before = fingerprint(model)
    found = retrieval_heads(model, copying.tokenizer(), PROBE, haystack=copying.HAYSTACK)
    assert fingerprint(model) == before
    assert [r.success for r in found.runs] == [True] * 6
    best, second = found.scores.ranked()[:2]
    assert best == (layer, head, 1.0), "five tokens of five are copied, each seen by the head that copies"
    assert second[2] < 0.5
    assert found.heads(0.5) == [best]
    assert found.errors[layer][head] == 0.0
    assert found.scores.kind == "query"
    assert found.scores.about["successful"] == 6
    assert found.scores.model["num_layers"] == copying.LAYERS


def test_runs_that_fail_do_not_count():
    """Without the head that copies nothing is found, and that is said."""
    model = copying.model()
    off = {"headpatch": 1, "patches": [{"method": "head_scaling", "heads": ["1.2"], "scale": 0.0}]}
    with (
        headpatch.applied(model, off),
        pytest.raises(HeadpatchError, match=r"none of 6 needles.*'red owl on green hill'"),
    ):
        retrieval_heads(model, copying.tokenizer(), PROBE, haystack=copying.HAYSTACK)


def test_it_stops_once_the_ranking_is_stable():
    probe = Probe((100,), (0.5,), 9, needle=copying.NEEDLE, max_new_tokens=8, stable=2, top=1)
    lines = []
    found = retrieval_heads(copying.model(), copying.tokenizer(), probe, haystack=copying.HAYSTACK, say=lines.append)
    assert len(found.runs) == 3
    assert "enough" in lines[-1]


def test_the_same_seed_gives_the_same_scores():
    one, two = (
        retrieval_heads(copying.model(), copying.tokenizer(), PROBE, haystack=copying.HAYSTACK).scores.values
        for _ in range(2)
    )
    assert one == two


@pytest.mark.parametrize("entry", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_the_strongest_key_is_that_of_the_whole_map(entry):
    """Step by step on a cache, windows included, against the last row of a full forward."""
    model, naive = ZOO[entry].build(torch.float64), Naive(ZOO[entry])
    row = ids(1, 26, seed=3)[0].tolist()
    session = open_bench(model, copying.tokenizer()).session()
    session.feed(row[:20])
    for stop in range(21, len(row) + 1):
        with headpatch.observe(model, "window_scores", window=1) as seen:
            session.feed(row[stop - 1 : stop])
        naive.clear()
        logits(naive.model, torch.tensor([row[:stop]]), use_cache=False)
        heads = [len(naive.calls(layer)[0].p[0]) for layer in naive.taps]
        wanted = {layer: naive.calls(layer)[0].p[0, :, -1].argmax(-1).tolist() for layer in naive.taps}
        assert _strongest(seen, heads, stop) == wanted


def test_recall_counts_words():
    assert recall("The key is Under the mat.", "under the mat") == 1.0
    assert recall("under a mat", "under the mat") == pytest.approx(2 / 3)
    assert recall("the", "the the") == 0.5
    assert recall("", "x") == 0.0


def test_a_needle_that_is_not_copied_word_for_word_is_refused():
    with pytest.raises(HeadpatchError, match="does not contain its answer 'blue owl'"):
        Needle("code is red owl", "code", "blue owl")
