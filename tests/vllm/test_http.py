"""The OpenAI-compatible server: served names, requests' own recipes, bad requests, recipes added and removed while it serves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_cases import differ, load, recipe, span_recipes, tiny_prompts, tiny_recipes, truth, under_spans
from server import Server, serving

PROMPT = tiny_prompts()[1]
RECIPES = tiny_recipes()
STEER = span_recipes()["steer"]


def inline(gamma: float) -> dict[str, Any]:
    return recipe({"method": "zerotuning", "heads": {"*.*": gamma}})


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two served names read from files, one of them the default; inline recipes in one slot; admin."""
    folder = tmp_path_factory.mktemp("served")
    named = {}
    for name in ("per_head", "mixed"):
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(RECIPES[name]))
        named[name] = str(path)
    flag = {"recipes": named, "default": "per_head", "allow_inline": True, "admin": True, "slots": 1}
    with serving(tiny, flag, folder / "log.txt") as found:
        yield found


def test_names_and_recipes_of_concurrent_requests(server: Server, model: Any) -> None:
    """Forty requests at once, five fields: each answer is what transformers says under its recipe; then again from the cache."""
    cases: list[tuple[Any, Any]] = [
        (None, RECIPES["per_head"]), ("per_head", RECIPES["per_head"]), ("mixed", RECIPES["mixed"]), ("none", None),
        (json.dumps({"recipe": inline(1.6)}), inline(1.6)),
    ]  # fmt: skip
    prompts = tiny_prompts()
    jobs = [(prompt, field, i) for prompt in prompts for i, (field, _) in enumerate(cases)]
    for _ in range(2):
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda job: server.answer(job[0], job[1]), jobs))
        for i, (field, applied) in enumerate(cases):
            mine = [answer for answer, job in zip(answers, jobs, strict=True) if job[2] == i]
            found = differ(mine, truth(model, mine, applied))
            assert not found, (field, found)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("clam", "no recipe is served as 'clam'"),
        ("{", "not valid JSON"),
        (3, "the field is a int"),
        (json.dumps({"recipe": "mixed", "spans": [[0, 1]]}), "takes no such data"),
        (json.dumps(recipe({"method": "zerotuning", "heads": {"40.0": 2.0}})), "layer 40"),
        ("/etc/passwd", "no recipe is served as"),
        (json.dumps({"recipe": STEER}), "needs operand 'spans'"),
        (json.dumps({"recipe": STEER, "spans": [[0, 400]]}), "ends at token 400"),
        (json.dumps({"recipe": STEER, "spans": ["nowhere"]}), "does not occur"),
    ],
)
def test_a_bad_request_is_a_400(server: Server, field: Any, message: str, stream: bool) -> None:
    """With a status, also where the answer would have been streamed."""
    status, body = server.complete(PROMPT, field, stream=stream)
    assert status == 400, body
    assert message in json.dumps(body)


def test_spans_by_their_words(server: Server, model: Any) -> None:
    """A substring of a prompt that came as tokens, and of one that came as text."""
    words = [f"t{token}" for token in PROMPT]
    text = " ".join(words)
    start = text.index(" ".join(words[40:44]))
    mark = [(40, 44)] if start == len(" ".join(words[:40])) + 1 else [(0, 4)]
    said = " ".join(words[slice(*mark[0])])
    field = json.dumps({"recipe": STEER, "spans": [said]})
    answers = [server.answer(PROMPT, field), server.answer(text, field)]  # type: ignore[arg-type]
    answers[1] = dataclasses.replace(answers[1], prompt=tuple(PROMPT))
    found = differ(answers, under_spans(model, answers, STEER, [mark, mark]))
    assert not found, found


def test_beam_search_with_a_recipe_is_refused(server: Server) -> None:
    status, body = server.complete(PROMPT, "mixed", use_beam_search=True, n=2, logprobs=None)
    assert status == 400, body
    assert "beam search" in json.dumps(body)


def test_too_many_recipes_are_a_429_and_an_abort_frees_the_slot(server: Server, model: Any) -> None:
    with server.stream(PROMPT, json.dumps(inline(1.2)), 350) as running:
        running.readline()
        for stream in (False, True):
            status, body = server.complete(PROMPT, json.dumps(inline(1.3)), stream=stream)
            assert status == 429, body
            assert "slots" in json.dumps(body)
        # the same content has a slot already, and served names always have
        assert server.complete(PROMPT, json.dumps(inline(1.2)))[0] == 200
        assert server.complete(PROMPT, "mixed")[0] == 200
    end = time.monotonic() + 60
    while server.complete(PROMPT, json.dumps(inline(1.3)))[0] == 429 and time.monotonic() < end:
        time.sleep(0.2)  # the server notices that its client is gone
    answer = server.answer(PROMPT, json.dumps(inline(1.3)))
    assert not differ([answer], truth(model, [answer], inline(1.3)))


def test_recipes_over_http(server: Server, model: Any) -> None:
    path = "/v1/headpatch/recipes"
    status, body = server.call(path, {"name": "new", "recipe": inline(0.5)})
    assert (status, body) == (200, {"added": "new"})
    answer = server.answer(PROMPT, "new")
    assert not differ([answer], truth(model, [answer], inline(0.5)))
    assert set(server.call(path)[1]["recipes"]) == {"per_head", "mixed", "new"}
    assert server.call(f"{path}/new", method="DELETE")[0] == 200
    assert server.complete(PROMPT, "new")[0] == 400
    assert server.call(f"{path}/new", method="DELETE")[0] == 404
    assert server.call(f"{path}/per_head", method="DELETE")[0] == 404  # the default stays
    for body in (b"{", {"name": "x"}, {"name": "x", "recipe": "/etc/passwd"}, {"name": "none", "recipe": inline(2.0)},
                 {"name": "x", "recipe": recipe({"method": "zerotuning", "heads": {"0.77": 2.0}})}, [1]):  # fmt: skip
        status, answered = server.call(path, body)
        assert status == 400, answered
    assert server.call(path)[1]["live"] == 0


def test_the_example_client(server: Server) -> None:
    """examples/openai_client.py, as its own documentation says."""
    script = Path(__file__).parents[2] / "examples" / "openai_client.py"
    fields = ["mixed", "none", "nobody"]
    command = [sys.executable, str(script), "--url", f"{server.url}/v1", "--tokens", "6"]
    command += [word for field in fields for word in ("--recipe", field)]
    run = subprocess.run([*command, "t1 t2 t3 t4 t5"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split("|") for line in run.stdout.splitlines()]
    assert [name.strip() for name, _ in lines] == fields
    assert lines[0][1] != lines[1][1]
    assert "[400]" in lines[2][1]


def test_a_bad_recipe_stops_the_start(tiny: Path, tmp_path: Path) -> None:
    """With the RecipeError itself, before any worker starts."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(json.dumps(recipe({"method": "zerotuning", "heads": {"40.0": 2.0}})))
    started = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="the server ended") as caught,
        serving(tiny, {"recipe": str(bad)}, tmp_path / "log.txt"),
    ):
        pass
    text = str(caught.value)
    assert "RecipeError" in text and "layer 40" in text and "bad.yaml" in text
    assert "EngineCore" not in text
    assert time.monotonic() - started < 120
