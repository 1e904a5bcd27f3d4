"""The edits that GPUs take, on tensors laid out as vLLM's GPU backends lay theirs out, with a paged attention in plain torch for the
kernel: found through the same function names, called with the same arguments. The kernels themselves run in gpu_parity.py."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headpatch.adapters.vllm.indicator import TritonEdit
from headpatch.adapters.vllm.masses import FusedEdit, Tap, _flash_lse, row_of_token
from headpatch.adapters.vllm.tables import NOBODY, Tables
from headpatch.errors import EngineError
from headpatch.heads import ModelShape, PartShape
from headpatch.recipe import Recipe

WITHOUT_VLLM = True
H, K, D, SIZE, BLOCKS = 6, 2, 8, 4, 32
SHAPE = ModelShape("llama", {"text": PartShape((H, H), (K, K), (D, D))}, "text")
LENGTHS, QUERIES = (9, 14, 6, 23, 1), (1, 5, 6, 1, 1)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor,
    softmax_scale: float, window: int = 0, softcap: float = 0.0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """[T, H, d] queries over [blocks, size, K, d] keys; rows of length 0 and tokens behind the last row are not touched."""
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf)
    for r in range(len(seqused_k)):
        start, end, n = int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1]), int(seqused_k[r])
        if n == 0 or start == end:
            continue
        blocks = block_table[r, : -(-n // k.shape[1])].long()
        keys, values = (
            x[blocks].flatten(0, 1)[:n].float().repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,nhd->hqn", q[start:end].float(), keys) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        i, j = torch.arange(n - (end - start), n)[:, None], torch.arange(n)[None]
        hidden = (j > i) | ((i - j >= window) if window else torch.zeros(()).bool())
        scores = scores.masked_fill(hidden, -math.inf)
        lse[:, start:end] = scores.logsumexp(-1)
        out[start:end] = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values).to(out.dtype)
    return (out, lse) if return_softmax_lse else out


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("fake_backend")
    module.attention = paged_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    return module


class World:
    """Five rows in a paged cache: two recipes, one row without, one of a single token, and padding behind them."""

    def __init__(
        self, by_rows: bool, ratio: int, window: int, softcap: float, weights: bool = True, scales: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.recipes = [self._recipe(generator), self._recipe(generator)]
        if not weights:
            self.recipes = [
                Recipe.from_dict({"headpatch": 1, "patches": r.to_dict()["patches"][1:]}) for r in self.recipes
            ]
        self.window, self.softcap, self.scale = window, softcap, D**-0.5
        tables = Tables(SHAPE, [[range(H)]] * 2, 4, BLOCKS // ratio, 16, torch.device("cpu"))
        slots = [tables.put(r) for r in self.recipes]
        self.owner = [slots[0], slots[1], NOBODY, slots[0], slots[1]]
        # A layout of the cache in which neither keys nor values are contiguous: [blocks, K, size, 2 d].
        whole = torch.randn(BLOCKS, SIZE, K, 2 * D, generator=generator)
        self.cache = whole.transpose(1, 2)
        order = torch.randperm(BLOCKS // ratio - 1, generator=generator) + 1
        table = torch.zeros(len(LENGTHS) + 2, 8, dtype=torch.int32)
        used = 0
        for r, n in enumerate(LENGTHS):
            blocks = order[used : used + -(-n // (SIZE * ratio))]
            used += len(blocks)
            flat = (blocks[:, None] * ratio + torch.arange(ratio)).flatten()
            table[r, : len(flat)] = flat.int()
            tables.mark_blocks([int(blocks[0])], [self.owner[r]])
        tables.order([(slot, 3) for slot in self.owner])
        starts = torch.tensor([0, *torch.tensor(QUERIES).cumsum(0).tolist()])
        # As in a captured graph: rows of length 0 behind the real ones, and tokens that belong to nobody.
        self.starts = torch.cat([starts, starts[-1:].repeat(2)]).int()
        self.tokens = int(starts[-1]) + 3
        self.query = torch.randn(self.tokens, H, D, generator=generator)
        self.md = SimpleNamespace(
            num_actual_tokens=self.tokens, query_start_loc=self.starts, block_table=table,
            seq_lens=torch.tensor([*LENGTHS, 0, 0], dtype=torch.int32),
        )  # fmt: skip
        armed = SimpleNamespace(weights=weights, scales=scales, rows=False, graphs=False, segments=False)
        worker = SimpleNamespace(armed=armed, tables=tables, by_rows=by_rows, scratch={})
        self.patch: Any = SimpleNamespace(
            worker=worker, impl=SimpleNamespace(), layer=SimpleNamespace(), index=1, num_heads=H, num_kv_heads=K, head_dim=D,
            scale=self.scale, softcap=softcap, window=window, block_ratio=ratio, backend="FAKE", weight=tables.weight[1], start=0,
            head_scale=tables.scale[1], cache=lambda: self.cache,
        )  # fmt: skip

    @staticmethod
    def _recipe(generator: torch.Generator) -> Recipe:
        values = (torch.rand(2, H, generator=generator) * 2 + 0.3).tolist()
        patches = [
            {"method": "zerotuning", "heads": {f"1.{h}": round(values[0][h], 3) for h in range(1, H)}},
            {"method": "head_scaling", "heads": {f"1.{h}": round(values[1][h], 3) for h in range(H - 1)}},
        ]
        return Recipe.from_dict({"headpatch": 1, "patches": patches})

    def run(self, edit: Any, name: str = "attention") -> tuple[Tensor, Tensor]:
        """(edited, untouched)."""
        module, results = sys.modules["fake_backend"], []
        for editing in (True, False):
            out = torch.full((self.tokens, H, D), 7.0)

            def run(out: Tensor = out) -> Any:
                k, v = self.cache.transpose(1, 2).split(D, dim=-1)
                return getattr(module, name)(
                    q=self.query, k=k, v=v, out=out, cu_seqlens_q=self.starts, seqused_k=self.md.seq_lens,
                    block_table=self.md.block_table, softmax_scale=self.scale, window=self.window, softcap=self.softcap,
                )  # fmt: skip

            if editing:
                edit(run, self.query, self.cache, self.md, out)
            else:
                run()
            results.append(out)
        return results[0], results[1]

    def wanted(self, untouched: Tensor) -> Tensor:
        """The full softmax edited in float64, row by row."""
        result = untouched.double().clone()
        tables = self.patch.worker.tables
        for r, n in enumerate(LENGTHS):
            if self.owner[r] == NOBODY:
                continue
            start, end = int(self.starts[r]), int(self.starts[r + 1])
            g, c = tables.weight[1, self.owner[r]].double(), tables.scale[1, self.owner[r]].double()
            for t in range(start, end):
                position = n - (end - start) + t - start
                for h in range(H):
                    at = [(int(self.md.block_table[r, j // SIZE]), j % SIZE) for j in range(position + 1)]
                    keys = torch.stack([self.cache[b, h // (H // K), o, :D] for b, o in at]).double()
                    values = torch.stack([self.cache[b, h // (H // K), o, D:] for b, o in at]).double()
                    scores = keys @ self.query[t, h].double() * self.scale
                    scores = self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores
                    if self.window:
                        scores[: max(0, position + 1 - self.window)] = -math.inf
                    if position > 0:
                        scores[0] += math.log(float(g[h]))
                    result[t, h] = scores.softmax(0) @ values * c[h]
        return result


PLAIN, CAPPED = (0, 0.0), (7, 5.0)
CASES = [(by_rows, ratio, *form) for by_rows in (False, True) for ratio in (1, 2) for form in (PLAIN, CAPPED)]


@pytest.mark.parametrize(("by_rows", "ratio", "window", "softcap"), [c for c in CASES if c[0] or not c[2]])
@pytest.mark.parametrize("kind", ["lse", "indicator"])
def test_rows_get_their_recipe(
    kernel: ModuleType, kind: str, by_rows: bool, ratio: int, window: int, softcap: float
) -> None:
    world = World(by_rows, ratio, window, softcap)
    tap = Tap("fake_backend", "attention")
    edit = FusedEdit(world.patch, tap, _flash_lse) if kind == "lse" else TritonEdit(world.patch, tap)
    edited, untouched = world.run(edit)
    real = int(world.starts[len(LENGTHS)])
    torch.testing.assert_close(edited[:real].double(), world.wanted(untouched)[:real], atol=2e-5, rtol=2e-5)
    nobody = slice(int(world.starts[2]), int(world.starts[3]))
    assert torch.equal(edited[nobody], untouched[nobody])  # bit for bit
    assert torch.equal(edited[real:], untouched[real:])  # padding too
    assert not torch.equal(edited[:real], untouched[:real])


@pytest.mark.parametrize("kind", ["lse", "indicator", "scales only", "nothing else"])
def test_edits_of_some_positions_come_last(kernel: ModuleType, kind: str) -> None:
    """Factors and vectors of two recipes, at one position and from there on, on top of what the tables of constants do."""
    world = World(True, 1, 0, 0.0, weights=kind in ("lse", "indicator"), scales=kind != "nothing else")
    tap, tables = Tap("fake_backend", "attention"), world.patch.worker.tables
    if kind == "nothing else":
        tables.scale.fill_(1.0)
    generator = torch.Generator().manual_seed(8)
    tables.shift = torch.zeros(*tables.factor.shape, D)
    for slot, span in ((world.owner[0], (-1, 0)), (world.owner[1], (0, 1 << 40))):
        tables.start[1, slot], tables.stop[1, slot] = span
        tables.factor[1, slot] = torch.randn(H, generator=generator)
        tables.shift[1, slot] = torch.randn(H, D, generator=generator)
    prompts = (
        9,
        11,
        6,
        24,
        1,
    )  # the last token is there; behind in part; nobody's; still in its prompt; a single token's end
    tables.order([(slot, n) for slot, n in zip(world.owner, prompts, strict=True)])
    world.patch.worker.armed.rows = True
    edit = TritonEdit(world.patch, tap) if kind == "indicator" else FusedEdit(world.patch, tap, _flash_lse)
    edited, untouched = world.run(edit)
    wanted, touched = world.wanted(untouched), 0
    for r, (n, q) in enumerate(zip(LENGTHS, QUERIES, strict=True)):
        slot = world.owner[r]
        for i in range(q):
            t, position = int(world.starts[r]) + i, n - q + i - prompts[r]
            if slot != NOBODY and int(tables.start[1, slot]) <= position < int(tables.stop[1, slot]):
                wanted[t] = wanted[t] * tables.factor[1, slot].double()[:, None] + tables.shift[1, slot].double()
                touched += 1
    assert touched == 4  # one, three, none and none
    real = int(world.starts[len(LENGTHS)])
    torch.testing.assert_close(edited[:real].double(), wanted[:real], atol=2e-5, rtol=2e-5)
    assert torch.equal(edited[real:], untouched[real:])


def test_only_scales_need_no_log_sum_exp(kernel: ModuleType) -> None:
    world = World(False, 1, 0, 0.0, weights=False)
    edited, untouched = world.run(FusedEdit(world.patch, Tap("fake_backend", "attention"), _flash_lse))
    real = int(world.starts[len(LENGTHS)])
    torch.testing.assert_close(edited[:real].double(), world.wanted(untouched)[:real], atol=2e-5, rtol=2e-5)


def test_a_kernel_that_is_not_called_is_an_error(kernel: ModuleType) -> None:
    """A backend that reaches its kernel some other way must not be served unpatched."""
    world = World(False, 1, 0, 0.0)
    kernel.other = paged_attention  # type: ignore[attr-defined]
    for edit in (FusedEdit(world.patch, Tap("fake_backend", "attention"), _flash_lse),
                 TritonEdit(world.patch, Tap("fake_backend", "attention"))):  # fmt: skip
        with pytest.raises(EngineError, match="ran 0"):
            world.run(edit, "other")


def test_a_block_that_left_the_window_belongs_to_others(kernel: ModuleType) -> None:
    """A row beyond its window still names its first block, which another row uses by now: that row must not notice."""
    world = World(True, 1, 7, 0.0)
    long, other = 3, 1  # 23 tokens against a window of 7; 14 tokens in four blocks
    world.md.block_table[long, 0] = world.md.block_table[other, 3]
    edit = TritonEdit(world.patch, Tap("fake_backend", "attention"))
    edited, untouched = world.run(edit)
    real = int(world.starts[len(LENGTHS)])
    torch.testing.assert_close(edited[:real].double(), world.wanted(untouched)[:real], atol=2e-5, rtol=2e-5)


def test_a_tap_listens_only_while_it_is_asked_to(kernel: ModuleType) -> None:
    tap, again = Tap("fake_backend", "attention"), Tap("fake_backend", "attention")
    assert again.original is tap.original is paged_attention
    kernel.attention = again_attention = kernel.attention  # type: ignore[attr-defined]
    assert again_attention is not paged_attention
    with pytest.raises(ZeroDivisionError):
        tap.listen(lambda: 1 / 0, lambda *_: None)
    assert getattr(tap.local, "listener", None) is None


def test_rows_of_tokens() -> None:
    starts = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    assert row_of_token(starts, 7).tolist() == [0, 0, 2, 2, 2, 3, 3]
