"""Learning a soft injection: a task's vector for every head from few-shot prompts, and by gradient descent how much of it each takes.

    t[l,h] = mean over M prompts of o[l,h,last]                      N demonstrations each, and a question without its answer
    alpha = sigmoid(z), z[l,h] = 0 at the start;  loss = -log p(answer and the end of its line | zero-shot prompt, injected)
    Adam on z alone, `steps` times one training pair; every `every` steps the mean loss on validation pairs; the best state is kept

The model's weights are frozen, and what comes before the prompt's last token is computed once
(:class:`headpatch.tune.engine.LastTokens`). Several tasks, or seeds, are learned side by side in one batch, each as it would be
alone.

Source: arXiv 2507.20906, github.com/SNU-DRL/Soft_Injection (commit 750f28c). Where this differs from the released code:

* The state with the lowest validation loss is kept, the start included. In the code that choice is inert, and the last state wins.
* Everything is drawn from a seed, and an interrupted run goes on from its last validation.
* The loss is that of the whole answer and the end of its line, each token behind the right ones. The published one is of the answer's
  first token only (``loss="first"``), so that nothing is learned about where an answer ends, and most right beginnings are no right
  answers: 55 % by prefix match and 22 % by exact match over 51 tasks, against 54 and 52 % (docs/soft-injection.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError
from headpatch.tune.engine import Beginnings, Edit, LastTokens
from headpatch.tune.journal import Journal
from headpatch.tune.pairs import Format, Pair, answer_tokens, drawn
from headpatch.tune.two_stage import Step

__all__ = ["LOSSES", "Learned", "Lesson", "Settings", "embed", "injection", "learn"]

ROWS, LONG_ROWS = 128, 16
"""Rows that are run at once where nothing is learned: zero-shot prompts, and few-shot prompts, whose keys and values are many. On a
GPU more are (:attr:`headpatch.tune.engine.LastTokens.wider`)."""
LOSSES = ("first", "answer")
"""What is learned from: an answer's first token, as published, or all of its tokens and the end of its line."""

NOTHING = -100
"""A target that does not count."""


@dataclass(frozen=True)
class Settings:
    """How an injection is learned; the published values, but for the loss.

    Attributes
    ----------
    prompts, shots
        M few-shot prompts of N demonstrations, whose last head outputs are averaged.
    steps, batch, lr
        Adam's; `batch` training pairs a step.
    every, validation
        Validation pairs, at most, and after how many steps they are looked at.
    seed
        Of the prompts and of the order of training pairs.
    loss
        One of :data:`LOSSES`; "first" is the published one.
    """

    prompts: int = 50
    shots: int = 10
    steps: int = 400
    batch: int = 1
    lr: float = 0.2
    every: int = 50
    validation: int = 100
    seed: int = 0
    loss: str = "answer"

    def __post_init__(self) -> None:
        wrong = [n for n in ("prompts", "shots", "steps", "batch", "every", "validation") if getattr(self, n) < 1]
        if wrong or not self.lr > 0:
            raise HeadpatchError(f"{(wrong or ['lr'])[0]} must be above 0")
        if self.loss not in LOSSES:
            raise HeadpatchError(f"loss is {self.loss!r}; choose {' or '.join(LOSSES)}")


