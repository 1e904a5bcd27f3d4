"""A trained model, SmolLM2-135M-Instruct in float32, with one KV head of three that keeps everything in each layer: long prompts, as
one mixed batch, 64 tokens a step, with prefix caching, twice; against a float64 softmax under an explicit mask, and against
headpatch's other engine. The same compiled, and over three ranks with one KV head each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start, stop
from engine_cases import ask, differ, load, truth
from split_cases import Kept, factors, other_engine, supplied, wanted

pytestmark = pytest.mark.slow

FULL = {layer: (layer % 3,) for layer in range(30)}
LEAN = Kept(32, 64, FULL)
EDITED = Kept(
    32,
    64,
    FULL,
    gamma=dict.fromkeys(range(30), torch.full((9,), 0.6, dtype=torch.float64)),
    scale=factors(30, 9, 0.8, 1.2, 2),
)
FLAG = {"recipes": {"lean": LEAN.recipe(), "edited": EDITED.recipe()}, "default": "lean"}
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "three_ranks": {"tensor_parallel_size": 3},
}
TEXT = (
    "The old mill by the river had not turned for thirty years when the letters came. Each was written in the same hand, in brown "
    "ink, and each asked for the same thing: that the wheel be set running on the first night of spring. Nobody in the village knew "
    "who would want that. The miller's granddaughter read them aloud in the kitchen while the rain went on, and her brother laughed, "
    "and her mother said that the bearings were rusted through and the sluice was full of silt. But when the third letter came with "
    "a key in it, small and bright and cold as though it had lain in water, they took the lamp and went down to look. "
)  # fmt: skip
ASKED = ("What did the letters ask for?", "Who read them aloud?", "Describe the key.", "Why had the mill stopped?")


@pytest.fixture(scope="module")
def folder() -> Path:
    from headpatch.demo_model import fetch

    return Path(fetch())


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(f"{TEXT * (1 + i % 2)}\n{question}\nAnswer:")["input_ids"] for i, question in enumerate(ASKED)]


@pytest.fixture(params=ENGINES)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    found = start(folder, additional_config={"headpatch": FLAG}, **ENGINES[request.param])
    yield found
    stop(found)


def test_long_prompts_twice(llm: Any, model: Any, prompts: list[list[int]]) -> None:
    for _ in range(2):
        answers = ask(llm, [(ids, name) for ids in prompts for name in ("lean", "edited")], 24)
        for i, kept in enumerate((LEAN, EDITED)):
            found = differ(answers[i::2], wanted(model, answers[i::2], kept))
            assert not found, found
    assert differ(answers[::2], truth(model, answers[::2], None)).worst > 0.01
    if supplied("huggingface"):
        found = differ(answers[::2], other_engine(model, answers[::2], LEAN.recipe()))
        assert not found, found


def test_room(llm: Any) -> None:
    """A third of the heads keeps everything. With one KV head a rank, every rank has places for both kinds, and nothing is won."""
    cache = llm.collective_rpc("headpatch_report")[0]["cache"]
    assert cache["tokens"] == llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    if "empty" in cache["split"]:
        assert cache["tokens"] < cache["unsplit_tokens"]
    else:
        assert cache["tokens"] > 1.3 * cache["unsplit_tokens"]
