"""The picture and the tables of quality_kv.json: ``python benchmarks/quality_kv.py ... --stage draw`` writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headpatch.find.stats import wilson

LINES = {
    "gates": ("DuoAttention, trained gates", "C0", "o-"), "retrieval": ("DuoAttention, retrieval scores", "C2", "s-"),
    "quick": ("DuoAttention, quick score", "C4", "^-"), "random": ("DuoAttention, random heads", "0.5", "x--"),
    "streaming_llm": ("streaming_llm, as many tokens", "C3", "v:"),
    "snapkv": ("snapkv, query-aware, as many tokens", "C1", "d-."), "ada_kv": ("ada_kv, query-aware, as many tokens", "C5", "P-."),
}  # fmt: skip


def kept(sparsity: float, length: int, about: Mapping[str, Any]) -> float:
    """Share of the keys that a policy of this sparsity keeps of a sequence."""
    return 1 - sparsity + sparsity * min(1.0, (about["sink"] + about["recent"]) / length)


def needles(data: Mapping[str, Any], cells: Iterable[str]) -> dict[str, list[bool]]:
    """Whether each needle of these cells was found, by policy."""
    found: dict[str, list[bool]] = {}
    for key in cells:
        for name, values in data["needles"][key].items():
            found.setdefault(name, []).extend(values["found"])
    return found


def kinds(data: Mapping[str, Any]) -> dict[tuple[str, int], list[str]]:
    """Cells of the grid by kind and length."""
    made: dict[tuple[str, int], list[str]] = {}
    for key in data.get("needles", {}):
        kind, length, _ = key.split("/")
        made.setdefault((kind, int(length)), []).append(key)
    return made


def perplexity(values: Mapping[str, Any]) -> float:
    return math.exp(sum(values["log_perplexity"]) / len(values["log_perplexity"]))


def accuracy(data: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Whether each query of all tasks was answered, by policy."""
    found: dict[str, list[bool]] = {}
    for key, values in data.get("tasks", {}).items():
        _, _, name = key.partition("/")
        if name != "about":
            found.setdefault(name, []).extend(values)
    return found


def curve(names: Iterable[str], group: str) -> list[tuple[float, list[str]]]:
    """(sparsity, the names of its draws) of one group, by sparsity."""
    made: dict[float, list[str]] = {}
    for name in names:
        which, at, rest = name.partition("@")
        if at and which == group:
            made.setdefault(float(rest.split("/")[0]), []).append(name)
    return sorted(made.items())


