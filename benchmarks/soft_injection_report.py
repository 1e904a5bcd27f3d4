"""The table and the figure of benchmarks/soft_injection.py, from its result file.

python benchmarks/soft_injection_report.py [RESULT.json] [--figure docs/soft-injection.png]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS
from soft_injection_parts import unpacked

WHOLE = "soft injection, whole answers"
METHODS = ("zero-shot", "ICL", "function vector", "soft injection", WHOLE, "random alpha")
COLOURS = dict(zip(METHODS, ("#888888", "#1f77b4", "#9467bd", "#d62728", "#ff7f0e", "#bbbbbb"), strict=True))
Scores = dict[str, dict[str, dict[str, list[float]]]]


def measured(data: dict[str, Any]) -> list[str]:
    """Methods that every task has figures of."""
    return [m for m in METHODS if all(m in task["answers"] for task in data["tasks"].values())]


def scores(data: dict[str, Any]) -> Scores:
    """By score, method and task, each seed's accuracy in percent."""
    return {
        score: {
            m: {
                name: [100 * statistics.mean(unpacked(run[score])) for run in task["answers"][m]]
                for name, task in data["tasks"].items()
            }
            for m in measured(data)
        }
        for score in ("prefix", "exact")
    }


def over_tasks(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over tasks."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(10_000))
    return statistics.mean(values), means[250], means[9749]


def lines(data: dict[str, Any]) -> list[str]:
    found, tasks = scores(data), list(data["tasks"])
    seeds = max(len(t["answers"]["soft injection"]) for t in data["tasks"].values())
    tokens = {
        m: statistics.mean(t["prompt_tokens"]["ICL" if m == "ICL" else "zero-shot"] for t in data["tasks"].values())
        for m in measured(data)
    }
    test = sum(t["pairs"]["test"] for t in data["tasks"].values())
    settings = data["settings"]
    about = (
        f"{data['model']['model']}, {data['model']['dtype']}, {data['model']['device']}; {len(tasks)} tasks, {seeds} seeds, "
        f"{test} test questions; {settings['prompts']} few-shot prompts for the embedding, {settings['steps']} steps, "
        f"{settings['train']} training and {settings['valid']} validation pairs at most, {settings['shots']} shots in "
        f"{settings['draws']} draws per seed."
    )
    made = [
        "# Soft injection on function-vector tasks", "", about, "",
        "Percent right, mean over tasks of the mean over seeds, with 95 % bootstrap intervals over tasks.", "",
        "| method | prefix match | exact match | spread of seeds | prompt tokens |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for m in measured(data):
        cells = []
        for score in ("prefix", "exact"):
            mean, low, high = over_tasks([statistics.mean(found[score][m][t]) for t in tasks])
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        spread = [statistics.stdev(found["prefix"][m][t]) for t in tasks if len(found["prefix"][m][t]) > 1]
        cells.append(f"{statistics.mean(spread):.1f}" if spread else "-")
        cells.append(f"{tokens[m]:.0f}")
        made.append(f"| {m} | {' | '.join(cells)} |")
    made += ["", "Paired over tasks, points of prefix match and of exact match:", ""]
    mine = [m for m in ("soft injection", WHOLE) if m in measured(data)]
    pairs = [(m, other) for m in mine for other in measured(data) if other not in mine]
    pairs += [(WHOLE, "soft injection")] if len(mine) == 2 else []
    for m, other in pairs:
        words = []
        for score in ("prefix", "exact"):
            gaps = [statistics.mean(found[score][m][t]) - statistics.mean(found[score][other][t]) for t in tasks]
            mean, low, high = over_tasks(gaps)
            words.append(
                f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], higher in {sum(g > 0 for g in gaps)} of {len(gaps)} tasks"
            )
        made.append(f"- {m} against {other}: {words[0]}; {words[1]}")
    made.append("")
    for loss, m in (("first", "soft injection"), ("answer", WHOLE)):
        runs = [run for t in data["tasks"].values() for run in t["learned"] if run.get("loss", "first") == loss]
        if m in mine and runs:
            low, high = (
                statistics.mean(run["alpha"][k] / run["alpha"]["of"] for run in runs)
                for k in ("below 0.1", "above 0.9")
            )
            made.append(
                f"Learned strengths, {m}: {low:.0%} of heads below 0.1 and {high:.0%} above 0.9; the state that validation chose "
                f"was reached after {statistics.mean(run['step'] for run in runs):.0f} steps on average."
            )
    for run in [data["latency"], *data.get("latency in other dtypes", [])] if "latency" in data else []:
        made += latency_lines(run, data["model"]["device"])
    made += [
        "",
        "By task, prefix match (exact match in brackets):",
        "",
        f"| task | {' | '.join(measured(data))} |",
        "| --- " * (1 + len(measured(data))) + "|",
    ]
    for t in sorted(tasks):
        cells = [
            f"{statistics.mean(found['prefix'][m][t]):.0f} ({statistics.mean(found['exact'][m][t]):.0f})"
            for m in measured(data)
        ]
        made.append(f"| {t} | {' | '.join(cells)} |")
    return made


def latency_lines(run: dict[str, Any], device: str) -> list[str]:
    """One measurement of latency, under the name of its own machine, which need not be the one of the accuracies."""
    about = run["machine"]
    other = "" if about["device"] == device else f", **not the machine of the accuracies** ({device})"
    load = f", load {about['load']} while measuring" if "load" in about else ""
    title = (
        f"Latency in {run['dtype']} on {about['device']}, {about['threads']} thread(s){load}{other}: one query at a time through "
        f"`headpatch.apply` and `generate()`, {run['tokens generated']:.0f} tokens; medians over {run['calls']} calls, on queries of "
        f"{run['tasks']} tasks, and of the ratios of paired calls with 95 % bootstrap intervals."
    )
    made = [
        "",
        title,
        "",
        "| method | first token, ms | whole answer, ms | whole answer, against zero-shot | against ICL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m, first in run["first token, ms"].items():
        ratios = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*run[key][m]) if m in run.get(key, {}) else "-"
            for key in ("whole answer / zero-shot", "whole answer / ICL")
        ]
        made.append(f"| {m} | {first:.1f} | {run['whole answer, ms'][m]:.1f} | {' | '.join(ratios)} |")
    held = "; ".join(f"{k} {v}" for k, v in run["answers as measured"].items())
    return [*made, "", *([f"Recipes answered as in the table of accuracies: {held}."] if held else [])]


