"""Long plain text to hide things in: from the user's file, or from a generator that never runs dry.

The generator is a small grammar written for this project: people of a made-up valley who carry, mend, count and talk about the
weather. It has no digits and no statement of the kind that needles make, so that a needle is the only answer to its question. The
same seed gives the same text on every machine.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headpatch.errors import HeadpatchError

__all__ = ["Haystack", "generated", "load_haystack", "split_sentences"]

PEOPLE = (
    "the miller", "an old fisherman", "the schoolteacher", "my neighbour", "the ferryman", "a travelling tailor",
    "the baker's daughter", "the youngest of the carpenters", "a woman from the upper village", "the postman", "the widow next door",
    "the man who kept the bees", "a student of botany", "the bell-ringer", "two brothers from the coast", "the innkeeper",
    "the doctor's assistant", "a surveyor", "the girl who sold apples", "the night watchman",
)  # fmt: skip
ACTIONS = (
    "carried {thing} {place}", "mended {thing} {time}", "looked for {thing} {place}", "spoke at length about {topic}",
    "said little about {topic}", "bought {thing} from a stranger {place}", "left {thing} {place} and went on",
    "had been waiting {place} {time}", "made a drawing of {thing}", "sat {place} and thought about {topic}",
    "found {thing} {place}, covered with leaves", "gave {thing} to a cousin {time}", "walked past {thing} without a word",
    "washed {thing} in the stream", "promised to write about {topic}", "counted the swallows {place}",
    "asked everybody {place} about {topic}", "wrapped {thing} in a cloth {time}", "told a long story about {topic}",
    "slept badly {time}", "swept the floor {place} {time}", "changed the talk to {topic} {time}",
)  # fmt: skip
THINGS = (
    "a basket of pears", "the broken lantern", "a bundle of willow twigs", "an umbrella with a bone handle", "the heavy ledger",
    "a jar of pickled onions", "three planks of oak", "a saddle that was too small", "the church candlesticks", "a coil of rope",
    "the blue coat", "an empty birdcage", "a sack of barley", "the second-best kettle", "a pair of wooden shoes", "the old accordion",
    "a letter without a stamp", "the wheel of a cart", "a painted chair", "some yards of linen",
)  # fmt: skip
PLACES = (
    "by the mill pond", "behind the chapel", "on the road to the pass", "under the lime trees", "in the back room of the inn",
    "near the weir", "at the edge of the quarry", "in front of the dairy", "on the stone bridge", "along the towpath",
    "beside the sheepfold", "in the loft above the stable", "at the corner of the market", "where the two streams meet",
    "on the bench outside the forge", "between the orchard and the wall",
)  # fmt: skip
TIMES = (
    "before breakfast", "late in the afternoon", "while the others were at the fair", "on the first dry day", "after the rain",
    "in the week of the harvest", "when the bells had stopped", "during the long frost", "at dusk", "the morning after the storm",
    "toward the end of spring", "as soon as the snow was gone",
)  # fmt: skip
TOPICS = (
    "the price of hay", "the new schoolhouse", "a cousin who had gone to sea", "the best way to smoke trout",
    "the flood of other years", "the colour of the evening sky", "a quarrel over a hedge", "the health of the grey mare",
    "the music at the wedding", "how to keep mice out of a barn", "the repair of the bridge", "a book about comets",
    "the wind from the north", "a recipe for dark bread", "the manners of townspeople", "the lambs",
)  # fmt: skip
FRAMES = (
    "{Person} {action}.", "{Time}, {person} {action}.", "{Person} {action}, and {person2} {action2}.",
    "{Person} {action}, although {person2} had advised against it.", "It was said that {person} {action}.",
    "Nobody noticed that {person} {action}.", "{Person} {action}; nothing came of it.", "When {person} {action}, {person2} laughed.",
    "{Person} {action}, as people do {place}.", "I remember that {person} {action}.", "{Person} {action} because of {topic}.",
    "Some say that {person} {action}, others that it was {person2}.",
)  # fmt: skip
STILL = (
    "The light fell through the leaves and moved slowly over the ground.", "It was quiet enough to hear the water.",
    "A cart went by, and the dust settled again.", "Smoke rose from the chimneys and stayed above the roofs.",
    "The grass had been cut and smelled of summer.", "Clouds came over the ridge and brought no rain.",
    "Somewhere a door was opened and shut.", "The geese were driven home, one flock after the other.",
    "There was ice along the banks.", "The hens had gone to roost.", "The days were growing shorter.", "Nothing else happened.",
)  # fmt: skip
END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)]))\s+(?=[\"'\u201c\u2018(]?[A-ZÀ-ÞА-Я0-9])|\n\s*\n")


@dataclass(frozen=True)
class Haystack:
    """Sentences in their order, from a text or from the generator.

    Attributes
    ----------
    name
        For provenance: the file's name, or ``generated``.
    sha256
        Of the file; None for the generator.
    sentences
        Of the file; empty for the generator.
    """

    name: str
    sha256: str | None = None
    sentences: tuple[str, ...] = ()

    def draw(self, rng: random.Random, characters: int) -> list[str]:
        """Sentences that follow each other, at least so many characters together: from a random place of the text.

        Raises
        ------
        HeadpatchError
            The text is shorter than that.
        """
        if not self.sentences:
            return _take(_stories(rng), characters)
        total = sum(len(s) + 1 for s in self.sentences)
        if total < characters:
            raise HeadpatchError(
                f"{self.name}: has {total} characters, and about {characters} are needed; give a longer text or ask for "
                "shorter prompts"
            )
        # Starts after which enough is left.
        left, last = 0, len(self.sentences)
        while left < characters:
            last -= 1
            left += len(self.sentences[last]) + 1
        return _take(iter(self.sentences[rng.randint(0, last) :]), characters)

    def about(self) -> dict[str, Any]:
        """For provenance."""
        return {"text": self.name} if self.sha256 is None else {"text": self.name, "sha256": self.sha256}


generated = Haystack("generated")
"""The generator."""


def load_haystack(path: str | Path | None) -> Haystack:
    """A text file (UTF-8) cut into sentences; None gives the generator.

    Raises
    ------
    HeadpatchError
        The file cannot be read, or holds no sentence.
    """
    if path is None:
        return generated
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadpatchError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    sentences = split_sentences(text)
    if not sentences:
        raise HeadpatchError(f"{path}: holds no text")
    return Haystack(path.name, hashlib.sha256(raw).hexdigest(), sentences)


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences of a text, white space made plain. A rule of thumb: after a full stop and before a capital, or at a blank line."""
    return tuple(s for part in END.split(text) if part and (s := " ".join(part.split())))


def _take(sentences: Iterator[str], characters: int) -> list[str]:
    found, length = [], 0
    while length < characters:
        found.append(next(sentences))
        length += len(found[-1]) + 1
    return found


def _stories(rng: random.Random) -> Iterator[str]:
    while True:
        if rng.random() < 0.12:
            yield rng.choice(STILL)
        else:
            yield _sentence(rng)


def _sentence(rng: random.Random) -> str:
    person, other = rng.sample(PEOPLE, 2)
    slots = {
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
        "topic": rng.choice(TOPICS),
        "person": person,
        "person2": other,
    }
    first, second = (
        rng.choice(ACTIONS).format(
            thing=rng.choice(THINGS), place=rng.choice(PLACES), time=rng.choice(TIMES), topic=rng.choice(TOPICS)
        )
        for _ in range(2)
    )
    slots |= {"action": first, "action2": second, "Person": _capital(person), "Time": _capital(slots["time"])}
    return rng.choice(FRAMES).format(**slots)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
