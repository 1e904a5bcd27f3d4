"""What the tests of the Hugging Face adapter share: recipes, inputs, and a way to see that a model is as it was."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import BOS, IMAGE, PAD

__all__ = [
    "RECIPES",
    "A",
    "B",
    "C",
    "fingerprint",
    "ids",
    "left_padded",
    "logits",
    "new_tokens",
    "one_thread",
    "quiet_transformers",
    "recipe",
    "silent",
]  # fmt: skip


def recipe(method: str, heads: Any, **more: Any) -> dict[str, Any]:
    """A recipe with one patch."""
    return {"headpatch": 1, "patches": [{"method": method, "heads": heads, **more}]}


A = recipe("zerotuning", {"*.0-1": 4.0, "1.2": 0.0, "0.3": 0.2})
B = recipe("head_scaling", {"0.1-2": -0.5, "1.*": 2.0})
C = {
    "headpatch": 1,
    "patches": [
        {"method": "head_scaling", "heads": {"*.3": 0.0}},
        {"method": "zerotuning", "heads": {"*.*": 7.0, "0.1": 1.0}},
    ],
}  # fmt: skip
RECIPES = (A, B, C)


def ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """[rows, length] token ids that begin with BOS."""
    found = torch.randint(2, IMAGE, (rows, length), generator=torch.Generator().manual_seed(seed))
    found[:, 0] = BOS
    return found


def left_padded(lengths: tuple[int, ...] = (12, 7, 3), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch, with its mask."""
    found = ids(len(lengths), max(lengths), seed)
    mask = torch.ones_like(found)
    for row, length in enumerate(lengths):
        pad = max(lengths) - length
        found[row, :pad], mask[row, :pad], found[row, pad] = PAD, 0, BOS
    return {"input_ids": found, "attention_mask": mask}


def logits(model: Any, inputs: Tensor | dict[str, Tensor] | None = None, **more: Any) -> Tensor:
    """Logits (or hidden states) of one forward without gradients."""
    given = inputs if isinstance(inputs, dict) else {"input_ids": ids() if inputs is None else inputs}
    with torch.no_grad():
        out = model(**given, **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def new_tokens(model: Any, inputs: Tensor | dict[str, Tensor] | None = None, count: int = 8, **more: Any) -> Tensor:
    """Tokens that greedy decoding adds."""
    given = inputs if isinstance(inputs, dict) else {"input_ids": ids() if inputs is None else inputs}
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    out = model.generate(**given, do_sample=False, max_new_tokens=count, **more)
    return out[:, given["input_ids"].shape[1] :]


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks")


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything on a model that a patch could leave behind: configs by identity, attributes, hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        found[name] = (
            id(config), repr(sorted(vars(config))) if config is not None else "",
            getattr(config, "_attn_implementation", None), tuple(sorted(module.__dict__)),
            *(len(getattr(module, hooks)) for hooks in HOOKS),
            tuple(module.state_dict()), tuple(n for n, _ in module.named_buffers()),
        )  # fmt: skip
    return found


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def quiet_transformers(*allowed: str) -> Iterator[None]:
    """Fail on what transformers logs as a warning inside the block, but for lines that contain one of `allowed`."""
    collect = _Collect()
    logger = logging.getLogger("transformers")
    logger.addHandler(collect)
    try:
        yield
    finally:
        logger.removeHandler(collect)
    loud = [line for line in collect.lines if not any(a in line for a in allowed)]
    assert not loud, loud


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread. Acts in the files that import it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def silent(request: pytest.FixtureRequest) -> Iterator[None]:
    """transformers has nothing to warn about. (Its own call of an assistant makes it complain of itself.)"""
    with quiet_transformers(*(["Passing `generation_config` together with"] if "assist" in request.node.name else [])):
        yield
