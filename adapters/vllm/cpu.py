"""The edit on CPUs, with vLLM's own CPU kernel.

That kernel gives no log-sum-exp. It runs a second time over an indicator value cache, whose channel 0 is 1 at the first token and
whose channel 1 is 1 everywhere else: what comes out are the first token's share p0 and that of all others, each without
cancellation. And while it runs for the first time, the first token's value is zero in the blocks of rows that are edited, so that
it gives the others' sum ``o_rest`` without cancellation too. Then, g the head's weight and z the share of a sink logit (1 - p0 -
rest where there is one, else 0),

    o' = (g p0 v0 + o_rest) / (g p0 + rest + z)

which is exact for every g >= 0. The second pass is paid only in layers and steps where a running request has a weight. Edits of
other segments of keys are another matter: :mod:`headpatch.adapters.vllm.segment_edits`.

The indicator cache has the size of one layer's values and serves all layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.cpu_keys import CpuKeys
from headpatch.adapters.vllm.masses import Run, Tap
from headpatch.adapters.vllm.rowedits import edit_rows
from headpatch.adapters.vllm.segment_edits import edit_segments
from headpatch.adapters.vllm.tables import NOBODY
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["CpuEdit"]


@dataclass
class Step:
    """What all layers of a step share: per row the first block, the first query's position and the slot; per token its row."""

    first: Tensor
    begin: Tensor
    slot: Tensor
    row: Tensor
    starts: Tensor
    lengths: Tensor
    anybody: bool


