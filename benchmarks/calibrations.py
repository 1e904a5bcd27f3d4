"""Calibrations of SmolLM2-135M-Instruct whose recipes ship, and what they give on rows that chose nothing.

    python benchmarks/calibrations.py --data DIR --work DIR [NAME ...]      # runs those named, or all of them
    python benchmarks/calibrations.py --work DIR --report                   # writes benchmarks/results/calibrations_smollm2_cpu.*

DIR of the data holds public data sets, which are no part of this project: ``sst2/train_2000.jsonl`` and ``test.jsonl``,
``trec/train.jsonl`` and ``test.jsonl`` (fields text and label), ``bbh/NAME.json`` (BIG-bench Hard, 250 examples each). The prompts
with marked sentences are in benchmarks/data. Each run is the command that stands in the recipe's provenance; an interrupted one goes
on from its work file. Recipes that the held-out rows do not confirm are written all the same (``--anyway``) and say so.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml
from marked_prompts import LABELS as MARKED_LABELS

from headpatch import cli
from headpatch.demo_model import SHORT_NAME

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


def run(name: str, data: Path | None, work: Path) -> None:
    method, train, evaluation, (template, labels), options = RUNS[name]
    if train.startswith("bbh") and data is not None:
        yes_no(data, work)
    words = ["calibrate", method, "--model", SHORT_NAME, "--train", str(find(train, data, work))]
    words += [
        "--eval",
        str(find(evaluation, data, work)),
        "--template",
        template,
        "--labels",
        labels,
        *(() if "--effort" in options else SMALL),
        *options,
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
    """Collect what is there into the results folder."""
    found, lines = {}, [
        "# Calibrations of SmolLM2-135M-Instruct, float32, CPU", "",
        "Written by `python benchmarks/calibrations.py --report`. Percent of rows that chose nothing; differences in points,",
        "paired by row, with 95 % intervals. *Random*: the same edits on heads drawn at random (of those that the method can",
        "change anything in). *Bias*: accuracy of the untouched model with a fitted bias on the labels. *Alone*: single edits",
        "that help beyond doubt, of those measured on all search rows. *Text*: perplexity of a neutral text.", "",
        "| recipe | heads | rows | before | after | difference | random | bias | unrestricted | valid | text | alone | choice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in RUNS:
        path = work / f"{name}.yaml"
        profile = work / f"{name}.profile.json"
        if not profile.is_file():
            continue
        edits = json.loads(profile.read_text(encoding="utf-8"))
        if not path.is_file():
            lines.append(f"| {name} | no recipe | | | | | | | | | | | {edits['choice']} |")
            continue
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[name] = {"patches": recipe["patches"], "provenance": recipe["provenance"], "profile": edits["edits"]}
        lines.append(line(name, recipe, edits))
    target = HERE / "results" / "calibrations_smollm2_cpu"
    target.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.report:
        return report(options.work)
    for name in options.names or RUNS:
        run(name, options.data, options.work)
    return None


if __name__ == "__main__":
    main()
