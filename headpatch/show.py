"""Words for people: values, types and key paths for error messages, shortened, with nothing in them that could upset a terminal;
and the parameters of methods for tables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from headpatch.methods.base import Method

__all__ = ["describe", "key_path", "kind_of", "parameter_words", "short"]

_KINDS = {
    bool: "boolean", int: "number", float: "number", str: "string", list: "list", tuple: "list", dict: "mapping",
    type(None): "null",
}  # fmt: skip


def kind_of(value: object) -> str:
    """What a value is, in the words of YAML: ``boolean``, ``number``, ``mapping``; other types by their own name."""
    return _KINDS.get(type(value), type(value).__name__)


def describe(value: object) -> str:
    """A value with what it is: ``the number 3``, ``the boolean true``, ``a mapping``, ``null``."""
    if value is None:
        return "null"
    return f"the {kind_of(value)} {short(value)}" if isinstance(value, str | int | float) else f"a {kind_of(value)}"


def short(value: object, limit: int = 60) -> str:
    """A value as it can stand in a message: escaped, on one line, of at most `limit` characters."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and value.bit_length() > 8 * limit:
        return "a very long number"  # Python refuses to write out integers of thousands of digits
    if isinstance(value, str):
        value = value[: limit + 1]
    elif not isinstance(value, int | float):
        return f"a {kind_of(value)}"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def key_path(keys: Iterable[object]) -> str:
    """A path of keys as users write it: ``("patches", 0, "heads", "12.9")`` is ``patches[0].heads["12.9"]``."""
    path = ""
    for key in keys:
        if isinstance(key, int) and not isinstance(key, bool):
            path += f"[{key}]"
        elif isinstance(key, str) and re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]{0,40}", key):
            path += f".{key}" if path else key
        else:
            quoted = short(key, 40)
            path += '["' + quoted[1:-1] + '"]' if isinstance(key, str) else f"[{quoted}]"
    return path


def parameter_words(cls: type[Method]) -> list[tuple[str, str, str]]:
    """The parameters of a method class as (name, meaning, values): ``("gamma", "factor on ...", "strength; required, ...")``."""
    hints, rows = get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        if f.metadata.get("strength"):
            words = ["strength; required"]
        else:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            words = ["required" if required else f"default {f.default}"]
        if get_origin(hints.get(f.name)) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(hints[f.name]))))
        limits = {"ge": "at least {:g}", "gt": "more than {:g}", "le": "at most {:g}", "lt": "less than {:g}"}
        words += [text.format(f.metadata[key]) for key, text in limits.items() if f.metadata.get(key) is not None]
        if f.metadata.get("strength"):
            words.append(f"does nothing at {f.metadata['identity']:g}")
        rows.append((f.name, str(f.metadata["help"]), ", ".join(words)))
    return rows
