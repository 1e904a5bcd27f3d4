"""The tables that kernels read, at addresses that never change: captured graphs see what is written into them later.

Recipe slots hold constants, one row a recipe; a request's slot is found by the first block of its keys (``block_slot``), which only
requests of one recipe share, because their prefix-cache salts differ otherwise. What belongs to a request alone
(its prompt's length) is found by its row of the batch (``row_slot``, ``row_prompt``), written before each step whose order changed;
so is the slot where first blocks leave the window, and on GPUs, where a look-up less is time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headpatch.adapters.vllm.plan import LayerEdits, RowEdit, compile_recipe
from headpatch.adapters.vllm.segment_numbers import numbers
from headpatch.errors import EngineError
from headpatch.kernels.affine import ALWAYS
from headpatch.kernels.paged_segments import WIDTH

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe

__all__ = ["NOBODY", "Slot", "Tables"]

NOBODY = -1
"""Slot of requests without a recipe."""


@dataclass
class Slot:
    """A recipe that has a row in the tables.

    Attributes
    ----------
    key
        Content of the recipe.
    pinned
        Whether it stays though no request uses it.
    users
        Requests that use it.
    edits
        What it does, by layer.
    rows
        Its output edits that differ from row to row, on this rank's heads and device, by layer and place (see :class:`Tables`).
    segments
        Its edits of attention to segments, likewise.
    """

    key: str
    pinned: bool
    users: int = 0
    edits: dict[int, LayerEdits] = field(default_factory=dict)
    rows: dict[tuple[int, int], list[RowEdit]] = field(default_factory=dict)
    segments: dict[tuple[int, int], list[RowEdit]] = field(default_factory=dict)


class Tables:
    """The tables of one engine on one rank.

    `segments`: edits of attention to segments are kept as numbers.

    `local` says by layer which of the model's heads are here, in the order of the tables, in one sequence for each part of the layer
    that runs by itself; a part is known by where its heads begin.

    Attributes
    ----------
    weight, scale
        [layers, slots, heads] fp32, this rank's heads; see :class:`~headpatch.adapters.vllm.plan.LayerEdits`.
    factor, shift, start, stop
        [layers, slots, heads], [layers, slots, heads, d] fp32 (None where no recipe may have vectors) and [layers, slots] int64:
        edits of some positions; see :class:`~headpatch.adapters.vllm.plan.Affine`. A slot without any has an empty range.
    numbers
        [layers, slots, heads, any] fp32, edits of attention to segments as :mod:`headpatch.adapters.vllm.segment_numbers` has them;
        None where those are code (CPUs) or none is armed.
    block_slot
        [blocks] int32: slot by first block, in the blocks of the engine's block pool.
    row_slot, row_prompt
        [rows] int32 and int64: slot and prompt length by row of the batch.
    """

    def __init__(
        self, shape: ModelShape, local: Sequence[Sequence[Sequence[int]]], slots: int, blocks: int, rows: int,
        device: torch.device, vectors: bool = False, segments: bool = False,
    ) -> None:  # fmt: skip
        heads = max((sum(map(len, parts)) for parts in local), default=0)
        self.shape, self.local, self.device = shape, list(local), device
        self.weight = torch.ones(len(local), slots, heads, device=device)
        self.scale = torch.ones(len(local), slots, heads, device=device)
        self.factor = torch.ones(len(local), slots, heads, device=device)
        width = max(shape.parts[shape.main].head_dim)
        self.shift = torch.zeros(len(local), slots, heads, width, device=device) if vectors else None
        size = (len(local), slots, heads, WIDTH)
        self.numbers = torch.zeros(size, device=device) if segments else None
        self.start = torch.zeros(len(local), slots, dtype=torch.int64, device=device)
        self.stop = torch.zeros_like(self.start)
        self.block_slot = torch.full((blocks,), NOBODY, dtype=torch.int32, device=device)
        self.row_slot = torch.full((rows,), NOBODY, dtype=torch.int32, device=device)
        self.row_prompt = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots: list[Slot | None] = [None] * slots
        self.by_key: dict[str, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._rows: tuple[tuple[int, int], ...] = ()

    def put(self, recipe: Recipe, pinned: bool = False) -> int:
        """Give a recipe a row; an idle recipe, the longest unused first, makes way.

        Raises
        ------
        EngineError
            All are in use: the front end counts, so that this does not happen.
        """
        if recipe.digest in self.by_key:
            return self.by_key[recipe.digest]
        free = next((i for i, slot in enumerate(self.slots) if slot is None), None)
        if free is None:
            if not self._idle:
                raise EngineError(
                    "headpatch: every recipe slot is in use; this is a bug in headpatch, please report it"
                )
            free, _ = self._idle.popitem(last=False)
            old = self.slots[free]
            assert old is not None
            del self.by_key[old.key]
        slot = Slot(recipe.digest, pinned, edits=compile_recipe(recipe, self.shape))
        self._write(free, slot)
        self.slots[free] = slot
        self.by_key[recipe.digest] = free
        if not pinned:
            self._idle[free] = None
        return free

    def _write(self, index: int, slot: Slot) -> None:
        weight = torch.ones(self.weight.shape[0], self.weight.shape[2])
        scale, factor = torch.ones_like(weight), torch.ones_like(weight)
        shift = None if self.shift is None else torch.zeros(*weight.shape, self.shift.shape[3])
        start, stop = (torch.zeros(len(weight), dtype=torch.int64) for _ in range(2))
        made = None if self.numbers is None else torch.zeros(*weight.shape, WIDTH)
        for layer, edits in slot.edits.items():
            if edits.affine is not None:
                low, high = edits.affine.span
                start[layer] = -ALWAYS if low is None else low
                stop[layer] = ALWAYS if high is None else high
                if edits.affine.shift is not None and shift is None:
                    raise EngineError(
                        "headpatch: a recipe with vectors came where none was promised; please report it"
                    )
            begin = 0
            for part in self.local[layer]:
                here, end = list(part), begin + len(part)
                for table, values in ((weight, edits.weight), (scale, edits.scale)):
                    if values is not None:
                        table[layer, begin:end] = values[here]
                if edits.affine is not None:
                    factor[layer, begin:end] = edits.affine.factor[here]
                    if edits.affine.shift is not None and shift is not None:
                        mine = edits.affine.shift[here]
                        shift[layer, begin:end, : mine.shape[1]] = mine
                for by_place, listed in ((slot.rows, edits.rows), (slot.segments, edits.segments)):
                    found = [local for edit in listed if (local := edit.local(here)) is not None]
                    by_place[layer, begin] = [edit.to(self.device) for edit in found]
                if made is not None and found:
                    made[layer, begin:end] = numbers(found, len(here))
                begin = end
        self.weight[:, index].copy_(weight)
        self.scale[:, index].copy_(scale)
        self.factor[:, index].copy_(factor)
        self.start[:, index].copy_(start)
        self.stop[:, index].copy_(stop)
        if self.shift is not None and shift is not None:
            self.shift[:, index].copy_(shift)
        if self.numbers is not None and made is not None:
            self.numbers[:, index].copy_(made)

    def use(self, index: int) -> None:
        """One more request uses a slot."""
        slot = self.slots[index]
        assert slot is not None
        slot.users += 1
        self._idle.pop(index, None)

    def release(self, index: int) -> None:
        """One request less uses it."""
        slot = self.slots[index]
        assert slot is not None
        assert slot.users > 0
        slot.users -= 1
        if not slot.users and not slot.pinned:
            self._idle[index] = None

    def live(self) -> dict[int, Slot]:
        """Slots that requests use now."""
        return {i: slot for i, slot in enumerate(self.slots) if slot is not None and slot.users}

    def mark_blocks(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Write ``block_slot``; block 0 is nobody's (the null block)."""
        pairs = [(b, s) for b, s in zip(blocks, slots, strict=True) if b > 0]
        if not pairs:
            return
        index, value = zip(*pairs, strict=True)
        self.block_slot[self._on_device(index, torch.int64)] = self._on_device(value, torch.int32)

    def order(self, rows: Sequence[tuple[int, int]]) -> None:
        """Write slot and prompt length of the rows of the next step; nothing is copied where they are as they were."""
        new = tuple(rows)
        if new == self._rows:
            return
        # Rows that were there before and are no more must be nobody's: padding rows of a captured graph read them.
        padded = [*new, *[(NOBODY, 0)] * max(0, len(self._rows) - len(new))]
        self._rows = new
        slots, prompts = zip(*padded, strict=True) if padded else ((), ())
        self.row_slot[: len(padded)].copy_(self._on_device(slots, torch.int32), non_blocking=True)
        self.row_prompt[: len(padded)].copy_(self._on_device(prompts, torch.int64), non_blocking=True)

    def _on_device(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        cuda = self.device.type == "cuda"
        host = torch.tensor(list(values), dtype=dtype, pin_memory=cuda)
        return host.to(self.device, non_blocking=True) if cuda else host
