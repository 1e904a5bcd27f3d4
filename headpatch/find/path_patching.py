"""Path patching from heads to the answer: which heads carry what differs between a prompt and its counterfactual.

For a prompt X and a counterfactual X' of the same length, with head outputs z and z' at the last token, head (l, h) is the sender:

    run X with z[l,h] <- z'[l,h] and every other head's output at the last token held at z;  MLPs and norms follow
    change     = mean over prompts of (gap_patched - gap),        gap = logit[answer] - mean of the other candidates' logits
    relative   = mean over prompts of (logit_patched[answer] - logit[answer]) / logit[answer]     (the published score)

Heads that matter have a strongly negative change. The relative score depends on where a model's logits lie and means nothing near
zero; heads are ranked by the gap, and both are reported. Only the last token is run for each head
(:class:`headpatch.tune.engine.LastTokens`): what comes before it is X's own.

Source: Zhang et al., "Interpreting and Improving Large Language Models in Arithmetic Calculation", ICML 2024, arXiv 2409.01659 (no
code was released); path patching after Wang et al., arXiv 2211.00593.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from headpatch.tune.engine import Beginnings, Edit, LastTokens

__all__ = ["Contrast", "PathEffects", "knocked_out", "last_outputs", "path_effects"]

ROWS = 256
"""Heads that are tried in one batch."""


@dataclass(frozen=True)
class Contrast:
    """A prompt, its counterfactual and the first token of its answer; all as tokens."""

    prompt: tuple[int, ...]
    other: tuple[int, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.prompt) != len(self.other):
            raise HeadpatchError(
                f"a prompt of {len(self.prompt)} tokens and a counterfactual of {len(self.other)}: they must be as long, so that "
                "positions mean the same; drop the pair, or choose another word"
            )


@dataclass(frozen=True)
class PathEffects:
    """Effects by ``layer.head``.

    Attributes
    ----------
    change
        Of the gap between the answer's logit and the mean of the other candidates'.
    relative
        Of the answer's logit, as a share of it.
    prompts
        How many contrasts were used.
    """

    change: Mapping[str, float]
    relative: Mapping[str, float]
    prompts: int

    def ranking(self) -> dict[str, float]:
        """The higher, the more the answer needs the head: a ranking that ``heads=`` takes, with ``top=``."""
        return {head: -value for head, value in self.change.items()}


def path_effects(
    model: LastTokens, contrasts: Sequence[Contrast], candidates: Collection[int], *,
    progress: Callable[[int, int], None] | None = None,
) -> PathEffects:  # fmt: skip
    """Patch every head alone, in every contrast.

    Parameters
    ----------
    candidates
        Tokens that answers are compared with (all digits, say).
    progress
        Called with contrasts done and in all.

    Raises
    ------
    HeadpatchError
        No contrasts, or no candidate beside an answer.
    """
    if not contrasts:
        raise HeadpatchError("path patching needs at least one contrast")
    counts = model.shape.parts[model.shape.main].num_heads
    heads = [(layer, h) for layer, n in enumerate(counts) for h in range(n)]
    change, relative = (torch.zeros(len(heads), dtype=torch.float64) for _ in range(2))
    for done, contrast in enumerate(contrasts, 1):
        others = torch.tensor(sorted(set(candidates) - {contrast.answer}))
        if not len(others):
            raise HeadpatchError("path patching needs candidates beside the answer")
        begun = model.begin([contrast.prompt])
        clean, foreign = (last_outputs(model, found, [0]) for found in (begun, model.begin([contrast.other])))
        with torch.no_grad():
            before = model.run(begun, [0]).double().cpu()
            parts = []
            for start in range(0, len(heads), ROWS):
                some = heads[start : start + ROWS]
                parts.append(model.run(begun, [0] * len(some), _senders(some, clean, foreign)).double().cpu())
        after = torch.cat(parts)
        gap, gaps = (x[:, contrast.answer] - x[:, others].mean(1) for x in (before, after))
        change += gaps - gap
        relative += (after[:, contrast.answer] - before[:, contrast.answer]) / before[:, contrast.answer]
        if progress is not None:
            progress(done, len(contrasts))
    names = [f"{layer}.{h}" for layer, h in heads]
    by_head = [dict(zip(names, (x / len(contrasts)).tolist(), strict=True)) for x in (change, relative)]
    return PathEffects(by_head[0], by_head[1], len(contrasts))


def last_outputs(model: LastTokens, beginnings: Beginnings, rows: Sequence[int]) -> list[Tensor]:
    """Head outputs at the last tokens of some prompts: per layer [n, H, d]."""
    found: dict[int, Tensor] = {}

    def note(layer: int, o: Tensor) -> Tensor:
        found[layer] = o.detach()
        return o

    with torch.no_grad():
        model.run(beginnings, rows, note)
    return [found[layer] for layer in sorted(found)]


def _senders(heads: Sequence[tuple[int, int]], clean: Sequence[Tensor], foreign: Sequence[Tensor]) -> Edit:
    """Row i: all heads as in `clean`, but the i-th of `heads` as in `foreign`."""

    def edit(layer: int, o: Tensor) -> Tensor:
        held = clean[layer].expand_as(o).clone()
        for row, (at, head) in enumerate(heads):
            if at == layer:
                held[row, head] = foreign[layer][0, head]
        return held

    return edit


def knocked_out(heads: Collection[str], means: Sequence[Tensor]) -> Edit:
    """The edit that puts the mean of a head's outputs, per layer [H, d], in place of what these heads (``layer.head``) say."""
    at: dict[int, list[int]] = {}
    for head in heads:
        layer, h = map(int, head.split("."))
        at.setdefault(layer, []).append(h)

    def edit(layer: int, o: Tensor) -> Tensor:
        if layer not in at:
            return o
        index = torch.tensor(at[layer], device=o.device)
        return o.index_copy(1, index, means[layer].index_select(0, index).to(o.dtype).expand(len(o), -1, -1))

    return edit
