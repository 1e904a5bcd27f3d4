"""Attention layers cut into pieces that keep different tokens: each piece an attention layer of vLLM's own, kernels and all.

The model's layer becomes its own first piece; the others hang on it as modules. The model calls one opaque operator a layer, as it
always does, so that compilation and graphs stay as they are; in it, each piece's own implementation works on its heads' part of
queries and outputs. A window piece's metadata builder hands vLLM's own the block tables of :mod:`headpatch.kernels.tables`; kernels,
backends and the cache's layout are not touched.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import Attention, get_attention_context

from headpatch.adapters.vllm.split import FULL, WINDOW, Blocks, Piece, choose_blocks
from headpatch.adapters.vllm.split_cache import SinkWindowSpec
from headpatch.errors import EngineError, UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.split import Split

__all__ = ["PieceLayer", "PiecesImpl", "SplitLayer", "build_pieces"]

REFUSED = {
    "alibi_slopes": "alibi, whose scores depend on where in the row a key lies",
    "per_layer_sliding_window": "a sliding window of the layer's own",
    "kv_sharing_target_layer_name": "keys and values of another layer",
    "sinks": "learned sink logits",
    "attn_backend": "an attention backend of the layer's own",
}
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
UNVERIFIED_BACKENDS = ("TRITON_ATTN",)


Heads = tuple[int, int, int, int]
"""Where a piece's query heads and its KV heads begin and end."""


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
    runs
        Pieces that have heads here, and where their query heads and KV heads begin and end among the dealt ones.
    dealt
        Whether heads must be brought into the order of the pieces, and back: buffers say how.
    whole
        What vLLM's own forward sees in place of this layer: all heads of this rank.
    """

    others: Any
    impl: Any
    runs: list[tuple[PieceLayer, Heads]]
    dealt: bool
    query_order: Tensor
    kv_order: Tensor
    order: Tensor
    whole: Any

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As the uncut layer's: [T, H d] queries, [T, K d] keys and values, to [T, H d]."""
        if args or any(given is not None for given in kwargs.values()) or key is None or value is None:
            raise EngineError(f"{self.layer_name}: this model calls attention in a form that cannot be cut by head")
        if not self.dealt:
            return Attention.forward(self.whole, query, key, value)
        rows = query.shape[0]
        q = query.reshape(rows, -1, self.head_size).index_select(1, self.query_order)
        k = key.reshape(rows, -1, self.head_size).index_select(1, self.kv_order)
        v = value.reshape(rows, -1, self.head_size_v).index_select(1, self.kv_order)
        out = Attention.forward(self.whole, q, k, v).view(rows, -1, self.head_size_v)
        return out.index_select(1, self.order).reshape(rows, -1)

    def join(self, beside: torch.cuda.Stream | None) -> None:
        """Let one call of the layer's operator run all pieces. After this, a piece's own implementation is its patch's.

        Parameters
        ----------
        beside
            Where window pieces run while graphs are captured; None: where the others do, behind them.
        """
        self.impl = PiecesImpl(self.runs, self.impl, beside)
        known = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        heads = sum(b - a for _, (a, b, _, _) in self.runs), sum(b - a for _, (_, _, a, b) in self.runs)
        self.whole = Whole({**known, "num_heads": heads[0], "num_kv_heads": heads[1]})


class Whole:
    """A layer's settings, as vLLM's ``Attention.forward`` reads them, with other numbers of heads."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        vars(self).update(known)


Run = tuple[PieceLayer, Any, Heads]
"""A piece, its own implementation, and its heads."""


class PiecesImpl:
    """The implementation of a layer that is cut: that of each piece, on its heads' part of queries and outputs.

    A window piece reads few keys. While graphs are captured it is put beside the pieces that read many, on a stream of its own: it
    takes the few multiprocessors that they leave free. Its keys and values are written there too, so this implementation does that
    and not the operator before it.

    Parameters
    ----------
    runs
        Pieces, and where their query heads and KV heads begin and end.
    first
        The first piece's own implementation: what vLLM asks of it beyond attention, it answers.
    beside
        As in :meth:`SplitLayer.join`.
    """

    def __init__(self, runs: list[tuple[PieceLayer, Heads]], first: Any, beside: torch.cuda.Stream | None) -> None:
        self.first = first
        made = [(piece, piece.impl, heads) for piece, heads in runs]
        self.windows = [run for run in made if run[0].piece.kind == WINDOW]
        self.full = [run for run in made if run[0].piece.kind == FULL]
        self.beside = beside if self.windows and self.full else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["first"], name)

    def fused_output_quant_supported(self, *_: Any, **__: Any) -> bool:
        """Never: edits need outputs before they are quantised."""
        return False

    def fused_rope_kvcache_supported(self, *_: Any, **__: Any) -> bool:
        """Never: keys go to several caches."""
        return False

    def do_kv_cache_update(self, *_: Any, **__: Any) -> None:
        """Nothing: see the class."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As a piece's own, for all heads of this rank; `kv_cache` and `attn_metadata` are looked up for each piece."""
        given = query, key, value, output, args, kwargs
        for run in self.full:
            self._write(run, key, value)
        if self.beside is not None and torch.cuda.is_current_stream_capturing():
            here = torch.cuda.current_stream()
            self.beside.wait_stream(here)
            # First, so that its programs are the first to get a place: those of the windows take what is left.
            for run in self.full:
                self._attend(run, *given)
            with torch.cuda.stream(self.beside):
                for run in self.windows:
                    self._write(run, key, value)
                    self._attend(run, *given)
            here.wait_stream(self.beside)
        else:
            for run in self.windows:
                self._write(run, key, value)
            for run in (*self.full, *self.windows):
                self._attend(run, *given)
        return output

    @staticmethod
    def _write(run: Run, key: Tensor, value: Tensor) -> None:
        """Keys and values into the piece's cache."""
        piece, impl, heads = run
        _, _, cache, slots = get_attention_context(piece.layer_name)
        backend: Any = piece.attn_backend
        if slots is not None and not backend.forward_includes_kv_cache_update:
            impl.do_kv_cache_update(piece, key[:, heads[2] : heads[3]], value[:, heads[2] : heads[3]], cache, slots)

    @staticmethod
    def _attend(
        run: Run,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        piece, impl, (a, b, c, d) = run
        metadata, _, cache, _ = get_attention_context(piece.layer_name)
        q, k, v, out = query[:, a:b], key[:, c:d], value[:, c:d], output[:, a:b]
        if out.device.type == "cpu":  # whose kernel writes heads one after the other
            made = out.new_empty(out.shape)
            impl.forward(piece, q, k, v, cache, metadata, made, *args, **kwargs)
            out.copy_(made)
        else:
            impl.forward(piece, q, k, v, cache, metadata, out, *args, **kwargs)


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
    query, kv = ([head - first for one in made for head in getattr(one.piece, name)]
                 for name, first in (("query", first_query), ("kv", first_kv)))  # fmt: skip
    layer.runs, a, c = [], 0, 0
    for one in made:
        b, d = a + len(one.piece.query), c + len(one.piece.kv)
        if not one.idle:
            layer.runs.append((one, (a, b, c, d)))
        a, c = b, d
    layer.dealt = kv != sorted(kv)
    if layer.dealt:
        order = sorted(range(len(query)), key=query.__getitem__)
        for name, value in (("query_order", query), ("kv_order", kv), ("order", order)):
            layer.register_buffer(name, torch.tensor(value, dtype=torch.int64), persistent=False)


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
