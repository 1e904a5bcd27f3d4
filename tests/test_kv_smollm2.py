"""A trained model under duo_attention: SmolLM2-135M-Instruct in float32 against a mask per head written out in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_smollm2 import HEADS, KV_HEADS, LAYERS, folder, model  # noqa: F401  (fixtures)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask

import headpatch

pytestmark = pytest.mark.slow
NAME = "naive_kv_windows"
SINK, RECENT, NEW = 4, 24, 48
TEXT = "Explain why bread rises to a child of eight who likes trains. Then name three kinds of bread, and a town for each of them."


def masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
) -> Any:
    """Whole softmax rows of one call over everything; streaming heads lose what lies between sinks and window."""
    groups, n = query.shape[1] // key.shape[1], key.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    at = torch.arange(n)
    causal = at <= at[:, None]
    window = causal & ((at < SINK) | (at > at[:, None] - RECENT))
    seen = torch.stack([causal if h // groups in module.full else window for h in range(query.shape[1])])
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (p @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@pytest.fixture(scope="module")
def heads() -> dict[int, tuple[int, ...]]:
    """A third of the KV heads keep everything."""
    chosen = random.Random(0).sample([(n, h) for n in range(LAYERS) for h in range(KV_HEADS)], LAYERS)
    return {n: tuple(sorted(h for layer, h in chosen if layer == n)) for n in range(LAYERS)}


@pytest.fixture(scope="module")
def prompt(folder: Any) -> Tensor:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": TEXT}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def recipe(heads: dict[int, tuple[int, ...]], recent: int) -> dict[str, Any]:
    listed = [f"{n}.{h}" for n, some in heads.items() for h in some]
    patch = {"method": "duo_attention", "full_kv_heads": listed, "sink": SINK, "recent": recent}
    return {"headpatch": 1, "patches": [patch]}


def generate(model: Any, prompt: Tensor, **more: Any) -> Any:  # noqa: F811
    return model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 17}], ids=str)
def test_generation_equals_the_mask(folder, model, heads, prompt, more):  # noqa: F811
    """Logits of every generated token, with the text of another policy's model nowhere near them."""
    assert HEADS // KV_HEADS == 3
    with headpatch.applied(model, recipe(heads, RECENT)) as handle:
        made = generate(model, prompt, **more)
        assert handle.report().fires
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    for parameter in naive.parameters():
        parameter.data = parameter.data.double()
    for n, layer in enumerate(naive.model.layers):
        layer.self_attn.full = heads[n]
    with torch.no_grad():
        expected = naive(made.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    found = torch.stack(made.logits, 1).double()
    assert (found - expected).abs().max() < 1e-3
    best = expected.topk(2, -1).values
    sure = best[..., 0] - best[..., 1] > 2e-4
    assert torch.equal(made.sequences[:, prompt.shape[1] :][sure], expected.argmax(-1)[sure])


def test_nothing_changes_within_the_window(model, heads, prompt):  # noqa: F811
    """T <= sink + recent: at most 1e-4 in logits, and the same tokens."""
    plain = generate(model, prompt)
    with headpatch.applied(model, recipe(heads, prompt.shape[1] + NEW)):
        found = generate(model, prompt)
    assert torch.equal(found.sequences, plain.sequences)
    assert (torch.stack(found.logits) - torch.stack(plain.logits)).abs().max() <= 1e-4
    with headpatch.applied(model, recipe(heads, RECENT)):
        assert not torch.equal(generate(model, prompt).sequences, plain.sequences)
