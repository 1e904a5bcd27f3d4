"""The cache layer of policies that choose tokens: it holds the whole prompt until that ends, and then what each head keeps.

Heads of one row that keep equally many tokens lie in one dense block, and so do rows whose heads do so alike: attention then runs on
a few calls without masks. Every later token is appended to all of them, in blocks of at most
:data:`~headpatch.adapters.huggingface.kvcache.BLOCK` tokens. What a row keeps depends on no other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import mass
from headpatch.adapters.huggingface.discover import output_projection
from headpatch.adapters.huggingface.kvcache import BLOCK, KeptLayer
from headpatch.adapters.huggingface.kvparts import Kept, Part, Picked, Slice, pick, picked, tail
from headpatch.adapters.huggingface.kvplan import Policy
from headpatch.adapters.huggingface.kvrows import Chunk, Ledger
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import FirstKey
from headpatch.adapters.huggingface.statistics import CallStatistics
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.rows import Rows

__all__ = ["SelectLayer"]


@dataclass
class Block:
    """Rows and KV heads that keep equally many tokens: [rows, heads, slots, d], of which `used` are."""

    rows: tuple[int, ...]
    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    used: int


class SelectLayer(KeptLayer):
    """:class:`KeptLayer` of one attention layer under a policy that chooses tokens.

    Attributes
    ----------
    blocks
        What is kept; empty until the prompt has ended.
    added
        Columns that came since then, or since heads were last cut back.
    tails
        Per row, the prompt's last queries [H, *, d] so far, if the policy looks at them.
    """

    def __init__(self, policy: Policy, ledger: Ledger, index: int, replaced: Any) -> None:
        super().__init__(policy, ledger, index, replaced)
        self.blocks: list[Block] = []
        self.added = 0
        self.tails: list[Tensor] = []
        self._known: dict[Any, tuple[Picked, Picked, Picked, tuple[int, ...]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As :meth:`KeptLayer.update`."""
        if torch.compiler.is_compiling():
            raise EngineError(
                "a policy that chooses tokens cannot run in a compiled call: how many a head keeps depends on data"
            )
        if not self.blocks:
            kept, _ = super().update(key_states, value_states)
            kept.after = self._after
            return kept, kept
        chunk = self._chunk(key_states)
        if any(span.new != chunk.queries for span in chunk.spans):
            raise EngineError(
                "attention_mask hides tokens after the prompt, of which a cache policy has already chosen"
            )
        for block in self.blocks:
            self._append(block, key_states, value_states)
        self.seen += chunk.queries
        self.added += chunk.queries
        self.ledger.held[self.index] = self.bytes()
        slices = tuple(self._slice(block, chunk.queries) for block in self.blocks)
        interval = self._method.interval
        kept = Kept([], key_states, value_states, slices, self._again if 0 < interval <= self.added else None)
        return kept, kept

    @property
    def _method(self) -> Any:
        return self.policy.selection

    def _append(self, block: Block, key_states: Tensor, value_states: Tensor) -> None:
        stop = block.used + key_states.shape[2]
        block.k, block.v = self._room([block.k, block.v], block.used, stop)
        rows, heads = self._places(block)[:2]
        for buffer, new in ((block.k, key_states), (block.v, value_states)):
            buffer[:, :, block.used : stop] = pick(pick(new, 0, rows), 1, heads)
        block.used = stop

    def _room(self, buffers: list[Tensor], used: int, wanted: int, most: int | None = None) -> list[Tensor]:
        rows = self.batch_size
        if buffers:
            self.batch_size = buffers[0].shape[0]  # a block has rows of its own
        try:
            return super()._room(buffers, used, wanted, most)
        finally:
            self.batch_size = rows

    def _places(self, block: Block) -> tuple[Picked, Picked, Picked, tuple[int, ...]]:
        """Where a block's rows, KV heads and query heads lie in a call, and the query heads' numbers."""
        key = (block.rows, block.heads)
        if key not in self._known:
            groups, kv_heads = self.policy.groups, self.policy.num_kv_heads
            heads = tuple(kv * groups + g for kv in block.heads for g in range(groups))
            rows = picked(block.rows, self.batch_size, self.device)
            at = picked(block.heads, kv_heads, self.device)
            self._known[key] = (rows, at, picked(heads, kv_heads * groups, self.device), heads)
        return self._known[key]

    def _slice(self, block: Block, queries: int) -> Slice:
        rows, _, places, heads = self._places(block)
        k, v = block.k[:, :, : block.used], block.v[:, :, : block.used]
        return Slice(rows, places, heads, Part(k, v, tail(block.used - queries, queries, k.device), FirstKey()))

    # --- choosing ---------------------------------------------------------------------------------------------------------

    def _after(
        self, module: nn.Module, state: LayerState, rows: Rows, query: Tensor, scale: float, softcap: float | None,
        sinks: Tensor | None,
    ) -> None:  # fmt: skip
        """Once a call of the prompt was attended to: remember its last queries, and choose where the prompt ends."""
        chunk = self.ledger.chunk
        assert chunk is not None
        if "window_scores" in self._method.operands():
            self._remember(chunk, query)
        if not self._ended(chunk, rows):
            return
        chosen: list[tuple[Tensor, Tensor]] = []
        kept: list[tuple[Tensor, ...]] = []
        for row in range(self.batch_size):
            k, v = self._row(chunk, row)
            chosen.append((k, v))
            kept.append(self._method.select(self._operands(module, state, row, k, v, scale, softcap, sinks)))
        self._keep(chosen, kept)

    def _ended(self, chunk: Chunk, rows: Rows) -> bool:
        """Whether this call ends the prompt: as generate() or inputs(prompt_len=...) says, else the first call does."""
        given = rows.known.get("prompt_len")
        if given is None:
            return True
        lengths = torch.as_tensor(given).tolist()
        if not lengths or self.batch_size % len(lengths):
            raise EngineError(
                f"inputs(prompt_len=...) has {len(lengths)} entries, the batch has {self.batch_size} rows: give one per row"
            )
        had = self.ledger.counts or (self.seen,) * self.batch_size
        lengths = [n for n in lengths for _ in range(self.batch_size // len(lengths))]
        if any(n > length for n, length in zip(had, lengths, strict=True)):
            raise EngineError("a policy that chooses tokens needs a call that ends where the prompt ends (prompt_len)")
        return had == tuple(lengths)

    def _remember(self, chunk: Chunk, query: Tensor) -> None:
        window = int(self._method.window)
        fresh = [query[row] for row in range(self.batch_size)]
        if chunk.spans:
            fresh = [q[:, span.queries] for q, span in zip(fresh, chunk.spans, strict=True)]
        before = self.tails or [q[:, :0] for q in fresh]
        self.tails = [torch.cat([a, b[:, -window:]], 1)[:, -window:] for a, b in zip(before, fresh, strict=True)]

    def _row(self, chunk: Chunk, row: int) -> tuple[Tensor, Tensor]:
        """A row's real tokens, [1, K, n, d]."""
        k, v = (x[row : row + 1, :, : self.seen] for x in self.full)
        if chunk.real is None:
            return k, v
        at = chunk.real[row].nonzero().squeeze(-1).to(k.device)
        return k.index_select(2, at), v.index_select(2, at)

    def _operands(
        self, module: nn.Module, state: LayerState, row: int, k: Tensor, v: Tensor, scale: float, softcap: float | None,
        sinks: Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        """What the policy reads, of one row."""
        asked, given = self._method.operands(), {"k": k, "v": v, "depth": self.policy.depth}
        if "o_proj" in asked:
            given["o_proj"] = output_projection(module, state.num_heads, state.name)
        if "window_scores" in asked:
            q = self.tails[row][None]
            n, n_q = k.shape[2], q.shape[2]
            seen = Visible("tail", n_q, n, k.device)
            call = mass.Call(q, k, v, seen, scale, softcap, sinks, FirstKey())
            given["window_scores"] = CallStatistics(module, state, call, None).window_scores(n_q)
        return given

    def _keep(self, chosen: list[tuple[Tensor, Tensor]], kept: list[tuple[Tensor, ...]]) -> None:
        """Store what was chosen of each row's keys and values, and free the rest. Rows whose heads keep equally many lie together."""
        places: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for row, of_heads in enumerate(kept):
            lengths = [len(x) for x in of_heads]
            for length in sorted(set(lengths)):
                heads = tuple(h for h, n in enumerate(lengths) if n == length)
                places.setdefault((heads, length), []).append(row)
        blocks = []
        for (heads, length), rows in places.items():
            slots = max(BLOCK, -(-length // BLOCK) * BLOCK)
            both = []
            for which in (0, 1):
                of_rows = [found[which] for found in chosen]
                width = of_rows[0].shape[-1]
                buffer = self._empty(len(heads), slots, width, len(rows))
                for i, row in enumerate(rows):
                    for j, head in enumerate(heads):
                        buffer[i, j, :length] = of_rows[row][0, head].index_select(0, kept[row][head])
                both.append(buffer)
            blocks.append(Block(tuple(rows), heads, both[0], both[1], length))
        self.blocks, self.full, self.tails, self.added = blocks, [], [], 0
        self._known.clear()
        self.ledger.held[self.index] = self.bytes()

    def _again(self, *_: Any) -> None:
        """Cut every head back to its budget."""
        had = self.ledger.counts or (self.seen,) * self.batch_size
        for block in self.blocks:
            kept = [
                [self._method.thin(block.k[i, j, : block.used], had[row]) for j in range(len(block.heads))]
                for i, row in enumerate(block.rows)
            ]
            length = len(kept[0][0])
            if any(len(x) != length for of_row in kept for x in of_row):
                raise EngineError(f"{self._method.name}: heads of one length were cut back to different lengths")
            slots = max(BLOCK, -(-length // BLOCK) * BLOCK)
            for name in ("k", "v"):
                old = getattr(block, name)
                new = self._empty(old.shape[1], slots, old.shape[3], old.shape[0])
                for i, of_row in enumerate(kept):
                    for j, at in enumerate(of_row):
                        new[i, j, :length] = old[i, j].index_select(0, at)
                setattr(block, name, new)
            block.used = length
        self.added = 0
        self.ledger.held[self.index] = self.bytes()

    # --- transformers' protocol -------------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes of all storage, spare slots included."""
        return super().bytes() + sum(x.untyped_storage().nbytes() for block in self.blocks for x in (block.k, block.v))

    def activate_past_recording(self) -> None:
        """Nothing to prepare: what came after the prompt can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens that came since the prompt ended, or since heads were last cut back."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if not count:
            return
        if self.blocks and count > self.added:
            raise EngineError(
                f"cannot take back {count} tokens: a policy has chosen what to keep {self.added} tokens ago. Start with an empty "
                "cache"
            )
        for block in self.blocks:
            block.used -= count
        self.added -= count if self.blocks else 0
        self.seen -= count
        if self.leads:
            self.ledger.crop(count)

    def reset(self) -> None:
        """Forget everything; storage is freed."""
        super().reset()
        self.blocks, self.tails, self.added = [], [], 0
        self._known.clear()

    def _choose(self, rows: Tensor) -> None:
        super()._choose(rows)
        order, blocks = rows.tolist(), []
        for block in self.blocks:
            mine = [(new, block.rows.index(old)) for new, old in enumerate(order) if old in block.rows]
            if mine:
                at = torch.tensor([i for _, i in mine], device=self.device)
                k, v = block.k.index_select(0, at), block.v.index_select(0, at)
                blocks.append(Block(tuple(new for new, _ in mine), block.heads, k, v, block.used))
        self.blocks = blocks
        self.tails = [self.tails[i] for i in order] if self.tails else []
        self._known.clear()
        if self.is_initialized:
            self.ledger.held[self.index] = self.bytes()
