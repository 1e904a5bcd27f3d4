"""Calibrations of SmolLM2-135M-Instruct whose recipes ship, and what they give on rows that chose nothing.

    python benchmarks/calibrations.py --data DIR --work DIR [NAME ...]      # runs those named, or all of them
    python benchmarks/calibrations.py --work DIR --report                   # writes benchmarks/results/calibrations_smollm2_*
    python benchmarks/calibrations.py --data DIR --work DIR --device cuda --parallel 4 --deadline 300 act-sst2 act-trec ...

On a GPU, runs of ACT and ZeroTuning measure more than two busy cores can (``ON_GPU``), several share it in processes of their own,
and those that the deadline ends are named; their work files stay. ``--sinks`` says what ACT's rule finds in these prompts.

DIR of the data holds public data sets, which are no part of this project: ``sst2/train_2000.jsonl`` and ``test.jsonl``,
``trec/train.jsonl`` and ``test.jsonl`` (fields text and label), ``bbh/NAME.json`` (BIG-bench Hard, 250 examples each). The prompts
with marked sentences are in benchmarks/data. Each run is the command that stands in the recipe's provenance; an interrupted one goes
on from its work file. Recipes that the held-out rows do not confirm are written all the same (``--anyway``) and say so.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import short_name
from marked_prompts import LABELS as MARKED_LABELS

from headpatch import cli
from headpatch.demo_model import SHORT_NAME, locate
from headpatch.find.data import Task, load_rows, parse_labels, unescape
from headpatch.find.engine import load_model, open_bench
from headpatch.find.measure import sample

HERE = Path(__file__).parent
SENTIMENT = ("Review: {text}\\nSentiment (positive or negative):", "negative, positive")
QUESTIONS = (
    "Question: {text}\\nType of the answer (number, place, person, description, thing or abbreviation):",
    "NUM= number, LOC= place, HUM= person, DESC= description, ENTY= thing, ABBR= abbreviation",
)
YES_NO = ("{input}\\nAnswer:", "Yes, No")
YES_NO_TASKS = ("navigate", "sports_understanding", "web_of_lies")
SMALL = ("--effort", "quick", "--width", "3", "--max-steps", "3")
"""For two busy cores; runs that name an effort have settings of their own."""
MOST = 600
"""Evaluation rows on a CPU, the first of the file."""
_SEARCH = ("--screen", "80,240", "--width", "8", "--max-steps", "12")
ON_GPU = {
    "act": ("--slopes", "1", "--beta", "0", "--beta", "0.4", *_SEARCH, "--held-out", "1000"),
    "zerotuning": ("--slopes", "0.5", *_SEARCH),
}
"""By method: every head is measured by itself, published beta and none at all. Fixed before any of these runs was made."""
RUNS: dict[str, tuple[str, str, str, tuple[str, str], tuple[str, ...]]] = {
    # name: method, train, eval, (template, labels), options
    "pasta-marked-sentences": (
        "pasta", "marked_train.jsonl", "marked_test_first_round.jsonl", ("{text}", MARKED_LABELS), (
            "--effort", "quick", "--span-field", "span", "--screen", "24", "--slopes", "0.08", "--max-steps", "0",
            "--top", "5,10,20", "--held-out", "48", "--anyway",
        ),
    ),
    "act-sst2": ("act", "sst2/train_2000.jsonl", "sst2/test.jsonl", SENTIMENT, ("--anyway",)),
    "act-trec": ("act", "trec/train.jsonl", "trec/test.jsonl", QUESTIONS, ("--anyway",)),
    "act-bbh-yes-no": ("act", "bbh_yes_no_train.jsonl", "bbh_yes_no_test.jsonl", YES_NO, ("--anyway",)),
    # In prompts this short, 64 % (SST-2) and 45 % (TREC) of what the method's rule calls a sink, over all heads, are seen by
    # fewer than eight queries: names of labels and brackets at the end. The same without those; decided before any run was made.
    "act-sst2-8-queries": ("act", "sst2/train_2000.jsonl", "sst2/test.jsonl", SENTIMENT, ("--anyway", "--min-queries", "8")),
    "act-trec-8-queries": ("act", "trec/train.jsonl", "trec/test.jsonl", QUESTIONS, ("--anyway", "--min-queries", "8")),
    "zerotuning-trec": (
        "zerotuning", "trec/train.jsonl", "trec/test.jsonl", QUESTIONS,
        ("--no-indices", "--slopes", "0.25", "--held-out", "300"),
    ),
}  # fmt: skip


def yes_no(data: Path, work: Path) -> None:
    """Three yes/no tasks of BIG-bench Hard in one, half of each for choosing."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for name in YES_NO_TASKS:
        examples = json.loads((data / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
        rows = [{"input": e["input"], "label": e["target"].strip().capitalize(), "task": name} for e in examples]
        random.Random(name).shuffle(rows)
        parts["train"] += rows[: len(rows) // 2]
        parts["test"] += rows[len(rows) // 2 :]
    for part, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"bbh_yes_no_{part}.jsonl").write_text(text, encoding="utf-8")


def find(name: str, data: Path | None, work: Path) -> Path:
    """A data file: of this folder, made here, or of the data's folder."""
    for folder in (HERE / "data", work, *([data] if data else [])):
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"{name} is not there; give --data")


def first_rows(path: Path, work: Path) -> Path:
    """The file itself, or one of its first rows where it has more than a CPU is to evaluate."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) <= MOST:
        return path
    cut = work / f"{path.parent.name}_{path.stem}_first_{MOST}.jsonl"
    cut.write_text("".join(lines[:MOST]), encoding="utf-8")
    return cut


def settings(name: str, device: str) -> tuple[str, ...]:
    """Options of a run that say how it searches."""
    method, *_, options = RUNS[name]
    if "--effort" in options:
        return options
    if device == "cpu":
        return (*SMALL, *options)
    few = ("--screen", "30,60", "--held-out", "60") if name.startswith("act-bbh") else ()  # there are 150 rows
    return ("--effort", "standard", *options, *ON_GPU[method], *few)


def run(name: str, data: Path | None, work: Path, device: str) -> None:
    method, train, evaluation, (template, labels), _ = RUNS[name]
    started = time.monotonic()
    if train.startswith("bbh") and data is not None:
        yes_no(data, work)
    rows = find(evaluation, data, work)
    words = ["calibrate", method, "--model", SHORT_NAME, "--train", str(find(train, data, work))]
    words += [
        "--eval",
        str(first_rows(rows, work) if device == "cpu" else rows),
        "--template",
        template,
        "--labels",
        labels,
        *settings(name, device),
        "--device",
        device,
    ]
    words += [
        "-o",
        str(work / f"{name}.yaml"),
        "--name",
        f"{SHORT_NAME}/{name}",
        "--model-name",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ]
    words += ["--profile", str(work / f"{name}.profile.json")]
    if code := cli.main(words):
        raise SystemExit(code)
    made = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    about = {"device": made, "seconds": round(time.monotonic() - started)}
    (work / f"{name}.run.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def together(names: list[str], options: argparse.Namespace) -> None:
    """Runs in processes of their own, some at a time; none goes on after the deadline."""
    end, waiting = time.monotonic() + options.deadline, list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        late = time.monotonic() > end
        for name in [n for n, p in running.items() if late or p.poll() is not None]:
            process = running.pop(name)
            if process.poll() is None:
                process.terminate()
            code = process.wait()
            print(f"{name}: {'done' if code == 0 else 'cut off' if late else f'exit {code}'}", flush=True)
        if late:
            print(*(f"{name}: not begun" for name in waiting), sep="\n", flush=True)
            return
        while waiting and len(running) < options.parallel:
            name = waiting.pop(0)
            words = [sys.executable, __file__, name, "--work", str(options.work), "--device", options.device]
            words += ["--data", str(options.data)] if options.data else []
            with (options.work / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(0.2)


def rounded(value: float) -> str:
    return f"{value:+.1f}"


def line(name: str, recipe: dict[str, Any], profile: dict[str, Any]) -> str:
    p = recipe["provenance"]
    heads = sum(len(patch["heads"]) for patch in recipe["patches"])
    d, ci = p["difference"], p["difference_intervals"]
    control = p["controls"]["random heads, difference"]["accuracy"]
    bias = p["controls"].get("fitted logit bias", {}).get("accuracy", float("nan"))
    helps = sum(e["verdict"] > 0 for e in profile["edits"])
    return (
        f"| {name} | {heads} | {p['rows_evaluated']} | {p['baseline']['accuracy']:.1f} | {p['patched']['accuracy']:.1f} | "
        f"{rounded(d['accuracy'])} [{rounded(ci['accuracy'][0])}, {rounded(ci['accuracy'][1])}] | {rounded(control['mean'])} "
        f"({rounded(control['lowest'])} to {rounded(control['highest'])}, {control['draws']} draws) | {bias:.1f} | "
        f"{rounded(d['unrestricted'])} | {rounded(d['valid'])} | {rounded(d['perplexity'])} % | {helps} of {len(profile['edits'])} | "
        f"{p['choice']} |"
    )


def report(work: Path) -> None:
    """Collect what is there into the results folder; one folder of runs is one device's. What it lacks stays as it was measured."""
    ran = {p.name.split(".")[0]: json.loads(p.read_text(encoding="utf-8")) for p in sorted(work.glob("*.run.json"))}
    device = next((one["device"] for one in ran.values()), "cpu")
    target = HERE / "results" / f"calibrations_smollm2_{short_name(device)}"
    known = target.with_suffix(".json")
    found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    lines = [
        f"# Calibrations of SmolLM2-135M-Instruct, float32, {device.replace('cpu', 'CPU')}", "",
        "Written by `python benchmarks/calibrations.py --report`. Percent of rows that chose nothing; differences in points,",
        "paired by row, with 95 % intervals. *Random*: the same edits on heads drawn at random (of those that the method can",
        "change anything in). *Bias*: accuracy of the untouched model with a fitted bias on the labels. *Alone*: single edits",
        "that help beyond doubt, of those measured on all search rows. *Text*: perplexity of a neutral text.", "",
        "| recipe | heads | rows | before | after | difference | random | bias | unrestricted | valid | text | alone | choice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in RUNS:
        path, profile = work / f"{name}.yaml", work / f"{name}.profile.json"
        if profile.is_file():
            edits = json.loads(profile.read_text(encoding="utf-8"))
            recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            kept = {k: recipe[k] for k in ("patches", "provenance") if k in recipe}
            found[name] = {**kept, "profile": edits["edits"], "choice": edits["choice"]}
        if name not in found:
            continue
        one = found[name]
        if "patches" in one:
            lines.append(line(name, one, {"edits": one["profile"]}))
        else:
            lines.append(f"| {name} | no recipe | | | | | | | | | | | {one['choice']} |")
    if ran:
        lines += ["", "Seconds: " + ", ".join(f"{name} {one['seconds']}" for name, one in ran.items()) + "."]
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def sinks(data: Path | None, work: Path, rows: int = 40) -> None:
    """What ACT's rule calls a sink in the prompts of its runs, over all heads, and how many of those few queries see."""
    bench = open_bench(*load_model(locate(SHORT_NAME), device="cpu"))
    if data is not None:
        yes_no(data, work)
    for name in ("act-sst2", "act-trec", "act-bbh-yes-no"):
        _, train, _, (template, labels), _ = RUNS[name]
        task = Task((unescape(template),), parse_labels(labels))
        some = random.Random(0).sample(load_rows(find(train, data, work)), rows)
        passages = sample(bench, name, some, task).questions.passages
        every, late, heads, first = 0, 0, 0, 0.0
        for passage, means in zip(passages, bench.observed("column_means", passages), strict=True):
            for values in means.values():
                found = (values > 0.1).nonzero().flatten()
                found = found[found > 0]
                every, late = every + len(found), late + int((found > len(passage.ids) - 8).sum())
                heads, first = heads + 1, first + float(values[0])
        print(
            f"{name}: {every / heads:.2f} sinks a head and prompt, {100 * late / every:.0f} % of them seen by fewer than 8 "
            f"queries; mean attention to the first token {first / heads:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--sinks", action="store_true", help="what ACT's rule calls a sink in these prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="seconds after which runs are ended, if several share"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.report:
        return report(options.work)
    if options.sinks:
        return sinks(options.data, options.work)
    names = list(options.names or RUNS)
    if options.parallel > 1:
        return together(names, options)
    for name in names:
        run(name, options.data, options.work, options.device)
    return None


if __name__ == "__main__":
    main()
