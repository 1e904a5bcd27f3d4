"""What a search asks of an engine: a :class:`Bench`, a model that is ready to be measured under many recipes.

An adapter that can search has two methods beyond :class:`headpatch.registry.Adapter`: ``load(name, device, dtype)``, which gives a
model and its tokenizer, and ``bench(model, tokenizer)``. Outcomes are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from headpatch.errors import UnsupportedModelError
from headpatch.registry import adapters, closest, find_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe

__all__ = [
    "Bench",
    "Mixture",
    "Outcome",
    "Passage",
    "Questions",
    "Session",
    "load_model",
    "open_bench",
    "open_mixture",
]


@dataclass(frozen=True)
class Passage:
    """A token sequence, and the tokens whose log-probability is read at its end.

    Attributes
    ----------
    ids
        What the model is given.
    targets
        Target j is predicted at position ``len(ids) - len(targets) + j``. Empty: only the distribution after the last token counts.
    prompt
        How many of `ids` are the prompt; None: all. Methods that look at the whole prompt look at these.
    spans
        Marked token ranges (start, stop) of the prompt; None: nobody has said, and a method that needs spans refuses.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...] = ()
    prompt: int | None = None
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Questions:
    """R prompts with the same K possible answers.

    Attributes
    ----------
    passages
        One per prompt where the labels' first tokens differ; else one per (prompt, label), the labels of a prompt side by side.
    starts
        First token of each label, K.
    rows
        R.
    whole
        Whether labels share a first token, so that whole labels are compared.
    """

    passages: tuple[Passage, ...]
    starts: tuple[int, ...]
    rows: int
    whole: bool


@dataclass(frozen=True)
class Outcome:
    """What a model says to questions, and how it predicts texts. Natural logarithms; float32 tensors on the CPU.

    Attributes
    ----------
    first
        [R, K] log-probability of each label's first token as the next token.
    whole
        [R, K] log-probability of each label, summed over its tokens; the same tensor as `first` where first tokens differ.
    other
        [R] the highest log-probability of a next token that begins no label.
    entropy
        [R] entropy of the next token, in nats.
    text
        [N] log-probability of each token of the texts; empty where there were none.
    """

    first: Tensor
    whole: Tensor
    other: Tensor
    entropy: Tensor
    text: Tensor


