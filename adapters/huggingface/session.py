"""One sequence that a causal language model reads piece by piece, and the tokens of texts with their places."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError

__all__ = ["Session", "encode", "ends", "max_length"]


class Session:
    """See :class:`headpatch.find.engine.Session`: feeds tokens to a model and keeps its cache."""

    def __init__(self, root: Any) -> None:
        self.root, self.cache, self.length = root, None, 0
        self.device = root.get_input_embeddings().weight.device
        named = inspect.signature(inspect.unwrap(type(root).forward)).parameters
        # Logits of a whole prompt are vocabulary times length; only the last ones are read.
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits [vocabulary] after the last of these tokens, fp32, on the model's device."""
        if not ids:
            raise HeadpatchError("no tokens to read")
        row = torch.tensor([list(ids)], device=self.device)
        out = self.root(input_ids=row, past_key_values=self.cache, use_cache=True, **self.options)
        self.cache = out.past_key_values
        self.length += len(ids)
        return out.logits[0, -1].float()


def encode(tokenizer: Any, text: str, special_tokens: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Tokens of a text, and the characters (start, end) that each stands for; special tokens stand for none."""
    if not getattr(tokenizer, "is_fast", False):
        raise HeadpatchError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are; use a tokenizer of the tokenizers library"
        )
    found = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
    return tuple(found["input_ids"]), tuple((int(s), int(e)) for s, e in found["offset_mapping"])


def max_length(root: Any) -> int | None:
    """Positions that a model has; None where its config names no end."""
    config = root.config.get_text_config() if hasattr(root.config, "get_text_config") else root.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def ends(root: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens at which generate() stops."""
    config = getattr(root, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = [found] if isinstance(found, int) else list(found or ())
    if not found and tokenizer.eos_token_id is not None:
        found = [tokenizer.eos_token_id]
    return frozenset(found)
