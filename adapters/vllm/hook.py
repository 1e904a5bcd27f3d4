"""One attention layer of an armed engine: its implementation's ``forward`` runs as it is, then its output is edited in place.

``impl.forward`` is called from inside vLLM's opaque attention op, so nothing here is ever traced: it runs eagerly under piecewise
compilation and is captured in full CUDA graphs, where everything it reads lies at fixed addresses.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.split import WINDOW
from headpatch.adapters.vllm.worker import Worker, worker_of
from headpatch.errors import EngineError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headpatch.adapters.vllm.split import Piece
    from headpatch.adapters.vllm.tables import Tables

__all__ = ["LayerPatch", "build"]

logger = logging.getLogger("vllm.headpatch")


def build(original: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Build an attention layer; if it belongs to an armed engine's model, cut it where the engine is split, and patch it."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backend import AttentionType

    worker = worker_of(get_current_vllm_config_or_none())
    if worker is None:
        original(layer, *args, **kwargs)
        return
    given = inspect.signature(original).bind(layer, *args, **kwargs).arguments
    found = _index(given.get("prefix", ""), given.get("attn_type", AttentionType.DECODER), worker)
    if isinstance(found, int) and worker.armed.split is not None:
        from headpatch.adapters.vllm.split_layer import build_pieces

        start = 0
        for piece in build_pieces(original, layer, given, found, worker):
            worker.layers.append(LayerPatch(worker, piece, piece.piece, start))
            start += len(piece.piece.query)
        layer.join(worker.beside())
        return
    original(layer, *args, **kwargs)
    if isinstance(found, str):
        worker.skipped.append(f"{layer.layer_name} ({found})")
    else:
        worker.layers.append(LayerPatch(worker, layer))


def _index(name: str, kind: Any, worker: Worker) -> int | str:
    """Number of a layer, or why it is not one of the language model's decoder layers."""
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.attention.backend import AttentionType

    if kind != AttentionType.DECODER:
        return f"attention type {kind}"
    try:
        index = int(extract_layer_index(name))
    except (AssertionError, ValueError):
        return "no single layer number in its name"
    if index >= worker.shape.parts[worker.shape.main].num_layers:
        return "a draft model's layer"
    if any(patch.index == index for patch in worker.layers):
        raise EngineError(
            f"two attention layers have the number {index}: {name} and another; which is meant is unknown"
        )
    return index


