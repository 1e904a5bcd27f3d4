"""Which attention modules a cache policy can be applied to.

What a cache of head groups returns is no tensor, so an attention module must hand it on to the attention function untouched. That
is read from its source: between ``key, value = cache.update(key, value, ...)`` and the call of the attention function, neither
name may be used. And the layer must keep all of its tokens in the cache: a layer with a window of its own is bounded already, and
is left as it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from headpatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.discover import Attention, Layout

__all__ = ["FEATURES", "kv_features", "windowed_layers", "windowed_parts"]

FEATURES = {
    "no_kv_cache": "it has no key-value cache of its own",
    "keys_after_update": "its attention touches keys or values between the cache and the attention function",
    "other_cache_layer": "its cache layers are of a kind that holds more than keys and values",
}
"""What rules a cache policy out, beside what rules out every edit."""


def kv_features(where: Attention) -> tuple[str, ...]:
    """Names from :data:`FEATURES` that hold for one attention module."""
    if where.part not in ("text", "decoder"):
        return ("no_kv_cache",)
    cls: Any = type(where.module)
    found, without = _uses(cls)
    if found is None:
        return ("no_kv_cache",) if without else ("keys_after_update",)
    # A use inside `if ... and self.option` counts only where the option is on.
    if any(all(getattr(where.module, name, True) for name in names) for names in found):
        return ("keys_after_update",)
    kind = _kind(where)
    return () if kind in ("full", "window") else (kind,)


def windowed_layers(attention: Any) -> set[int]:
    """Layers, of these attention modules, that have a window of their own."""
    return {where.layer for where in attention if _kind(where) == "window"}


def windowed_parts(layout: Layout) -> dict[str, tuple[int, ...]]:
    """:func:`windowed_layers` of each part that has a cache."""
    parts = {part for part, _ in layout.attention if part in ("text", "decoder")}
    return {
        part: tuple(sorted(windowed_layers(w for (p, _), w in layout.attention.items() if p == part)))
        for part in sorted(parts)
    }


def _kind(where: Attention) -> str:
    """``full``, ``window``, or what rules a policy out."""
    index = getattr(where.module, "layer_idx", None)
    kinds = _cache_kinds(where.stack)
    if not isinstance(index, int) or index >= len(kinds):
        return "no_kv_cache"  # shares another layer's keys
    return kinds[index]


def _cache_kinds(stack: Any) -> list[str]:
    try:
        layers = DynamicCache(config=stack.config).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"transformers makes no cache for a {type(stack).__name__}: {error}") from error
    return [
        "window" if getattr(layer, "is_sliding", False) and isinstance(layer, DynamicLayer)
        else ("full" if type(layer) is DynamicLayer else "other_cache_layer")
        for layer in layers
    ]  # fmt: skip


@lru_cache(maxsize=256)
def _uses(cls: Any) -> tuple[tuple[tuple[str, ...], ...] | None, bool]:
    """Uses of what the cache returned other than as arguments of the attention function.

    Returns
    -------
    (uses, without)
        Per use, the options of the module that must all be on for it to run; None where the source does not follow the pattern:
        then `without` says whether that is because it updates no cache at all.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return None, False
    updates = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"
    ]  # fmt: skip
    if not updates:
        return None, True
    stored = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and node.value in updates and _two_names(node) is not None
    ]  # fmt: skip
    names = {_two_names(node) for node in stored}
    if len(updates) != len(stored) or len(names) != 1:
        return None, False
    pair = names.pop()
    assert pair is not None
    last = max(node.end_lineno or node.lineno for node in stored)
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and [getattr(a, "id", None) for a in node.args[2:4]] == list(pair)
        and isinstance(node.func, ast.Name) and node.func.id in _interfaces(tree)
    ]  # fmt: skip
    if not calls:
        return None, False
    handed = {id(a) for call in calls for a in call.args[2:4]}
    found: list[tuple[str, ...]] = []
    _collect(tree, (), set(pair), last, handed, found)
    return tuple(found), False


def _two_names(node: ast.Assign) -> tuple[str, str] | None:
    target = node.targets[0]
    if len(node.targets) == 1 and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        first, second = target.elts
        if isinstance(first, ast.Name) and isinstance(second, ast.Name):
            return first.id, second.id
    return None


def _interfaces(tree: ast.AST) -> set[str]:
    """Names that hold the attention function."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        and any(getattr(n, "id", "") == "ALL_ATTENTION_FUNCTIONS" for n in ast.walk(node.value))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }  # fmt: skip


def _collect(
    node: ast.AST, options: tuple[str, ...], names: set[str], after: int, handed: set[int], found: list[tuple[str, ...]]
) -> None:  # fmt: skip
    """Uses of `names` below line `after` that are not arguments of the attention function, with the options that guard them."""
    if isinstance(node, ast.Name) and node.id in names and node.lineno > after and id(node) not in handed:
        found.append(options)
    if isinstance(node, ast.If):
        _collect(node.test, options, names, after, handed, found)
        parts = (
            node.test.values
            if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
            else [node.test]
        )
        mine = tuple(
            p.attr for p in parts
            if isinstance(p, ast.Attribute) and isinstance(p.value, ast.Name) and p.value.id == "self"
        )  # fmt: skip
        for statement in node.body:
            _collect(statement, (*options, *mine), names, after, handed, found)
        for statement in node.orelse:
            _collect(statement, options, names, after, handed, found)
        return
    for child in ast.iter_child_nodes(node):
        _collect(child, options, names, after, handed, found)
