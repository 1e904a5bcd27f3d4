"""The picture and the tables of quality_kv.json: ``python benchmarks/quality_kv.py --stage draw`` writes them.

Policies are compared on the same prompts and passages, so intervals of differences are over the paired differences; random heads
count as the mean over their draws, prompt by prompt. Intervals are 95 %: Wilson's for shares of hits, else from 2,000 resamples of
prompts or passages (seed 0).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headpatch.find.stats import wilson

LINES = {
    "gates": ("DuoAttention, trained gates", "C0", "o-"), "retrieval": ("DuoAttention, retrieval scores", "C2", "s-"),
    "quick": ("DuoAttention, quick score", "C4", "^-"), "random": ("DuoAttention, random heads", "0.5", "x--"),
    "streaming_llm": ("streaming_llm, as many tokens", "C3", "v:"),
    "snapkv": ("snapkv, query-aware, as many tokens", "C1", "d-."), "ada_kv": ("ada_kv, query-aware, as many tokens", "C5", "P-."),
}  # fmt: skip
FOUND = ("gates", "retrieval", "quick")
DRAWS = 2000

Rows = dict[str, list[list[float]]]
"""By policy ``name@sparsity``: one row of values for each draw of heads, over the same prompts."""


def kept(sparsity: float, length: int, sizes: Mapping[str, Any]) -> float:
    """Share of the keys that a policy of this sparsity keeps of a sequence."""
    return 1 - sparsity + sparsity * min(1.0, (sizes["sink"] + sizes["recent"]) / length)


def ordered(rows: Rows) -> Rows:
    """The untouched model, then by sparsity, then as in the legend; draws by number."""
    names = [*LINES]

    def place(name: str) -> tuple[float, int]:
        which, _, sparsity = name.partition("@")
        return float(sparsity or 0), names.index(which) if which in LINES else -1

    return {name: rows[name] for name in sorted(rows, key=place)}


def needles(data: Mapping[str, Any]) -> dict[tuple[str, int], Rows]:
    """1 for each needle that was found, by kind and length."""
    made: dict[tuple[str, int], Rows] = {}
    for key, value in data.get("needles", {}).items():
        kind, length, name = key.split("/", 2)
        rows = made.setdefault((kind, int(length)), {})
        rows.setdefault(name.split("/")[0], []).append([float(v) for v in value["found"]])
    return {cell: ordered(rows) for cell, rows in made.items()}


def texts(data: Mapping[str, Any]) -> dict[int, Rows]:
    """Log-perplexity of each passage, by length."""
    made: dict[int, Rows] = {}
    for key, value in data.get("text", {}).items():
        length, name = key.split("/", 1)
        made.setdefault(int(length), {}).setdefault(name.split("/")[0], []).append(value["log_perplexity"])
    return {length: ordered(rows) for length, rows in made.items()}


def tasks(data: Mapping[str, Any]) -> tuple[dict[str, Rows], int]:
    """1 for each query that was answered, by task, and for ``all`` of them; mean tokens of a prompt."""
    held = data.get("tasks", {})
    made: dict[str, Rows] = {}
    for key in sorted(held):
        task, name = key.split("/", 1)
        if name != "about":
            made.setdefault(task, {}).setdefault(name.split("/")[0], []).append([float(v) for v in held[key]])
    every: Rows = {}
    for name in set.intersection(*(set(rows) for rows in made.values())) if made else ():
        draws = min(len(rows[name]) for rows in made.values())
        every[name] = [[v for rows in made.values() for v in rows[name][draw]] for draw in range(draws)]
    lengths = [v["tokens"] for k, v in held.items() if k.endswith("/about")]
    found = {task: ordered(rows) for task, rows in made.items()}
    return {**found, "all": ordered(every)} if made else {}, sum(lengths) // max(1, len(lengths))


def mean(draws: Sequence[Sequence[float]]) -> list[float]:
    """Over draws, prompt by prompt."""
    return [sum(column) / len(draws) for column in zip(*draws, strict=True)]


def interval(values: Sequence[float], hits: bool = False) -> tuple[float, float, float]:
    """Mean, and 95 % of the means of resamples; Wilson's interval for hits and misses, which may all be the same."""
    if hits and set(values) <= {0, 1}:
        e = wilson(sum(values), len(values))
        return e.value, e.low, e.high
    rng, n = random.Random(0), len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(DRAWS))
    return sum(values) / n, means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def minus(after: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> list[float]:
    return [a - b for a, b in zip(mean(after), mean(before), strict=True)]


# --- the picture ----------------------------------------------------------------------------------------------------------


def panel(axis: Any, rows: Rows, length: int, sizes: Mapping[str, Any], scale: Any) -> None:
    """One line per policy over the share of keys that is kept; random heads with the span of their draws."""
    for group, (label, colour, style) in LINES.items():
        points = sorted((float(n.partition("@")[2]), r) for n, r in rows.items() if n.startswith(f"{group}@"))
        if not points:
            continue
        x = [100 * kept(s, length, sizes) for s, _ in points]
        values = [[scale(sum(r) / len(r)) for r in draws] for _, draws in points]
        axis.plot(x, [scale(sum(m) / len(m)) for m in (mean(d) for _, d in points)], style, color=colour, label=label,
                  markersize=4, linewidth=1.2)  # fmt: skip
        if any(len(v) > 1 for v in values):
            axis.fill_between(
                x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0
            )
    if whole := rows.get("untouched"):
        axis.axhline(scale(sum(whole[0]) / len(whole[0])), color="black", linewidth=0.8, label="everything kept")
    axis.set_xlabel("keys kept, %", fontsize=8)
    axis.tick_params(labelsize=7)


def picture(data: Mapping[str, Any], path: Path) -> None:
    """Needles by length, perplexity, tasks, and what masking does."""
    from matplotlib.figure import Figure

    sizes, draws = data["settings"], []
    for (kind, length), rows in sorted(needles(data).items()):
        draws.append((f"needles ({kind}), {length} tokens, found %", rows, length, lambda v: 100 * v, (-4, 104)))
    asked, tokens = tasks(data)
    if asked:
        draws.append((f"{len(asked) - 1} few-shot tasks, exact %", asked["all"], tokens, lambda v: 100 * v, None))
    for length, rows in sorted(texts(data).items()):
        draws.append((f"perplexity, {length} tokens", rows, length, math.exp, None))
    count = len(draws) + bool(data.get("masks"))
    wide = math.ceil(count / math.ceil(count / 3))
    high = math.ceil(count / wide)
    figure = Figure(figsize=(4.4 * wide, 3.4 * high), layout="constrained")
    axes = list(figure.subplots(high, wide, squeeze=False).flat)
    for axis, (title, rows, length, scale, limits) in zip(axes, draws, strict=False):
        panel(axis, rows, length, sizes, scale)
        axis.set_title(title, fontsize=9)
        if limits:
            axis.set_ylim(*limits)
    if data.get("masks"):
        masked(axes[len(draws)], data)
    handles = {
        label: line
        for axis in axes[: len(draws)]
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=4, fontsize=8)
    for axis in axes[count:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=130, metadata={"Software": None})


STYLES = {"retrieval": ("retrieval heads", "C3", "o-"), "anywhere": ("others, anywhere", "0.5", "x--"),
          "same layers": ("others, same layers", "C0", "s--")}  # fmt: skip


def masks(data: Mapping[str, Any], what: str) -> Rows:
    """Values of each set of heads: ``count/group``, or ``untouched``; one row for each draw."""
    made: Rows = {}
    for name, value in data.get("masks", {}).items():
        made.setdefault("/".join(name.split("/")[:2]), []).append([float(v) for v in value[what]])
    groups = [*STYLES]

    def place(name: str) -> tuple[int, int]:
        count, _, group = name.partition("/")
        return (int(count), groups.index(group)) if group else (0, 0)

    return {name: made[name] for name in sorted(made, key=place)}


def masked(axis: Any, data: Mapping[str, Any]) -> None:
    rows = masks(data, "found")
    for group, (label, colour, style) in STYLES.items():
        found = {
            int(n.split("/")[0]): [100 * sum(r) / len(r) for r in d]
            for n, d in rows.items()
            if n.endswith(f"/{group}")
        }
        axis.plot([*found], [sum(v) / len(v) for v in found.values()], style, color=colour, label=label, markersize=4)
        spans = [min(v) for v in found.values()], [max(v) for v in found.values()]
        axis.fill_between([*found], *spans, color=colour, alpha=0.2, linewidth=0)
    if whole := rows.get("untouched"):
        axis.axhline(100 * sum(whole[0]) / len(whole[0]), color="black", linewidth=0.8, label="none")
    kind, length = data["settings"]["needles"][0]
    axis.set_title(f"query heads set to zero: needles ({kind}), {length} tokens, found %", fontsize=9)
    axis.set_xlabel("heads set to zero", fontsize=8)
    axis.set_ylim(-4, 104)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)


