"""Edited attention over a paged cache, row by row of a batch under recipes of their own: for engines that capture their steps.

Heads without an edit, and rows without a recipe, cost a program that looks at two numbers and ends. An edited head attends again,
keys read through the block table, whatever the engine's kernel made of it: nothing is subtracted, so nothing cancels. All that a
row's edit depends on lies in tables at fixed addresses: launches have the same form in every step, and graphs can hold them.

A head's edit is a table of :data:`WIDTH` numbers (fp32). Keys fall into 16 classes by four bits (:data:`KINDS`: first token, in a
span, in the prompt beside the spans, image token), and what a class is multiplied by is looked up:

* 0-15, 16-31: logarithms (base 2) of weights, for queries that are text, and image tokens; :data:`NEVER` for a weight of zero;
* 32-47, 48-63: the same for weights that act after the form;
* 64-79: by how much of its own size a score is raised, before anything else (PAI);
* 80-95: whether a class lies in the form's segment;
* from 96 on: :data:`SCALARS`.

Forms, as in :mod:`headpatch.kernels.segments`: 1 is ``calibrate`` (ACT), 2 is ``raise`` (a segment that gets less than `least` is
multiplied by what brings it there, at most by 1 / strength: PASTA's target mass).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.launch import launch
from headpatch.kernels.segments import WIDEST, padded

__all__ = [
    "CLASSES",
    "FORM_NUMBERS",
    "KINDS",
    "NEVER",
    "RANGES",
    "SCALARS",
    "WIDTH",
    "PagedSegments",
    "scratch_numbers",
]

KINDS = ("first_token", "spans", "beside_spans", "image_tokens")
"""Bits of a key's class, lowest first."""
CLASSES = 1 << len(KINDS)
SCALARS = {
    "live": 96, "form": 97, "strength": 98, "least": 99, "marked": 100, "amplify_from": 101, "threshold": 102, "per_length": 103,
    "min_queries": 104, "lone": 105,
}  # fmt: skip
"""``marked``: the form's segment is what was marked in the prompt, within its classes; ``amplify_from``: from which position on,
counted from the end of the prompt; ``lone``: whether the only token of a prompt of one is marked."""
WIDTH = 112
FORM_NUMBERS = {"calibrate": 1.0, "raise": 2.0}
NEVER = -200.0
"""Stands for the logarithm of zero: a row that sees nothing else is as it was, in any other such a key has nothing."""
RANGES = 8
"""int32 numbers of a row: begin, count and search steps of the bounds of its spans, the same of its images, and two of padding."""
PARTS = 16
ENTRIES = 512
"""Most (token, head, part) triples that share keys of a row in one call: what scratch memory is made for. More programs than a
GPU runs at once are no quicker."""


def scratch_numbers(head_dim: int) -> int:
    """fp32 numbers that :class:`PagedSegments` needs to share a row's keys between programs."""
    return ENTRIES * (8 + 2 * padded(head_dim))


