"""What is read of a batch's logits, put together as outcomes of passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headpatch.find.engine import Outcome, Passage, Questions

__all__ = ["assemble", "at"]


def at(values: Tensor, positions: Tensor) -> Tensor:
    """Values [b, q, D] at positions [b, P]: [b, P, D]."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))


def assemble(
    members: Sequence[list[int]], parts: Sequence[Tensor], questions: Questions | None, texts: Sequence[Passage]
) -> Outcome:
    """One outcome from the batches of one recipe, in the order of the passages; `members` are places among these, by batch."""
    asked = questions.passages if questions else ()
    rows: list[Any] = [None] * (len(asked) + len(texts))
    for places, values in zip(members, parts, strict=True):
        for place, value in zip(places, values, strict=True):
            rows[place] = value
    said = [row[: len(p.targets)] for row, p in zip(rows[len(asked) :], texts, strict=True)]
    text = torch.cat(said) if said else torch.empty(0)
    if questions is None:
        none = torch.empty(0)
        return Outcome(none, none, none, none, text)
    labels = len(questions.starts)
    step = labels if questions.whole else 1
    head = torch.stack([rows[i][: labels + 2] for i in range(0, len(asked), step)])
    first = head[:, :labels].clone()
    whole = first
    if questions.whole:
        sums = [row[labels + 2 : labels + 2 + len(p.targets)].sum() for row, p in zip(rows, asked, strict=False)]
        whole = torch.stack(sums).view(-1, labels)
    return Outcome(first, whole, head[:, labels].clone(), head[:, labels + 1].clone(), text)
