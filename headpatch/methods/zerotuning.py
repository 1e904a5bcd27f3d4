"""ZeroTuning: rescale the attention that a head pays to the first token.

    p0' = g p0 / (1 + (g - 1) p0),     p_k' = p_k / (1 + (g - 1) p0)   for k > 0

where p is one row of a head's softmax, [q, n], p0 its first column (the row's first *real* token, whatever the padding) and g
the head's gamma. The first token is an attention sink with little content, so gamma > 1 damps how much context the head reads
and gamma < 1 strengthens it, in the same ratio for every other token. It is the same as adding ln(gamma) to the first key's
score, acts on every query row (prompt and generated alike), and needs no attention map: the first token's mass is enough.

Source: Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
arXiv 2505.11739; code: github.com/FeijiangHan/ZeroTuning.

Where this differs from the released code:

* The code takes column 0 and runs batch size 1; here it is each row's first real token, so padded batches are right.
* The code applies one flat list of head indices to every target layer; here that is the selector ``*.h``, and single
  ``layer.head`` pairs are possible too.
* gamma = 0 on a row that sees only the first token is 0/0 in the code (NaN); here such a row stays as it is.
* Later versions of the paper scale queries or keys where scores cannot be reached. That is another, query-dependent edit; this
  one is exact under every kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import MassMethod, strength
from headpatch.operands import Segment, first_token

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ZeroTuning(MassMethod):
    """Multiply attention to the first token by `gamma` and renormalise the row."""

    gamma: float = strength(
        1.0, ge=0.0, le=1e6,
        help="factor on attention to the first token; above 1 the head reads less context, below 1 more",
    )  # fmt: skip

    name: ClassVar[str] = "zerotuning"
    constant: ClassVar[bool] = True

    def segments(self) -> tuple[Segment, ...]:
        return (first_token,)

    def weights(self, strength: Tensor) -> Tensor:
        return strength[:, None]
