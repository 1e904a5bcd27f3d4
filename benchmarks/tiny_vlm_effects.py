"""Do attention edits make the small vision-language model hallucinate less? Methods and controls, seeds as the unit.

    python benchmarks/tiny_vlm_effects.py --weights DIR/seed1.safetensors --seed 1 --out DIR/seed1.effects.json
    python benchmarks/tiny_vlm_effects.py --report DIR        # all seeds together: benchmarks/results/tiny_vlm_DEVICE.{json,md}

What is measured, the window in which a model counts, and the primary score were written down in docs/tiny-vlm.md before any result.
Nothing is chosen here: strengths are the published ones, every method runs once, on scenes that no training saw.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_vlm_measure import Scenes, Speaker, World, at_recall, auc, captions, names_of, pope, pope_questions, probe
from torch import Tensor

import headpatch
from headpatch.errors import HeadpatchError
from headpatch.find.sink_dimensions import sink_dimensions

LIMITS: dict[str, tuple[float | None, float | None]] = {
    "caption F1 (train), %": (85, None), "probe AUC (balanced)": (0.95, None),
    "yes to absent companion (counterfactual), %": (20, 45), "yes to companion without image, %": (70, None),
    "yes to unrelated absent shape, %": (None, 5), "recall of companion (balanced), %": (90, None), "CHAIR_S (train), %": (10, 35),
}  # fmt: skip
"""The acceptance window, of the untouched model alone."""
VHR_ALPHA, PAI_ALPHAS, RECYCLE, DRAWS = 2.0, (0.2, 0.5), (0.4, 0.6), 5
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % points by degrees of freedom."""


def recipe(method: str, heads: Any, **more: Any) -> dict[str, Any]:
    return {"headpatch": 1, "patches": [{"method": method, "heads": heads, **more}]}


def vhr_layers(layers: int) -> list[int]:
    """The second layer, and the last 44 %: the published choice for 32 layers, scaled."""
    return [1, *range(layers - round(0.44 * layers), layers)]