class PagedSegments:
    """The edits of one layer.

    Parameters
    ----------
    keys, values
        [blocks, K, block size, d]: views of the engine's cache, at an address that never changes, last strides of 1.
    edits
        [slots, H, :data:`WIDTH`] fp32.
    heads
        Query heads that any recipe may edit, int32.
    row_slot, row_prompt, ranges, bounds
        [rows] int32 (-1: no recipe), [rows] int64, [rows, :data:`RANGES`] int32, [any] int32.
    scratch
        fp32, :func:`scratch_numbers` of them; layers that run one after the other may share it.
    marks, mark_of
        [blocks, heads that may be marked, block size] uint8, and [H] int32, the place of each head in it; None where no recipe has
        marks.
    forms, after
        Whether any recipe may have a form, and weights that act after it.
    rows
        The most rows that a call will have.

    Raises
    ------
    ValueError
        Heads are wider than 256, or no multiple of 16 wide.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, edits: Tensor, *, heads: Tensor, row_slot: Tensor, row_prompt: Tensor, ranges: Tensor,
        bounds: Tensor, scratch: Tensor, scale: float, softcap: float = 0.0, window: int = 0, marks: Tensor | None = None,
        mark_of: Tensor | None = None, forms: bool = True, after: bool = True, rows: int = 4095,
    ) -> None:  # fmt: skip
        self.keys, self.values, self.edits, self.heads = keys, values, edits, heads
        self.row_slot, self.row_prompt, self.ranges, self.bounds = row_slot, row_prompt, ranges, bounds
        self.scratch, self.marks, self.mark_of = scratch, marks, mark_of
        self.scale, self.softcap, self.window = scale, softcap, window
        self.head_dim = int(keys.shape[-1])
        if self.head_dim > WIDEST or self.head_dim % 16 or values.shape[-1] != self.head_dim:
            raise ValueError(
                f"heads are {self.head_dim} and {values.shape[-1]} wide: at most {WIDEST}, by 16, and alike"
            )
        self.wide = padded(self.head_dim)
        self.steps = -(-rows.bit_length() // 4) * 4
        exact = keys.dtype == torch.float32
        self._shape = {
            "G": int(edits.shape[1]) // int(keys.shape[1]), "SIZE": int(keys.shape[2]), "D": self.head_dim, "DP": self.wide,
        }  # fmt: skip
        self._kind = {"WINDOW": window > 0, "SOFTCAP": softcap > 0.0, "EXACT": exact}
        self._forms = {"HAS_FORM": forms, "HAS_POST": forms and after}
        k, v = keys.stride(), values.stride()
        self._places = (k[0], k[1], k[2], v[0], v[1], v[2])
        self.key = (
            keys.dtype, *self._shape.values(), *self._kind.values(), *self._forms.values(), marks is None,
            *(x % 16 for x in self._places),
        )  # fmt: skip

    def parts(self, tokens: int) -> int:
        """How many programs share the keys of a token and head: as many as there is scratch for."""
        return max(1, min(PARTS, ENTRIES // max(1, tokens * len(self.heads))))

    def mark(
        self, q: Tensor, lse: Tensor, table: Tensor, starts: Tensor, lengths: Tensor
    ) -> None:  # fmt: skip
        """Mark keys of prompts that come whole in this call, where a head's recipe wants it; needed where a call may hold prompts.

        Parameters
        ----------
        q, lse
            [T, H, d], and [H, T] fp32, natural: log-sum-exp of the scores.
        table, starts, lengths
            [rows, any], [rows + 1] and [rows], int32.
        """
        if self.marks is None or not len(q):
            return
        size = _block(self.wide)
        constants = {**self._shape, "BN": size, "STEPS": self.steps, **self._kind}
        rows = table.shape[0]
        args = (
            q, self.keys, lse, self.heads, self.edits, self.row_slot, self.row_prompt, starts, lengths, table, self.marks,
            self.mark_of, q.stride(0), q.stride(1), *self._places[:3], lse.stride(1), lse.stride(0), rows, table.stride(0),
            *self.edits.stride()[:2], *self.marks.stride()[:2], self.scale, self.softcap, self.window,
        )  # fmt: skip
        grid = (len(q) // size + rows, len(self.heads), 1)
        launch(_kernels().find_sinks, q.device, (*self.key, self._like(q)), grid, args, constants)

    def __call__(
        self, q: Tensor, out: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, one: bool = False
    ) -> None:  # fmt: skip
        """Put edited outputs in place of what `out` holds.

        Parameters
        ----------
        q, out
            [T, H, d], last strides of 1.
        table, starts, lengths
            As for :meth:`mark`.
        one
            Whether no row has more than one token; then token t, where there are as many rows as tokens, is row t's.
        """
        tokens, rows = q.shape[0], table.shape[0]
        if not tokens or not rows:
            return
        steps = 0 if one and tokens == rows else self.steps
        parts = self.parts(tokens)
        bm, bn, warps, stages = _tile(tokens, rows, self.wide)
        q_t, q_h, y_t, y_h = q.stride(0), q.stride(1), out.stride(0), out.stride(1)
        key = (*self.key, steps, bm, parts > 1, self._like(q), self._like(out))
        constants = {
            **self._shape,
            "BM": bm,
            "BN": bn,
            "STEPS": steps,
            **self._forms,
            "SPLIT": parts > 1,
            **self._kind,
        }
        e_s, e_h, _ = self.edits.stride()
        m_b, m_h = (0, 0) if self.marks is None else self.marks.stride()[:2]
        tables = (self.heads, self.edits, self.row_slot)
        args = (
            q, self.keys, self.values, out, *tables, self.row_prompt, self.ranges, self.bounds, starts, lengths, table, self.marks,
            self.mark_of, self.scratch, q_t, q_h, *self._places, y_t, y_h, rows, table.stride(0), e_s, e_h, m_b, m_h,
            self.scale, self.softcap, self.window,
        )  # fmt: skip
        grid = (rows if steps == 0 else tokens // bm + rows, len(self.heads), parts)
        launch(_kernels().attend, q.device, key, grid, args, constants, warps, stages)
        if parts > 1:
            constants = {"D": self.head_dim, "DP": self.wide, "STEPS": steps, **self._forms}
            found = (out, *tables, starts, lengths, self.scratch, y_t, y_h, rows, e_s, e_h, parts)
            launch(_kernels().finish, q.device, key, (tokens, len(self.heads), 1), found, constants)

    @staticmethod
    def _like(x: Tensor) -> tuple[bool, bool, bool]:
        """What Triton would specialise on."""
        return not x.data_ptr() & 15, not x.stride(0) & 15, not x.stride(1) & 15


def _tile(tokens: int, rows: int, wide: int) -> tuple[int, int, int, int]:
    """(queries and keys of a program's step, warps, stages): measured on an H100 at a width of 128."""
    if tokens <= 4 * rows:
        return 16, 2 * _block(wide), 4, 2
    return 64, _block(wide), (4 if wide <= 128 else 8), 2


def _block(wide: int) -> int:
    """Keys that a program has before it at a time, at this width."""
    return 64 if wide <= 128 else 32


@functools.cache
def _kernels() -> Any:
    from headpatch.kernels import _triton_paged_segments

    return _triton_paged_segments
