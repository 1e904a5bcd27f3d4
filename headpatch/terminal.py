"""Tables, head grids and side-by-side texts for the terminal, made with rich. What they say is readable without colour."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from headpatch.grid import Grid, Mark, strength_words
from headpatch.keeping import keepings
from headpatch.resolve import resolve

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.looks import Look, Picture
    from headpatch.recipe import Recipe

__all__ = [
    "Shown", "SideBySide", "console", "draw_grid", "draw_look", "draw_recipe", "plain_table", "print_json", "symbols",
]  # fmt: skip

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
SHAPES = (("▲", "▼"), ("●", "○"), ("■", "□"), ("◆", "◇"), ("★", "☆"))
"""Per patch: above its identity strength, and below it. Patches beyond the fifth, and terminals without Unicode, get letters."""


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr) that colours nothing of its own accord."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def print_json(value: object) -> None:
    """`value` as indented JSON on stdout, and nothing else: for other programs to read."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def plain_table(*columns: str) -> Table:
    """A table without lines, with a bold head."""
    return Table(
        *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns)
    )


def symbols(patch: int, unicode: bool = True) -> tuple[str, str]:
    """The two symbols of a patch: above its identity strength, and below it."""
    if unicode and patch < len(SHAPES):
        return SHAPES[patch]
    letter = chr(ord("A") + patch % 26)
    return letter, letter.lower()


def draw_recipe(
    recipe: Recipe, shape: ModelShape, found: Sequence[Grid], width: int, unicode: bool = True,
    windowed: Mapping[str, Collection[int]] | None = None,
) -> Group:  # fmt: skip
    """A recipe's grids with their legend.

    Parameters
    ----------
    shape
        What the recipe was resolved against.
    found
        Its grids (:func:`headpatch.grid.grids`).
    width
        Columns of the terminal.
    unicode
        False draws with ASCII letters.
    windowed
        By part, layers with a sliding window of their own, which cache policies leave alone.
    """
    patches = resolve(recipe, shape)
    legend = plain_table("", "method", "heads", "strengths", "parameters")
    for patch in patches:
        up, down = symbols(patch.index, unicode)
        marks = [m for grid in found for several in grid.marks.values() for m in several if m.patch == patch.index]
        strength = patch.method.strength_field()
        signs = ((up, 1, ">"), (down, -1, "<"), ("=", 0, ""))
        none, keeps = patch.method.identity(), {1: "keep all", -1: "keep some"}
        shown = [
            f"{symbol} {keeps[direction]}" if strength is None else f"{symbol} {sign}{none:g}"
            for symbol, direction, sign in signs
            if any(m.direction == direction for m in marks)
        ]
        others = [name for name in _parameters(patch.method) if strength is None or name != strength.name]
        legend.add_row(
            Text("  ".join(shown), style=COLOURS[patch.index % len(COLOURS)]),
            patch.method.name,
            f"{len(marks)}" + (" KV" if patch.method.head_kind == "kv" else ""),
            strength_words(patch, shape),
            ", ".join(f"{name}: {getattr(patch.method, name)}" for name in others),
        )
    pieces: list[RenderableType] = []
    for grid in found:
        pieces += [Text(grid.title, style="bold"), draw_grid(grid, width, unicode), Text("")]
    pieces.append(legend)
    pieces += [Text(line) for keeping in keepings(patches, windowed) for line in keeping.lines()]
    if key := _key(found, unicode):
        pieces.append(Text(key, style="dim"))
    return Group(*pieces)


def _parameters(method: Any) -> list[str]:
    import dataclasses

    return [f.name for f in dataclasses.fields(method)]


def _key(found: Sequence[Grid], unicode: bool) -> str:
    marks = [several for grid in found for several in grid.marks.values()]
    words = []
    if any(len(grid.marks) < sum(grid.counts) for grid in found):
        words.append(f"{_empty(unicode)} untouched")
    if any(len(several) > 1 for several in marks):
        words.append("* several patches")
    if any(m.direction == 0 for several in marks for m in several):
        words.append("= named, at the strength that does nothing: not touched either")
    return "   ".join(words)


def _empty(unicode: bool) -> str:
    return "·" if unicode else "."


