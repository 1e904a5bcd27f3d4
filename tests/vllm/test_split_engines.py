"""Engines whose cache drops tokens, by cache policies in their flag's recipes: answers, blocks, room, and what is refused.

Every answer is compared with a float64 softmax under an explicit mask that knows nothing of chunks and blocks (split_cases.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import start, stop
from engine_cases import Answer, answer_of, ask, differ, load, recipe, truth
from split_cases import Kept, factors, other_engine, pool, supplied, wanted

import headpatch
from headpatch.errors import EngineError, HeadpatchError, RecipeError, UnsupportedModelError

SINK, RECENT = 32, 48
FULL = {0: (0,), 1: (1,), 2: (0,), 3: (1,)}
LEAN = Kept(SINK, RECENT, FULL)
EDITED = Kept(SINK, RECENT, FULL, gamma=factors(4, 6, 0.2, 3.0, 1), scale=factors(4, 6, 0.6, 1.4, 2))
ROWS = Kept(SINK, RECENT, FULL, scale=factors(4, 6, 0.7, 1.3, 3), later=factors(4, 6, -1.0, 1.5, 4))
SERVED = {"lean": LEAN, "edited": EDITED, "rows": ROWS}
FLAG = {
    "recipes": {name: kept.recipe() for name, kept in SERVED.items()},
    "default": "lean",
    "allow_inline": True,
    "slots": 2,
}


def prompts(
    lengths: tuple[int, ...] = (1, 20, 79, 80, 81, 150, 230, 300), seed: int = 3, shared: int = 70
) -> list[list[int]]:
    """Token ids; the longer ones begin alike."""
    rng = random.Random(seed)
    begin = [rng.randrange(256) for _ in range(shared)]
    return [
        (begin + [rng.randrange(256) for _ in range(n)])[:n] if n > shared else [rng.randrange(256) for _ in range(n)]
        for n in lengths
    ]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load(tiny)


@pytest.fixture(scope="module")
def split(tiny: Path) -> Iterator[Any]:
    """One KV head of two keeps everything, another one in every other layer; 64 tokens a step, so that prompts come in chunks."""
    llm = start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": FLAG})
    yield llm
    stop(llm)


def right(llm: Any, model: Any, given: dict[str, Kept], asked: list[list[int]], tokens: int = 12) -> list[Answer]:
    """All prompts under all recipes as one mixed batch are answered as the reference says."""
    answers = ask(llm, [(ids, name) for ids in asked for name in given], tokens)
    for i, (name, kept) in enumerate(given.items()):
        mine = answers[i :: len(given)]
        found = differ(mine, wanted(model, mine, kept))
        assert not found, (name, found)
    return answers


def test_all_recipes_in_one_batch_twice(split: Any, model: Any) -> None:
    """The second time the prefix cache serves what the first one left, in the middle of which blocks are missing."""
    for _ in range(2):
        right(split, model, SERVED, prompts())


def test_tokens_are_dropped_and_it_matters(split: Any, model: Any) -> None:
    """The comparison has power: beyond what is kept, answers differ from those of an uncut cache, and below they do not."""
    answers = ask(split, [(ids, "lean") for ids in prompts((300, 230))], 30)
    assert differ(answers, truth(model, answers, None)).worst > 0.1
    short = ask(split, [(ids, "lean") for ids in prompts((20, 66))], 14)
    found = differ(short, truth(model, short, None))
    assert not found, found


def test_a_conversation_goes_on(split: Any, model: Any) -> None:
    """Turn after turn: each prompt is the last one with its answer and more; hits reach across blocks that were given back."""
    rng = random.Random(9)
    asked = prompts((140,), seed=21)
    for _ in range(4):
        answers = right(split, model, {"edited": EDITED}, asked, 20)
        asked = [[*a.prompt, *a.tokens, *(rng.randrange(256) for _ in range(30))] for a in answers]
    output = split.generate(
        [{"prompt_token_ids": asked[0]}], headpatch.sampling_params("edited", max_tokens=1), use_tqdm=False
    )[0]
    assert output.num_cached_tokens >= len(answers[0].prompt) // 32 * 32


def test_answers_do_not_depend_on_who_else_is_served(split: Any) -> None:
    """Chunks are cut differently beside other requests; windows are not."""
    ids = prompts((290,), seed=33)[0]
    assert split.reset_prefix_cache()
    alone = ask(split, [(ids, "lean")], 20)[0]
    assert split.reset_prefix_cache()
    together = ask(split, [*((p, "rows") for p in prompts(seed=34)), (ids, "lean")], 20)[-1]
    assert alone.tokens == together.tokens
    for a, b in zip(alone.logprobs, together.logprobs, strict=True):
        assert all(abs(a[token] - b[token]) < 1e-4 for token in a.keys() & b.keys())


def test_the_other_engine_says_the_same(split: Any, model: Any) -> None:
    if not supplied("huggingface"):
        pytest.skip("this adapter of transformers has no cache policies")
    answers = ask(split, [(ids, "lean") for ids in prompts((20, 150, 300))], 20)
    found = differ(answers, other_engine(model, answers, LEAN.recipe()))
    assert not found, found


def test_blocks_go_back_to_the_pool(split: Any, model: Any) -> None:
    """While a long request runs, its window group holds the sinks and the window only; the rest can be had by others."""
    core = split.llm_engine
    assert split.reset_prefix_cache()
    before = pool(split)
    assert before["free"] == before["blocks"] - 1  # the null block
    params = headpatch.sampling_params("lean", temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=4)
    core.add_request("long", {"prompt_token_ids": prompts((300,), seed=40)[0]}, params)
    held, done = [], None
    while core.has_unfinished_requests():
        done = next((o for o in core.step() if o.finished), done)
        found = pool(split)
        full, window = (
            next((g["held"][r] for g in found["groups"] for r in g["held"] if g["window"] == kind), None)
            for kind in (False, True)
        )
        if full is not None and window is not None:
            held.append((full, window, found["free"]))
    most = SINK // 32 + -(-RECENT // 32) + 1
    (full, window, free) = held[-1]
    assert full[0] == full[1] == -(-339 // 32)
    assert window[1] == full[1]
    assert window[0] <= most
    assert free == before["free"] - full[0] - window[0]
    assert (
        max(w[0] for _, w, _ in held) <= most + 2 * 64 // 32
    )  # while the prompt comes in: what two steps in flight hold, too
    assert pool(split)["free"] == before["free"]
    assert done is not None
    answer = answer_of(done)
    assert not differ([answer], wanted(model, [answer], LEAN))


def test_room_is_what_the_arithmetic_says(split: Any) -> None:
    cache = split.collective_rpc("headpatch_report")[0]["cache"]
    assert cache["tokens"] == split.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    full, window = cache["groups"]
    assert (full["kind"], full["layers"], full["block_size"]) == ("full", 4, 32)
    assert (window["kind"], window["layers"], window["block_size"]) == ("window", 4, 32)
    assert full["per_request"] == 512 // 32
    in_flight = 2 * 64  # two steps of max_num_batched_tokens
    assert window["per_request"] in {-(-(SINK + RECENT - 1 + n) // 32) + 1 for n in (64, in_flight)}
    assert cache["tokens"] == int(cache["blocks"] / (16 + window["per_request"]) * 512)
    # Uncut, one block holds both KV heads of 32 tokens: the same memory is half as many blocks.
    assert cache["unsplit_tokens"] == cache["blocks"] // 2 * 32
    assert cache["tokens"] > 1.3 * cache["unsplit_tokens"]


def test_start_up_proves_both_kinds(split: Any) -> None:
    report = split.collective_rpc("headpatch_report")[0]
    assert {check["piece"] for check in report["checks"]} == {"full", "window"}
    assert all(check["error"] <= check["bound"] for check in report["checks"])
    assert [layer["piece"]["keeps"] for layer in report["layers"]] == [None, [SINK, RECENT]] * 4


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("none", "drops tokens for all requests"),
        (recipe({"method": "zerotuning", "heads": {"*.*": 2.0}}), "it has no cache policy"),
        (Kept(SINK, RECENT + 16, FULL).recipe(), "not the one that this engine was started with"),
        (Kept(SINK, RECENT, {**FULL, 2: (1,)}).recipe(), "not the one that this engine was started with"),
        (Kept(SINK, RECENT, {}).recipe(), "not the one that this engine was started with"),
    ],
)  # fmt: skip
def test_requests_for_another_cache_are_refused(split: Any, model: Any, field: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(split, [(prompts((20,))[0], field)])
    right(split, model, {"lean": LEAN}, prompts((90,)), 3)


def test_requests_may_bring_the_same_policy(split: Any, model: Any) -> None:
    kept = Kept(SINK, RECENT, FULL, gamma=factors(4, 6, 0.3, 2.0, 8))
    answers = ask(split, [(ids, kept.recipe()) for ids in prompts((40, 200))])
    assert not differ(answers, wanted(model, answers, kept))


def test_edits_are_applied_on_top(split: Any, model: Any) -> None:
    """An applied recipe leaves the policy to the default; one with a policy of its own would be a second one."""
    gamma = Kept(SINK, RECENT, FULL, gamma=dict.fromkeys(range(4), factors(1, 6, 0.4, 0.4, 0)[0]))
    with headpatch.applied(split, recipe({"method": "zerotuning", "heads": {"*.*": 0.4}})) as handle:
        answers = ask(split, [(ids, None) for ids in prompts((150, 300))])
        report = handle.report()
    assert not differ(answers, wanted(model, answers, gamma))
    assert "keep all tokens" in str(report)
    assert "blocks free" in str(report)
    with pytest.raises(HeadpatchError, match="cache policy"):
        headpatch.apply(split, LEAN.recipe())
    with pytest.raises(HeadpatchError, match="cache policy"):
        headpatch.add_recipe(split, "plain", recipe({"method": "zerotuning", "heads": {"*.*": 0.4}}))


def test_an_uncut_engine_takes_no_policy_later(engine: Any) -> None:
    with pytest.raises(HeadpatchError, match="splits the whole engine when it starts"):
        headpatch.apply(engine, LEAN.recipe())
    with pytest.raises(ValueError, match="splits the whole engine when it starts"):
        ask(engine, [(prompts((20,))[0], LEAN.recipe())])


@pytest.mark.parametrize(
    ("flag", "options", "error", "message"),
    [
        ({"recipes": {"a": LEAN.recipe(), "b": Kept(32, 64, FULL).recipe()}, "default": "a"}, {}, RecipeError, "keeps other tokens"),
        ({"recipes": {"a": LEAN.recipe(), "b": recipe({"method": "head_scaling", "heads": {"0.0": 2.0}})}, "default": "a"}, {},
         RecipeError, "has no cache policy"),
        ({"recipes": {"a": LEAN.recipe()}}, {}, RecipeError, "requests that name no recipe"),
        ({"recipe": recipe({"method": "head_scaling", "heads": {"0.0": 2.0}}), "kv_unit": 2}, {},
         RecipeError, "no recipe has a cache policy"),
        ({"recipe": LEAN.recipe(), "kv_unit": 2}, {}, EngineError, "no layer has more than 1"),
        ({"recipe": Kept(4, 48, FULL).recipe()}, {}, EngineError, "sink: 32"),
        ({"recipe": Kept(0, 48, FULL).recipe()}, {}, EngineError, "sink: 32"),
        ({"recipe": Kept(32, 20, FULL).recipe()}, {}, EngineError, "recent: 32"),
        ({"recipe": LEAN.recipe()}, {"disable_hybrid_kv_cache_manager": True}, EngineError, "disable_hybrid_kv_cache_manager"),
        ({"recipe": LEAN.recipe()}, {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
         EngineError, "KV connectors"),
        ({"recipe": LEAN.recipe()}, {"pipeline_parallel_size": 2}, EngineError, "pipeline parallelism"),
        ({"recipe": LEAN.recipe()}, {"tensor_parallel_size": 6}, EngineError, "replicated"),
        ({"recipe": LEAN.recipe()}, {"kv_cache_dtype": "fp8"}, EngineError, "quantised KV cache"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_does_not_start(
    tiny: Path, flag: Any, options: Any, error: type[Exception], message: str
) -> None:
    """Named before anything starts."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(error, match=message):
        EngineArgs(
            str(tiny),
            dtype="float32",
            max_model_len=512,
            block_size=32,
            additional_config={"headpatch": flag},
            **options,
        ).create_engine_config()