def figure(data: dict[str, Any], path: Path) -> None:
    """Accuracy by task, sorted by what ICL gets, and the means beside it."""
    from matplotlib.figure import Figure

    found = scores(data)
    methods = measured(data)
    tasks = sorted(data["tasks"], key=lambda t: statistics.mean(found["prefix"]["ICL"][t]))
    fig = Figure(figsize=(10.5, 0.22 * len(tasks) + 1.4), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 1))
    for m in methods[1:]:
        values = [statistics.mean(found["prefix"][m][t]) for t in tasks]
        left.plot(values, range(len(tasks)), "o", color=COLOURS[m], label=m, markersize=5)
    left.set_yticks(range(len(tasks)), tasks, fontsize=7)
    left.set_xlabel("percent right (prefix match)")
    left.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    for score, shift, alpha in (("prefix", -0.2, 1.0), ("exact", 0.2, 0.5)):
        for i, m in enumerate(methods):
            mean, low, high = over_tasks([statistics.mean(found[score][m][t]) for t in tasks])
            right.barh(
                i + shift,
                mean,
                0.38,
                color=COLOURS[m],
                alpha=alpha,
                xerr=[[mean - low], [high - mean]],
                ecolor="#333333",
            )
    right.set_yticks(range(len(methods)), [m.replace(", ", ",\n") for m in methods], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("mean over tasks\n(upper: prefix match,\nlower: exact match)")
    right.set_xlim(0, 100)
    fig.savefig(path, dpi=110)


def report(result: Path, picture: Path | None = None) -> None:
    """Print the table, write it beside the result, and draw the figure where one is asked for."""
    data = json.loads(result.read_text("utf-8"))
    if not data["tasks"]:
        print("nothing was measured")
        return
    text = "\n".join(lines(data)) + "\n"
    result.with_suffix(".md").write_text(text, "utf-8")
    print(text)
    if picture is not None:
        figure(data, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "soft_injection.json")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    report(given.result, given.figure)
