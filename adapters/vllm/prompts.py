"""What the front end reads off a request's prompt for edits that look at parts of it: token ranges of spans and of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from headpatch.errors import HeadpatchError
from headpatch.spans import offsets_of, row_spans

__all__ = ["image_ranges", "prompt_content", "span_ranges", "text_of"]

Pairs = list[tuple[int, int]]


def text_of(prompt: Any) -> str | None:
    """The text of a prompt as the engine was given it; None where it came as tokens."""
    found = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return found if isinstance(found, str) else None


def span_ranges(spans: Any, ids: Sequence[int], text: str | None, tokenizer: Any) -> Pairs:
    """Token ranges of a request's spans.

    Substrings and characters count in the prompt's text; where it came as tokens, or where its tokens are others than the tokenizer
    makes of the text (chat templates, image placeholders), in what the tokenizer makes of the tokens.

    Raises
    ------
    HeadpatchError
        A span is none, lies outside the prompt, or cannot be found in it.
    """
    found = row_spans("spans", spans, _known(ids, text, tokenizer), "need the engine's tokenizer: give token ranges")
    for i, (_, stop) in enumerate(found):
        if stop > len(ids):
            raise HeadpatchError(f"spans: range {i} ends at token {stop}, and the prompt has {len(ids)}")
    return found


def _known(ids: Sequence[int], text: str | None, tokenizer: Any) -> Callable[[], tuple[str, Pairs]] | None:
    if tokenizer is None:
        return None

    def known() -> tuple[str, Pairs]:
        candidates = [] if text is None else [(text, True), (text, False)]
        candidates.append((tokenizer.decode(list(ids), skip_special_tokens=False), False))
        for words, special in candidates:
            made, offsets = offsets_of(tokenizer, words, special)
            if made == list(ids):
                return words, offsets
        raise HeadpatchError("spans: the prompt's tokens cannot be traced back to a text: give token ranges")

    return known


def image_ranges(features: Iterable[Any] | None) -> Pairs:
    """Token ranges of a request's image placeholders: those positions alone that an image's embeddings take.

    Parameters
    ----------
    features
        vLLM's multimodal features, each with its modality and placeholder range.
    """
    found: Pairs = []
    for feature in features or ():
        if feature.modality != "image":
            continue
        place = feature.mm_position
        mask = [True] * int(place.length) if place.is_embed is None else place.is_embed.tolist()
        start: int | None = None
        for i, inside in enumerate([*mask, False]):
            if inside and start is None:
                start = i
            elif not inside and start is not None:
                found.append((int(place.offset) + start, int(place.offset) + i))
                start = None
    return sorted(found)


def prompt_content(request: Any) -> list[Any]:
    """All that the prompt is: token ids, embeddings, hashes of images and the like."""
    embeds = getattr(request, "prompt_embeds", None)
    digest = None
    if embeds is not None:
        import torch

        digest = hashlib.sha256(
            embeds.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes()
        ).hexdigest()
    features = [(feature.identifier, feature.mm_position.offset) for feature in request.mm_features or ()]
    return [list(request.prompt_token_ids or ()), digest, [list(map(str, feature)) for feature in features]]
