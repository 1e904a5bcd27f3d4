"""ACT, attention calibration: shrink the attention that a head pays to sinks in the middle of the prompt.

Beside the first token, other tokens (punctuation, newlines) draw a high average attention without saying much. ACT finds them in
each prompt, for each head, and hands a part of their attention to all other keys, the first token included:

    m_k = mean over the queries i >= k of p[i, k]           S = {k : m_k > threshold} without the first token
    p'[i, k] = beta p[i, k]                                              for k in S
    p'[i, k] = p[i, k] (1 + (1 - beta) P_i / (1 - P_i))                  for all other k,      P_i = sum over S of p[i, k]

where p is a head's softmax over the prompt, [q, n]. S is found per row of the batch and per head, from the whole prompt, and acts
on every query, those before the sink was known included. The map p is never stored: column means are added up a block of queries
at a time, in the heads that the recipe names.

Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration", arXiv 2406.15765; code: github.com/GATECH-EIC/ACT.

Paper and released code disagree about the threshold, and this offers both: ``threshold_per: fixed`` with 0.1 is the code (its
chat script has 0.15), ``threshold_per: prompt_length`` with 5 is the paper's alpha / N. At 50 tokens they are the same.

Where this differs from the released code:

* Decoding. The code computes the means of a single generated row as it did those of the prompt, finds other sinks, removes none
  from the redistribution and writes 1 over the first token's weight: rows no longer sum to one. Its evaluations never decode with
  a cache. Here the prompt's sinks stay what they are, and generated rows follow the same formula.
* The code drops the first *hit*, which is a real sink wherever the first token is below the threshold. Here the first token itself
  is kept (`keep_first`).
* Column 0 and N are those of each row's real tokens, so padded batches are right; under a sliding window a key's mean is over the
  queries that see it.
* `min_queries` is new: the last keys are seen by a few queries only, and the mean of the very last is its attention to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import MassMethod, Operands, param, strength
from headpatch.operands import Segment, first_token

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form


@dataclass(frozen=True)
class AttentionCalibration(MassMethod):
    """Multiply attention to the prompt's own sinks by `beta`; the other keys share the rest."""

    beta: float = strength(
        1.0, ge=0.0, le=1.0, help="factor on attention to sinks; 0 takes all of it, 0.4 was published"
    )
    threshold: float = param(
        0.1, gt=0.0, le=1e4, help="a key whose mean attention over the prompt's queries is above this is a sink"
    )
    threshold_per: Literal["fixed", "prompt_length"] = param(
        "fixed", help="fixed: as it stands; prompt_length: divided by the number of tokens in the row's prompt"
    )
    keep_first: bool = param(True, help="the first token is never counted as a sink")
    min_queries: int = param(1, ge=1, le=1024, help="keys that fewer queries of the prompt see are never sinks")

    name: ClassVar[str] = "act"
    conserves: ClassVar[bool] = True

    @property
    def scope(self) -> str:
        return "prompt"

    def segments(self) -> tuple[Segment, ...]:
        options: list[tuple[str, object]] = [
            ("min_queries", self.min_queries),
            ("per_length", self.threshold_per == "prompt_length"),
            ("threshold", self.threshold),
        ]
        return (Segment("column_sinks", tuple(options), (first_token,) if self.keep_first else ()),)

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        kept = shares[0] * strength[:, None]
        edited = torch.stack([kept, 1 - kept])
        # A row that sees nothing but sinks has nobody to hand their attention to.
        return torch.where(shares[1:] > 0, edited, shares)

    def form(self, operands: Operands) -> Form:
        from headpatch.kernels.segments import Form

        return Form("calibrate", self.segments())
