"""A running engine: bad requests, recipes that come and go, handles, slots, scopes; every answer is checked against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_cases import LAYERS, ask, compare, differ, load, recipe, tiny_prompts, tiny_recipes, truth

import headpatch
from headpatch.errors import HeadpatchError, RecipeError, UnsupportedModelError

PROMPT = tiny_prompts()[1]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


def inline(gamma: float) -> dict[str, Any]:
    return recipe({"method": "zerotuning", "heads": {"*.*": gamma}})


def right(llm: Any, model: Any, field: Any, applied: Any, prompt: list[int] = PROMPT) -> None:
    """The engine answers a request with this field as transformers does with this recipe."""
    answers = ask(llm, [(prompt, field)])
    found = differ(answers, truth(model, answers, applied))
    assert not found, found


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("clam", "no recipe is served as 'clam'"),
        ("../../etc/passwd", "no recipe is served as"),
        ("{", "not valid JSON"),
        ('{"recipe": "uniform", "recipe": "none"}', "twice"),
        (7, "the field is a int"),
        (["uniform"], "the field is a list"),
        ({"recipe": "uniform", "strength": 2}, "no key 'strength'"),
        ({"recipe": 3}, "recipe is a int"),
        ({"recipe": "uniform", "spans": [[0, 3]]}, "takes no such data"),
        ({"key": "x", "body": b""}, "no key 'body'"),
        ({"headpatch": 1, "patches": []}, "patches"),
        (recipe({"method": "zerotuning", "heads": {"9.0": 2.0}}), "layer 9"),
        (recipe({"method": "zerotuning", "heads": {"1.6": 2.0}}), "head 6"),
        (recipe({"method": "no_such", "heads": {"1.1": 2.0}}), "no_such"),
        (recipe({"method": "zerotuning", "heads": {"1.1": float("nan")}}), "heads"),
        ({**inline(2.0), "model": {"num_layers": 30}}, "num_layers"),
        ({**inline(2.0), "tensors": {"file": "../x.safetensors", "sha256": "0" * 64}}, "tensors"),
    ],
)  # fmt: skip
def test_a_bad_request_fails_alone(engine: Any, model: Any, field: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", "\\[")):
        engine.generate([{"prompt_token_ids": PROMPT}], headpatch.sampling_params(field, max_tokens=2), use_tqdm=False)
    assert not engine.llm_engine.has_unfinished_requests()


def test_after_bad_requests_the_engine_is_right(engine: Any, model: Any) -> None:
    right(engine, model, "stacked", tiny_recipes()["stacked"])


@pytest.mark.parametrize("form", ["text", "mapping", "whole", "recipe"])
def test_forms_of_an_inline_recipe(engine: Any, model: Any, form: str) -> None:
    data = inline(1.7)
    field = {
        "text": json.dumps({"recipe": data}), "mapping": {"recipe": data}, "whole": json.dumps(data),
        "recipe": headpatch.load_recipe(data),
    }[form]  # fmt: skip
    right(engine, model, field, data)


def test_more_recipes_than_slots(engine: Any, model: Any) -> None:
    """Two slots beyond the flag's recipes: a third recipe at once is refused with 429, one after the other any number is right."""
    params = [headpatch.sampling_params(inline(g), max_tokens=4, temperature=0.0) for g in (1.1, 1.2, 1.3)]
    with pytest.raises(ValueError, match="recipe slots are taken") as caught:
        engine.generate([{"prompt_token_ids": PROMPT}] * 3, params, use_tqdm=False)
    status = getattr(caught.value, "http_status", None) or getattr(caught.value, "status_code", None)
    assert status == 429
    for gamma in (0.5, 0.8, 1.5, 2.0, 2.5, 0.5):
        right(engine, model, inline(gamma), inline(gamma))
    # The same content is the same recipe, however it is written; three requests, one slot.
    other = recipe({"method": "zerotuning", "heads": {f"0-{LAYERS - 1}.*": 1.9}})
    answers = ask(engine, [(PROMPT, inline(1.9)), (PROMPT, other), (PROMPT, json.dumps(inline(1.9)))])
    assert len({a.tokens for a in answers}) == 1


