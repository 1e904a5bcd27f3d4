"""Metadata of window pieces with a paged attention in plain torch for the kernel, and the edit that GPUs take on top: no engine.

What vLLM's own builder would be given goes straight to the kernel here.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_backends import D, H, K, paged_attention
from torch import Tensor

from headpatch.adapters.vllm import split_builder
from headpatch.adapters.vllm.masses import FusedEdit, Tap, _flash_lse
from headpatch.adapters.vllm.split_builder import window_builder
from headpatch.adapters.vllm.tables import Tables
from headpatch.heads import ModelShape, PartShape
from headpatch.recipe import Recipe

WITHOUT_VLLM = True
SIZE, SINK, RECENT, ROOM = 4, 8, 14, 40
LENGTHS, QUERIES = (3, 30, 70, 64, 41, 0, 0), (3, 1, 25, 1, 12, 0, 0)  # two rows of padding behind
DECODING = (1, 1, 1, 1, 1, 0, 0)


@dataclasses.dataclass
class Common:
    """What vLLM's CommonAttentionMetadata has of a batch."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    seq_lens_cpu_upper_bound: Tensor | None = None
    is_prefilling: Tensor | None = None
    _seq_lens_cpu: Tensor | None = None

    def replace(self, **new: Any) -> Common:
        return dataclasses.replace(self, **new)


