"""A trained model, SmolLM2-135M-Instruct in float32: eight prompts under six recipes as one mixed batch, 64 tokens a step, with
prefix caching, twice, against transformers; the same compiled, with speculation, over three ranks (9 heads, 3 KV heads), over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import start, stop
from engine_cases import compare, differ, load, recipes, truth
from server import serving

pytestmark = pytest.mark.slow

RECIPES = recipes(30, 9)
START = (
    "You answer in plain words, think before you speak, and never invent facts about people, places or numbers. " * 2
)
ASKED = (
    "What is the capital of Poland?", "Why does bread rise?", "Name three colours.", "Who wrote Hamlet?", "How far is the moon?",
    "Write a line about rain.", "What is 12 times 7?", "Say hello in French.",
)  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {}, "compiled": {"enforce_eager": False}, "ngram": {"speculative_config": NGRAM},
    "three_ranks": {"tensor_parallel_size": 3},
}  # fmt: skip


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
    return [tokenizer(f"{START}{question}\nAnswer:")["input_ids"] for question in ASKED]


@pytest.fixture(params=ENGINES)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    found = start(folder, additional_config={"headpatch": {"recipes": RECIPES}}, **ENGINES[request.param])
    yield found
    stop(found)


def test_six_recipes_in_one_batch_twice(llm: Any, model: Any, prompts: list[list[int]]) -> None:
    for _ in range(2):
        found = compare(llm, model, prompts, {"none": None, **RECIPES}, tokens=16)
        assert not any(found.values()), found


def test_served_names_over_http(folder: Path, model: Any, prompts: list[list[int]], tmp_path: Path) -> None:
    names = ["none", *RECIPES]
    jobs = [(ids, name) for ids in prompts for name in names]
    with serving(folder, {"recipes": RECIPES}, tmp_path / "log.txt") as server, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: server.answer(*job), jobs))
    for i, name in enumerate(names):
        mine = answers[i :: len(names)]
        found = differ(mine, truth(model, mine, RECIPES.get(name)))
        assert not found, (name, found)
