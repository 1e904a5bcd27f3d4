"""Exactness under unusual inputs: packed rows, 4D masks, embeddings, positional arguments, base models, continuous batching."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact import close, expected, forward, patched, recipes, tolerance, usable
from reference import reference
from test_exactness import BASES, LENGTHS, one_thread
from torch import Tensor
from zoo import BOS, IMAGE, PAD, ZOO, Entry, Inputs

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

PACKING = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3")
"""Architectures that notice restarting position ids and mask the segments of a row from each other."""
ANY_MASK = (
    "llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "mistral", "gemma2", "gemma3", "opt", "gpt_oss", "deepseek_v3",
)  # fmt: skip
"""Architectures that take a 4D mask as it is."""


def _bases(names: tuple[str, ...]) -> list[Any]:
    return [p for p in BASES if p.values[0].name in names]


def packed(entry: Entry, rows: list[list[int]]) -> Inputs:
    """Several sequences in each row, told apart by position ids only; the first token differs between the queries of a row."""
    width = sum(rows[0])
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(2, IMAGE, (len(rows), width), generator=g)
    positions, first = torch.zeros_like(ids), torch.zeros_like(ids)
    for r, lengths in enumerate(rows):
        assert sum(lengths) == width
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        for start, stop in pairwise(bounds):
            ids[r, start] = BOS
            positions[r, start:stop] = torch.arange(stop - start)
            first[r, start:stop] = start
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": None, "use_cache": False}
    return Inputs(given, torch.ones_like(ids, dtype=torch.bool), {"text": first}, width)


def block_mask(inputs: Inputs) -> Tensor:
    """[b, 1, q, n] bool causal mask inside the segments of packed rows."""
    first = inputs.first["text"]
    same = first[:, :, None] == first[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The float form that eager attention wants."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rows", [[[9, 5, 11]], [[9, 5, 11], [3, 12, 10]]], ids=["one_row", "two_rows"])
@pytest.mark.parametrize(("entry", "attn"), _bases(PACKING))
def test_packed_rows(entry: Entry, attn: str, rows: list[list[int]], dtype: torch.dtype) -> None:
    """Every sequence of a packed row has its own first token, and the result is that of each sequence on its own."""
    if not usable(entry, dtype, attn, None):
        pytest.skip("the untouched model is not finite here")
    inputs, applied = packed(entry, rows), recipes(entry, "stacked", seed=11)
    with patched(entry, dtype, attn, applied) as model:
        result = forward(model, inputs)
        close(result, expected(entry, inputs, applied, attn), inputs, tolerance(entry, dtype, attn))
        length = rows[0][0]
        alone = forward(model, _cut(inputs, rows[0][0], rows[0][0] + rows[0][1]))
    torch.testing.assert_close(result[:1, length : length + rows[0][1]], alone, rtol=0, atol=1e-4)


def _cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    """One sequence of the first packed row, on its own."""
    cut = {k: v[:1, start:stop] if torch.is_tensor(v) else v for k, v in inputs.kwargs.items()}
    first = {"text": torch.zeros(1, dtype=torch.long)}
    return Inputs(cut, inputs.real[:1, start:stop], first, stop - start)


@pytest.mark.parametrize("entry", [pytest.param(ZOO[n], id=n) for n in PACKING])
def test_packing_is_noticed(entry: Entry) -> None:
    """The reference itself: the untouched packed forward is each sequence on its own, so the test above tests packing."""
    inputs = packed(entry, [[9, 5, 11]])
    whole = reference(entry)(inputs, base=entry.attn[0])
    alone = reference(entry)(_cut(inputs, 9, 14), base=entry.attn[0])
    torch.testing.assert_close(whole[:, 9:14], alone, rtol=0, atol=1e-5)  # positions are float32 in rotary embeddings


@pytest.mark.parametrize("rows", [[[9, 5, 11]], [[9, 5, 11], [3, 12, 10]]], ids=["one_row", "two_rows"])
@pytest.mark.parametrize("form", ["bool", "float", "bias"])
@pytest.mark.parametrize(("entry", "attn"), _bases(ANY_MASK))
def test_custom_4d_mask(entry: Entry, attn: str, form: str, rows: list[list[int]]) -> None:
    """A caller's own [b, 1, q, n] mask, with blocks; bool, additive, and additive with finite biases on top."""
    if attn == "eager" and form == "bool":
        pytest.skip("eager attention adds its mask")
    inputs, applied = packed(entry, rows), recipes(entry, "stacked", seed=12)
    mask = block_mask(inputs)
    if form != "bool":
        g = torch.Generator().manual_seed(6)
        bias = torch.randn(mask.shape, generator=g) if form == "bias" else 0.0
        mask = additive(mask, torch.float32) + torch.where(mask, bias, torch.zeros(()))
    inputs = replace(inputs, kwargs={**inputs.kwargs, "attention_mask": mask})
    with patched(entry, torch.float32, attn, applied) as model:
        close(forward(model, inputs), expected(entry, inputs, applied, attn), inputs, 1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_as_4d_mask(name: str, attn: str) -> None:
    """Left padding given as a causal 4D mask, through a cache as well."""
    entry = ZOO[name]
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side="left", continuation=3)
    n = inputs.real.shape[1]
    eye = torch.eye(n, dtype=torch.bool)
    square = ((inputs.real[:, None, :] & torch.ones(n, n, dtype=torch.bool).tril()) | eye)[:, None]
    full = square if attn == "sdpa" else additive(square, torch.float32)
    applied = recipes(entry, "per_head", seed=13)
    truth = expected(entry, inputs, applied, attn)
    with patched(entry, torch.float32, attn, applied) as model, torch.no_grad():
        close(forward(model, replace(inputs, kwargs={**inputs.kwargs, "attention_mask": full})), truth, inputs, 1e-4)
        cache, pieces, start = None, [], 0
        for size in (inputs.prompt, 1, 1, 1):
            stop = start + size
            made = model(
                input_ids=inputs.kwargs["input_ids"][:, start:stop], attention_mask=full[:, :, start:stop, :stop],
                position_ids=inputs.kwargs["position_ids"][:, start:stop], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, start = made.past_key_values, stop
            pieces.append(made.logits)
    close(torch.cat(pieces, dim=1), truth, inputs, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gpt_oss"])
def test_ways_to_call(name: str) -> None:
    """Positional arguments, embeddings instead of ids, and the base model called on its own."""
    entry = ZOO[name]
    attn = entry.attn[0]
    inputs = entry.make_inputs(lengths=LENGTHS, padding_side="left")
    applied = recipes(entry, "per_head", seed=14)
    truth = expected(entry, inputs, applied, attn)
    ids, mask, positions = (inputs.kwargs[k] for k in ("input_ids", "attention_mask", "position_ids"))
    with patched(entry, torch.float32, attn, applied) as model, torch.no_grad():
        if name != "gpt2":  # whose second positional argument is the cache
            close(model(ids, mask, position_ids=positions).logits, truth, inputs, 1e-4)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        logits = model.lm_head(hidden)
        if name == "gemma2":
            cap = model.config.final_logit_softcapping
            logits = torch.tanh(logits / cap) * cap
        close(logits, truth, inputs, 1e-4)
        embeds = model.get_input_embeddings()(ids)
        close(model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits, truth, inputs, 1e-4)
        close(model(input_ids=ids, attention_mask=mask.bool(), position_ids=positions).logits, truth, inputs, 1e-4)


@pytest.mark.parametrize(("entry", "attn"), _bases(("llama", "mistral", "gpt2", "vit")))
def test_rows_do_not_matter_to_each_other(entry: Entry, attn: str) -> None:
    """A row gets the same numbers alone and in company."""
    inputs = entry.make_inputs(batch=3, lengths=[12, 12, 12])
    with patched(entry, torch.float32, attn, recipes(entry, "stacked")) as model:
        together = forward(model, inputs)
        for row in range(3):
            cut = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in inputs.kwargs.items()}
            alone = forward(model, replace(inputs, kwargs=cut))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("entry", "attn"), _bases(("llama", "gemma2", "gpt_oss", "gpt2")))
