"""A cache layer whose KV heads keep different tokens, on transformers' own protocol.

The full group grows in blocks of at most :data:`BLOCK` tokens; the streaming group is a ring behind its sinks
(:mod:`headpatch.adapters.huggingface.kvring`) and stops growing. :meth:`KeptLayer.update` stores a call's tokens and gives
attention a :class:`~headpatch.adapters.huggingface.kvparts.Kept` in place of keys and values: what each group's queries may look
at, the tokens that this very call pushes out of the ring included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headpatch.adapters.huggingface import kvring
from headpatch.adapters.huggingface.kvparts import Bundle, Kept, Part, Window, bytes_of, ordered, tail
from headpatch.adapters.huggingface.kvplan import Policy
from headpatch.adapters.huggingface.kvrows import Chunk, Ledger
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import FirstKey
from headpatch.errors import EngineError

__all__ = ["BLOCK", "SPARE", "KeptLayer"]

BLOCK = 256
"""Tokens by which storage grows."""
SPARE = 256
"""Slots that a ring has beyond its window while drafts may be taken back (assisted decoding)."""


class KeptLayer(CacheLayerMixin):
    """Cache layer of one attention layer under a policy.

    Attributes
    ----------
    policy, ledger
        Which heads keep what, and what all layers of the cache share.
    index
        The layer's number in the cache.
    replaced
        The empty layer that stood here before: it comes back when the recipe is off and the cache was reset.
    inner
        A layer of transformers' own that stores the full group (quantised, say); None: storage of our own.
    seen
        Columns so far.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, policy: Policy, ledger: Ledger, index: int, replaced: Any, inner: Any = None) -> None:
        super().__init__()
        self.policy, self.ledger, self.index, self.replaced, self.inner = policy, ledger, index, replaced, inner
        self.seen = 0
        self.ring = policy.recent
        self.floor = 0
        self.record_past = False
        self.leads = not ledger.per_column
        ledger.per_column[index] = 0
        self.full: list[Tensor] = []
        self.streaming: list[Tensor] = []

    # --- storage ----------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over shape, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        if key_states.shape[1] != self.policy.num_kv_heads:
            raise EngineError(
                f"cache layer {self.index}: the model brings {key_states.shape[1]} KV heads, the recipe was resolved for "
                f"{self.policy.num_kv_heads}; start with an empty cache"
            )
        n = len(self.policy.full)
        widths = (key_states.shape[-1], value_states.shape[-1])
        self.full = [self._empty(n, 0, d) for d in widths] if n and self.inner is None else []
        self.streaming = (
            [self._empty(self.policy.num_kv_heads - n, 0, d) for d in widths] if self.policy.streaming else []
        )
        self.ledger.per_column[self.index] = (
            self.batch_size * self.policy.num_kv_heads * sum(widths) * key_states.element_size()
        )
        self.is_initialized = True

    def _empty(self, heads: int, slots: int, width: int, rows: int | None = None) -> Tensor:
        size = (self.batch_size if rows is None else rows, heads, slots, width)
        try:
            # Zeros, because slots that a mask hides are read all the same.
            return torch.zeros(size, dtype=self.dtype, device=self.device)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            need = math.prod(size) * self.dtype.itemsize / 2**20
            raise EngineError(
                f"out of memory: cache layer {self.index} needs {need:,.0f} MiB for {slots} tokens of {heads} KV heads on "
                f"{self.device}. Start with an empty cache and fewer tokens or rows, or let fewer heads keep everything"
            ) from error

    def _room(self, buffers: list[Tensor], used: int, wanted: int, most: int | None = None) -> list[Tensor]:
        """Buffers with `wanted` slots, grown by blocks, of which `used` are taken over."""
        if not buffers or buffers[0].shape[2] >= wanted:
            return buffers
        slots = -(-wanted // BLOCK) * BLOCK
        slots = slots if most is None else min(slots, most)
        grown = []
        for old in buffers:
            new = self._empty(old.shape[1], slots, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            grown.append(new)
        return grown

    def bytes(self) -> int:
        """Bytes of all storage, spare slots included."""
        mine = sum(x.untyped_storage().nbytes() for x in (*self.full, *self.streaming))
        return mine + (0 if self.inner is None else bytes_of(self.inner))

    # --- a call -----------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store a call's tokens; what its queries may look at comes back, twice, in place of keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        chunk = self._chunk(key_states)
        kept = Kept(self._take(chunk, key_states, value_states), key_states, value_states)
        return kept, kept

    def _chunk(self, key_states: Tensor) -> Chunk:
        """What the running call adds; an error outside one."""
        chunk = self.ledger.chunk
        if chunk is None or chunk.past != self.seen or chunk.queries != key_states.shape[2]:
            raise EngineError(
                f"cache layer {self.index} holds {self.seen} columns and was given {key_states.shape[2]} outside a call of its "
                "model; call the model, with the cache that belongs to it"
            )
        return chunk

    def _take(self, chunk: Chunk, key_states: Tensor, value_states: Tensor) -> list[Bundle]:
        """Store a call's tokens, whose number on the host is known."""
        policy, n = self.policy, len(self.policy.full)
        k, v = ordered(policy, key_states), ordered(policy, value_states)
        full = self._store_full(k[:, :n], v[:, :n]) if n else (k[:, :0], v[:, :0])
        if chunk.even:
            bundles = [self._even(chunk, full, k[:, n:], v[:, n:])]
        elif not chunk.spans:
            bundles = [self._step(chunk, full, k[:, n:], v[:, n:])]
        else:
            bundles = self._rows(chunk, full, k[:, n:], v[:, n:])
        self.seen += chunk.queries
        self.ledger.held[self.index] = self.bytes()
        return bundles

    def _store_full(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the full group; all of it, [b, h, n, d]."""
        if self.inner is not None:
            held: tuple[Tensor, Tensor] = self.inner.update(k, v)
            return held
        stop = self.seen + k.shape[2]
        self.full = self._room(self.full, self.seen, stop)
        for buffer, new in zip(self.full, (k, v), strict=True):
            buffer[:, :, self.seen : stop] = new
        return self.full[0][:, :, :stop], self.full[1][:, :, :stop]

    def _even(self, chunk: Chunk, full: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Bundle:
        """All rows at once: none has padding."""
        past, stop = self.seen, self.seen + chunk.queries
        part = Part.of(full, tail(past, chunk.queries, k.device), FirstKey()) if self.policy.full else None
        if not self.policy.streaming:
            return Bundle(part, None)
        if chunk.queries == 1:
            self._write(k, v, past, stop)
            return Bundle(part, self._slots(stop))
        window = self._window(k, v, past, stop)
        self._write(k, v, past, stop)
        return Bundle(part, window)

    def _rows(self, chunk: Chunk, full: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> list[Bundle]:
        """Row by row, each with its real tokens alone."""
        bundles = []
        longest = max((span.past + span.new for span in chunk.spans), default=0)
        self._make_room(longest)
        for span in chunk.spans:
            if not span.new:
                continue
            at, past, stop = slice(span.row, span.row + 1), span.past, span.past + span.new
            part = None
            if self.policy.full:
                mine = [x[at, :, span.keys] for x in full]
                part = Part.of(mine, tail(past, span.new, k.device), FirstKey())
            window = None
            if self.policy.streaming:
                new = [x[at, :, span.queries] for x in (k, v)]
                window = self._window(new[0], new[1], past, stop, at)
                for buffer, x in zip(self.streaming, new, strict=True):
                    kvring.write(buffer[at], x, past, self.policy.sink, self.ring)
            bundles.append(Bundle(part, window, span.row, span.queries))
        self._note(max(span.past + span.new for span in chunk.spans))
        return bundles

    def _step(self, chunk: Chunk, full: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Bundle:
        """One token a row, of rows that hold different numbers of tokens."""
        real, lengths, pads = (x.to(k.device) for x in (chunk.real, chunk.lengths, chunk.pads) if x is not None)
        part = None
        if self.policy.full:
            mask = real[:, None, None]
            part = Part.of(full, Visible("blocks", 1, mask.shape[-1], k.device, lambda i, j: mask), FirstKey(pads))
        if not self.policy.streaming:
            return Bundle(part, None)
        self._make_room(max(chunk.counts) + 1)
        sink, ring = self.policy.sink, self.ring
        slot = torch.where(lengths < sink, lengths, sink + (lengths - sink) % ring)
        for buffer, x in zip(self.streaming, (k, v), strict=True):
            buffer.scatter_(2, slot.view(-1, 1, 1, 1).expand_as(x), x)
        self._note(max(chunk.counts) + 1)
        held, first = self.streaming, FirstKey(torch.zeros_like(pads))
        if min(chunk.counts) + 1 >= sink + ring and ring == self.policy.recent:
            return Bundle(part, Part.of(held, Visible("all", 1, held[0].shape[2], k.device), FirstKey()))
        position = kvring.slot_positions(lengths + 1, held[0].shape[2], sink, ring)
        near = position > (lengths - self.policy.recent)[:, None]
        seen = ((position >= 0) & (near | (position < sink)))[:, None, None]
        return Bundle(part, Part.of(held, Visible("blocks", 1, seen.shape[-1], k.device, lambda i, j: seen), first))

    # --- the streaming group ----------------------------------------------------------------------------------------------

    def _make_room(self, stop: int) -> None:
        most = self.policy.sink + self.ring
        used = self.streaming[0].shape[2] if self.streaming else 0
        self.streaming = self._room(self.streaming, used, min(stop, most), most)

    def _write(self, k: Tensor, v: Tensor, past: int, stop: int) -> None:
        self._make_room(stop)
        for buffer, new in zip(self.streaming, (k, v), strict=True):
            kvring.write(buffer, new, past, self.policy.sink, self.ring)
        self._note(stop)

    def _note(self, stop: int) -> None:
        """Remember from which position on the ring is whole."""
        self.floor = max(self.floor, stop - self.ring)

    def _slots(self, stop: int) -> Part:
        """All that is held, for the one query at position stop - 1, whose token is in already."""
        sink, recent = self.policy.sink, self.policy.recent
        k, v = (x[:, :, : min(stop, sink + self.ring)] for x in self.streaming)
        if self.ring == recent or stop <= sink + recent:
            return Part(k, v, Visible("all", 1, k.shape[2], k.device), FirstKey())
        lengths = torch.full((1,), stop, device=k.device)
        position = kvring.slot_positions(lengths, k.shape[2], sink, self.ring)
        seen = ((position < sink) | (position >= stop - recent))[:, None, None]
        first = FirstKey(torch.zeros(k.shape[0], dtype=torch.long, device=k.device))
        return Part(k, v, Visible("blocks", 1, k.shape[2], k.device, lambda i, j: seen), first)

    def _window(self, k: Tensor, v: Tensor, past: int, stop: int, rows: slice = slice(None)) -> Window:
        """What the queries past..stop see of the ring and of their own tokens; taken before those are written."""
        sink, start = self.policy.sink, max(0, past - self.policy.recent + 1)
        both = []
        for buffer, new in zip(self.streaming, (k, v), strict=True):
            held = kvring.read(buffer[rows], start, past, sink, self.ring)
            x = torch.cat([*held, new], 2) if held else new
            # Sinks that are older than the window: those slots are never written again.
            first = buffer[rows][:, :, :sink] if start > 0 else x[:, :, :sink]
            if 0 < start < sink:  # some of them are in the ring's part, or came in this very call
                first = torch.cat([buffer[rows][:, :, :start], x[:, :, : sink - start]], 2)
            both.append((first, x))
        return Window(both[0][0], both[1][0], both[0][1], both[1][1], start, past, stop)

    # --- transformers' protocol -------------------------------------------------------------------------------------------

    def get_seq_length(self) -> Any:
        """Columns seen, whatever is held of them: what positions follow from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """As an untouched layer: masks say which tokens are real, not which are held."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Keep spare slots, so that tokens can be taken back."""
        self.record_past = True
        sink, recent = self.policy.sink, self.policy.recent
        if self.ring > recent or not self.policy.streaming:
            return
        if self.seen > sink + recent:
            if self.ledger.counts:
                raise EngineError(
                    "a cache of padded rows that was filled before cannot be made ready for assisted decoding"
                )
            wider = []
            for old in self.streaming:
                new = self._empty(old.shape[1], sink + recent + SPARE, old.shape[3])
                new[:, :, :sink] = old[:, :, :sink]
                held = torch.cat(kvring.read(old, self.seen - recent, self.seen, sink, recent), 2)
                kvring.write(new, held, self.seen - recent, sink, recent + SPARE)
                wider.append(new)
            self.streaming = wider
        self.ring = recent + SPARE

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number of them, or what is to stay in all).

        Raises EngineError where streaming heads have dropped what they would have to see again.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if not count:
            return
        left = self.seen - count
        if self.policy.streaming and self.floor > max(self.policy.sink, left - self.policy.recent + 1):
            raise EngineError(
                f"cannot take back {count} tokens: streaming heads keep the last {self.policy.recent} and have {self.ring} slots for "
                "them. Start with an empty cache, or draft fewer tokens at once (num_assistant_tokens)"
            )
        if self.inner is not None:
            raise EngineError("tokens cannot be taken back from a quantised cache")
        self.seen = left
        if self.leads:
            self.ledger.crop(count)

    def reset(self) -> None:
        """Forget everything; storage is freed."""
        self.full, self.streaming, self.is_initialized = [], [], False
        self.seen, self.floor, self.ring, self.record_past = 0, 0, self.policy.recent, False
        self.ledger.reset()
        if self.inner is not None:
            self.inner.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of a beam search in their new order."""
        self._choose(beam_idx)
        if self.inner is not None:
            self.inner.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._refuse_rows()
        self._choose(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.is_initialized:
            self._refuse_rows()
            self._choose(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def _refuse_rows(self) -> None:
        """Quantised layers of transformers' own would do it to their unquantised rest alone."""
        if self.inner is not None:
            raise EngineError("rows of a quantised cache can be reordered, not repeated or chosen; use a DynamicCache")

    def _choose(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        self.full = [x.index_select(0, rows) for x in self.full]
        self.streaming = [x.index_select(0, rows) for x in self.streaming]
        self.ledger.per_column[self.index] = self.ledger.per_column[self.index] // self.batch_size * len(rows)
        self.batch_size = len(rows)
        self.ledger.held[self.index] = self.bytes()
        if self.leads:
            self.ledger.choose(rows)

    def offload(self) -> None:
        """Refused: see :mod:`headpatch.adapters.huggingface.kvadopt`."""
        raise EngineError("an offloaded cache does not go with a cache policy")

    prefetch = offload
