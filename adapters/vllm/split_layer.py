"""Attention layers cut into pieces that keep different tokens: each piece an attention layer of vLLM's own, kernels and all.

The model's layer becomes its own first piece; the others hang on it as modules. Queries, keys and values are dealt out by head, each
piece is called as any layer is (one opaque operator each, so that compilation and graphs stay as they are), and the outputs are put
back in the order of the heads. A window piece's metadata builder hands vLLM's own the block tables of
:mod:`headpatch.kernels.tables`; kernels, backends and the cache's layout are not touched.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import Attention

from headpatch.adapters.vllm.split import FULL, WINDOW, Blocks, Piece, choose_blocks
from headpatch.adapters.vllm.split_cache import SinkWindowSpec
from headpatch.errors import EngineError, UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.split import Split

__all__ = ["PieceLayer", "SplitLayer", "build_pieces"]

REFUSED = {
    "alibi_slopes": "alibi, whose scores depend on where in the row a key lies",
    "per_layer_sliding_window": "a sliding window of the layer's own",
    "kv_sharing_target_layer_name": "keys and values of another layer",
    "sinks": "learned sink logits",
    "attn_backend": "an attention backend of the layer's own",
}
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
UNVERIFIED_BACKENDS = ("TRITON_ATTN",)


class PieceLayer(Attention):
    """One piece. `places` in its cache may be more than it has heads; it sees those that it uses.

    Attributes
    ----------
    piece, split
        What it holds, and how the model is cut.
    idle
        Whether this rank has no head for it: its cache is there because other ranks need it, and it is never called.
    """

    piece: Piece
    split: Split
    idle: bool

    @property
    def kv_cache(self) -> Any:
        """Keys and values of this piece's heads, [blocks, KV heads, block size, 2 d]."""
        return self.__dict__["_piece_cache"]

    @kv_cache.setter
    def kv_cache(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] > self.num_kv_heads:
            value = value[:, : self.num_kv_heads]
        self.__dict__["_piece_cache"] = value

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """What vLLM's cache manager is told: places for heads, not heads, so that all layers and ranks say the same."""
        blocks = self._blocks(vllm_config)
        known: Any = super().get_kv_cache_spec(vllm_config)
        if self.piece.kind == FULL:
            return dataclasses.replace(known, block_size=blocks.full_size, num_kv_heads=blocks.full_places)
        values = {f.name: getattr(known, f.name) for f in dataclasses.fields(known) if f.init}
        values |= {"block_size": blocks.window_size, "num_kv_heads": blocks.window_places, "page_size_padded": None}
        return SinkWindowSpec(**values, sink_tokens=self.split.sink)

    def _blocks(self, vllm_config: Any) -> Blocks:
        backend: Any = self.attn_backend
        steps = [int(getattr(step, "base", step)) for step in backend.get_supported_kernel_block_sizes()]
        return choose_blocks(self.split, int(vllm_config.cache_config.block_size), steps)


class SplitLayer(PieceLayer):
    """The model's own layer, which is also the first of its pieces.

    Attributes
    ----------
    others
        The other pieces.
    ranges
        By piece, where its query heads and its KV heads begin and end on this rank; None where they are no neighbours, and buffers
        say which they are.
    in_order, order
        Whether heads come out in the order of the model, and otherwise how they are put back.
    """

    others: Any
    ranges: list[tuple[int, int, int, int] | None]
    in_order: bool
    order: Tensor

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As the uncut layer's: [T, H d] queries, [T, K d] keys and values, to [T, H d]."""
        if args or any(given is not None for given in kwargs.values()) or key is None or value is None:
            raise EngineError(f"{self.layer_name}: this model calls attention in a form that cannot be cut by head")
        q = query.reshape(query.shape[0], -1, self.head_size)
        k = key.reshape(key.shape[0], -1, self.head_size)
        v = value.reshape(value.shape[0], -1, self.head_size_v)
        outputs = []
        for number, piece in enumerate((self, *self.others)):
            if piece.idle:
                continue
            mine = self.ranges[number]
            if mine is not None:
                parts = q[:, mine[0] : mine[1]], k[:, mine[2] : mine[3]], v[:, mine[2] : mine[3]]
            else:
                at_q: Any = getattr(self, f"query_{number}")
                at_kv: Any = getattr(self, f"kv_{number}")
                parts = q.index_select(1, at_q), k.index_select(1, at_kv), v.index_select(1, at_kv)
            outputs.append(Attention.forward(piece, *parts).view(-1, piece.num_heads, self.head_size_v))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if not self.in_order:
            out = out.index_select(1, self.order)
        return out.reshape(query.shape[0], -1)