# --- the tables -----------------------------------------------------------------------------------------------------------


def head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]


def cell(values: Sequence[float], scale: float = 100, digits: int = 0, sign: str = "") -> str:
    value, low, high = (scale * v for v in interval(values, hits=not sign))
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def against(rows: Rows, name: str, scale: float = 100, digits: int = 0) -> str:
    """Found heads minus random heads of the same sparsity."""
    which, _, sparsity = name.partition("@")
    random_ = rows.get(f"random@{sparsity}")
    return cell(minus(rows[name], random_), scale, digits, "+") if which in FOUND and random_ else ""


def percent(name: str, length: int, sizes: Mapping[str, Any]) -> str:
    return f"{100 * kept(float(name.partition('@')[2] or 0), length, sizes):.0f} %"


def tables(data: Mapping[str, Any], stem: str) -> list[str]:
    """Everything as Markdown."""
    sizes, machine = data["settings"], data["about"]["machine"]
    lines = [f"# {stem}", "", ", ".join(f"{k} {v}" for k, v in machine.items()), "",
             ", ".join(f"{k} {v}" for k, v in sizes.items()), ""]  # fmt: skip
    for (kind, length), rows in sorted(needles(data).items()):
        lines += [f"## Needles ({kind}), {length} tokens", "",
                  *head("policy", "keys kept", "found, %", "minus random heads, points")]  # fmt: skip
        for name, draws in rows.items():
            lines.append(f"| {name} | {percent(name, length, sizes)} | {cell(mean(draws))} | {against(rows, name)} |")
        lines.append("")
    for length, rows in sorted(texts(data).items()):
        lines += [f"## Perplexity, {length} tokens", "",
                  *head("policy", "keys kept", "perplexity", "log-perplexity minus untouched", "minus random heads")]  # fmt: skip
        for name, draws in rows.items():
            per = mean(draws)
            lines.append(
                f"| {name} | {percent(name, length, sizes)} | {math.exp(sum(per) / len(per)):.2f} | "
                f"{cell(minus(draws, rows['untouched']), 1, 4, '+')} | {against(rows, name, 1, 4)} |"
            )
        lines.append("")
    asked, tokens = tasks(data)
    if asked:
        lines += [
            "## Few-shot tasks, exact, %",
            "",
            *head("policy", "keys kept", *asked, "minus random heads, points"),
        ]
        for name, draws in asked["all"].items():
            one = [
                f"{100 * sum(mean(rows[name])) / len(rows[name][0]):.0f}" for t, rows in asked.items() if t != "all"
            ]
            lines.append(
                f"| {name} | {percent(name, tokens, sizes)} | {' | '.join(one)} | {cell(mean(draws), digits=1)} | "
                f"{against(asked['all'], name, digits=1)} |"
            )
        lines.append("")
    if data.get("masks"):
        kind, length = sizes["needles"][0]
        lines += [
            "## Query heads set to zero",
            "",
            *head(f"heads ({kind}, {length} tokens)", "needles found, %", "perplexity"),
        ]
        losses = masks(data, "log_perplexity")
        for name, draws in masks(data, "found").items():
            per = mean(losses[name])
            lines.append(f"| {name} | {cell(mean(draws))} | {math.exp(sum(per) / len(per)):.2f} |")
        lines.append("")
    return lines


def write(data: Mapping[str, Any], folder: Path, stem: str) -> None:
    """Write the tables as `stem`.md and the picture as `stem`.png."""
    (folder / f"{stem}.md").write_text("\n".join(tables(data, stem)).rstrip() + "\n")
    picture(data, folder / f"{stem}.png")
