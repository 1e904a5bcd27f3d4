"""Function vectors: add a task's vector to head outputs, at the last token of the prompt.

    o[l,h,p] <- o[l,h,p] + scale v[l,h]        p = prompt_len - 1 (or every p from there on)

where o[l,h,p], of width d, is head h's output before the output projection W_O. A function vector f, of the residual stream's width,
is the sum of what a few heads write at the last token of few-shot prompts; adding it to the stream at one layer makes the model do
the task in a zero-shot prompt. Here it is written as head outputs v of one layer whose sum over h of W_O[:, h] v[l,h] is f, so that
it is an edit of heads like any other (:mod:`headpatch.tune.function_vector` finds f and solves for v).

The recipe's file holds v as one array per head, ``v.12.3`` for head 12.3; ``array:`` gives another first word.

Source: Todd et al., "Function Vectors in Large Language Models", ICLR 2024, arXiv 2310.15213; code:
github.com/ericwtodd/function_vectors.

Where this differs from the released code:

* f enters with the attention's output and not behind the layer's MLP, which therefore sees it.
* The code adds f at the last index of every forward pass: in generation that is every generated token, too. Here the default is the
  prompt's last token alone, and ``positions: last`` does what the code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import OutputMethod, head_vectors, param, strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FunctionVector(OutputMethod):
    """Add a task's vector, `scale` times, to head outputs at the prompt's last token."""

    scale: float = strength(0.0, ge=-1e4, le=1e4, help="factor on the vector")
    positions: Literal["prompt_end", "last"] = param(
        "prompt_end",
        help="which query rows: prompt_end (the prompt's last token); last (that and every generated one)",
    )
    array: str = param("v", help="first word of the arrays' names: ARRAY.L.H is the vector of head L.H")

    name: ClassVar[str] = "function_vector"
    needs: ClassVar[tuple[str, ...]] = ("arrays",)

    @property
    def scope(self) -> str:
        return "prompt"

    @property
    def span(self) -> tuple[int, int | None]:
        return (-1, 0) if self.positions == "prompt_end" else (-1, None)

    def pick(
        self, arrays: Mapping[str, Tensor], layer: int, heads: Sequence[int], head_dim: int
    ) -> dict[str, Tensor]:  # fmt: skip
        return {"v": head_vectors(arrays, self.array, layer, heads, head_dim)}

    def affine(self, strength: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        import torch

        return torch.ones_like(strength), strength[:, None] * arrays["v"].to(strength)