@dataclass(frozen=True)
class Lesson:
    """One task to learn, under one seed.

    Attributes
    ----------
    vectors
        Its embedding, per layer [H, d].
    train, valid
        Its pairs.
    seed
        Of the order of training pairs.
    """

    vectors: Sequence[Tensor]
    train: Sequence[Pair]
    valid: Sequence[Pair]
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes
    ----------
    alpha
        Per layer, [H] float32 on the CPU.
    step
        After how many steps this state was reached: the one with the lowest validation loss.
    train, valid
        Mean training loss of each interval and validation loss at its end, in nats; `valid` begins with the start's.
    """

    alpha: tuple[Tensor, ...]
    step: int
    train: tuple[float, ...]
    valid: tuple[float, ...]


def embed(
    model: LastTokens, train: Sequence[Pair], style: Format, prompts: int, shots: int, seed: int
) -> list[Tensor]:  # fmt: skip
    """The mean of head outputs at the last token of few-shot prompts: per layer [H, d] float32 on the model's device.

    Raises
    ------
    HeadpatchError
        Too few training pairs for so many demonstrations.
    """
    texts = [style.prompt(asked.question, shown) for shown, asked in drawn(train, shots, prompts, seed)]
    encoded, layers = model.encode(texts), model.shape.parts[model.shape.main].num_layers
    total: list[Any] = [0.0] * layers

    def note(layer: int, o: Tensor) -> Tensor:
        total[layer] = total[layer] + o.detach().float().sum(0)
        return o

    with torch.no_grad():
        size = LONG_ROWS * model.wider
        for start in range(0, len(encoded), size):
            beginnings = model.begin(encoded[start : start + size])
            model.run(beginnings, range(len(beginnings)), note)
    return [found / len(encoded) for found in total]


def injection(alpha: Sequence[Tensor], vectors: Sequence[Tensor], of_row: Tensor | None = None) -> Edit:
    """The edit itself: ``o <- (1 - alpha) o + alpha t`` at the last token.

    Parameters
    ----------
    alpha, vectors
        Per layer, [H] and [H, d]; or with `of_row` [R, H] and [R, H, d].
    of_row
        [n] which of the R tasks each row of the batch has.
    """

    def edit(layer: int, o: Tensor) -> Tensor:
        a, t = alpha[layer].to(o.device), vectors[layer].to(o.device)
        if of_row is not None:
            a, t = a.index_select(0, of_row), t.index_select(0, of_row)
        a = a[..., None]
        return (1 - a) * o.to(a.dtype) + a * t

    return edit


def learn(
    model: LastTokens, lessons: Sequence[Lesson], style: Format, settings: Settings | None = None, *,
    progress: Callable[[Step], None] | None = None, work: str | os.PathLike[str] | None = None,
) -> list[Learned]:  # fmt: skip
    """Learn how much of its vector each head takes, for several tasks side by side.

    Parameters
    ----------
    model
        From :func:`headpatch.tune.engine.last_tokens`.
    lessons
        Tasks; they do not influence each other.
    style
        Format of the zero-shot prompts.
    settings
        `seed`, `prompts` and `shots` are not used here.
    progress
        Called after each step; the loss is the mean over lessons.
    work
        A file that keeps the state at each validation: the same call goes on from there. Delete it when done.

    Returns
    -------
    list
        One :class:`Learned` per lesson.

    Raises
    ------
    HeadpatchError
        No pairs, an answer whose first token cannot be told, a loss that is not finite, or a `work` file of another run.
    """
    settings = settings or Settings()
    if not lessons or not all(lesson.train and lesson.valid for lesson in lessons):
        raise HeadpatchError("every task needs training and validation pairs")
    run = _Run(model, lessons, style, settings)
    journal = Journal(work, run.fingerprint())
    run.restore(journal)
    if not run.valid:
        run.validate(0)
    before, started = run.done, time.monotonic()
    while run.done < settings.steps:
        losses = []
        for _ in range(min(settings.every, settings.steps - run.done)):
            losses.append(run.step())
            if progress is not None:
                left = (time.monotonic() - started) / (run.done - before) * (settings.steps - run.done)
                progress(Step("learn", run.done, settings.steps, float(losses[-1].mean()), left))
        run.train.append(torch.stack(losses).mean(0))
        run.validate(run.done)
        journal.keep("run", run.state())
    return run.results()


def _line(tokens: tuple[int, ...], ends: Collection[int]) -> tuple[int, ...]:
    """Up to and with the first token that ends a line."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


