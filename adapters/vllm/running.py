"""A request while it runs on a worker: what belongs to it alone, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headpatch.adapters.vllm.one_step import WHOLE
from headpatch.adapters.vllm.tables import NOBODY

__all__ = ["Ranges", "Running", "prompt_len"]

Ranges = tuple[tuple[int, int], ...]
"""Token positions as ranges (start, stop)."""


@dataclass
class Running:
    """One request.

    Attributes
    ----------
    slot
        Of its recipe in the tables; NOBODY without one.
    prompt
        Tokens of its prompt.
    spans, images
        Positions of the caller's spans, and of image placeholder tokens, in the prompt.
    whole
        Whether its prompt must come in one step.
    kept
        What was derived from its prompt and stays what it is: over steps, and over preemption.
    """

    slot: int = NOBODY
    prompt: int = 0
    spans: Ranges = ()
    images: Ranges = ()
    whole: bool = False
    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slot: int, prompt: int, wire: Mapping[str, Any]) -> Running:
        """From what the front end sent with the request."""
        spans, images = (_ranges(wire.get(name, ())) for name in ("spans", "images"))
        return cls(slot, prompt, spans, images, bool(wire.get(WHOLE)))


def _ranges(pairs: Iterable[Any]) -> Ranges:
    return tuple((int(start), int(stop)) for start, stop in pairs)


def prompt_len(new: Any) -> int:
    """Tokens of the prompt of a request that is new to the worker."""
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    embeds = getattr(new, "prompt_embeds", None)
    return 0 if embeds is None else int(embeds.shape[0])
