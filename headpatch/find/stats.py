"""Intervals and tests for paired comparisons. Everything is two-sided unless it says otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Estimate", "benjamini_hochberg", "estimate", "mcnemar", "normal_p", "paired", "wilson", "z_value"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, and the number of rows behind it."""

    value: float
    low: float
    high: float
    rows: int


def z_value(confidence: float = 0.95) -> float:
    """Normal quantile of a two-sided interval."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(hits: float, rows: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval."""
    if rows == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    z, p = z_value(confidence), hits / rows
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), rows)


def estimate(values: Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of [R] values: Wilson's interval where all are 0 or 1, else mean and standard error."""
    values = values.double()
    rows = values.numel()
    if rows and bool(((values == 0) | (values == 1)).all()):
        return wilson(float(values.sum()), rows, confidence)
    if rows < 2:
        mean = float(values.mean()) if rows else math.nan
        return Estimate(mean, math.nan, math.nan, rows)
    mean, half = float(values.mean()), z_value(confidence) * float(values.std()) / math.sqrt(rows)
    return Estimate(mean, mean - half, mean + half, rows)


def paired(after: Tensor, before: Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of the rows' differences [R] with a normal interval; rows that did not change count."""
    difference = after.double() - before.double()
    rows = difference.numel()
    if rows < 2:
        return Estimate(float(difference.mean()) if rows else math.nan, math.nan, math.nan, rows)
    half = z_value(confidence) * float(difference.std()) / math.sqrt(rows)
    mean = float(difference.mean())
    return Estimate(mean, mean - half, mean + half, rows)


def mcnemar(better: int, worse: int) -> float:
    """Exact p-value that as many rows get better as get worse, from those that change: binomial with one half."""
    n = better + worse
    if n == 0:
        return 1.0
    k = min(better, worse)
    # Sums of logarithms: binomial coefficients of thousands of rows overflow.
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
        for i in range(k + 1)
    )
    return min(1.0, 2 * tail)


def normal_p(after: Tensor, before: Tensor) -> float:
    """p-value of the mean paired difference [R] being zero. Exact (McNemar) where all values are 0 or 1, else normal."""
    difference = (after.double() - before.double()).flatten()
    both = (after, before)
    if all(bool(((v == 0) | (v == 1)).all()) for v in both):
        return mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    deviation = float(difference.std()) if difference.numel() > 1 else 0.0
    if deviation == 0.0:
        return 1.0
    z = float(difference.mean()) / deviation * math.sqrt(difference.numel())
    return 2 * NormalDist().cdf(-abs(z))


def benjamini_hochberg(p_values: Sequence[float], total: int | None = None) -> list[float]:
    """Adjusted p-values: calling those below q discoveries keeps the expected share of false ones below q.

    Parameters
    ----------
    p_values
        Of the hypotheses that are still open.
    total
        Of how many in all; those that are missing count as p = 1. (Hypotheses dropped early for looking unpromising.)

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", J. R. Stat. Soc. B 57 (1995).
    """
    m = max(len(p_values), total or 0)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i], reverse=True)
    adjusted, least = [1.0] * len(p_values), 1.0
    for place, i in enumerate(order):
        least = min(least, p_values[i] * m / (len(p_values) - place))
        adjusted[i] = least
    return adjusted
