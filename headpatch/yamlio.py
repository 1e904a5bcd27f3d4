"""Reading YAML that a stranger wrote, and writing YAML that people read.

The parser is PyYAML's; what it finds (events: a mapping starts, a scalar, ...) is built into plain dicts, lists, strings, numbers,
booleans and None right here, so nothing in a file can name a class, refer back to itself or grow beyond its own size. Scalars
follow YAML 1.2: ``1e-2`` is a number, ``yes`` and ``2026-01-31`` are strings, ``010`` is ten.

Refused, with line and remedy: more than 1 MiB, more than 20 levels or 100,000 values, duplicate keys, keys that are no strings (an
unquoted ``12.10`` would be 12.1), anchors, aliases, merge keys, tags, directives, several documents.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from headpatch.errors import RecipeError
from headpatch.heads import SELECTOR_PATTERN
from headpatch.show import key_path, kind_of, short

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "check_plain", "dumps", "load", "loads"]

MAX_BYTES = 1 << 20
"""Largest recipe text, in bytes of UTF-8."""
MAX_DEPTH = 20
"""Deepest nesting of mappings and lists."""
MAX_NODES = 100_000
"""Most keys and values. The largest models have some 16,000 heads."""
MAX_INT = 2**63 - 1

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_SELECTOR = re.compile(SELECTOR_PATTERN)

_STAR = 'something that begins with * or & goes in quotes, as in "*.7"; anchors and aliases are not read'


def load(path: str | os.PathLike[str], source: str | None = None) -> Any:
    """Read a YAML file.

    Parameters
    ----------
    path
        A regular file of at most :data:`MAX_BYTES`; of more, no byte is read.
    source
        What error messages call it; the path where None.

    Raises
    ------
    RecipeError
        No such file, no file that can be read as text, or anything that :func:`loads` refuses.
    """
    path = Path(path)
    source = source or str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError("is a folder", source=source, remedy="name the recipe file in it")
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError("is not a regular file", source=source, remedy="name a YAML file")
        if status.st_size > MAX_BYTES:
            raise _too_large(source, status.st_size)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(
            f"cannot be read: {reason}", source=source, remedy="name a recipe file that exists"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not text: byte {error.start} is not UTF-8", source=source, remedy="a recipe is a YAML file in UTF-8"
        ) from None
    return loads(text, source)


def loads(text: str, source: str | None = None) -> Any:
    """Read YAML text into plain values; an empty document is None.

    Raises
    ------
    RecipeError
        What the module's docstring lists, and text that is not YAML at all; `line` and `remedy` are in the message.
    """
    if len(text) > MAX_BYTES:
        raise _too_large(source, len(text))
    if "\0" in text:
        raise RecipeError("is not text: it holds NUL bytes", source=source, remedy="a recipe is a YAML file in UTF-8")
    # Thousands of %TAG lines would take libyaml quadratic time before it reports the first of them.
    if directive := re.search(r"^%", text, re.MULTILINE):
        line = text.count("\n", 0, directive.start()) + 1
        raise RecipeError(f"line {line}: a YAML directive", source=source, remedy="remove lines that begin with %")
    try:
        return _Builder(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(part for part in (error.context, error.problem) if part)
        if (
            "nesting depth" in words
        ):  # newer libyamls have a limit of their own, and meet it before we see the first list
            raise RecipeError(
                f"line {mark.line + 1 if mark else '?'}: nested deeper than {MAX_DEPTH} levels", source=source,
                remedy="a recipe is flat",
            ) from None  # fmt: skip
        star = "alias" in words or "anchor" in words
        raise RecipeError(
            f"line {mark.line + 1 if mark else '?'}: not YAML: {words}", source=source,
            remedy=_STAR if star else "mend the YAML there",
        ) from None  # fmt: skip
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise RecipeError(
            f"not YAML: {short(str(error), 120)}", source=source, remedy="a recipe is a YAML file in UTF-8"
        ) from None


class _Builder:
    """Builds plain values from parser events; the parser is asked for one event at a time and stops with us."""

    def __init__(self, text: str, source: str | None) -> None:
        self.source = source
        self.events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self.nodes = 0
        self.path: list[object] = []

    def document(self) -> Any:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        value = self.value(next(self.events))
        next(self.events)  # document end
        more = next(self.events)
        if not isinstance(more, yaml.StreamEndEvent):
            raise self.error(
                more, "a second document", "one file holds one recipe: remove the --- line and what follows"
            )
        return value

    def value(self, event: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(event, f"more than {MAX_NODES} values", "use ranges and * in selectors")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self.error(event, "an anchor or alias", _STAR)
        if getattr(event, "tag", None) is not None:
            raise self.error(event, f"the tag {short(event.tag)}", "remove it: recipes hold plain values only")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(self.path) >= MAX_DEPTH:
            raise self.error(event, f"nested deeper than {MAX_DEPTH} levels", "a recipe is flat")
        return self.mapping() if isinstance(event, yaml.MappingStartEvent) else self.sequence()

    def sequence(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            self.path.append(len(items))
            items.append(self.value(event))
            self.path.pop()
        return items

    def mapping(self) -> dict[str, Any]:
        items: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            self.path.append(key)
            if key in items:
                problem = f"the key {short(key)} occurs twice, first on line {lines[key]}"
                raise self.error(event, problem, "keep one of the two")
            lines[key] = event.start_mark.line + 1
            items[key] = self.value(next(self.events))
            self.path.pop()
        return items

    def key(self, event: Any) -> str:
        # Asked before going down: keys that are mappings nest without the path growing.
        if isinstance(event, yaml.CollectionStartEvent):
            raise self.error(event, "a key that is a list or a mapping", "keys are strings")
        key = self.value(event)
        if isinstance(key, str) and not (key == "<<" and event.implicit[0]):
            return key
        self.path.append(event.value)
        if key == "<<":
            raise self.error(event, "a merge key", "write the keys out")
        problem = f"the key {short(event.value)[1:-1]} is a {kind_of(key)}, not a string"
        if isinstance(key, int | float) and not isinstance(key, bool):
            problem += ", and YAML drops zeros at the end of a number"
        raise self.error(event, problem, f'write it in quotes: "{short(event.value)[1:-1]}"')

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        value = _plain_scalar(text)
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise self.error(event, "a number beyond 64 bits", "use a smaller one, or quotes")
        return value

    def error(self, event: Any, problem: str, remedy: str) -> RecipeError:
        line = event.start_mark.line + 1
        return RecipeError(
            f"line {line}: {problem}", source=self.source, key=key_path(self.path) or None, remedy=remedy
        )


def _plain_scalar(text: str) -> Any:
    """What an unquoted scalar means (YAML 1.2, core schema, without octal and hexadecimal)."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        # Python refuses to convert thousands of digits; so what is that long counts as beyond MAX_INT.
        return int(text) if len(text) <= 100 else MAX_INT + 1
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def check_plain(value: object, source: str | None = None) -> Any:
    """Copy plain values, those that YAML can hold; the way in for recipes given as dicts.

    Raises
    ------
    RecipeError
        Another type (an array, an object), a key that is no string, NaN or infinity, text that UTF-8 cannot hold, an integer
        beyond 64 bits; or more than :data:`MAX_DEPTH` levels or :data:`MAX_NODES` values, as in a list that holds itself.
    """
    return _Copier(source).copy(value, ())


