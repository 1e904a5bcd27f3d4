"""A prompt, with or without a picture, as one model is given it: inputs, the text of each token, where the picture's patches are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.spans import token_spans
from headpatch.errors import EngineError, HeadpatchError
from headpatch.looks import Picture, Posed

__all__ = ["pose"]


def pose(
    model: Any, reader: Any, prompt: str, chat: bool | None = None, image: Any = None, spans: Sequence[str] = ()
) -> Posed:
    """See :class:`headpatch.looks.Posed`; parameters as in :func:`headpatch.looks.look`."""
    if not prompt:
        raise HeadpatchError("the prompt is empty")
    tokenizer = getattr(reader, "tokenizer", reader)
    template = getattr(reader, "chat_template", None)
    if chat and not template:
        raise HeadpatchError("this tokenizer has no chat template; use --no-chat")
    if image is not None and not hasattr(reader, "image_processor"):
        raise EngineError(f"a {type(reader).__name__} reads no pictures; this model needs its processor for one")
    in_chat = bool(template) if chat is None else chat
    text = prompt
    if in_chat:
        said: Any = prompt if image is None else [{"type": "image"}, {"type": "text", "text": prompt}]
        message = [{"role": "user", "content": said}]
        text = reader.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    elif image is not None and reader.image_token not in text:
        text = f"{reader.image_token}{text}"
    special = not in_chat
    if image is None:
        made = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    else:
        made = reader(text=text, images=image, return_tensors="pt", add_special_tokens=special)
    marked: list[tuple[int, int]] = []
    if spans:
        if image is not None:
            raise EngineError("spans of a prompt with a picture cannot be told from its text; leave the picture out")
        marked = token_spans([list(spans)], [text], tokenizer, special)[0]
    inputs = made.to(model.device)
    ids = inputs["input_ids"][0].tolist()
    pieces = tuple(tokenizer.decode([token]) for token in ids)
    pictures, problem = _pictures(model, reader, image, inputs, ids)
    return Posed(dict(inputs), pieces, tuple(marked), pictures, problem)


def _pictures(model: Any, reader: Any, image: Any, inputs: Any, ids: list[int]) -> tuple[tuple[Picture, ...], str]:
    """The picture, where its tokens stand side by side and form a known grid; else why not."""
    if image is None:
        return (), ""
    config = model.config
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    places = [i for i, found in enumerate(ids) if found == token]
    if not places:
        return (), "the prompt holds no image tokens"
    if places[-1] - places[0] + 1 != len(places):
        return (), "its tokens do not stand side by side: the picture was cut into tiles"
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        frames, rows, columns = (int(n) for n in grid[0])
        rows, columns = frames * rows // merge, columns // merge
    else:
        rows = columns = math.isqrt(len(places))
    if rows * columns != len(places):
        return (), f"its {len(places)} tokens are no grid of {rows} by {columns}"
    return (Picture(places[0], rows, columns, _pixels(reader, image, inputs)),), ""


def _pixels(reader: Any, image: Any, inputs: Any) -> Tensor:
    """[height, width, 3] what the model sees: scaled and cropped; the picture itself where pixels come as patches."""
    values = inputs["pixel_values"]
    if values.ndim != 4:
        rgb = image.convert("RGB")
        raw = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).float() / 255
        return raw.view(rgb.height, rgb.width, 3)
    processor = reader.image_processor
    pixels = values[0].float().cpu().movedim(0, -1)
    if getattr(processor, "do_normalize", False):
        pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return pixels.clamp(0, 1)
