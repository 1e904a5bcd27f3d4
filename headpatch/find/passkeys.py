"""Samples for telling retrieval heads from streaming heads: a long text with several passkeys in it, asked for one after the other.

The text ends, then each passkey's question and its words follow; the positions of that tail are where heads are compared. All texts
and words are generated from the seed and the number of the sample alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headpatch.errors import HeadpatchError
from headpatch.find.needles import ORDINALS, WORDS, Hidden, hide, rng_of

if TYPE_CHECKING:
    from headpatch.find.engine import Bench
    from headpatch.find.haystack import Haystack

__all__ = ["Passkeys", "sample"]

INTRO = "Keep in mind every pass phrase of the archive that this long text mentions.\n\n"


@dataclass(frozen=True)
class Passkeys:
    """What samples look like.

    Attributes
    ----------
    shortest, longest, lengths
        Tokens of a whole sample: drawn from so many values, evenly spaced.
    count, words
        Passkeys of a sample, and words of the spelling alphabet in each.
    shallowest, deepest
        Depths in the text that passkeys may have, on a grid of a thousand.
    chat
        Put the text into a user's turn of the model's chat template, and the tail behind it.
    seed
        Of everything.
    """

    shortest: int = 1000
    longest: int = 32000
    lengths: int = 50
    count: int = 10
    words: int = 32
    shallowest: float = 0.05
    deepest: float = 0.95
    chat: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(ORDINALS) or self.words < 1:
            raise HeadpatchError(
                f"1 to {len(ORDINALS)} passkeys of at least one word; got {self.count} of {self.words}"
            )
        if not 0 < self.shortest <= self.longest or self.lengths < 1:
            raise HeadpatchError(
                f"lengths from {self.shortest} to {self.longest} in {self.lengths} steps make no sense"
            )

    def length(self, number: int) -> int:
        """Tokens of sample `number`, at most."""
        steps = self.lengths - 1
        at = rng_of(self.seed, number, "length").randint(0, steps)
        return self.longest if not steps else self.shortest + round(at * (self.longest - self.shortest) / steps)


def sample(bench: Bench, haystack: Haystack, keys: Passkeys, number: int) -> tuple[Hidden, range]:
    """Sample `number`, and the positions whose hidden states are compared: the tail's, questions and answers.

    Raises
    ------
    HeadpatchError
        The sample does not fit into its length, or into the model.
    """
    rng = rng_of(keys.seed, number)
    grid = rng.sample(range(1000), keys.count)
    depths = sorted(keys.shallowest + (keys.deepest - keys.shallowest) * g / 999 for g in grid)
    phrases = [" ".join(rng.choices(WORDS, k=keys.words)) for _ in depths]
    hidden = [
        (d, f"The {ORDINALS[i]} pass phrase of the archive is: {p}.")
        for i, (d, p) in enumerate(zip(depths, phrases, strict=True))
    ]
    asked = "\n".join(
        f"Question: What is the {ORDINALS[i]} pass phrase of the archive?\nAnswer: {p}." for i, p in enumerate(phrases)
    )
    found = hide(
        bench,
        haystack,
        hidden,
        keys.length(number),
        rng,
        tail=f"\n\n{asked}",
        intro=INTRO,
        answers=phrases,
        chat=keys.chat,
    )
    return found, range(found.tail, len(found.ids))
