"""What tuning asks of an engine: which linear modules make up an attention layer, and which of their coordinates are whose.

An adapter whose models can be tuned has a method ``projections(model, part)`` beyond :class:`headpatch.registry.Adapter`; it
gives an :class:`AttentionSites` per layer. Layouts that it does not know are refused there, by name. One whose models can learn what
is done at the last token of a prompt has ``last_tokens(model, tokenizer)``, which gives a :class:`LastTokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.registry import find_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.heads import ModelShape

__all__ = [
    "ROLES",
    "AttentionSites",
    "Beginnings",
    "Edit",
    "LastTokens",
    "Projection",
    "Prompt",
    "last_tokens",
    "load_peft",
    "projections_of",
]

ROLES = ("q", "k", "v", "o")
"""What a projection makes: queries, keys and values out of the layer's input, the layer's output out of head outputs."""


@dataclass(frozen=True)
class Projection:
    """One linear module, and which of its coordinates belong to which head.

    Attributes
    ----------
    path
        Its name in the model, as ``model.layers.0.self_attn.q_proj``.
    side
        ``out``: heads own output coordinates (rows of an nn.Linear weight); ``in``: input coordinates (columns).
    size
        How many coordinates that side has.
    heads
        For each role that the module plays, the coordinates of each head: query heads for q and o, KV heads for k and v.
    transposed
        Whether its weight is stored [in, out] (GPT-2's Conv1D).
    """

    path: str
    side: str
    size: int
    heads: Mapping[str, tuple[range, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class AttentionSites:
    """The projections of one attention layer.

    Attributes
    ----------
    path
        Name of the attention module.
    num_heads, num_kv_heads
        Query heads and KV heads.
    projections
        Each module once, though it may play several roles.
    refused
        Roles that cannot be tuned head by head here, with the reason.
    gated
        Whether a gate stands between what attention gives and what the output projection reads.
    """

    path: str
    num_heads: int
    num_kv_heads: int
    projections: tuple[Projection, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    gated: bool = False

    def playing(self, role: str) -> Projection:
        """The projection that plays `role`; UnsupportedModelError, with the reason, where there is none to be had."""
        for projection in self.projections:
            if role in projection.heads and role not in self.refused:
                return projection
        why = self.refused.get(role, "the layer has none of its own")
        raise UnsupportedModelError(f"{self.path}: role {role!r} cannot be tuned for single heads: {why}")


def projections_of(model: Any, part: str | None = None) -> dict[int, AttentionSites]:
    """The projections of every attention layer of one part (default: the model's main one), by layer.

    Raises
    ------
    UnsupportedModelError
        The model's engine cannot be tuned, or a layer has a layout that its adapter does not know.
    """
    adapter = find_adapter(model)
    ask: Callable[..., dict[int, AttentionSites]] | None = getattr(adapter, "projections", None)
    if ask is None:
        raise UnsupportedModelError(f"models of {adapter.name} cannot be tuned; load this one with transformers")
    return ask(model, part)


def load_peft() -> Any:
    """The package peft; EngineError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise EngineError("peft is not installed; pip install 'headpatch[tune]'") from error
    return peft


Prompt = str | Sequence[tuple[str, str]]
"""Text as it stands; or messages, pairs of role and text, for the model's chat template, up to where the answer begins."""
Edit = Callable[[int, "Tensor"], "Tensor"]
"""From a layer and its head outputs at the last token, [n, H, d], to others of that shape; differentiable if gradients are wanted."""


@dataclass
class Beginnings:
    """Prompts that are computed up to their last token.

    Attributes
    ----------
    keys, values
        Per layer, [N, K, w, d] of all tokens but the last; padding wherever `real` says so.
    real
        [N, w] bool.
    last
        [N] int64, the last token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    real: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.last)

    @property
    def lengths(self) -> Tensor:
        """[N] tokens of each prompt, the last included."""
        return self.real.sum(-1) + 1

    @functools.cached_property
    def starts(self) -> list[int]:
        """[N] the first column that is real in each row, w where none is; kept, because asking a GPU waits for all it has to do."""
        rows: list[list[bool]] = self.real.tolist()
        return [row.index(True) if True in row else len(row) for row in rows]


class LastTokens(Protocol):
    """A causal language model whose prompts' last token can be run again and again, with its head outputs changed.

    What comes before the last token does not depend on what is done there, so it is computed once. That makes an edit of the last
    position as cheap as one token, forwards and backwards.
    """

    wider: int
    """How many times as many rows are run at once as on a CPU; more fill a GPU, and take more of its memory."""

    @property
    def shape(self) -> ModelShape:
        """Heads of the model."""

    def about(self) -> dict[str, str]:
        """Model, engine and their versions, device, dtype, for a recipe's provenance."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer of one line: all that hold a line break, and those that end a text."""

    def encode(
        self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None, closed: bool = False
    ) -> list[tuple[int, ...]]:
        """Tokens of each prompt, special ones as for a user's prompt; with `answers`, of each prompt and the text behind it.

        `closed`: and of what ends that text: a line break, or in a chat the end of the turn.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""

    def begin(self, prompts: Sequence[Sequence[int]], shared: int = 0) -> Beginnings:
        """Compute prompts up to their last token; the first `shared` tokens are the same in all, and computed once."""

    def run(
        self, beginnings: Beginnings, rows: Sequence[int], edit: Edit | None = None,
        behind: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [n, vocabulary] behind the last token of some of the prompts (a row may come several times).

        With `behind`, tokens that follow each row's last one, of any number: [n, 1 + the most of them, vocabulary], what stands
        behind a row's own tokens being of no meaning. The edit acts at the prompt's last token all the same.
        """

    def answer(
        self, beginnings: Beginnings, rows: Sequence[int], edit: Edit | None, tokens: int, ends: Collection[int]
    ) -> list[list[int]]:  # fmt: skip
        """Greedy continuations of at most so many tokens, each up to the first of `ends`, which is left out."""

    def writer(self, layer: int) -> Tensor:
        """[H, d, D] the output projection's columns of each head, detached."""


def last_tokens(model: Any, tokenizer: Any) -> LastTokens:
    """The :class:`LastTokens` of a model and its tokenizer.

    Raises
    ------
    UnsupportedModelError
        The model's engine has none, or keeps more of a prompt than keys and values.
    """
    adapter = find_adapter(model)
    make: Callable[..., LastTokens] | None = getattr(adapter, "last_tokens", None)
    if make is None:
        raise UnsupportedModelError(
            f"models of {adapter.name} cannot learn an injection; load this one with transformers"
        )
    return make(model, tokenizer)
