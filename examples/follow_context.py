"""Where the recipe smollm2-135m-instruct/follow-context comes from: finds its heads, and measures what it does.

    python examples/follow_context.py             # measure the shipped recipe; prints its provenance's numbers
    python examples/follow_context.py --choose    # find the heads again, from nothing, and print the recipe

The question is the one of Yu, Merullo and Pavlick (arXiv 2310.15910): a text states something that contradicts what a model
remembers; which of the two does it answer with? A small model mostly repeats what it remembers. Heads are chosen by the gradient
of log p(text's answer) - log p(remembered answer) with respect to the heads' strengths, on 15 countries and two phrasings: one
backward pass ranks all 270 heads. Everything reported is measured on 30 other countries, with a third phrasing as well, and on
a neutral text that has nothing to do with either.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import smollm2
import torch
import yaml

import headpatch

RECIPE = "smollm2-135m-instruct/follow-context"
SEEN = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Egypt": "Cairo", "Greece": "Athens", "Cuba": "Havana",
    "Portugal": "Lisbon", "Norway": "Oslo", "China": "Beijing", "Kenya": "Nairobi", "Denmark": "Copenhagen",
    "Thailand": "Bangkok", "Iran": "Tehran", "Belgium": "Brussels", "Mexico": "Mexico City",
}  # fmt: skip
HELD_OUT = {
    "Poland": "Warsaw", "Italy": "Rome", "Spain": "Madrid", "Russia": "Moscow", "Austria": "Vienna", "Peru": "Lima",
    "Ireland": "Dublin", "Sweden": "Stockholm", "South Korea": "Seoul", "Hungary": "Budapest", "Finland": "Helsinki",
    "Turkey": "Ankara", "Iraq": "Baghdad", "England": "London", "Argentina": "Buenos Aires", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade", "Iceland": "Reykjavik", "Chile": "Santiago",
    "Colombia": "Bogota", "Venezuela": "Caracas", "Canada": "Ottawa", "Indonesia": "Jakarta", "Nepal": "Kathmandu",
    "Switzerland": "Bern", "Ukraine": "Kiev", "Vietnam": "Hanoi", "Lebanon": "Beirut",
}  # fmt: skip
PHRASINGS = (
    (
        "Text: In 2090 the government of {country} moved to {stated}, which has been the capital of {country} since.\n"
        "Question: What is the capital of {country}?\nAnswer with one word."
    ),
    "{stated} became the capital of {country} after the great reform. Now tell me: what is the capital of {country}?",
)
NEW_PHRASING = "According to this leaflet, {stated} is the capital of {country}. What is the capital of {country}?"
NEUTRAL = """The old bridge had been closed since the spring flood. Every morning the baker crossed the river by the ferry, a flat \
boat that smelled of rope and tar, and every evening she came back with an empty basket. The ferryman never asked for money. He \
liked the bread, and he liked to hear what people in the other half of the town were saying. In winter, when the water was low, \
he let the boat rest on the bank and repaired its planks one after the other, so that after some years no part of it was older \
than his youngest child. Is it still the same boat, the baker asked him once. He thought about it while the current pushed them \
gently sideways. It carries the same people, he said, and it still leaks in the same place.

Measuring the height of a tree does not require climbing it. Hold a stick upright at arm's length, so that the part above your \
hand is as long as the distance from your hand to your eye. Walk backwards until the top of the stick and the top of the tree \
line up. The distance from you to the trunk, plus the height of your eyes, is then close to the height of the tree. The method \
works because the two triangles have the same angles, and it works best on level ground. On a slope, measure twice, once from \
above and once from below, and take the mean.

A choir does not need a conductor to keep time, but it needs one to breathe. When thirty people take air wherever they run out \
of it, the line falls apart into thirty lines. The conductor's raised hand says, a moment before it matters, that the next word \
will begin together. Good choirs learn to hear this hand even with their eyes closed: they listen to the breath of the person \
beside them, who listens to the next, until the whole row leans forward by a finger's width and starts."""


def questions(capitals: dict[str, str], phrasings: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """(prompt, country, stated capital, remembered capital); each country is given another one's capital."""
    countries, cities = list(capitals), list(capitals.values())
    return [
        (phrasing.format(country=country, stated=stated), country, stated, capitals[country])
        for phrasing in phrasings
        for i, country in enumerate(countries)
        for stated in [cities[(i + 4) % len(cities)]]
    ]


