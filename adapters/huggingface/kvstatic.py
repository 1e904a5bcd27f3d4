"""The cache layer of head groups with fixed shapes and in-place writes, for torch.compile and CUDA graphs.

The full group is as long as transformers' own static layer, the streaming group is a ring that is allocated whole. A decoding step,
and every traced call, works on tensors alone: slots and masks follow from a counter on the device. Eager calls of several queries
take the ways of :class:`~headpatch.adapters.huggingface.kvcache.KeptLayer`, without masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import kvring
from headpatch.adapters.huggingface.kvcache import KeptLayer
from headpatch.adapters.huggingface.kvparts import Bundle, Kept, Part, ordered
from headpatch.adapters.huggingface.kvplan import Policy
from headpatch.adapters.huggingface.kvrows import Chunk, Ledger
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import FirstKey
from headpatch.errors import EngineError

__all__ = ["StaticKeptLayer"]


class StaticKeptLayer(KeptLayer):
    """:class:`KeptLayer` in the place of a static layer.

    Attributes
    ----------
    max_cache_len
        Columns that the full group can hold.
    counter
        Columns so far, an int64 scalar on the device.
    whole
        Whether every slot of every row's ring is known to be filled: then no mask is needed.
    """

    is_compileable = True
    supports_early_init = True

    def __init__(self, policy: Policy, ledger: Ledger, index: int, replaced: Any) -> None:
        super().__init__(policy, ledger, index, replaced)
        self.max_cache_len = int(replaced.max_cache_len)
        self.counter = torch.tensor(0, dtype=torch.long)
        self.whole = False
        if replaced.is_initialized:  # generate() does so before a compiled prefill
            like = [replaced.keys[:, :, :0], replaced.values[:, :, :0]]
            replaced.keys = replaced.values = None
            replaced.is_initialized = False
            self.lazy_initialization(*like)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything."""
        super().lazy_initialization(key_states, value_states)
        slots = min(self.policy.window, self.max_cache_len)
        self.full = [self._empty(x.shape[1], self.max_cache_len, x.shape[3]) for x in self.full]
        self.streaming = [self._empty(x.shape[1], slots, x.shape[3]) for x in self.streaming]
        self.counter = self.counter.to(self.device)
        self.ledger.held[self.index] = self.bytes()
        if not torch.compiler.is_compiling():
            for x in (*self.full, *self.streaming, self.counter):
                torch._dynamo.mark_static_address(x)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As :meth:`KeptLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        chunk = self.ledger.chunk
        if chunk is None or chunk.queries != key_states.shape[2]:
            raise EngineError(
                f"cache layer {self.index} was given {key_states.shape[2]} columns outside a call of its model; call the model, with "
                "the cache that belongs to it"
            )
        if isinstance(chunk.past, int) and chunk.past + chunk.queries > self.max_cache_len:
            raise EngineError(
                f"a static cache of {self.max_cache_len} columns holds {chunk.past} and was given {chunk.queries} more; "
                "make it longer (max_cache_len)"
            )
        if chunk.queries > 1 and not torch.compiler.is_compiling():
            self.seen = int(chunk.past)
            bundles = self._take(chunk, key_states, value_states)
            least = min(self.ledger.counts, default=self.seen)
            self.whole = bool(self.streaming) and self.streaming[0].shape[2] == self.policy.window <= least
        else:
            n = len(self.policy.full)
            k, v = ordered(self.policy, key_states), ordered(self.policy, value_states)
            full = self._by_columns(chunk, k[:, :n], v[:, :n]) if n else None
            streaming = self._by_slots(chunk, k[:, n:], v[:, n:]) if self.policy.streaming else None
            bundles = [Bundle(full, streaming)]
        kept = Kept(bundles, key_states, value_states)
        self.counter.add_(chunk.queries)
        return kept, kept

    def _by_columns(self, chunk: Chunk, k: Tensor, v: Tensor) -> Part:
        """Write into the full group, and say who sees what of it."""
        columns = torch.arange(chunk.queries, device=k.device) + self.counter
        for buffer, new in zip(self.full, (k, v), strict=True):
            buffer.index_copy_(2, columns, new)
        slot = torch.arange(self.max_cache_len, device=k.device)
        real = None
        if chunk.real is not None:
            real = nn.functional.pad(chunk.real.to(k.device), (0, self.max_cache_len - chunk.real.shape[1]))
        elif chunk.pads is not None:
            real = slot >= chunk.pads.to(k.device)[:, None]

        def seen(i: int, j: int) -> Tensor:
            before = (slot <= columns[i:j, None])[None, None]
            return before if real is None else before & real[:, None, None]

        pads = torch.zeros(k.shape[0], dtype=torch.long, device=k.device) if chunk.pads is None else chunk.pads
        return Part(
            self.full[0], self.full[1], Visible("blocks", chunk.queries, self.max_cache_len, k.device, seen),
            FirstKey(pads.to(k.device)),
        )  # fmt: skip

    def _by_slots(self, chunk: Chunk, k: Tensor, v: Tensor) -> Part:
        """Write into the ring, and say who sees what of it and, for several queries, of the call's own tokens."""
        sink, recent, device = self.policy.sink, self.policy.recent, k.device
        past = self.counter.expand(k.shape[0])
        if chunk.lengths is not None:
            past = chunk.lengths.to(device)
        elif chunk.pads is not None:
            past = past - chunk.pads.to(device)
        slots = self.streaming[0].shape[2]
        zero = torch.zeros_like(past)
        if chunk.queries == 1:
            slot = torch.where(past < sink, past, sink + (past - sink) % recent).clamp_min(0)
            for buffer, x in zip(self.streaming, (k, v), strict=True):
                buffer.scatter_(2, slot.view(-1, 1, 1, 1).expand_as(x), x)
            if self.whole:
                return Part.of(self.streaming, Visible("all", 1, slots, device), FirstKey())
            held = (kvring.slot_positions(past + 1, slots, sink, recent) >= 0)[:, None, None]
            return Part.of(self.streaming, Visible("blocks", 1, slots, device, lambda i, j: held), FirstKey(zero))
        held = kvring.slot_positions(past, slots, sink, recent)
        fresh = past[:, None] + torch.arange(chunk.queries, device=device)
        position = torch.cat([held, fresh], 1)[:, None]
        keys = [torch.cat([buffer, new], 2) for buffer, new in zip(self.streaming, (k, v), strict=True)]

        def seen(i: int, j: int) -> Tensor:
            at = fresh[:, i:j, None]
            near = (position < sink) | (position > at - recent)
            return ((position >= 0) & (position <= at) & near)[:, None]

        after = kvring.slot_positions(past + chunk.queries, slots, sink, recent)
        new_here = ((after >= 0) & (after >= past[:, None]))[:, None, :, None]
        source = (after - past[:, None]).clamp(0, chunk.queries - 1)[:, None, :, None]
        for buffer, new in zip(self.streaming, (k, v), strict=True):
            taken = new.gather(2, source.expand(-1, new.shape[1], -1, new.shape[3]))
            buffer.copy_(torch.where(new_here, taken, buffer))
        first = torch.where(past > 0, zero, slots - past.clamp_max(0))
        return Part.of(keys, Visible("blocks", chunk.queries, slots + chunk.queries, device, seen), FirstKey(first))

    def get_seq_length(self) -> Any:
        """Columns so far: a tensor, once there is storage."""
        return self.counter if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """As an untouched static layer."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Columns that it can hold."""
        return self.max_cache_len

    def activate_past_recording(self) -> None:
        """Refused: a static cache does not take tokens back."""
        raise EngineError("tokens cannot be taken back from a static cache (assisted decoding); use a dynamic one")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for nothing."""
        if tokens_to_remove:
            self.activate_past_recording()

    def reset(self) -> None:
        """Forget everything; storage stays where it is."""
        for x in (*self.full, *self.streaming):
            x.zero_()
        self.counter.zero_()
        self.seen, self.whole = 0, False
        self.ledger.reset()
        if self.is_initialized:
            self.ledger.held[self.index] = self.bytes()
