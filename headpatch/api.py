"""The public verbs: apply, applied, by_row, handles, observe, list_methods. They find the engine's adapter and hand over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.registry import Handle, find_adapter, get_method, method_names
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["applied", "apply", "by_row", "handles", "list_methods", "observe"]


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


@contextlib.contextmanager
def by_row(rows: Sequence[Handle | None]) -> Iterator[None]:
    """Keep each handle's recipe to its own rows of the batches inside the with block: one task per row, for example.

    Parameters
    ----------
    rows
        One entry per row of the batch: the handle whose recipe acts on that row, or None. A handle may stand in several rows.
        Handles that are on the model and stand in none act on all rows, as ever.

    Raises
    ------
    HeadpatchError
        A recipe edits more than head outputs, or its engine takes recipes with each request instead.

    Examples
    --------
    >>> capital, plural = (headpatch.apply(model, recipe) for recipe in ("capital.yaml", "plural.yaml"))
    >>> with headpatch.by_row([capital, plural, capital, None]):
    ...     model.generate(**batch_of_four)
    """
    mine: list[Handle] = []
    for handle in rows:
        if handle is not None and handle not in mine:
            mine.append(handle)
    if not mine:
        raise HeadpatchError("by_row: no row has a handle; give one entry per row, as in [capital, None]")
    with contextlib.ExitStack() as stack:
        for handle in mine:
            stack.enter_context(handle.inputs(rows=[other is not None and other == handle for other in rows]))
        yield


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
        Names from :data:`headpatch.operands.OPERANDS`; ``output``: head outputs [b, q, d] before the output projection; ``weights``:
        attention of single queries [b, asked queries, n], as recipes on the model leave it (of no more than these queries, ever).
    heads
        A selector (``"3.*"``) or a list of selectors.
    options
        What an operand needs: ``window=`` for window_scores, ``queries=`` for weights (positions in the call, negative from its end;
        default the last), ``part=`` for another attention stack.

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
