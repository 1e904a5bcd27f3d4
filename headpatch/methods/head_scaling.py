"""Head scaling: multiply a head's output before the output projection.

    o_h' = s o_h,     o: [b, q, H, d]

which equals scaling the head's values at every key (the output is linear in them), and, for ``positions: all``, scaling the d
columns of the output projection that belong to the head. scale = 0 is zero-ablation; negative scales turn the head's
contribution around. A few late heads decide between what the context says and what the model remembers; scaling them shifts
that balance.

Source: Yu, Merullo and Pavlick, "Characterizing Mechanisms for Factual Recall in Language Models", arXiv 2310.15910 (no
official code was found). Whether the paper edits all query rows or only the last could not be verified; scaling values
literally affects all rows, so that is the default, and `positions` offers the others.

Where this differs: the edit is on the head's output and not on V, because under grouped-query attention one V serves several
query heads and would stay in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from headpatch.methods.base import OutputMethod, param, strength

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadScaling(OutputMethod):
    """Multiply the outputs of heads by `scale`."""

    scale: float = strength(1.0, ge=-1e6, le=1e6, help="factor on the head's output; 0 ablates the head")
    positions: Literal["all", "last", "decode"] = param(
        "all",
        help="which query rows: all; last (the prompt's last token and every generated one); decode (generated ones only)",
    )

    name: ClassVar[str] = "head_scaling"

    @property
    def is_constant(self) -> bool:
        return self.positions == "all"

    @property
    def scope(self) -> str:
        return "prefix" if self.positions == "all" else "prompt"

    @property
    def span(self) -> tuple[int | None, int | None]:
        return {"all": (None, None), "last": (-1, None), "decode": (0, None)}[self.positions]

    def scales(self, strength: Tensor) -> Tensor:
        return strength

    def affine(self, strength: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        return strength, None
