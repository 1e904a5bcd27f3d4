"""What the tests of learned tasks share: a tiny model with a tokenizer, pairs of words, and the fixtures that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model

from headpatch.tune.engine import last_tokens
from headpatch.tune.pairs import Format, Pair, Split
from headpatch.tune.soft import Settings, embed

__all__ = ["PAIRS", "PARTS", "SETTINGS", "STYLE", "WORDS", "folder", "loaded", "model", "vectors"]

STYLE = Format()
WORDS = ("film", "good", "bad", "nobody", "laughed", "capital", "country", "known", "what", "everybody")
PAIRS = [Pair(f"the {a} {b}", a if i % 2 else b) for i, a in enumerate(WORDS) for b in WORDS if a != b]
PARTS = Split(tuple(PAIRS[:40]), tuple(PAIRS[40:52]), tuple(PAIRS[52:64]))
# The published loss: tests compare it with the cross-entropy of first tokens.
SETTINGS = Settings(prompts=4, shots=2, steps=12, every=4, validation=8, lr=0.5, loss="first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), chat_template=True)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    from headpatch.find.engine import load_model

    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def model(loaded: tuple[Any, Any]) -> Any:
    return last_tokens(*loaded)


@pytest.fixture(scope="module")
def vectors(model: Any) -> list[torch.Tensor]:
    return embed(model, PARTS.train, STYLE, 4, 2, 0)