class Study:
    """One model on its test scenes.

    Parameters
    ----------
    rows
        Scenes of the main splits; half as many questions of the others, a quarter as many captions.
    """

    def __init__(self, model: Any, seed: int, device: torch.device | str, rows: int) -> None:
        self.speaker, self.rows = Speaker(model), rows
        self.world = World(2_000_000 + seed, device)
        self.sets: dict[str, tuple[Scenes, Tensor]] = {}
        for split, count in (("balanced", rows), ("counterfactual", rows), ("clear", rows // 2), ("train", rows // 2)):
            scenes = self.world.scenes(count, split)
            self.sets[split] = (scenes, self.world.render(scenes))
        few = max(8, rows // 4)
        self.few = {
            name: (_head(self.sets[name][0], few), self.sets[name][1][:few]) for name in ("counterfactual", "train")
        }
        self.asked = {name: pope_questions(scenes, self.world) for name, (scenes, _) in self.few.items()}
        scenes = self.sets["counterfactual"][0]
        others = torch.where(scenes.present, -1.0, self.world.uniform(*scenes.present.shape))
        others[torch.arange(rows, device=others.device), scenes.companion] = -2.0
        self.unrelated = others.argmax(1)
        self.base: dict[str, Tensor] = {}

    def measure(self, edit: dict[str, Any] | None) -> dict[str, Any]:
        """Every score of one recipe."""
        (balanced, b), (unusual, u), (clear, c) = (self.sets[k] for k in ("balanced", "counterfactual", "clear"))
        half = len(u) // 2
        said = {
            "companion": self.speaker.ask(balanced.companion, b, edit), "false": self.speaker.ask(unusual.companion, u, edit),
            "clear": self.speaker.ask(clear.companion, c, edit), "anchor": self.speaker.ask(unusual.anchor[:half], u[:half], edit),
            "unrelated": self.speaker.ask(self.unrelated[:half], u[:half], edit),
        }  # fmt: skip
        if edit is None:
            self.base = said
        scores = self.scores(said)
        for name, (scenes, pixels) in self.few.items():
            scores[f"pope_{name}"] = pope(self.speaker, scenes, pixels, self.world, edit, self.asked[name])
            written = self.speaker.describe(pixels, edit)
            scores[f"captions_{name}"] = captions(written, scenes)
            if edit is None:
                scores[f"examples_{name}"] = [names_of(row.tolist()) for row in written[:3]]
        return scores

    def scores(self, said: dict[str, Tensor], threshold: float = 0.0) -> dict[str, Any]:
        """From logits to percent; the area under the curve is a number from 0 to 1."""
        there = self.sets["balanced"][0].has(self.sets["balanced"][0].companion)
        positive, negative = said["companion"][there], said["companion"][~there]
        recall = float((self.base["companion"][there] > 0).double().mean())

        def above(name: str) -> float:
            return 100 * float((said[name] > threshold).double().mean())

        return {
            "auc": auc(positive, negative), "false_yes_at_recall": 100 * at_recall(positive, said["false"], recall),
            **{k: above(v) for k, v in (("false_yes", "false"), ("false_yes_clear", "clear"))},
            **{k: above(k) for k in ("anchor", "unrelated")},
            "recall": 100 * float((positive > threshold).double().mean()),
            "balanced_accuracy": 100 * float(((said["companion"] > threshold) == there).double().mean()),
        }  # fmt: skip

    def logit_shift(self) -> dict[str, Any]:
        """The control that touches no head: one threshold on yes against no, the best on half of the balanced scenes; scored on all
        of them, that half included, and on the other splits.
        """
        scenes = self.sets["balanced"][0]
        there, half = scenes.has(scenes.companion), self.rows // 2
        grid = torch.linspace(-10, 15, 501, device=there.device)
        right = ((self.base["companion"][:half, None] > grid) == there[:half, None]).double().mean(0)
        threshold = float(grid[right.argmax()])
        return {"threshold": threshold, **self.scores(self.base, threshold)}

    def divergence(self, count: int) -> dict[int, tuple[Tensor, float]]:
        """Per layer: how often each head is among the vision-aware ones [H], on scenes of the training law; and by which factor all
        heads would have to be scaled to change the attention block's output norm as doubling those heads does.
        """
        scenes = self.world.scenes(count, "train")
        shape = self.world.companions[scenes.theme]
        pixels, question = self.world.render(scenes), self.speaker.question(shape)
        layers = vhr_layers(self.speaker.model.config.text_config.num_hidden_layers)
        seen = {}
        for image in (True, False):
            names = ("output", "o_proj") if image else ("output",)
            with torch.no_grad(), headpatch.observe(self.speaker.model, names, [f"{n}.*" for n in layers]) as kept:
                inputs = {"input_ids": self.speaker.ids(question, image)}
                self.speaker.model(**inputs, **({"pixel_values": pixels} if image else {}))
            seen[image] = kept
        found = {}
        for layer in layers:
            heads = range(self.speaker.model.config.text_config.num_attention_heads)
            a, b = (
                torch.stack([seen[i]["output", f"{layer}.{h}"][0][:, -1].float() for h in heads], 1)
                for i in (True, False)
            )
            change, power = (a - b).norm(dim=-1), b.square().sum(-1)
            far = [v > v.mean(1, keepdim=True) + v.std(1, keepdim=True) for v in (change, power)]
            change = change.masked_fill(far[0] & far[1], 0.0)
            chosen = change > change.median(1, keepdim=True).values
            weight = torch.stack([seen[True]["o_proj", f"{layer}.{h}"][0].float() for h in heads])  # [H, d, D]
            parts = torch.einsum("nhd,hde->nhe", a, weight)
            scaled = (parts * torch.where(chosen, VHR_ALPHA, 1.0)[..., None]).sum(1).norm(dim=-1)
            found[layer] = (
                chosen.double().mean(0),
                float((scaled / parts.sum(1).norm(dim=-1).clamp_min(1e-9)).mean()),
            )
        return found

    def methods(self, found: dict[int, tuple[Tensor, float]]) -> dict[str, Callable[[], dict[str, Any]]]:
        """Recipes by name; made when they are asked for, since VAR may have to refuse."""
        text = self.speaker.model.config.text_config
        layers, heads = text.num_hidden_layers, text.num_attention_heads
        where = sorted(found)
        # As many heads as the random halves have: those that are chosen most often.
        listed = [f"{n}.{h}" for n in where for h in sorted(found[n][0].topk(heads // 2).indices.tolist())]
        others = [f"{n}.{h}" for n in where for h in range(heads) if f"{n}.{h}" not in listed]
        every = [f"{n}.*" for n in where]
        made: dict[str, Callable[[], dict[str, Any]]] = {
            "VHR online": lambda: recipe("vhr", every, alpha=VHR_ALPHA, selection="online"),
            "VHR listed": lambda: recipe("vhr", listed, alpha=VHR_ALPHA, selection="listed"),
            "not listed, doubled": lambda: recipe("head_scaling", others, scale=VHR_ALPHA),
            "all heads, doubled": lambda: recipe("head_scaling", every, scale=VHR_ALPHA),
            "norm-matched": lambda: recipe("head_scaling", {f"{n}.*": found[n][1] for n in where}),
        }
        for draw in range(DRAWS):
            random = torch.Generator().manual_seed(draw)
            picked = [
                f"{n}.{h}"
                for n in where
                for h in sorted(torch.randperm(heads, generator=random)[: heads // 2].tolist())
            ]
            made[f"random half, doubled, draw {draw}"] = lambda picked=picked: recipe(
                "head_scaling", picked, scale=VHR_ALPHA
            )
        for alpha in PAI_ALPHAS:
            made[f"PAI {alpha:g}"] = lambda alpha=alpha: recipe("pai", [f"2-{layers - 1}.*"], alpha=alpha)
        for recycle in RECYCLE:
            made[f"VAR {recycle:g}"] = lambda recycle=recycle: self.var(recycle, forced=False)
            made[f"VAR {recycle:g}, dimensions forced"] = lambda recycle=recycle: self.var(recycle, forced=True)
        return made

    def var(self, recycle: float, forced: bool) -> dict[str, Any]:
        """VAR where the model shows sink dimensions; `forced` takes the two most extreme dimensions of the first token instead."""
        text = self.speaker.model.config.text_config
        layers, threshold = text.num_hidden_layers, 0.3125 * math.sqrt(text.hidden_size)
        scenes, pixels = self.sets["train"]
        asked = self.speaker.ids(self.speaker.question(scenes.companion[:50]))
        if forced:
            with torch.no_grad(), headpatch.observe(self.speaker.model, "layer_input", f"2-{layers - 2}.*") as seen:
                self.speaker.model(input_ids=asked, pixel_values=pixels[: len(asked)])
            first = torch.stack([v[0][:, 0].float().abs() for v in seen.values()]).mean((0, 1))
            dims = sorted(first.topk(2).indices.tolist())
        else:
            prompts = [
                {"input_ids": row[None], "pixel_values": p[None]} for row, p in zip(asked, pixels, strict=False)
            ]
            dims = list(sink_dimensions(self.speaker.model, prompts, layers=f"2-{layers - 2}").dimensions)
        return recipe("var", [f"2-{layers - 2}.*"], recycle=recycle, sink_dimensions=dims, sink_threshold=threshold)

    def window(self, base: dict[str, Any], batches: int, steps: int) -> dict[str, Any]:
        """The untouched model against the acceptance window, with what its eyes show at best."""
        read = probe(self.speaker, self.world, batches, steps)
        (balanced, b), (unusual, u) = self.sets["balanced"], self.sets["counterfactual"]
        there = balanced.has(balanced.companion)
        seen = read(b, balanced)
        blank = self.speaker.ask(unusual.companion[: self.rows // 4], None)
        found = {
            "caption F1 (train), %": base["captions_train"]["f1"], "probe AUC (balanced)": auc(seen[there], seen[~there]),
            "yes to absent companion (counterfactual), %": base["false_yes"],
            "yes to companion without image, %": 100 * float((blank > 0).double().mean()),
            "yes to unrelated absent shape, %": base["unrelated"], "recall of companion (balanced), %": base["recall"],
            "CHAIR_S (train), %": base["captions_train"]["chair_s"],
        }  # fmt: skip
        inside = {
            name: (low is None or value >= low) and (high is None or value <= high)
            for name, value in found.items()
            for low, high in [LIMITS[name]]
        }
        probed = {
            "accuracy": 100 * float(((seen > 0) == there).double().mean()),
            "false_yes": 100 * float((read(u, unusual) > 0).double().mean()),
        }
        return {"figures": found, "inside": inside, "accepted": all(inside.values()), "probe": probed}


def _head(scenes: Scenes, count: int) -> Scenes:
    return Scenes(**{k: v[:count] if isinstance(v, Tensor) else v for k, v in vars(scenes).items()})


def study(
    model: Any, seed: int, device: torch.device | str, rows: int = 2000, batches: int = 24, steps: int = 1000,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one model. A method that cannot run is in the result with the reason."""
    start = time.monotonic()
    of = Study(model, seed, device, rows)
    base = of.measure(None)
    found = of.divergence(min(400, rows))
    result: dict[str, Any] = {
        "seed": seed, "rows": rows, "window": of.window(base, batches, steps), "untouched": base, "logit shift": of.logit_shift(),
        "vision_aware": {n: {"frequency": f.tolist(), "norm_factor": c} for n, (f, c) in found.items()}, "methods": {},
    }  # fmt: skip
    for name, make in of.methods(found).items():
        try:
            edit = make()
            result["methods"][name] = {"recipe": edit, **of.measure(edit)}
        except HeadpatchError as error:
            result["methods"][name] = {"refused": f"{type(error).__name__}: {error}"}
            say(f"seed {seed}: {name} refused: {error}")
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


# --- all seeds together ---------------------------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AUC x 100", ("auc",)), ("false yes at equal recall", ("false_yes_at_recall",)), ("false yes", ("false_yes",)),
    ("recall", ("recall",)), ("anchor", ("anchor",)), ("POPE F1 cf", ("pope_counterfactual", "f1")),
    ("POPE F1 id", ("pope_train", "f1")), ("CHAIR_I cf", ("captions_counterfactual", "chair_i")),
    ("CHAIR_S id", ("captions_train", "chair_s")), ("caption recall id", ("captions_train", "recall")),
    ("caption F1 id", ("captions_train", "f1")), ("length id", ("captions_train", "length")),
)  # fmt: skip
"""Heading, and where the score is. AUC is the primary score."""


def pick(scores: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = scores
    for key in path:
        if key not in value:
            return None
        value = value[key]
    return 100 * value if path == ("auc",) else value


def interval(values: list[float]) -> str:
    """Mean with its 95 % interval over seeds, by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} +- {half:.2f}"


def differences(studies: list[dict[str, Any]], path: tuple[str, ...]) -> dict[str, list[float]]:
    """Per method, its score less the untouched model's in every seed; draws of random heads averaged inside a seed."""
    found: dict[str, list[float]] = {}
    for one in studies:
        base = pick(one["untouched"], path)
        rows = {**one["methods"], "logit shift": one["logit shift"]}
        random: list[float] = []
        for name, scores in rows.items():
            value = pick(scores, path)
            if value is None or base is None:
                continue
            if name.startswith("random half"):
                random.append(value - base)
            else:
                found.setdefault(name, []).append(value - base)
        if random:
            found.setdefault("random half, doubled", []).append(statistics.fmean(random))
    return found


def report(studies: list[dict[str, Any]], title: str) -> list[str]:
    """The table as Markdown."""
    seeds = " | ".join(f"seed {s['seed']}" for s in studies)
    lines = [
        f"# Small vision-language model: {title}", "",
        f"{len(studies)} seeds, {studies[0]['rows']} scenes a split. Written by `tiny_vlm_effects.py --report`.", "",
        "## Acceptance window (untouched)", "", f"| figure | window | {seeds} |",
    ]  # fmt: skip
    lines.append("| --- " * (2 + len(studies)) + "|")
    for name, (low, high) in LIMITS.items():
        bounds = f"{'' if low is None else low} to {'' if high is None else high}"
        cells = [
            f"{s['window']['figures'][name]:.3g}{'' if s['window']['inside'][name] else ' (outside)'}" for s in studies
        ]
        lines.append(f"| {name} | {bounds} | " + " | ".join(cells) + " |")
    lines += ["", "## Change against the untouched model, mean over seeds with 95 % interval", ""]
    tables = {heading: differences(studies, path) for heading, path in COLUMNS}
    untouched = [
        statistics.fmean([v for s in studies if (v := pick(s["untouched"], path)) is not None]) for _, path in COLUMNS
    ]
    lines += ["| method | " + " | ".join(tables) + " |", "| --- " * (1 + len(tables)) + "|"]
    lines.append("| untouched (itself) | " + " | ".join(f"{v:.2f}" for v in untouched) + " |")
    for name in dict.fromkeys(n for t in tables.values() for n in t):
        lines.append(
            f"| {name} | " + " | ".join(interval(t[name]) if name in t else "" for t in tables.values()) + " |"
        )
    refused = {(n, m["refused"]) for s in studies for n, m in s["methods"].items() if "refused" in m}
    if refused:
        lines += ["", "## Refused", ""] + [f"* {name}: {why}" for name, why in sorted(refused)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder with *.effects.json")
    options = parser.parse_args()
    if options.report:
        studies = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(options.report.glob("*.effects.json"))]
        device = str(studies[0].get("device", "cpu"))
        target = (
            Path(__file__).parent
            / "results"
            / f"tiny_vlm_{'h100' if 'H100' in device else 'h200' if 'H200' in device else 'cpu'}"
        )
        target.with_suffix(".md").write_text("\n".join(report(studies, device)) + "\n", encoding="utf-8")
        target.with_suffix(".json").write_text(json.dumps(studies, indent=1) + "\n", encoding="utf-8")
        return
    from model import load

    device = torch.device(options.device)
    found = study(load(options.weights).to(device), options.seed, device, options.rows)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    (options.out or options.weights.with_suffix(".effects.json")).write_text(
        json.dumps(found) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
