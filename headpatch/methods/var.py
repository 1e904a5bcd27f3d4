"""VAR, visual attention redistribution: give the attention that sinks draw to what a picture shows.

In vision-language models a few image tokens collect attention from every text token although they show next to nothing; their
residual stream is extreme in the same few dimensions as that of the first token. With S all such sinks of a layer, text and image,
V the image's tokens and N = V without S, a query row with attention p, [n], has the masses m_X = sum of p over X. Where a head
looks at real image content,

    gate:  m_V >= min_visual_mass   and   m_N >= min_nonsink_ratio m_V   and   the row sees a sink in the image

a part r of what the sinks get goes to N, in proportion; everything else stays:

    p_j' = (1 - r) p_j  for j in S        p_j' = p_j (1 + r m_S / m_N)  for j in N        p_j' = p_j  for all others

The gate is evaluated for each layer, head and query by itself: `heads` are the candidates, ``"2-30.*"`` in the paper's model of 32
layers. Text queries after an image and every generated token are edited, image tokens never. Where the gate is closed, shares are
those of the untouched row. A key is a sink of a layer where max over `sink_dimensions` d of |x_d| / rms(x) >= sink_threshold, with x
the residual stream that enters the layer; sinks are those of the prompt and stay what they are while decoding.

Source: Kang, Kim, Kim and Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321; code:
github.com/seilk/VisAttnSink. Dimensions: LLaMA-2-7B and Vicuna-7B 1415, 2533; 13B 2100, 4743 (from the code); others have to be
found. phi cannot exceed sqrt(D): 20 belongs to D = 4096, and 0.3125 sqrt(D) is the same share of a stream's energy elsewhere.

Paper and released code disagree, and parameters are therefore named by what they mean:

* `recycle` is the fraction that is moved. The paper's formula moves p; the code keeps p and moves 1 - p. The shipped setting
  p = 0.6 is `recycle` 0.6 by the paper and 0.4 by the code.
* `min_nonsink_ratio` is the paper's rho, the least share of the image's attention on non-sinks. The code bounds the sinks' share
  from above by its rho, which is 1 minus this one.
* Without a visual sink the code leaves a layer alone, and the paper moves the text sinks' share all the same. The code is followed
  (`require_visual_sink`), for each row by what it sees.
* The code adds 1e-6 to image weights in the ratio, and compares sinks with > and not >=. The paper is followed in both.
* Several images are taken together; the code handles one contiguous block in a batch of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import MassMethod, Operands, param, strength
from headpatch.operands import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form


@dataclass(frozen=True)
class VisualAttentionRedistribution(MassMethod):
    """Move the fraction `recycle` of the attention on sinks to the image's other tokens."""

    sink_dimensions: tuple[int, ...] = param(
        help="dimensions of the residual stream in which sinks are extreme; they belong to the language model"
    )
    recycle: float = strength(0.0, ge=0.0, le=1.0, help="fraction of the sinks' attention that is moved")
    sink_threshold: float = param(
        20.0, gt=0.0, le=1e4, help="a key is a sink from this multiple of its stream's root mean square on"
    )
    min_visual_mass: float = param(0.2, ge=0.0, le=1.0, help="least attention to the image for a head to be edited")
    min_nonsink_ratio: float = param(
        0.5,
        ge=0.0,
        le=1.0,
        help="least share of that attention that must be on the image's non-sinks; 0.5 to 0.9 published",
    )
    require_visual_sink: bool = param(True, help="leave rows alone that see no sink in the image")

    name: ClassVar[str] = "var"
    conserves: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("image_queries",)

    def __post_init__(self) -> None:
        if not self.sink_dimensions or min(self.sink_dimensions) < 0:
            raise ValueError("sink_dimensions must name at least one dimension, counted from 0")

    @property
    def scope(self) -> str:
        return "prompt"

    def _sinks(self, *minus: Segment) -> Segment:
        options: tuple[tuple[str, object], ...] = (("dims", self.sink_dimensions), ("threshold", self.sink_threshold))
        return Segment("residual_sinks", options, minus)

    def segments(self) -> tuple[Segment, ...]:
        image = Segment("image_tokens")
        text_sinks = self._sinks(image)
        visual_sinks = self._sinks(text_sinks)  # what of them lies in the image
        return (Segment("image_tokens", minus=(self._sinks(),)), visual_sinks, text_sinks)

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        import torch

        content, visual, text, rest = shares
        image = content + visual
        gate = (image >= self.min_visual_mass) & (content >= self.min_nonsink_ratio * image)
        if not (self.min_visual_mass and self.min_nonsink_ratio):  # which leave none without content
            gate = gate & (content > 0)
        gate = gate > operands["image_queries"][:, None]  # (of two booleans: the first without the second)
        if self.require_visual_sink:
            gate = gate & (visual > 0)
        moved = gate * strength[:, None]
        kept = 1 - moved
        return torch.stack([torch.addcmul(content, moved, visual + text), kept * visual, kept * text, rest])

    def form(self, operands: Operands) -> Form:
        from headpatch.kernels.segments import Form

        return Form(
            "redistribute", (Segment("image_tokens"), self._sinks()), self.min_visual_mass, self.min_nonsink_ratio,
            self.require_visual_sink, operands["image_queries"],
        )  # fmt: skip

    def acts_on(self, operands: Operands) -> Tensor:
        image = operands["image_queries"]
        return (image.cumsum(1) > 0) & ~image