def panel(axis: Any, values: Mapping[str, float], length: int, about: Mapping[str, Any]) -> None:
    """One line per group over the share of keys that is kept; random heads with the span of their draws."""
    for group, (label, colour, style) in LINES.items():
        points = curve(values, group)
        if not points:
            continue
        x = [100 * kept(s, length, about) for s, _ in points]
        rows = [[values[n] for n in names] for _, names in points]
        axis.plot(x, [sum(r) / len(r) for r in rows], style, color=colour, label=label, markersize=4, linewidth=1.2)
        if any(len(r) > 1 for r in rows):
            axis.fill_between(x, [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.2, linewidth=0)
    axis.axhline(values["untouched"], color="black", linewidth=0.8, label="everything kept")
    axis.set_xlabel("keys kept, %", fontsize=8)
    axis.tick_params(labelsize=7)


def share(found: Iterable[bool]) -> float:
    values = list(found)
    return 100 * sum(values) / len(values)


def picture(data: Mapping[str, Any], path: Path) -> None:
    """Needles by length, perplexity, tasks, and what masking does."""
    from matplotlib.figure import Figure

    about, cells = data["about"], kinds(data)
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    axes = list(figure.subplots(2, math.ceil((len(cells) + 3) / 2)).flat)
    for axis, ((kind, length), keys) in zip(axes, sorted(cells.items(), reverse=True), strict=False):
        panel(axis, {n: share(f) for n, f in needles(data, keys).items()}, length, about)
        axis.set_title(f"needles ({kind}), {length} tokens, found %", fontsize=9)
        axis.set_ylim(-4, 104)
    rest = axes[len(cells) :]
    if data.get("text"):
        panel(rest[0], {n: perplexity(v) for n, v in data["text"].items()}, about["passages"][1], about)
        rest[0].set_title(f"perplexity, {about['passages'][1]} tokens", fontsize=9)
    if data.get("tasks"):
        lengths = [v["tokens"] for k, v in data["tasks"].items() if k.endswith("/about")]
        panel(rest[1], {n: share(f) for n, f in accuracy(data).items()}, sum(lengths) // len(lengths), about)
        rest[1].set_title(f"{len(lengths)} few-shot tasks, exact %", fontsize=9)
    if data.get("masks"):
        masked(rest[2], data["masks"])
    axes[0].legend(fontsize=7)
    for axis in rest[3:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=130, metadata={"Software": None})


def masking(masks: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Needles found by set of masked heads."""
    found: dict[str, list[bool]] = {}
    for key, cell in masks.items():
        if key.startswith("needles/"):
            for name, values in cell.items():
                found.setdefault(name, []).extend(values["found"])
    return found


def masked(axis: Any, masks: Mapping[str, Any]) -> None:
    found = masking(masks)
    counts = sorted({int(n.split("/")[0]) for n in found if n != "untouched"})
    styles = {"retrieval": ("retrieval heads", "C3", "o-"), "random": ("others, anywhere", "0.5", "x--"),
              "same layers": ("others, same layers", "C0", "s--")}  # fmt: skip
    for group, (label, colour, style) in styles.items():
        rows = [[share(f) for n, f in found.items() if n.split("/")[:2] == [str(c), group]] for c in counts]
        axis.plot(counts, [sum(r) / len(r) for r in rows], style, color=colour, label=label, markersize=4)
        axis.fill_between(counts, [min(r) for r in rows], [max(r) for r in rows], color=colour, alpha=0.2, linewidth=0)
    axis.axhline(share(found["untouched"]), color="black", linewidth=0.8, label="none")
    axis.set_title("query heads set to zero, needles found %", fontsize=9)
    axis.set_xlabel("heads set to zero", fontsize=8)
    axis.set_ylim(-4, 104)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)


def tables(data: Mapping[str, Any]) -> list[str]:
    """The same as Markdown, with intervals for the needles; draws of random heads together."""
    about, lines = data["about"], ["# quality_kv", "", ", ".join(f"{k} {v}" for k, v in data["about"].items()), ""]
    for (kind, length), keys in sorted(kinds(data).items()):
        found = needles(data, keys)
        lines += [
            f"## Needles ({kind}), {length} tokens",
            "",
            "| policy | keys kept | found | 95 % |",
            "| --- | --- | --- | --- |",
        ]
        for name, values in together(found).items():
            e = wilson(sum(values), len(values))
            span = f"{100 * e.low:.0f} to {100 * e.high:.0f}"
            lines.append(f"| {name} | {percent(name, length, about)} | {100 * e.value:.0f} % of {e.rows} | {span} |")
        lines.append("")
    if data.get("text"):
        length = about["passages"][1]
        lines += ["## Perplexity", "", "| policy | keys kept | perplexity |", "| --- | --- | --- |"]
        made: dict[str, list[float]] = {}
        for name, values in data["text"].items():
            made.setdefault(name.split("/")[0], []).append(perplexity(values))
        for name, several in made.items():
            span = f"{min(several):.2f}" if len(several) == 1 else f"{min(several):.2f} to {max(several):.2f}"
            lines.append(f"| {name} | {percent(name, length, about)} | {span} |")
        lines.append("")
    if data.get("tasks"):
        names = sorted({k.split("/")[0] for k in data["tasks"]})
        lines += [
            "## Few-shot tasks, exact",
            "",
            f"| policy | {' | '.join(names)} | all |",
            "| --- |" + " --- |" * (len(names) + 1),
        ]
        for name, values in together(accuracy(data)).items():
            cells = []
            for task in names:
                one = [v for k, hits in data["tasks"].items() if k.split("@")[0].startswith(f"{task}/") for v in hits
                       if k.partition("/")[2].split("/")[0] == name]  # fmt: skip
                cells.append(f"{share(one):.0f}")
            lines.append(f"| {name} | {' | '.join(cells)} | {share(values):.1f} |")
        lines.append("")
    if data.get("masks"):
        losses = data["masks"].get("log_perplexity", {})
        lines += ["## Query heads set to zero", "", "| heads | needles found | perplexity |", "| --- | --- | --- |"]
        for name, values in masking(data["masks"]).items():
            ppl = f"{math.exp(losses[name]):.2f}" if name in losses else ""
            lines.append(f"| {name} | {share(values):.0f} % of {len(values)} | {ppl} |")
        lines.append("")
    return lines


def together(found: Mapping[str, list[bool]]) -> dict[str, list[bool]]:
    """Draws of random heads under one name."""
    made: dict[str, list[bool]] = {}
    for name, values in found.items():
        made.setdefault(name.split("/")[0], []).extend(values)
    return made


def percent(name: str, length: int, about: Mapping[str, Any]) -> str:
    sparsity = float(name.partition("@")[2] or 0)
    return f"{100 * kept(sparsity, length, about):.0f} %"


def write(data: Mapping[str, Any], folder: Path) -> None:
    """Write quality_kv.md and quality_kv.png."""
    (folder / "quality_kv.md").write_text("\n".join(tables(data)).rstrip() + "\n")
    picture(data, folder / "quality_kv.png")
