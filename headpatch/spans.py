"""Spans of a prompt as callers give them: substrings, character ranges or token ranges. What engines get are token ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headpatch.errors import HeadpatchError

__all__ = ["offsets_of", "row_spans", "token_spans"]

LONGEST = 1 << 24
"""No prompt is longer; a span that ends beyond is a mistake, and must not cost memory."""

Offsets = list[tuple[int, int]]
"""Per token, the characters of the prompt that it stands for."""


def token_spans(
    spans: Sequence[Any], prompts: Sequence[str] | None = None, tokenizer: Any = None, special_tokens: bool = True
) -> list[list[tuple[int, int]]]:
    """Per row, sorted token ranges (start, stop). Raises HeadpatchError that names row and span."""
    if isinstance(spans, str | Mapping) or not isinstance(spans, Sequence):
        raise HeadpatchError(
            "spans: give a list with one entry per row, each a list of spans: [['important'], [(3, 7)]]"
        )
    if prompts is not None and len(prompts) != len(spans):
        raise HeadpatchError(f"spans has {len(spans)} rows and prompts {len(prompts)}; give one prompt per row")
    rows = []
    for r, row in enumerate(spans):
        known: Callable[[], tuple[str, Offsets]] | None = None
        if prompts is not None and tokenizer is not None:
            text = prompts[r]

            def known(text: str = text) -> tuple[str, Offsets]:
                return text, offsets_of(tokenizer, text, special_tokens)[1]

        rows.append(row_spans(f"spans[{r}]", row, known, "need prompts= and tokenizer="))
    return rows


def row_spans(
    where: str, row: Any, known: Callable[[], tuple[str, Offsets]] | None, lacking: str
) -> list[tuple[int, int]]:  # fmt: skip
    """Sorted token ranges (start, stop) of one prompt.

    Parameters
    ----------
    where
        What errors call the spans.
    row
        A list of spans: ``(start, stop)`` in tokens, ``{"tokens": ...}``, ``{"chars": [start, stop]}``, a substring or
        ``{"text": ...}`` (where it first occurs).
    known
        The prompt's text and its tokens' offsets, asked for only if a span needs them; None where they cannot be had.
    lacking
        What an error says then.
    """
    if isinstance(row, str | Mapping) or not isinstance(row, Sequence):
        raise HeadpatchError(f"{where}: give a list of spans, as in [(3, 7)], even for one")
    found: tuple[str, Offsets] | None = None
    ranges = []
    for s, span in enumerate(row):
        place = f"{where}[{s}]"
        kind, value = _kind(place, span)
        if kind == "tokens":
            ranges.append(_range(place, value))
            continue
        if known is None:
            raise HeadpatchError(f"{place}: substrings and character ranges {lacking}")
        text, offsets = found = known() if found is None else found
        if kind == "text":
            start = text.find(value)
            if start < 0:
                raise HeadpatchError(f"{place}: {value!r} does not occur in the row's prompt")
            value = (start, start + len(value))
        start, stop = _range(place, value)
        if stop > len(text):
            raise HeadpatchError(f"{place}: the prompt has {len(text)} characters, the span ends at {stop}")
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
        if not inside:
            raise HeadpatchError(f"{place}: no token of the prompt covers characters {start} to {stop}")
        ranges.append((inside[0], inside[-1] + 1))
    return sorted(ranges)


def offsets_of(tokenizer: Any, prompt: str, special_tokens: bool) -> tuple[list[int], Offsets]:
    """The tokens that a fast tokenizer makes of a text, and their offsets."""
    try:
        made = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=special_tokens)
        return list(made["input_ids"]), list(made["offset_mapping"])
    except (NotImplementedError, KeyError) as error:
        raise HeadpatchError("spans by characters need a fast tokenizer (one that reports offsets)") from error


def _kind(where: str, span: Any) -> tuple[str, Any]:
    if isinstance(span, str):
        if not span:
            raise HeadpatchError(f"{where}: an empty string marks nothing")
        return "text", span
    if isinstance(span, Mapping) and len(span) == 1:
        kind, value = next(iter(span.items()))
        if kind in ("tokens", "chars"):
            return kind, value
        if kind == "text" and isinstance(value, str) and value:
            return "text", value
    if isinstance(span, Sequence) and not isinstance(span, Mapping):
        return "tokens", span
    raise HeadpatchError(
        f"{where}: {span!r} is no span; give (start, stop), {{'chars': [start, stop]}} or a substring"
    )


def _range(where: str, value: Any) -> tuple[int, int]:
    good = (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )
    if not good or not 0 <= value[0] < value[1]:
        raise HeadpatchError(f"{where}: {value!r} is no range; give (start, stop) with 0 <= start < stop")
    if value[1] > LONGEST:
        raise HeadpatchError(f"{where}: ends beyond every prompt; give (start, stop) within the row's prompt")
    return int(value[0]), int(value[1])