def test_one_token(entry: Entry, attn: str) -> None:
    """A sequence of one token sees only itself: every gamma, 0 included, leaves it as it is.

    Except where a learned sink logit shares the row: there the first token's share does change.
    """
    inputs = entry.make_inputs(batch=2, lengths=[1, 1])
    for case in ("zero", "huge", "per_head"):
        applied = recipes(entry, case)
        with patched(entry, torch.float32, attn, applied) as model:
            result = forward(model, inputs)
        close(result, expected(entry, inputs, applied, attn), inputs, 1e-4)
        if entry.name != "gpt_oss":
            close(result, reference(entry)(inputs, base=attn), inputs, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_continuous_batching(name: str) -> None:
    """generate_batch() keeps keys in pages and packs requests: the same tokens as the reference chooses for each prompt."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    entry = ZOO[name]
    applied = recipes(entry, "huge")
    g = torch.Generator().manual_seed(8)
    prompts = [[BOS, *torch.randint(2, IMAGE, (n,), generator=g).tolist()] for n in (12, 5, 9)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    # Left to itself, the paged cache takes all the memory there is.
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=24, max_batch_tokens=64)
    with patched(entry, torch.float32, "sdpa", applied) as model:
        made = model.generate_batch(
            [list(p) for p in prompts], generation_config=config, continuous_batching_config=pages, progress_bar=False
        )
    by_prompt = {tuple(r.prompt_ids): list(r.generated_tokens) for r in made.values()}
    differs = False
    for prompt in prompts:
        chosen, plain = list(prompt), list(prompt)
        for _ in range(6):
            for tokens, recipe in ((chosen, applied), (plain, [])):
                inputs = Inputs(
                    {"input_ids": torch.tensor([tokens])}, torch.ones(1, len(tokens), dtype=torch.bool),
                    {"text": torch.zeros(1, dtype=torch.long)}, len(tokens),
                )  # fmt: skip
                tokens.append(int(expected(entry, inputs, recipe, "sdpa")[0, -1].argmax()))
        assert by_prompt[tuple(prompt)] == chosen[len(prompt) :]
        differs |= plain != chosen
    assert differs, "the recipe changes no token here"
