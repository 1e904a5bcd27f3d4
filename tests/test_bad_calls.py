"""Broken calls: each raises the named error, says what would be right, and leaves the model bit for bit as it was."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from compat import A, B, fingerprint, ids, left_padded, logits, one_thread, recipe, silent
from naive import define, of, patch, registered
from torch import nn
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch
from headpatch import EngineError, HeadpatchError, RecipeError, UnsupportedModelError
from headpatch.operands import Segment

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def shared() -> Any:
    return ZOO["llama"].build()


@pytest.fixture
def model(shared) -> Any:
    return copy.deepcopy(shared)


Do = Callable[[Any], Any]
ZERO = recipe("zerotuning", {"0.1": 3.0})


def case(name: str, do: Do, error: type[Exception], words: str) -> Any:
    """`words` are searched in the message, as a regular expression."""
    return pytest.param(do, error, words, id=name)


def fails(model: Any, do: Callable[[], Any], error: type[Exception], words: str) -> None:
    """The call raises that, soon, and the model is what it was."""
    before, plain = fingerprint(model), logits(model)
    handles = [h.recipe.digest for h in headpatch.handles(model)]
    start = time.process_time()
    with pytest.raises(error, match=words) as caught:
        do()
    assert time.process_time() - start < 2
    assert caught.type is error, f"{caught.type.__name__} is not exactly {error.__name__}"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert fingerprint(model) == before and torch.equal(logits(model), plain)
    assert [h.recipe.digest for h in headpatch.handles(model)] == handles


# ----------------------------------------------------------------------------------------------------- apply and friends


def apply(what: Any) -> Do:
    return lambda model: headpatch.apply(model, what)


def on(thing: Callable[[Any], Any], what: Any = ZERO) -> Do:
    return lambda model: headpatch.apply(thing(model), what)


class _Empty(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model = inner


def _pipeline(model: Any) -> Any:
    pipe = object.__new__(transformers.TextGenerationPipeline)
    pipe.model = None
    return pipe


APPLYING = [
    case("no_recipe", apply(None), RecipeError, "a null is no recipe .*give a path"),
    case("int", apply(3), RecipeError, "a number is no recipe"),
    case("list", apply([ZERO]), RecipeError, "a list is no recipe"),
    case("method_class", apply(dict), RecipeError, "a type is no recipe"),
    case("model_as_recipe", lambda m: headpatch.apply(m, m), RecipeError, "a LlamaForCausalLM is no recipe"),
    case("swapped", lambda m: headpatch.apply(ZERO, m), UnsupportedModelError, "no engine .* what to do with a builtins.dict"),
    case("empty_dict", apply({}), RecipeError, "headpatch: is missing"),
    case("unknown_name", apply("smollm2-135m-instruct/nothing"), RecipeError, "no shipped recipe and no file"),
    case("file_not_there", apply("./nothing.yaml"), RecipeError, r"nothing\.yaml"),
    case("bytes", apply(b"a.yaml"), RecipeError, "bytes"),
    case("head_out_of_range", apply(recipe("zerotuning", {"0.4": 2.0})), RecipeError,
         r'patches\[0\]\.heads\["0\.4"\]: head 4 .*does not exist in layer 0 \(its query heads are 0-3\)'),
    case("layer_out_of_range", apply(recipe("zerotuning", {"0-2.1": 2.0})), RecipeError,
         r'patches\[0\]\.heads\["0-2\.1"\]: layer 2 .*\(layers are 0-1\)'),
    case("second_patch", apply(of(*ZERO["patches"], {"method": "head_scaling", "heads": {"9.9": 0.0}})), RecipeError,
         r'patches\[1\]\.heads\["9\.9"\]'),
    case("no_such_part", apply(recipe("zerotuning", {"0.1": 2.0}, part="vision")), RecipeError,
         r"patches\[0\]\.part: this model has no part 'vision' \(its parts: text\)"),
    case("other_model_type", apply(ZERO | {"model": {"model_type": "mistral"}}), RecipeError,
         r"model\.model_type: the recipe says 'mistral', the model has 'llama'"),
    case("other_head_count", apply(ZERO | {"model": {"num_heads": 9}}), RecipeError, r"model\.num_heads: .*says 9, .*has 4"),
    case("other_depth", apply(ZERO | {"model": {"num_layers": 30}}), RecipeError, r"model\.num_layers: .*says 30, .*has 2"),
    case("other_width", apply(ZERO | {"model": {"head_dim": 64}}), RecipeError, r"model\.head_dim"),
    case("other_kv_heads", apply(ZERO | {"model": {"num_kv_heads": [2, 1]}}), RecipeError, r"model\.num_kv_heads: .*layer 1"),
    case("config", on(lambda m: m.config), UnsupportedModelError, "a LlamaConfig describes a model but is none; give the model"),
    case("pipeline_without_model", on(_pipeline), UnsupportedModelError, "found no transformers model in a TextGenerationPipeline"),
    case("wrapper_without_model", on(lambda m: _Empty(None)), UnsupportedModelError, "no engine of headpatch's knows"),
    case("layer", on(lambda m: m.model.layers[0]), UnsupportedModelError, "no engine of headpatch's knows .*LlamaDecoderLayer"),
    case("attention", on(lambda m: m.model.layers[0].self_attn), UnsupportedModelError, "no engine .*LlamaAttention"),
    case("state_dict", on(lambda m: m.state_dict()), UnsupportedModelError, "no engine .*OrderedDict"),
    case("model_class", on(type), UnsupportedModelError, "no engine of headpatch's knows"),
    case("model_name", on(lambda m: "HuggingFaceTB/SmolLM2-135M"), UnsupportedModelError, "no engine .*builtins.str"),
    case("nothing", on(lambda m: None), UnsupportedModelError, "no engine .*NoneType"),
    case("handles_of_nothing", lambda m: headpatch.handles(None), UnsupportedModelError, "no engine .*NoneType"),
    case("handles_of_a_config", lambda m: headpatch.handles(m.config), UnsupportedModelError, "describes a model but is none"),
    case("applied_wrong", lambda m: headpatch.applied(m, 3).__enter__(), RecipeError, "a number is no recipe"),
    case("check_against_nothing", lambda m: headpatch.load_recipe(ZERO).check(None), UnsupportedModelError, "no engine"),
    case("check_against_a_name", lambda m: headpatch.load_recipe(ZERO).check("llama"), UnsupportedModelError, "no engine"),
    case("observe_nothing", lambda m: headpatch.observe(None, "lse").__enter__(), UnsupportedModelError, "no engine"),
    case("observe_a_config", lambda m: headpatch.observe(m.config, "lse").__enter__(), UnsupportedModelError, "but is none"),
    case("observe_no_operands", lambda m: headpatch.observe(m, []).__enter__(), HeadpatchError, "name at least one operand"),
    case("observe_unknown", lambda m: headpatch.observe(m, "lsee").__enter__(), HeadpatchError, "'lsee'; did you mean 'lse'"),
    case("observe_heads", lambda m: headpatch.observe(m, "lse", "0.9").__enter__(), RecipeError, "head 9 .*does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "error", "words"), APPLYING)
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_apply(model, do, error, words, patched):
    if patched:
        headpatch.apply(model, B)
    fails(model, lambda: do(model), error, words)


# ---------------------------------------------------------------------------------------------------------------- inputs


def given(**data: Any) -> Do:
    return lambda handle: handle.inputs(**data).__enter__()


def spans(value: Any, **more: Any) -> Do:
    return given(spans=value, **more)


class _Slow:
    """A tokenizer that cannot say where its tokens come from."""

    def __call__(self, prompt: str, return_offsets_mapping: bool = False, add_special_tokens: bool = True) -> Any:
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")


def _words(prompt: str, return_offsets_mapping: bool = False, add_special_tokens: bool = True) -> Any:
    ends = [0, *(i for i, c in enumerate(prompt) if c == " "), len(prompt)]
    return {"input_ids": list(range(len(ends) - 1)), "offset_mapping": list(itertools.pairwise(ends))}


TEXT: dict[str, Any] = {"prompts": ["a cat sat"], "tokenizer": _words}

INPUTS = [
    case("nothing", given(), HeadpatchError, "inputs.* was given nothing; name spans, prompt_len, rows or"),
    case("unknown", given(span=[]), TypeError, "span"),
    case("string", spans("cat"), HeadpatchError, "one entry per row"),
    case("mapping", spans({"tokens": [0, 1]}), HeadpatchError, "one entry per row"),
    case("number", spans(3), HeadpatchError, "one entry per row"),
    case("generator", spans(iter([])), HeadpatchError, "one entry per row"),
    case("tensor", spans(torch.tensor([[0, 1]])), HeadpatchError, "one entry per row"),
    case("row_is_a_string", spans(["cat"]), HeadpatchError, r"spans\[0\]: give a list of spans"),
    case("row_is_a_mapping", spans([{"tokens": [0, 1]}]), HeadpatchError, r"spans\[0\]: give a list of spans"),
    case("row_is_a_number", spans([[], 3]), HeadpatchError, r"spans\[1\]: give a list of spans"),
    case("row_is_none", spans([None]), HeadpatchError, r"spans\[0\]: give a list of spans"),
    case("row_is_a_range", spans([(0, 3)]), HeadpatchError, r"spans\[0\]\[0\]: 0 is no span"),
    case("span_is_none", spans([[None]]), HeadpatchError, r"spans\[0\]\[0\]: None is no span"),
    case("empty_string", spans([[""]], **TEXT), HeadpatchError, "an empty string marks nothing"),
    case("unknown_kind", spans([[{"words": [0, 1]}]]), HeadpatchError, r"is no span; give \(start, stop\)"),
    case("two_kinds", spans([[{"tokens": [0, 1], "chars": [0, 1]}]]), HeadpatchError, "is no span"),
    case("one_number", spans([[(3,)]]), HeadpatchError, r"spans\[0\]\[0\]: \(3,\) is no range; .*0 <= start < stop"),
    case("three_numbers", spans([[(0, 1, 2)]]), HeadpatchError, "is no range"),
    case("floats", spans([[(0.0, 1.0)]]), HeadpatchError, "is no range"),
    case("booleans", spans([[(False, True)]]), HeadpatchError, "is no range"),
    case("strings", spans([[("0", "1")]]), HeadpatchError, "is no range"),
    case("negative", spans([[(-2, 3)]]), HeadpatchError, "is no range"),
    case("reversed", spans([[(3, 1)]]), HeadpatchError, "is no range"),
    case("empty", spans([[(3, 3)]]), HeadpatchError, "is no range"),
    case("far_beyond", spans([[(0, 10**12)]]), HeadpatchError, r"spans\[0\]\[0\]: ends beyond every prompt"),
    case("second_of_second", spans([[(0, 1)], [(0, 1), (1, 0)]]), HeadpatchError, r"spans\[1\]\[1\]: \(1, 0\) is no range"),
    case("text_without_prompts", spans([["cat"]]), HeadpatchError, "substrings and character ranges need prompts= and tokenizer="),
    case("text_without_tokenizer", spans([["cat"]], prompts=["a cat"]), HeadpatchError, "need prompts= and tokenizer="),
    case("not_found", spans([["dog"]], **TEXT), HeadpatchError, r"spans\[0\]\[0\]: 'dog' does not occur in the row's prompt"),
    case("chars_beyond", spans([[{"chars": [3, 99]}]], **TEXT), HeadpatchError, "has 9 characters, the span ends at 99"),
    case("chars_of_a_string", spans([[{"chars": "cat"}]], **TEXT), HeadpatchError, "is no range"),
    case("prompts_of_other_number", spans([["cat"], []], **TEXT), HeadpatchError, "spans has 2 rows and prompts 1"),
    case("prompts_is_a_string", spans([["cat"]], prompts="a cat sat", tokenizer=_words), HeadpatchError, "prompts"),
    case("slow_tokenizer", spans([["cat"]], prompts=["a cat"], tokenizer=_Slow()), HeadpatchError, "need a fast tokenizer"),
    case("prompt_len_is_a_number", given(prompt_len=3), HeadpatchError, "prompt_len: give a list with one number per row"),
    case("prompt_len_of_strings", given(prompt_len=["3"]), HeadpatchError, "prompt_len"),
    case("prompt_len_of_floats", given(prompt_len=[3.5]), HeadpatchError, r"prompt_len\[0\] is 3.5; .*whole number"),
    case("prompt_len_of_none", given(prompt_len=[None]), HeadpatchError, "prompt_len"),
    case("prompt_len_negative", given(prompt_len=[-1, 3]), HeadpatchError, "prompt_len"),
    case("prompt_len_empty", given(prompt_len=[]), HeadpatchError, "prompt_len"),
    case("companion_is_a_number", given(without_image=1), HeadpatchError, "without_image"),
    case("companion_is_a_string", given(without_image=["1"]), HeadpatchError, "without_image"),
    case("companion_is_true", given(without_image=[True, None]), HeadpatchError, r"without_image\[0\] is True; .*or None"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "error", "words"), INPUTS)
def test_inputs(model, do, error, words):
    """Refused when given, before any call."""
    handle = headpatch.apply(model, A)
    fails(model, lambda: do(handle), error, words)
    with handle.inputs(prompt_len=[12, 12]):  # nothing of the broken call is left
        logits(model)


def test_inputs_twice(model):
    handle, other = headpatch.apply(model, A), headpatch.apply(model, B)
    with handle.inputs(spans=[[(0, 1)], []]):
        for again in (handle, other):
            fails(
                model, lambda again=again: again.inputs(spans=[[], []]).__enter__(), HeadpatchError,
                r"inputs\(spans=...\) is already given by an enclosing inputs\(\)",
            )  # fmt: skip
        with other.inputs(prompt_len=[3, 3]):
            pass
    with handle.inputs(spans=[[(0, 1)], []]):
        pass


def test_inputs_are_forgotten_when_the_block_fails(model):
    handle = headpatch.apply(model, A)
    with pytest.raises(KeyError), handle.inputs(spans=[[(0, 1)], []]):
        raise KeyError
    with handle.inputs(spans=[[(0, 1)], []]):
        pass


# ------------------------------------------------------------------------------------------------------ calls of the model

SPANNING = define(
    "mass", "spanning", constant=True, segments=lambda self: (Segment("spans"),), weights=lambda self, s: s[:, None]
)
DECODE = recipe("head_scaling", {"*.0": 0.0}, positions="decode")


def _spanning(data: dict[str, Any] | None, *calls: dict[str, Any]) -> Do:
    def do(model: Any) -> None:
        handle = headpatch.handles(model)[0]
        if data is None:
            logits(model)
            return
        with handle.inputs(**data):
            logits(model, *calls)

    return do


def _block_mask(model: Any) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 12, 12, device="cpu")
    logits(model, {"input_ids": ids(), "attention_mask": mask})


CALLS = [
    case("no_spans", _spanning(None), EngineError,
         r"layer text\.0: operand 'spans' is needed and none were given: with handle\.inputs\(spans=\[\.\.\.\]\)"),
    case("no_spans_but_others", _spanning({"prompt_len": [12, 12]}), EngineError, "operand 'spans' is needed"),
    case("too_few_rows", _spanning({"spans": [[(0, 1)]] * 3}, {"input_ids": ids(2)}), EngineError, "3 entries, the batch has 2"),
    case("beyond_the_prompt", _spanning({"spans": [[(0, 13)], []]}), EngineError, r"spans\[0\] ends at token 13, .*prompt has 12"),
    case("beyond_a_padded_prompt", _spanning({"spans": [[], [(5, 8)], []]}, left_padded((12, 7, 3))), EngineError,
         r"spans\[1\] ends at token 8, .*prompt has 7"),
    case("prompt_len_of_other_rows", _spanning({"spans": [[], []], "prompt_len": [1, 2, 3]}), EngineError,
         r"inputs\(prompt_len=\.\.\.\) has 3 entries, the batch has 2 rows"),
    case("ready_made_block_mask", _block_mask, EngineError, "BlockMask"),
    case("three_dimensional_mask", lambda m: logits(m, {"input_ids": ids(), "attention_mask": torch.ones(2, 12, 12)}),
         EngineError, "attention_mask has 3 dimensions; headpatch understands 2 and 4"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "error", "words"), CALLS)
def test_calls(model, do, error, words):
    """A broken call raises, and the next good one is not affected."""
    good = {"input_ids": ids()}
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.0-2": 6.0})))
        with handle.inputs(spans=[[(0, 2)], []]):
            expected = logits(model, good)
        before = fingerprint(model)
        start = time.process_time()
        with pytest.raises(error, match=words) as caught:
            do(model)
        assert caught.type is error and time.process_time() - start < 2
        assert fingerprint(model) == before
        with handle.inputs(spans=[[(0, 2)], []]):
            assert torch.equal(logits(model, good), expected)
        handle.remove()


def _two_turns(model: Any) -> None:
    cache = DynamicCache()
    for length in (6, 14):
        model.generate(ids(1, length), past_key_values=cache, max_new_tokens=2, do_sample=False)


def _foreign(model: Any, cache: Any) -> None:
    logits(ZOO["llama"].build(), past_key_values=cache)
    logits(model, ids(2, 1), past_key_values=cache)


PROMPT_CALLS = [
    case("second_turn", _two_turns, EngineError, "depend on the whole prompt cannot continue on a cache from an earlier"),
    case("generate_without_cache", lambda m: m.generate(ids(1), use_cache=False, max_new_tokens=2), EngineError,
         "cannot run under generate.use_cache=False., where every step looks like a longer prompt"),
    case("decode_without_prompt", lambda m: _foreign(m, DynamicCache()), EngineError, "filled under no recipe"),
    case("static_without_prompt", lambda m: _foreign(m, StaticCache(config=m.config, max_cache_len=20)), EngineError, "no recipe"),
    case("packed_rows", lambda m: logits(m, {"input_ids": ids(1), "position_ids": torch.tensor([[*range(5), *range(7)]])},
                                         use_cache=False),
         EngineError, "operand 'prompt_len' is not one number in a row that packs several sequences"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "error", "words"), PROMPT_CALLS)
def test_calls_of_a_recipe_that_depends_on_the_prompt(model, do, error, words):
    headpatch.apply(model, DECODE)
    fails(model, lambda: do(model), error, words)


# --------------------------------------------------------------------------------------------------------------- handles


def test_handles_take_no_other_arguments(model):
    handle = headpatch.apply(model, A)
    for call in (lambda: handle.remove(True), lambda: handle.inputs([[(0, 1)]]), lambda: handle.report(1, 2)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(AttributeError):
        handle.recipe = None
    assert handle.active


@pytest.mark.parametrize("method", ["zerotuning", "head_scaling"])
def test_strengths_that_leave_their_range_in_training_are_not_applied_silently(model, method):
    """A trained strength may be anything; NaN shows in the output, it is not swallowed."""
    handle = headpatch.apply(model, recipe(method, {"0.1": 2.0}))
    (strength,) = handle.strengths(trainable=True).values()
    with torch.no_grad():
        strength.fill_(float("nan"))
    assert logits(model).isnan().any()
    handle.remove()
    assert logits(model).isfinite().all()
