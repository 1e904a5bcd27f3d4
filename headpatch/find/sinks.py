"""The attention-sink metric: how often heads pay one position a large average attention.

    alpha_k = mean over the queries i >= k of p[i, k]           (per prompt, layer and head; p is a head's softmax)
    Sink_k  = mean over prompts, layers and heads of 1[alpha_k > eps]

The threshold is applied per prompt and head, then the average is taken; thresholding averages gives other numbers. Positions count
from 0 here. The metric depends on the prompts' length, so both belong beside it: Sink_0 at eps 0.3 and 64 tokens, in the paper.

Source: Gu et al., "When Attention Sink Emerges in Language Models: An Empirical View", arXiv 2410.10781; code:
github.com/sail-sg/Attention-Sink. The code materialises every attention map; here column means are added up in blocks. Under a
sliding window a mean is over the queries that see the key (the code divides by all), and what learned sink logits take is not
renormalised away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.api import observe
from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SinkMetric", "sink_metric"]


@dataclass(frozen=True)
class SinkMetric:
    """What :func:`sink_metric` found.

    Attributes
    ----------
    alphas
        ``"layer.head" -> [prompts]`` mean attention to the position, fp32 or fp64, on the CPU.
    eps, tokens, position
        As asked for.
    """

    alphas: Mapping[str, Tensor]
    eps: float
    tokens: int
    position: int

    @property
    def value(self) -> float:
        """The metric, 0 to 1."""
        return sum(self.frequencies.values()) / len(self.alphas)

    @property
    def mean(self) -> float:
        """Mean attention to the position over prompts and heads: says more than the metric where that is near 0 or 1."""
        return sum(float(a.mean()) for a in self.alphas.values()) / len(self.alphas)

    @property
    def frequencies(self) -> dict[str, float]:
        """Per head, the share of prompts in which it pays the position more than `eps`."""
        return {head: float((a > self.eps).double().mean()) for head, a in self.alphas.items()}

    def heads(self, least: float = 0.5) -> list[str]:
        """Sink heads: those above `eps` in at least this share of the prompts."""
        return [head for head, share in self.frequencies.items() if share >= least]


def sink_metric(
    model: Any, prompts: Iterable[Sequence[int]], *, tokens: int = 64, eps: float = 0.3, position: int = 0, heads: Any = "*.*",
    part: str | None = None,
) -> SinkMetric:  # fmt: skip
    """Measure a model; nothing about it is changed.

    Parameters
    ----------
    model
        A model that :func:`headpatch.observe` takes, called with ``input_ids``. Recipes that are on it stay on.
    prompts
        Token ids of natural text, at least `tokens` each; the rest is cut off.
    tokens, eps, position
        Length of every prompt, threshold (strict), and the key's position.
    heads, part
        Which heads, and of which attention stack.

    Raises
    ------
    HeadpatchError
        There are no prompts, one is too short, or the position is not inside.
    """
    import torch

    if not 0 <= position < tokens:
        raise HeadpatchError(f"position {position} is outside the prompts; give 0 to {tokens - 1}")
    found: dict[str, list[Tensor]] = {}
    for number, prompt in enumerate(prompts):
        if len(prompt) < tokens:
            raise HeadpatchError(
                f"prompt {number} has {len(prompt)} tokens, the metric is over {tokens}; leave it out, or ask for fewer"
            )
        device = next(model.parameters()).device
        row = torch.tensor([list(prompt[:tokens])], device=device)
        with (
            torch.no_grad(),
            observe(model, "column_means", heads, **({} if part is None else {"part": part})) as seen,
        ):
            model(input_ids=row)
        for (_, head), means in seen.items():
            found.setdefault(head, []).append(means[0][0, position].cpu())
    if not found:
        raise HeadpatchError("no prompts were given")
    return SinkMetric({head: torch.stack(values) for head, values in found.items()}, eps, tokens, position)
