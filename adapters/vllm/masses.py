"""How the first token's share of each row is had from the attention backend that an engine happens to run.

* ``lse``: the kernel's log-sum-exp, taken from its own call (FlashAttention computes it anyway; Flex attention is asked for it); one
  fused kernel a layer does the rest.
* ``indicator``: backends that give none run a second time over values that are 1 at the first token: what comes out is its share
  itself, with windows, soft caps and sinks in it. Used on CPUs (:mod:`headpatch.adapters.vllm.cpu`) and by the Triton backend.

Edits of other segments follow, by a kernel that needs neither (:mod:`headpatch.adapters.vllm.gpu_segments`).

A backend is known by the function its implementation calls, not by a version; where that function is not called after all, the
self-check at start-up finds no result and the engine refuses to serve.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.gpu_segments import GpuSegments
from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.kernels.paged import PagedMerge

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["FusedEdit", "Tap", "choose", "row_of_token"]

Run = Callable[[], Any]


class Tap:
    """A function in a module's namespace, through which an implementation reaches its kernel.

    While :meth:`listen` is on, in this thread, each call is handed to the listener, which makes it (and may make it differently).
    Otherwise it is the function itself.
    """

    def __init__(self, module: str, name: str) -> None:
        found = importlib.import_module(module)
        current = getattr(found, name)
        known = getattr(current, "_headpatch_tap", None)
        self.local: threading.local = known.local if known is not None else threading.local()
        self.original: Callable[..., Any] = known.original if known is not None else current
        if known is None:
            setattr(found, name, self._wrapper())

    def _wrapper(self) -> Callable[..., Any]:
        local, original = self.local, self.original

        def tapped(*args: Any, **kwargs: Any) -> Any:
            listener = getattr(local, "listener", None)
            return original(*args, **kwargs) if listener is None else listener(original, args, kwargs)

        tapped.__dict__.update(getattr(original, "__dict__", {}))
        tapped._headpatch_tap = self  # type: ignore[attr-defined]
        return tapped

    def listen(self, run: Run, listener: Callable[..., Any]) -> Any:
        """``run()`` with `listener` on."""
        self.local.listener = listener
        try:
            return run()
        finally:
            self.local.listener = None


def choose(patch: LayerPatch) -> Any:
    """The edit for a layer, by its backend."""
    if patch.layer_device().type == "cpu":
        from headpatch.adapters.vllm.cpu import CpuEdit

        return CpuEdit(patch)
    name = type(patch.impl).__name__
    if name == "FlashAttentionImpl":
        return FusedEdit(patch, Tap("vllm.v1.attention.backends.flash_attn", "flash_attn_varlen_func"), _flash_lse)
    if name == "FlexAttentionImpl":
        return FusedEdit(patch, Tap("vllm.v1.attention.backends.flex_attention", "flex_attention_compiled"), _flex_lse)
    if name == "TritonAttentionImpl":
        from headpatch.adapters.vllm.indicator import TritonEdit

        return TritonEdit(patch, Tap("vllm.v1.attention.backends.triton_attn", "unified_attention"))
    raise UnsupportedModelError(
        f"layer {patch.index}: operand 'first_token' is not supplied by the attention backend {patch.backend}; "
        "choose FLASH_ATTN, FLEX_ATTENTION or TRITON_ATTN (--attention-backend)"
    )


def _flash_lse(original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Tensor]:
    out, lse, *_ = original(*args, **{**kwargs, "return_softmax_lse": True})
    return out, lse  # [H, T], natural logarithm


def _flex_lse(original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = original(*args, **{**kwargs, "return_aux": AuxRequest(lse=True)})
    return out, aux.lse[0]  # [1, H, T] -> [H, T]


class FusedEdit:
    """The fused kernel on the layer's output, in place: one launch, no synchronisation, fixed addresses."""

    def __init__(self, patch: LayerPatch, tap: Tap, lse_of: Callable[..., tuple[Any, Tensor]]) -> None:
        worker = patch.worker
        self.patch, self.tap, self.lse_of = patch, tap, lse_of
        self.weights = worker.armed.weights
        self.head_scale = patch.head_scale if worker.armed.scales else None
        self.no_lse: Tensor | None = None
        tables = worker.tables
        assert tables is not None
        self.cache: Tensor | None = None
        self.merge: PagedMerge | None = None
        where = {"row_slot": tables.row_slot} if worker.by_rows else {"block_slot": tables.block_slot}
        self.constants: dict[str, Any] = {
            "scale": patch.scale, "softcap": patch.softcap, "window": patch.window, "block_ratio": patch.block_ratio,
            "head_scale": self.head_scale, "rows": tables.row_slot.shape[0], **where,
        }  # fmt: skip
        self.rows = worker.armed.rows
        self.segments = GpuSegments(patch) if worker.armed.segments else None
        self.needs_lse = self.weights or (self.segments is not None and self.segments.marks is not None)
        self.how = "lse" if self.weights else "scale" if worker.armed.scales else "rows"

    def __call__(self, run: Run, query: Tensor, kv_cache: Tensor, md: Any, output: Tensor) -> Any:
        # Under piecewise graphs this runs eagerly in every layer of every step: each needless view is paid there.
        n = int(md.num_actual_tokens)
        if self.needs_lse:
            box: list[Tensor] = []

            def listener(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                result, lse = self.lse_of(original, args, kwargs)
                box.append(lse)
                return result

            result = self.tap.listen(run, listener)
            if len(box) != 1:
                raise EngineError(
                    f"layer {self.patch.index}: attention ran {len(box)} kernels of {self.patch.backend}, not one"
                )
            lse = box[0]
        else:  # only head scales, if anything: the kernel looks at the log-sum-exp for rows that have nothing to attend to
            result = run()
            lse = self._zeros(n, query.device)
        if self.cache is not kv_cache or self.merge is None:
            d = self.patch.head_dim
            self.cache = kv_cache
            self.merge = PagedMerge(kv_cache[..., :d], kv_cache[..., d:], self.patch.weight, **self.constants)
        if output.shape[0] != n:
            query, output = query[:n], output[:n]
        starts, table, lengths = md.query_start_loc, md.block_table, md.seq_lens
        rows = starts.shape[0] - 1
        if table.shape[0] != rows:
            table = table[:rows]
        if lengths.shape[0] != rows:
            lengths = lengths[:rows]
        one = getattr(md, "max_query_len", 0) == 1
        if self.segments is not None:
            self.segments(query, output, lse, table, starts, lengths, one)
        if self.weights or self.head_scale is not None:
            self.merge(query, output, lse, table, starts, lengths, one)
        if self.rows:
            from headpatch.adapters.vllm.rowedits import edit_rows

            edit_rows(self.patch, output, starts, lengths)
        return result

    def _zeros(self, tokens: int, device: torch.device) -> Tensor:
        """[H, tokens] of zeros that take no room."""
        if self.no_lse is None:
            self.no_lse = torch.zeros((), device=device)
        return self.no_lse.expand(self.patch.num_heads, tokens)


def row_of_token(starts: Tensor, tokens: int) -> Tensor:
    """Row of each token, [tokens] int64; tokens beyond the last row get the last."""
    t = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts[1:].contiguous(), t, right=True).clamp(max=starts.shape[0] - 2)
