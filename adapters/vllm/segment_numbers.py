"""Edits of attention to segments as tables of numbers, which one kernel reads (:mod:`headpatch.kernels.paged_segments`).

On GPUs a step is captured once and replayed for whatever batch comes: an edit must be numbers there, not code. Constant weights of
any segments are, in any number; so is one of the forms that the kernel knows, among them, and scores that are raised before all
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.errors import UnsupportedModelError
from headpatch.kernels.paged_segments import CLASSES, FORM_NUMBERS, KINDS, NEVER, SCALARS, WIDTH

if TYPE_CHECKING:
    from headpatch.adapters.vllm.plan import LayerEdits, RowEdit
    from headpatch.kernels.segments import Form
    from headpatch.operands import Segment

__all__ = ["BEYOND", "check_layers", "marks_of", "numbers"]

MARKED = "column_sinks"
BEYOND = "takes constant weights of first_token, spans, beside_spans and image_tokens, and the forms calibrate, raise and amplify"
FROM_START = -1e9


def check_layers(layers: dict[int, LayerEdits], where: str) -> None:
    """Raise UnsupportedModelError where edits of a recipe's layers cannot be numbers."""
    for layer, edits in layers.items():
        try:
            numbers(edits.segments, 1 + max((int(edit.heads.max()) for edit in edits.segments), default=0))
        except ValueError as error:
            raise UnsupportedModelError(
                f"vllm cannot do this recipe exactly on a GPU: {where}: layer {layer}: {error}"
            ) from None


def numbers(edits: Sequence[RowEdit], heads: int) -> Tensor:
    """The table of a layer, [heads, WIDTH] fp32.

    Parameters
    ----------
    edits
        In the order they act, on heads that are numbered below `heads`.

    Raises
    ------
    ValueError
        An edit, or what several do to one head, is nothing that the kernel knows.
    """
    made = torch.zeros(heads, WIDTH)
    made[:, SCALARS["strength"]] = 1.0
    made[:, SCALARS["amplify_from"]] = FROM_START
    made[:, 5 * CLASSES : 6 * CLASSES] = 1.0
    for edit in edits:
        form = _form(edit.method)
        at = edit.heads
        if edit.method.family == "scores":
            _amplify(made, at, edit, form)
        elif edit.method.is_constant or (form is not None and form.name == "weigh"):
            _weigh(made, at, edit, form)
        else:
            _reshare(made, at, edit, form)
        made[at, SCALARS["live"]] = 1.0
    return made


def marks_of(made: Tensor) -> Tensor:
    """Which heads of a table, [..., heads, WIDTH], look for marks in prompts: [..., heads] bool."""
    return (made[..., SCALARS["live"]] != 0) & (made[..., SCALARS["marked"]] != 0)


def _form(method: Any) -> Form | None:
    """A method's form, with names in place of operands."""
    found: Form | None = method.form({name: name for name in method.needs})
    return found


def _head(at: Tensor, where: Tensor) -> int:
    return int(at[where][0])


def _unknown(method: Any) -> ValueError:
    return ValueError(f"method {method.name!r} is none of what the kernel {BEYOND}")


def _amplify(made: Tensor, at: Tensor, edit: RowEdit, form: Form | None) -> None:
    start, stop = edit.method.span
    if form is None or form.name != "amplify" or stop is not None:
        raise _unknown(edit.method)
    if (before := made[at, SCALARS["live"]] != 0).any():
        raise ValueError(
            f"method {edit.method.name!r} raises scores of head {_head(at, before)}, which another patch edits before: put it first"
        )
    inside = torch.stack([_classes(segment, edit.method) for segment in form.segments]).any(0)
    made[at, 4 * CLASSES : 5 * CLASSES] = edit.strength[:, None] * inside
    made[at, SCALARS["amplify_from"]] = FROM_START if start is None else float(start)


def _weigh(made: Tensor, at: Tensor, edit: RowEdit, form: Form | None) -> None:
    spared = None if form is None else form.spared
    if spared is not None and spared != "image_queries":
        raise _unknown(edit.method)
    weights = edit.method.weights(edit.strength).double()
    logs = torch.where(weights > 0, weights.clamp_min(1e-300).log2(), NEVER).clamp_min(NEVER).float()
    owner = torch.zeros(len(at), CLASSES)
    free = torch.ones(CLASSES, dtype=torch.bool)
    for place, segment in enumerate(edit.method.segments()):
        inside = _classes(segment, edit.method) & free
        owner += logs[:, place : place + 1] * inside
        free &= ~inside
    held = (made[at, : 4 * CLASSES] <= NEVER / 2).any(1) & (owner <= NEVER / 2).any(1)
    if held.any():
        raise ValueError(
            f"two patches take all attention from parts of what head {_head(at, held)} sees: give one of them a small weight instead"
        )
    after = made[at, SCALARS["form"]] != 0
    for text, rows in ((0, at[~after]), (2, at[after])):
        mine = owner[after if text else ~after]
        for table in (text,) if spared is not None else (text, text + 1):
            made[rows, table * CLASSES : (table + 1) * CLASSES] += mine


def _reshare(made: Tensor, at: Tensor, edit: RowEdit, form: Form | None) -> None:
    if form is None or form.name not in FORM_NUMBERS or len(form.segments) != 1 or form.spared is not None:
        raise _unknown(edit.method)
    if (before := made[at, SCALARS["form"]] != 0).any():
        raise ValueError(
            f"two patches give head {_head(at, before)} shares that depend on its attention, and the kernel knows one"
        )
    (segment,) = form.segments
    made[at, 5 * CLASSES : 6 * CLASSES] = _classes(segment, edit.method, marks=True).float()
    values = {"form": FORM_NUMBERS[form.name], "least": form.least}
    if segment.kind == MARKED:
        options: dict[str, Any] = dict(segment.options)
        least = int(options.get("min_queries", 1))
        values |= {
            "marked": 1.0, "threshold": float(options["threshold"]), "per_length": float(bool(options.get("per_length"))),
            "min_queries": float(least), "lone": float(least <= 1 and options["threshold"] < 1),
        }  # fmt: skip
    for name, value in values.items():
        made[at, SCALARS[name]] = value
    made[at, SCALARS["strength"]] = edit.strength.float()


def _classes(segment: Segment, method: Any, marks: bool = False) -> Tensor:
    """Classes of keys that a segment holds, [CLASSES] bool; of marks: those that may hold a mark."""
    if segment.kind not in KINDS and not (marks and segment.kind == MARKED):
        raise _unknown(method)
    every = torch.arange(CLASSES)
    found = torch.ones(CLASSES, dtype=torch.bool)
    if segment.kind in KINDS:
        found = (every >> KINDS.index(segment.kind)) & 1 == 1
    for other in segment.minus:
        found &= ~_classes(other, method)
    return found
