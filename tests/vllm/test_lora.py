"""Adapters of chosen heads on vLLM's own LoRA path (``--enable-lora``), as they were saved: trained ones, and exported recipes; with
and without a recipe of the plug-in on top; against the same files in plain PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start, stop
from engine_cases import answer_of, differ, load, recipe, tiny_prompts, truth

import headpatch

SCALED = recipe({"method": "head_scaling", "heads": {"0.1": 0.0, "1.2-3": 1.6, "3.5": -1.0}})
GAMMA = recipe({"method": "zerotuning", "heads": {"*.*": 2.0}})
CHOSEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "shared": (["0.1", "2.0-2"], {"r": 4}),
    "per_head": (["0.1", "2.0-2", "3.4"], {"r": 3, "per_head": True, "lora_alpha": 6}),
    "group": ("1.0-2", {"r": 8, "kv": "group_if_all", "use_rslora": True}),
}


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that look trained, and a recipe written as one."""
    from headpatch import tune
    from headpatch.tune.guard import restriction_of

    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for name, (heads, options) in CHOSEN.items():
        tuned = tune.lora(load(tiny), heads, **options)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        restriction_of(tuned).clear()
        found[name] = tune.save(tuned, folder / name)
    model = load(tiny)
    found["exported"] = tune.to_lora(model, tune.fold(headpatch.load_recipe(SCALED), model), folder / "exported")
    return found


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Any]:
    # One slot more than adapters: in a batch with others, requests without one get what is in the last slot on CPUs (vLLM 0.32).
    llm = start(
        tiny, skip_tokenizer_init=True, enable_lora=True, max_loras=5, max_lora_rank=64,
        additional_config={"headpatch": {"recipes": {"gamma": GAMMA}}},
    )  # fmt: skip
    yield llm
    stop(llm)


def ask(llm: Any, requests: list[tuple[list[int], str | None, Path | None]], tokens: int = 8) -> list[Any]:
    """Prompt, served recipe, adapter: all in one batch."""
    from vllm.lora.request import LoRARequest

    numbers = {path: i + 1 for i, path in enumerate(sorted({path for *_, path in requests if path is not None}))}
    params = [
        headpatch.sampling_params(name, temperature=0.0, max_tokens=tokens, logprobs=4, ignore_eos=True)
        for _, name, _ in requests
    ]
    loras = [None if path is None else LoRARequest(path.name, numbers[path], str(path)) for *_, path in requests]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, *_ in requests], params, lora_request=loras, use_tqdm=False
    )
    return [answer_of(output) for output in outputs]


def test_adapters_are_served_as_plain_peft_has_them(engine: Any, tiny: Path, adapters: dict[str, Path]) -> None:
    """Every adapter and none, with the recipe and without it, mixed in one batch, twice (the second finds cached prefixes)."""
    from peft import PeftModel

    prompts, jobs = tiny_prompts(4), [(name, field) for name in (*adapters, None) for field in ("none", "gamma")]
    requests = [(ids, field, adapters.get(name or "")) for ids in prompts for name, field in jobs]
    for _ in range(2):
        answers = ask(engine, requests)
        for i, (name, field) in enumerate(jobs):
            model = load(tiny)
            if name is not None:
                model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
            mine = answers[i :: len(jobs)]
            found = differ(mine, truth(model, mine, {"gamma": GAMMA}.get(field)))
            assert not found, (name, field, found)
    assert len({answer.tokens for answer in answers[: len(jobs)]}) > 6


def test_an_exported_recipe_is_the_recipe(engine: Any, tiny: Path, adapters: dict[str, Path]) -> None:
    answers = ask(engine, [(ids, "none", adapters["exported"]) for ids in tiny_prompts(4)])
    found = differ(answers, truth(load(tiny), answers, SCALED))
    assert not found, found
