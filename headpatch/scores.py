"""Edits of attention on scores that lie open, one block of queries at a time: what every adapter does where no closed form is left.

Masks and scores are tensors of one block, so that nothing of the size queries x keys is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headpatch.segments import cell_log_weights, log_sum_exp, new_shares, partition

__all__ = ["Acting", "HeadEdit", "attention_of", "edit_attention", "edit_scores", "on_heads"]


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


Acting = tuple[HeadEdit, Sequence[Tensor], Mapping[str, Any]]
"""An edit, the masks of the segments that its method names (each broadcastable to [b, H, q, n]; a key that lies in two belongs to the
first), and the operands that the method asked for."""


def on_heads(
    edit: HeadEdit, operands: Mapping[str, Any], everywhere: bool = False, strength: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """An edit's function on shares of all heads, or (`everywhere`) on shares of its own alone, or of those that `strength` is of."""
    of_heads = edit.strength if strength is None else strength

    def reshare(shares: Tensor) -> Tensor:
        chosen = shares if everywhere else shares.index_select(2, edit.heads)
        new: Tensor = edit.method.reshare(chosen, of_heads.to(shares.dtype), operands)
        return new.to(shares.dtype) if everywhere else shares.index_copy(2, edit.heads, new.to(shares.dtype))

    return reshare


def edit_scores(scores: Tensor, edits: Sequence[Acting], fused: bool = False) -> Tensor:
    """Scores whose softmax is the edited attention.

    Parameters
    ----------
    scores
        [b, H, q, n] in at least fp32, -inf where a key cannot be seen.
    edits
        In the order they act.
    fused
        Whether a compiler fuses what is done here: then other heads are worked on too where that is possible, and what comes of it
        is not used.

    Returns
    -------
    Tensor
        As `scores`. Heads that no edit names are untouched.
    """
    for edit, masks, given in edits:
        if edit.method.family == "scores":
            on = _Some(edit, scores, fused)
            new = old = on.taken
            free, strength = ~torch.isneginf(old), on.strength.to(scores.dtype)
            for place, mask in enumerate(masks):
                inside = on.of(mask) & free
                free = free & ~inside
                seen = old.masked_fill(~inside, -math.inf)
                changed = edit.method.transform(seen, strength, {**on.operands(given), "segment": place})
                new = torch.where(inside, changed.to(scores.dtype), new)
            scores = on.put(new)
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


def edit_attention(
    p: Tensor, edits: Sequence[Acting], fused: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`edit_scores` for mass edits alone, on the attention itself: fewer sums over keys, and no logarithms.

    Parameters
    ----------
    p
        [b, H, q, n] in at least fp32, rows that sum to one.
    edits
        Mass edits, in the order they act.
    fused
        As in :func:`edit_scores`.
    dtype
        Of the result, if not that of `p`; without gradients.

    Returns
    -------
    Tensor
        As `p`.
    """
    for edit, masks, given in edits:
        on = _Some(edit, p, fused)
        cells = partition([on.of(mask) for mask in masks])
        before = _masses(on.taken, cells, fused)
        after = new_shares(before, on_heads(edit, on.operands(given), True, on.strength), edit.method.conserves)
        factor = (after / before.clamp_min(torch.finfo(p.dtype).tiny)).unsqueeze(-1)
        weight = factor[-1]
        for place, inside in enumerate(cells[:-1]):
            weight = torch.where(inside, factor[place], weight)
        if dtype is not None and on.all and edit is edits[-1][0]:  # rounded where it is multiplied
            return torch.mul(on.taken, weight, out=p.new_empty(p.shape, dtype=dtype))
        p = on.put(on.taken * weight)
    return p if dtype is None else p.to(dtype)


def _masses(p: Tensor, cells: Sequence[Tensor], fused: bool) -> Tensor:
    """[C, b, H, q] attention of each cell."""
    if fused or any(cell.shape[2] > 1 for cell in cells):
        return torch.stack([(p * cell).sum(-1) for cell in cells])
    flags = torch.stack(torch.broadcast_tensors(*cells), -1)[:, :, 0].to(p.dtype)
    return torch.matmul(p, flags).movedim(-1, 0)


class _Some:
    """The heads of one edit among all of `x`, [b, H, ...]: taken out, or (`fused`) all of them with the others put back."""

    def __init__(self, edit: HeadEdit, x: Tensor, fused: bool) -> None:
        self.edit, self.x = edit, x
        self.all = len(edit.heads) == x.shape[1]
        self.dense: tuple[Tensor, Tensor] | None = getattr(edit, "dense", None) if fused and not self.all else None
        self.every = self.all or self.dense is not None
        self.taken = x if self.every else x.index_select(1, edit.heads)
        self.strength = edit.strength if self.dense is None else self.dense[0]

    def of(self, mask: Tensor) -> Tensor:
        """The mask of these heads."""
        return mask if self.every or mask.shape[1] == 1 else mask.index_select(1, self.edit.heads)

    def operands(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a method gets."""
        if self.dense is None or "heads" not in given:
            return given
        return {**given, "heads": torch.arange(self.x.shape[1], device=self.x.device)}

    def put(self, new: Tensor) -> Tensor:
        """`x` with these heads as in `new`."""
        if self.dense is not None:
            return torch.where(self.dense[1], new, self.x)
        return new if self.all else self.x.index_copy(1, self.edit.heads, new)


def attention_of(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over keys, [b, H, q, n]; `sinks` are learned logits without a key, [H]. A row that sees nothing must not be NaN."""
    if sinks is None:
        return torch.softmax(scores.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0), -1)
    column = sinks.to(scores.dtype)[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
