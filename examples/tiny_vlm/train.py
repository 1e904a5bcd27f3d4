"""Train the small vision-language model: eyes, language, projector, and all of it on instructions. Steps are fixed beforehand.

    python examples/tiny_vlm/train.py --seed 1 --work DIR          # an H100 takes about two minutes; interrupted, it goes on
    python examples/tiny_vlm/train.py --export DIR/seed1.safetensors FOLDER     # an ordinary LLaVA for transformers and vLLM
    python examples/tiny_vlm/train.py --toy --work DIR             # seconds on a CPU, learns nothing

1. *Eyes*: the vision tower learns shapes and colours on decorrelated scenes, from every patch and from the class token.
2. *Language*: captions and dialogues without pictures, so that the language model knows which shapes go together before it sees one.
3. *Projector*, alone.
4. *Instructions*: projector and language model with pictures. One batch in seven has no picture, which keeps the picture-free
   mode, and with it the prior, alive. The eyes stay as they are.

What is learned are answers and captions, never questions. Every sentence is true of its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from model import FULL, TOY, Size, build, export, features, load, save, sequence, take
from torch import Tensor, nn
from torch.nn import functional
from world import COLOURS, SHAPES, World

__all__ = ["Plan", "Trainer", "train"]

TEXT_ONLY = 0.15
STAGES = ("eyes", "language", "projector", "instructions")


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run; a work file of another plan is refused.

    Attributes
    ----------
    steps
        Of each stage.
    batch, rates, warmup, weight_decay, clip
        The optimiser's: AdamW with betas 0.9 and 0.95; each stage's rate rises over `warmup` steps and falls along a cosine.
    prefix
        What stands before the image.
    eyes_from
        Weights whose vision tower is taken over instead of training one; for the experiment on sinks.
    """

    seed: int = 0
    size: Size = FULL
    steps: tuple[int, int, int, int] = (2000, 700, 60, 1800)
    batch: int = 512
    rates: tuple[float, float, float, float] = (1e-3, 1e-3, 2e-3, 1e-3)
    warmup: int = 150
    weight_decay: float = 0.05
    clip: float = 1.0
    contrast: tuple[float, float] = (0.15, 0.8)
    noise: float = 0.19
    prefix: str = "user"
    eyes_from: str | None = None


TINY = Plan(size=TOY, steps=(3, 3, 2, 4), batch=8, warmup=2)


