"""Prompts with something hidden in them: a needle at a depth of a long text, or several passkeys, and questions about them.

    intro, text [needle at depth x of it] text ..., question, "Answer:"            (one user turn of the chat template, if asked for)

Three kinds of needle, all made by a seeded generator, or one from the caller: ``fact`` (where the spare key of a building is kept: a
phrase of some ten tokens to be copied), ``number`` (five digits) and ``words`` (words of the spelling alphabet). Texts are cut at the
end of a sentence, so a prompt is at most as long as was asked for and up to a sentence shorter; a needle stands between sentences.

Needles in a haystack: G. Kamradt's test; passkeys: Mohtashami and Jaggi, arXiv 2305.16300; the many passkeys for DuoAttention: Xiao
et al., arXiv 2410.10819. All sentences here are our own.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.show import short

if TYPE_CHECKING:
    from headpatch.find.engine import Bench
    from headpatch.find.haystack import Haystack

__all__ = [
    "KINDS",
    "ORDINALS",
    "WORDS",
    "Hidden",
    "Needle",
    "Prompt",
    "hide",
    "make_needle",
    "needle_prompt",
    "rng_of",
]

WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike", "november",
    "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
"""The spelling alphabet."""
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)
BUILDINGS = (
    "observatory", "lighthouse", "boathouse", "town hall", "museum", "power station", "greenhouse", "cinema", "swimming pool",
    "railway depot", "opera house", "customs office", "planetarium", "fire station", "ice rink", "zoo",
)  # fmt: skip
COLOURS = (
    "green",
    "yellow",
    "purple",
    "silver",
    "orange",
    "black",
    "pink",
    "brown",
    "turquoise",
    "golden",
    "scarlet",
    "grey",
)
CONTAINERS = (
    "biscuit tin", "flowerpot", "toolbox", "violin case", "teapot", "shoebox", "hatbox", "rain boot", "paint bucket", "pencil case",
    "suitcase", "wine crate", "cake mould", "desk drawer",
)  # fmt: skip
BESIDE = ("behind the", "next to the", "on top of the", "underneath the", "to the left of the", "in front of the")
FURNITURE = (
    "piano", "coffee machine", "fire extinguisher", "photocopier", "trophy cabinet", "aquarium", "sewing machine", "ticket counter",
    "grandfather clock", "wardrobe", "washing machine", "billiard table", "bookcase", "radiator",
)  # fmt: skip
INTRO = "Read the text and answer the question after it.\n\n"


@dataclass(frozen=True)
class Needle:
    """What is hidden, what is asked, and what must be copied: `answer` stands in `sentence`, word for word."""

    sentence: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.answer or self.answer not in self.sentence:
            raise HeadpatchError(f"the needle {short(self.sentence)} does not contain its answer {short(self.answer)}")


@dataclass(frozen=True)
class Hidden:
    """A long prompt, its tokens, and where things are in it.

    Attributes
    ----------
    text, ids
        The whole prompt, special tokens included in `ids`; `special_tokens` says whether they were asked for.
    needles
        Token range of each hidden sentence, as a pair (start, stop), in the order they were given.
    answers
        Token range of each needle's answer inside its sentence; empty ranges where none was given.
    tail
        The token at which what comes after the long text begins.
    """

    text: str
    ids: tuple[int, ...]
    needles: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    tail: int
    special_tokens: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt of one needle: `depth` is 0 at the beginning of the text and 1 at its end; `length` is what was asked for."""

    hidden: Hidden
    needle: Needle
    length: int
    depth: float


def rng_of(*seeds: object) -> random.Random:
    """A random generator that is the same for the same seeds on every machine."""
    return random.Random("/".join(map(str, seeds)))  # noqa: S311


def _fact(rng: random.Random) -> Needle:
    building = rng.choice(BUILDINGS)
    place = f"inside a {rng.choice(COLOURS)} {rng.choice(CONTAINERS)} {rng.choice(BESIDE)} {rng.choice(FURNITURE)}"
    return Needle(
        f"The spare key of the {building} is kept {place}.", f"Where is the spare key of the {building} kept?", place
    )


def _number(rng: random.Random) -> Needle:
    building, number = rng.choice(BUILDINGS), str(rng.randint(10000, 99999))
    return Needle(
        f"The telephone number of the {building} is {number}.",
        f"What is the telephone number of the {building}?",
        number,
    )


def _words(rng: random.Random) -> Needle:
    building, words = rng.choice(BUILDINGS), " ".join(rng.choices(WORDS, k=5))
    return Needle(f"The password of the {building} is {words}.", f"What is the password of the {building}?", words)


KINDS: dict[str, Callable[[random.Random], Needle]] = {"fact": _fact, "number": _number, "words": _words}
"""Generators of needles by name."""


def make_needle(kind: str, rng: random.Random) -> Needle:
    """A needle of one of :data:`KINDS`; HeadpatchError for another kind."""
    if kind not in KINDS:
        raise HeadpatchError(f"no needle {short(kind)}; choose {', '.join(KINDS)}")
    return KINDS[kind](rng)