def test_models_with_windows_of_their_own_are_refused(tiny_windowed: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(UnsupportedModelError, match="sliding windows of its own"):
        EngineArgs(
            str(tiny_windowed), dtype="float32", additional_config={"headpatch": {"recipe": LEAN.recipe()}}
        ).create_engine_config()


# --- other shapes and configurations: one start each ----------------------------------------------------------------------


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    """Engines that a test starts are ended with it."""
    found: list[Any] = []
    yield found
    for llm in found:
        stop(llm)


UNEVEN = Kept(
    32, 40, {0: (1, 5), 1: (), 2: tuple(range(8)), 3: (0, 2, 3, 6, 7)}, gamma=factors(4, 16, 0.2, 3.0, 5),
    scale=factors(4, 16, 0.6, 1.4, 6), later=factors(4, 16, -1.0, 1.5, 7),
)  # fmt: skip


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 16 query heads and 8 KV heads."""
    from engine_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("eight"), "llama", heads=16, kv_heads=8)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_with_unequally_many_heads(eight: Path, engines: list[Any], world: int) -> None:
    """No head, two, five and all eight keep everything, scattered; over two ranks, too, of which one has pieces without heads."""
    flag = {"recipe": UNEVEN.recipe(), "kv_unit": 3}
    engines.append(
        start(eight, skip_tokenizer_init=True, tensor_parallel_size=world, additional_config={"headpatch": flag})
    )
    for _ in range(2):
        right(engines[0], load(eight), {"default": UNEVEN}, prompts())
    report = engines[0].collective_rpc("headpatch_report")
    assert len(report) == world
    assert "places for heads that keep all are empty" in report[0]["cache"]["split"]
    assert [g["layers"] for g in report[0]["cache"]["groups"] if g["kind"] == "full"] == [{1: 6, 2: 4}[world]]


@pytest.mark.slow
def test_every_head_drops_tokens(tiny: Path, engines: list[Any]) -> None:
    kept = Kept(SINK, RECENT, {}, gamma=factors(4, 6, 0.2, 3.0, 1))
    engines.append(start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": {"recipe": kept.recipe()}}))
    for _ in range(2):
        right(engines[0], load(tiny), {"default": kept}, prompts())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}},
        {"num_gpu_blocks_override": 60, "max_num_batched_tokens": 100},
    ],
    ids=["compiled", "ngram", "crowded"],
)  # fmt: skip
def test_other_configurations(tiny: Path, engines: list[Any], options: dict[str, Any]) -> None:
    engines.append(start(tiny, skip_tokenizer_init=True, additional_config={"headpatch": FLAG}, **options))
    for _ in range(2):
        right(engines[0], load(tiny), SERVED, prompts(), 24)
