"""PASTA: steer heads towards spans of the prompt that the caller marks.

    p'[i, j] = alpha p[i, j] / C_i     for j in the prompt and in no marked span
    p'[i, j] = p[i, j] / C_i           for j in a marked span, or generated,      C_i = the row's sum

where p is a head's softmax, [q, n]; with alpha well below 1 the head reads the marked tokens (an instruction, a fact) and what it
wrote itself. It acts on every query row, in the prompt and while decoding. Which tokens are marked comes with each call:
``handle.inputs(spans=...)``. Rows of the batch without a span, and rows whose spans cover the prompt, stay as they are.

With `target_mass` the factor depends on the row (SpotLight): where the spans have less than that share psi_i of a row's attention,

    p'[i, j] = f_i p[i, j] / C_i   for j in a marked span,      f_i = min(target_mass / psi_i, 1 / alpha)

and nothing happens where they have it already. The new share is target / (1 + target - psi) and not the target itself: that is how
SpotLight defines it. Here alpha bounds f, which would explode where a head hardly sees the spans (0 stands for 1e-6).

Sources: Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", arXiv 2311.02262, code:
github.com/QingruZhang/PASTA; SpotLight, arXiv 2505.12025.

Where this differs from the released code:

* Several spans act as their union. The code adds each span's exclusion in turn, so that with m spans the rest gets alpha^m and
  the marked tokens alpha^(m-1): against what was generated, the whole prompt shrinks.
* The code adds ln(alpha) to a mask in the model's dtype, which half precision rounds; here it is a weight, and alpha = 0 is allowed
  (a row that then sees nothing at all stays as it is).
* The first token is scaled like the rest of the prompt, as in the code; steered heads lose their attention sink that way.
  `keep_first` leaves it alone, and is no part of PASTA.
* Of SpotLight: shares are those of each head and row. Whether the paper averages them over heads first could not be verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import MassMethod, Operands, param, strength
from headpatch.operands import Segment, first_token

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form


@dataclass(frozen=True)
class Pasta(MassMethod):
    """Multiply attention to the prompt outside the caller's spans by `alpha`."""

    alpha: float = strength(1.0, ge=0.0, le=1.0, help="factor on the prompt's unmarked tokens; 0.01 was published")
    target_mass: float = param(
        0.0, ge=0.0, lt=1.0,
        help="above 0: only rows that give the spans less than this share are steered, towards it; alpha is then the bound",
    )  # fmt: skip
    keep_first: bool = param(False, help="leave the first token's attention alone, so that heads keep their sink")

    name: ClassVar[str] = "pasta"

    def __post_init__(self) -> None:
        if self.keep_first and self.target_mass > 0.0:
            raise ValueError("keep_first says nothing beside target_mass, which only touches the spans' own weights")

    @property
    def is_constant(self) -> bool:
        return self.target_mass == 0.0

    @property
    def scope(self) -> str:
        return "request"

    def segments(self) -> tuple[Segment, ...]:
        if self.target_mass > 0.0:
            return (Segment("spans"),)
        return (Segment("beside_spans", minus=(first_token,) if self.keep_first else ()),)

    def weights(self, strength: Tensor) -> Tensor:
        return strength[:, None]

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        if self.is_constant:
            return super().reshare(shares, strength, operands)
        marked, rest = shares
        wanted = self.target_mass / marked.clamp_min(torch.finfo(shares.dtype).tiny)
        factor = torch.minimum(wanted, 1 / strength.clamp_min(1e-6)[:, None]).clamp_min(1.0)
        weighted = torch.stack([factor * marked, rest])
        return weighted / weighted.sum(0)

    def form(self, operands: Operands) -> Form | None:
        from headpatch.kernels.segments import Form

        return None if self.is_constant else Form("raise", self.segments(), least=self.target_mass)