def build_pieces(original: Any, layer: Any, arguments: Mapping[str, Any], index: int, worker: Any) -> list[PieceLayer]:
    """Build `layer`, which is being constructed, as the pieces that `worker`'s engine is armed for.

    Parameters
    ----------
    original
        vLLM's ``Attention.__init__``.
    arguments
        What it is constructed with, by name.
    index
        Its number.

    Returns
    -------
    list
        The pieces, `layer` first.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    given = dict(arguments)
    given.pop("self")
    extra = {name: value for name, value in given.pop("extra_impl_args", {}).items() if value is not None}
    prefix = given.get("prefix", "")
    _check(layer, prefix, {**given, **extra})
    split: Split = worker.armed.split
    rank = int(get_tensor_model_parallel_rank())
    heads, groups = int(given["num_heads"]), int(given.get("num_kv_heads") or given["num_heads"])
    if (heads * split.world, groups * split.world) != (split.num_heads[index], split.num_kv_heads[index]):
        raise EngineError(
            f"layer {index} has {heads} query heads and {groups} KV heads on a rank, its config says "
            f"{split.num_heads[index]} and {split.num_kv_heads[index]} on {split.world} ranks"
        )
    pieces = split.pieces(index, rank)
    made: list[PieceLayer] = []
    backend = None
    for number, piece in enumerate(pieces):
        one = layer if number == 0 else PieceLayer.__new__(PieceLayer)
        settings = {
            **given, "num_heads": max(1, len(piece.kv)) * (heads // groups), "num_kv_heads": max(1, len(piece.kv)),
            "prefix": prefix if number == 0 else f"{prefix}_{number}",
        }  # fmt: skip
        if piece.kind == WINDOW:
            settings["per_layer_sliding_window"] = split.sink + split.recent
        if backend is not None:
            settings["attn_backend"] = backend
        original(one, **settings, **extra)
        backend = backend or one.attn_backend
        if number == 0:
            one.__class__ = SplitLayer
            one.__dict__["_piece_cache"] = one.__dict__.pop("kv_cache", torch.tensor([]))
        one.piece, one.split, one.idle = piece, split, not piece.kv
        made.append(one)
    assert backend is not None
    _check_backend(backend, prefix, worker.armed.unverified)
    for one in made:
        one.attn_backend = cut_backend(backend, one.piece.kind)
    _finish(made, rank * heads, rank * groups)
    return made


def _finish(made: list[PieceLayer], first_query: int, first_kv: int) -> None:
    """Hang the other pieces on the first, and say which heads of this rank's go where."""
    layer: Any = made[0]
    layer.others = torch.nn.ModuleList(made[1:])
    layer.ranges = []
    for number, one in enumerate(made):
        query, kv = [h - first_query for h in one.piece.query], [h - first_kv for h in one.piece.kv]
        if kv and kv == list(range(kv[0], kv[-1] + 1)):  # neighbours need no copy
            layer.ranges.append((query[0], query[-1] + 1, kv[0], kv[-1] + 1))
            continue
        layer.ranges.append(None)
        layer.register_buffer(f"query_{number}", torch.tensor(query, dtype=torch.int64), persistent=False)
        layer.register_buffer(f"kv_{number}", torch.tensor(kv, dtype=torch.int64), persistent=False)
    dealt = [head - first_query for one in made for head in one.piece.query]
    order = sorted(range(len(dealt)), key=dealt.__getitem__)
    layer.in_order = order == list(range(len(order)))
    if not layer.in_order:
        layer.register_buffer("order", torch.tensor(order, dtype=torch.int64), persistent=False)


def _check(layer: Any, prefix: str, given: dict[str, Any]) -> None:
    if type(layer) is not Attention:
        raise UnsupportedModelError(
            f"{prefix}: operand 'kv_windows' is not supplied for a layer of the class {type(layer).__name__}"
        )
    words = [text for name, text in REFUSED.items() if given.get(name) is not None]
    if getattr(given.get("cache_config"), "sliding_window", None) is not None:
        words.append(REFUSED["per_layer_sliding_window"])
    known = {*inspect.signature(Attention.__init__).parameters, *REFUSED}
    words += [f"{name}, which headpatch does not know" for name in given if name not in known]
    if given.get("head_size_v") not in (None, given["head_size"]):
        words.append("values of another width than keys")
    if words:
        raise UnsupportedModelError(f"{prefix}: operand 'kv_windows' cannot be had with {'; '.join(words)}")


def _check_backend(backend: Any, prefix: str, unverified: bool) -> None:
    name = backend.get_name()
    if name not in BACKENDS and not (unverified and name in UNVERIFIED_BACKENDS):
        how = '; {"unverified": true} in the flag starts it all the same' if name in UNVERIFIED_BACKENDS else ""
        raise UnsupportedModelError(
            f"{prefix}: operand 'kv_windows' is not supplied by the attention backend {name}; choose FLASH_ATTN "
            f"(--attention-backend){how}"
        )


# --- metadata -----------------------------------------------------------------------------------------------------------


@functools.cache
def cut_backend(backend: Any, kind: str) -> Any:
    """The backend with a metadata builder that knows what a piece is."""
    from vllm.v1.attention.backend import subclass_attention_backend

    from headpatch.adapters.vllm.split_builder import full_builder, window_builder

    make = full_builder if kind == FULL else window_builder
    return subclass_attention_backend(f"Headpatch{kind.capitalize()}_", backend, make(backend.get_builder_cls()))