class LayerPatch:
    """A patched layer.

    Attributes
    ----------
    index, name
        Layer of the whole model, and vLLM's name for it.
    heads
        Its query heads, in the numbers of the whole model: this rank's, or the piece's where layers are cut.
    piece, start
        What it holds where layers are cut (None: they are not), and where its heads begin in the layer's tables.
    impl
        vLLM's implementation of it, whose ``forward`` is this patch's.
    keeps
        First and last tokens that its heads keep; None for all.
    window
        Sliding window of the model's own, 0 for none.
    armed
        Whether it can be edited at all: layers that no armed recipe names run as if they were not patched.
    how
        How the first token's share is had; see :mod:`headpatch.adapters.vllm.masses`.
    calls
        Eager calls that went through the edit. Replays of captured graphs run no Python and are not counted.
    """

    def __init__(self, worker: Worker, layer: Any, piece: Piece | None = None, start: int = 0) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.model_executor.models.utils import extract_layer_index

        impl = layer.impl
        self.worker, self.layer, self.impl = worker, layer, impl
        self.name: str = layer.layer_name
        self.index = int(extract_layer_index(self.name))
        rank = int(get_tensor_model_parallel_rank())
        self.num_heads, self.num_kv_heads = int(layer.num_heads), int(layer.num_kv_heads)
        self.head_dim = int(layer.head_size)
        self.piece, self.start = piece, start
        self.keeps: tuple[int, int] | None = None
        self.heads: Sequence[int] = range(rank * self.num_heads, (rank + 1) * self.num_heads)
        self.window = int(layer.sliding_window or 0)
        if piece is not None:
            # The first token is always there, whatever window the kernel is given.
            self.heads, self.window = piece.query, 0
            if piece.kind == WINDOW:
                self.keeps = layer.split.sink, layer.split.recent
        self.backend: str = layer.attn_backend.get_name()
        self.scale = float(impl.scale)
        self.softcap = float(getattr(impl, "logits_soft_cap", 0) or 0.0)
        self.idle = piece is not None and not piece.kv
        self.armed = (worker.armed.layers is None or self.index in worker.armed.layers) and not self.idle
        self.how = "off"
        self.calls = 0
        self.block_ratio = 1
        self.weight: Tensor = torch.empty(0)
        self.head_scale: Tensor = torch.empty(0)
        self._edit: Any = None
        if self.armed:
            _check_layer(layer)
        self.original = impl.forward
        impl.forward = self.forward
        if hasattr(impl, "fused_output_quant_supported"):  # the edit needs the output before it is quantised
            impl.fused_output_quant_supported = _never

    def layer_device(self) -> torch.device:
        """Where the layer's keys and values are."""
        return self.cache().device

    def cache(self) -> Tensor:
        """The layer's keys and values, [blocks, KV heads, block size, 2 d]; any strides."""
        found = self.layer.kv_cache
        while isinstance(found, list | tuple):
            found = found[0]
        return found

    def ready(self, tables: Tables, block_size: int | None) -> None:
        """Learn where the tables are and choose how the layer is edited."""
        from headpatch.adapters.vllm.masses import choose

        self.weight = tables.weight[self.index, :, self.start : self.start + self.num_heads]
        self.head_scale = tables.scale[self.index, :, self.start : self.start + self.num_heads]
        if self.idle or not (self.armed or self.piece):
            return
        cache = self.cache()
        wanted = (self.num_kv_heads, 2 * self.head_dim)
        if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != wanted:
            raise EngineError(
                f"layer {self.index}: the {self.backend} backend keeps its cache as {tuple(cache.shape)}, not as "
                f"[blocks, {wanted[0]}, block size, {wanted[1]}]"
            )
        if block_size is not None:
            self.block_ratio = max(1, block_size // int(cache.shape[2]))
        if not self.armed:
            return
        self._edit = choose(self)
        self.how = self._edit.how

    def segment_heads(self) -> Tensor:
        """This rank's query heads whose attention to segments may be edited, int64; known once the layer is ready."""
        found = getattr(self._edit, "segments", None)
        return torch.arange(self.num_heads) if found is None else found.heads.cpu()

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As the implementation's own; without metadata (profiling runs) and before start-up is over it is that alone."""
        if self._edit is None or attn_metadata is None:
            return self.original(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        self.calls += 1

        def run() -> Any:
            return self.original(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

        # Where layers are cut, kernels see other rows than the batch has; edits work on those that it has.
        rows = getattr(attn_metadata, "headpatch_rows", attn_metadata)
        return self._edit(run, query, kv_cache, rows, output)

    def report(self) -> dict[str, Any]:
        """Plain values, for a remote call."""
        heads = [min(self.heads), max(self.heads) + 1] if self.heads else [0, 0]
        found = {
            "layer": self.index, "name": self.name, "heads": heads, "armed": self.armed, "backend": self.backend,
            "how": self.how, "calls": self.calls,
        }  # fmt: skip
        if self.piece is not None:
            found["piece"] = {
                "kind": self.piece.kind,
                "kv": list(self.piece.kv),
                "keeps": list(self.keeps) if self.keeps else None,
            }
        return found


def _never(*_: Any, **__: Any) -> bool:
    return False


def _check_layer(layer: Any) -> None:
    impl = layer.impl
    if getattr(impl, "alibi_slopes", None) is not None:
        raise UnsupportedModelError(f"{layer.layer_name}: operand 'first_token' cannot be had with alibi")
    if int(getattr(layer, "head_size_v", layer.head_size)) != int(layer.head_size):
        raise UnsupportedModelError(f"{layer.layer_name}: values of another width than keys")
    if str(getattr(layer, "kv_cache_dtype", "auto")).startswith(("fp8", "int", "nvfp4", "turboquant", "ultraquant")):
        raise EngineError(f"{layer.layer_name}: a quantised KV cache ({layer.kv_cache_dtype}) cannot be exact")
