"""What a model answers to a task's questions: zero-shot, behind demonstrations, and with head outputs at the last token edited."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.find.stats import Estimate, wilson
from headpatch.resolve import resolve
from headpatch.tune.pairs import Format, Pair, exact_match, first_tokens, prefix_match

if TYPE_CHECKING:
    from headpatch.recipe import Recipe
    from headpatch.tune.engine import Beginnings, Edit, LastTokens

__all__ = ["Answers", "Questions", "answers", "edit_of", "few_shot_answers", "questions"]

ROWS, LONG_ROWS = 64, 16
"""Prompts that are answered at once: zero-shot ones, and those with demonstrations, whose keys and values are many."""
LONGEST = 20
"""Tokens of an answer, at most."""


@dataclass(frozen=True)
class Questions:
    """Zero-shot prompts of pairs, up to their last token.

    Attributes
    ----------
    pairs, prompts
        The pairs, and their prompts.
    firsts
        [n] the first token of each answer.
    tokens
        How many tokens decide whether a continuation is the answer: those of the longest answer, and two more.
    """

    pairs: tuple[Pair, ...]
    prompts: Beginnings
    firsts: Tensor
    tokens: int

    @property
    def length(self) -> float:
        """Mean tokens of a prompt."""
        return float(self.prompts.lengths.double().mean())


@dataclass(frozen=True)
class Answers:
    """What was said to questions: 1 or 0 for each, by both scores, and the mean length of the prompts in tokens."""

    prefix: tuple[int, ...]
    exact: tuple[int, ...]
    prompt_tokens: float

    @classmethod
    def of(cls, texts: Sequence[str], pairs: Sequence[Pair], prompt_tokens: float, case: bool = False) -> Answers:
        """Score texts by :func:`~headpatch.tune.pairs.prefix_match` and :func:`~headpatch.tune.pairs.exact_match`."""
        both = list(zip(texts, (pair.answer for pair in pairs), strict=True))
        return cls(
            tuple(int(prefix_match(text, answer, case)) for text, answer in both),
            tuple(int(exact_match(text, answer, case)) for text, answer in both), prompt_tokens,
        )  # fmt: skip

    @property
    def accuracy(self) -> tuple[Estimate, Estimate]:
        """(prefix match, exact match) with 95 % intervals."""
        return wilson(sum(self.prefix), len(self.prefix)), wilson(sum(self.exact), len(self.exact))


def questions(model: LastTokens, pairs: Sequence[Pair], style: Format) -> Questions:
    """Zero-shot prompts of pairs, ready to be answered under edits."""
    prompts, said = [style.prompt(p.question) for p in pairs], [style.said(p.answer) for p in pairs]
    ids, firsts = first_tokens(model, prompts, said)
    longest = max(len(whole) - len(own) for own, whole in zip(ids, model.encode(prompts, said), strict=True))
    begun = model.begin(ids)
    return Questions(tuple(pairs), begun, torch.tensor(firsts, device=begun.last.device), min(LONGEST, longest + 2))


def answers(model: LastTokens, prompts: Beginnings, edit: Edit | None, tokens: int) -> list[str]:
    """Greedy answers of one line to prompts, with head outputs at their last tokens edited."""
    texts = []
    size = ROWS * model.wider
    for start in range(0, len(prompts), size):
        rows = range(start, min(len(prompts), start + size))
        texts += [model.decode(found) for found in model.answer(prompts, rows, edit, tokens, model.ends)]
    return texts


def few_shot_answers(
    model: LastTokens, asked: Questions, train: Sequence[Pair], style: Format, *, shots: int, draws: int, seed: int
) -> tuple[list[str], float]:  # fmt: skip
    """Answers behind demonstrations, and the mean length of those prompts in tokens.

    Parameters
    ----------
    draws
        How often demonstrations are drawn: each draw serves a part of the questions, whose prompts share it.
    """
    rng, texts, lengths = random.Random(f"ICL {seed}"), [""] * len(asked.pairs), []  # noqa: S311
    groups: list[tuple[list[int], list[tuple[int, ...]]]] = []
    for draw in range(min(draws, len(asked.pairs))):
        rows = list(range(draw, len(asked.pairs), draws))
        shown = rng.sample(list(train), shots)
        ids = model.encode([style.prompt(asked.pairs[i].question, shown) for i in rows])
        lengths += [len(own) for own in ids]
        if (
            len(rows) == 1 and groups and len(groups[-1][0]) < LONG_ROWS * model.wider
        ):  # nothing to share: batches of whole prompts
            groups[-1][0].extend(rows)
            groups[-1][1].extend(ids)
        else:
            groups.append((rows, ids))
    for rows, ids in groups:
        same = (len(set(column)) == 1 for column in zip(*(own[:-1] for own in ids), strict=False))
        shared = next((k for k, alike in enumerate(same) if not alike), min(map(len, ids)) - 1) if len(rows) > 1 else 0
        for i, text in zip(rows, answers(model, model.begin(ids, shared), None, asked.tokens), strict=True):
            texts[i] = text
    return texts, statistics.mean(lengths)


def edit_of(recipe: Recipe, model: LastTokens) -> Edit:
    """What a recipe of edits at the prompt's last token does there, in the order of its patches."""
    at: dict[int, list[Any]] = {}
    for patch in resolve(recipe, model.shape):
        for layer, heads in patch.heads.items():
            strength = torch.tensor(list(heads.values()))
            factor, shift = patch.method.affine(strength, patch.pick(layer, list(heads)))  # type: ignore[attr-defined]
            at.setdefault(layer, []).append((torch.tensor(list(heads)), factor, shift))

    def edit(layer: int, o: Tensor) -> Tensor:
        for heads, factor, shift in at.get(layer, ()):
            index = heads.to(o.device)
            new = o.index_select(1, index).float() * factor.to(o.device)[:, None] + shift.to(o.device)
            o = o.float().index_copy(1, index, new)
        return o

    return edit
