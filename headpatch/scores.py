"""Edits of attention on scores that lie open, one block of queries at a time: what every adapter does where no closed form is left.

Masks and scores are tensors of one block, so that nothing of the size queries x keys is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headpatch.segments import cell_log_weights, log_sum_exp

__all__ = ["HeadEdit", "attention_of", "edit_scores", "on_heads"]


class HeadEdit(Protocol):
    """One mass or scores method on some heads."""

    @property
    def method(self) -> Any:
        """The method with its parameters."""

    @property
    def heads(self) -> Tensor:
        """Query heads, int64 [h], ascending."""

    @property
    def strength(self) -> Tensor:
        """[h]."""


def on_heads(edit: HeadEdit, operands: Mapping[str, Any], everywhere: bool = False) -> Callable[[Tensor], Tensor]:
    """An edit's function on shares of all heads, or (`everywhere`) on shares of its own heads alone."""

    def reshare(shares: Tensor) -> Tensor:
        chosen = shares if everywhere else shares.index_select(2, edit.heads)
        new: Tensor = edit.method.reshare(chosen, edit.strength.to(shares.dtype), operands)
        return new.to(shares.dtype) if everywhere else shares.index_copy(2, edit.heads, new.to(shares.dtype))

    return reshare


def edit_scores(
    scores: Tensor, edits: Sequence[tuple[HeadEdit, Sequence[Tensor], Mapping[str, Any]]]
) -> Tensor:  # fmt: skip
    """Scores whose softmax is the edited attention.

    Parameters
    ----------
    scores
        [b, H, q, n] in at least fp32, -inf where a key cannot be seen.
    edits
        In the order they act: an edit, the masks of the segments that its method names (each broadcastable to `scores`; a key
        that lies in two belongs to the first), and the operands that the method asked for.

    Returns
    -------
    Tensor
        As `scores`. Heads that no edit names are untouched.
    """
    for edit, masks, given in edits:
        if edit.method.family == "scores":
            new = old = scores.index_select(1, edit.heads)
            free, strength = ~torch.isneginf(old), edit.strength.to(scores.dtype)
            for place, mask in enumerate(masks):
                inside = mask.expand_as(scores).index_select(1, edit.heads) & free
                free = free & ~inside
                seen = old.masked_fill(~inside, -math.inf)
                changed = edit.method.transform(seen, strength, {**given, "segment": place})
                new = torch.where(inside, changed.to(scores.dtype), new)
            scores = scores.index_copy(1, edit.heads, new)
            continue
        parts, rest, inside_of = [], scores, []
        for mask in masks:
            inside_of.append(mask & ~torch.isneginf(rest))
            parts.append(log_sum_exp(rest.masked_fill(~mask, -math.inf)))
            rest = rest.masked_fill(mask, -math.inf)
        lses = [*parts, log_sum_exp(rest)]
        names = tuple(range(len(masks)))
        log_w = cell_log_weights(lses, [*((s,) for s in names), ()], [(names, on_heads(edit, given))])
        total = log_w[-1].unsqueeze(-1).expand_as(scores)
        for place, inside in enumerate(inside_of):
            total = torch.where(inside, log_w[place].unsqueeze(-1), total)
        scores = scores + total
    return scores


def attention_of(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over keys, [b, H, q, n]; `sinks` are learned logits without a key, [H]. A row that sees nothing must not be NaN."""
    if sinks is None:
        return torch.softmax(scores.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0), -1)
    column = sinks.to(scores.dtype)[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
