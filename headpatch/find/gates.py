"""DuoAttention's gates: which KV heads can do without the middle of the context, learned from the hidden states that this costs.

Every KV head h of every layer that sees the whole sequence has a gate g_h in [0, 1], from 1. In the student, the outputs of its
query heads are g_h full + (1 - g_h) near, [n, d] each, where near attention sees the first `sink` keys and the last `recent` ones.
The loss is

    L = 1/P sum over P positions of mean_d (x - y)^2  +  reg mean |g|

with x and y the student's and the teacher's last hidden states, [P, D], at the positions of questions and answers behind a long
text with passkeys. Weights stay frozen. Heads whose gate stays up retrieve; the others stream.

Source: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819;
code: github.com/mit-han-lab/duo-attention. As there, the student's full part is the *teacher's* attention output
(``full="teacher"``); ``"student"`` takes the student's own queries, keys and values for both parts, which is how the paper reads.
Differences: the teacher runs first and alone, without gradients, instead of beside the student in one batch: the same numbers in
less memory. Gates are fp32 (there bf16, which makes ties). Near attention is exact (there rounded up to blocks of 128 keys). Texts
are ours, not BookSum; each model's own chat template instead of a fixed one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.find.engine import open_bench, open_mixture
from headpatch.find.haystack import Haystack, generated
from headpatch.find.passkeys import Passkeys, sample
from headpatch.find.provenance import versions
from headpatch.find.ranking import HeadScores

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gates", "Training", "train_gates"]

FORMAT = 1
KEEP_EVERY = 5


@dataclass(frozen=True)
class Training:
    """How gates are trained; the defaults are those of the published patterns.

    Attributes
    ----------
    keys
        The samples; one a step.
    sink, recent
        What near attention sees.
    steps, rate, reg
        Steps, AdamW's learning rate (no weight decay), and the weight of mean |g|. The rate climbs over the first fifth of the steps
        and falls over the last one, never below a tenth of itself.
    full
        ``teacher`` or ``student``: whose full attention the student mixes with.
    recompute
        Keep only each layer's input for the way back: less memory for a third more time.
    """

    keys: Passkeys = dataclasses.field(default_factory=Passkeys)
    sink: int = 128
    recent: int = 256
    steps: int = 2000
    rate: float = 0.02
    reg: float = 0.05
    full: str = "teacher"
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0 or not self.reg >= 0:
            raise HeadpatchError("gates need at least one step, a learning rate above 0 and a weight of at least 0")
        if self.full not in ("teacher", "student"):
            raise HeadpatchError(f"no full attention of the {self.full!r}; choose teacher or student")
        if self.sink < 0 or self.recent < 1:
            raise HeadpatchError(f"near attention of {self.sink} first and {self.recent} last keys; at least 0 and 1")
        if self.keys.longest <= self.sink + self.recent:
            raise HeadpatchError(
                f"samples of at most {self.keys.longest} tokens are all within {self.sink} first and {self.recent} last keys; ask "
                "for longer ones, or for a shorter sink and recent"
            )

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        ramp = max(1, self.steps // 5)
        shape = min(1.0, (step + 1) / ramp, (self.steps - step) / ramp)
        return self.rate * max(0.1, shape)


@dataclass(frozen=True)
class Gates:
    """What :func:`train_gates` learned: `scores` are the gates; `losses` has (distillation, mean gate) of every step."""

    scores: HeadScores
    losses: tuple[tuple[float, float], ...]


def train_gates(
    model: Any, tokenizer: Any, training: Training | None = None, *, haystack: Haystack = generated, model_name: str | None = None,
    work: str | Path | None = None, progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    say: Callable[[str], object] = lambda line: None,
) -> Gates:  # fmt: skip
    """Learn the gates of a model, which is as before afterwards.

    Parameters
    ----------
    work
        Work file: gates and the optimiser's state, kept every few steps. An interrupted training that is called again goes on from
        there, to the same gates as if it had not been interrupted.

    Raises
    ------
    HeadpatchError
        Samples do not fit, a recipe is on the model, the work file is of another training, or a loss is not finite.
    UnsupportedModelError
        No layer of the model sees the whole sequence, or its attention cannot be mixed.
    """
    import torch

    training = training or Training()
    bench = open_bench(model, tokenizer)
    mixture = open_mixture(model, training.sink, training.recent)
    layers = dict(mixture.layers)
    if not layers:
        raise HeadpatchError("every layer of this model sees a window of tokens only: there is nothing to save")
    about = {
        "data": {**haystack.about(), "needles": "passkeys"}, **_plain(training), "seed": training.keys.seed, **versions(bench.about())
    }  # fmt: skip
    state = _Work(work, {**about, "model": bench.about()["model"], "layers": {str(k): v for k, v in layers.items()}})
    flat = torch.ones(sum(layers.values()), requires_grad=True)
    optimiser = torch.optim.AdamW([flat], lr=training.rate, weight_decay=0.0)
    state.restore(flat, optimiser)
    if state.losses:
        say(f"{len(state.losses)} steps found in {work}: going on from there")
    start = len(state.losses)
    for step in range(start, training.steps):
        progress("steps", step, training.steps)
        hidden, reads = sample(bench, haystack, training.keys, step)
        for group in optimiser.param_groups:
            group["lr"] = training.rate_at(step)
        with torch.no_grad():
            flat.clamp_(0, 1)
        target = mixture.targets(hidden.ids, reads, keep=training.full == "teacher")
        gates = _by_layer(flat.to(target.device), layers)
        with mixture.mixed(hidden.ids, reads, gates, training.recompute) as student:
            distance = (student.float() - target.float()).square().mean(-1).sum() / len(reads)
            loss = distance.cpu() + training.reg * flat.abs().mean()
            optimiser.zero_grad()
            loss.backward()
        apart = float(distance.detach())
        if not math.isfinite(apart) or flat.grad is None or not bool(flat.grad.isfinite().all()):
            raise HeadpatchError(
                f"step {step + 1}: the loss is {apart}; load the model in another dtype, or lower the rate"
            )
        optimiser.step()
        state.losses.append((apart, float(flat.detach().clamp(0, 1).mean())))
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == training.steps:
            state.save(flat, optimiser)
        if (step + 1) % max(1, training.steps // 10) == 0:
            recent = state.losses[-max(1, training.steps // 10) :]
            say(
                f"step {step + 1}: distillation {sum(d for d, _ in recent) / len(recent):.4g}, mean gate {recent[-1][1]:.3f}"
            )
    progress("steps", training.steps, training.steps)
    values = {layer: tuple(g.tolist()) for layer, g in _by_layer(flat.detach().clamp(0, 1), layers).items()}
    name = model_name or bench.about()["model"]
    return Gates(HeadScores("DuoAttention gate", "kv", values, about, bench.shape.to_block(name)), tuple(state.losses))


def _by_layer(flat: Tensor, layers: Mapping[int, int]) -> dict[int, Tensor]:
    return dict(zip(layers, flat.split(list(layers.values())), strict=True))


def _plain(training: Training) -> dict[str, Any]:
    """Settings as plain values; whether something is computed twice changes nothing."""
    found = dataclasses.asdict(training)
    found.pop("recompute")
    return found


class _Work:
    """Gates, the optimiser's moments and the losses so far, in a file that is replaced as a whole."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        plain = json.dumps(settings, sort_keys=True, default=str).encode()
        self.header = {"headpatch_gates": FORMAT, "settings": hashlib.sha256(plain).hexdigest()}
        self.losses: list[tuple[float, float]] = []
        self.tensors: dict[str, list[float]] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        if not isinstance(data, dict) or "headpatch_gates" not in data:
            raise HeadpatchError(
                f"{self.path}: is no work file of this finder; start afresh with --restart, or with another file"
            )
        if {k: data[k] for k in self.header} != self.header:
            raise HeadpatchError(
                f"{self.path}: was made with other settings, data or versions; start afresh with --restart, or with another file"
            )
        self.losses = [(float(a), float(b)) for a, b in data["losses"]]
        self.tensors = data["tensors"]

    def restore(self, flat: Tensor, optimiser: Any) -> None:
        """Put what the file holds into the gates and their optimiser. Decimal numbers in JSON give every float back exactly."""
        import torch

        if not self.losses:
            return
        with torch.no_grad():
            flat.copy_(torch.tensor(self.tensors["gates"]))
        moments = {name: torch.tensor(self.tensors[name]) for name in ("exp_avg", "exp_avg_sq")}
        optimiser.state[flat] = {"step": torch.tensor(float(len(self.losses))), **moments}

    def save(self, flat: Tensor, optimiser: Any) -> None:
        """Replace the file: a reader finds the old one or the new one, whatever happens."""
        if self.path is None:
            return
        moments = {name: optimiser.state[flat][name].tolist() for name in ("exp_avg", "exp_avg_sq")}
        data = {**self.header, "losses": self.losses, "tensors": {"gates": flat.tolist(), **moments}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
