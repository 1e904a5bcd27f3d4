"""Text from a model, piece by piece as it is written, with the time that each token took."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.utils import logging

from headpatch.errors import EngineError, HeadpatchError

__all__ = ["Writing", "hushed", "logits", "prompt_inputs", "write"]


@dataclass(frozen=True)
class Writing:
    """What a model wrote.

    Attributes
    ----------
    text
        The continuation, without the prompt and without special tokens.
    tokens
        How many tokens were generated.
    seconds
        Median seconds from one generated token to the next; NaN for fewer than two.
    """

    text: str
    tokens: int
    seconds: float


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No progress bars, no advice and no warnings of transformers inside the with block; afterwards everything is as it was."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


class _Listener(TextStreamer):
    """Hands pieces on as they become final, and notes when each token came."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hear, self.pieces, self.times = hear, list[str](), list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first call is the prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self.hear(text)


def prompt_inputs(model: Any, tokenizer: Any, prompt: str, chat: bool | None = None) -> Any:
    """Input ids and mask of one prompt, on the model's device.

    Parameters
    ----------
    chat
        Whether the prompt is a user's message in the tokenizer's chat template; None: where there is a template.

    Raises
    ------
    HeadpatchError
        The prompt is empty, or a chat template was asked for and there is none.
    """
    if not prompt:
        raise HeadpatchError("the prompt is empty")
    if chat and not tokenizer.chat_template:
        raise HeadpatchError("this tokenizer has no chat template; use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return inputs.to(model.device)


def write(
    model: Any, tokenizer: Any, prompt: str, hear: Callable[[str], object] = lambda piece: None, *,
    max_new_tokens: int = 64, chat: bool | None = None, temperature: float = 0.0, seed: int = 0, exactly: bool = False,
) -> Writing:  # fmt: skip
    """Continue one prompt.

    Parameters
    ----------
    hear
        Called with each new piece of text.
    max_new_tokens, exactly
        At most so many tokens; exactly so many with `exactly`, for timing.
    chat
        As in :func:`prompt_inputs`.
    temperature, seed
        0 takes the most probable token each time; above it tokens are drawn, the same ones for the same seed. The process's own
        random state is left as it was.

    Raises
    ------
    HeadpatchError
        An empty prompt, a missing chat template, a negative temperature.
    EngineError
        The model cannot generate text.
    """
    if temperature < 0:
        raise HeadpatchError("a temperature is at least 0")
    if not getattr(model, "can_generate", lambda: False)():
        raise EngineError(f"a {type(model).__name__} does not generate text")
    inputs = prompt_inputs(model, tokenizer, prompt, chat)
    listener = _Listener(tokenizer, hear)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if exactly:
        drawn["min_new_tokens"] = max_new_tokens
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=listener, **drawn)
    gaps = [b - a for a, b in zip(listener.times[1:], listener.times[2:], strict=False)]
    made = int(out.shape[1] - inputs["input_ids"].shape[1])
    return Writing("".join(listener.pieces), made, statistics.median(gaps) if gaps else float("nan"))


def logits(model: Any, tokenizer: Any, prompt: str, chat: bool | None = None) -> Tensor:
    """Logits [1, n, vocabulary] of one prompt; parameters as in :func:`prompt_inputs`."""
    with torch.no_grad():
        found: Tensor = model(**prompt_inputs(model, tokenizer, prompt, chat)).logits
    return found