class Trainer:
    """One run, which can be stopped after any step and taken up again from what :meth:`save` wrote.

    Parameters
    ----------
    plan
        What to do.
    device
        Where.
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan, self.device = plan, torch.device(device)
        self.model = build(plan.size, plan.seed).to(self.device)
        self.world = World(1_000_000 + plan.seed, self.device, plan.contrast, plan.noise)
        self.coin = torch.Generator().manual_seed(plan.seed)
        torch.manual_seed(plan.seed)
        outputs = len(SHAPES) * (1 + len(COLOURS))
        self.readers = nn.ModuleList([nn.Linear(plan.size.eye_width, outputs) for _ in range(2)]).to(self.device)
        self.stage, self.step, self.log = 0, 0, dict[str, Any]()
        if plan.eyes_from is not None:
            take(self.model, plan.eyes_from, "model.vision_tower.")
            self.stage = 1
        self.optimiser = self._optimiser()

    # --- stages -----------------------------------------------------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        inner, head = self.model.model, self.model.lm_head
        language = [inner.language_model, head]
        return [
            [inner.vision_tower, self.readers], language, [inner.multi_modal_projector], [inner.multi_modal_projector, *language],
        ][self.stage]  # fmt: skip

    def _parameters(self) -> list[nn.Parameter]:
        return [p for module in self._modules() for p in module.parameters()]

    def _optimiser(self) -> torch.optim.AdamW:
        plan = self.plan
        return torch.optim.AdamW(
            self._parameters(), lr=plan.rates[self.stage], weight_decay=plan.weight_decay, betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )  # fmt: skip

    def _loss(self) -> Tensor:
        if self.stage == 0:
            return self._eyes()
        blind = self.stage == 1 or (self.stage == 3 and float(torch.rand((), generator=self.coin)) < TEXT_ONLY)
        scenes = self.world.scenes(self.plan.batch)
        text, learned = self.world.texts(scenes)
        with self._fast():
            seen = None
            if not blind:
                with torch.no_grad():
                    seen = features(self.model, self.world.render(scenes))
                seen = self.model.model.multi_modal_projector(seen)
            embedded = sequence(self.model, seen, text, self.plan.prefix)
            hidden = self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, -text.shape[1] - 1 : -1])
        return functional.cross_entropy(logits.float().flatten(0, 1), text.masked_fill(~learned, -100).flatten())

    def _eyes(self) -> Tensor:
        """Which shapes, and which colours of them, are in the picture: said by the best patch, and by the class token."""
        scenes = self.world.scenes(self.plan.batch, "decorrelated")
        rows = torch.arange(self.plan.batch, device=self.device)[:, None].expand_as(scenes.shape)
        coloured = torch.zeros(self.plan.batch, len(SHAPES), len(COLOURS), device=self.device)
        coloured.index_put_((rows, scenes.shape, scenes.colour), scenes.real.float(), accumulate=True)
        truth = torch.cat([scenes.present.float(), coloured.clamp_max(1).flatten(1)], 1)
        with self._fast():
            hidden = self.model.model.vision_tower(self.world.render(scenes)).last_hidden_state
        patches, token = self.readers
        said = (patches(hidden[:, 1:].float()).logsumexp(1), 1.0), (token(hidden[:, 0].float()), 0.3)
        parts = [slice(0, len(SHAPES)), slice(len(SHAPES), None)]
        loss = torch.zeros((), device=self.device)
        for values, weight in said:
            for part in parts:
                loss = loss + weight * functional.binary_cross_entropy_with_logits(values[:, part], truth[:, part])
        return loss

    def _fast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def run(self, until: Callable[[], bool] = lambda: False) -> Iterator[tuple[str, int]]:
        """Train; yields (stage, step) after every step, and ends when all is done or `until` says so."""
        started = time.monotonic()
        while self.stage < len(STAGES):
            name, steps = STAGES[self.stage], self.plan.steps[self.stage]
            while self.step < steps:
                if until():
                    return
                rate = self.plan.rates[self.stage]
                warm = min(1.0, (self.step + 1) / self.plan.warmup)
                self.optimiser.param_groups[0]["lr"] = (
                    rate * warm * (0.5 + 0.5 * math.cos(math.pi * self.step / steps)) + 1e-6
                )
                loss = self._loss()
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self._parameters(), self.plan.clip)
                self.optimiser.step()
                if self.step % 100 == 0 or self.step == steps - 1:  # the only times that the host waits for the device
                    self.log.setdefault(name, []).append(
                        [self.step, round(loss.item(), 5), round(time.monotonic() - started, 1)]
                    )
                self.step += 1
                yield name, self.step
            self.stage, self.step = self.stage + 1, 0
            if self.stage < len(STAGES):
                self.optimiser = self._optimiser()

    # --- stopping and going on --------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, in safetensors: no code runs when it is read."""
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"readers.{k}": v for k, v in self.readers.state_dict().items()}
        tensors |= {"random.world": self.world.random.get_state(), "random.coin": self.coin.get_state()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        meta = {
            "plan": json.dumps(asdict(self.plan)),
            "at": json.dumps([self.stage, self.step]),
            "log": json.dumps(self.log),
        }
        partial = path.with_suffix(".partial")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, meta)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from a file of :meth:`save`; ValueError where it belongs to another plan."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata()
            if json.loads(meta["plan"]) != json.loads(json.dumps(asdict(self.plan))):
                raise ValueError(f"{path} was made with another plan; remove it, or name another folder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        self.stage, self.step = json.loads(meta["at"])
        self.log = json.loads(meta["log"])

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        self.model.load_state_dict(part("model"))
        self.readers.load_state_dict(part("readers"))
        self.world.random.set_state(tensors["random.world"])
        self.coin.set_state(tensors["random.coin"])
        if self.stage < len(STAGES):
            self.optimiser = self._optimiser()
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in part("adam").items():
                index, name = key.split(".")
                states.setdefault(int(index), {})[name] = value
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": states, "param_groups": groups})


def train(
    plan: Plan, folder: Path, name: str, device: torch.device | str = "cpu", until: Callable[[], bool] = lambda: False,
    every: int = 500, say: Callable[[str], object] = print,
) -> Path | None:  # fmt: skip
    """Train, or go on training, and write ``NAME.safetensors`` (bfloat16) and ``NAME.json``; None where `until` came first."""
    done, state = folder / f"{name}.safetensors", folder / f"{name}.state"
    if done.is_file():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, device)
    if state.is_file():
        trainer.restore(state)
    start = time.monotonic()
    for stage, step in trainer.run(until):
        if step % every == 0:
            trainer.save(state)
            say(f"{name}: {stage} {step}, {time.monotonic() - start:.0f} s, loss {trainer.log[stage][-1][1]}")
    if trainer.stage < len(STAGES):
        trainer.save(state)
        return None
    said = {
        "plan": asdict(plan),
        "log": trainer.log,
        "seconds": round(time.monotonic() - start, 1),
        "device": _device(trainer.device),
    }
    (folder / f"{name}.json").write_text(json.dumps(said) + "\n", encoding="utf-8")
    save(trainer.model, done)
    state.unlink(missing_ok=True)
    return done


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    """Train one seed, or export one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("tiny_vlm"), help="folder for weights and states")
    parser.add_argument("--toy", action="store_true", help="a few steps of a much smaller model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", nargs=2, type=Path, metavar=("WEIGHTS", "FOLDER"))
    options = parser.parse_args()
    base = TINY if options.toy else Plan()
    if options.export:
        weights, folder = options.export
        print("wrote", export(load(weights, base.size), folder))
        return
    torch.set_float32_matmul_precision("high")
    plan = Plan(**{**{k: getattr(base, k) for k in asdict(base)}, "seed": options.seed})
    print("wrote", train(plan, options.work, f"seed{options.seed}", options.device))


if __name__ == "__main__":
    main()
