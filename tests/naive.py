"""Attention written out in full, for the operand tests: a zoo model whose attention keeps everything it saw and can be edited.

Shares no code with headpatch. One :class:`Call` per attention call holds queries, keys, values, who sees what, scores and
probabilities; an edit is a function from a Call to new head outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compat import ids
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from zoo import ZOO, Entry

import headpatch
from headpatch import registry, schema
from headpatch.methods.base import MassMethod, OutputMethod, ScoresMethod, param, strength

__all__ = ["Call", "Looking", "Naive", "define", "field", "of", "patch", "registered", "steps", "union"]

NAME = "naive_tapped"


@dataclass
class Call:
    """One attention call.

    Attributes
    ----------
    q, k, v
        [b, H, q, d], [b, K, n, d], [b, K, n, d], as the attention function got them.
    seen
        [b, 1, q, n] bool.
    scores
        [b, H, q, n], -inf where not seen.
    sinks
        [H] learned sink logits, where the model has them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    scores: Tensor
    sinks: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """[b, H, q, n] attention; what learned sinks take of it is missing."""
        return torch.exp(self.scores - self.lse[..., None]).nan_to_num(0.0)

    @property
    def lse(self) -> Tensor:
        """[b, H, q], learned sinks included."""
        total = torch.logsumexp(self.scores, -1)
        return total if self.sinks is None else torch.logaddexp(total, self.sinks.to(total)[None, :, None])

    def out(self, p: Tensor | None = None) -> Tensor:
        """[b, q, H, d] head outputs under this attention, or under another."""
        v = self.v.repeat_interleave(self.q.shape[1] // self.v.shape[1], 1)
        return torch.einsum("bhqn,bhnd->bqhd", self.p if p is None else p, v)


@dataclass
class _Tap:
    calls: list[Call]
    edit: Callable[[Call], Tensor] | None = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    b, heads, n_q, d = query.shape
    n = key.shape[2]
    keys = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query @ keys.transpose(2, 3) * (d**-0.5 if scaling is None else scaling)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = torch.ones(b, 1, n_q, n, dtype=torch.bool)
        if causal and n_q > 1:
            seen = seen.tril()
    else:
        seen = attention_mask[..., :n].expand(b, 1, n_q, n)
    call = Call(query, key, value, seen, scores.masked_fill(~seen, -math.inf), s_aux)
    tap: _Tap = module._tap
    tap.calls.append(call)
    return (call.out() if tap.edit is None else tap.edit(call)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Naive:
    """A zoo model in float64 with the attention above in all layers of one part."""

    def __init__(self, entry: Entry, part: str | None = None) -> None:
        self.model = entry.build(torch.float64, NAME)
        for stack in entry.parts.values():
            for path in stack.modules.values():
                self.model.get_submodule(path)._tap = _Tap([])
        modules = entry.parts[part or entry.main].modules
        self.taps: dict[int, _Tap] = {layer: self.model.get_submodule(path)._tap for layer, path in modules.items()}

    def calls(self, layer: int) -> list[Call]:
        """What the layer saw since the last :meth:`clear`."""
        return self.taps[layer].calls

    def clear(self) -> None:
        """Forget calls and edits."""
        for tap in self.taps.values():
            tap.calls.clear()
            tap.edit = None

    @contextlib.contextmanager
    def edited(self, edits: dict[int, Callable[[Call], Tensor]]) -> Iterator[Any]:
        """The model, with these edits by layer."""
        self.clear()
        for layer, edit in edits.items():
            self.taps[layer].edit = edit
        try:
            yield self.model
        finally:
            for tap in self.taps.values():
                tap.edit = None


FAMILIES = {"mass": MassMethod, "scores": ScoresMethod, "output": OutputMethod}


def define(family: str, name: str, *, fields: dict[str, tuple[type, Any]] | None = None, **members: Any) -> Any:
    """A method class, as short as a test can have it: `fields` are its parameters beside the strength `amount` (identity 1)."""
    given = {"amount": (float, strength(1.0, help="strength")), **(fields or {})}
    body = {
        "__module__": __name__, "__doc__": f"Test method {name}.", "name": name,
        "__annotations__": {key: kind.__name__ for key, (kind, _) in given.items()},
        **{key: default for key, (_, default) in given.items()}, **members,
    }  # fmt: skip
    return dataclasses.dataclass(frozen=True)(type(name.title().replace("_", ""), (FAMILIES[family],), body))


@contextlib.contextmanager
def registered(*classes: Any) -> Iterator[Any]:
    """Methods that are known inside the block only."""
    for cls in classes:
        registry.register_method(cls)
    try:
        yield classes[0]
    finally:
        for cls in classes:
            registry._methods.pop(cls.name)
            schema._models.pop(cls, None)


def field(default: Any, help: str = "parameter of a test") -> Any:
    """A parameter of a test method."""
    return param(default, help=help)


def patch(cls: Any, heads: Any, **more: Any) -> dict[str, Any]:
    """A patch of a recipe with a test method."""
    return {"method": cls.name, "heads": heads, **more}


def of(*patches: dict[str, Any]) -> dict[str, Any]:
    """A recipe of patches."""
    return {"headpatch": 1, "patches": list(patches)}


def union(ranges: Sequence[tuple[int, int]], n: int, first: int = 0) -> Tensor:
    """[n] bool: columns of these token ranges of a row whose first real token is in column `first`."""
    found = torch.zeros(n, dtype=torch.bool)
    for start, stop in ranges:
        found[first + start : first + stop] = True
    return found


class Looking:
    """A model with a method on it that keeps what it is given: ``seen`` has one dict per call of the method."""

    def __init__(self, *needs: str, entry: str = "llama", heads: Any = None, model: Any = None, **fields: Any) -> None:
        self.seen: list[dict[str, Any]] = []

        def edit(method: Any, output: Tensor, strength: Tensor, operands: Any) -> Tensor:
            self.seen.append({**operands, "output": output, "strength": strength})
            return output

        given = {name: (type(value), field(value)) for name, value in fields.items()}
        self.method = define("output", "looking", needs=needs, edit=edit, fields=given)
        self.model = ZOO[entry].build(torch.float64) if model is None else model
        self.heads = heads or {"*.*": 2.0}

    def __enter__(self) -> Looking:
        self.known = registered(self.method)
        self.known.__enter__()
        self.handle = headpatch.apply(self.model, of(patch(self.method, self.heads)))
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()
        self.known.__exit__(*error)


def steps(batch: dict[str, Tensor], cache: Any, extra: int = 4) -> Iterator[dict[str, Any]]:
    """A prompt and then token by token, through one cache."""
    mask = batch["attention_mask"]
    yield {**batch, "past_key_values": cache}
    for i in range(extra):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
        yield {"input_ids": ids(len(mask), 1, i), "attention_mask": mask, "past_key_values": cache}