class Session(Protocol):
    """One sequence that the model reads piece by piece, with what it has read in its cache. Recipes that are on it act."""

    length: int
    """Tokens read so far."""

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Read these tokens next. Returns logits [vocabulary] after the last of them, fp32, wherever the model is."""


class Mixture(Protocol):
    """A model whose heads attend to everything, to the first and the last keys only, or to a mixture of both outputs.

    An adapter that has them has a method ``mixture(model, first, recent)``.
    """

    layers: Mapping[int, int]
    """KV heads of each layer that can be mixed: those that see the whole sequence."""

    def targets(self, ids: Sequence[int], reads: Sequence[int], keep: bool = True) -> Tensor:
        """Last hidden states [reads, D] of the model as it is; `keep` remembers the full attention of every layer."""

    def mixed(
        self, ids: Sequence[int], reads: Sequence[int], gates: Mapping[int, Tensor], recompute: bool = True
    ) -> AbstractContextManager[Tensor]:
        """The same under gates [K] by layer (1: full attention), differentiable in them inside the with block.

        The full part is what the last :meth:`targets` kept, or, where it kept none, comes from the mixed stream itself.
        """


class Bench(Protocol):
    """A model with its tokenizer, measured under recipes. The model itself is unchanged between calls."""

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can take; None where there is no limit."""

    def encode(self, text: str, special_tokens: bool = True) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Tokens of a text, and the characters (start, end) of the text that each stands for; (0, 0) for special ones."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens with which the model ends what it writes."""

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""

    def session(self) -> Session:
        """A new sequence to be read piece by piece."""

    @property
    def shape(self) -> ModelShape:
        """Heads of the model."""

    def about(self) -> dict[str, str]:
        """Model, engine and their versions, device, dtype: what decides the numbers, for a recipe's provenance."""

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""

    def chat(self, prompt: str) -> str:
        """The prompt as a user's message in the model's chat template, up to where the answer begins."""

    def questions(
        self, prompts: Sequence[str], labels: Sequence[str], special_tokens: bool = True,
        spans: Sequence[Sequence[str]] | None = None,
    ) -> Questions:  # fmt: skip
        """Prompts and labels as tokens, and which of them lie in the marked `spans`, per prompt some substrings of it.

        HeadpatchError where a label merges with the end of its prompt, or a span does not occur in its prompt.
        """

    def texts(self, texts: Sequence[str]) -> tuple[Passage, ...]:
        """Texts as tokens, each predicted from its second token on."""

    def run(
        self, recipes: Sequence[Recipe | None], questions: Questions | None, texts: Sequence[Passage] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """Measure every recipe (None: the model as it is); yields (index, outcome) in whatever order is quickest."""

    def slopes(
        self, recipe: Recipe, questions: Questions, objective: Callable[[Outcome, Sequence[int]], Tensor]
    ) -> dict[str, float]:
        """How a sum over questions changes with each head's strength, by backward passes: ``"layer.head" -> derivative``.

        Parameters
        ----------
        recipe
            One patch with all the heads in question, at the strengths where the derivative is taken.
        questions
            Whose labels differ in their first token.
        objective
            From the outcome of some of the questions, and their places, to a value [rows] of each.
        """

    def generate(
        self, prompts: Sequence[str], recipe: Recipe | None, max_new_tokens: int, special_tokens: bool = True,
        spans: Sequence[Sequence[str]] | None = None,
    ) -> list[str]:  # fmt: skip
        """Greedy continuations, without the prompts."""

    def observed(self, operand: str, passages: Sequence[Passage]) -> Iterator[Mapping[str, Tensor]]:
        """One operand per head for the prompt of each passage by itself: ``"layer.head" -> tensor`` without the batch dimension."""


def open_bench(model: Any, tokenizer: Any, **options: Any) -> Bench:
    """A bench for a model of any engine that has one.

    Raises
    ------
    UnsupportedModelError
        The model's adapter cannot search.
    """
    adapter = find_adapter(model)
    make: Callable[..., Bench] | None = getattr(adapter, "bench", None)
    if make is None:
        raise UnsupportedModelError(
            f"the {adapter.name} adapter cannot measure models; load this one with another engine"
        )
    return make(model, tokenizer, **options)


def open_mixture(model: Any, first: int, recent: int) -> Mixture:
    """Mixed attention of a model; near attention sees the first `first` and the last `recent` keys, the query's own included.

    Raises
    ------
    UnsupportedModelError
        The model's adapter has none, or its attention cannot be mixed.
    HeadpatchError
        A recipe is on the model.
    """
    adapter = find_adapter(model)
    make: Callable[..., Mixture] | None = getattr(adapter, "mixture", None)
    if make is None:
        raise UnsupportedModelError(
            f"the {adapter.name} adapter cannot mix attention; load this model with another engine"
        )
    return make(model, first, recent)


def load_model(
    name: str, *, device: str = "auto", dtype: str = "float32", engine: str = "huggingface", vision: bool = False
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A folder, or a name on the hub.
    device
        ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU where there is one.
    dtype
        ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint has.
    engine
        Name of the adapter that loads it.
    vision
        A model that sees, and its processor in the tokenizer's place.

    Raises
    ------
    HeadpatchError
        No such engine, model, device or dtype.
    """
    known = {a.name: a for a in adapters() if hasattr(a, "load")}
    if engine not in known:
        raise UnsupportedModelError(f"no engine {engine!r} can load a model here; {closest(engine, known)}")
    load: Callable[..., tuple[Any, Any]] = known[engine].load
    return load(name, device=device, dtype=dtype, **({"vision": True} if vision else {}))
