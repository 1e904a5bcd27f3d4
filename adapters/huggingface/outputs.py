"""Edits of head outputs, [b, q, H, d], where they leave attention and before the output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headpatch.adapters.huggingface.lse import score_dtype

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.operands import OperandServer
    from headpatch.adapters.huggingface.plan import LayerPlan

__all__ = ["edit_outputs"]


def edit_outputs(out: Tensor, plan: LayerPlan, server: OperandServer | None) -> Tensor:
    """Apply the plan's output edits, in order, in at least fp32; heads without an edit come back bit for bit."""
    scale = plan.constants()[1] if plan.trainable else plan.scale
    if scale is not None and (server is None or not server.restricted(plan)):
        factor = scale.to(out.device)[:, None]
        if torch.is_grad_enabled() and (out.requires_grad or factor.requires_grad):
            return (out * factor.to(score_dtype(out))).to(out.dtype)
        return out.mul_(factor)  # `out` is this call's own; the product is formed in the wider dtype, then rounded
    for edit in plan.family("output"):
        assert server is not None
        chosen = out.index_select(2, edit.heads).to(score_dtype(out))
        given = server.operands_of(edit, 0, out.shape[1], out)
        new = edit.method.edit(chosen, edit.strength.to(chosen.dtype), given)  # type: ignore[attr-defined]
        if (mine := server.rows_of(edit)) is not None:
            new = new.where(mine[:, None, None, None], chosen)
        out = out.index_copy(2, edit.heads, new.to(out.dtype))
    return out