def draw_grid(grid: Grid, width: int, unicode: bool = True) -> Text:
    """One grid: layers from left to right, heads from top to bottom; in blocks of layers where the terminal is narrow."""
    layers, rows = len(grid.counts), max(grid.counts)
    margin = len(f"head {rows - 1} ")
    cell = 2 if margin + 2 * layers <= width else 1
    block = max(1, (width - margin) // cell)
    block -= block % 5 if block > 5 else 0  # so that every block begins under a number
    text = Text(no_wrap=True)
    for start in range(0, layers, block):
        shown = range(start, min(start + block, layers))
        text.append(_ruler(shown, cell, margin) + "\n", style="dim")
        for head in range(rows):
            text.append(f"head {head}".rjust(margin - 1) + " ", style="dim")
            for layer in shown:
                symbol, style = _cell(grid, layer, head, unicode)
                text.append(symbol.ljust(cell), style=style)
            text.append("\n")
    text.right_crop(1)
    return text


def _cell(grid: Grid, layer: int, head: int, unicode: bool) -> tuple[str, str]:
    if head >= grid.counts[layer]:
        return " ", ""
    marks: tuple[Mark, ...] = grid.marks.get((layer, head), ())
    if not marks:
        return _empty(unicode), "dim"
    if len(marks) > 1:
        return "*", "bold white"
    (mark,) = marks
    colour = COLOURS[mark.patch % len(COLOURS)]
    if mark.direction == 0:
        return "=", colour
    up, down = symbols(mark.patch, unicode)
    return (up if mark.direction > 0 else down), f"bold {colour}"


def _ruler(layers: range, cell: int, margin: int) -> str:
    """Layer numbers, every fifth, over their columns."""
    line = "layer".rjust(margin - 1) + " "
    for layer in layers:
        column = margin + (layer - layers.start) * cell
        if layer % 5 == 0 and len(line) <= column:
            line = line.ljust(column) + str(layer)
    return line


SHADES = " ░▒▓█"
ASCII_SHADES = " .:*#"
TOKENS = 6
"""Tokens that are named for each head, query and side."""


def draw_look(look: Look, unicode: bool = True) -> Group:
    """Where heads look, in words: per head and query the tokens with the most attention, and pictures as a map of shades.

    Parameters
    ----------
    look
        Of :func:`headpatch.looks.look`.
    unicode
        False draws with ASCII.
    """
    pieces: list[RenderableType] = []
    sides = [("before", look.before)] + ([("after", look.after)] if look.after is not None else [])
    for h, head in enumerate(look.heads):
        for q, at in enumerate(look.queries):
            rows = [(name, values[h, q]) for name, values in sides]
            moved = 50 * float((rows[-1][1] - rows[0][1]).abs().sum())
            lines = [
                Text.assemble((f"  {name:<8}", "dim"), _most(look, values), no_wrap=True, overflow="ellipsis")
                for name, values in rows
            ]
            head_line = f"head {head}, query {at} {_quoted(look.pieces[at])}"
            pieces += [Text(head_line + (f": {moved:.0f} % moved" if len(rows) > 1 else ""), style="bold"), *lines]
            for picture in look.pictures:
                pieces.append(_maps(picture, rows, SHADES if unicode else ASCII_SHADES))
            pieces.append(Text(""))
    if look.problem:
        pieces.append(Text(f"no map of the picture: {look.problem}", style="dim"))
    return Group(*pieces)


def _most(look: Look, values: Any) -> str:
    """The tokens with the most attention, each with its share in percent and its position; a picture counts as one."""
    hidden = {i for picture in look.pictures for i in range(len(look.pieces))[picture.places]}
    shares = [(float(values[picture.places].sum()), "the picture") for picture in look.pictures]
    shares += [(float(v), f"{_quoted(look.pieces[i])}@{i}") for i, v in enumerate(values.tolist()) if i not in hidden]
    best = sorted(shares, key=lambda s: -s[0])[:TOKENS]
    return "  ".join(f"{100 * share:.0f}% {name}" for share, name in best if share >= 0.005)


def _quoted(piece: str) -> str:
    return json.dumps(piece, ensure_ascii=False)


def _maps(picture: Picture, rows: Sequence[tuple[str, Any]], shades: str) -> Table:
    """Before and after side by side, on one scale; a patch is two characters wide."""
    top = max(float(values[picture.places].max()) for _, values in rows) or 1.0
    made = Table.grid(padding=(0, 3))
    cells = []
    for name, values in rows:
        grid = values[picture.places].view(picture.rows, picture.columns)
        lines = ["".join(2 * shades[min(4, int(5 * v / top))] for v in line) for line in grid.tolist()]
        cells.append(Panel(Text("\n".join(lines)), title=name, expand=False))
    made.add_row(*cells)
    return made


class SideBySide:
    """Two columns of text that fill while a model writes.

    Parameters
    ----------
    target
        Console to draw on.
    names
        Titles of the columns, left to right.
    """

    def __init__(self, target: Console, names: Iterable[str] = ("untouched", "patched")) -> None:
        self.texts = dict.fromkeys(names, "")
        self.live = Live(self.table(), console=target, refresh_per_second=8, vertical_overflow="visible")

    def table(self) -> Table:
        """Both texts as they are now."""
        grid = Table.grid(expand=True, padding=(0, 1))
        cells = []
        for (name, text), style in zip(self.texts.items(), ("yellow", "green"), strict=True):
            grid.add_column(ratio=1)
            cells.append(Panel(Text(text), title=name, border_style=style))
        grid.add_row(*cells)
        return grid

    def hear(self, column: str) -> Callable[[str], None]:
        """What to call with each new piece of one column's text."""

        def add(piece: str) -> None:
            self.texts[column] += piece
            self.live.update(self.table())

        return add

    def __enter__(self) -> SideBySide:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()


class Shown:
    """A progress bar with the time left on stderr, and lines above it."""

    def __enter__(self) -> Shown:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console(stderr=True),
        )  # fmt: skip
        self.start = time.monotonic()
        self.task: Any = None
        self.what = ""
        self.bar.start()
        return self

    def progress(self, what: str, done: int, total: int, stage: str | None = None) -> None:
        """A stage has come so far; stages of one measurement are not worth a bar. What is shown may change within one `stage`."""
        if total <= 1:
            return
        stage = stage or what
        if stage != self.what or self.task is None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.what, self.task = stage, self.bar.add_task(what, total=total, completed=done)
        self.bar.update(self.task, completed=done, total=total, description=what)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.console.print(f"[{time.monotonic() - self.start:7.1f} s] {line}", markup=False)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
