"""Pictures of recipes, drawn with matplotlib (extra ``plots``); no window is opened and no global state of matplotlib is touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headpatch.errors import EngineError
from headpatch.grid import Grid, Mark, grids, shape_of
from headpatch.keeping import LENGTHS, Keeping, keepings
from headpatch.resolve import resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping

    from matplotlib.figure import Figure

    from headpatch.heads import ModelShape
    from headpatch.looks import Look
    from headpatch.needle_grid import NeedleGrid
    from headpatch.recipe import Recipe
    from headpatch.resolve import ResolvedPatch

__all__ = ["draw", "draw_look", "draw_needles", "save", "save_figure"]

MARKERS = ("^", "o", "s", "D", "P", "v", "X", "<")
"""One per patch, so that patches differ without colour, too."""
STEPS = 2.0
"""Doublings (or halvings) of a strength at which its colour is the deepest."""
CELL = 0.23
"""Inches per head."""


def draw(
    recipe: Recipe, shape: ModelShape | None = None, windowed: Mapping[str, Collection[int]] | None = None
) -> Figure:  # fmt: skip
    """A recipe's heads as a figure: layers from left to right, heads from top to bottom.

    The marker says which patch; its colour how the strength compares with the one at which the method does nothing: blue below it,
    red above it. KV heads under a cache policy are dark where they keep every token and hollow where they do not.

    Parameters
    ----------
    shape
        The model; None takes the shape that the recipe gives.
    windowed
        By part, layers with a sliding window of their own, which cache policies leave alone.

    Raises
    ------
    RecipeError
        The recipe does not fit the shape, or gives none and needs one.
    EngineError
        matplotlib is not installed.
    """
    figures = _matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shape = shape or shape_of(recipe)
    found, patches = grids(recipe, shape, windowed), resolve(recipe, shape)
    kept = {keeping.index: keeping for keeping in keepings(patches, windowed)}
    colours = ScalarMappable(Normalize(-STEPS, STEPS), "coolwarm")
    width = max(4.5, CELL * max(len(grid.counts) for grid in found) + 1.2)
    heights = [max(1.2, CELL * max(grid.counts)) for grid in found]
    figure = figures.Figure(
        figsize=(width, sum(heights) + 0.55 * len(found) + 0.4 + 0.2 * (len(patches) + 2 * len(kept))),
        layout="constrained",
    )
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, grid in zip(axes, found, strict=True):
        _draw_grid(axis, grid, patches, colours)
    figure.suptitle(recipe.name or "recipe", fontsize=11)
    if len(kept) < len(patches):
        bar = figure.colorbar(colours, ax=list(axes), pad=0.02, aspect=12, ticks=[-STEPS, 0, STEPS])
        bar.ax.set_yticklabels(["weaker", "as it was", "stronger"], fontsize=7)
    figure.legend(handles=_legend(patches, kept), loc="outside lower left", fontsize=8, frameon=False)
    return figure


def save(
    recipe: Recipe, path: str | os.PathLike[str], shape: ModelShape | None = None, dpi: int = 160,
    windowed: Mapping[str, Collection[int]] | None = None,
) -> Path:  # fmt: skip
    """Write :func:`draw`'s figure to a file; the suffix gives the format (png, svg, pdf).

    Raises
    ------
    RecipeError, EngineError
        As :func:`draw`; or the suffix is of no format that matplotlib writes.
    OSError
        The file cannot be written.
    """
    return save_figure(draw(recipe, shape, windowed), path, dpi)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 160) -> Path:
    """Write a figure to a file; the suffix gives the format.

    Raises
    ------
    EngineError
        The suffix is of no format that matplotlib writes.
    OSError
        The file cannot be written.
    """
    target = Path(path)
    if target.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise EngineError(
            f"{target}: matplotlib writes no {target.suffix or 'file without a suffix'}; name it .png, .svg or .pdf"
        )
    # No date and no version inside: the same recipe gives the same file.
    metadata = (
        {"Software": None} if target.suffix.lower() == ".png" else {"Date": None} if target.suffix == ".svg" else {}
    )
    figure.savefig(target, dpi=dpi, metadata=metadata)
    return target


LINE = 24
"""Tokens side by side in a picture of attention; longer prompts go on below."""


def draw_look(look: Look) -> Figure:
    """Where heads look, as a figure: for each head and query a line of tokens before and one after, darker where more attention goes;
    over the picture where the prompt has one, its tokens left out of the lines.

    Parameters
    ----------
    look
        Of :func:`headpatch.looks.look`.

    Raises
    ------
    EngineError
        matplotlib is not installed, or the prompt has a picture whose tokens are no grid (the message says why).
    """
    figures = _matplotlib()
    if look.problem:
        raise EngineError(f"the picture cannot be drawn over: {look.problem}")
    hidden = {i for picture in look.pictures for i in range(len(look.pieces))[picture.places]}
    sides = [("before", look.before)] + ([("after", look.after)] if look.after is not None else [])
    panels = [(h, q) for h in range(len(look.heads)) for q in range(len(look.queries))]
    # Tokens behind a query are not seen by it.
    lines = [_lines([i for i in range(look.queries[q] + 1) if i not in hidden]) for _, q in panels]
    pictures = 2.2 * bool(look.pictures)
    heights = [pictures + (0.42 + 0.24 * len(sides)) * len(of_panel) + 0.35 for of_panel in lines]
    width = 0.42 * max(max(map(len, of_panel), default=1) for of_panel in lines) + 1.4
    figure = figures.Figure(
        figsize=(max(width, 3.0 * len(sides) * len(look.pictures)), sum(heights)), layout="constrained"
    )
    boxes = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for box, (h, q), of_panel, height in zip(boxes, panels, lines, heights, strict=True):
        rows = [(name, values[h, q]) for name, values in sides]
        moved = f", {100 * 0.5 * float((rows[1][1] - rows[0][1]).abs().sum()):.0f} % moved" if len(rows) > 1 else ""
        at = look.queries[q]
        title = f"head {look.heads[h]}, query {at} ({_visible(look.pieces[at])}){moved}"
        box.suptitle(title, fontsize=8, x=0.01, ha="left")
        parts = box.subfigures(2, 1, height_ratios=[pictures, height - pictures]) if look.pictures else [None, box]
        if look.pictures:
            _over_pictures(parts[0], look, rows)
        _token_lines(parts[-1], look, rows, of_panel)
    return figure


def _lines(words: list[int]) -> list[list[int]]:
    """Token positions in lines of equal length, as few as hold them."""
    count = max(1, math.ceil(len(words) / LINE))
    length = math.ceil(len(words) / count)
    return [words[i : i + length] for i in range(0, len(words), length)]


def _over_pictures(box: Any, look: Look, rows: list[tuple[str, Any]]) -> None:
    axes = box.subplots(1, len(rows) * len(look.pictures), squeeze=False)[0]
    for i, (picture, (name, values)) in enumerate((p, r) for p in look.pictures for r in rows):
        # One scale for both, so that they can be compared.
        top = max(float(v[picture.places].max()) for _, v in rows) or 1.0
        grid = values[picture.places].view(picture.rows, picture.columns).numpy()
        height, width = picture.pixels.shape[:2]
        axes[i].imshow(picture.pixels.numpy(), extent=(0, width, height, 0))
        axes[i].imshow(
            grid, extent=(0, width, height, 0), cmap="inferno", vmin=0, vmax=top, alpha=0.6, interpolation="nearest"
        )
        axes[i].set_title(f"{name}: {100 * float(values[picture.places].sum()):.0f} % on the picture", fontsize=7)
        axes[i].set_axis_off()


def _token_lines(box: Any, look: Look, rows: list[tuple[str, Any]], lines: list[list[int]]) -> None:
    shown = [values[line] for line in lines for _, values in rows]
    top = max((float(v.max()) for v in shown if len(v)), default=1.0) or 1.0
    for axis, line in zip(box.subplots(len(lines), 1, squeeze=False)[:, 0], lines, strict=True):
        axis.imshow([values[line].tolist() for _, values in rows], cmap="Blues", vmin=0, vmax=top, aspect="auto")
        axis.set_xlim(-0.5, max(map(len, lines)) - 0.5)
        axis.set_xticks(
            range(len(line)), [_visible(look.pieces[i]) for i in line], fontsize=6, rotation=45, ha="right"
        )
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=6)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        for y, (_, values) in enumerate(rows):
            for x, i in enumerate(line):
                if (share := float(values[i])) >= 0.1:
                    colour = "white" if share > 0.6 * top else "black"
                    axis.text(x, y, f"{100 * share:.0f}", fontsize=5.5, ha="center", va="center", color=colour)


def _visible(piece: str) -> str:
    """A token's text as a label: white space shown, nothing that matplotlib would take for mathematics."""
    text = piece.strip(" ").replace("\n", "\u21b5").replace("\t", "\u21e5")
    return (text or "\u2423").replace("$", r"\$")


