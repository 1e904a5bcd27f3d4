"""Under which conditions does the small vision-language model form attention sinks? One training run per condition, same eyes.

    python benchmarks/tiny_vlm_sinks.py --eyes DIR/seed1.safetensors --work DIR [NAME ...] [--toy]

A condition changes one thing of the plan (examples/tiny_vlm/train.py). A model *has sink dimensions* where
`headpatch.find.sink_dimensions` finds some: dimensions extreme at the first token and at some later token that draws at least three
times its even share of attention. It *has visual sinks* where such a token is an image token in at least half of the images. That,
and the list of conditions, was fixed before any was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_vlm_measure import IMAGE_TOKENS, PREFIXES, Speaker, World, encode
from torch import Tensor
from train import TINY, Plan, train

import headpatch
from headpatch.errors import HeadpatchError
from headpatch.find.sink_dimensions import sink_dimensions

SHORT = 1200
"""Steps of the last stage in all conditions but *longer*."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "longer": {"steps": (0, 700, 60, 3 * SHORT)},
    "wider": {"size": {"width": 384, "heads": 12, "mlp": 960}},
    "long prefix": {"prefix": "long"},
    "no prefix": {"prefix": "none"},
    "weight decay 0.3": {"weight_decay": 0.3},
    "weight decay 0": {"weight_decay": 0.0},
}
"""*no prefix* leaves the first token alone before the image: no other place for attention that a head does not need."""


def plan(name: str, eyes: Path, toy: bool = False) -> Plan:
    """The plan of one condition."""
    base = TINY if toy else Plan(steps=(0, 700, 60, SHORT))
    change = dict(CONDITIONS[name])
    if "size" in change:
        change["size"] = dataclasses.replace(
            base.size, **({"width": 96, "heads": 6, "mlp": 128} if toy else change["size"])
        )
    if toy:
        change.pop("steps", None)
    return dataclasses.replace(base, seed=1, eyes_from=str(eyes), **change)


@torch.no_grad()
def look(model: Any, prefix: str, device: torch.device | str, images: int = 100) -> dict[str, Any]:
    """What first and image tokens look like in the residual stream, and how much attention they draw."""
    speaker, world = Speaker(model, prefix), World(3_000_000, device)
    scenes = world.scenes(images, "train")
    ids, pixels = speaker.ids(speaker.question(scenes.companion)), world.render(scenes)
    layers = model.config.text_config.num_hidden_layers
    threshold = 0.3125 * math.sqrt(model.config.text_config.hidden_size)
    first_image = len(encode(PREFIXES[prefix]))
    place = slice(first_image, first_image + IMAGE_TOKENS)
    with headpatch.observe(model, ("layer_input", "column_means"), "*.*") as seen:
        model(input_ids=ids, pixel_values=pixels)
    of_layer = []
    for layer in range(layers):
        x = seen["layer_input", str(layer)][0].float()
        phi = x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        means = torch.stack(
            [v[0] for (name, h), v in seen.items() if name == "column_means" and h.split(".")[0] == str(layer)], 1
        )
        norm = x.norm(dim=-1)
        of_layer.append({
            "first token, largest phi": float(phi[:, 0].amax(-1).mean()),
            "image tokens, largest phi": float(phi[:, place].amax(-1).amax(-1).mean()),
            "image tokens at or above the threshold, %": 100 * float((phi[:, place].amax(-1) >= threshold).double().mean()),
            "norm of the first token, in image medians": float((norm[:, 0] / norm[:, place].median(1).values).mean()),
            "heads that pay the first token more than 0.3, %": 100 * float((means[:, :, 0] > 0.3).double().mean()),
            "mean attention to the first token": float(means[:, :, 0].mean()),
            "largest mean attention to an image token": float(means[:, :, place].amax(-1).mean()),
        })  # fmt: skip
    prompts = [{"input_ids": row[None], "pixel_values": p[None]} for row, p in zip(ids[:50], pixels, strict=False)]
    verdict: dict[str, Any] = {"threshold": threshold}
    try:
        found = sink_dimensions(model, prompts, layers=f"1-{layers - 1}")
        visual = _visual(seen, found.dimensions, threshold, place)
        verdict |= {"dimensions": list(found.dimensions), "lift": found.lift, "visual": visual}
    except HeadpatchError as error:
        verdict["refused"] = str(error)
    return {"layers": of_layer, "verdict": verdict}


def _visual(seen: Any, dims: tuple[int, ...], threshold: float, place: slice) -> float:
    """Share of the images that have, in some layer, an image token extreme in these dimensions; in percent."""
    found: Tensor | None = None
    for (name, _), values in seen.items():
        if name == "layer_input":
            x = values[0].float()
            phi = x[..., list(dims)].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
            here = (phi[:, place] >= threshold).any(1)
            found = here if found is None else found | here
    assert found is not None
    return 100 * float(found.double().mean())


def condition(
    name: str, eyes: Path, work: Path, device: torch.device | str, toy: bool = False, until: Callable[[], bool] = lambda: False,
    images: int = 100,
) -> dict[str, Any] | None:  # fmt: skip
    """Train one condition and look at it; None where `until` came first."""
    from model import load

    what = plan(name, eyes, toy)
    weights = train(what, work, f"sinks-{name.replace(' ', '-')}", device, until)
    if weights is None:
        return None
    log = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    model = load(weights, what.size).to(device)
    return {
        "name": name,
        **look(model, what.prefix, device, images),
        "loss": log["log"]["instructions"][-1],
        "device": log["device"],
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: one line per condition, each figure at the layer where it is largest."""
    keys = list(found[0]["layers"][0])
    head = ["condition", *keys, "sink dimensions", "images with a visual sink, %"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for one in found:
        verdict = one["verdict"]
        peaks = " | ".join(f"{max(layer[k] for layer in one['layers']):.3g}" for k in keys)
        dims = ", ".join(map(str, verdict["dimensions"])) if "dimensions" in verdict else "none"
        lines.append(f"| {one['name']} | {peaks} | {dims} | {verdict.get('visual', 0):.3g} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONDITIONS)}; default all")
    parser.add_argument("--eyes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    found = [
        condition(n, options.eyes, options.work, options.device, options.toy) for n in options.names or CONDITIONS
    ]
    done = [one for one in found if one is not None]
    (options.work / "sinks.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(done)))


if __name__ == "__main__":
    main()
