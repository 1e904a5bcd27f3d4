"""Edits of attention to segments of keys: the same here as in transformers, whatever the batch, the chunks and the prefix cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_cases import (
    ask,
    compare_spans,
    differ,
    load,
    sink_recipes,
    span_recipes,
    tiny_prompts,
    tiny_recipes,
    truth,
    under_spans,
)

import headpatch

RECIPES = {**tiny_recipes(), **span_recipes(), **sink_recipes()}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


def test_spans_in_one_batch_with_everything_else_twice(engine: Any, model: Any) -> None:
    """Eight prompts, 64 tokens a step, each under three recipes with spans, two without and none; then from the prefix cache."""
    given = {"none": None, **span_recipes(), **{name: tiny_recipes()[name] for name in ("stacked", "mixed")}}
    for _ in range(2):
        found, answers = compare_spans(engine, model, tiny_prompts(), given)
        assert not any(found.values()), found
    for name in span_recipes():  # the comparison has power
        assert differ(answers[name], truth(model, answers[name], None)).worst > 100 * 1e-4, name


def test_other_spans_are_other_prefixes(engine: Any, model: Any) -> None:
    """The same prompt under the same recipe with other spans shares nothing; with the same spans it is served from the cache."""
    prompt = tiny_prompts()[0]
    for spans in ([(0, 9)], [(20, 30)], [(0, 9)]):
        answers = ask(engine, [(prompt, {"recipe": "steer", "spans": spans})])
        found = differ(answers, under_spans(model, answers, RECIPES["steer"], [spans]))
        assert not found, (spans, found)
    params = headpatch.sampling_params("steer", spans=[(0, 9)], temperature=0.0, max_tokens=2)
    output = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    assert output.num_cached_tokens >= 32


def test_the_next_turn_is_not_served_what_was_generated(engine: Any, model: Any) -> None:
    """What a request generated lies beside the spans once it is part of a prompt: its cached keys must not be taken for those."""
    prompt, spans = tiny_prompts()[3], [(2, 6)]
    first = ask(engine, [(prompt, {"recipe": "steer", "spans": spans})], tokens=70)[0]
    answers = ask(engine, [([*first.prompt, *first.tokens], {"recipe": "steer", "spans": spans})])
    found = differ(answers, under_spans(model, answers, RECIPES["steer"], [spans]))
    assert not found, found


def test_a_row_without_a_span_stays_as_it_is(engine: Any, model: Any) -> None:
    answers = ask(engine, [(prompt, {"recipe": "steer", "spans": []}) for prompt in tiny_prompts(4)])
    assert not differ(answers, truth(model, answers, None))


def short_prompts() -> list[list[int]]:
    """Prompts that a step of 64 tokens takes, one of them exactly."""
    return [*(ids[:n] for ids, n in zip(tiny_prompts(), (60, 33, 64, 17, 50), strict=False)), [7]]


def test_sinks_of_whole_prompts_in_one_batch_twice(engine: Any, model: Any) -> None:
    """Beside longer prompts, which come in chunks, and spans; the second time, when all prompts are in the prefix cache."""
    given = {**sink_recipes(), "none": None, "steer": RECIPES["steer"]}
    long = [(ids, "stacked") for ids in tiny_prompts(4)]
    for _ in range(2):
        answers = ask(engine, [*long, *((ids, name) for ids in short_prompts() for name in sink_recipes())])
        found = differ(answers[: len(long)], truth(model, answers[: len(long)], RECIPES["stacked"]))
        assert not found, found
        both, answers_of = compare_spans(engine, model, short_prompts(), given, tokens=20)
        assert not any(both.values()), both
    for name in sink_recipes():
        assert differ(answers_of[name], truth(model, answers_of[name], None)).worst > 100 * 1e-4, name


def test_sinks_stay_over_preemption(engine: Any, model: Any) -> None:
    """A request that is taken off while it is answered comes again in chunks, together with what it said."""
    from engine_cases import answer_of

    core, prompt = engine.llm_engine, short_prompts()[0]
    params = headpatch.sampling_params("calm", temperature=0.0, max_tokens=30, logprobs=4, ignore_eos=True)
    core.add_request("again", {"prompt_token_ids": prompt}, params)
    for _ in range(12):
        core.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    done = []
    while core.has_unfinished_requests():
        done += [answer_of(output) for output in core.step() if output.finished]
    found = differ(done, truth(model, done, RECIPES["calm"]))
    assert not found, found


def test_a_prompt_that_no_step_takes_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match="--max-num-batched-tokens"):
        ask(engine, [(tiny_prompts()[0] + [1] * 20, "calm")])
    assert not engine.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("steer", "needs operand 'spans' and none were given"),
        ({"recipe": "steer", "spans": "text"}, "give a list of spans"),
        ({"recipe": "steer", "spans": [[3, 1]]}, "is no range"),
        ({"recipe": "steer", "spans": [[0, 4000]]}, "ends at token 4000"),
        (json.dumps({"recipe": "steer", "spans": [{"chars": [0, 2]}]}), "need the engine's tokenizer"),
        ({"recipe": "stacked", "spans": [[0, 2]]}, "takes no such data"),
    ],
)
def test_bad_spans_fail_alone(engine: Any, field: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(engine, [(tiny_prompts()[1], field)])
    assert not engine.llm_engine.has_unfinished_requests()
