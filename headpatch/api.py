"""The public verbs: apply, applied, handles, observe, list_methods. They find the engine's adapter and hand over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from headpatch.registry import Handle, find_adapter, get_method, method_names
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["applied", "apply", "handles", "list_methods", "observe"]


def apply(model: Any, recipe: Recipe | dict[str, Any] | str) -> Handle:
    """Patch the heads that `recipe` names in `model`: all of them, or none and an error.

    Parameters
    ----------
    model
        A model of a supported engine, or an object that contains one: a transformers model, pipeline, PeftModel or compiled
        module.
    recipe
        Anything that :func:`headpatch.load_recipe` takes: a path, a shipped name, ``hf://owner/repo``, a dict, a Recipe.

    Returns
    -------
    Handle
        ``remove()`` takes the patch off, ``report()`` says what was patched and whether it fires. Handles stack; they may come
        off in any order.

    Raises
    ------
    RecipeError
        The recipe is wrong or does not fit the model; the message names file, key and remedy.
    UnsupportedModelError
        The model cannot do exactly what the recipe asks; the message names the operand and the layer.
    HeadpatchError
        The model is running, or patched by another thread.
    """
    return find_adapter(model).apply(model, load_recipe(recipe))


@contextlib.contextmanager
def applied(model: Any, recipe: Recipe | dict[str, Any] | str) -> Iterator[Handle]:
    """:func:`apply` for the length of a with block; the patch comes off however the block ends."""
    handle = apply(model, recipe)
    try:
        yield handle
    finally:
        handle.remove()


def handles(model: Any) -> list[Handle]:
    """Handles that are on `model`, oldest first. A copy of a patched model has handles of its own."""
    return find_adapter(model).handles(model)


def observe(model: Any, operands: Iterable[str] | str, heads: Any = "*.*", **options: Any) -> Any:
    """Record operands of chosen heads while the model runs; nothing is changed.

    Parameters
    ----------
    model
        As for :func:`apply`.
    operands
        Names from :data:`headpatch.operands.OPERANDS`, and ``output``: head outputs [b, q, d] before the output projection.
    heads
        A selector (``"3.*"``) or a list of selectors.
    options
        What an operand needs: ``window=`` for window_scores, ``part=`` for another attention stack.

    Returns
    -------
    context manager
        Yields a mapping ``(operand, "layer.head") -> list of tensors``, one per forward call, on the CPU... see the adapter.

    Examples
    --------
    >>> with headpatch.observe(model, "output", ["3.1", "5.*"]) as seen:
    ...     model(**inputs)
    >>> seen["output", "3.1"][0].shape   # [b, q, d]
    """
    names = (operands,) if isinstance(operands, str) else tuple(operands)
    return find_adapter(model).observe(model, names, heads, **options)


def list_methods() -> dict[str, str]:
    """Names of all methods that recipes can use, with the first line of their documentation."""
    return {name: (get_method(name).__doc__ or "").strip().splitlines()[0] for name in method_names()}
