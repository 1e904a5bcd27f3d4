"""PAINT: raise the scores of those image tokens that the vision tower finds informative, for the token that is being generated.

    s_j' = s_j + w alpha |s_j|  for j in T        s_j' = s_j + w beta |s_j|  for j in B        s_j' = s_j  for all others

then the softmax, with s one query row of a head's scaled scores, [n], for the prompt's last token and every generated one. With
a(l, j) the attention that the vision tower's class token pays in layer l to the patch behind image token j, summed over heads, and P
patches in an image,

    B = { j : a(summary_layer, j) > Q3 + summary_fence (Q3 - Q1) }        with Q1, Q3 the quartiles over the image's patches
    T = the floor(local_share P) tokens with the largest a(local_layer, j), without those in B

T are the *local* tokens, which say what stands where, and B the *summary* ones, patches of high norm that collect what the whole
picture shows. w is the head's own weight, 1 as published. Both sets are found once for each image, from the tower's attention to
that very image, and stay what they are while decoding.

Source: Arif, Dip, Hussain, Zhang and Thomas, "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
Vision-Language Model", arXiv 2501.12206; code: github.com/hasanar1f/PAINT. The code edits all heads of the layers from 2 on, the
selector ``2-31.*`` in a model of 32 layers. alpha 0.7 is its default; beta 0.4 is the best row of the published table, and the
command line has 0.3. The setting stands on an edge: by the paper's own table nothing changes up to alpha 0.5, and from 0.8 (or beta
0.5) on the model no longer describes the picture. Scores have no natural unit, so a value for LLaVA-1.5-7B means little elsewhere.

Written from the released code and the paper's tables; the paper's text could not be read. Where this differs from the code:

* The abstract speaks of each head's sensitivity to the image. The code has nothing of the kind: all heads get the same alpha and
  beta. `weight` is ours, and makes room for it.
* The code's third set, "spatial" tokens, sums softmax rows over their keys, which gives 1 for every patch and so picks arbitrary
  ones; its share is fixed at 0 there. It is left out.
* The contrast with the text-only distribution, a switch of the code's command line, is decoding and no edit of a head.
* The code takes one image of 576 patches, a batch of one, and the last column as the query; here images and their number are what
  the prompt has, and the prompt's last token is each row's own, whatever the padding.
* B is what lies above the fence; the code takes the share of such patches, multiplies it by their number again and rounds down,
  which can lose the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import Operands, ScoresMethod, param, strength
from headpatch.operands import Segment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Paint(ScoresMethod):
    """Add to the scores of image tokens that the vision tower finds informative a part of their own size."""

    weight: float = strength(0.0, ge=0.0, le=10.0, help="how much of alpha and beta a head gets; 1 was published")
    alpha: float = param(0.7, ge=0.0, le=10.0, help="factor on the size of the scores of local tokens")
    beta: float = param(0.4, ge=0.0, le=10.0, help="factor on the size of the scores of summary tokens")
    local_share: float = param(0.25, ge=0.0, le=1.0, help="share of an image's tokens that are local, at most")
    local_layer: int = param(
        0,
        ge=-1024,
        le=1023,
        help="layer of the vision tower whose class token chooses local tokens; negative: from its end",
    )
    summary_layer: int = param(-2, ge=-1024, le=1023, help="the same for summary tokens")
    summary_fence: float = param(
        1.5,
        ge=0.0,
        le=1e4,
        help="interquartile ranges above the third quartile from which on a token is a summary one",
    )

    name: ClassVar[str] = "paint"
    needs: ClassVar[tuple[str, ...]] = ("position", "prompt_len")

    @property
    def scope(self) -> str:
        return "prompt"

    @property
    def span(self) -> tuple[int | None, int | None]:
        return (-1, None)

    def segments(self) -> tuple[Segment, ...]:
        summary = Segment("vision_salient", (("fence", self.summary_fence), ("layer", self.summary_layer)))
        local = (("layer", self.local_layer), ("share", self.local_share))
        return Segment("vision_salient", local, (summary,)), summary

    def transform(self, scores: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        factor = strength * (self.alpha, self.beta)[operands["segment"]]
        # Outside, -inf, the sum stays that: the size is a finite number there.
        raised = torch.addcmul(scores, factor[:, None, None], scores.clamp_min(-1e30).abs())
        edited = operands["position"] >= operands["prompt_len"][:, None] - 1
        return torch.where(edited[:, None, :, None], raised, scores)
