"""What one attention call says of itself: positions of its queries, log-sum-exps, and sums over its attention, in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.cells import biased_keys_suit
from headpatch.adapters.huggingface.lse import attend, products, queries_at_once, repeat_kv, score_dtype
from headpatch.adapters.huggingface.mass import of_heads
from headpatch.errors import EngineError
from headpatch.kernels.columns import column_sums
from headpatch.kernels.segments import takes

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.mass import Call
    from headpatch.adapters.huggingface.rows import Rows

__all__ = ["CallStatistics"]

BLOCK = 256
"""Queries whose attention is held at once: memory grows with the keys, never with queries times keys."""


class CallStatistics:
    """Statistics of one attention call of one layer, computed when they are asked for."""

    def __init__(self, module: nn.Module, state: LayerState, call: Call, rows: Rows | None) -> None:
        self.module, self.state, self.call, self.rows = module, state, call, rows

    def known_rows(self) -> Rows:
        """What the running call knows about its rows."""
        if self.rows is None:
            raise EngineError(f"layer {self.state.name} was called outside its model's forward; call the model")
        return self.rows

    def _first(self, of_keys: bool = False) -> Tensor:
        """[b] or [b, q] column of the first real token, of the queries or (in cross-attention another thing) of the keys."""
        rows, q = self.known_rows(), self.call.q
        first = rows.cross_first if of_keys and self.state.part == "cross" else rows.first
        if first is None:
            return torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
        first = first.to(q.device)
        return first if first.shape[0] == q.shape[0] else first.repeat_interleave(q.shape[0] // first.shape[0], 0)

    def _once(self, name: str, compute: Callable[[], Tensor], *of: Any) -> Tensor:
        """What all calls of these rows with as many queries on this device share (and `of` says what else it depends on)."""
        q = self.call.q
        return self.known_rows().remember((name, self.state.part, q.shape[0], q.shape[2], q.device, *of), compute)

    def position(self) -> Tensor:
        """[b, q] position of each query, counted from its row's first real token."""
        return self._once("position", self._position)

    def _position(self) -> Tensor:
        rows, n_q = self.known_rows(), self.call.q.shape[2]
        first = self._first()
        columns = torch.arange(n_q, device=first.device) + rows.past
        return columns[None] - (first if first.ndim == 2 else first[:, None])

    def lse(self, start: int, stop: int) -> Tensor:
        """[b, H, q] log-sum-exp of the untouched scores, learned sinks included."""
        call = self.call
        if call.seen.kind == "causal" and start == 0 and stop == call.q.shape[2]:
            k, v = call.k[:, :, : call.seen.keys], call.v[:, :, : call.seen.keys]
            lse = attend(call.q, k, v, causal=True, scale=call.scale, softcap=call.softcap)[1]
        else:  # a block of the mask at a time
            step = 1024
            lse = torch.cat([self._block_lse(i, min(stop, i + step)) for i in range(start, stop, step)], 2)
        return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.to(lse)[:, None])

    def _block_lse(self, start: int, stop: int) -> Tensor:
        call, k, v = self.call, self.call.k, self.call.v
        mask = call.seen.block(start, stop)
        if mask is not None and mask.shape[-1] < k.shape[2]:
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        return attend(call.q[:, :, start:stop], k, v, mask=mask, scale=call.scale, softcap=call.softcap)[1]

    def _weights(self, start: int, stop: int, heads: Tensor | None = None) -> Tensor:
        """[b, H or h, stop - start, n] attention of a block of queries, of all heads or of these; at least fp32."""
        call, q, sinks = self.call, self.call.q[:, :, start:stop], self.call.sinks
        # Queries of a causal prompt see nothing behind themselves: half of the work on average.
        n = stop if call.seen.kind == "causal" else call.k.shape[2]
        if heads is None:
            k = repeat_kv(call.k[:, :, :n], call.groups)
        else:
            q, k = q.index_select(1, heads), call.k[:, :, :n].index_select(1, heads // call.groups)
            sinks = None if sinks is None else sinks.index_select(0, heads)
        dtype = score_dtype(q)
        scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        mask = call.seen.block(start, stop)
        if mask is not None:
            hidden = False if mask.dtype == torch.bool else -math.inf
            mask = nn.functional.pad(mask, (0, max(0, n - mask.shape[-1])), value=hidden)[..., :n]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
        total = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(dtype)[:, None, None])
        weights = torch.exp(scores - total).nan_to_num(0.0)  # a row of padding sees nothing
        return nn.functional.pad(weights, (0, call.k.shape[2] - n))

    def _real_queries(self) -> Tensor:
        """[b, q] which queries of this call are real tokens."""

        def find() -> Tensor:
            rows = self.known_rows()
            real = self.position() >= 0
            if rows.real is not None and isinstance(rows.past, int):
                real = real & rows.real[:, rows.past : rows.past + rows.length].to(real.device)
            return real

        return self._once("real queries", find)

    def _counted(self, until: Tensor | None) -> Tensor:
        """[b, q] real queries, of the prompt alone where `until` says how long that is."""
        if until is None:
            return self._real_queries()
        return self._once("asked", lambda: self._real_queries() & (self.position() < until[:, None]))

    def _seen_by(self, asked: Tensor, within: bool) -> Tensor:
        """[b, 1, n] by how many of the queries that count each key is seen in a causal prompt: its own, and those behind."""

        def count() -> Tensor:
            behind = asked.long().flip(1).cumsum(1).flip(1)
            return nn.functional.pad(behind, (0, self.call.k.shape[2] - behind.shape[1]))[:, None]

        return self._once("seen by", count, within, self.call.k.shape[2])

    def _causal_sums(self, heads: Tensor, asked: Tensor, within: bool) -> Tensor:
        """:meth:`column_sums` of some heads of a causal prompt, in few and large blocks: each costs its launches."""
        n_q, n_k = self.call.q.shape[2], self.call.k.shape[2]
        if takes(self.call.q, k := self.call.k[:, :, :n_q]):
            sums = column_sums(self.call.q, k, asked, self.call.scale, heads)
            return sums if n_k == n_q else nn.functional.pad(sums, (0, n_k - n_q))
        some = of_heads(self.call, heads)
        q, k, scale, dtype = some.q, some.k[:, :, :n_q], self.call.scale, score_dtype(some.q)
        counted = self._once("counted", lambda: asked.to(dtype)[:, None, None], dtype, within)
        least = BLOCK * max(1, min(4, 8 // len(heads)))
        size = min(n_q, queries_at_once(q, least, q.shape[0] * q.shape[1] * n_q))
        hidden = self._once("hidden", lambda: q.new_full((size, size), -math.inf, dtype=dtype).triu(1), size, dtype)
        if size == n_q:
            p = torch.softmax(torch.add(hidden, products(q, k), alpha=scale), -1)
            some.keep_attention(p)
            sums = torch.matmul(counted, p)[:, :, 0]
            return sums if n_k == n_q else nn.functional.pad(sums, (0, n_k - n_q))
        total = q.new_zeros(*q.shape[:2], 1, n_k, dtype=dtype)
        for start in range(0, n_q, size):
            stop = min(n_q, start + size)
            # Queries see nothing behind themselves: half of the work on average.
            scores = products(q[:, :, start:stop], k[:, :, :stop]).mul_(scale)
            scores[..., start:].add_(hidden[: stop - start, : stop - start])
            total[..., :stop].add_(torch.matmul(counted[..., start:stop], torch.softmax(scores, -1)))
        return total[:, :, 0]

    def column_sums(self, heads: Tensor | None = None, until: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention that each key receives from the real queries of this call, and how many of them can see it.

        Parameters
        ----------
        heads
            Of these heads only, ids [h].
        until
            [b] Lengths of the rows' prompts, to count their queries alone: a call may hold more.

        Returns
        -------
        (Tensor, Tensor)
            [b, H or h, n] sums and [b, 1, n] counts.
        """
        n_q, n_k = self.call.q.shape[2], self.call.k.shape[2]
        asked = self._counted(until)
        causal = self.call.seen.kind == "causal"
        if causal and heads is not None and biased_keys_suit(self.call):
            return self._causal_sums(heads, asked, until is not None), self._seen_by(asked, until is not None)
        total, count = self.call.q.new_zeros(()), torch.zeros((), dtype=torch.long, device=self.call.q.device)
        if causal:
            count = self._seen_by(asked, until is not None)
        # Few heads: fewer, larger blocks, each of which costs its launches.
        size = BLOCK * max(1, min(4, 8 // (self.call.q.shape[1] if heads is None else len(heads))))
        for start in range(0, n_q, size):
            stop = min(n_q, start + size)
            real = asked[:, None, start:stop, None]
            total = total + (self._weights(start, stop, heads) * real).sum(2)
            if causal:
                continue
            mask = self.call.seen.block(start, stop)
            if mask is None:
                mask = torch.ones(1, 1, stop - start, n_k, dtype=torch.bool, device=real.device)
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            if seen.shape[-1] < n_k:
                seen = nn.functional.pad(seen, (0, n_k - seen.shape[-1]))
            count = count + (seen & real).sum(2)
        return total, count

    def column_means(self) -> Tensor:
        """[b, H, n]: attention each key receives, averaged over the real queries of this call that can see it."""
        total, count = self.column_sums()
        return total / count.clamp_min(1)

    def window_scores(self, window: int) -> Tensor:
        """[b, H, w, n] attention of the last w queries of this call."""
        n_q = self.call.q.shape[2]
        return self._weights(max(0, n_q - window), n_q)
