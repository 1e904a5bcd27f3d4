"""What one forward call knows about its rows: where each row's first real token is, which positions it covers, and its cache.

A hook on the innermost PreTrainedModel around the attention layers (the *stack*) reads the model-level mask once per call. A layer's
own mask would be wrong: on a sliding layer its first visible key is the window's start. Columns are absolute: column j is the j-th
position since the cache was empty, padding included; a layer turns them into key indices with its own offset.

Nothing here changes a tensor. Under torch.compile the hooks are traced; the per-thread table is replaced by one attribute that is
set and cleared within the traced call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.kvadopt import begin
from headpatch.adapters.huggingface.masks import causal_ranges
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller
    from headpatch.adapters.huggingface.kvplan import Policy

__all__ = ["Rows", "StackHooks", "state_of"]

LONG = 512
"""From this length on a padded prompt is worth a look at its mask: rows one by one, without a mask, are then the faster way."""

BLOCK = 1024
"""Mask rows that are searched at once, so that no second mask is ever stored."""


@dataclass
class Rows:
    """One forward call of one stack.

    Attributes
    ----------
    first
        Column of the first real token: [b], or [b, q] where a row packs several sequences; None where nothing says (then layers
        without a mask take 0).
    cross_first
        The same for the keys of cross-attention.
    real
        [b, n] bool, real (unpadded) columns, where a 2-D mask says.
    started, whole, prompt_end, acted_on
        What is asked of the device once in a call: `past` as a number, whether the call holds every row's whole prompt, the first
        column behind a row's prompt, the least of all rows, and, by key of an edit, the first query that it can change in any row.
    past, length
        Columns before this call (an int, or a tensor for static caches), and columns of this call.
    offsets
        Column of key 0, for layers whose cache is a window; 0 for all others.
    position_ids
        As the model got them, if 2-D.
    input_ids
        [b, q] where the stack or the model around it got them.
    cache
        The cache object of this call, or None.
    layer_inputs
        Residual stream that entered each layer, by layer, for layers whose patches asked for it.
    known
        What ``inputs()`` gave for this call.
    derived
        State derived from the prompt in a call that was given no cache; it goes into the cache that the call makes.
    images
        [b, columns so far, or fewer] bool, image tokens of this call and those before; for layers whose patches asked for it.
    image_queries
        [b, q] bool, image tokens of this call.
    ranges
        Masks that this call's layers got, with their :func:`causal_ranges`, by address (which a kept mask cannot lose).
    wants_weights
        Whether attention matrices were asked for, in the call or in the config.
    mask
        The model-level mask as it was given.
    once
        What :meth:`remember` keeps for all layers of this call.
    kept, chunk
        Under a cache policy: what the layers of the cache share, or, without a cache, what this call brings.
    """

    first: Tensor | None = None
    cross_first: Tensor | None = None
    real: Tensor | None = None
    past: Any = 0
    length: int = 0
    started: int | None = None
    whole: bool | None = None
    prompt_end: int | None = None
    acted_on: dict[tuple[str, int], int] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    position_ids: Tensor | None = None
    input_ids: Tensor | None = None
    cache: Any = None
    layer_inputs: dict[int, Tensor] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    derived: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    image_queries: Tensor | None = None
    ranges: dict[Any, tuple[Tensor, list[tuple[int, int]] | None]] = field(default_factory=dict)
    wants_weights: bool = False
    mask: Any = None
    once: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    kept: Any = None
    chunk: Any = None

    def remember(self, key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What does not depend on the layer, computed once in a call; `key` says all that it depends on."""
        found = self.once.get(key)
        if found is None:
            found = self.once[key] = compute()
        return found

    def begins_at(self) -> int:
        """`past` as a number. Waits for the device once in a call where a static cache counts there."""
        if self.started is None:
            self.started = int(self.past)
        return self.started

    def behind(self, until: int) -> bool:
        """Whether all positions of this call are certainly behind the one that is `until` from the end of every row's prompt.

        Eager calls on a cache only, and without looking at the device but once in a request.
        """
        if torch.compiler.is_compiling() or self.cache is None or type(self.past) is not int or not self.past:
            return False
        kept = self.cache.__dict__.get("headpatch_state", {})
        length = kept.get(("prompt_len",))
        if length is None or (self.first is not None and self.first.ndim != 1):
            return False
        if ("prompt_end",) not in kept:
            first = torch.zeros_like(length) if self.first is None else self.first.to(length.device)
            kept["prompt_end",] = (first + length.repeat_interleave(len(first) // len(length), 0)).max().cpu()
        return self.past >= int(kept["prompt_end",]) + until

    def causal_ranges(self, mask: object) -> list[tuple[int, int]] | None:
        """Each row's tokens in a long padded prompt on an empty cache, where a layer's `mask` is causality among them."""
        if torch.compiler.is_compiling() or self.real is None or not isinstance(mask, Tensor) or mask.ndim != 4:
            return None
        if not (isinstance(self.past, int) and self.past == 0) or not LONG <= self.length == self.real.shape[1]:
            return None
        key = (mask.data_ptr(), mask.shape, mask.stride())
        if key not in self.ranges:
            self.ranges[key] = (mask, causal_ranges(mask, self.real))
        return self.ranges[key][1]


class StackHooks:
    """Forward hooks of one stack; they publish a :class:`Rows` for the attention layers inside."""

    def __init__(self, controller: Controller, stack: nn.Module) -> None:
        self.controller = controller
        forward = inspect.unwrap(type(stack).forward)
        self.names = tuple(inspect.signature(forward).parameters)[1:]
        self.takes_extra = any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()
        )
        self.policies: dict[int, Policy] = {}
        self.by_thread: dict[int, Rows] = {}
        self.traced: Rows | None = None
        self.registered: list[Any] = [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after, always_call=True),  # after errors, too: it holds the cache
        ]

    def remove(self) -> None:
        """Take the hooks off the stack."""
        for hook in self.registered:
            hook.remove()
        self.registered.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "by_thread": {}, "traced": None}

    def current(self) -> Rows | None:
        """The call that is running in this thread."""
        if torch.compiler.is_compiling():
            return self.traced
        return self.by_thread.get(threading.get_ident())

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read masks, positions and cache of the call."""
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        cache = _first(given, "past_key_values", "past_key_value", "layer_past")
        mask = given.get("attention_mask")
        inputs = _first(given, "input_ids", "inputs_embeds", "hidden_states", "decoder_input_ids")
        rows = Rows(cache=cache, length=int(inputs.shape[1]) if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0)
        ids = given.get("input_ids")
        rows.input_ids = ids if isinstance(ids, Tensor) else None
        positions = given.get("position_ids")
        rows.position_ids = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
        if cache is not None and hasattr(cache, "get_query_offset"):
            past = cache.get_query_offset()
            rows.past = past.clone() if isinstance(past, Tensor) else past  # static layers count on in place
            held = getattr(cache, "self_attention_cache", cache)
            rows.offsets = {
                i: layer.get_mask_sizes(rows.length)[1]
                for i, layer in enumerate(held.layers)
                if getattr(layer, "is_sliding", False)
            }
            self.controller.admit(cache)
        rows.first, rows.real = _first_columns(mask, rows, cache)
        rows.mask = mask
        if cache is not None and hasattr(cache, "get_query_offset"):
            begin(rows, cache, self)
        encoder_mask = given.get("encoder_attention_mask")
        if isinstance(encoder_mask, Tensor):
            rows.cross_first = _first_columns(encoder_mask, rows, None)[0]
        rows.known = self.controller.call_data
        asked = given.get("output_attentions")
        rows.wants_weights = bool(getattr(module.config, "output_attentions", False) if asked is None else asked)
        if torch.compiler.is_compiling():
            self.traced = rows
        else:
            self.by_thread[threading.get_ident()] = rows
        if module.training and self.takes_extra and getattr(module, "is_gradient_checkpointing", False):
            # The backward pass runs layers again after this call is over; only what is passed as an argument comes back then.
            return args, {**kwargs, "headpatch_rows": rows}
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Mark a cache that the call made, and forget the call."""
        cache = getattr(output, "past_key_values", None)
        rows = self.current()
        if cache is not None and hasattr(cache, "get_seq_length"):
            self.controller.mark(cache)
            if rows is not None and rows.derived:
                state_of(cache).update(rows.derived)
        if torch.compiler.is_compiling():
            self.traced = None
        else:
            self.by_thread.pop(threading.get_ident(), None)


