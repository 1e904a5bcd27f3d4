"""Controls: what could have been had without choosing heads, or without touching the model at all."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headpatch.find.engine import Outcome
from headpatch.find.search import Candidate, Combo

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.heads import PartShape

__all__ = ["calibrated", "contextual_bias", "fit_bias", "random_combos"]


def random_combos(
    combo: Combo, shape: PartShape, draws: int, seed: int, heads: Sequence[str] | None = None
) -> list[Combo]:
    """As many edits of the same strengths on heads drawn at random, `draws` times.

    A selector with ``*`` in it is replaced by one of the same form. `heads` are those to draw single heads from; default: all.
    """
    rng = random.Random(seed)  # noqa: S311  (no secret depends on it)
    single = list(heads or ()) or [
        f"{layer}.{h}" for layer in shape.softmax_layers() for h in range(shape.num_heads[layer])
    ]
    columns = [f"*.{h}" for h in range(max(shape.num_heads))]
    rows = [f"{layer}.*" for layer in shape.softmax_layers()]
    drawn = []
    for _ in range(draws):
        pools = {
            form: rng.sample(form_of, len(form_of)) for form, form_of in (("h", single), ("c", columns), ("r", rows))
        }
        chosen: list[Candidate] = []
        for candidate in combo:
            form = "c" if candidate.selector.startswith("*") else "r" if candidate.selector.endswith("*") else "h"
            chosen.append(dataclasses.replace(candidate, selector=pools[form].pop()))
        drawn.append(tuple(chosen))
    return drawn


def fit_bias(outcome: Outcome, gold: Sequence[int]) -> Tensor:
    """A bias per label [K], added to the labels' log-probabilities, that makes the most training rows right.

    Starts from the bias of the highest likelihood (which is unique), then moves one label's bias at a time to its best value. With
    two labels that is the best threshold there is.
    """
    import torch

    known = torch.tensor(gold) >= 0
    scores, right = outcome.whole.double()[known], torch.tensor(gold)[known]
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        # The little pull to zero keeps a label that never is right from running away.
        value = torch.nn.functional.cross_entropy(scores + bias, right) + 1e-4 * (bias**2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    found = bias.detach()
    for _ in range(3):
        before = found.clone()
        for label in range(scores.shape[1]):
            found[label] = _best_shift(scores + found, right, label) + found[label]
        if torch.equal(before, found):
            break
    return found - found.mean()


def _best_shift(scores: Tensor, right: Tensor, label: int) -> float:
    """How much to add to one label so that the most rows are right; the smallest such change."""
    import torch

    others = scores.clone()
    others[:, label] = -torch.inf
    rival = others.max(1)
    need = (rival.values - scores[:, label]).double()  # from this shift on, the row's answer is `label`
    change = (right == label).double() - (rival.indices == right).double()
    order = need.argsort()
    edges = need[order]
    totals = torch.cat([torch.zeros(1, dtype=torch.float64), change[order].cumsum(0)])
    ends = torch.cat([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
    distinct = torch.cat([torch.tensor([True]), edges[1:] > edges[:-1], torch.tensor([True])])
    best = totals[distinct].max()
    options = ends[distinct & (totals == best)]
    return float(options[options.abs().argmin()])


def contextual_bias(content_free: Outcome) -> Tensor:
    """Bias per label [K] of contextual calibration: minus the log of the mean label probabilities of content-free prompts.

    Source: Zhao et al., "Calibrate Before Use: Improving Few-Shot Performance of Language Models", ICML 2021, arXiv 2102.09690.
    """
    bias: Tensor = -content_free.whole.double().softmax(-1).mean(0).log()
    return bias


def calibrated(outcome: Outcome, bias: Tensor) -> Outcome:
    """The outcome with a bias on the labels' log-probabilities; what the model itself would say does not change."""
    return dataclasses.replace(outcome, whole=(outcome.whole.double() + bias))