def test_recipes_come_and_go(engine: Any, model: Any) -> None:
    first, second = inline(0.6), inline(2.2)
    headpatch.add_recipe(engine, "extra", first)
    right(engine, model, "extra", first)
    headpatch.add_recipe(engine, "extra", second)  # new content under the name is a new recipe
    right(engine, model, "extra", second)
    headpatch.remove_recipe(engine, "extra")
    with pytest.raises(ValueError, match="no recipe is served as 'extra'"):
        ask(engine, [(PROMPT, "extra")])
    with pytest.raises(HeadpatchError, match="no recipe is served"):
        headpatch.remove_recipe(engine, "extra")
    with pytest.raises(RecipeError, match="layer 40"):
        headpatch.add_recipe(engine, "bad", recipe({"method": "zerotuning", "heads": {"40.0": 2.0}}))
    for name in ("none", "", "{x", " a"):
        with pytest.raises(RecipeError):
            headpatch.add_recipe(engine, name, first)


def test_running_requests_keep_their_recipe(engine: Any, model: Any) -> None:
    """A name is given new content while a request under it is half done."""
    core = engine.llm_engine
    first, second = inline(0.7), inline(2.7)
    headpatch.add_recipe(engine, "moving", first)

    def add(name: str) -> None:
        params = headpatch.sampling_params("moving", temperature=0.0, max_tokens=10, logprobs=4, ignore_eos=True)
        core.add_request(name, {"prompt_token_ids": PROMPT}, params)

    from engine_cases import answer_of

    add("old")
    for _ in range(5):
        core.step()
    headpatch.add_recipe(engine, "moving", second)
    add("new")
    done = {}
    while core.has_unfinished_requests():
        done.update({o.request_id: answer_of(o) for o in core.step() if o.finished})
    headpatch.remove_recipe(engine, "moving")
    for name, applied in (("old", first), ("new", second)):
        found = differ([done[name]], truth(model, [done[name]], applied))
        assert not found, (name, found)


def test_handles_stack_and_come_off(engine: Any, model: Any) -> None:
    """Applied recipes act on requests that name none, in the order of their handles; a request's own recipe replaces them."""
    gamma, scale = inline(2.0), recipe({"method": "head_scaling", "heads": {"2.*": 0.5}})
    right(engine, model, None, None)
    one = headpatch.apply(engine, gamma)
    right(engine, model, None, gamma)
    two = headpatch.apply(engine, scale)
    right(engine, model, None, recipe(*gamma["patches"], *scale["patches"]))
    right(engine, model, "none", None)
    right(engine, model, "uniform", tiny_recipes()["uniform"])
    assert headpatch.handles(engine) == [one, two]
    report = one.report()
    assert report.fires
    assert len(report.ranks[0]["layers"]) == LAYERS
    assert all(layer["calls"] > 0 and layer["armed"] for layer in report.ranks[0]["layers"])
    assert "self-check" in str(report)
    one.remove()
    one.remove()
    assert (one.active, two.active) == (False, True)
    right(engine, model, None, scale)
    with pytest.raises(HeadpatchError, match="removed"):
        one.report()
    with headpatch.applied(engine, gamma):
        right(engine, model, None, recipe(*scale["patches"], *gamma["patches"]))
    two.remove()
    right(engine, model, None, None)
    assert headpatch.handles(engine) == []


def test_no_slot_is_leaked(engine: Any) -> None:
    """After all of this no request holds a slot, and nothing is counted as live."""
    ask(engine, [(PROMPT, "none")])
    rank = engine.collective_rpc("headpatch_report")[0]
    assert [users for _, users, _ in rank["slots"]] == [0] * len(rank["slots"])
    front = engine.llm_engine.input_processor.headpatch
    assert front.live(engine.llm_engine.output_processor.request_states) == set()


