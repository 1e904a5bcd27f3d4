"""Learned tasks as recipes: the patch, and the safetensors file with a vector for each head that it names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headpatch.errors import HeadpatchError
from headpatch.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.heads import ModelShape

__all__ = ["injection_recipe", "vector_recipe"]

HALF = 6e4
"""What half precision holds."""


def injection_recipe(
    shape: ModelShape, alpha: Sequence[Tensor], vectors: Sequence[Tensor], *, threshold: float = 0.01, name: str | None = None,
    **more: Any,
) -> Recipe:  # fmt: skip
    """A soft injection as a recipe.

    Parameters
    ----------
    shape
        Of the model.
    alpha, vectors
        Per layer, [H] and [H, d].
    threshold
        Heads with a smaller alpha are left out, with their vectors; their part in the result is small, and so the file gets.
    name, more
        Keys of the recipe: description, provenance; ``model_name`` for the model's.

    Raises
    ------
    HeadpatchError
        No head reaches the threshold.
    """
    heads, arrays = {}, {}
    for layer, (a, t) in enumerate(zip(alpha, vectors, strict=True)):
        for h, value in enumerate(a.tolist()):
            if value >= threshold:
                heads[f"{layer}.{h}"] = round(value, 6)
                arrays[f"t.{layer}.{h}"] = t[h]
    if not heads:
        raise HeadpatchError(f"no head takes as much as {threshold:g} of its vector: nothing was learned")
    return _recipe(shape, {"method": "soft_injection", "heads": heads}, arrays, name, more)


def vector_recipe(
    shape: ModelShape, layer: int, values: Tensor, *, scale: float = 1.0, name: str | None = None, **more: Any
) -> Recipe:  # fmt: skip
    """A function vector as a recipe: `values` [H, d] of :func:`headpatch.tune.function_vector.HeadWriter`, added in `layer`."""
    heads = dict.fromkeys((f"{layer}.{h}" for h in range(len(values))), scale)
    arrays = {f"v.{head}": values[h] for h, head in enumerate(heads)}
    return _recipe(shape, {"method": "function_vector", "heads": heads}, arrays, name, more, torch.float32)


def _recipe(
    shape: ModelShape, patch: Mapping[str, Any], arrays: Mapping[str, Tensor], name: str | None, more: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Recipe:  # fmt: skip
    import safetensors.torch

    large = max(float(array.abs().max()) for array in arrays.values()) > HALF
    dtype = torch.float32 if large else dtype
    data = safetensors.torch.save({key: array.detach().cpu().to(dtype).contiguous() for key, array in arrays.items()})
    more = dict(more)
    model_name = more.pop("model_name", None)
    stem = (name or "task").rpartition("/")[2]
    recipe: dict[str, Any] = {"headpatch": 1}
    recipe |= {key: value for key, value in {"name": name, **more}.items() if value is not None}
    recipe |= {
        "model": shape.to_block(model_name or shape.name),
        "patches": [dict(patch)],
        "tensors": {"file": f"{stem}.safetensors", "sha256": hashlib.sha256(data).hexdigest()},
    }
    return Recipe.from_dict(recipe, arrays=data)
