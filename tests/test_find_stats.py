"""Intervals and tests, against enumeration, simulation and published values."""

from __future__ import annotations

import math
import random

import pytest
import torch

from headpatch.find.controls import calibrated, contextual_bias, fit_bias, random_combos
from headpatch.find.engine import Outcome
from headpatch.find.measure import Goal
from headpatch.find.search import Candidate, patches_of
from headpatch.find.stats import Estimate, benjamini_hochberg, estimate, mcnemar, normal_p, paired, wilson, z_value
from headpatch.heads import PartShape


def outcome(whole: torch.Tensor) -> Outcome:
    rows = whole.shape[0]
    return Outcome(whole, whole, torch.full((rows,), -9.0), torch.ones(rows), torch.empty(0))


def test_wilson_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(hits, rows)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert wilson(5, 5).high == 1.0
    assert math.isnan(wilson(0, 0).value)


def test_mcnemar_is_the_exact_binomial() -> None:
    for better in range(8):
        for worse in range(8):
            n = better + worse
            tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n if n else 1.0
            assert mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail if n else 1.0), rel=1e-12)
    assert 0 < mcnemar(0, 1000) < 1e-290, "thousands of rows overflow nothing"


def test_paired_takes_pairs_and_not_groups() -> None:
    """Rows that differ a lot between each other, and little between before and after."""
    before = torch.tensor([float(i) for i in range(100)])
    after = before + torch.tensor([0.1, 0.3] * 50)
    found = paired(after, before)
    assert found.value == pytest.approx(0.2)
    assert found.low > 0.17
    assert normal_p(after, before) < 1e-6
    assert normal_p(before, before) == 1.0


def test_intervals_cover() -> None:
    """Of 2,000 samples of 80 rows, about 95 % of the intervals hold the true mean."""
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(2000, 80, generator=rng)
    hits = sum(e.low <= 0.5 <= e.high for e in map(estimate, values))
    assert 0.93 < hits / 2000 < 0.965
    flips = (values < 0.3).double()
    hits = sum(e.low <= 0.3 <= e.high for e in map(estimate, flips))
    assert 0.93 < hits / 2000 < 0.975


def test_estimates_of_little() -> None:
    assert estimate(torch.tensor([0.5])).value == 0.5
    assert math.isnan(estimate(torch.tensor([0.5])).low)
    assert math.isnan(estimate(torch.empty(0)).value)
    assert math.isnan(paired(torch.empty(0), torch.empty(0)).value)
    assert estimate(torch.tensor([1.0, 0.0])) == wilson(1, 2)


def test_benjamini_hochberg() -> None:
    # the example of their paper: 15 p-values, of which the four smallest are discoveries at 5 %
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    order = list(range(15))
    random.Random(0).shuffle(order)
    adjusted = benjamini_hochberg([p[i] for i in order])
    assert sorted(order[i] for i, q in enumerate(adjusted) if q <= 0.05) == [0, 1, 2, 3]
    assert benjamini_hochberg(p[:4], total=15)[0] == pytest.approx(15 * 0.0001)
    assert benjamini_hochberg([]) == []


def test_discoveries_under_noise_are_rare() -> None:
    """300 edits that do nothing, 400 trials: anything is found in at most about 5 % of them."""
    rng = random.Random(1)
    found = sum(min(benjamini_hochberg([rng.random() for _ in range(300)])) <= 0.05 for _ in range(400))
    assert found <= 35