def state_of(cache: Any) -> dict[tuple[Any, ...], Tensor]:
    """State of the request that a cache belongs to. (Plain attributes: torch 2.11 cannot trace methods of ``cache.__dict__``.)"""
    kept: dict[tuple[Any, ...], Tensor] | None = getattr(cache, "headpatch_state", None)
    if kept is None:
        kept = cache.headpatch_state = {}
    return kept


def _first(given: dict[str, Any], *names: str) -> Any:
    return next((given[n] for n in names if given.get(n) is not None), None)


def _first_columns(mask: Any, rows: Rows, cache: Any) -> tuple[Tensor | None, Tensor | None]:
    """First real column per row (or per query), and which columns are real, from whatever mask the model was given."""
    windowed_only = False
    if isinstance(mask, dict):
        # generate() builds one mask per layer type for static caches; only the full one shows the first token.
        windowed_only = mask.get("full_attention") is None
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if hasattr(mask, "mask_mod"):  # a BlockMask that the user built: the layers evaluate it
        raise EngineError(
            "a ready-made BlockMask was given as attention_mask: the first real token of each row cannot be read from it; "
            "give the 2-D mask and let the model build its own"
        )
    if mask is None:
        if rows.position_ids is not None and cache is None and rows.length > 1:
            return _packed_starts(rows.position_ids), None
        return None, None
    if mask.ndim == 2:
        real = mask != 0
        return real.to(torch.uint8).argmax(-1), real
    if mask.ndim != 4:
        raise EngineError(f"attention_mask has {mask.ndim} dimensions; headpatch understands 2 and 4")
    static = getattr(cache, "is_compileable", False)
    if static and len(rows.offsets) == len(getattr(cache, "self_attention_cache", cache).layers):
        windowed_only = True  # every layer is windowed, and the mask with them
    if static and windowed_only:
        kept = getattr(cache, "headpatch_first", None)
        if not torch.compiler.is_compiling() and isinstance(rows.past, int) and rows.past == 0:
            # The diagonal is inside every window: its first visible entry is the row's first real token.
            kept = _visible(torch.diagonal(mask[:, 0], dim1=-2, dim2=-1)).to(torch.uint8).argmax(-1)
            cache.headpatch_first = kept
        if kept is None:
            raise EngineError(
                "a static cache on a model whose layers are all windowed was not prefilled by this patched model, so the "
                "first real token of each row is not known; prefill with the recipe applied, or use a dynamic cache"
            )
        return kept, None
    if static:
        return _visible(mask[:, 0, -1]).to(torch.uint8).argmax(-1), None
    blocks = [_visible(mask[:, 0, i : i + BLOCK]).to(torch.uint8).argmax(-1) for i in range(0, mask.shape[2], BLOCK)]
    return torch.cat(blocks, 1), None


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _packed_starts(position_ids: Tensor) -> Tensor:
    """Column where the sequence of each query starts, [b, q]: positions that do not rise by one start a new one."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    fresh = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return torch.cummax(torch.where(fresh, columns, 0), dim=-1).values
