"""The same recipes under other engine configurations: one engine start each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import start, stop
from engine_cases import (
    HEADS,
    LAYERS,
    compare,
    compare_spans,
    load,
    recipe,
    recipes,
    save_tiny,
    span_recipes,
    tiny_prompts,
    tiny_recipes,
)  # fmt: skip

import headpatch
from headpatch.errors import EngineError, HeadpatchError, RecipeError, UnsupportedModelError
from headpatch.methods.base import MassMethod, strength
from headpatch.operands import Segment

GAMMA = recipe({"method": "zerotuning", "heads": {"*.*": 2.0}})


def parity(llm: Any, folder: Path, given: dict[str, Any] | None = None) -> None:
    """All recipes in one mixed batch, twice, against transformers."""
    model = load(folder)
    cases = {"none": None, **(tiny_recipes() if given is None else given)}
    for _ in range(2):
        found, _ = compare_spans(llm, model, tiny_prompts(), cases)
        assert not any(found.values()), found


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    """Engines that a test starts are ended with it."""
    found: list[Any] = []
    yield found
    for llm in found:
        stop(llm)


@pytest.mark.slow
def test_sliding_windows_soft_caps_and_two_groups(
    tiny_windowed: Path, engines: list[Any], tasks: dict[str, str]
) -> None:  # fmt: skip
    """Every other layer has a window of 32: first tokens leave it, their blocks are freed, and head scales still act there."""
    given = {**tiny_recipes(), **span_recipes(), "task0": tasks["task0"], "task7": tasks["task7"]}
    flag = {"recipes": given, "allow_inline": True}
    engines.append(start(tiny_windowed, skip_tokenizer_init=True, additional_config={"headpatch": flag}))
    parity(engines[0], tiny_windowed, given)
    report = engines[0].collective_rpc("headpatch_report")[0]
    assert len(report["checks"]) >= 2  # one with a window, one without


@pytest.mark.slow
def test_torch_compile(tiny: Path, engines: list[Any], tasks: dict[str, str]) -> None:
    """Compiled with piecewise graphs of operators; a second recipe, applied later, needs no second compilation."""
    given = {**tiny_recipes(), **span_recipes(), "task0": tasks["task0"], "task7": tasks["task7"]}
    flag = {"recipes": given}
    engines.append(start(tiny, skip_tokenizer_init=True, enforce_eager=False, additional_config={"headpatch": flag}))
    parity(engines[0], tiny, given)
    with headpatch.applied(engines[0], GAMMA):
        model = load(tiny)
        answers = compare(engines[0], model, tiny_prompts(3), {"none": None, "uniform": tiny_recipes()["uniform"]})
        assert not any(answers.values()), answers


@pytest.mark.slow
def test_ngram_speculation(tiny: Path, engines: list[Any], tasks: dict[str, str]) -> None:
    given = {**tiny_recipes(), **span_recipes(), "task0": tasks["task0"], "task7": tasks["task7"]}
    flag = {"recipes": given}
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engines.append(
        start(tiny, skip_tokenizer_init=True, speculative_config=guess, additional_config={"headpatch": flag})
    )
    parity(engines[0], tiny, given)


@pytest.mark.slow
def test_tensor_parallel_heads_are_global(tmp_path: Path, engines: list[Any], tasks: dict[str, str]) -> None:
    """Two ranks of four query heads and two KV heads each; every head has a weight and a scale of its own, one a layer is ablated."""
    folder = save_tiny(tmp_path, "llama", 8, 4)
    flag = {
        "recipes": {
            **tiny_recipes(),
            **recipes(LAYERS, 8),
            **span_recipes(),
            "task0": tasks["task0"],
            "task7": tasks["task7"],
        }
    }
    engines.append(
        start(folder, skip_tokenizer_init=True, tensor_parallel_size=2, additional_config={"headpatch": flag})
    )
    parity(engines[0], folder, flag["recipes"])
    ranks = engines[0].collective_rpc("headpatch_report")
    assert [rank["layers"][0]["heads"] for rank in ranks] == [[0, 4], [4, 8]]


@pytest.mark.slow
def test_a_default_recipe_and_layers_that_nobody_names(tiny: Path, engines: list[Any]) -> None:
    """One recipe by the flag: requests that say nothing get it; what it does not name runs as if unpatched."""
    only = recipe({"method": "zerotuning", "heads": {"1.*": 3.0, "2.0": 0.5}})
    engines.append(start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": {"recipe": only}}))
    parity(engines[0], tiny, {"default": only})
    from engine_cases import ask, differ, truth

    answers = ask(engines[0], [(ids, None) for ids in tiny_prompts()])
    assert not differ(answers, truth(load(tiny), answers, only))
    report = engines[0].collective_rpc("headpatch_report")[0]
    assert [layer["armed"] for layer in report["layers"]] == [False, True, True, False]
    assert report["layers"][0]["calls"] == 0


@pytest.mark.slow
def test_nothing_but_tasks(tiny: Path, engines: list[Any], tasks: dict[str, str]) -> None:
    """Neither weights nor scales are armed; what comes later may be another task, in the layers that are."""
    given = {name: tasks[name] for name in ("task0", "task1", "task3")}
    engines.append(start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": {"recipes": given}}))
    parity(engines[0], tiny, given)
    assert engines[0].collective_rpc("headpatch_report")[0]["checks"]
    headpatch.add_recipe(engines[0], "later", headpatch.load_recipe(tasks["task2"]))
    found = compare(engines[0], load(tiny), tiny_prompts(3), {"later": tasks["task2"], "none": None})
    assert not any(found.values()), found


def config_of(folder: Path, flag: Any, **options: Any) -> Any:
    """What an engine would be started with; nothing is started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        str(folder), dtype="float32", max_model_len=256, skip_tokenizer_init=True,
        additional_config={"headpatch": flag}, **options,
    ).create_engine_config()  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "error", "message"),
    [
        ({"recipe": "no-such/recipe"}, RecipeError, "no shipped recipe"),
        ({"recipe": recipe({"method": "zerotuning", "heads": {"4.0": 2.0}})}, RecipeError, "layer 4"),
        ({"recipe": recipe({"method": "zerotuning", "heads": {"0.6": 2.0}})}, RecipeError, "head 6"),
        ({"recipe": {**GAMMA, "model": {"model_type": "gpt2"}}}, RecipeError, "model_type"),
        ({"recipe": recipe({"method": "zerotuning", "part": "vision", "heads": {"0.0": 2.0}})}, RecipeError, "part"),
        ({"recipe": GAMMA, "slot": 2}, RecipeError, "no such key"),
    ],
)
def test_a_bad_flag_raises_before_anything_starts(tiny: Path, flag: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_of(tiny, flag)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ],
)
def test_features_that_cannot_be_exact_are_refused_by_name(tiny: Path, options: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        config_of(tiny, {"recipe": GAMMA}, **options)


def test_changing_a_recipe_does_not_change_what_is_compiled(tiny: Path) -> None:
    hashes = {config_of(tiny, {"recipe": r}).compute_hash() for r in (GAMMA, *recipes(LAYERS, HEADS).values())}
    assert len(hashes) == 1
    from vllm.engine.arg_utils import EngineArgs

    plain = EngineArgs(str(tiny), dtype="float32", max_model_len=256, skip_tokenizer_init=True).create_engine_config()
    assert (
        plain.compute_hash() not in hashes
    )  # the output must not be quantised before the edit: armed engines compile their own


def test_an_operand_that_is_not_supplied_is_refused(tiny: Path) -> None:
    from headpatch import registry

    @dataclass(frozen=True)
    class Probe(MassMethod):
        """Test method on what nobody supplies here."""

        gamma: float = strength(1.0, help="factor", ge=0.0)
        name: ClassVar[str] = "probe_of_sinks"
        constant: ClassVar[bool] = True

        def segments(self) -> tuple[Segment, ...]:
            return (Segment("residual_sinks", (("dims", (0,)), ("threshold", 2.0))),)

    headpatch.register_method(Probe)
    try:
        with pytest.raises(UnsupportedModelError, match="operand 'residual_sinks' is not supplied"):
            config_of(tiny, {"recipe": recipe({"method": Probe.name, "heads": {"0.0": 2.0}})})
    finally:
        registry._methods.pop(Probe.name, None)
    with pytest.raises(UnsupportedModelError, match="'image_tokens' cannot be had with no_image_tokens"):
        config_of(tiny, {"recipe": recipe({"method": "image_bias", "heads": {"0.0": 2.0}})})
    span = {"method": "pasta", "heads": {"0.0": 0.1}}
    window = {"method": "streaming_llm", "sink": 32, "recent": 64}
    with pytest.raises(RecipeError, match="may drop keys"):
        config_of(tiny, {"recipe": recipe(span, window)})


def test_armed_engines_take_the_kernel_whose_values_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from headpatch.adapters.vllm import install, worker

    for armed, isa, wanted in ((object(), "amx", "vec"), (None, "amx", "amx"), (object(), "vec16", "vec16")):
        monkeypatch.setattr(worker, "worker_of", lambda _, armed=armed: armed)
        assert install._attn_isa(lambda isa=isa: isa) == wanted


def test_a_failed_self_check_stops_the_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: the kernel's second pass is made to lie, and the engine does not come up."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from headpatch.adapters.vllm.cpu import CpuEdit

    shares = CpuEdit._shares
    monkeypatch.setattr(CpuEdit, "_shares", lambda *args: shares(*args) * 1.01)
    with pytest.raises(Exception, match="self-check failed"):
        start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": {"recipe": GAMMA}})


def test_an_engine_without_the_flag_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that asks for a recipe is refused, not answered without; apply names the flag."""
    from types import SimpleNamespace

    from headpatch.adapters.vllm import ADAPTER
    from headpatch.adapters.vllm.install import _refuse_unarmed

    params = headpatch.sampling_params("calm")
    with pytest.raises(ValueError, match="not started for headpatch"):
        _refuse_unarmed(params)
    engine = SimpleNamespace(input_processor=SimpleNamespace())
    for call in (
        lambda: ADAPTER.apply(engine, GAMMA),
        lambda: ADAPTER.handles(engine),
        lambda: ADAPTER.add_recipe(engine, "a", GAMMA),
    ):
        with pytest.raises(EngineError, match=r"additional_config=\{'headpatch': \{\}\}"):
            call()
    assert issubclass(EngineError, HeadpatchError)


@pytest.mark.slow
def test_an_async_engine(tiny: Path) -> None:
    """The same calls on an AsyncLLM; its report is awaited, and a bad request raises where generate is called."""
    import asyncio

    from engine_cases import answer_of, differ, truth
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run() -> None:
        arguments = AsyncEngineArgs(
            str(tiny), dtype="float32", max_model_len=256, skip_tokenizer_init=True, enforce_eager=True, block_size=32,
            max_num_batched_tokens=64, additional_config={"headpatch": {}},
        )  # fmt: skip
        llm = AsyncLLM.from_engine_args(arguments)
        try:

            async def ask(name: str | None, number: int) -> Any:
                params = headpatch.sampling_params(name, temperature=0.0, max_tokens=8, logprobs=4, ignore_eos=True)
                async for output in llm.generate({"prompt_token_ids": tiny_prompts()[number]}, params, f"r{number}"):
                    last = output
                return answer_of(last)

            handle = headpatch.apply(llm, GAMMA)
            headpatch.add_recipe(llm, "stacked", tiny_recipes()["stacked"])
            answers = await asyncio.gather(ask(None, 0), ask("stacked", 1), ask("none", 2))
            model = load(tiny)
            for answer, applied in zip(answers, (GAMMA, tiny_recipes()["stacked"], None), strict=True):
                assert not differ([answer], truth(model, [answer], applied))
            assert (await handle.report()).fires
            with pytest.raises(ValueError, match="no recipe is served"):
                llm.generate({"prompt_token_ids": [1]}, headpatch.sampling_params("nobody"), "bad")
            headpatch.add_recipe(llm, "steer", span_recipes()["steer"])
            with pytest.raises(ValueError, match="ends at token 9"):
                llm.generate({"prompt_token_ids": [1]}, headpatch.sampling_params("steer", spans=[(0, 9)]), "bad")
            handle.remove()
            answer = await ask(None, 3)
            assert not differ([answer], truth(model, [answer], None))
        finally:
            llm.shutdown()

    asyncio.run(run())