def test_agreement_ignores_a_shift_of_all_rows() -> None:
    """An edit that makes one label likelier everywhere helps where that label is the commoner one, but tells nobody anything."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(4000, 2, generator=g) * 0.1
    gold = (torch.rand(4000, generator=g) < 0.7).long()
    goal = Goal("probability")
    shifted = whole + torch.tensor([0.0, 0.5])
    gain = goal.rows(outcome(shifted), gold) - goal.rows(outcome(whole), gold)
    assert float(gain.mean()) > 0.03
    assert normal_p(goal.agreement(outcome(shifted), gold), goal.agreement(outcome(whole), gold)) > 0.01
    better = whole.clone()
    better[torch.arange(4000), gold] += 0.02
    assert normal_p(goal.agreement(outcome(better), gold), goal.agreement(outcome(whole), gold)) < 1e-6


def test_fitted_bias_is_the_best_threshold() -> None:
    g = torch.Generator().manual_seed(2)
    gold = torch.randint(2, (200,), generator=g)
    whole = torch.randn(200, 2, generator=g) + torch.nn.functional.one_hot(gold, 2) + torch.tensor([3.0, 0.0])

    def right(shift: float) -> int:
        return int(((whole[:, 1] + shift > whole[:, 0]).long() == gold).sum())

    margins = (whole[:, 0] - whole[:, 1]).tolist()
    best = max(right(m + e) for m in margins for e in (-1e-4, 1e-4))
    bias = fit_bias(outcome(whole), gold.tolist())
    assert right(float(bias[1] - bias[0])) == best > right(0.0) + 30


def test_fitted_bias_of_several_labels() -> None:
    g = torch.Generator().manual_seed(3)
    gold = torch.randint(4, (400,), generator=g)
    whole = 0.5 * torch.randn(400, 4, generator=g) + torch.nn.functional.one_hot(gold, 4)
    off = torch.tensor([2.0, -1.0, 0.5, 0.0])
    truth = int((whole.argmax(1) == gold).sum())
    found = calibrated(outcome(whole + off), fit_bias(outcome(whole + off), [*gold.tolist()])).whole
    assert int((found.argmax(1) == gold).sum()) >= truth - 4
    unlabelled = torch.cat([whole + off, torch.full((5, 4), 7.0)])
    same = fit_bias(outcome(unlabelled), [*gold.tolist(), *[-1] * 5])
    torch.testing.assert_close(same, fit_bias(outcome(whole + off), gold.tolist()))


def test_contextual_calibration_levels_content_free_prompts() -> None:
    whole = torch.tensor([[-1.0, -3.0], [-1.2, -2.8]])
    bias = contextual_bias(outcome(whole))
    p = whole.double().softmax(-1).mean(0)
    torch.testing.assert_close((p.log() + bias).softmax(-1), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_random_heads_keep_count_strengths_and_form() -> None:
    shape = PartShape((4, 0, 4), (2, 0, 2), (8, 0, 8))
    combo = (
        Candidate("zerotuning", "0.1", 3.0),
        Candidate("zerotuning", "2.3", 0.5),
        Candidate("zerotuning", "*.2", 2.0),
    )
    drawn = random_combos(combo, shape, 50, seed=1)
    assert drawn == random_combos(combo, shape, 50, seed=1) != random_combos(combo, shape, 50, seed=2)
    for other in drawn:
        assert [c.strength for c in other] == [3.0, 0.5, 2.0]
        assert other[2].selector.startswith("*.")
        assert len({c.selector for c in other}) == 3
        assert all(c.selector.split(".")[0] in ("0", "2") for c in other[:2]), "layer 1 has no heads"


def test_patches_of_a_combination() -> None:
    zt = Candidate("zerotuning", "*.1", 3.0)
    combo = (zt, Candidate("head_scaling", "0.1", 0.0), Candidate("zerotuning", "0.1", 2.0), zt.at(4.0))
    assert patches_of(combo) == [
        {"method": "zerotuning", "heads": {"0.1": 2.0, "*.1": 4.0}}, {"method": "head_scaling", "heads": {"0.1": 0.0}},
    ]  # fmt: skip
    assert list(patches_of(combo)[0]["heads"]) == ["0.1", "*.1"], "later selectors override earlier ones"


def test_z() -> None:
    assert z_value(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert Estimate(1, 0, 2, 3).rows == 3
