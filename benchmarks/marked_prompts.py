"""Prompts in which a marked sentence is to be followed, for measuring methods that steer heads towards a caller's spans.

    python benchmarks/marked_prompts.py          # writes benchmarks/data/marked_*.jsonl again

Every sentence was written for this, before anything was measured on it. Two kinds:

* ``notes``: two people say two different things; the same prompt comes twice, once with each statement marked, so that nothing but
  the mark says which answer is wanted. A model that is not told of the mark cannot be right in both: untouched, at most half.
* ``facts``: the marked sentence contradicts what everybody knows (snow is purple there); the answer is what the sentence says.

Train and test share no name, thing, event or place, and some ways of asking are in the test file only.
The first time that test things come round is a file of its own, for machines on which all test rows take too long.
A row: ``text`` (the prompt), ``span`` (the marked part of it), ``label``, ``kind``, ``scene`` (rows of one scene go together).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LABELS = ", ".join((*COLOURS, *DAYS))
"""As ``--labels`` of the command line takes them: seventeen answers, whatever the question."""

NAMES = {
    "train": ("Anna", "Tom", "Clara", "Ben", "Nora", "Paul", "Ida", "Max", "Ruth", "Leo", "Mary", "Jack"),
    "test": ("Emma", "Oscar", "Lucy", "Hugo", "Alice", "Felix", "Vera", "Simon", "Grace",
        "Martin", "Julia", "Peter", "Helen", "David"),
}  # fmt: skip
THINGS = {
    "train": (
        "the gate", "the old boat", "the kitchen door", "the bench", "the lamp", "the suitcase", "the teapot", "the curtain",
        "the bicycle", "the letter box", "the umbrella", "the ladder", "the carpet", "the bucket", "the tent", "the piano",
        "the scarf", "the mug", "the drum", "the shed",
    ),
    "test": (
        "the fence", "the wooden cart", "the garage", "the chair", "the clock", "the backpack", "the vase", "the blanket",
        "the tractor", "the envelope", "the kite", "the wardrobe", "the pillow", "the barrel", "the canoe", "the guitar",
        "the jacket", "the bowl", "the wagon", "the balcony", "the roof", "the notebook", "the towel", "the mailbag", "the sledge",
        "the toolbox", "the window frame", "the lantern", "the basket", "the apron",
    ),
}  # fmt: skip
EVENTS = {
    "train": (
        "the choir rehearsal", "the market", "the swimming lesson", "the town meeting", "the delivery", "the chess evening",
        "the dentist appointment", "the book sale", "the fire drill", "the garden party",
    ),
    "test": (
        "the concert", "the flea market", "the dance class", "the board meeting", "the inspection", "the quiz night",
        "the haircut", "the lantern walk", "the ferry trip", "the picnic", "the exam", "the match", "the open day", "the lecture",
    ),
}  # fmt: skip
# The marked part of each statement stands between the two places where it begins and ends: it is {statement}.
COLOUR_NOTES = {
    "train": (
        ("{a} says that {statement}. ", "{thing} is {x}", "What colour is {thing}? {Thing} is"),
        ("Note from {a}: {statement}.\n", "{thing} was painted {x}", "Question: Which colour was {thing} painted?\nAnswer:"),
        ("{a} remembers it well: {statement}. ", "{thing} was {x}", "So the colour of {thing} was"),
    ),
    "test": (
        ("{a} says that {statement}. ", "{thing} is {x}", "What colour is {thing}? {Thing} is"),
        ("Note from {a}: {statement}.\n", "{thing} was painted {x}", "Question: Which colour was {thing} painted?\nAnswer:"),
        ("{a} wrote in the report: \"{statement}.\"\n", "the colour of {thing} is {x}",
         "According to the report, the colour of {thing} is"),
        ("If you ask {a}, {statement}. ", "{thing} has always been {x}", "Well, what colour is {thing}? It is"),
    ),
}  # fmt: skip
DAY_NOTES = {
    "train": (
        ("{a} says that {statement}. ", "{thing} is on {x}", "On which day is {thing}? {Thing} is on"),
        ("Message from {a}: {statement}.\n", "{thing} was moved to {x}", "Question: On which day is {thing}?\nAnswer: On"),
    ),
    "test": (
        ("{a} says that {statement}. ", "{thing} is on {x}", "On which day is {thing}? {Thing} is on"),
        ("{a} put up a sign: \"{statement}\".\n", "{thing} takes place on {x}", "The day of {thing} is"),
        ("In the calendar of {a}, {statement}. ", "{thing} is entered for {x}", "So we will all go to {thing} on"),
    ),
}  # fmt: skip
KNOWN = {
    "train": {
        "snow": "white", "grass": "green", "coal": "black", "blood": "red", "butter": "yellow", "milk": "white", "chocolate": "brown",
        "the night sky": "black", "ketchup": "red", "spinach": "green", "sea water": "blue", "salt": "white",
    },
    "test": {
        "sugar": "white", "moss": "green", "soot": "black", "tomato soup": "red", "mustard": "yellow", "cream": "white",
        "coffee": "brown", "tar": "black", "lettuce": "green", "flour": "white", "the summer sky": "blue", "cinnamon": "brown",
        "rust": "brown", "honey": "yellow", "broccoli": "green", "ivory": "white", "ink": "black", "carrot juice": "orange",
        "fresh paint on fire engines": "red", "parsley": "green",
    },
}  # fmt: skip
PLACES = {
    "train": ("the valley of Ondra", "Melin Island", "the town of Karst", "the village of Upper Tarn"),
    "test": (
        "the plain of Sorel",
        "Brandt Island",
        "the harbour of Quill",
        "the hamlet of Low Fennet",
        "the district of Arvo",
    ),
}
FACTS = {
    "train": (
        ("In {place} many things are different. {statement}. Visitors are always surprised. ", "In {place}, {thing} is {x}",
         "What colour is {thing} in {place}? There, {thing} is"),
        ("From a guide to {place}: {statement}.\n", "{thing} is {x} here", "Question: What colour is {thing} in {place}?\nAnswer:"),
    ),
    "test": (
        ("In {place} many things are different. {statement}. Visitors are always surprised. ", "In {place}, {thing} is {x}",
         "What colour is {thing} in {place}? There, {thing} is"),
        ("From a guide to {place}: {statement}.\n", "{thing} is {x} here", "Question: What colour is {thing} in {place}?\nAnswer:"),
        ("A traveller came back from {place} with a strange tale: {statement}. ", "over there, {thing} is {x}",
         "By that tale, the colour of {thing} is"),
    ),
}  # fmt: skip

Row = dict[str, str]


def notes(
    part: str, things: tuple[str, ...], values: tuple[str, ...], forms: tuple[tuple[str, str, str], ...], rng: random.Random
) -> Iterator[Row]:  # fmt: skip
    """Each thing once, in the forms by turns; two rows a scene."""
    for number, thing in enumerate(things):
        around, statement, question = forms[number % len(forms)]
        people, answers = rng.sample(NAMES[part], 2), rng.sample(values, 2)
        said = [statement.format(thing=thing, x=x) for x in answers]
        lines = [around.format(a=a, statement=s) for a, s in zip(people, said, strict=True)]
        text = "".join(lines) + question.format(thing=thing, Thing=thing[0].upper() + thing[1:])
        for marked, answer in zip(said, answers, strict=True):
            yield {"text": text, "span": marked, "label": answer, "kind": "notes", "scene": f"{part}: {thing}"}


def facts(part: str, rng: random.Random) -> Iterator[Row]:
    """Each known thing once, in another colour than its own."""
    for number, (thing, true) in enumerate(KNOWN[part].items()):
        around, statement, question = FACTS[part][number % len(FACTS[part])]
        place, colour = rng.choice(PLACES[part]), rng.choice([c for c in COLOURS if c != true])
        marked = statement.format(place=place, thing=thing, x=colour)
        text = around.format(place=place, statement=marked) + question.format(place=place, thing=thing)
        yield {"text": text, "span": marked, "label": colour, "kind": "facts", "scene": f"{part}: {thing}"}


FILES = {"train": ("train", 3), "test": ("test", 3), "test_first_round": ("test", 1)}
"""Files: rows of which part, and how many rounds of them."""


def rows(part: str, rounds: int = 3) -> list[Row]:
    """Rows of ``train`` or ``test``: things come round several times, with other people and colours each time."""
    rng = random.Random(part)
    found: list[Row] = []
    for round_ in range(rounds):
        shift = rng.sample(THINGS[part], len(THINGS[part])), rng.sample(EVENTS[part], len(EVENTS[part]))
        made = [
            *notes(part, tuple(shift[0]), COLOURS, COLOUR_NOTES[part], rng),
            *notes(part, tuple(shift[1]), DAYS, DAY_NOTES[part], rng), *facts(part, rng),
        ]  # fmt: skip
        found += [{**row, "scene": f"{row['scene']} {round_}"} for row in made]
    return list({(row["text"], row["span"]): row for row in found}.values())  # the same prompt may come by chance


def main() -> None:
    folder = Path(__file__).parent / "data"
    for name, (part, rounds) in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows(part, rounds))
        (folder / f"marked_{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