def draw_needles(grid: NeedleGrid) -> Figure:
    """How many needles were found, by length and depth: a panel for the untouched model and one for each recipe.

    Lengths from left to right, depths from top to bottom; every cell has its percentage written in it.

    Raises
    ------
    EngineError
        matplotlib is not installed.
    """
    figures = _matplotlib()
    rows, columns, panels = len(grid.depths), len(grid.lengths), len(grid.names)
    size = (max(2.6, 0.52 * columns + 1.0) * panels + 0.6, max(2.0, 0.4 * rows + 1.3))
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, grid.names, strict=True):
        values = [[100 * v for v in row] for row in grid.matrix(name)]
        image = axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(columns), [str(n) for n in grid.lengths], fontsize=7, rotation=45 if columns > 4 else 0)
        axis.set_yticks(range(rows), [f"{100 * d:.0f} %" for d in grid.depths], fontsize=7)
        axis.set_title(f"{name}: {100 * grid.share(name).value:.0f} %", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
    axes[0].set_ylabel("depth of the needle", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    bar.set_label("needles found, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        raise EngineError("drawing needs matplotlib; pip install 'headpatch[plots]'") from error
    return figure


def _draw_grid(axis: Any, grid: Grid, patches: tuple[ResolvedPatch, ...], colours: Any) -> None:
    import matplotlib.ticker as ticker

    layers, rows = len(grid.counts), max(grid.counts)
    places = [(layer, head) for layer, count in enumerate(grid.counts) for head in range(count)]
    axis.scatter(*zip(*places, strict=True), s=4, color="0.8", marker="s", linewidths=0)
    for patch in patches:
        # Markers of later patches are smaller, so that all of them show where several act on one head.
        marked = [(place, m) for place, several in grid.marks.items() for m in several if m.patch == patch.index]
        if not marked:
            continue
        axis.scatter(
            [layer for (layer, _), _ in marked], [head for (_, head), _ in marked],
            c=[_colour(m, patch, colours) for _, m in marked], marker=MARKERS[patch.index % len(MARKERS)],
            s=120 / (1 + 0.9 * patch.index), edgecolors="black", linewidths=0.7, zorder=2 + patch.index,
        )  # fmt: skip
    axis.set(xlim=(-0.7, layers - 0.3), ylim=(rows - 0.3, -0.7), aspect="equal")
    axis.set_xlabel("layer", fontsize=8)
    axis.set_ylabel({"query": "query head", "kv": "KV head"}[grid.kind], fontsize=8)
    axis.set_title(grid.title, fontsize=8, loc="left", color="0.35")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.tick_params(labelsize=7, length=2)
    for spine in axis.spines.values():
        spine.set_color("0.8")


KEPT = {1: (0.2, 0.2, 0.2, 1.0), -1: (1.0, 1.0, 1.0, 1.0)}
"""Colours of KV heads under a cache policy: those that keep every token, and those that do not."""


def _colour(mark: Mark, patch: ResolvedPatch, colours: Any) -> Any:
    return KEPT[mark.direction] if patch.method.family == "cache" else colours.to_rgba(_depth(mark, patch))


def _depth(mark: Mark, patch: ResolvedPatch) -> float:
    """Where a strength lies on the colour scale: doublings away from the identity where both are positive."""
    if mark.strength is None or mark.direction == 0:
        return 0.0
    identity = patch.method.identity()
    if identity > 0:
        doublings = math.log2(mark.strength / identity) if mark.strength > 0 else -math.inf
    else:
        doublings = mark.strength - identity
    return max(-STEPS, min(STEPS, doublings))


def _legend(patches: tuple[ResolvedPatch, ...], kept: Mapping[int, Keeping]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for patch in patches:
        if (keeping := kept.get(patch.index)) is not None:
            handles += _kept_legend(keeping)
            continue
        strength = patch.method.strength_field()
        values = [v for heads in patch.heads.values() for v in (heads.values() if isinstance(heads, dict) else ())]
        count = sum(map(len, patch.heads.values()))
        span = f", {strength.name} {_span(values)}" if strength is not None and values else ""
        handles.append(
            Line2D(
                [], [], linestyle="", marker=MARKERS[patch.index % len(MARKERS)], color="0.75", markeredgecolor="black", markersize=7,
                label=f"{patch.method.name}: {count} heads{span}",
            )
        )  # fmt: skip
    return handles


def _kept_legend(keeping: Keeping) -> list[Any]:
    from matplotlib.lines import Line2D

    marker, rows = MARKERS[keeping.index % len(MARKERS)], []
    counts = ((1, keeping.num_full, "every token"), (-1, keeping.num_rest, keeping.rule))
    for direction, count, words in counts:
        if count:
            label = f"{keeping.method.name}: {count} KV heads keep {words}"
            rows.append(
                Line2D([], [], linestyle="", marker=marker, color=KEPT[direction], markeredgecolor="black", markersize=7, label=label)
            )  # fmt: skip
    shares = ", ".join(f"{keeping.share(n):.2f} at {n // 1024}k" for n in LENGTHS)
    rows.append(Line2D([], [], linestyle="", label=f"share of the cache: {shares} tokens"))
    return rows


def _span(values: list[float]) -> str:
    return f"{min(values):g}" if min(values) == max(values) else f"{min(values):g} to {max(values):g}"