class Base:
    """A backend's builder."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config = kv_cache_spec, layer_names, vllm_config
        self.num_heads_q, self.num_heads_kv, self.aot_sliding_window = 99, 99, None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        m = common_attn_metadata
        assert len(m.query_start_loc) == len(m.query_start_loc_cpu) == m.num_reqs + 1
        assert torch.equal(m.query_start_loc.cpu(), m.query_start_loc_cpu)
        assert m.block_table_tensor.shape[0] == len(m.seq_lens) == m.num_reqs
        assert int((m.query_start_loc[1:] - m.query_start_loc[:-1]).max()) == m.max_query_len
        assert int(m.seq_lens.max()) <= m.max_seq_len
        if m.seq_lens_cpu_upper_bound is not None:
            assert bool((m.seq_lens <= m.seq_lens_cpu_upper_bound).all())
        return SimpleNamespace(
            query_start_loc=m.query_start_loc, seq_lens=m.seq_lens, block_table=m.block_table_tensor, fast_build=fast_build,
            num_actual_tokens=m.num_actual_tokens, sliding_window=None,
        )  # fmt: skip


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Any:
    layer = SimpleNamespace(num_heads=H, num_kv_heads=K, layer_name="l")
    monkeypatch.setattr(split_builder, "_layers", lambda _: [layer])
    spec = SimpleNamespace(sink_tokens=SINK, sliding_window=SINK + RECENT, block_size=SIZE)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16), compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
        model_config=SimpleNamespace(max_model_len=128),
    )  # fmt: skip
    return window_builder(Base)(spec, ["l"], config, torch.device("cpu"))


def batch(queries: tuple[int, ...], generator: torch.Generator) -> Common:
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    table = torch.zeros(len(LENGTHS) + 3, ROOM, dtype=torch.int32)  # more rows than the batch counts
    free = torch.randperm(len(LENGTHS) * ROOM, generator=generator) + 1
    for r, n in enumerate(LENGTHS):
        blocks = -(-n // SIZE)
        table[r, :blocks], free = free[:blocks].int(), free[blocks:]
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    return Common(
        starts, starts.clone(), lengths, len(LENGTHS), int(starts[-1]), max(queries), 128, table,
        seq_lens_cpu_upper_bound=lengths + 2, is_prefilling=lengths > 0, _seq_lens_cpu=lengths,
    )  # fmt: skip


@pytest.mark.parametrize("queries", [QUERIES, DECODING], ids=["chunks", "decoding"])
def test_windows_and_an_edit_on_top(queries: tuple[int, ...], builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the first token and head scales, per row, by the log-sum-exp of what the kernel saw."""
    module: Any = ModuleType("fake_backend")
    module.attention = paged_attention
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    generator = torch.Generator().manual_seed(5)
    m = batch(queries, generator)
    cache = torch.randn(len(LENGTHS) * ROOM + 1, SIZE, K, 2 * D, generator=generator).transpose(1, 2)
    query = torch.randn(m.num_actual_tokens, H, D, generator=generator)
    made = builder.build(0, m)
    assert (builder.num_heads_q, builder.num_heads_kv) == (H, K)
    assert made.sliding_window == builder.aot_sliding_window == (SINK + RECENT - 1, 0)
    assert made.fast_build is (queries == QUERIES)  # no ahead-of-time schedule of cut rows

    gamma, scale = (torch.rand(H, generator=generator) * 2 + 0.3 for _ in range(2))
    recipe = Recipe.from_dict({"headpatch": 1, "patches": [
        {"method": "zerotuning", "heads": {f"0.{h}": round(float(gamma[h]), 4) for h in range(H)}},
        {"method": "head_scaling", "heads": {f"0.{h}": round(float(scale[h]), 4) for h in range(H)}},
    ]})  # fmt: skip
    shape = ModelShape("llama", {"text": PartShape((H,), (K,), (D,))}, "text")
    tables = Tables(shape, [[range(H)]], 2, len(cache), 16, torch.device("cpu"))
    slot = tables.put(recipe)
    tables.mark_blocks(
        [int(m.block_table_tensor[r, 0]) for r in (1, 2)], [slot, slot]
    )  # the other rows have no recipe
    worker = SimpleNamespace(
        armed=SimpleNamespace(weights=True, scales=True, rows=False, graphs=True, segments=False),
        tables=tables,
        by_rows=False,
        scratch={},
    )
    patch: Any = SimpleNamespace(
        worker=worker, index=0, start=0, num_heads=H, num_kv_heads=K, head_dim=D, scale=D**-0.5, softcap=0.0, window=0, block_ratio=1,
        backend="FAKE", weight=tables.weight[0], head_scale=tables.scale[0],
    )  # fmt: skip
    out = torch.zeros(m.num_actual_tokens, H, D)

    def run() -> Any:
        keys, values = cache.transpose(1, 2).split(D, -1)
        return module.attention(
            query, keys, values, out, made.query_start_loc, made.seq_lens, made.block_table, D**-0.5, SINK + RECENT
        )

    FusedEdit(patch, Tap("fake_backend", "attention"), _flash_lse)(run, query, cache, made.headpatch_rows, out)
    for r, (n, count) in enumerate(zip(LENGTHS, queries, strict=True)):
        at = [int(m.block_table_tensor[r, p // SIZE]) for p in range(n)]
        k, v = (
            torch.stack([cache[b, :, p % SIZE, part] for p, b in enumerate(at)]) if n else None
            for part in (slice(D), slice(D, 2 * D))
        )
        for i in range(n - count, n):
            token = int(m.query_start_loc[r]) + i - (n - count)
            seen = torch.tensor([p <= i and (p < SINK or i - p < RECENT) for p in range(n)])
            for h in range(H):
                assert k is not None
                assert v is not None
                scores = (query[token, h].double() @ k[:, h // (H // K)].double().t()) * D**-0.5
                p = scores.masked_fill(~seen, -math.inf).softmax(-1)
                if r in (1, 2):
                    p = p * torch.where(torch.arange(n) == 0, round(float(gamma[h]), 4), 1.0)
                    p = p / p.sum()
                wanted = (p @ v[:, h // (H // K)].double()) * (round(float(scale[h]), 4) if r in (1, 2) else 1.0)
                torch.testing.assert_close(out[token, h].double(), wanted, atol=2e-5, rtol=2e-5)


def test_decoding_steps_share_their_tensors(builder: Any) -> None:
    """Captured graphs read the addresses that they saw at capture, whatever the lengths are later."""
    generator = torch.Generator().manual_seed(6)
    first = builder.build(0, batch(DECODING, generator))
    again = builder.build(0, batch(DECODING, generator))
    assert first.block_table.data_ptr() == again.block_table.data_ptr()
    assert first.seq_lens.data_ptr() == again.seq_lens.data_ptr()
    assert first.seq_lens[-2:].tolist() == [0, 0]
    assert first.block_table.stride() == again.block_table.stride()
