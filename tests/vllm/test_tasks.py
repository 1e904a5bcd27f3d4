"""Injected tasks on a running engine: sixteen in one batch, later turns, preemption, tasks that come later; against transformers.

The engine has prefix caching on and computes prompts in chunks of 64 tokens, so that the injected position lies anywhere in a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_cases import answer_of, ask, differ, load, recipe, tiny_prompts, tiny_recipes, truth

import headpatch
from headpatch.errors import EngineError

SCALE = recipe({"method": "head_scaling", "heads": {"2.*": 0.5}})


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


def right(model: Any, answers: list[Any], applied: Any) -> None:
    found = differ(answers, truth(model, answers, applied))
    assert not found, found


def test_sixteen_tasks_in_one_batch_each_as_if_alone(engine: Any, model: Any, tasks: dict[str, str]) -> None:
    """Eight prompts (long ones that share their beginning, one of a single token), sixteen tasks and none, twice."""
    names, prompts = [*tasks, "none"], tiny_prompts()
    requests = [(ids, name) for ids in prompts for name in names]
    for _ in range(2):
        answers = ask(engine, requests, 6)
        for i, name in enumerate(names):
            right(model, answers[i :: len(names)], tasks.get(name))
    alone = [ask(engine, [request], 6)[0] for request in requests[: len(names)]]
    for one, other in zip(alone, answers, strict=False):
        assert one.tokens == other.tokens
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.keys() == b.keys() and all(abs(a[token] - b[token]) < 1e-5 for token in a)
    # The tasks do something, and not the same.
    assert len({answer.tokens for answer in answers[: len(names)]}) > len(names) // 2


@pytest.mark.parametrize("second", ["task0", "task5", "task7", "none", "uniform"])
def test_the_second_turn_of_a_chat(engine: Any, model: Any, tasks: dict[str, str], second: str) -> None:
    """The first turn was injected at its own last token; the second turn's prompt holds it, and is injected at its own end only."""
    first = ask(engine, [(tiny_prompts(seed=40)[0], "task0")], 5)[0]
    prompt = [*first.prompt, *first.tokens, 11, 12, 13]
    third = [*prompt, 14]
    answers = ask(engine, [(prompt, second), (third, second), (list(first.prompt), second)], 5)
    right(model, answers, {**tasks, **tiny_recipes(), "none": None}[second])
    right(model, ask(engine, [(list(first.prompt), "task0")], 5), tasks["task0"])


def test_a_task_shares_cached_blocks_with_the_same_prompt_only(engine: Any) -> None:
    prompt = tiny_prompts(seed=41)[0] + [5] * 40

    def cached(ids: list[int], field: str) -> int:
        params = headpatch.sampling_params(field, max_tokens=2, temperature=0.0)
        return int(engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].num_cached_tokens or 0)

    cached(prompt, "task1")
    assert cached(prompt, "task1") >= 64
    assert cached([*prompt, 9, 9], "task1") == cached(prompt, "task2") == cached(prompt, "none") == 0


def test_preempted_tasks_come_back_right(engine: Any, model: Any, tasks: dict[str, str]) -> None:
    """Prompt and generated tokens are computed anew as one; what was the prompt's last token stays it."""
    core, names = engine.llm_engine, ["task0", "task7", "none"]
    for i, name in enumerate(names):
        params = headpatch.sampling_params(name, temperature=0.0, max_tokens=12, logprobs=4, ignore_eos=True)
        core.add_request(f"t{i}", {"prompt_token_ids": tiny_prompts(seed=42)[i]}, params)
    for _ in range(8):
        core.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    done = {}
    while core.has_unfinished_requests():
        done.update({o.request_id: answer_of(o) for o in core.step() if o.finished})
    for i, name in enumerate(names):
        assert len(done[f"t{i}"].tokens) == 12
        right(model, [done[f"t{i}"]], tasks.get(name))


def test_tasks_come_and_go(engine: Any, model: Any, tasks: dict[str, str], tmp_path: Path) -> None:
    """A task that the flag does not name travels with its requests; the flag's are applied to requests that name nothing."""
    from engine_cases import save_tasks

    prompt = tiny_prompts(seed=43)[0]
    other = save_tasks(tmp_path, 20)["task18"]
    headpatch.add_recipe(engine, "later", headpatch.load_recipe(other))
    answers = ask(engine, [(prompt, "later"), (prompt, "task2")])
    right(model, answers[:1], other)
    right(model, answers[1:], tasks["task2"])
    headpatch.remove_recipe(engine, "later")
    with headpatch.applied(engine, other), headpatch.applied(engine, SCALE):
        both = headpatch.load_recipe(other).to_dict()
        both = headpatch.Recipe.from_dict(
            {**both, "patches": [*both["patches"], *SCALE["patches"]]}, folder=Path(other).parent
        )
        right(model, ask(engine, [(prompt, None)]), both)
        with pytest.raises(EngineError, match="only one recipe that acts by default"):
            headpatch.apply(engine, tasks["task3"])
    right(model, ask(engine, [(prompt, None)]), None)
    inline = json.dumps(headpatch.load_recipe(other).to_dict())
    with pytest.raises(ValueError, match="no folder in which its arrays lie"):
        ask(engine, [(prompt, inline)])
    with pytest.raises(headpatch.RecipeError, match=r"is \(16,\)"):
        headpatch.add_recipe(engine, "narrow", save_tasks(tmp_path, 1, dim=16)["task0"])
