"""A small world of coloured shapes: scenes drawn at random, rendered in batches, and true sentences about them.

There are six themes. Each has an *anchor*, a shape that is nearly always there, and a *companion*, which goes with its anchor nine
times out of ten, is drawn small, and often is faint. Everything that is said about a scene is true of it; that companions go with
anchors is the only thing that can mislead. Splits differ in this alone:

    train            companions as above; also the split on which nothing is unusual
    balanced         the anchor is there, and its companion every other time
    counterfactual   the anchor is there and its companion never
    clear            counterfactual without sensor noise
    decorrelated     every shape by itself; for training the eyes only
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ANCHORS",
    "COLOURS",
    "COMPANIONS",
    "MEAN",
    "PIXELS",
    "SHAPES",
    "SPLITS",
    "STD",
    "WORDS",
    "Scenes",
    "World",
    "encode",
]

SHAPES = ("circle", "square", "triangle", "star", "plus", "ring", "heart", "diamond", "moon", "arrow", "bar", "bolt")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("small", "medium", "large")
PREFIX = ("you", "see", "a", "picture", "and", "say", "what", "is", "in", "it", "not")
WORDS = tuple(dict.fromkeys((
    "<pad>", "<s>", "</s>", "<image>", "<unk>", "USER:", "ASSISTANT:", "describe", "the", "image", ".", "shows", ",", "and", "a",
    "is", "there", "?", "yes", "no", "what", "colour", *SIZES, *COLOURS, *SHAPES, *PREFIX,
)))  # fmt: skip
"""The whole vocabulary, one token each, in the order of their ids."""
SPLITS = ("train", "balanced", "counterfactual", "clear", "decorrelated")
THEMES, OBJECTS, PIXELS = 6, 6, 64
ANCHORS = ("circle", "ring", "arrow", "star", "moon", "square")
COMPANIONS = ("heart", "bolt", "plus", "bar", "triangle", "diamond")
MEAN, STD = 0.45, 0.25
RADII = (4.5, 6.5, 8.5)
RGB = (
    (0.85, 0.10, 0.10), (0.10, 0.70, 0.15), (0.15, 0.25, 0.90), (0.95, 0.85, 0.10), (0.60, 0.15, 0.75), (1.00, 0.50, 0.05),
    (0.97, 0.97, 0.97), (0.03, 0.03, 0.03),
)  # fmt: skip
TINTS = (
    (0.45, 0.35, 0.35), (0.35, 0.45, 0.35), (0.35, 0.38, 0.50), (0.47, 0.45, 0.33), (0.43, 0.35, 0.47), (0.36, 0.45, 0.46),
)  # fmt: skip
TURNS = 5
"""Questions of one dialogue."""
TEXT = 8 + 5 * OBJECTS + 1
"""Tokens of a caption with its question, and of a dialogue after padding, what stands before the image aside."""
_ID = {word: i for i, word in enumerate(WORDS)}


def encode(sentence: str) -> list[int]:
    """Ids of the words of a sentence; KeyError for a word that there is not."""
    return [_ID[word] for word in sentence.split()]


@dataclass
class Scenes:
    """n scenes; o objects each, of which `real` ones exist.

    Attributes
    ----------
    theme
        [n].
    anchor, companion
        [n] shape of the theme's anchor and companion, whether they are there or not.
    present
        [n, shapes] bool.
    shape, size, colour, real
        [n, o] ids, and which of the objects exist.
    contrast, x, y, angle
        [n, o] opacity, centre in pixels, turn in radians.
    tint, noise
        [n] background, and standard deviation of the sensor's noise.
    decorrelated
        Whether shapes came by themselves.
    """

    theme: Tensor
    anchor: Tensor
    companion: Tensor
    present: Tensor
    shape: Tensor
    size: Tensor
    colour: Tensor
    real: Tensor
    contrast: Tensor
    x: Tensor
    y: Tensor
    angle: Tensor
    tint: Tensor
    noise: Tensor
    decorrelated: bool = False

    def has(self, shape: Tensor) -> Tensor:
        """[n] whether each scene holds this shape [n]."""
        return self.present.gather(1, shape[:, None])[:, 0]


class World:
    """Draws scenes, renders them and talks about them; everything in batches on one device, from one generator.

    Parameters
    ----------
    seed
        Of the generator. Training, and each test split, has its own.
    contrast
        Range of a companion's opacity.
    noise
        The sensor's noise is uniform from 0 to this.
    together
        How often a companion goes with its anchor.
    """

    def __init__(
        self, seed: int, device: torch.device | str = "cpu", contrast: tuple[float, float] = (0.15, 0.8), noise: float = 0.19,
        together: float = 0.9,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.contrast, self.noise, self.together = contrast, noise, together
        self.random = torch.Generator(device=self.device).manual_seed(seed)
        self.anchors = torch.tensor([SHAPES.index(s) for s in ANCHORS], device=self.device)
        self.companions = torch.tensor([SHAPES.index(s) for s in COMPANIONS], device=self.device)
        self.rgb, self.tints = (torch.tensor(v, device=self.device) for v in (RGB, TINTS))
        self.distances = distance_textures().to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(*shape, device=self.device, generator=self.random)

    def scenes(self, n: int, split: str = "train") -> Scenes:
        """Draw n scenes of a split."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        row, free = torch.arange(n, device=self.device), split == "decorrelated"
        theme = (self.uniform(n) * THEMES).long()
        anchor, companion = self.anchors[theme], self.companions[theme]
        present = self.uniform(n, len(SHAPES)) < (0.22 if free else 0.05)
        if not free:
            for other in (self.anchors[(theme + 1) % THEMES], self.companions[(theme + 2) % THEMES]):
                present[row, other] = self.uniform(n) < 0.35
            unusual = split != "train"
            present[row, anchor] = (self.uniform(n) < 0.95) | unusual
            chance = {"balanced": 0.5, "counterfactual": 0.0, "clear": 0.0}.get(split, self.together)
            present[row, companion] = self.uniform(n) < torch.where(present[row, anchor], chance, 0.2)
        present[row, anchor] |= ~present.any(1)
        # At most OBJECTS of them exist; anchor and companion are never left out for want of room.
        rank = present + 0.5 * self.uniform(n, len(SHAPES))
        rank[row, anchor] += 0.6 * present[row, anchor]
        rank[row, companion] += 0.6 * present[row, companion]
        shape = rank.topk(OBJECTS, 1).indices
        real = present.gather(1, shape)
        present = torch.zeros_like(present).scatter_(1, shape, real)
        size, colour = (self.uniform(n, OBJECTS) * len(SIZES)).long(), (self.uniform(n, OBJECTS) * len(COLOURS)).long()
        faint = (self.uniform(n, OBJECTS) < 0.4) if free else shape == companion[:, None]
        low, high = self.contrast
        contrast = torch.where(
            faint, low + (high - low) * self.uniform(n, OBJECTS), 0.6 + 0.4 * self.uniform(n, OBJECTS)
        )
        cell = self.uniform(n, 9).argsort(1)[:, :OBJECTS]
        x, y = ((c * 20 + 12 + 7 * self.uniform(n, OBJECTS) - 3.5) for c in (cell % 3, cell // 3))
        usual = (self.uniform(n) < 0.8) | (split in ("balanced", "counterfactual", "clear"))
        tint = torch.where(usual & (not free), theme, (self.uniform(n) * THEMES).long())
        noise = self.noise * self.uniform(n) * (split != "clear")
        return Scenes(
            theme, anchor, companion, present, shape, torch.where(faint, 0, size), colour, real, contrast, x, y,
            0.6 * self.uniform(n, OBJECTS) - 0.3, tint, noise, free,
        )  # fmt: skip

    def render(self, scenes: Scenes, objects: bool = True) -> Tensor:
        """Pictures [n, 3, 64, 64], normalised by MEAN and STD; without objects only the background is drawn."""
        n = len(scenes.theme)
        blotches = 0.16 * (self.uniform(n, 3, 5, 5) - 0.5)
        texture = functional.interpolate(blotches, size=PIXELS, mode="bilinear", align_corners=True)
        image = self.tints[scenes.tint][:, :, None, None] + texture
        axis = torch.arange(PIXELS, device=self.device) + 0.5
        radii = torch.tensor(RADII, device=self.device)[scenes.size]
        for o in range(OBJECTS if objects else 0):
            dx = (axis[None, None] - scenes.x[:, o, None, None]) / radii[:, o, None, None]
            dy = (axis[None, :, None] - scenes.y[:, o, None, None]) / radii[:, o, None, None]
            cos, sin = scenes.angle[:, o, None, None].cos(), scenes.angle[:, o, None, None].sin()
            where = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1) / EXTENT
            texture = self.distances[scenes.shape[:, o]][:, None]
            distance = functional.grid_sample(texture, where, padding_mode="border", align_corners=True)[:, 0]
            cover = (0.5 - distance * radii[:, o, None, None]).clamp(0, 1)  # one pixel of soft edge
            cover = cover * (scenes.contrast[:, o] * scenes.real[:, o])[:, None, None]
            image = torch.lerp(image, self.rgb[scenes.colour[:, o]][:, :, None, None], cover[:, None])
        speckle = torch.randn(image.shape, device=self.device, generator=self.random)
        image = (image + speckle * scenes.noise[:, None, None, None]).clamp(0, 1)
        return (image - MEAN) / STD

    # --- words ------------------------------------------------------------------------------------------------------------

    def _ids(self, words: tuple[str, ...], which: Tensor) -> Tensor:
        return torch.tensor([_ID[w] for w in words], device=self.device)[which]

    def _all(self, like: Tensor, word: str) -> Tensor:
        return torch.full_like(like, _ID[word])

    def captions(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """``describe the image . ASSISTANT: the image shows a small red star , ... . </s>``: ids [n, TEXT] and which are learned.

        Large objects come first, with exceptions, so that companions come late.
        """
        n = len(scenes.theme)
        swap = (self.uniform(n, OBJECTS) < 0.2) * (3 * self.uniform(n, OBJECTS) - 1.5)
        order = (scenes.size + 0.5 * self.uniform(n, OBJECTS) + swap - 10.0 * ~scenes.real).argsort(1, descending=True)
        size, colour, shape = (v.gather(1, order) for v in (scenes.size, scenes.colour, scenes.shape))
        count, place = scenes.real.sum(1, keepdim=True), torch.arange(OBJECTS, device=self.device)[None]
        after = torch.where(place == count - 1, _ID["."], torch.where(place == count - 2, _ID["and"], _ID[","]))
        named = [
            self._all(size, "a"),
            self._ids(SIZES, size),
            self._ids(COLOURS, colour),
            self._ids(SHAPES, shape),
            after,
        ]
        before = torch.tensor(encode("describe the image . ASSISTANT: the image shows"), device=self.device)
        ids = torch.cat([before.expand(n, -1), torch.stack(named, 2).view(n, -1)], 1)
        ids = functional.pad(ids, (0, TEXT - ids.shape[1]), value=_ID["<pad>"])
        end, column = len(before) + 5 * count, torch.arange(TEXT, device=self.device)[None]
        ids = torch.where(column < end, ids, torch.where(column == end, _ID["</s>"], _ID["<pad>"]))
        return ids, (column >= 5) & (column <= end)

    def dialogues(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Five questions with their answers: ids [n, 5 x 9] and which are learned. One in ten of the shapes that are there is asked
        for its colour. Which shapes are asked depends on the theme and never on what is there, so that the answers carry the world's
        own frequencies.
        """
        n = len(scenes.theme)
        row = torch.arange(n, device=self.device)
        weight = torch.full((n, len(SHAPES)), 0.15 / 8, device=self.device)
        if scenes.decorrelated:
            weight[:] = 1 / len(SHAPES)
        else:
            theme = scenes.theme
            asked_often = (
                (scenes.companion, 0.25), (scenes.anchor, 0.15), (self.anchors[(theme + 1) % THEMES], 0.075),
                (self.companions[(theme + 2) % THEMES], 0.075),
            )  # fmt: skip
            for shape, share in asked_often:
                weight[row, shape] = share
        gumbel = -(-self.uniform(n, len(SHAPES)).clamp_min(1e-9).log()).log()
        asked = (weight.log() + gumbel).topk(TURNS, 1).indices  # without repeats
        there = scenes.present.gather(1, asked)
        found = (scenes.shape[:, None] == asked[:, :, None]) & scenes.real[:, None]
        colour = self._ids(COLOURS, (found * scenes.colour[:, None]).sum(2))
        of_colour = (self.uniform(n, TURNS) < 0.1) & there

        def either(first: str, second: str) -> Tensor:
            return torch.where(of_colour, _ID[first], _ID[second])

        answer = torch.where(of_colour, colour, torch.where(there, _ID["yes"], _ID["no"]))
        turn = torch.stack([
            either("what", "is"), either("colour", "there"), either("is", "a"), self._ids(SHAPES, asked), self._all(asked, "?"),
            self._all(asked, "ASSISTANT:"), answer, self._all(asked, "</s>"), self._all(asked, "USER:"),
        ], 2)  # fmt: skip
        learned = torch.tensor([False] * 6 + [True, True, False], device=self.device).repeat(TURNS)
        return turn.view(n, -1), learned.expand(n, -1)

    def texts(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Captions and dialogues, half of each: ids [n, width] and which are learned."""
        (caption, told), (dialogue, answered) = self.captions(scenes), self.dialogues(scenes)
        width = max(caption.shape[1], dialogue.shape[1])
        caption, dialogue = (
            functional.pad(t, (0, width - t.shape[1]), value=_ID["<pad>"]) for t in (caption, dialogue)
        )
        told, answered = (functional.pad(t, (0, width - t.shape[1]), value=False) for t in (told, answered))
        coin = (self.uniform(len(caption)) < 0.5)[:, None]
        return torch.where(coin, caption, dialogue), torch.where(coin, told, answered)


# --- shapes, as signed distances ------------------------------------------------------------------------------------------

EXTENT, TEXELS = 1.3, 65
"""Textures reach from -EXTENT to EXTENT, in radii of the shape."""


def distance_textures() -> Tensor:
    """[shapes, TEXELS, TEXELS] signed distance to each shape's outline, negative inside, in radii."""
    axis = torch.linspace(-EXTENT, EXTENT, TEXELS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def disc(radius: float, cx: float = 0.0) -> Tensor:
        return ((x - cx).square() + y.square()).sqrt() - radius

    def box(width: float, height: float) -> Tensor:
        dx, dy = x.abs() - width, y.abs() - height
        return (dx.clamp_min(0).square() + dy.clamp_min(0).square()).sqrt() + torch.maximum(dx, dy).clamp_max(0)

    spikes = [
        ((0.42 if k % 2 else 1.0) * math.sin(k * math.pi / 5), -(0.42 if k % 2 else 1.0) * math.cos(k * math.pi / 5))
        for k in range(10)
    ]
    turns = [2 * math.pi * k / 40 for k in range(40)]
    heart = [
        (0.058 * 16 * math.sin(t) ** 3, -0.062 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]  # fmt: skip
    arrow = [(-0.95, -0.25), (0.1, -0.25), (0.1, -0.8), (0.95, 0.0), (0.1, 0.8), (0.1, 0.25), (-0.95, 0.25)]
    bolt = [(-0.1, -0.95), (0.55, -0.95), (0.15, -0.2), (0.6, -0.2), (-0.4, 0.95), (-0.05, 0.1), (-0.55, 0.1)]
    outlines = {
        "circle": disc(0.9),
        "square": box(0.8, 0.8),
        "triangle": _polygon([(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)], x, y),
        "star": _polygon(spikes, x, y),
        "plus": torch.minimum(box(0.3, 0.95), box(0.95, 0.3)),
        "ring": (disc(0.76).abs() - 0.21),
        "heart": _polygon(heart, x, y),
        "diamond": _polygon([(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)], x, y),
        "moon": torch.maximum(disc(0.97), -disc(0.71, 0.45)),
        "arrow": _polygon(arrow, x, y),
        "bar": box(0.95, 0.32),
        "bolt": _polygon(bolt, x, y),
    }
    return torch.stack([outlines[shape] for shape in SHAPES])


def _polygon(points: list[tuple[float, float]], x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a polygon: the nearest point on an edge, and the parity of edges crossed on the way to the right."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    nearest = torch.full_like(x, math.inf)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - ax - along * ex).square() + (y - ay - along * ey).square())
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / (by - ay))
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())
