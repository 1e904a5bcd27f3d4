"""The prompts with a marked sentence: the files are what the script writes, and nothing but the mark says which answer is wanted."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import marked_prompts

DATA = Path(marked_prompts.__file__).parent / "data"


@pytest.mark.parametrize("name", marked_prompts.FILES)
def test_the_files_are_what_the_script_writes(name: str) -> None:
    lines = (DATA / f"marked_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == marked_prompts.rows(*marked_prompts.FILES[name])


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_mark_decides(part: str) -> None:
    rows = marked_prompts.rows(part)
    labels = [name.strip() for name in marked_prompts.LABELS.split(",")]
    wanted: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        assert row["text"].count(row["span"]) == 1, "the first occurrence is the only one"
        assert re.search(rf"\b{row['label']}\b", row["span"])
        assert row["label"] in labels
        if row["kind"] == "notes":
            wanted[row["text"]].append(row["label"])
        else:
            named = [label for label in labels if re.search(rf"\b{label}\b", row["text"])]
            assert named == [row["label"]], "no other answer stands in the prompt"
    assert all(len(set(answers)) == 2 for answers in wanted.values()), (
        "each prompt once with each of its two statements"
    )
    assert len(rows) > 200


def test_train_and_test_share_nothing() -> None:
    train, test = (marked_prompts.rows(part) for part in ("train", "test"))
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    for table in ("NAMES", "THINGS", "EVENTS", "KNOWN", "PLACES"):
        parts = getattr(marked_prompts, table)
        assert not set(parts["train"]) & set(parts["test"]), table
