"""PAI, paying more attention to image: raise the scores of image tokens for the token that is being generated.

    s_j' = s_j + alpha |s_j|   for j in the image's tokens,       p' = softmax(s')

where s is one query row of a head's scaled scores, [n]. Positive scores grow by the factor 1 + alpha, negative ones shrink towards
zero: the change depends on each score and not only on the image's share, so these keys are attended to explicitly. `queries` says
which rows are edited: ``last``, as published, the prompt's last token and every generated one; ``all``, every row that sees an
image token.

Source: Liu, Zheng and Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv
2407.21771; code: github.com/LALBJ/PAI. The code edits all heads of the layers from 2 on, where the sink on the first token has
formed: that is the selector ``2-31.*`` in a model of 32 layers. Its command line has alpha 0.2; the paper has 0.5 for LLaVA, 0.6
for Shikra and 0.2 for MiniGPT-4. Scores have no natural unit, so a value for one model means little for the next.

Where this differs from the released code:

* This is the attention edit alone. The paper also contrasts the output distribution with that of the same prompt without its image,
  which is decoding and no edit of a head.
* The code takes one contiguous block of image tokens, and the last column as the query; here the image's tokens are wherever they
  stand, and the prompt's last token is each row's own, whatever the padding.
* With soft-capped scores, |s| is that of the capped score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import Operands, ScoresMethod, param, strength
from headpatch.operands import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form


@dataclass(frozen=True)
class PayAttentionToImage(ScoresMethod):
    """Add `alpha` times their own size to the scores of image tokens."""

    alpha: float = strength(0.0, ge=0.0, le=10.0, help="factor on the size of each score; 0.2 to 0.6 were published")
    queries: Literal["last", "all"] = param(
        "last", help="which queries: last (the prompt's last token and every generated one); all"
    )

    name: ClassVar[str] = "pai"
    needs: ClassVar[tuple[str, ...]] = ("position", "prompt_len")

    @property
    def scope(self) -> str:
        return "prompt" if self.queries == "last" else "prefix"

    @property
    def span(self) -> tuple[int | None, int | None]:
        return (-1, None) if self.queries == "last" else (None, None)

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("image_tokens"),)

    def transform(self, scores: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        # Outside, -inf, the sum stays that: the size is a finite number there.
        raised = torch.addcmul(scores, strength[:, None, None], scores.clamp_min(-1e30).abs())
        if self.queries == "all":
            return raised
        edited = operands["position"] >= operands["prompt_len"][:, None] - 1
        return torch.where(edited[:, None, :, None], raised, scores)

    def form(self, operands: Operands) -> Form:
        from headpatch.kernels.segments import Form

        return Form("amplify", self.segments())