def needle_prompt(
    bench: Bench,
    haystack: Haystack,
    needle: Needle,
    length: int,
    depth: float,
    rng: random.Random,
    *,
    chat: bool = False,
) -> Prompt:
    """A prompt of at most `length` tokens with one needle at `depth`.

    Raises
    ------
    HeadpatchError
        As :func:`hide`; or a depth outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise HeadpatchError(f"a depth of {depth:g}: depths run from 0 (the beginning of the text) to 1 (its end)")
    tail = f"\n\nQuestion: {needle.question}" + ("" if chat else "\nAnswer:")
    hidden = hide(
        bench, haystack, [(depth, needle.sentence)], length, rng, tail=tail, answers=[needle.answer], chat=chat
    )
    return Prompt(hidden, needle, length, depth)


def hide(
    bench: Bench, haystack: Haystack, sentences: Sequence[tuple[float, str]], length: int, rng: random.Random, *, tail: str,
    answers: Sequence[str] = (), intro: str = INTRO, chat: bool = False,
) -> Hidden:  # fmt: skip
    """A prompt of at most `length` tokens: intro, text with the sentences at their depths, tail.

    Parameters
    ----------
    sentences
        Pairs of depth (0 to 1) and sentence; at equal depths they come in their order.
    length
        Tokens of the whole prompt, at most.
    rng
        Draws the text.
    answers
        What to find inside each sentence.
    chat
        Put everything into a user's turn of the model's chat template.

    Raises
    ------
    HeadpatchError
        The length leaves no room for the text, or is beyond the model's positions; the haystack is too short.
    """

    def assemble(text: Sequence[str], room: Sequence[int]) -> tuple[str, int, list[int]]:
        """The prompt; where its tail begins; where each sentence begins, in characters."""
        total, at = (room[-1] if room else 0), [0] * len(sentences)
        body, pieces = 0, []
        order = sorted(range(len(sentences)), key=lambda i: sentences[i][0])
        places = [bisect.bisect_right(room, sentences[i][0] * total) for i in order]
        for k in range(len(text) + 1):
            for place, i in zip(places, order, strict=True):
                if place == k:
                    at[i] = body
                    pieces.append(sentences[i][1])
                    body += len(sentences[i][1]) + 1
            if k < len(text):
                pieces.append(text[k])
                body += len(text[k]) + 1
        inner = intro + " ".join(pieces)
        whole = bench.chat(inner + tail) if chat else inner + tail
        start = whole.find(inner)
        if start < 0:
            raise HeadpatchError("the chat template changes the text of a message; leave the chat option out")
        return whole, start + len(inner), [start + len(intro) + a for a in at]

    bare = len(bench.encode(assemble((), ())[0], not chat)[0])
    limit = bench.max_length
    if limit is not None and length > limit:
        raise HeadpatchError(f"prompts of {length} tokens were asked for; the model takes {limit}")
    if bare + 32 > length:
        raise HeadpatchError(f"prompts of {length} tokens leave no room for a text: the rest takes {bare}")
    text, room = _cut(bench, haystack, length - bare, rng)
    while True:
        whole, end, starts = assemble(text, room)
        ids, offsets = bench.encode(whole, not chat)
        if len(ids) <= length:
            break
        text, room = text[:-1], room[:-1]  # pieces may need other tokens together than alone
    found = tuple(_tokens(offsets, a, a + len(s)) for a, (_, s) in zip(starts, sentences, strict=True))
    inside = []
    for a, (_, sentence), answer in zip(starts, sentences, answers or [""] * len(sentences), strict=True):
        begin = a + sentence.rindex(answer)
        inside.append(_tokens(offsets, begin, begin + len(answer)) if answer else (0, 0))
    tail_at = next((i for i, (s, e) in enumerate(offsets) if e > end and e > s), len(ids))
    return Hidden(whole, ids, found, tuple(inside), tail_at, not chat)


def _cut(bench: Bench, haystack: Haystack, tokens: int, rng: random.Random) -> tuple[list[str], list[int]]:
    """Sentences of at most so many tokens together, and after how many tokens each of them ends."""
    seed, characters = rng.random(), 5 * tokens
    while True:
        text = haystack.draw(rng_of(seed), characters)
        _, offsets = bench.encode(" ".join(text), False)
        if len(offsets) >= tokens:
            break
        characters = 1 + characters * max(2 * tokens // max(1, len(offsets)), 2)
    ends = [e for _, e in offsets]
    kept, room, character = [], [], 0
    for sentence in text:
        character += len(sentence)
        count = bisect.bisect_right(ends, character)
        if count > tokens:
            break
        kept.append(sentence)
        room.append(count)
        character += 1
    return kept, room


def _tokens(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens that hold characters start..stop."""
    inside = [i for i, (s, e) in enumerate(offsets) if s < stop and e > start and e > s]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def parse_numbers(text: str, what: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    """Numbers between commas, as given on a command line; HeadpatchError names the option."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise HeadpatchError(f"{what} takes numbers with commas between them; got {short(text)}") from None
