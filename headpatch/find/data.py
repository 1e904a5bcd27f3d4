"""Rows of a JSON-lines file, and the task that makes prompts of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headpatch.errors import HeadpatchError
from headpatch.show import describe, short

__all__ = ["Row", "Task", "file_sha256", "load_rows", "parse_labels", "unescape"]

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Row:
    """One row: its fields as written, and where it stands (``file:line``), for messages."""

    fields: Mapping[str, Any]
    place: str = "row"


def load_rows(path: str | Path) -> list[Row]:
    """Read a JSON-lines file: one JSON object per line, UTF-8; empty lines are skipped.

    Raises
    ------
    HeadpatchError
        The file cannot be read, holds no row, or a line is no JSON object; the message names file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HeadpatchError(f"{path}: cannot be read: {reason}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise HeadpatchError(f"{place}: not JSON: {error}; each line must be one object, as in {{...}}") from None
        if not isinstance(value, dict):
            raise HeadpatchError(f"{place}: {describe(value)} is no row; each line must be one object, as in {{...}}")
        rows.append(Row(value, place))
    if not rows:
        raise HeadpatchError(f"{path}: holds no rows")
    return rows


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def unescape(template: str) -> str:
    r"""A template as given on a command line, where ``\n`` and ``\t`` are written as two characters; ``\\`` is a backslash."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], template)


def parse_labels(text: str) -> dict[str, str]:
    """Label values of the data and the text that answers with each, from the form used on the command line.

    Either names separated by commas, where ``negative, positive`` answers with ``" negative"`` and ``" positive"`` (the name after
    one space) and ``NUM= number`` gives another text, taken as it stands up to the next comma; or a JSON object,
    ``{"negative": " bad", "positive": " good"}``.

    Raises
    ------
    HeadpatchError
        Fewer than two labels, a label twice, an empty text, or broken JSON.
    """
    labels: dict[str, str] = {}
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise HeadpatchError(f"labels: not JSON: {error}") from None
    else:
        pairs = []
        for part in text.split(","):
            name, equals, answer = part.partition("=")
            pairs.append((name.strip(), answer if equals else f" {name.strip()}"))
    for name, answer in pairs:
        if not isinstance(answer, str) or not name or not answer.strip():
            raise HeadpatchError(f"labels: {short(name)} answers with {describe(answer)}; each label needs a text")
        if name in labels:
            raise HeadpatchError(f"labels: {short(name)} is given twice")
        labels[name] = answer
    if len(labels) < 2:
        raise HeadpatchError('labels: give at least two, as in "negative, positive"')
    return labels


@dataclass(frozen=True)
class Task:
    """How rows become prompts, and which answers are compared.

    Attributes
    ----------
    templates
        Prompts with ``{field}`` for a row's field; ``{{`` and ``}}`` are braces. Several are all measured, and averaged per row.
    labels
        Value of the label field -> text that answers with it.
    label_field
        The field that holds a row's label.
    chat
        Put each prompt into the model's chat template.
    span_fields
        Fields that hold marked pieces of the row's prompt, for methods that steer towards them: a text, or a list of texts.
    """

    templates: tuple[str, ...]
    labels: Mapping[str, str]
    label_field: str = "label"
    chat: bool = False
    span_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.templates:
            raise HeadpatchError("a task needs a template")
        for template in self.templates:
            names = _names(template)
            if not names:
                raise HeadpatchError(
                    f"template {short(template)} names no field; write {{text}} where the row's text goes"
                )
            if self.label_field in names:
                raise HeadpatchError(f"template {short(template)} would show the model the label")

    def prompts(self, rows: Sequence[Row]) -> list[str]:
        """Prompts of all rows for the first template, then for the second, ..."""
        return [fill(template, row) for template in self.templates for row in rows]

    def spans(self, rows: Sequence[Row]) -> list[list[str]] | None:
        """Marked pieces of each prompt, in the order of :meth:`prompts`; None where the task marks none.

        Raises
        ------
        HeadpatchError
            A row has no such field, or its prompt does not contain the piece; the message names file and line.
        """
        return spans_of(rows, self.templates, self.span_fields)

    def content_free(self) -> list[str]:
        """The templates with nothing to say in them, for contextual calibration: "N/A", "[MASK]" and the empty string, where that
        leaves anything of the template.
        """
        words = ("N/A", "[MASK]", "")
        made = [fill(t, Row(dict.fromkeys(_names(t), word))) for t in self.templates for word in words]
        return [prompt for prompt in made if prompt.strip()]

    def gold(self, rows: Sequence[Row], required: bool = True) -> list[int]:
        """Each row's label as a place in `labels`; -1 for a row without one, where `required` is off.

        Raises
        ------
        HeadpatchError
            A row has no label, or one that `labels` does not know; the message names file and line.
        """
        places = {name: i for i, name in enumerate(self.labels)}
        found = []
        for row in rows:
            value = row.fields.get(self.label_field)
            name = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            if value is None and not required:
                found.append(-1)
            elif not isinstance(name, str) or name not in places:
                raise HeadpatchError(
                    f"{row.place}: {short(self.label_field)} is {describe(value)}; it must be one of {', '.join(places)}"
                )
            else:
                found.append(places[name])
        return found


def spans_of(rows: Sequence[Row], templates: Sequence[str], fields: Sequence[str]) -> list[list[str]] | None:
    """:meth:`Task.spans` of these templates and fields."""
    if not fields:
        return None
    return [_pieces(fill(template, row), row, fields) for template in templates for row in rows]


def _pieces(prompt: str, row: Row, fields: Sequence[str]) -> list[str]:
    found = []
    for field in fields:
        value = row.fields.get(field)
        for piece in value if isinstance(value, list) else [value]:
            if not isinstance(piece, str) or not piece:
                raise HeadpatchError(
                    f"{row.place}: {short(field)} is {describe(value)}; it must be a piece of the prompt, or a list of such"
                )
            if piece not in prompt:
                raise HeadpatchError(f"{row.place}: {short(field)}: {short(piece)} does not occur in the row's prompt")
            found.append(piece)
    return found


def _names(template: str) -> list[str]:
    return [m[1] for m in _FIELD.finditer(template) if m[1] is not None]


def fill(template: str, row: Row) -> str:
    """The template with a row's fields in it; HeadpatchError where a field is missing or is no text."""

    def value(match: re.Match[str]) -> str:
        if brace := _braces(match):
            return brace
        found = row.fields.get(match[1])
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            known = ", ".join(map(str, row.fields)) or "none"
            raise HeadpatchError(
                f"{row.place}: has no text in field {short(match[1])}, which the template names; its fields: {known}"
            )
        return str(found)

    return _FIELD.sub(value, template)


def _braces(match: re.Match[str]) -> str:
    return match[0][0] if match[0] in ("{{", "}}") else ""
