"""Prompts without their images, beside the prompts themselves, in the prefill of generate() and nowhere else.

Each row with an image gets a companion: the same tokens without the image's placeholders, padded on the left to one width. Rows and
companions run as one batch through a cache of their own; what the rows left there then goes into the cache that generate() prepared,
in one update a layer as an ordinary prefill makes it, and the companions are gone. The user sees none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headpatch.adapters.huggingface.images import image_token_of
from headpatch.adapters.huggingface.spans import ChosenRows, Spans
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller

__all__ = ["prefill_beside"]

PICTURES = ("image", "video", "vision", "pixel")
"""First words of arguments and results that have an entry per picture, not per row."""


def prefill_beside(
    controller: Controller, run: Callable[..., Any], input_ids: Tensor, model_kwargs: dict[str, Any], generation_config: Any,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """What ``run``, the model's own prefill, returns for these rows, with companions beside them while it runs.

    Beams and returned sequences of one prompt share one companion.
    """
    root: Any = controller.root
    token = image_token_of(root.config)
    _refuse(controller, input_ids, model_kwargs, generation_config)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    text = mask.bool() & (input_ids != token)
    pictured = (mask.bool() & (input_ids == token)).any(-1) & text.any(-1)
    made = [row for row in range(0, len(input_ids), copies) if bool(pictured[row])]
    others = [
        len(input_ids) + made.index(r - r % copies) if bool(pictured[r]) else None for r in range(len(input_ids))
    ]
    with _given(controller, others, made, mask, text):
        if not made:
            return run(input_ids, generation_config, model_kwargs, *args, **kwargs)
        beside = _Beside(input_ids, mask, text, made)
        given, cache = beside.arguments(model_kwargs), model_kwargs["past_key_values"]
        given["past_key_values"] = own = DynamicCache()
        outputs = run(beside.ids(input_ids), generation_config, given, *args, **kwargs)
    _move(controller, own, cache, len(input_ids))
    return _cut(outputs, len(input_ids) + len(made), len(input_ids), own, cache)


class _Beside:
    """Arguments with a row more for each companion; `made` are the rows that have one."""

    def __init__(self, input_ids: Tensor, mask: Tensor, text: Tensor, made: list[int]) -> None:
        self.shape, self.made, self.mask = input_ids.shape, made, mask
        width = input_ids.shape[1]
        keep = text[made]
        # Stable: what is kept moves to the right end in its order, what is not becomes padding on the left.
        self.source = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)
        lengths = keep.sum(-1, keepdim=True)
        self.real = torch.arange(width, device=keep.device) >= width - lengths

    def ids(self, given: Tensor) -> Tensor:
        """[b + companions, t] of any [b, t] tensor with an entry per token; padding repeats the row's last entry."""
        moved = torch.gather(given[self.made], 1, self.source.to(given.device))
        return torch.cat([given, torch.where(self.real.to(given.device), moved, moved[:, -1:])])

    def arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """generate()'s arguments of the model, for all rows."""
        found = dict(model_kwargs)
        positions = model_kwargs.get("position_ids")
        if isinstance(positions, Tensor):
            # Text alone counts 0, 1, 2, ... whatever the kind of positions; those with several axes say so in all of them.
            rows, width = self.shape
            mine = (self.real.long().cumsum(-1) - 1).clamp_min(0).to(positions)
            mine = mine.expand(*positions.shape[:-2], *mine.shape)
            found["position_ids"] = torch.cat([positions.expand(*positions.shape[:-2], rows, width), mine], -2)
        found["attention_mask"] = torch.cat([self.mask, self.real.to(self.mask)])
        for name, value in model_kwargs.items():
            if (
                not isinstance(value, Tensor)
                or name in ("position_ids", "attention_mask")
                or name.startswith(PICTURES)
            ):
                continue
            if value.shape == self.shape:
                found[name] = self.ids(value)
            elif value.ndim > 1 and value.shape[:2] == self.shape:
                raise EngineError(
                    f"operand 'without_image': this model takes {name} with an entry per token ({tuple(value.shape)}), and it is "
                    "not known what that is for a prompt without its image; run such prompts without the recipe"
                )
        return found