class _Run:
    """The state of :func:`learn`: logits `z` per layer [R, H], the best of them so far, and losses [R] of each interval."""

    def __init__(self, model: LastTokens, lessons: Sequence[Lesson], style: Format, settings: Settings) -> None:
        self.model, self.lessons, self.settings = model, lessons, settings
        heads = model.shape.parts[model.shape.main].num_heads
        self.vectors = [torch.stack([lesson.vectors[layer] for lesson in lessons]) for layer in range(len(heads))]
        device = self.vectors[0].device
        self.z = [torch.zeros(len(lessons), h, device=device, requires_grad=True) for h in heads]
        self.best = [z.detach().clone() for z in self.z]
        self.best_loss = torch.full((len(lessons),), torch.inf)
        self.best_step = torch.zeros(len(lessons), dtype=torch.long)
        self.adam = torch.optim.Adam(self.z, lr=settings.lr)
        self.train: list[Tensor] = []
        self.valid: list[Tensor] = []
        self.done = 0
        self.order = torch.stack([
            torch.randint(len(x.train), (settings.steps, settings.batch), generator=torch.Generator().manual_seed(x.seed))
            for x in lessons
        ])  # fmt: skip
        # Only pairs that will be seen are computed, and pairs that several lessons share are computed once.
        self.places: dict[Pair, int] = {}
        for lesson, order in zip(lessons, self.order, strict=True):
            for i in order.flatten().tolist():
                self.places.setdefault(lesson.train[i], len(self.places))
            for pair in lesson.valid[: settings.validation]:
                self.places.setdefault(pair, len(self.places))
        whole = settings.loss == "answer"
        asked, said = answer_tokens(
            model, [style.prompt(p.question) for p in self.places], [style.said(p.answer) for p in self.places], whole
        )
        self.ids, self.device = asked, device
        self.targets = [_line(tokens, model.ends) if whole else tokens[:1] for tokens in said]
        self._beginnings: Beginnings | None = None

    @property
    def beginnings(self) -> Beginnings:
        """Computed when a step is run: a run that is done needs none."""
        if self._beginnings is None:
            self._beginnings = self.model.begin(self.ids)
        return self._beginnings

    def step(self) -> Tensor:
        """One step of Adam; the loss [R] before it."""
        rows, of_row = [], []
        for r, lesson in enumerate(self.lessons):
            for i in self.order[r, self.done].tolist():
                rows.append(self.places[lesson.train[i]])
                of_row.append(r)
        which = torch.tensor(of_row, device=self.device)
        alpha = [z.sigmoid() for z in self.z]
        losses = self._losses(rows, injection(alpha, self.vectors, which))
        # The sum over lessons: each one's gradient is that of its own mean.
        total = losses.sum() / self.settings.batch
        for z, grad in zip(self.z, torch.autograd.grad(total, self.z), strict=True):
            z.grad = grad
        self.adam.step()
        self.done += 1
        found = losses.detach().cpu().view(len(self.lessons), -1).mean(1)
        if not bool(found.isfinite().all()):
            raise HeadpatchError(f"the loss is {float(found.sum())} at step {self.done}; lower the rate")
        return found

    def validate(self, step: int) -> None:
        """Mean loss on each lesson's validation pairs; states that are better than any before are kept."""
        rows, of_row = [], []
        for r, lesson in enumerate(self.lessons):
            for pair in lesson.valid[: self.settings.validation]:
                rows.append(self.places[pair])
                of_row.append(r)
        which = torch.tensor(of_row, device=self.device)
        losses = []
        with torch.no_grad():
            alpha = [z.sigmoid() for z in self.z]
            size = max(1, ROWS * self.model.wider // max(len(self.targets[i]) for i in rows))
            for start in range(0, len(rows), size):
                edit = injection(alpha, self.vectors, which[start : start + size])
                losses.append(self._losses(rows[start : start + size], edit).cpu())
        total = torch.zeros(len(self.lessons)).index_add(0, which.cpu(), torch.cat(losses))
        mean = total / torch.bincount(which.cpu(), minlength=len(self.lessons))
        better = mean < self.best_loss
        self.best_loss = torch.where(better, mean, self.best_loss)
        self.best_step = torch.where(better, step, self.best_step)
        for best, z in zip(self.best, self.z, strict=True):
            best.copy_(torch.where(better.to(z.device)[:, None], z.detach(), best))
        self.valid.append(mean)

    def _losses(self, rows: Sequence[int], edit: Edit) -> Tensor:
        """[n] minus log-probability of what is to be said, in nats: the sum over its tokens."""
        said = [self.targets[i] for i in rows]
        longest = max(map(len, said))
        logits = self.model.run(self.beginnings, rows, edit, [tokens[:-1] for tokens in said]).float()
        wanted = torch.tensor([[*t, *[NOTHING] * (longest - len(t))] for t in said], device=self.device)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), wanted, ignore_index=NOTHING, reduction="none"
        )
        return losses.sum(1)

    def results(self) -> list[Learned]:
        """The best states."""
        return [
            Learned(
                tuple(best[r].sigmoid().cpu() for best in self.best), int(self.best_step[r]),
                tuple(float(x[r]) for x in self.train), tuple(float(x[r]) for x in self.valid),
            )
            for r in range(len(self.lessons))
        ]  # fmt: skip

    # --- interruption -----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """What the state depends on."""
        digest = hashlib.sha256()
        for layer in self.vectors:
            digest.update(layer.cpu().float().numpy().tobytes())
        digest.update(repr((self.order.tolist(), self.ids, self.targets)).encode())
        return json.dumps([asdict(self.settings), self.model.about(), digest.hexdigest()])

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, by name."""
        kept = {
            "done": torch.tensor(self.done), "train": torch.stack(self.train), "valid": torch.stack(self.valid),
            "best_loss": self.best_loss, "best_step": self.best_step,
        }  # fmt: skip
        for i, (z, best) in enumerate(zip(self.z, self.best, strict=True)):
            kept |= {f"z.{i}": z, f"best.{i}": best}
            kept |= {f"{key}.{i}": value for key, value in self.adam.state[z].items()}
        return kept

    def restore(self, journal: Journal) -> None:
        """Put back what a file holds, if it holds anything."""
        kept = journal.part("run")
        if not kept:
            return
        self.done = int(kept["done"])
        self.train, self.valid = list(kept["train"]), list(kept["valid"])
        self.best_loss, self.best_step = kept["best_loss"], kept["best_step"]
        for i, (z, best) in enumerate(zip(self.z, self.best, strict=True)):
            with torch.no_grad():
                z.copy_(kept[f"z.{i}"])
                best.copy_(kept[f"best.{i}"])
            self.adam.state[z] = {
                key: kept[f"{key}.{i}"].to("cpu" if key == "step" else z.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
