"""Where heads look: the attention of single queries of a prompt, before and after a recipe.

Of a head and a query it is one row over the prompt's tokens; nothing else of the attention map is ever computed. The row after is
what the patched layer gives: its masses and scores edited, in a model whose layers below are patched too. A recipe that only scales
outputs changes rows in the layers above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.api import applied, observe
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.heads import select_heads
from headpatch.registry import find_adapter
from headpatch.resolve import resolve
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.recipe import Recipe

__all__ = ["Look", "Picture", "Posed", "look"]

SHOWN = 4
"""Heads that are shown where nobody says which."""


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt.

    Attributes
    ----------
    first
        Token position of its upper left patch; patches follow row by row.
    rows, columns
        Its patches.
    pixels
        [height, width, 3] between 0 and 1, as the model gets it.
    """

    first: int
    rows: int
    columns: int
    pixels: Tensor

    @property
    def places(self) -> slice:
        """Its token positions."""
        return slice(self.first, self.first + self.rows * self.columns)


@dataclass(frozen=True)
class Posed:
    """A prompt as one model is given it; adapters make it.

    Attributes
    ----------
    inputs
        What the model is called with, a batch of one row without padding.
    pieces
        The text of each token.
    spans
        Token ranges of the marked pieces.
    pictures
        Pictures whose tokens form a grid; a picture that is laid out in another way is not among them, and `problem` says why.
    """

    inputs: Mapping[str, Any]
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int], ...] = ()
    pictures: tuple[Picture, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Look:
    """What :func:`look` found.

    Attributes
    ----------
    pieces, pictures, problem
        As in :class:`Posed`.
    queries
        Token positions, counted from 0.
    heads
        ``layer.head``.
    before
        [heads, queries, tokens] attention of the untouched model, float32 on the CPU.
    after
        The same under the recipe; None without one.
    """

    pieces: tuple[str, ...]
    queries: tuple[int, ...]
    heads: tuple[str, ...]
    before: Tensor
    after: Tensor | None = None
    pictures: tuple[Picture, ...] = ()
    problem: str = ""

    def moved(self) -> list[float]:
        """Per head, the share of attention that the recipe moved to other tokens, averaged over queries; zeros without a recipe."""
        if self.after is None:
            return [0.0] * len(self.heads)
        return (0.5 * (self.after - self.before).abs().sum(-1).mean(-1)).tolist()


def look(
    model: Any, reader: Any, prompt: str, recipe: Recipe | Mapping[str, Any] | str | None = None, *,
    heads: Sequence[str] | str | None = None, queries: Sequence[int] = (-1,), image: Any = None, spans: Sequence[str] = (),
    chat: bool | None = None, part: str | None = None, most: int | None = SHOWN,
) -> Look:  # fmt: skip
    """Look at a prompt with some heads, before and after a recipe.

    Parameters
    ----------
    model, reader
        The model, and its tokenizer (or processor, where there is an image).
    prompt
        The text.
    recipe
        Anything that :func:`headpatch.load_recipe` takes; None shows the untouched model alone.
    heads
        Selectors. Default: the heads that the recipe names.
    queries
        Token positions whose attention is shown; negative ones count from the prompt's end. A queries x heads x tokens table is all
        that is ever computed.
    image
        A picture (PIL), for a model that sees.
    spans
        Pieces of the prompt to mark, for recipes that need marks.
    chat
        Whether the prompt becomes a user's message in the chat template; default: where there is one.
    part
        The attention stack; default the language model's.
    most
        Without `heads`, so many of them are kept: those that the recipe moves most. None keeps all.

    Raises
    ------
    HeadpatchError
        No heads are named, a query is outside the prompt, the recipe does not fit, or the model's engine cannot show attention.
    """
    import torch

    adapter: Any = find_adapter(model)
    if not hasattr(adapter, "pose"):
        raise UnsupportedModelError(
            f"the {adapter.name} adapter cannot show attention; load the model with another engine"
        )
    loaded = None if recipe is None else load_recipe(recipe)
    chosen = _heads(adapter.shape(model), loaded, heads, part)
    posed: Posed = adapter.pose(model, reader, prompt, chat=chat, image=image, spans=spans)
    if loaded is not None and not spans and any("spans" in " ".join(p.method.operands()) for p in loaded.patches):
        raise HeadpatchError("this recipe steers towards marked pieces of the prompt; name some (spans)")
    tokens = len(posed.pieces)
    for query in queries:
        if not -tokens <= query < tokens:
            raise HeadpatchError(f"query {query} is outside the prompt; it has {tokens} tokens, 0 to {tokens - 1}")
    asked = [query % tokens for query in queries]

    def rows() -> Tensor:
        options: dict[str, Any] = {} if part is None else {"part": part}
        with torch.no_grad(), observe(model, "weights", chosen, queries=asked, **options) as seen:
            model(**posed.inputs)
        return torch.stack([seen["weights", head][0][0].float().cpu() for head in chosen])

    before, after = rows(), None
    if loaded is not None:
        with applied(model, loaded) as handle:
            if posed.spans:
                with handle.inputs(spans=[list(posed.spans)]):
                    after = rows()
            else:
                after = rows()
    found = Look(posed.pieces, tuple(asked), tuple(chosen), before, after, posed.pictures, posed.problem)
    if heads is not None or most is None or len(chosen) <= most:
        return found
    moved = found.moved()
    keep = sorted(sorted(range(len(chosen)), key=lambda i: -moved[i])[:most])
    return Look(
        found.pieces, found.queries, tuple(chosen[i] for i in keep), before[keep], None if after is None else after[keep],
        found.pictures, found.problem,
    )  # fmt: skip


def _heads(shape: Any, recipe: Recipe | None, heads: Sequence[str] | str | None, part: str | None) -> list[str]:
    """Heads as ``layer.head``, in order."""
    where = part or shape.main
    if where not in shape.parts:
        raise HeadpatchError(f"the model has no part {where!r}; it has {', '.join(shape.parts)}")
    if heads is not None:
        picked = select_heads([heads] if isinstance(heads, str) else list(heads), shape.parts[where])
        return [f"{layer}.{head}" for layer in sorted(picked) for head in picked[layer]]
    patches = (
        []
        if recipe is None
        else [p for p in resolve(recipe, shape) if p.part == where and p.method.head_kind == "query"]
    )
    named = sorted({(layer, head) for p in patches for layer, of_layer in p.heads.items() for head in of_layer})
    if not named:
        raise HeadpatchError("which heads? give selectors, such as 12.3 or 5.*, or a recipe that names query heads")
    return [f"{layer}.{head}" for layer, head in named]
