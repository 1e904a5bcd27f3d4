"""What the exactness tests share: recipes to try, models to try them on, ways to run them, and how close is close enough."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from reference import Edits, edits_of, reference
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from zoo import SOURCE, Entry, Inputs, chunk, output

import headpatch

Recipe = dict[str, Any]

FP64, FP32 = 1e-10, 1e-4
"""How far logits may be from the float64 reference. Logits of the zoo have a standard deviation of about 1.6. Untouched float32
models, and the naive edit in float32, are off by up to 2e-5 (test_reference.py checks that), so 1e-4 leaves a factor of five and is
still a thousandth of what a wrong edit does (the same file checks that, too). In float64 only the order of sums differs."""
FP64_EAGER = 2e-5
"""Most eager attention functions of transformers cast their softmax to float32, whatever the dtype of the model."""

CASES = (
    "uniform", "zero", "huge", "per_head", "scaling", "stacked", "two_handles", "two_zerotunings", "two_zerotuning_handles",
)  # fmt: skip
"""Recipes to try; :func:`recipes` says what each is."""


def recipes(entry: Entry, case: str, parts: Sequence[str] = (), seed: int = 0) -> list[Recipe]:
    """The recipes of a case, to be applied in this order, for the given parts (all by default).

    ``per_head``: one gamma per layer and head, log-uniform in [0.02, 100], with a 0, a 1 and a 100 among them. ``stacked``: both
    methods on the same heads in one recipe, scaling first, which must make no difference. ``two_zerotunings``: overlapping
    heads, so that gammas multiply on some.
    """
    rng = random.Random(f"{entry.name} {seed}")
    parts = list(parts or entry.parts)

    def gammas(part: str) -> Recipe:
        heads = [f"{la}.{h}" for la in entry.parts[part].modules for h in range(entry.parts[part].num_heads)]
        values = [math.exp(rng.uniform(math.log(0.02), math.log(100.0))) for _ in heads]
        for value in (0.0, 1.0, 100.0):
            values[rng.randrange(len(heads))] = value
        return {"method": "zerotuning", "part": part, "heads": dict(zip(heads, values, strict=True))}

    def scales(part: str) -> Recipe:
        heads = [f"{la}.{h}" for la in entry.parts[part].modules for h in range(entry.parts[part].num_heads)]
        chosen = rng.sample(heads, k=max(3, len(heads) // 2))
        values = [0.0, -1.5, *(rng.uniform(0.0, 2.0) for _ in chosen[2:])]
        return {"method": "head_scaling", "part": part, "heads": dict(zip(chosen, values, strict=True))}

    def uniform(part: str, gamma: float) -> Recipe:
        return {"method": "zerotuning", "part": part, "heads": ["*.*"], "gamma": gamma}

    def overlapping(part: str) -> list[Recipe]:
        last = entry.parts[part].num_heads - 1
        return [
            {"method": "zerotuning", "part": part, "heads": {"*.*": 5.0, "*.0": 0.3}},
            {"method": "zerotuning", "part": part, "heads": {f"*.0-{last - 1}": 0.2, f"*.{last - 1}": 0.0}},
        ]

    patches = {
        "uniform": [[uniform(p, 4.0) for p in parts]],
        "zero": [[uniform(p, 0.0) for p in parts]],
        "huge": [[uniform(p, 100.0) for p in parts]],
        "per_head": [[gammas(p) for p in parts]],
        "scaling": [[scales(p) for p in parts]],
        "stacked": [[patch for p in parts for patch in (scales(p), gammas(p))]],
        "two_handles": [[scales(p) for p in parts], [gammas(p) for p in parts]],
        "two_zerotunings": [[patch for p in parts for patch in overlapping(p)]],
        "two_zerotuning_handles": [[overlapping(p)[0] for p in parts], [overlapping(p)[1] for p in parts]],
    }[case]
    for group in patches:
        for patch in group:
            if patch["part"] == entry.main:
                del patch["part"]  # the default
    return [{"headpatch": 1, "patches": group} for group in patches]


def edits_for(entry: Entry, applied: Sequence[Recipe]) -> Edits:
    """What these recipes mean, spelled out by the reference."""
    return edits_of(applied, entry.parts, entry.main)


_MODELS: dict[tuple[str, torch.dtype, str], Any] = {}


@contextlib.contextmanager
def patched(entry: Entry, dtype: torch.dtype, attn: str, applied: Sequence[Recipe]) -> Iterator[Any]:
    """A zoo model under these recipes; they come off afterwards. Models are shared by tests, unless one failed on them."""
    key = (entry.name, dtype, attn)
    model = _MODELS.pop(key, None) or entry.build(dtype, attn)
    handles = [headpatch.apply(model, recipe) for recipe in applied]
    yield model
    for handle in handles:
        handle.remove()
    _MODELS[key] = model


def tolerance(entry: Entry, dtype: torch.dtype, attn: str) -> float:
    """Largest allowed difference of a logit to the float64 reference."""
    if dtype == torch.float64:
        return FP64 if attn == "sdpa" or entry.exact64 else FP64_EAGER
    return FP32


def usable(entry: Entry, dtype: torch.dtype, attn: str, padding_side: str | None) -> bool:
    """Whether the *untouched* model gives finite numbers there.

    In float64, eager functions that cast the softmax to float32 turn a mask of ``finfo(float64).min`` into -inf: rows of padding
    become NaN and poison the rest.
    """
    return not (dtype == torch.float64 and attn == "eager" and not entry.exact64 and padding_side)


def close(actual: Tensor, expected: Tensor, inputs: Inputs, limit: float) -> None:
    """Compare outputs [b, n, V] where tokens are real."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double())[inputs.real].abs()
    assert difference.isfinite().all(), "not finite"
    assert difference.max() <= limit, f"off by {float(difference.max()):.3g}, allowed {limit:.3g}"


