"""A trained model: SmolLM2-135M-Instruct in float32, against the float64 reference, over a prompt and 64 generated tokens.

Trained models have real sinks: most heads give the first token most of their attention, which random models only imitate.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import NAME, Edits, Shared, edits_of, wrap
from torch import Tensor
from zoo import Inputs, Part

import headpatch

pytestmark = pytest.mark.slow

LIMIT = 1e-3
LAYERS, HEADS, KV_HEADS = 30, 9, 3
PARTS = {"text": Part.of("model.layers.{}.self_attn", LAYERS, HEADS, KV_HEADS)}
PROMPTS = (
    "The capital of Poland is London. Q: What is the capital of Poland? Answer in one word.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle, and say what the letter says.",
    "List three reasons why bread rises, and explain each of them to a child of eight who likes trains and planets. Then sum up.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The converted checkpoint, from the cache if it is there."""
    path = Path(__file__).parents[1] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("headpatch_example_smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.fetch())


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """Float32, on transformers' default attention."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None  # 64 tokens, whatever comes
    return loaded


@pytest.fixture(scope="module")
def naive(folder: Path) -> Any:
    """The same weights in float64 with the reference attention."""
    from transformers import AutoModelForCausalLM

    # float32 first, then parameters only: the rotary frequencies must stay what the float32 model has.
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    for parameter in loaded.parameters():
        parameter.data = parameter.data.double()
    return wrap(loaded, PARTS)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, Inputs]:
    """One prompt, and a left-padded batch of three."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = {}
    for name, texts in (("single", PROMPTS[1:2]), ("padded", PROMPTS)):
        chats = [[{"role": "user", "content": text}] for text in texts]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        real = given["attention_mask"].bool()
        first = real.long().argmax(-1)
        kwargs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
        made[name] = Inputs(kwargs, real, {"text": first}, real.shape[1])
    assert (made["padded"].first["text"] > 0).sum() == 2
    return made


def moderate() -> dict[str, Any]:
    """One gamma per layer and head in [0.2, 3], and scales on some heads."""
    rng = random.Random(2)
    heads = [f"{la}.{h}" for la in range(LAYERS) for h in range(HEADS)]
    gammas = {head: rng.uniform(0.2, 3.0) for head in heads}
    scales = {head: rng.choice([0.0, 0.5, 1.5]) for head in rng.sample(heads, 20)}
    patches = [{"method": "zerotuning", "heads": gammas}, {"method": "head_scaling", "heads": scales}]
    return {"headpatch": 1, "patches": patches}


def extreme() -> dict[str, Any]:
    """Gammas that break formulas which subtract: 0 and next to 0 where the sink has nearly all the mass, and 100."""
    rng = random.Random(3)
    heads = [f"{la}.{h}" for la in range(LAYERS) for h in range(HEADS)]
    gammas = {head: rng.choice([0.0, 1e-4, 1e-2, 100.0]) for head in rng.sample(heads, 60)}
    return {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": gammas}]}


def _truth(naive: Any, inputs: Inputs, edits: Edits) -> Tensor:
    shared: Shared = naive._naive_shared
    shared.edits, shared.first = edits, inputs.first
    positions = (inputs.real.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return naive(**inputs.kwargs, position_ids=positions, use_cache=False).logits


def _generated(sequences: Tensor, prompt: Inputs) -> Inputs:
    ids = sequences[:, :-1]
    real = torch.nn.functional.pad(prompt.real, (0, ids.shape[1] - prompt.prompt), value=True)
    return Inputs({"input_ids": ids, "attention_mask": real.long()}, real, prompt.first, prompt.prompt)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("which", ["single", "padded"])
def test_prompt_and_64_tokens(
    model: Any, naive: Any, prompts: dict[str, Inputs], which: str, cache: str | None
) -> None:
    """Logits of the prompt and of every generated token are within 1e-3 of float64; removal restores every bit."""
    prompt, recipe = prompts[which], moderate()
    positions = (prompt.real.long().cumsum(-1) - 1).clamp_min(0)

    def prefill() -> Tensor:
        with torch.no_grad():
            return model(**prompt.kwargs, position_ids=positions).logits

    before = prefill()
    with headpatch.applied(model, recipe):
        first = prefill()
        made = model.generate(
            **prompt.kwargs, max_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True,
            cache_implementation=cache, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(before, prefill())
    inputs = _generated(made.sequences, prompt)
    truth = _truth(naive, inputs, edits_of([recipe], PARTS, "text"))
    n = prompt.prompt
    assert float((first - truth[:, :n])[prompt.real].abs().max()) < LIMIT
    steps = torch.stack(made.logits, dim=1)
    assert steps.shape[1] == 64
    assert float((steps - truth[:, n - 1 :]).abs().max()) < LIMIT
    # and the recipe matters: the untouched model is far away
    assert float((before - truth[:, :n])[prompt.real].abs().max()) > 1000 * LIMIT


def test_extreme_gammas(model: Any, naive: Any, prompts: dict[str, Inputs]) -> None:
    """gamma 0, 1e-4, 0.01 and 100 on real sinks, padded, float32: still within 1e-3."""
    prompt, recipe = prompts["padded"], extreme()
    positions = (prompt.real.long().cumsum(-1) - 1).clamp_min(0)
    with headpatch.applied(model, recipe), torch.no_grad():
        result = model(**prompt.kwargs, position_ids=positions).logits
    truth = _truth(naive, prompt, edits_of([recipe], PARTS, "text"))
    assert float((result - truth)[prompt.real].abs().max()) < LIMIT


def test_reference_is_the_model(model: Any, naive: Any, prompts: dict[str, Inputs]) -> None:
    """Without edits the reference is the untouched model, up to what float32 loses."""
    prompt = prompts["padded"]
    positions = (prompt.real.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        result = model(**prompt.kwargs, position_ids=positions).logits
    assert float((result - _truth(naive, prompt, {}))[prompt.real].abs().max()) < LIMIT / 2