def _refuse(controller: Controller, input_ids: Tensor, model_kwargs: dict[str, Any], generation_config: Any) -> None:
    """Raise EngineError where companions cannot run beside the rows."""
    root: Any = controller.root
    mask = model_kwargs.get("attention_mask")
    problems = {
        "the prompt comes as embeddings, and its tokens are not known; pass input_ids": (
            model_kwargs.get("inputs_embeds") is not None or not input_ids.shape[1]
        ),
        "the prompt must come in one call; turn chunked prefill off": generation_config.prefill_chunk_size is not None,
        "encoder-decoder models see their images elsewhere; they are not supported": root.config.is_encoder_decoder,
        "a mask with two dimensions is needed, [rows, tokens]": mask is not None and mask.shape != input_ids.shape,
        "it does not go with a cache policy; run one of the two recipes": any(
            h.policies for h in controller.stacks.values()
        ),
    }
    for words, found in problems.items():
        if found:
            raise EngineError(f"operand 'without_image': {words}")


@contextlib.contextmanager
def _given(
    controller: Controller, others: list[int | None], made: list[int], mask: Tensor, text: Tensor
) -> Iterator[None]:
    """The calls' data, for rows and companions; what the caller gave stands again afterwards."""
    data = controller.call_data
    rows, lengths = others + [None] * len(made), torch.cat([mask.sum(-1), text[made].sum(-1)])
    new: dict[str, Any] = {"without_image": rows, "prompt_len": lengths}
    for name, value in data.items():
        if isinstance(value, Spans):
            many = _repeated(value.ranges, len(mask))
            new[name] = Spans.of([*many, *(_closed_up(many[row], text[row], mask[row]) for row in made)])
        elif isinstance(value, ChosenRows):
            kept = _repeated(list(value.rows), len(mask))
            new[name] = ChosenRows.of([*kept, *(kept[row] for row in made)])
    before = {name: data.pop(name) for name in new if name in data}
    try:
        with controller.given(new):
            yield
    finally:
        data.update(before)


def _repeated(entries: list[Any], rows: int) -> list[Any]:
    """One entry per row, from one per prompt: beams repeat them."""
    if not entries or rows % len(entries):
        raise EngineError(f"inputs() has {len(entries)} entries, the batch has {rows} rows: give one per row")
    return [entry for entry in entries for _ in range(rows // len(entries))]


def _closed_up(ranges: list[tuple[int, int]], text: Tensor, mask: Tensor) -> list[tuple[int, int]]:
    """Token ranges of a prompt, in the same prompt without its image."""
    kept = text[mask.bool()].long().cumsum(0)
    before = torch.cat([kept.new_zeros(1), kept]).tolist()
    moved = [(before[start], before[min(stop, len(before) - 1)]) for start, stop in ranges if start < len(before)]
    return [(start, stop) for start, stop in moved if start < stop]


def _move(controller: Controller, own: DynamicCache, cache: Any, rows: int) -> None:
    """Put what the rows left in their own cache into the one that generate() prepared, and what was derived from the prompt."""
    layers: list[Any] = list(own.layers)
    kept = [(index, layer) for index, layer in enumerate(layers) if layer.is_initialized]
    for index, layer in kept:
        if not isinstance(getattr(layer, "keys", None), Tensor):
            raise EngineError(f"operand 'without_image': layer {index} keeps a state and no keys; it is not supported")
    controller.mark(cache, fresh=True)
    for index, layer in kept:
        cache.update(layer.keys[:rows], layer.values[:rows], index)
        layer.keys = layer.values = None
    derived = own.__dict__.pop("headpatch_state", {})
    cache.headpatch_state = {key: value[:rows] if value.ndim else value for key, value in derived.items()}


def _cut(outputs: Any, total: int, rows: int, own: Any, cache: Any) -> Any:
    """The model's output without the companions' rows."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(cut, value))
        return value[:rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value

    for name in list(outputs):
        value = outputs[name]
        if value is own:
            outputs[name] = cache
        elif not name.startswith(PICTURES):
            outputs[name] = cut(value)
    return outputs
