"""Words for error messages: values, types and key paths, shortened, with nothing in them that could upset a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["describe", "key_path", "kind_of", "short"]

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
