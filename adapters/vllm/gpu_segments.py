"""Edits of attention to segments of keys on GPUs: one kernel a layer, for whatever rows and recipes come (graphs can hold it).

Which heads have an edit, and which, lies in :attr:`Tables.numbers <headpatch.adapters.vllm.tables.Tables>`; where a row's spans and
images are, in :class:`~headpatch.adapters.vllm.row_ranges.RowRanges`. Column sinks are marked in the blocks where their keys are,
when the prompt comes; after preemption, which frees those blocks, the prompt comes again and they are found again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.segment_numbers import marks_of
from headpatch.errors import UnsupportedModelError
from headpatch.kernels.paged_segments import ENTRIES, SCALARS, PagedSegments, scratch_numbers

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["GpuSegments"]


class GpuSegments:
    """The edits of one layer.

    Attributes
    ----------
    heads
        int64, this rank's query heads that a recipe may edit.
    marks
        Where column sinks are marked; None where no recipe of the engine looks for any in this layer.
    """

    def __init__(self, patch: LayerPatch) -> None:
        self.patch, worker, tables = patch, patch.worker, patch.worker.tables
        assert tables is not None
        assert tables.numbers is not None
        assert worker.ranges is not None
        if getattr(patch.impl, "sinks", None) is not None:
            raise UnsupportedModelError(
                f"layer {patch.index}: edits of attention to segments are not made beside learned sink logits on GPUs"
            )
        cache, d, later = patch.cache(), patch.head_dim, worker.armed.later_segments
        numbers = tables.numbers[patch.index, :, patch.start : patch.start + patch.num_heads]
        here = numbers.cpu()
        edited, marked = (here[..., SCALARS["live"]] != 0).any(0), marks_of(here).any(0)
        if later:
            edited, marked = torch.ones_like(edited), torch.ones_like(marked)
        every = tables.numbers[..., SCALARS["form"]]
        formed = later or bool((every != 0).any())
        after = later or bool((tables.numbers[..., 32:64] != 0).any())
        self.heads, self.marks = edited.nonzero()[:, 0], None
        self.kernel: PagedSegments | None = None
        if not len(self.heads):
            return
        mark_of = None
        if bool(marked.any()):
            # One byte a key and head that looks: beside keys and values about a hundredth, if all heads do.
            size = (cache.shape[0], int(marked.sum()), cache.shape[2])
            self.marks = torch.zeros(size, dtype=torch.uint8, device=cache.device)
            mark_of = (marked.cumsum(0) - 1).clamp_min(0).to(cache.device, torch.int32)
        try:
            self.kernel = PagedSegments(
                cache[..., :d], cache[..., d:], numbers,
                heads=self.heads.to(cache.device, torch.int32), row_slot=tables.row_slot, row_prompt=tables.row_prompt,
                ranges=worker.ranges.rows, bounds=worker.ranges.bounds, scratch=self._scratch(), scale=patch.scale,
                softcap=patch.softcap, window=patch.window, marks=self.marks, mark_of=mark_of, forms=formed, after=after,
                rows=tables.row_slot.shape[0],
            )  # fmt: skip
        except ValueError as error:
            raise UnsupportedModelError(
                f"layer {patch.index}: no kernel edits attention to segments here: {error}"
            ) from None
        self._warm(tables.row_slot)

    def __call__(
        self, query: Tensor, output: Tensor, lse: Tensor | None, table: Tensor, starts: Tensor, lengths: Tensor, one: bool
    ) -> None:  # fmt: skip
        """Put edited outputs in place of what the backend's kernel wrote.

        Parameters
        ----------
        query, output
            [T, H, d].
        lse
            [H, T] where there are :attr:`marks`.
        table, starts, lengths
            [rows, any], [rows + 1] and [rows], int32.
        one
            Whether no row has more than one token.
        """
        if self.kernel is None:
            return
        if self.marks is not None and not one:
            assert lse is not None
            self.kernel.mark(query, lse, table, starts, lengths)
        self.kernel(query, output, table, starts, lengths, one)

    def _scratch(self) -> Tensor:
        """Memory that all layers of one width share: they run one after the other."""
        scratch, d = self.patch.worker.scratch, self.patch.head_dim
        key = ("segments", d)
        if key not in scratch:
            scratch[key] = torch.zeros(scratch_numbers(d), device=self.patch.layer_device())
        found: Tensor = scratch[key]
        return found

    def _warm(self, row_slot: Tensor) -> None:
        """Compile every form of the kernel that a batch may ask for: none while serving, and none while a graph is captured."""
        patch, kernel = self.patch, self.kernel
        assert kernel is not None
        worker, device, most = patch.worker, patch.layer_device(), int(row_slot.shape[0]) - 1
        key = ("warm", kernel.key, len(self.heads))
        if key in worker.scratch:
            return
        worker.scratch[key] = True
        many = ENTRIES // (2 * len(self.heads)) + 1  # so many tokens that no keys are shared
        for tokens, rows in ((1, 1), (many, many), (2, 1), (many, -(-many // 4)), (8, 1), (many, 1)):
            if tokens > most:
                continue
            like: dict[str, Any] = {"dtype": patch.layer.dtype, "device": device}
            q, out = (torch.zeros(tokens, patch.num_heads, patch.head_dim, **like) for _ in range(2))
            table = torch.zeros(rows, 1, dtype=torch.int32, device=device)
            starts = torch.full((rows + 1,), tokens, dtype=torch.int32, device=device)
            lse = torch.zeros(patch.num_heads, tokens, device=device)
            self(q, out, lse, table, starts, table[:, 0], tokens == rows)
