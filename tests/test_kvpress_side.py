"""benchmarks/kvpress_*.py: what both sides count, on models that are none."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kvpress_measure
import kvpress_ours

BENCHMARKS = Path(kvpress_ours.__file__).parent


class Fake:
    """Holds `share` of a kilobyte a token, and says the prompt's last token again and again."""

    def __init__(self, share: float, ids: Sequence[int]) -> None:
        self.kept = [torch.zeros(int(share * 256)) for _ in ids]
        self.views = [t[:2] for t in self.kept]
        self.share, self.token = share, ids[-1]

    def step(self, token: int) -> None:
        self.kept.append(torch.zeros(int(self.share * 256)))


class Decoder:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def side() -> dict[str, object]:
    asked = {
        "ends": [0],
        "long": [1] * 20,
        "needles": [{"ids": [1, 7], "answer": "7"}, {"ids": [1, 0], "answer": "7"}],
    }
    policies = {name: lambda ids, share=share: Fake(share, ids) for name, share in (("full", 1.0), ("half", 0.5))}
    return kvpress_measure.measure(policies, Decoder(), asked, quick=False)


def test_storage_is_counted_once_and_answers_end_where_the_model_ends_them():
    made = side()["policies"]
    assert made["full"]["bytes"] == (20 + kvpress_measure.STEPS) * 1024
    assert made["half"]["bytes"] == made["full"]["bytes"] / 2
    assert made["full"]["found"] == [True, False]
    assert made["full"]["wrote"] == [" ".join(["7"] * kvpress_measure.NEW_TOKENS), ""]
    assert len(made["half"]["ms"]) == kvpress_measure.ROUNDS


def test_the_table_has_a_line_for_each_policy_and_side():
    made = {"headpatch": side(), "kvpress": side(), "settings": {"tokens": 28}}
    lines = kvpress_ours.table(made)
    assert sum(line.startswith(("| full", "| half")) for line in lines) == 4
    assert any("of 2, to which both sides write the same text: full 2, half 2." in line for line in lines)
    assert "| half | kvpress | 0.0 | 0.500 |" in "\n".join(lines)


def test_their_half_imports_nothing_of_ours():
    seen = set()
    for name in ("kvpress_side.py", "kvpress_measure.py", "common.py"):
        for node in ast.walk(ast.parse((BENCHMARKS / name).read_text())):
            if isinstance(node, ast.Import):
                seen |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                seen.add((node.module or "").split(".")[0])
    assert "kvpress" in seen
    assert "headpatch" not in seen
