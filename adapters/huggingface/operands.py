"""Serves operands to methods: each by name, computed when first asked for, for one attention call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.discover import output_projection
from headpatch.adapters.huggingface.images import image_queries
from headpatch.adapters.huggingface.plan import rows_key
from headpatch.adapters.huggingface.scores import explicit
from headpatch.adapters.huggingface.segmentkeys import SegmentKeys
from headpatch.errors import EngineError
from headpatch.operands import Segment, Supply

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.plan import Edit, LayerPlan

__all__ = ["SUPPLIES", "OperandServer"]

_NEVER_WITH = ("position_bias", "implementation_branch", "tensor_parallel")
_PROMPT = (*_NEVER_WITH,)
_CACHE = (*_NEVER_WITH, "no_kv_cache", "keys_after_update", "other_cache_layer", "no_unbounded_layer")
_IMAGE = (*_NEVER_WITH, "no_image_tokens")
SUPPLIES: dict[str, Supply] = {
    "first_token": Supply(not_with=_NEVER_WITH, note="all masks, caches and packings"),
    "spans": Supply(not_with=_NEVER_WITH, note="given with handle.inputs(spans=...)"),
    "beside_spans": Supply(not_with=_NEVER_WITH, note="given with handle.inputs(spans=...)"),
    "image_tokens": Supply(not_with=_IMAGE, note="where the model's config names an image token"),
    "vision_salient": Supply(
        not_with=(*_IMAGE, "no_class_token", "merged_patches"),
        note="LLaVA with a tower that has a class token; frozen at the end of a prompt that comes in one call",
    ),
    "column_sinks": Supply(not_with=_PROMPT, note="frozen at the end of a prompt that comes in one call"),
    "residual_sinks": Supply(not_with=_PROMPT, note="frozen at the end of a prompt that comes in one call"),
    "lse": Supply(not_with=_NEVER_WITH),
    "q": Supply(not_with=("tensor_parallel",)),
    "k": Supply(not_with=("tensor_parallel",)),
    "v": Supply(not_with=("tensor_parallel",)),
    "column_means": Supply(not_with=_NEVER_WITH, note="second tiled pass over the call's queries"),
    "window_scores": Supply(not_with=_NEVER_WITH),
    "layer_input": Supply(note="the decoder layer's input"),
    "o_proj": Supply(not_with=("tensor_parallel",), note="unquantised projections"),
    "arrays": Supply(),
    "prompt_len": Supply(note="from the first call on an empty cache, generate(), or handle.inputs(prompt_len=...)"),
    "position": Supply(),
    "image_queries": Supply(not_with=("no_image_tokens",), note="where the model's config names an image token"),
    "without_image": Supply(
        not_with=("no_image_tokens",),
        note="made by generate() in its prefill; elsewhere rows of the same batch, named with handle.inputs(without_image=...)",
    ),
    "all_heads": Supply(not_with=("tensor_parallel",)),
    "kv_windows": Supply(
        not_with=_CACHE,
        note="dynamic, static and quantised caches; layers with a window of their own are left as they are",
    ),
    "kv_selection": Supply(
        not_with=_CACHE,
        note="dynamic caches, not in compiled calls; layers with a window of their own are left as they are",
    ),
    "depth": Supply(note="for policies that choose tokens"),
}
"""What this adapter supplies, and with which features of a layer it cannot; features are found by discover.py."""


class OperandServer(SegmentKeys):
    """Operands of one attention call of one layer; `edited`: whether the call's masses or scores are."""

    edited = False

    def weights(self, queries: Sequence[int]) -> Tensor:
        """[b, H, queries, n] attention of single queries of this call (negative: from its end), as the layer's edits leave it."""
        n_q, plan = self.call.q.shape[2], self.state.plan
        edits = plan.attention if self.edited and plan is not None else ()
        masks, owned = (
            (self.segment_masks(plan.segments), plan.owned) if edits and plan else (lambda start, stop: [], ())
        )
        found = []
        for query in queries:
            at = query + n_q if query < 0 else query
            if not 0 <= at < n_q:
                raise EngineError(
                    f"layer {self.state.name}: query {query} of a call with {n_q} queries; give {-n_q} to {n_q - 1}"
                )
            found.append(explicit(self.call, edits, masks, owned, self.operands_of, (at, at + 1)))
        return torch.cat(found, 2)

    def operands_of(self, edit: Edit, start: int, stop: int, all_heads: Tensor | None = None) -> dict[str, Any]:
        """Everything that an edit's method asked for, for queries start..stop, its state, and ``heads``."""
        method = edit.method
        given = self._asked(edit, edit.asked, all_heads, start, stop)
        if method.state:
            known = list(dict.fromkeys((*edit.asked, *method.state_needs)))
            for name in method.state:
                derived = self.frozen(
                    (*edit.key, name), lambda n=name: method.derive(self._asked(edit, known, all_heads))[n]
                )
                given[name] = self._of_batch(derived)
        return given

    def _asked(
        self, edit: Edit, names: Iterable[str], all_heads: Tensor | None, start: int = 0, stop: int | None = None
    ) -> dict[str, Any]:
        given: dict[str, Any] = {"heads": edit.heads}
        for name in names:
            if name == "arrays":
                given[name] = edit.arrays
            elif name == "window_scores":
                given[name] = self.window_scores(int(getattr(edit.method, "window", 32)))
            elif name != "all_heads":
                given[name] = self.get(name, start, stop)
            elif all_heads is not None:
                given[name] = all_heads
        return given

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """One operand by name; those with a query dimension for queries start..stop."""
        stop = self.call.q.shape[2] if stop is None else stop
        if name == "q":
            return self.call.q[:, :, start:stop]
        if name in ("k", "v"):
            return getattr(self.call, name)
        if name == "lse":
            return self.lse(start, stop)
        if name == "position":
            return self.position()[:, start:stop]
        if name == "layer_input":
            return self._layer_input()[:, start:stop]
        if name == "column_means":
            return self.column_means()
        if name == "o_proj":
            return output_projection(self.module, self.state.num_heads, self.state.name)
        if name == "prompt_len":
            return self.prompt_len()
        if name == "without_image":
            return self._once(name, self._companions)
        if name == "image_queries":
            return self._of_batch(image_queries(self))[:, start:stop]
        if name in ("first_token", "spans", "beside_spans", "image_tokens", "column_sinks", "residual_sinks"):
            return self.segment_masks([Segment(name)])(start, stop)[0]
        raise EngineError(f"layer {self.state.name}: operand {name!r} has no single value in this call")

    # --- rows -------------------------------------------------------------------------------------------------------------

    def restricted(self, plan: LayerPlan) -> bool:
        """Whether this call keeps an edit of the plan to some of its rows."""
        return self.rows is not None and plan.restricted(self.rows.known)

    def rows_of(self, edit: Edit) -> Tensor | None:
        """[b] bool, the rows that an edit is for; None for all."""
        given = None if self.rows is None else self.rows.known.get(rows_key(edit.handle))
        if given is None:
            return None
        b, mask = self.call.q.shape[0], given.mask
        if not len(mask) or b % len(mask):
            raise EngineError(f"inputs(rows=...) has {len(mask)} entries, the batch has {b} rows: give one per row")
        return self._once("rows", lambda: self._of_batch(mask.to(self.call.q.device)), edit.handle)

    def _companions(self) -> Tensor:
        rows, b = self.known_rows(), self.call.q.shape[0]
        given = rows.known.get("without_image")
        if given is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'without_image' is needed. generate() without an assistant makes each prompt's "
                "copy without its image itself; elsewhere put it into the batch and name its row: "
                "with handle.inputs(without_image=[1, None]): ..."
            )
        if len(given) != b:
            raise EngineError(f"inputs(without_image=...) names {len(given)} rows, the batch has {b}")
        for row, other in enumerate(given):
            if other is not None and not (0 <= other < b and other != row):
                raise EngineError(
                    f"inputs(without_image=...)[{row}] is {other}: name another row, 0 to {b - 1}, or None"
                )
        return torch.tensor([-1 if r is None else int(r) for r in given], device=self.call.q.device)
