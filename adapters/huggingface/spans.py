"""What a caller gives per row: spans, as token ranges of that row's unpadded prompt, and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError

__all__ = ["Spans", "row_numbers", "token_spans"]

LONGEST = 1 << 24
"""No prompt is longer; a span that ends beyond is a mistake, and must not cost memory."""


@dataclass
class Spans:
    """Spans of one call: `ranges` per row, and [rows, width] bool that says which of a row's tokens lie in one."""

    ranges: list[list[tuple[int, int]]]
    inside: Tensor = field(repr=False)

    @classmethod
    def of(cls, ranges: list[list[tuple[int, int]]]) -> Spans:
        """The table of these ranges; its width is rounded up, so that compiled models see few of them."""
        widest = max((stop for row in ranges for _, stop in row), default=1)
        inside = torch.zeros(len(ranges), -(-widest // 128) * 128, dtype=torch.bool)
        for row, found in enumerate(ranges):
            for start, stop in found:
                inside[row, start:stop] = True
        return cls(ranges, inside)


def token_spans(
    spans: Sequence[Any], prompts: Sequence[str] | None = None, tokenizer: Any = None
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
        if isinstance(row, str | Mapping) or not isinstance(row, Sequence):
            raise HeadpatchError(f"spans[{r}]: give a list of spans, as in [(3, 7)], even for one")
        offsets = None
        ranges = []
        for s, span in enumerate(row):
            where = f"spans[{r}][{s}]"
            kind, value = _kind(where, span)
            if kind == "tokens":
                ranges.append(_range(where, value))
                continue
            if prompts is None or tokenizer is None:
                raise HeadpatchError(f"{where}: substrings and character ranges need prompts= and tokenizer=")
            if kind == "text":
                start = prompts[r].find(value)
                if start < 0:
                    raise HeadpatchError(f"{where}: {value!r} does not occur in the row's prompt")
                value = (start, start + len(value))
            start, stop = _range(where, value)
            if stop > len(prompts[r]):
                raise HeadpatchError(f"{where}: the prompt has {len(prompts[r])} characters, the span ends at {stop}")
            if offsets is None:
                offsets = _offsets(tokenizer, prompts[r])
            inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
            if not inside:
                raise HeadpatchError(f"{where}: no token of the prompt covers characters {start} to {stop}")
            ranges.append((inside[0], inside[-1] + 1))
        rows.append(sorted(ranges))
    return rows


def row_numbers(name: str, values: Any, least: int, or_none: bool = False) -> list[Any]:
    """One whole number per row, at least `least`, or None where that may be. Raises HeadpatchError that names the row."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise HeadpatchError(f"{name}: give a list with one number per row of the batch, as in [12, 7]")
    for row, value in enumerate(values):
        if not (
            (value is None and or_none) or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
        ):
            wanted = f"a whole number, at least {least}" + (", or None" if or_none else "")
            raise HeadpatchError(f"{name}[{row}] is {value!r}; give {wanted}")
    return list(values)


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


def _offsets(tokenizer: Any, prompt: str) -> list[tuple[int, int]]:
    try:
        return list(tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"])
    except (NotImplementedError, KeyError) as error:
        raise HeadpatchError("spans by characters need a fast tokenizer (one that reports offsets)") from error