def test_several_answers_to_one_prompt(engine: Any, model: Any) -> None:
    """n > 1: every child has the recipe."""
    params = headpatch.sampling_params("per_head", n=3, temperature=0.9, max_tokens=6, logprobs=4, ignore_eos=True)
    output = engine.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0]
    from engine_cases import Answer

    answers = [
        Answer(
            tuple(PROMPT), tuple(o.token_ids), tuple({t: float(e.logprob) for t, e in s.items()} for s in o.logprobs)
        )
        for o in output.outputs
    ]
    wanted = truth(model, answers, tiny_recipes()["per_head"])
    assert len(answers) == 3
    assert differ(answers, wanted).worst < 1e-4  # tokens are sampled: only log-probabilities are compared


def test_a_prompt_wide_recipe_shares_nothing_between_prompts(engine: Any) -> None:
    """Scope prompt: the salt holds the whole prompt, so a longer prompt with the same beginning finds nothing; itself again does."""
    prompt = tiny_prompts(seed=9)[0] + [5] * 40

    def cached(ids: list[int], field: Any) -> int:
        params = headpatch.sampling_params(field, max_tokens=2, temperature=0.0)
        return engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].num_cached_tokens

    cached(prompt, "rows")
    assert cached(prompt, "rows") >= 64
    assert cached([*prompt, 9, 9], "rows") == 0
    cached(prompt, "uniform")
    assert cached([*prompt, 9, 9], "uniform") >= 64  # scope prefix: recipe and beginning are all that counts
    assert cached(prompt, "scaling") == 0
    assert cached(prompt, inline(0.4)) >= 64  # the same content as "uniform"


def test_a_clients_own_salt_counts_too(engine: Any) -> None:
    prompt = tiny_prompts(seed=21)[0] + [6] * 40

    def cached(salt: str | None, field: str) -> int:
        params = headpatch.sampling_params(field, max_tokens=2, temperature=0.0)
        given = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        return engine.generate([given], params, use_tqdm=False)[0].num_cached_tokens

    assert cached("me", "uniform") == 0
    assert cached("me", "uniform") >= 64
    assert cached("you", "uniform") == cached(None, "uniform") == cached("me", "none") == 0
    with pytest.raises(ValueError, match="headpatch's own"):
        cached("headpatch:" + "0" * 64, "none")


def test_preempted_requests_come_back_right(engine: Any, model: Any) -> None:
    """The scheduler is made to preempt every running request halfway; they are resumed and end as if nothing had been."""
    core = engine.llm_engine
    from engine_cases import answer_of

    for i, field in enumerate(["mixed", "none", "stacked"]):
        params = headpatch.sampling_params(field, temperature=0.0, max_tokens=12, logprobs=4, ignore_eos=True)
        core.add_request(f"p{i}", {"prompt_token_ids": tiny_prompts()[i]}, params)
    for _ in range(8):
        core.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    done = {}
    while core.has_unfinished_requests():
        done.update({o.request_id: answer_of(o) for o in core.step() if o.finished})
    for i, applied in enumerate([tiny_recipes()["mixed"], None, tiny_recipes()["stacked"]]):
        answer = done[f"p{i}"]
        assert len(answer.tokens) == 12
        found = differ([answer], truth(model, [answer], applied))
        assert not found, (i, found)


def test_what_cannot_be_served_is_refused_by_operand(engine: Any) -> None:
    from headpatch.adapters.vllm.supplies import SUPPLIES
    from headpatch.operands import OPERANDS

    assert set(SUPPLIES) <= set(OPERANDS)
    with pytest.raises(UnsupportedModelError, match="observe"):
        headpatch.observe(engine, "output")
    with (
        pytest.raises(HeadpatchError, match="data with the request"),
        headpatch.applied(engine, inline(2.0)) as handle,
    ):
        _ = handle.inputs
    config = engine.llm_engine.vllm_config
    assert headpatch.load_recipe(inline(2.0)).check(config).num_heads == LAYERS * 6
    with pytest.raises(UnsupportedModelError, match="give the engine"):
        headpatch.apply(config, inline(2.0))


def test_the_untouched_engine_is_untouched(engine: Any, model: Any) -> None:
    """Requests without a recipe, in batches with patched ones, are the model's own; and the comparison covers all eight prompts."""
    found = compare(engine, model, tiny_prompts(seed=33), {"none": None, "stacked": tiny_recipes()["stacked"]})
    assert not any(found.values()), found
