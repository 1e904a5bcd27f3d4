"""LoFiT: choose heads by a learned scale, tune them by a learned bias.

    stage A   z_h <- (1 + A_h) * z_h for every head, loss + l1 * sum |A|; score of a head = ||A_h||_2; keep the `top` best
    stage v   A is dropped; z_h <- z_h + v_h for the kept heads alone, the same data and loss, no penalty

z_h: [..., d] head outputs before the output projection at all positions. Trainable numbers in stage v: top * d.

Source: Yin, Ye and Durrett, NeurIPS 2024, arXiv 2406.01563, github.com/fc2869/lo-fit (commit ebd344a). Defaults are the paper's for
Llama-2-7B on TruthfulQA. Where this differs: the order of the batches and the start are seeded, AdamW decays nothing (the scripts
pass none), a stopped run goes on from its last epoch, and the loss is the model's own unless one is given (the paper's TruthfulQA
uses DPO).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError
from headpatch.tune.journal import Journal
from headpatch.tune.vectors import HeadVectors

__all__ = ["Lofit", "Step", "lofit"]

Loss = Callable[[Any, Any], Tensor]
SIZED = 8
"""Batches over which the sizes of head outputs are averaged."""


@dataclass(frozen=True)
class Step:
    """How far a run is.

    Attributes
    ----------
    stage
        ``select`` or ``tune``.
    step, steps
        Batches done, and all batches, in this stage.
    loss
        Of this batch, in nats per token unless the caller's loss says otherwise; the penalty is not in it.
    seconds_left
        Of this stage, from the time that its batches have taken so far.
    """

    stage: str
    step: int
    steps: int
    loss: float
    seconds_left: float


@dataclass(frozen=True)
class Lofit:
    """What :func:`lofit` found.

    Attributes
    ----------
    vectors
        The learned biases, still on the model; ``remove()`` takes them off.
    ranking
        Every head's score in stage A, by ``layer.head``.
    sized
        The same with each coordinate's gain multiplied by the mean size of what it multiplies: a head that is high above but not
        here has small outputs, where a large factor costs nothing.
    heads
        The heads that were tuned, best first by `ranking`, as published.
    losses
        By stage, the mean loss of each epoch.
    """

    vectors: HeadVectors
    ranking: Mapping[str, float]
    sized: Mapping[str, float]
    heads: tuple[str, ...]
    losses: Mapping[str, tuple[float, ...]]


def lofit(
    model: Any, batches: Sequence[Any], *, top: int, heads: Any = "*.*", loss: Loss | None = None, epochs: int = 5,
    lr: float = 5e-3, l1: float = 5e-4, bias_lr: float = 1e-2, std: float = 1e-3, seed: int = 0, part: str | None = None,
    progress: Callable[[Step], None] | None = None, work: str | os.PathLike[str] | None = None,
) -> Lofit:  # fmt: skip
    """Select heads, and tune a bias on each.

    Parameters
    ----------
    model
        A transformers model, in the mode (train or eval) that it is to be tuned in; its weights stay as they are.
    batches
        Used once per epoch in a seeded order. Each is a mapping of arguments with ``labels``, unless `loss` says otherwise.
    top
        How many heads to tune. The paper takes 3 % of them; fewer need a larger `bias_lr`.
    heads, part
        Among which heads to select.
    loss
        ``loss(model, batch)`` gives a scalar; default ``model(**batch).loss``.
    epochs, lr, l1, bias_lr
        Of AdamW; `lr` and the penalty `l1` belong to the selection, `bias_lr` to the tuning.
    std, seed
        Of the start.
    progress
        Called after each batch.
    work
        A file that keeps the state after every epoch: the same call goes on from there. Delete it when done.

    Returns
    -------
    Lofit

    Raises
    ------
    HeadpatchError
        No batches, a loss that is not finite, or a `work` file of another run.
    """
    if not len(batches) or epochs < 1:
        raise HeadpatchError("lofit needs at least one batch and one epoch")
    settings = f"{top} {heads} {part} {epochs} {lr} {l1} {bias_lr} {std} {seed} {len(batches)} {_digest(batches)}"
    run = _Run(
        model, batches, loss or (lambda m, batch: m(**batch).loss), epochs, seed, progress, Journal(work, settings)
    )
    with HeadVectors(model, heads, kind="gain", std=std, seed=seed, part=part) as gains:
        selecting = run.stage("select", gains, lr, l1)
        ranking = gains.scores()
        sized = gains.scores(gains.sizes(lambda: [run.loss(model, batch) for batch in batches[:SIZED]]))
    best = tuple(sorted(ranking, key=lambda head: -ranking[head])[:top])
    biases = HeadVectors(model, ranking, top=top, kind="bias", std=std, seed=seed + 1, part=part)
    try:
        tuning = run.stage("tune", biases, bias_lr, 0.0)
    except BaseException:
        biases.remove()
        raise
    return Lofit(biases, ranking, sized, best, {"select": selecting, "tune": tuning})


def _digest(batches: Sequence[Any]) -> str:
    """Of all tensors in batches that are mappings: a run goes on with the data that it began with."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else ():
            if isinstance(value, Tensor):
                found.update(
                    name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
    return found.hexdigest()


@dataclass
class _Run:
    model: Any
    batches: Sequence[Any]
    loss: Loss
    epochs: int
    seed: int
    progress: Callable[[Step], None] | None
    journal: Journal

    def stage(self, name: str, vectors: HeadVectors, lr: float, l1: float) -> tuple[float, ...]:
        """Train one stage to its end; the mean loss of each epoch."""
        optimizer = torch.optim.AdamW(vectors.parameters(), lr=lr, weight_decay=0.0)
        losses = _restore(self.journal, name, vectors, optimizer)
        steps, before, started = self.epochs * len(self.batches), len(losses) * len(self.batches), time.monotonic()
        for epoch in range(len(losses), self.epochs):
            order = torch.randperm(
                len(self.batches), generator=torch.Generator().manual_seed(1000 * self.seed + epoch)
            )
            seen = []
            for i in order.tolist():
                value = self.loss(self.model, self.batches[i])
                total = value + l1 * vectors.penalty() if l1 else value
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                seen.append(float(value.detach()))
                if not torch.isfinite(total.detach()):
                    raise HeadpatchError(
                        f"the loss is {float(total.detach())} in epoch {epoch} of stage {name}; lower the rate"
                    )
                if self.progress is not None:
                    done = epoch * len(self.batches) + len(seen)
                    left = (time.monotonic() - started) / (done - before) * (steps - done)
                    self.progress(Step(name, done, steps, seen[-1], left))
            losses.append(sum(seen) / len(seen))
            _keep(self.journal, name, vectors, optimizer, losses)
        return tuple(losses)


def _keep(
    journal: Journal, stage: str, vectors: HeadVectors, optimizer: torch.optim.Optimizer, losses: Sequence[float]
) -> None:  # fmt: skip
    """Write the state after a whole epoch."""
    kept = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for layer, value in vectors.values.items():
        kept[f"{layer}.value"] = value
        kept |= {f"{layer}.{key}": moment for key, moment in optimizer.state[value].items()}
    journal.keep(stage, kept)


def _restore(
    journal: Journal, stage: str, vectors: HeadVectors, optimizer: torch.optim.Optimizer
) -> list[float]:  # fmt: skip
    """Put the state back; the mean loss of the epochs that are done."""
    kept = journal.part(stage)
    if not kept:
        return []
    vectors.load_state_dict({k.removesuffix(".value"): v for k, v in kept.items() if k.endswith(".value")})
    for layer, value in vectors.values.items():
        optimizer.state[value] = {
            key: kept[f"{layer}.{key}"].to("cpu" if key == "step" else value.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return [float(x) for x in kept["losses"]]