class _Copier:
    def __init__(self, source: str | None) -> None:
        self.source = source
        self.nodes = 0

    def copy(self, value: object, path: tuple[object, ...]) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(path, f"more than {MAX_NODES} values", "use ranges and * in selectors")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self.text(value, path)
        if isinstance(value, int):
            if abs(value) > MAX_INT:
                raise self.error(path, "a number beyond 64 bits", "use a smaller one")
            return int(value)
        if isinstance(value, float):
            if not abs(value) < float("inf"):
                raise self.error(path, f"{float(value)} is not a finite number", "write a finite number")
            return float(value)
        if not isinstance(value, dict | list | tuple):
            raise self.error(
                path, f"a {type(value).__name__} cannot stand in a recipe",
                "use plain strings, numbers, booleans, lists and dicts; float(x) makes a number of an array's entry",
            )  # fmt: skip
        if len(path) >= MAX_DEPTH:
            raise self.error(path, f"nested deeper than {MAX_DEPTH} levels", "a recipe is flat")
        if isinstance(value, dict):
            return {self.key(key, path): self.copy(item, (*path, key)) for key, item in value.items()}
        return [self.copy(item, (*path, i)) for i, item in enumerate(value)]

    def key(self, key: object, path: tuple[object, ...]) -> str:
        if not isinstance(key, str):
            quoted = short(key)
            raise self.error(
                (*path, key), f"the key {quoted} is a {kind_of(key)}, not a string", f'write it in quotes: "{quoted}"'
            )
        self.nodes += 1
        return self.text(key, (*path, key))

    def text(self, text: str, path: tuple[object, ...]) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.error(path, "text that UTF-8 cannot hold", "remove lone surrogates") from None
        return str(text)

    def error(self, path: tuple[object, ...], problem: str, remedy: str) -> RecipeError:
        return RecipeError(problem, source=self.source, key=key_path(path) or None, remedy=remedy)


def _too_large(source: str | None, size: int) -> RecipeError:
    return RecipeError(
        f"{size} bytes are too many for a recipe", source=source,
        remedy=f"at most {MAX_BYTES} bytes; arrays belong in a safetensors file beside it",
    )  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Writes selectors in quotes, tables of heads and lists of scalars on one line, everything else as blocks."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML quotes what YAML 1.1 would misread; this adds what 1.2 would, selectors, and characters that must be escaped.
    odd = not text.replace("\n", "").isprintable()
    quote = odd or _SELECTOR.fullmatch(text) is not None or _plain_scalar(text) is not text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quote else None)


def _represent_dict(dumper: _Dumper, items: dict[str, Any]) -> yaml.Node:
    flow = all(_SELECTOR.fullmatch(key) for key in items)
    return dumper.represent_mapping("tag:yaml.org,2002:map", items.items(), flow_style=flow)


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(dict, _represent_dict)
_Dumper.add_representer(list, _represent_list)


def dumps(data: dict[str, Any]) -> str:
    """Write plain values as YAML that :func:`loads` reads back exactly: keys in their order, selectors in quotes."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)
