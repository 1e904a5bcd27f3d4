"""What the small vision-language model says: yes/no answers and captions of scenes, under a recipe or none, and what they are worth.

Shared by tiny_vlm_effects.py and tiny_vlm_sinks.py. Everything goes through the model's own ``generate()``, so that methods which
add rows to its prefill work as they do for users.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headpatch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_vlm"))

from model import PREFIXES, features
from world import COLOURS, SHAPES, WORDS, Scenes, World, encode

CHUNK = 500
YES, NO, END, IMAGE = (WORDS.index(w) for w in ("yes", "no", "</s>", "<image>"))
IMAGE_TOKENS = 64
CAPTION = 34
"""Tokens of the longest caption there can be."""

Recipe = Mapping[str, Any] | None


@dataclass
class Speaker:
    """A model with how it is addressed: the text before the image."""

    model: Any
    prefix: str = "user"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def ids(self, text: Tensor, image: bool = True) -> Tensor:
        """[n, t] prompts from [n, w] ids of what follows the image."""
        before = encode(PREFIXES[self.prefix]) + [IMAGE] * (IMAGE_TOKENS if image else 0)
        return torch.cat([torch.tensor(before, device=text.device).expand(len(text), -1), text], 1)

    def question(self, shape: Tensor) -> Tensor:
        """``is there a SHAPE ? ASSISTANT:`` for each shape [n]."""
        words = [torch.full_like(shape, i) for i in encode("is there a")]
        named = torch.tensor(encode(" ".join(SHAPES)), device=shape.device)[shape]
        return torch.stack([*words, named, *(torch.full_like(shape, i) for i in encode("? ASSISTANT:"))], 1)

    @torch.no_grad()
    def say(self, text: Tensor, pixels: Tensor | None, recipe: Recipe, tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy continuations [n, tokens] and the logits of the first of them [n, vocabulary], in chunks."""
        made, first = [], []
        for start in range(0, len(text), CHUNK):
            part = slice(start, start + CHUNK)
            inputs = {"input_ids": self.ids(text[part], pixels is not None)}
            if pixels is not None:
                inputs["pixel_values"] = pixels[part]
            width = inputs["input_ids"].shape[1]
            on = headpatch.applied(self.model, dict(recipe)) if recipe is not None else contextlib.nullcontext()
            with on:
                out = self.model.generate(
                    **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=tokens, do_sample=False,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            said = out.sequences[:, width:]
            made.append(torch.nn.functional.pad(said, (0, tokens - said.shape[1])))
            first.append(out.logits[0].float())
        return torch.cat(made), torch.cat(first)

    def ask(self, shape: Tensor, pixels: Tensor | None, recipe: Recipe = None) -> Tensor:
        """logit(yes) - logit(no) to ``is there a SHAPE ?``, [n]."""
        logits = self.say(self.question(shape), pixels, recipe, 1)[1]
        return logits[:, YES] - logits[:, NO]

    def describe(self, pixels: Tensor, recipe: Recipe = None) -> Tensor:
        """Captions [n, CAPTION]."""
        words = torch.tensor(encode("describe the image . ASSISTANT:"), device=self.device)
        return self.say(words.expand(len(pixels), -1), pixels, recipe, CAPTION)[0]


def auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive ranks above a negative; ties count half."""
    if not len(positive) or not len(negative):
        return math.nan
    values, places = torch.unique(torch.cat([positive, negative]).double(), return_inverse=True)
    counts = torch.bincount(places, minlength=len(values)).double()
    rank = (counts.cumsum(0) - (counts - 1) / 2)[places]
    wins = float(rank[: len(positive)].sum()) - len(positive) * (len(positive) + 1) / 2
    return wins / (len(positive) * len(negative))


def at_recall(positive: Tensor, negative: Tensor, recall: float) -> float:
    """Share of negatives above the threshold at which this share of the positives is: false yes at equal recall.

    Where zero is such a threshold it is taken, so that a model compared with itself gets its own figure; else the one halfway
    between two positives.
    """
    ordered = positive.sort(descending=True).values
    count = round(recall * len(ordered))
    if int((ordered > 0).sum()) == count:
        threshold = 0.0
    else:
        threshold = float(ordered[max(count - 1, 0)] + ordered[min(count, len(ordered) - 1)]) / 2
    return float((negative > threshold).double().mean())


def negatives(scenes: Scenes, world: World) -> dict[str, Tensor]:
    """Three absent shapes per scene, as POPE chooses them: one at random, the most frequent, the one that most goes with the others.

    Frequencies are the training law's: companions and anchors are frequent; a companion goes with its anchor.
    """
    n = len(scenes.theme)
    row = torch.arange(n, device=scenes.theme.device)
    absent = torch.where(scenes.present, -10.0, 0.0)
    often = absent + 0.01 * world.uniform(n, len(SHAPES))
    frequency = torch.zeros(len(SHAPES), device=often.device)
    frequency[world.companions], frequency[world.anchors] = 0.15, 0.16
    popular = (often + frequency).argmax(1)
    together = often.clone()
    together[row, world.companions[(scenes.theme + 2) % 6]] += 0.35
    together[row, world.anchors[(scenes.theme + 1) % 6]] += 0.35
    together[row, scenes.companion] += 0.9
    return {"random": often.argmax(1), "popular": popular, "adversarial": together.argmax(1)}


def pope(
    speaker: Speaker, scenes: Scenes, pixels: Tensor, world: World, recipe: Recipe, asked: dict[str, Tensor]
) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes over three absent and three present shapes per scene, in percent; with the
    accuracy on each kind of absent shape against the same present ones.
    """
    said = {kind: speaker.ask(shape, pixels, recipe) > 0 for kind, shape in asked.items()}
    right = torch.stack([said[k] for k in said if k.startswith("present")])
    wrong = torch.stack([said[k] for k in said if not k.startswith("present")])
    tp, fp = float(right.sum()), float(wrong.sum())
    found = {
        "accuracy": (tp + wrong.numel() - fp) / (right.numel() + wrong.numel()),
        "precision": tp / max(1.0, tp + fp),
        "recall": tp / right.numel(),
        "f1": 2 * tp / max(1.0, tp + fp + right.numel()),
        "yes": (tp + fp) / (right.numel() + wrong.numel()),
    }
    for kind, answer in said.items():
        if not kind.startswith("present"):
            found[f"accuracy_{kind}"] = 0.5 * (tp / right.numel() + float((~answer).double().mean()))
    return {k: 100 * v for k, v in found.items()}


def pope_questions(scenes: Scenes, world: World) -> dict[str, Tensor]:
    """The six shapes of :func:`pope`: three absent, three present (the same again where there are fewer)."""
    rank = scenes.present + 0.5 * world.uniform(*scenes.present.shape)
    order, count = rank.argsort(1, descending=True), scenes.present.sum(1).clamp_min(1)
    there = {f"present{i}": order.gather(1, (i % count)[:, None])[:, 0] for i in range(3)}
    return {**negatives(scenes, world), **there}


def captions(tokens: Tensor, scenes: Scenes) -> dict[str, float]:
    """CHAIR of captions [n, t], with what it must be read beside: recall, F1, length; in percent where it is a share."""
    words = torch.tensor(encode(" ".join(SHAPES)), device=tokens.device)
    named = tokens[:, :, None] == words
    mentioned, times = named.any(1), named.sum((1, 2))
    false = mentioned & ~scenes.present
    true = float((mentioned & scenes.present).sum())
    row = torch.arange(len(tokens), device=tokens.device)
    return {
        "chair_i": 100 * float(false.sum()) / max(1.0, float(mentioned.sum())),
        "chair_s": 100 * float(false.any(1).double().mean()),
        "recall": 100 * true / float(scenes.present.sum()),
        "f1": 200 * true / max(1.0, float(mentioned.sum() + scenes.present.sum())),
        "false_companion": 100 * float(false[row, scenes.companion].double().mean()),
        "mentions": float(mentioned.sum(1).double().mean()),
        "repeated": 100 * float((times > mentioned.sum(1)).double().mean()),
        "length": float((tokens != 0).sum(1).double().mean()),
        "ended": 100 * float((tokens == END).any(1).double().mean()),
    }


def probe(speaker: Speaker, world: World, batches: int, steps: int) -> Callable[[Tensor, Scenes], Tensor]:
    """What the projected patches show of the companion, whatever the language model makes of it: a small network per patch, its best
    patch taken; returns a function from (pixels, scenes) to logits.
    """

    def seen(scenes: Scenes) -> Tensor:
        with torch.no_grad():
            return speaker.model.model.multi_modal_projector(features(speaker.model, world.render(scenes))).float()

    drawn = [world.scenes(CHUNK, "balanced") for _ in range(batches)]
    x, y = torch.cat([seen(s).half() for s in drawn]), torch.cat([s.has(s.companion) for s in drawn]).float()
    theme = torch.cat([s.theme for s in drawn])
    mean, std = x[:CHUNK].float().mean((0, 1)), x[:CHUNK].float().std((0, 1)) + 1e-6
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[2], 64), torch.nn.GELU(), torch.nn.Linear(64, 6)).to(x.device)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3, weight_decay=1e-5)

    def logit(values: Tensor, themes: Tensor) -> Tensor:
        return net((values.float() - mean) / std).logsumexp(1).gather(1, themes[:, None])[:, 0]

    for _ in range(steps):
        rows = torch.randint(len(x), (CHUNK,), device=x.device)
        with torch.enable_grad():
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit(x[rows], theme[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()

    def read(pixels: Tensor, scenes: Scenes) -> Tensor:
        with torch.no_grad():
            parts = [
                logit(speaker.model.model.multi_modal_projector(features(speaker.model, p)), t)
                for p, t in zip(pixels.split(CHUNK), scenes.theme.split(CHUNK), strict=True)
            ]
        return torch.cat(parts)

    return read


def names_of(tokens: Sequence[int]) -> str:
    """Tokens as words."""
    return " ".join(WORDS[t] for t in tokens if 0 < t < len(WORDS))


__all__ = [
    "COLOURS", "PREFIXES", "SHAPES", "Recipe", "Scenes", "Speaker", "World", "at_recall", "auc", "captions", "names_of", "pope",
    "pope_questions", "probe",
]  # fmt: skip