class CpuEdit:
    """See the module."""

    how = "indicator"

    def __init__(self, patch: LayerPatch) -> None:
        self.patch, self.worker = patch, patch.worker
        self.tap = Tap("vllm._custom_ops", "cpu_attention_with_kv_cache")
        self.has_sinks = getattr(patch.impl, "sinks", None) is not None
        assert patch.worker.tables is not None
        self.tables = patch.worker.tables
        self.keys = CpuKeys(patch, patch.cache()) if patch.worker.armed.segments else None

    def __call__(self, run: Run, query: Tensor, kv_cache: Tensor, md: Any, output: Tensor) -> Any:
        step = self._step(md)
        if not step.anybody:
            return run()
        n = int(md.num_actual_tokens)
        out = output[:n].view(n, self.patch.num_heads, -1)
        mine = step.slot >= 0
        at = step.slot.clamp(min=0)
        weight = torch.where(mine[:, None], self.patch.weight[at], 1.0)  # [rows, H]
        scale = torch.where(mine[:, None], self.patch.head_scale[at], 1.0)
        reached = step.first > 0
        if self.patch.window:
            # A block that has left the window is somebody else's by now, but the runner's table still names it.
            reached &= step.begin < self.patch.window
        edited = ((weight != 1.0).any(1) & reached).nonzero()[:, 0]
        if len(edited):
            result = self._weigh(run, kv_cache, step, edited, weight, out)
        else:
            result = run()
        if self.keys is not None:
            table = md.block_table[: len(step.slot)]
            edit_segments(
                self.patch, self.keys, out, query[:n].view_as(out), kv_cache, table, step.starts, step.lengths
            )
        scaled = (scale != 1.0).any(1)
        if bool(scaled.any()):
            tokens = scaled[step.row].nonzero()[:, 0]
            out[tokens] = (out[tokens].float() * scale[step.row[tokens]].unsqueeze(-1)).to(out.dtype)
        if self.worker.armed.rows:
            edit_rows(self.patch, out, step.starts, step.lengths)
        return result

    def _weigh(self, run: Run, kv_cache: Tensor, step: Step, edited: Tensor, weight: Tensor, out: Tensor) -> Any:
        blocks, d = step.first[edited], self.patch.head_dim
        nb, kv_heads, size, _ = kv_cache.shape
        values = kv_cache.view(nb, kv_heads, size * 2, d).chunk(2, dim=2)[1]
        unique, place_of = blocks.unique(return_inverse=True)
        first_value = values[unique, :, 0].clone()  # [blocks, K, d]
        calls: list[tuple[Callable[..., Any], Any]] = []

        def listener(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if args or "value_cache" not in kwargs:
                raise EngineError("the CPU kernel is called in another form than headpatch knows")
            calls.append((original, kwargs))
            return original(**kwargs)

        values[unique, :, 0] = 0
        try:
            result = self.tap.listen(run, listener)
        finally:
            values[unique, :, 0] = first_value
        if len(calls) != 1:
            raise EngineError(f"layer {self.patch.index}: attention ran {len(calls)} CPU kernels, not one")
        shares = self._shares(*calls[0], values, unique)  # [T, H, 2]
        chosen = torch.zeros(len(step.slot), dtype=torch.bool)
        chosen[edited] = True
        place = torch.zeros(len(step.slot), dtype=torch.int64)
        place[edited] = place_of
        tokens = chosen[step.row].nonzero()[:, 0]
        row = step.row[tokens]
        p0, rest = shares[tokens, :, 0].float(), shares[tokens, :, 1].float()
        z = (1.0 - p0 - rest).clamp(min=0.0) if self.has_sinks else torch.zeros(())
        # A row that sees nothing but the first token stays as it is: its attention cannot go elsewhere.
        g = torch.where((rest + z) > 0, weight[row], 1.0)
        v0 = first_value[place[row]].float().repeat_interleave(self.patch.num_heads // kv_heads, 1)
        first = (g * p0).unsqueeze(-1)
        out[tokens] = ((out[tokens].float() + first * v0) / (first + (rest + z).unsqueeze(-1))).to(out.dtype)
        return result

    def _shares(self, kernel: Callable[..., Any], kwargs: dict[str, Any], values: Tensor, blocks: Tensor) -> Tensor:
        """Shares of the first token and of all others, [T, H, d] of which two channels count."""
        indicator = self._indicator(values)
        indicator[blocks, :, 0, 0] = 1
        indicator[blocks, :, 0, 1] = 0
        out = torch.empty_like(kwargs["output"])
        try:
            kernel(**{**kwargs, "value_cache": indicator, "output": out})
        finally:
            indicator[blocks, :, 0, 0] = 0
            indicator[blocks, :, 0, 1] = 1
        return out.view(out.shape[0], self.patch.num_heads, -1)

    def _indicator(self, values: Tensor) -> Tensor:
        """A value cache with the strides of the real one: the kernel walks it with the strides of the keys."""
        shape = (tuple(values.shape), values.stride(), values.dtype)
        if shape not in self.worker.scratch:
            nb, heads, size, d = values.shape
            whole = torch.zeros(nb, heads, 2 * size, d, dtype=values.dtype)
            made = whole.chunk(2, dim=2)[1]
            if made.stride() != values.stride():
                made = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype).zero_()
            made[..., 1] = 1
            self.worker.scratch[shape] = made
        return self.worker.scratch[shape]

    def _step(self, md: Any) -> Step:
        """Worked out by the first layer of a step that comes here with this metadata."""
        known = self.worker.steps.get(id(md))
        if known is not None and known[0] is md:
            return known[1]
        starts = md.query_start_loc
        rows = starts.shape[0] - 1
        lengths = md.seq_lens[:rows]
        first = md.block_table[:rows, 0].long()
        if self.worker.by_rows:
            slot = self.tables.row_slot[:rows]
        else:
            slot = self.tables.block_slot[first.clamp(min=0) // self.patch.block_ratio]
            slot = torch.where(first > 0, slot, NOBODY)
        counts = (starts[1:] - starts[:-1]).long()
        row = torch.repeat_interleave(torch.arange(rows), counts, output_size=int(md.num_actual_tokens))
        step = Step(first, lengths - counts, slot.long(), row, starts, lengths, bool((slot >= 0).any()))
        self.worker.steps[id(md)] = (md, step)
        return step
