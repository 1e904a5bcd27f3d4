"""Finding methods and adapters by name.

Methods and adapters register through entry points, headpatch's own among them, so third parties add theirs the same way::

    [options.entry_points]
    headpatch.methods =
        my_method = my_package.my_method:MyMethod
    headpatch.adapters =
        my_engine = my_package.my_engine:ADAPTER

or, inside one process, with :func:`register_method` used as a class decorator. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from headpatch.errors import HeadpatchError, UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.methods.base import Method
    from headpatch.operands import Supply
    from headpatch.recipe import Recipe

__all__ = ["Adapter", "Handle", "adapters", "closest", "find_adapter", "get_method", "method_names", "register_method"]

METHODS_GROUP = "headpatch.methods"
ADAPTERS_GROUP = "headpatch.adapters"

M = TypeVar("M", bound="type[Method]")


class Handle(Protocol):
    """A recipe that is applied to one model."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""

    def remove(self) -> None:
        """Take the patch off; the model is bit for bit as before. A second call does nothing."""

    def report(self) -> Any:
        """What was patched, and whether it fires."""

    @property
    def inputs(self) -> Callable[..., Any]:
        """Called with data for the next calls, one entry per row; returns a context manager."""


class Adapter(Protocol):
    """One engine. Registered as an instance under the entry-point group ``headpatch.adapters``."""

    name: str

    def matches(self, obj: object) -> bool:
        """Whether `obj` is, or contains, a model (or a config) of this engine. Decided on type names, without imports."""

    def shape(self, obj: object) -> ModelShape:
        """Heads of the model or config, for recipes to be checked against. Raises UnsupportedModelError."""

    def supplies(self) -> dict[str, Supply]:
        """What this adapter supplies, by operand name."""

    def apply(self, obj: object, recipe: Recipe) -> Handle:
        """Patch `obj`; all of the recipe, or an error and nothing."""

    def handles(self, obj: object) -> list[Handle]:
        """Handles that are on `obj`, oldest first."""

    def observe(self, obj: object, operands: Iterable[str], heads: object) -> Any:
        """Context manager that records operands, read-only."""


_methods: dict[str, type[Method]] = {}
_adapters: dict[str, Adapter] = {}


def register_method(cls: M) -> M:
    """Make a method class known in this process; usable as a decorator. Entry points do the same across processes.

    Raises
    ------
    TypeError
        The class breaks the contract of :mod:`headpatch.methods.base`.
    HeadpatchError
        Another class has that name.
    """
    cls.check()
    known = _methods.get(cls.name)
    if known is None and cls.name in _entry_points(METHODS_GROUP):
        known = get_method(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise HeadpatchError(f"method name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}")
    _methods[cls.name] = cls
    return cls


def get_method(name: str) -> type[Method]:
    """The class registered under `name`; a KeyError where there is none."""
    if name not in _methods:
        cls = _entry_points(METHODS_GROUP)[name].load()
        cls.check()
        if cls.name != name:
            raise HeadpatchError(f"entry point {name!r} loads a method that calls itself {cls.name!r}")
        _methods[name] = cls
    return _methods[name]


def method_names() -> list[str]:
    """Names of all methods that recipes can use, sorted."""
    return sorted(_methods.keys() | _entry_points(METHODS_GROUP).keys())


def adapters() -> list[Adapter]:
    """All adapters, in alphabetical order of their names. Importing one does not import its engine."""
    for name, entry in _entry_points(ADAPTERS_GROUP).items():
        if name not in _adapters:
            _adapters[name] = entry.load()
    return [_adapters[name] for name in sorted(_adapters)]


def find_adapter(obj: object) -> Adapter:
    """The adapter that matches `obj`; UnsupportedModelError where none does."""
    for adapter in adapters():
        if adapter.matches(obj):
            return adapter
    raise UnsupportedModelError(
        f"no engine of headpatch's knows what to do with a {type(obj).__module__}.{type(obj).__qualname__}; "
        f"give a model of: {', '.join(a.name for a in adapters()) or 'none (is headpatch installed?)'}"
    )


def closest(name: str, names: Iterable[str], most: int = 40) -> str:
    """'did you mean ...' for an unknown name, or the list of known ones, at most so many."""
    names = sorted(map(str, names))
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"known: {', '.join(names[:most]) or 'none'}{more}"


def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}