def chat(tokenizer: Any, prompts: list[str], answers: list[str] | None = None) -> Any:
    """A left-padded batch of chat prompts; `answers` begin the model's turn."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True) + a
        for p, a in zip(prompts, answers or [""] * len(prompts), strict=True)
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def preference(model: Any, tokenizer: Any, asked: list[tuple[str, str, str, str]]) -> torch.Tensor:
    """Compare the two answers: log p(stated) - log p(remembered) of each question, [n], compared by the cities' first tokens."""
    batch = chat(tokenizer, [q[0] for q in asked], [f"The capital of {q[1]} is" for q in asked])
    stated, remembered = ([tokenizer(f" {q[i]}").input_ids[0] for q in asked] for i in (2, 3))
    logits = model(**batch, logits_to_keep=1).logits[:, -1]
    rows = range(len(asked))
    return logits[rows, stated] - logits[rows, remembered]


@torch.no_grad()
def answered(model: Any, tokenizer: Any, asked: list[tuple[str, str, str, str]]) -> dict[str, int]:
    """Greedy answers, 20 tokens: how many name the stated capital only, the remembered one only, or neither or both."""
    batch = chat(tokenizer, [q[0] for q in asked])
    out = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch.input_ids.shape[1] :]
    count = {"from_text": 0, "from_memory": 0, "other": 0}
    for (_, _, stated, remembered), text in zip(asked, tokenizer.batch_decode(out), strict=True):
        found = (stated in text, remembered in text)
        count["from_text" if found == (True, False) else "from_memory" if found == (False, True) else "other"] += 1
    return count


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str = NEUTRAL) -> float:
    """Perplexity of a text after the model's first token."""
    ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt", add_special_tokens=False).input_ids
    return math.exp(model(ids, labels=ids).loss.item())


def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The numbers of the recipe's provenance, for the model as it is now."""
    asked = questions(HELD_OUT, (*PHRASINGS, NEW_PHRASING))
    return {**answered(model, tokenizer, asked), "perplexity": round(perplexity(model, tokenizer), 2)}


def gradients(model: Any, tokenizer: Any, method: str, strength: str) -> dict[str, float]:
    """Derivative of the mean preference with respect to every head's strength, at the identity; one backward pass."""
    everywhere = {"headpatch": 1, "patches": [{"method": method, "heads": ["*.*"], strength: 1.0}]}
    with headpatch.applied(model, everywhere) as handle:
        strengths = handle.strengths(trainable=True)
        preference(model, tokenizer, questions(SEEN, PHRASINGS)).mean().backward()
    return {
        f"{name.rsplit('.', 1)[1]}.{head}": value
        for name, tensor in strengths.items()
        for head, value in enumerate(tensor.grad.tolist())
    }


def choose(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The recipe's patches: the three heads that hold on hardest to what is remembered are scaled to 0, and of the six heads
    where ZeroTuning would move most the four others get gamma 3 or 0.3.
    """
    scale = gradients(model, tokenizer, "head_scaling", "scale")
    silenced = sorted(scale, key=scale.__getitem__)[:3]
    gamma = gradients(model, tokenizer, "zerotuning", "gamma")
    moved = [head for head in sorted(gamma, key=lambda h: -abs(gamma[h]))[:6] if head not in silenced]
    return {
        "headpatch": 1,
        "patches": [
            {"method": "zerotuning", "heads": {head: 3.0 if gamma[head] > 0 else 0.3 for head in moved}},
            {"method": "head_scaling", "heads": silenced, "scale": 0.0},
        ],
    }


def main() -> None:
    """Measure, or choose and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--choose", action="store_true", help="find the heads again instead of taking the shipped recipe"
    )
    parser.add_argument("--model", help="folder of the converted model; default: the cache")
    options = parser.parse_args()
    model, tokenizer = smollm2.load(options.model, say=print)
    recipe = choose(model, tokenizer) if options.choose else RECIPE
    if options.choose:
        print(yaml.safe_dump(recipe, sort_keys=False))
    print("baseline", measure(model, tokenizer))
    with headpatch.applied(model, recipe):
        print("patched ", measure(model, tokenizer))


if __name__ == "__main__":
    main()
