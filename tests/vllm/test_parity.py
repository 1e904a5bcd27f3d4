"""A recipe means the same here as in transformers: mixed batches, chunked prefill, prefix caching, to 1e-4 in log-probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import ask, compare, differ, load, tiny_prompts, tiny_recipes, truth

NONE: dict[str, Any] = {"none": None}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


def test_all_recipes_in_one_batch_twice(engine: Any, model: Any) -> None:
    """Eight prompts under nine recipes each, 64 tokens a step; the second time the prefix cache serves what the first one left."""
    given = {**NONE, **tiny_recipes()}
    for _ in range(2):
        found = compare(engine, model, tiny_prompts(), given)
        assert not any(found.values()), found
    assert sum(d.steps for d in found.values()) == 8 * 9 * 12


def test_the_prefix_cache_was_hit(engine: Any) -> None:
    """Of the tests above: the same prompt under the same recipe again takes whole blocks from the cache."""
    prompt = tiny_prompts()[0]
    for field in ("none", "stacked"):
        ask(engine, [(prompt, field)])
        output = engine.generate([{"prompt_token_ids": prompt}], _params(field), use_tqdm=False)[0]
        assert output.num_cached_tokens >= 32, field


def test_recipes_change_what_the_model_says(engine: Any, model: Any) -> None:
    """The comparison has power: under no recipe's name do the answers look like the untouched model's."""
    for name in tiny_recipes():
        answers = ask(engine, [(ids, name) for ids in tiny_prompts()])
        assert differ(answers, truth(model, answers, None)).worst > 100 * 1e-4, name


def test_without_the_salt_recipes_poison_each_other(engine: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: take the prefix-cache salt away, and the comparison fails."""
    from headpatch.adapters.vllm import frontend

    given = {**NONE, **{name: tiny_recipes()[name] for name in ("uniform", "stacked", "extreme")}}
    assert engine.reset_prefix_cache()
    monkeypatch.setattr(frontend, "salted", lambda user, salt: user)
    compare(engine, model, tiny_prompts(5), given)
    found = compare(engine, model, tiny_prompts(5), given)
    monkeypatch.undo()
    assert engine.reset_prefix_cache()
    assert any(found.values())
    assert max(d.worst for d in found.values()) > 0.01
    healed = compare(engine, model, tiny_prompts(5), given)
    assert not any(healed.values()), healed


def test_one_at_a_time_is_the_same_as_together(engine: Any) -> None:
    """A request's patch reaches no other request: alone and in a mixed batch it is answered alike."""
    prompt = tiny_prompts()[2]
    names = ["none", *tiny_recipes()]
    together = ask(engine, [(prompt, name) for name in names])
    for name, answer in zip(names, together, strict=True):
        alone = ask(engine, [(prompt, name)])[0]
        assert alone.tokens == answer.tokens, name
        for a, b in zip(alone.logprobs, answer.logprobs, strict=True):
            assert all(abs(a[token] - b[token]) < 1e-4 for token in a.keys() & b.keys()), name


def _params(field: Any) -> Any:
    import headpatch

    return headpatch.sampling_params(field, temperature=0.0, max_tokens=2)
