"""Metadata builders of pieces: vLLM's own, told the piece's heads, and for window pieces the rearranged block tables.

What a window piece's kernel gets differs from the batch in rows and tables. Edits of its output work on the batch as it is, which is
kept beside it (``headpatch_rows``): a row's first block is its first sink block, and always there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import EngineError
from headpatch.kernels.tables import Cut, Window, arrange, arrange_steps, cut

__all__ = ["full_builder", "window_builder"]

GLOBAL = (-1, -1)


def full_builder(base: Any) -> Any:
    """The builder of full pieces."""

    class FullPieceBuilder(base):
        # Pieces with another number of heads share the description of their cache, and not their schedules.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _tell_heads(self, _layers(self))
            # Ahead-of-time schedules are made for one window: this group's, whatever other groups have.
            if hasattr(self, "aot_sliding_window"):
                self.aot_sliding_window = GLOBAL

    return FullPieceBuilder


def window_builder(base: Any) -> Any:
    """The builder of window pieces."""

    class WindowPieceBuilder(base):
        # With the block table of another group alone, metadata of this one cannot be made.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            layers = _layers(self)
            _tell_heads(self, layers)
            self.window = _window(self.kv_cache_spec)
            if self.window.sink % self.window.size or self.window.limit < 1:
                raise EngineError(
                    f"{layers[0].layer_name}: blocks of {self.window.size} tokens do not make up windows of {self.window.sink} first "
                    f"and {self.window.recent} last ones"
                )
            left = self.window.span - 1
            if hasattr(self, "window_size"):
                self.window_size = self.window.span
            if hasattr(self, "aot_sliding_window"):
                self.aot_sliding_window = (left, 0)
            self.room: tuple[Tensor, Tensor] | None = None

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            """Whole graphs of decoding steps, at most: longer chunks become several rows."""
            from vllm.v1.attention.backend import AttentionCGSupport

            drafted = int(getattr(vllm_config.speculative_config, "num_speculative_tokens", 0) or 0)
            whole = 1 + drafted <= _window(kv_cache_spec).limit
            most = AttentionCGSupport.UNIFORM_BATCH if whole else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            found = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(found, most, key=lambda support: support.value)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            """As the base's, for the batch as kernels see it."""
            m = common_attn_metadata
            if m.max_query_len > self.window.limit:
                # More rows than requests: no ahead-of-time schedule, whose room is counted in requests.
                args, kwargs = (), {**kwargs, "fast_build": True}
            made = super().build(0, self._rearranged(m), *args, **kwargs)
            if hasattr(made, "sliding_window"):
                made.sliding_window = (self.window.span - 1, 0)
            made.headpatch_rows = SimpleNamespace(
                num_actual_tokens=m.num_actual_tokens, query_start_loc=m.query_start_loc, seq_lens=m.seq_lens,
                block_table=m.block_table_tensor,
            )  # fmt: skip
            return made

        def _rearranged(self, m: Any) -> Any:
            # Tables may have rows of padding that the batch does not count.
            window, rows = self.window, int(m.num_reqs)
            table = m.block_table_tensor[:rows]
            if m.max_query_len <= window.limit:
                # Decoding, and what else graphs may hold: one row stays one row, at addresses that never change.
                room = arrange_steps(window, table, m.query_start_loc, m.seq_lens[:rows], self._room(table, rows))
                return _replaced(m, *room, window.most_keys(int(m.max_query_len)))
            parts = cut(m.query_start_loc_cpu[: rows + 1], window.limit)
            row, offset, count = (
                x.to(table.device, non_blocking=True) for x in (parts.row, parts.offset, parts.count)
            )
            queries = m.query_start_loc[1 : rows + 1] - m.query_start_loc[:rows]
            begin = (m.seq_lens[:rows] - queries)[row] + offset
            new, ends = arrange(window, table[row], begin, begin + count, self._columns())
            return _replaced(m, new, ends, window.most_keys(parts.longest), parts)

        def _room(self, table: Tensor, rows: int) -> tuple[Tensor, Tensor]:
            """Where tables and lengths of `rows` rows go."""
            if self.room is None:
                scheduler, graphs = self.vllm_config.scheduler_config, self.vllm_config.compilation_config
                most = max(int(scheduler.max_num_seqs), int(getattr(graphs, "max_cudagraph_capture_size", 0) or 0)) + 1
                self.room = (
                    table.new_zeros(most, self._columns()),
                    torch.zeros(most, dtype=torch.int32, device=table.device),
                )
            if rows > self.room[0].shape[0]:  # more rows than requests: no batch of the scheduler's
                return table.new_zeros(rows, self.room[0].shape[1]), self.room[1].new_zeros(rows)
            return self.room[0][:rows], self.room[1][:rows]

        def _columns(self) -> int:
            """Blocks that a row can need."""
            most = min(self.window.most_keys(self.window.limit), int(self.vllm_config.model_config.max_model_len))
            return -(-most // self.window.size) + 1

    return WindowPieceBuilder


def _replaced(m: Any, table: Tensor, lengths: Tensor, most: int, parts: Cut | None = None) -> Any:
    """The batch's metadata with other tables, and other rows where they were cut."""
    most = min(most, int(m.max_seq_len))
    new: dict[str, Any] = {"block_table_tensor": table, "seq_lens": lengths, "max_seq_len": most}
    bound = m.seq_lens_cpu_upper_bound
    if parts is not None:
        new |= {
            "num_reqs": len(parts.row), "query_start_loc_cpu": parts.starts, "max_query_len": parts.longest,
            "query_start_loc": parts.starts.to(table.device, non_blocking=True), "is_prefilling": None,
        }  # fmt: skip
        bound = None if bound is None else bound[parts.row]
    new["seq_lens_cpu_upper_bound"] = None if bound is None else bound.clamp(max=most)
    # Numbers that belong to the batch as it was; whoever needs them shall find none.
    new |= {name: None for name in ("_seq_lens_cpu", "_num_computed_tokens_cpu", "_num_computed_tokens_cache",
                                    "_token_to_req_indices_cache", "req_idx") if hasattr(m, name)}  # fmt: skip
    return m.replace(**new)


def _window(spec: Any) -> Window:
    return Window(int(spec.sink_tokens), int(spec.sliding_window) - int(spec.sink_tokens), int(spec.block_size))


def _layers(builder: Any) -> list[Any]:
    """The pieces that a builder makes metadata for."""
    from headpatch.adapters.vllm.split_layer import PieceLayer

    known = builder.vllm_config.compilation_config.static_forward_context
    found = [known[name] for name in builder.layer_names]
    if not all(isinstance(layer, PieceLayer) for layer in found):
        raise EngineError(f"{builder.layer_names}: not all of these layers are pieces")
    return found


def _tell_heads(builder: Any, layers: list[Any]) -> None:
    """Schedules depend on the heads that a kernel is run for: these layers', not the model's, and not the places in their cache."""
    heads = {(layer.num_heads, layer.num_kv_heads) for layer in layers}
    if len(heads) != 1:
        raise EngineError(f"{builder.layer_names}: pieces with {sorted(heads)} heads share their metadata")
    query, kv = heads.pop()
    for name, value in (("num_heads_q", query), ("num_heads", query), ("num_heads_kv", kv), ("num_kv_heads", kv)):
        if hasattr(builder, name):
            setattr(builder, name, value)
