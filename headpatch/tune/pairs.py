r"""Tasks as pairs of question and answer: zero-shot and few-shot prompts of them, what the first answer token is, and scoring.

    Q: {question}\nA: {answer}\n\n   repeated for demonstrations, then   Q: {question}\nA:

A space stands before every question and answer, but not before an answer made of digits alone: with some tokenizers the next token
behind the colon would otherwise be a lone space, the same for every such answer, and nothing could be learned from it. In a chat
template, questions are the user's messages and answers the assistant's.

Source of the format and of the digit rule: github.com/SNU-DRL/Soft_Injection (arXiv 2507.20906) and
github.com/ericwtodd/function_vectors (arXiv 2310.15213).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headpatch.errors import HeadpatchError
from headpatch.find.data import Row
from headpatch.show import short

if TYPE_CHECKING:
    from headpatch.tune.engine import LastTokens, Prompt

__all__ = [
    "Format",
    "Pair",
    "Split",
    "answer_tokens",
    "drawn",
    "exact_match",
    "first_tokens",
    "pairs_of",
    "prefix_match",
    "said",
    "split",
]


class Pair(NamedTuple):
    """One example: text of the question, text of its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Format:
    """How pairs become prompts.

    Attributes
    ----------
    chat
        Put them into the model's chat template.
    question, answer
        What stands before each outside of a chat.
    """

    chat: bool = False
    question: str = "Q:"
    answer: str = "A:"

    def prompt(self, question: str, demonstrations: Sequence[Pair] = ()) -> Prompt:
        """A prompt that ends where the answer begins."""
        if self.chat:
            shown = [m for pair in demonstrations for m in (("user", pair.question), ("assistant", pair.answer))]
            return [*shown, ("user", question)]
        shown_text = "".join(
            f"{self.question} {pair.question}\n{self.answer}{self.said(pair.answer)}\n\n" for pair in demonstrations
        )
        return f"{shown_text}{self.question} {question}\n{self.answer}"

    def said(self, answer: str) -> str:
        """An answer as it stands behind its prompt."""
        return answer if self.chat or (answer.isascii() and answer.isdigit()) else f" {answer}"


class Split(NamedTuple):
    """Three parts of a task's pairs: heads are learned on `train`, the best state is chosen on `valid`, figures are of `test`."""

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]


def pairs_of(rows: Sequence[Row], question: str = "input", answer: str = "output") -> list[Pair]:
    """Pairs from rows of a JSON-lines file (:func:`headpatch.find.data.load_rows`); numbers are written out.

    Raises
    ------
    HeadpatchError
        A row has no text in a field, or an empty answer; the message names file and line.
    """
    found = []
    for row in rows:
        values = []
        for name in (question, answer):
            value = row.fields.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                known = ", ".join(map(str, row.fields)) or "none"
                raise HeadpatchError(f"{row.place}: has no text in field {short(name)}; its fields: {known}")
            values.append(str(value).strip())
        if not values[1]:
            raise HeadpatchError(f"{row.place}: the answer in field {short(answer)} is empty")
        found.append(Pair(*values))
    return found


def split(pairs: Sequence[Pair], seed: int = 0, valid: float = 0.09, test: float = 0.21) -> Split:
    """Pairs in random order, in three parts; the published splits have 70, 9 and 21 percent.

    Raises
    ------
    HeadpatchError
        A part would be empty.
    """
    order = list(pairs)
    random.Random(seed).shuffle(order)  # noqa: S311
    held, checked = round(len(order) * test), round(len(order) * valid)
    if not checked or len(order) - held - checked < 2 or (test and not held):
        raise HeadpatchError(f"{len(order)} pairs are too few for a split into training, validation and test")
    return Split(tuple(order[held + checked :]), tuple(order[held : held + checked]), tuple(order[:held]))


def drawn(pairs: Sequence[Pair], shots: int, prompts: int, seed: int) -> list[tuple[list[Pair], Pair]]:
    """So many times, `shots` different demonstrations and one more pair, at random.

    Raises
    ------
    HeadpatchError
        There are fewer pairs than that.
    """
    if len(pairs) < shots + 1:
        raise HeadpatchError(
            f"{shots} demonstrations and a question need {shots + 1} training pairs; there are {len(pairs)}"
        )
    rng = random.Random(f"prompts {seed}")  # noqa: S311
    found = []
    for _ in range(prompts):
        *shown, asked = rng.sample(list(pairs), shots + 1)
        found.append((shown, asked))
    return found


def first_tokens(
    model: LastTokens, prompts: Sequence[Prompt], answers: Sequence[str]
) -> tuple[list[tuple[int, ...]], list[int]]:  # fmt: skip
    """Tokens of each prompt, and the first token that its answer (:meth:`Format.said`) adds.

    Raises
    ------
    HeadpatchError
        An answer merges with the end of its prompt into other tokens.
    """
    asked, found = answer_tokens(model, prompts, answers)
    return asked, [tokens[0] for tokens in found]


def answer_tokens(
    model: LastTokens, prompts: Sequence[Prompt], answers: Sequence[str], line: bool = False
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:  # fmt: skip
    """Tokens of each prompt, and all that its answer adds; with `line`, the end of the answer's line (in a chat: turn) among them.

    Raises
    ------
    HeadpatchError
        As :func:`first_tokens`.
    """
    asked, joint = model.encode(prompts), model.encode(prompts, answers, line)
    found = []
    for ids, whole, answer in zip(asked, joint, answers, strict=True):
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise HeadpatchError(
                f"the answer {short(answer)} merges with the end of its prompt into other tokens, so that its first token cannot be "
                "told with this tokenizer; choose another format"
            )
        found.append(whole[len(ids) :])
    return asked, found


def said(text: str) -> str:
    """What a continuation says: up to the end of the line or a bracket, without spaces around it."""
    return text.partition("\n")[0].partition("(")[0].strip()


def prefix_match(text: str, answer: str, case: bool = False) -> bool:
    """The published score: what is said begins with the answer. "cats" counts for "cat"."""
    begun = said(text)[: len(answer)]
    return begun == answer if case else begun.lower() == answer.lower()


def exact_match(text: str, answer: str, case: bool = False) -> bool:
    """What is said is the answer, a full stop behind it aside."""
    whole = text.partition("\n")[0].strip()
    whole = whole if answer.endswith(".") else whole.removesuffix(".")
    return whole == answer if case else whole.lower() == answer.lower()
