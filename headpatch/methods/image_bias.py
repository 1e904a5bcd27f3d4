"""Image bias: multiply the attention that a head pays to image tokens.

    p_j' = e^b p_j / C   for j in the image's tokens        p_j' = p_j / C   for all others,        C = the row's sum

which is the same as adding b to the scores of image tokens: the simplest way to make a head look more (b > 0) or less at the
pictures in its prompt, in one ratio for all of their tokens. It acts on every query that sees an image token, prompt and generated
alike; those of the image itself can be left out (`queries: text`).

Source: a constant bias is the common baseline of the methods that raise image attention, among them PAI (arXiv 2407.21771), where
it is the ablation, and VAF (arXiv 2503.13107), which enhances the image in middle layers. Neither is this method: PAI's own edit
depends on each score (see pai.py), and VAF also damps the system prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import MassMethod, Operands, param, strength
from headpatch.operands import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form


@dataclass(frozen=True)
class ImageBias(MassMethod):
    """Add `bias` to the attention scores of image tokens."""

    bias: float = strength(0.0, ge=-50.0, le=50.0, help="added to the scores; 0.7 about doubles the image's weight")
    queries: Literal["all", "text"] = param(
        "all", help="which queries look more: all, or those that are no image tokens"
    )

    name: ClassVar[str] = "image_bias"
    needs: ClassVar[tuple[str, ...]] = ("image_queries",)

    @property
    def is_constant(self) -> bool:
        return self.queries == "all"

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("image_tokens"),)

    def weights(self, strength: Tensor) -> Tensor:
        return strength.exp()[:, None]

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        edited = super().reshare(shares, strength, operands)
        if self.queries == "all":
            return edited
        return torch.where(operands["image_queries"][:, None], shares, edited)

    def form(self, operands: Operands) -> Form | None:
        from headpatch.kernels.segments import Form

        return None if self.is_constant else Form("weigh", self.segments(), spared=operands["image_queries"])
