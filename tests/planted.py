"""A world in which the right recipe is known: a tiny Llama, a tokenizer of whole words, and labels that the model itself would give
if a secret recipe were on it.

Calibrations must find a gain there, and none where the labels are shuffled.
"""

from __future__ import annotations

import functools
import random
from typing import Any

from zoo import ZOO

from headpatch.find.data import Row, Task
from headpatch.find.engine import open_bench
from headpatch.recipe import Recipe

WORDS = (
    "negative", "positive", "sentiment", "review", "film", "good", "bad", "long", "short", "slow", "quick", "bright", "dark",
    *(f"word{i}" for i in range(70)),
)  # fmt: skip
TASK = Task(("review {text} sentiment",), {"no": " negative", "yes": " positive"})
SECRET = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"0.3": 0.01, "0.1": 0.05}}]}
TEXTS = tuple(" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(4))


@functools.cache
def tokenizer() -> Any:
    """One token per word, after a first token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("<pad>", "<s>", "<unk>", *WORDS))}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")


def model() -> Any:
    """A fresh copy of the zoo's Llama, whose first token is a sink."""
    return ZOO["llama"].build()


def rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of random words, without labels."""
    rng = random.Random(seed)
    return [Row({"text": " ".join(rng.choices(WORDS[4:], k=rng.randint(4, 14)))}, f"rows:{i}") for i in range(count)]


@functools.cache
def _labelled(count: int, seed: int) -> tuple[Row, ...]:
    found = rows(count, seed)
    bench = open_bench(model(), tokenizer())
    questions = bench.questions(TASK.prompts(found), list(TASK.labels.values()))
    outcome = next(iter(bench.run([Recipe.from_dict(SECRET)], questions)))[1]
    yes = outcome.whole[:, 1] > outcome.whole[:, 0]
    return tuple(
        Row({**r.fields, "label": "yes" if y else "no"}, r.place) for r, y in zip(found, yes.tolist(), strict=True)
    )


def labelled(count: int, seed: int = 0) -> list[Row]:
    """Rows whose labels are what the model says under the secret recipe."""
    return list(_labelled(count, seed))


def shuffled(count: int, seed: int = 0) -> list[Row]:
    """The same rows with their labels in random order."""
    found = labelled(count, seed)
    labels = [r.fields["label"] for r in found]
    random.Random(seed + 100).shuffle(labels)
    return [Row({**r.fields, "label": label}, r.place) for r, label in zip(found, labels, strict=True)]
