"""Soft injection: blend a task's own vector into each head's output, at the last token of the prompt.

    o[l,h,p] <- (1 - alpha[l,h]) o[l,h,p] + alpha[l,h] t[l,h]        p = prompt_len - 1, and no other position

where o[l,h,p], of width d, is head h's output before the output projection. t is the task's embedding: the mean of o at the last
token of many few-shot prompts. alpha says in which heads it counts: one number each, learned by gradient descent
(:mod:`headpatch.tune.soft`). The prompt itself is zero-shot. All layers are edited in one pass, so that a layer sees what was done
below it; later tokens see it through the keys and values of that one position alone.

The recipe's file holds t as one array per head, ``t.12.3`` for head 12.3; ``array:`` gives another first word, so that several
tasks fit in one file.

Source: "Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning" (later: "Soft Head Selection for Injecting
ICL-Derived Task Embeddings"), arXiv 2507.20906; code: github.com/SNU-DRL/Soft_Injection.

Where this differs from the released code:

* The position is absolute. The code acts in every forward pass of more than one token, at the last unpadded index: with a
  prefilled cache the last token may come alone and would be skipped, and with chunked prefill every chunk's end would be edited.
* Rows may be padded on either side, and each row may have a task of its own; the code edits one row.
* The blend is computed in float32.

In models whose attention has an output gate, o is what attention gives, before the gate; the embedding must be measured there, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import OutputMethod, head_vectors, param, strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SoftInjection(OutputMethod):
    """Blend a task's vector into head outputs at the prompt's last token, `alpha` of it."""

    alpha: float = strength(
        0.0, ge=0.0, le=1.0, help="share of the task's vector in the head's output; 1 puts it in the output's place"
    )
    array: str = param("t", help="first word of the arrays' names: ARRAY.L.H is the vector of head L.H")

    name: ClassVar[str] = "soft_injection"
    needs: ClassVar[tuple[str, ...]] = ("arrays",)

    @property
    def scope(self) -> str:
        return "prompt"

    @property
    def span(self) -> tuple[int, int]:
        return (-1, 0)

    def pick(
        self, arrays: Mapping[str, Tensor], layer: int, heads: Sequence[int], head_dim: int
    ) -> dict[str, Tensor]:  # fmt: skip
        return {"t": head_vectors(arrays, self.array, layer, heads, head_dim)}

    def affine(self, strength: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return 1 - strength, strength[:, None] * arrays["t"].to(strength)
