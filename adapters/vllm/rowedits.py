"""Output edits that differ from row to row: constant ones from tables, and methods' own functions over packed tokens, each token as
a row of one query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headpatch.kernels.affine import affine_rows

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["edit_rows"]


def edit_rows(patch: LayerPatch, out: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Apply, in place, what the recipes of the rows say about them.

    Parameters
    ----------
    out
        [T, H, d] outputs of this rank's heads, all constant edits already in them.
    starts, lengths
        [rows + 1] where each row's tokens begin, [rows] tokens of the row with this call's.
    """
    from headpatch.adapters.vllm.masses import row_of_token

    tables = patch.worker.tables
    assert tables is not None
    place = patch.index, patch.start
    layer, heads = patch.index, slice(patch.start, patch.start + patch.num_heads)
    affine_rows(
        out, tables.factor[layer, :, heads], None if tables.shift is None else tables.shift[layer, :, heads, : out.shape[2]],
        tables.start[layer], tables.stop[layer], row_slot=tables.row_slot, row_prompt=tables.row_prompt,
        query_start_loc=starts, seq_lens=lengths,
    )  # fmt: skip
    # Where graphs are captured this list is fixed: only recipes of the flag may have such edits there.
    slots = [(i, slot) for i, slot in enumerate(tables.slots) if slot is not None and slot.rows.get(place)]
    if not patch.worker.armed.graphs:
        slots = [(i, slot) for i, slot in slots if slot.users]
    if not slots:
        return
    row = row_of_token(starts, out.shape[0])
    t = torch.arange(out.shape[0], device=out.device)
    position = (lengths[row] - starts[row + 1] + t).long()
    operands = {"position": position[:, None], "prompt_len": tables.row_prompt[row]}
    owner = tables.row_slot[row]
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    for index, slot in slots:
        mine = (owner == index)[:, None, None]
        for edit in slot.rows[place]:
            given = out[:, edit.heads].to(work)
            more = {"heads": edit.heads, "arrays": edit.arrays}
            new = edit.method.edit(given[:, None], edit.strength.to(work), {**operands, **more})[:, 0]
            out[:, edit.heads] = torch.where(mine, new, given).to(out.dtype)
