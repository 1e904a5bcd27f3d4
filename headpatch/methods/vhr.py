"""VHR, vision-aware head reinforcement: make the heads louder that listen to the image.

With o_i, [d], the output of head i of one layer at the prompt's last token, before the output projection, and o_i' the same of the
prompt without its image,

    change_i = ||o_i - o_i'||_2        loud_i = ||o_i'||_2^2

change_i counts as 0 where both change_i > mean(change) + std(change) and loud_i > mean(loud) + std(loud) over the heads of the layer:
there the change comes from firing harder *without* the image (`outliers`). Heads above the layer's median,

    S = { i : change_i > median(change) }        o_i <- alpha o_i   for i in S

at most half of them, are multiplied in every position of the prompt and of what is generated. S is chosen once, where the prompt
ends, layer by layer: what a layer measures has passed through the reinforced layers before it. Mean, std and median are those of all
heads of the layer; `heads` are the candidates among which S may lie, ``["1.*", "18-31.*"]`` for the paper's model of 32 layers: layer
1 is the paper's "second layer", of which the authors say that it does not always help.

Source: He, Zhu, Guo, Fang, Hua, Jia, Tang and Chua, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
ACL 2025, arXiv 2412.13949. The released code was not read; written from the paper. alpha 2 was published, 3 is still sound, 4 breaks
generation.

Where the paper leaves open what to do:

* The image is taken out by deleting its placeholder tokens, with positions closed up; nothing else of the prompt is touched, and all
  images of a prompt go together. A prompt without an image is left alone.
* The prompt without its image runs in the same pass and is reinforced in the same heads (`reinforce_reference`), so that what is
  measured is the image and not the reinforcement of earlier layers.
* std is that of a sample (n - 1); the median of an even number of heads lies between the two in the middle.
* ``selection: listed`` multiplies all listed heads, for every prompt, without a second prompt. That is not the method: with heads
  fixed from one sample the paper measures 44.7 % captions with something false on LLaVA-1.5-7B, where the method has 33.3 and the
  untouched model 49.7, and on LLaVA-NeXT-7B 37.0, worse than untouched (29.1; the method: 25.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import Operands, OutputMethod, param, strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionAwareHeadReinforcement(OutputMethod):
    """Multiply the outputs of those heads by `alpha` that change most when the image is taken away."""

    alpha: float = strength(1.0, ge=-10.0, le=10.0, help="factor on the outputs of the chosen heads; 2 was published")
    selection: Literal["online", "listed"] = param(
        "online",
        help="online: chosen for each prompt among the heads listed; listed: all of those, which is not the published method",
    )
    outliers: bool = param(True, help="leave out heads whose change comes from firing harder without the image")
    reinforce_reference: bool = param(True, help="the prompt without its image is reinforced in the same heads")

    name: ClassVar[str] = "vhr"

    @property
    def state(self) -> tuple[str, ...]:
        return () if self.is_constant else ("selected",)

    @property
    def state_needs(self) -> tuple[str, ...]:
        return () if self.is_constant else ("all_heads", "without_image", "position", "prompt_len")

    @property
    def scope(self) -> str:
        return "prefix" if self.is_constant else "prompt"

    @property
    def is_constant(self) -> bool:
        return self.selection == "listed"

    def scales(self, strength: Tensor) -> Tensor:
        return strength

    def derive(self, operands: Operands) -> dict[str, Tensor]:
        """``selected``, [b, H] bool: the heads of the layer that are reinforced in each row."""
        import torch

        out, other = operands["all_heads"], operands["without_image"]
        rows, heads = torch.arange(out.shape[0], device=out.device), out.shape[2]
        last = (operands["position"] == operands["prompt_len"][:, None] - 1).to(torch.uint8).argmax(1)
        ends = out[rows, last].to(torch.promote_types(out.dtype, torch.float32))
        without = ends[other.clamp_min(0)]
        change, loud = torch.linalg.vector_norm(ends - without, dim=-1), without.square().sum(-1)
        if self.outliers:
            odd = _far_above(change) & _far_above(loud)
            change = change.masked_fill(odd, 0.0)
        ranked = change.sort(-1).values
        median = (ranked[:, (heads - 1) // 2] + ranked[:, heads // 2]) / 2
        selected = (change > median[:, None]) & (other >= 0)[:, None]
        if self.reinforce_reference:
            # A row without its image follows the (first) row that it was made from.
            nobody = len(rows)
            owner = torch.full((nobody + 1,), nobody, device=out.device)
            owner = owner.scatter_reduce(0, torch.where(other >= 0, other, nobody), rows, "amin")[:nobody]
            selected = selected | torch.cat([selected, selected.new_zeros(1, heads)])[owner]
        return {"selected": selected}

    def edit(self, output: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        if self.is_constant:
            return super().edit(output, strength, operands)
        chosen = operands["selected"].index_select(1, operands["heads"])[:, None, :, None]
        return (output * strength[:, None]).where(chosen, output)


def _far_above(values: Tensor) -> Tensor:
    """Which of [b, H] lie more than a standard deviation above their row's mean."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)
