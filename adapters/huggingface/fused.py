"""Mass edits of any segments: in one launch where there is a kernel for them, else by :mod:`headpatch.adapters.huggingface.cells`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headpatch.adapters.huggingface.cells import biased_keys_suit, by_cells, few_suit, plainly, spares_queries
from headpatch.adapters.huggingface.mass import Call
from headpatch.adapters.huggingface.plan import Edit, LayerPlan
from headpatch.adapters.huggingface.scores import first_acted_on
from headpatch.kernels.segments import FORMS, attend_segments, attends_segments
from headpatch.methods.base import MassMethod

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.operands import OperandServer

__all__ = ["by_form", "by_segments"]

STEP_KEYS = 8192
"""Up to so many keys in a decoding step: the kernel does not share a row's keys out."""


def by_segments(call: Call, plan: LayerPlan, server: OperandServer) -> Tensor:
    """Attention [b, q, H, d] under all mass edits of a layer."""
    edits = plan.attention
    quick = by_form(call, edits, server)
    if quick is not None:
        return quick
    segments = server.segment_masks(plan.segments)
    since = first_acted_on(server, edits) if spares_queries(call) else 0
    return by_cells(call, edits, segments, plan.owned, server.operands_of, since)


def by_form(call: Call, edits: tuple[Edit, ...], server: OperandServer) -> Tensor | None:
    """Attention under a single edit as its method's form says; None where there is no form, or no kernel for this call."""
    edit, method, n_q, n_k = edits[0], edits[0].method, call.q.shape[2], call.seen.keys
    if len(edits) != 1 or not isinstance(method, MassMethod) or type(method).form is MassMethod.form:
        return None
    if (n_q == 1 and n_k > STEP_KEYS) or not biased_keys_suit(call):
        return None
    k, v = call.k[:, :, :n_k], call.v[:, :, :n_k]
    if not attends_segments(call.q, k, v):
        return None
    form = method.form(server.operands_of(edit, 0, n_q))
    if form is None or form.name not in FORMS:
        return None
    masks = [m[..., :n_k] for m in server.segment_masks(form.segments)(0, 1)]
    if len(edit.heads) == call.q.shape[1]:
        return attend_segments(call.q, k, v, masks, form, edit.strength, call.scale)
    if edit.dense is not None and not few_suit(call, edit.heads):
        return attend_segments(call.q, k, v, masks, form, edit.dense[0], call.scale)
    out = plainly(call).transpose(1, 2).contiguous()
    return attend_segments(call.q, k, v, masks, form, edit.strength, call.scale, edit.heads, out)
