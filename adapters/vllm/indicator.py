"""The edit for Triton attention, whose kernel gives no log-sum-exp in all of its forms.

The kernel runs a second time over values that are 1 at the first token of each row and 0 elsewhere; it walks values with strides of
their own, so that this indicator is one number a key, however many heads and channels the kernel sees: nothing beside a cache. What
comes out, in fp32, is the first token's share p0 with windows, soft caps and sinks in it, and ``o' = (o + (g - 1) p0 v0) / (1 +
(g - 1) p0)``. Static shapes and no synchronisation throughout, so that graphs capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.gpu_segments import GpuSegments
from headpatch.adapters.vllm.masses import Run, Tap, row_of_token
from headpatch.adapters.vllm.rowedits import edit_rows
from headpatch.adapters.vllm.tables import NOBODY
from headpatch.errors import EngineError, UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["TritonEdit"]

TINY = 1.0e-6
"""As in headpatch.kernels: a row whose denominator is smaller has no digits left and stays as it is."""


class TritonEdit:
    """See the module."""

    how = "indicator"

    def __init__(self, patch: LayerPatch, tap: Tap) -> None:
        worker = patch.worker
        assert worker.tables is not None
        self.patch, self.tap, self.worker, self.tables = patch, tap, worker, worker.tables
        cache = patch.cache()
        key = ("indicator", cache.shape[0], cache.shape[2], cache.dtype, cache.device)
        if key not in worker.scratch:
            worker.scratch[key] = torch.zeros(cache.shape[0], cache.shape[2], dtype=cache.dtype, device=cache.device)
        self.indicator: Tensor = worker.scratch[key]
        self.segments = GpuSegments(patch) if worker.armed.segments else None
        if self.segments is not None and self.segments.marks is not None:
            raise UnsupportedModelError(
                f"layer {patch.index}: operand 'column_sinks' is not supplied by the attention backend {patch.backend}; "
                "choose FLASH_ATTN or FLEX_ATTENTION (--attention-backend)"
            )

    def __call__(self, run: Run, query: Tensor, kv_cache: Tensor, md: Any, output: Tensor) -> Any:
        calls: list[tuple[Callable[..., Any], dict[str, Any]]] = []

        def listener(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if args or not {"v", "out"} <= set(kwargs):
                raise EngineError("the Triton kernel is called in another form than headpatch knows")
            calls.append((original, kwargs))
            return original(**kwargs)

        result = self.tap.listen(run, listener)
        if len(calls) != 1:
            raise EngineError(f"layer {self.patch.index}: attention ran {len(calls)} Triton kernels, not one")
        n, heads = int(md.num_actual_tokens), self.patch.num_heads
        out = output[:n].view(n, heads, -1)
        starts = md.query_start_loc
        rows = starts.shape[0] - 1
        first = md.block_table[:rows, 0].long()
        if self.patch.window:
            # A block that has left the window is somebody else's by now, but the runner's table still names it.
            begin = md.seq_lens[:rows] - (starts[1:] - starts[:-1])
            first = torch.where(begin < self.patch.window, first, 0)
        row = row_of_token(starts, n)
        if self.worker.by_rows:
            slot = self.tables.row_slot[:rows]
        else:
            slot = self.tables.block_slot[first.clamp(min=0) // self.patch.block_ratio]
            slot = torch.where(first > 0, slot, NOBODY)
        mine = slot[row] >= 0
        at = slot.clamp(min=0).long()[row]
        if self.worker.armed.weights:
            g = self.patch.weight[at]
            a = (g - 1.0) * self._share(*calls[0], first)
            good = mine[:, None] & (first[row] > 0)[:, None] & (1.0 + a > TINY) & (a != 0)
            a = torch.where(good, a, 0.0).unsqueeze(-1)
            d = self.patch.head_dim
            v0 = kv_cache[first, :, 0, d:][row].float().repeat_interleave(heads // self.patch.num_kv_heads, 1)
            new = ((out.float() + a * v0) / (1.0 + a)).to(out.dtype)
            out.copy_(torch.where(good.unsqueeze(-1), new, out))
        if self.segments is not None:
            one = getattr(md, "max_query_len", 0) == 1
            self.segments(query[:n].view_as(out), out, None, md.block_table[:rows], starts, md.seq_lens[:rows], one)
        if self.worker.armed.scales:
            c = torch.where(mine[:, None], self.patch.head_scale[at], 1.0).unsqueeze(-1)
            out.copy_((out.float() * c).to(out.dtype))
        if self.worker.armed.rows:
            edit_rows(self.patch, out, starts, md.seq_lens[:rows])
        return result

    def _share(self, kernel: Callable[..., Any], kwargs: dict[str, Any], first: Tensor) -> Tensor:
        """The first token's share, [T, H] fp32."""
        values = kwargs["v"]
        blocks, size, heads, d = values.shape
        self.indicator[:, 0].index_fill_(
            0, first, 1
        )  # an assignment would copy a number from the host, which graphs refuse
        out = torch.empty(kwargs["out"].shape, dtype=torch.float32, device=values.device)
        shown = self.indicator.view(values.dtype)[:, :, None, None].expand(blocks, size, heads, d)
        kernel(**{**kwargs, "v": shown, "out": out})
        self.indicator[:, 0].index_fill_(0, first, 0)
        return out.view(out.shape[0], self.patch.num_heads, -1)[..., 0]
