"""Proof at start-up, on the engine's own tensors: its cache, its metadata builders, its kernels, its dtype.

For one layer of each kind, two rows are run twice: whole prompts first, then one token of the one and a chunk of the other. Every
time an identity edit must leave every bit as the untouched kernel wrote it, and a real edit must equal a float64 softmax over the
same keys. Where layers are cut, so must what runs without an edit, over rows that reach beyond what their heads keep. If any does
not, the engine does not serve.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.selfcheck_segments import Marked
from headpatch.adapters.vllm.tables import NOBODY
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.hook import LayerPatch
    from headpatch.adapters.vllm.worker import Worker

__all__ = ["check_engine"]

BOUND = {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference from the reference, as a share of the largest output."""
ROUGH = 1e-2
"""The untouched kernel may itself be off by so much; beyond that, something else is wrong with it."""
PROMPTS = (19, 33)
CHUNKS = (1, 5)
LONG = 2048
"""Prompts longer than that are written into the cache and not attended to: the reference would take minutes."""


def check_engine(worker: Worker, runner: Any) -> list[dict[str, Any]]:
    """Check one armed layer of each kind; raises EngineError where one fails."""
    seen: dict[Any, LayerPatch] = {}
    for patch in worker.layers:
        if patch.armed or (patch.piece is not None and not patch.idle):
            kind = (patch.backend, patch.num_heads, patch.num_kv_heads, patch.head_dim, patch.window, patch.softcap,
                    patch.how, tuple(patch.cache().stride()), patch.block_ratio, _sinks(patch) is not None, patch.keeps)  # fmt: skip
            seen.setdefault(kind, patch)
    results = []
    for patch in seen.values():
        with torch.inference_mode():
            error, own = _check(worker, patch, runner)
        bound = BOUND.get(patch.layer.dtype, 6e-2)
        if own <= ROUGH:  # some kernels round more than their type does: TF32 products of fp32
            bound = max(bound, 3 * own)
        if not error <= bound:
            where = f"layer {patch.index} ({patch.backend}, {patch.how}"
            where += ")" if patch.piece is None else f", {patch.piece.kind} piece)"
            raise EngineError(
                f"headpatch's self-check failed in {where}: the result differs from a plain reference by {error:.1e} of the largest "
                f"output (bound {bound:.0e}); the engine will not serve like this"
            )
        results.append(
            {"layer": patch.index, "backend": patch.backend, "how": patch.how, "error": error, "bound": bound}
        )
        if patch.piece is not None:
            results[-1]["piece"] = patch.piece.kind
    return results


def _sinks(patch: LayerPatch) -> Tensor | None:
    found: Tensor | None = getattr(patch.impl, "sinks", None)
    return found