def spread(difference: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Root mean square, and largest, of a difference [b, n, V] over real tokens."""
    real = difference.double()[inputs.real]
    assert real.isfinite().all(), "not finite"
    return float(real.square().mean().sqrt()), float(real.abs().max())


def close_in_bf16(
    patched_: Tensor, plain: Tensor, entry: Entry, inputs: Inputs, applied: Sequence[Recipe], attn: str
) -> None:
    """The patched bfloat16 model is no further from float64 than the untouched one is, or the naive edit in bfloat16.

    An edit can make a network more sensitive to rounding (gamma 100 raises one value to nearly the whole output), which is not
    the adapter's doing; hence the naive edit as second yardstick. Bounds: 1.5 in root mean square; 2.5 in the maximum, which is
    one draw from the tail. What the recipe does must be well above them, or the comparison would mean nothing.

    Parameters
    ----------
    patched_, plain
        Outputs [b, n, V] of the patched and of the untouched bfloat16 model on `inputs`.
    """
    edits = edits_for(entry, applied)
    truth, naive = reference(entry, torch.bfloat16), reference(entry, torch.bfloat16, torch.bfloat16)
    rounded = inputs.to(torch.bfloat16).to(torch.float64)  # images and sounds in bfloat16 too, for everybody
    exact_plain, exact_edited = truth(rounded, base=attn), truth(rounded, edits, base=attn)
    yardsticks = (
        spread(plain.double() - exact_plain, inputs),
        spread(naive(inputs, edits, base=attn).double() - exact_edited, inputs),
    )
    mine = spread(patched_.double() - exact_edited, inputs)
    mean, largest = (max(values) for values in zip(*yardsticks, strict=True))
    assert mine[0] <= 1.5 * mean + 1e-3, (mine, yardsticks)
    assert mine[1] <= 2.5 * largest + 1e-3, (mine, yardsticks)
    assert spread(exact_edited - exact_plain, inputs)[0] > 3 * mean, "the recipe is lost in rounding"


def expected(entry: Entry, inputs: Inputs, applied: Sequence[Recipe], attn: str, **kwargs: Any) -> Tensor:
    """What the float64 reference says."""
    return reference(entry)(inputs, edits_for(entry, applied), base=attn, **kwargs)


def forward(model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
    """One forward over everything, without gradients."""
    with torch.no_grad():
        return output(model(**inputs.to(model.dtype).kwargs, **kwargs))


CACHES = ("default", "dynamic", "dynamic_config", "static")


def make_cache(model: Any, kind: str, length: int) -> Any:
    """A fresh cache: what the model makes itself, a DynamicCache that knows nothing of windows, one that does, a StaticCache."""
    if kind == "default":
        return None
    config = model.config.get_text_config(decoder=True)

    def one(size: int) -> Any:
        if kind == "static":
            return StaticCache(config=config, max_cache_len=size)
        return DynamicCache(config=config) if kind == "dynamic_config" else DynamicCache()

    return EncoderDecoderCache(one(length), one(SOURCE)) if model.config.is_encoder_decoder else one(length)


def run_cached(model: Any, entry: Entry, inputs: Inputs, sizes: Sequence[int], cache: Any) -> Tensor:
    """Feed everything in pieces of these sizes through a cache; outputs of all pieces together."""
    given = inputs.to(model.dtype).kwargs
    pieces, start = [], 0
    for size in sizes:
        with torch.no_grad():
            outputs = model(**chunk(entry, given, start, start + size), past_key_values=cache, use_cache=True)
        cache, start = outputs.past_key_values, start + size
        pieces.append(output(outputs))
        if model.config.is_encoder_decoder:
            given = {k: v for k, v in given.items() if k not in ("input_features", "input_ids")}
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state)
    assert start == inputs.real.shape[1]
    return torch.cat(pieces, dim=1)


def decode_sizes(inputs: Inputs) -> list[int]:
    """The prompt in one go, then token by token."""
    return [inputs.prompt] + [1] * (inputs.real.shape[1] - inputs.prompt)