@dataclasses.dataclass
class _Rows:
    """Keys, values and queries of two rows, and where they lie in the cache."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    table: Tensor
    size: int


def _stages(worker: Worker, patch: LayerPatch, blocks: int, block: int) -> list[tuple[int, int]]:
    """Queries of the two rows, stage by stage. Rows of heads that drop tokens go beyond what those keep, if any request can."""
    if patch.keeps is None:
        return [PROMPTS, CHUNKS]
    reach, size = sum(patch.keeps), int(patch.cache().shape[2])
    prompt, chunk = reach + 2 * size + 5, min(patch.keeps[1] - size + 4, LONG)  # a chunk that is cut in two
    whole = max(prompt, PROMPTS[1]) + chunk
    longest = int(worker.vllm_config.model_config.max_model_len)
    if prompt >= longest or 2 * -(-whole // block) >= blocks:
        return [PROMPTS, CHUNKS]
    return [(prompt, PROMPTS[1]), (1, chunk), (chunk, 1)]


def _check(worker: Worker, patch: LayerPatch, runner: Any) -> tuple[float, float]:
    """Errors of the edited output, and of the layer's own untouched one where the layer is whole."""
    tables = worker.tables
    assert tables is not None
    cache = patch.cache()
    block = int(cache.shape[2]) * patch.block_ratio
    stages = _stages(worker, patch, tables.block_slot.shape[0], block)
    totals = tuple(map(sum, zip(*stages, strict=True)))
    per_row = -(-max(totals) // block)
    blocks = [[1 + row * per_row + i for i in range(per_row)] for row in range(2)]
    if blocks[-1][-1] >= tables.block_slot.shape[0]:
        raise EngineError("the engine's cache is too small for headpatch's self-check: give it more room")
    rows = _make_rows(patch, cache, blocks, totals)
    spare = len(tables.slots) - 1  # the last to be handed out; nothing has it yet
    generator = torch.Generator().manual_seed(patch.index)
    weight = torch.rand(patch.num_heads, generator=generator) * 2.5 + 0.3
    scale = torch.rand(patch.num_heads, generator=generator) * 1.5 - 0.5
    if not worker.armed.weights:
        weight = torch.ones_like(weight)
    if not worker.armed.scales:
        scale = torch.ones_like(scale)
    # The first head stays as it is: tables are per head.
    if patch.num_heads > 1:
        weight[0] = scale[0] = 1.0
    some = _Some(worker, patch, spare, generator) if worker.armed.rows else None
    marked = Marked(worker, patch, spare, generator) if worker.armed.segments else None
    kept = cache[: (blocks[-1][-1] + 1) * patch.block_ratio].clone()
    done, worst, own = [0, 0], 0.0, 0.0
    try:
        for lengths in stages:
            md, query = _feed(worker, patch, runner, rows, done, lengths)
            if max(lengths) > LONG:
                done = [a + b for a, b in zip(done, lengths, strict=True)]
                continue
            untouched = _run(worker, patch, md, query, None, tables, blocks)
            plain = _reference(patch, rows, done, lengths, None, None)
            size = max(float(plain.abs().max()), 1e-9)
            error = float((untouched.double().cpu() - plain).abs().max()) / size
            if patch.piece is not None:
                worst = max(worst, error)
            else:
                own = max(own, error)
            if not patch.armed:
                done = [a + b for a, b in zip(done, lengths, strict=True)]
                continue
            patch.weight[spare], patch.head_scale[spare] = 1.0, 1.0
            same = _run(worker, patch, md, query, spare, tables, blocks)
            if not torch.equal(untouched, same):
                raise EngineError(
                    f"headpatch's self-check failed in layer {patch.index}: an identity edit changes bits"
                )
            patch.weight[spare].copy_(weight)
            patch.head_scale[spare].copy_(scale)
            if some is not None:
                some.put()
            edited = _run(worker, patch, md, query, spare, tables, blocks)
            if some is not None:
                some.clear()
            wanted = _reference(patch, rows, done, lengths, weight, scale, some)
            worst = max(worst, float((edited.double().cpu() - wanted).abs().max()) / size)
            if (worker.armed.weights or worker.armed.scales or some is not None) and torch.equal(edited, untouched):
                raise EngineError(f"headpatch's self-check failed in layer {patch.index}: an edit changes nothing")
            if marked is not None:
                patch.weight[spare], patch.head_scale[spare] = 1.0, 1.0
                with marked:
                    edited = _run(worker, patch, md, query, spare, tables, blocks, alone=True)
                marked.check_bits(untouched, edited, lengths[0])
                wanted = _reference(patch, rows, done, lengths, None, None, marked=marked)
                worst = max(worst, float((edited.double().cpu() - wanted).abs().max()) / size)
            done = [a + b for a, b in zip(done, lengths, strict=True)]
    finally:
        patch.weight[spare], patch.head_scale[spare] = 1.0, 1.0
        if some is not None:
            some.clear()
        tables.mark_blocks([row[0] for row in blocks], [NOBODY, NOBODY])
        tables.order([])
        worker.steps.clear()
        cache[: kept.shape[0]].copy_(kept)
    return worst, own


class _Some:
    """An edit of the prompt's last position and the one behind it, in the spare slot."""

    def __init__(self, worker: Worker, patch: LayerPatch, spare: int, generator: torch.Generator) -> None:
        tables = worker.tables
        assert tables is not None
        self.at, self.tables = (patch.index, spare, slice(patch.start, patch.start + patch.num_heads)), tables
        self.factor = torch.rand(patch.num_heads, generator=generator) - 0.5
        self.shift = torch.randn(patch.num_heads, patch.head_dim, generator=generator) * (tables.shift is not None)
        if patch.num_heads > 1:
            self.factor[0], self.shift[0] = 1.0, 0.0

    def put(self) -> None:
        layer, slot, _ = self.at
        self.tables.start[layer, slot], self.tables.stop[layer, slot] = -1, 1
        self.tables.factor[self.at] = self.factor.to(self.tables.device)
        if self.tables.shift is not None:
            self.tables.shift[self.at][..., : self.shift.shape[1]] = self.shift.to(self.tables.device)

    def clear(self) -> None:
        layer, slot, _ = self.at
        self.tables.start[layer, slot] = self.tables.stop[layer, slot] = 0
        self.tables.factor[self.at] = 1.0
        if self.tables.shift is not None:
            self.tables.shift[self.at] = 0.0

    def edited(self, o: Tensor, start: int, prompt: int) -> Tensor:
        """Outputs [q, H, d] of queries from position `start` on."""
        position = torch.arange(start, start + len(o))
        inside = (position >= prompt - 1) & (position < prompt + 1)
        return torch.where(inside[:, None, None], o * self.factor.double()[:, None] + self.shift.double(), o)


def _make_rows(patch: LayerPatch, cache: Tensor, blocks: list[list[int]], totals: tuple[int, ...]) -> _Rows:
    generator = torch.Generator().manual_seed(17 + patch.index)
    made: dict[str, list[Tensor]] = {}
    for name, heads in (("q", patch.num_heads), ("k", patch.num_kv_heads), ("v", patch.num_kv_heads)):
        made[name] = [
            torch.randn(total, heads, patch.head_dim, generator=generator).to(cache.device, patch.layer.dtype)
            for total in totals
        ]
    for k in made["k"]:
        k[0] *= 1.5  # a first token that draws attention
    ratio = patch.block_ratio
    table = [[block * ratio + i for block in row for i in range(ratio)] for row in blocks]
    return _Rows(
        made["q"],
        made["k"],
        made["v"],
        torch.tensor(table, dtype=torch.int32, device=cache.device),
        int(cache.shape[2]),
    )


def _feed(
    worker: Worker, patch: LayerPatch, runner: Any, rows: _Rows, done: list[int], lengths: tuple[int, ...]
) -> Any:
    """Write the next keys and values into the cache, and build the backend's metadata for these queries."""
    cache = patch.cache()
    slots: list[int] = []
    positions: list[int] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for row, (start, count) in enumerate(zip(done, lengths, strict=True)):
        end = start + count
        parts.append((rows.q[row][start:end], rows.k[row][start:end], rows.v[row][start:end]))
        for position in range(start, end):
            slots.append(int(rows.table[row, position // rows.size]) * rows.size + position % rows.size)
            positions.append(position)
    device = cache.device
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    seen = torch.tensor([a + b for a, b in zip(done, lengths, strict=True)], dtype=torch.int32)
    mapping = torch.tensor(slots, dtype=torch.int64, device=device)
    common = _common_metadata(
        query_start_loc=starts.to(device), query_start_loc_cpu=starts, seq_lens=seen.to(device), _seq_lens_cpu=seen,
        seq_lens_cpu=seen, seq_lens_cpu_upper_bound=seen, num_reqs=2, num_actual_tokens=sum(lengths),
        max_query_len=max(lengths), max_seq_len=int(seen.max()), block_table_tensor=rows.table, slot_mapping=mapping,
        causal=True, positions=torch.tensor(positions, dtype=torch.int64, device=device),
        _num_computed_tokens_cpu=seen - torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip
    query, key, value = (torch.cat(found).contiguous() for found in zip(*parts, strict=True))
    impl = patch.impl
    if not patch.layer.attn_backend.forward_includes_kv_cache_update:
        impl.do_kv_cache_update(patch.layer, key, value, cache, mapping)
    return _builder(worker, patch, runner).build(0, common), (query, key, value)


def _common_metadata(**known: Any) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata) if field.init}
    return CommonAttentionMetadata(**{name: value for name, value in known.items() if name in names})


def _builder(worker: Worker, patch: LayerPatch, runner: Any) -> Any:
    for groups in runner.attn_groups:
        for group in groups:
            if patch.name in group.layer_names:
                return group.get_metadata_builder(0)
    raise EngineError(f"layer {patch.index}: the runner has no metadata builder for {patch.name}")


def _run(
    worker: Worker, patch: LayerPatch, md: Any, tensors: Any, slot: int | None, tables: Any, blocks: list[list[int]],
    alone: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of these queries: untouched where `slot` is None, else under that slot, through the path that serving takes.

    `alone`: the second row is under none.
    """
    query, key, value = tensors
    out = torch.empty(query.shape[0], patch.num_heads, patch.head_dim, dtype=patch.layer.dtype, device=query.device)
    owner = NOBODY if slot is None else slot
    owners = (owner, NOBODY if alone else owner)
    tables.mark_blocks([row[0] for row in blocks], owners)
    tables.order(list(zip(owners, PROMPTS, strict=True)))  # prompt lengths: no constant edit looks at them
    worker.steps.clear()
    call = patch.original if slot is None else patch.forward
    call(patch.layer, query, key, value, patch.cache(), md, out)
    return out


def _reference(
    patch: LayerPatch,
    rows: _Rows,
    done: list[int],
    lengths: tuple[int, ...],
    weight: Tensor | None,
    scale: Tensor | None,
    some: _Some | None = None,
    marked: Marked | None = None,
) -> Tensor:
    """[T, H, d] in float64, from the keys and values that were fed, with the full softmax edited."""
    groups, outputs = patch.num_heads // patch.num_kv_heads, []
    sinks = _sinks(patch)
    for row, (start, count) in enumerate(zip(done, lengths, strict=True)):
        end = start + count
        q = rows.q[row][start:end].double().cpu()
        k, v = (x[row][:end].double().cpu().repeat_interleave(groups, 1) for x in (rows.k, rows.v))
        scores = torch.einsum("qhd,nhd->hqn", q, k) * patch.scale
        if patch.softcap:
            scores = patch.softcap * torch.tanh(scores / patch.softcap)
        i, j = torch.arange(start, end)[:, None], torch.arange(end)[None]
        hidden = j > i
        if patch.window:
            hidden |= i - j >= patch.window
        if patch.keeps is not None:
            hidden |= (j >= patch.keeps[0]) & (i - j >= patch.keeps[1])
        scores = scores.masked_fill(hidden, -math.inf)
        if weight is not None:
            alone = (~hidden).sum(-1) == 1  # a row that sees only the first token stays as it is
            factor = (
                torch.where(alone, 0.0, weight.double().log()[:, None])
                if sinks is None
                else weight.double().log()[:, None]
            )
            scores[:, :, 0] += factor
        if marked is not None and row == 0:
            scores[:, :, slice(*marked.span)] += marked.weight.double().log()[:, None, None]
        if sinks is not None:
            column = sinks.double().cpu().view(-1, 1, 1).expand(-1, count, 1)
            p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        o = torch.einsum("hqn,nhd->qhd", p, v)
        o = o if scale is None else o * scale.double()[None, :, None]
        outputs.append(o if some is None else some.edited(o, start, PROMPTS[row]))
    return torch.cat(outputs)
