"""A recipe against a model: does it fit, and which heads does each patch mean?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headpatch.errors import RecipeError
from headpatch.heads import ModelShape, PartShape, expand_all
from headpatch.operands import KEYED
from headpatch.show import key_path, short

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.methods.base import Method
    from headpatch.recipe import Patch, Recipe

__all__ = ["CheckedPatch", "RecipeCheck", "ResolvedPatch", "check_policies", "check_shape", "resolve"]

MAX_VISITS = 1_000_000
"""Heads that resolving a recipe may visit, repetitions counted; the largest models have some 16,000."""


@dataclass(frozen=True, eq=False)
class ResolvedPatch:
    """A patch whose heads are known: what adapters work from.

    Attributes
    ----------
    index, method, part
        As in :class:`Patch`; `part` is never None here.
    heads
        ``{layer: {head: strength}}`` in ascending order; ``{layer: (head, ...)}`` for a method without strength. Query heads, or KV
        heads where ``method.head_kind`` is ``kv``; global numbers. A cache policy acts on all layers of its part that have
        softmax attention: each of them is there, with ``()`` where the recipe lists no head of it.
    recipe
        The recipe it belongs to.
    stack
        Heads of the attention stack that it patches.
    """

    index: int
    method: Method
    part: str
    heads: dict[int, Any]
    recipe: Recipe = field(repr=False)
    stack: PartShape = field(repr=False)

    def arrays(self) -> dict[str, Tensor]:
        """The recipe's arrays by name, on the CPU, read on first use; empty for a method that does not need them."""
        return self.recipe.arrays() if "arrays" in self.method.operands() else {}

    def pick(self, layer: int, heads: Sequence[int]) -> dict[str, Tensor]:
        """Of these arrays, what the method takes for some of the patch's heads of one layer.

        Raises
        ------
        RecipeError
            One is missing or does not fit the model.
        """
        if "arrays" not in self.method.operands():
            return {}
        try:
            return self.method.pick(self.arrays(), layer, heads, self.stack.head_dim[layer])
        except RecipeError as error:
            raise error.at(source=self.recipe.source) from None


@dataclass(frozen=True)
class CheckedPatch:
    """One line of :class:`RecipeCheck`: `heads` is ``{layer: (head, ...)}``, of KV heads where `kind` is ``kv``."""

    index: int
    method: str
    part: str
    kind: str
    heads: dict[int, tuple[int, ...]]

    @property
    def num_heads(self) -> int:
        """How many heads it patches."""
        return sum(map(len, self.heads.values()))

    def __str__(self) -> str:
        if self.kind == "kv":
            listed = f", {self.num_heads} KV heads listed" if self.num_heads else ""
            return f"patches[{self.index}]: {self.method} in {len(self.heads)} layers ({self.part}){listed}"
        return f"patches[{self.index}]: {self.method} on {self.num_heads} query heads in {len(self.heads)} layers ({self.part})"


@dataclass(frozen=True)
class RecipeCheck:
    """What a recipe would patch in a model.

    Attributes
    ----------
    patches
        One :class:`CheckedPatch` per patch.
    scope
        What requests may share: see :data:`headpatch.operands.SCOPES`.
    needs
        Operands that an engine must supply.
    """

    patches: tuple[CheckedPatch, ...]
    scope: str
    needs: tuple[str, ...]

    @property
    def num_heads(self) -> int:
        """Heads patched, summed over patches."""
        return sum(patch.num_heads for patch in self.patches)

    def __str__(self) -> str:
        return "\n".join(
            [*map(str, self.patches), f"scope: {self.scope}; needs: {', '.join(self.needs) or 'nothing'}"]
        )


def resolve(recipe: Recipe, shape: ModelShape) -> tuple[ResolvedPatch, ...]:
    """Check a recipe against a model's heads, and say which heads each patch means.

    Raises
    ------
    RecipeError
        The ``model:`` block does not describe this model, a part does not exist, a selector names a layer or head that does not, or a
        cache policy does not go with another patch.
    """
    try:
        _check_model(recipe.model, shape)
        resolved = tuple(_resolve_patch(patch, recipe, shape) for patch in recipe.patches)
        check_policies(resolved)
        return resolved
    except RecipeError as error:
        raise error.at(source=recipe.source) from None


def check_shape(recipe: Recipe, shape: ModelShape) -> RecipeCheck:
    """:func:`resolve`, for people to read; the recipe's arrays are looked at, too."""
    resolved = resolve(recipe, shape)
    for patch in resolved:
        for layer, heads in patch.heads.items():
            patch.pick(layer, list(heads))
    patches = tuple(
        CheckedPatch(p.index, p.method.name, p.part, p.method.head_kind, {n: tuple(h) for n, h in p.heads.items()})
        for p in resolved
    )
    return RecipeCheck(patches, recipe.scope, recipe.needs)


def _resolve_patch(patch: Patch, recipe: Recipe, shape: ModelShape) -> ResolvedPatch:
    part = patch.part or shape.main
    if part not in shape.parts:
        raise RecipeError(
            f"this model has no part {part!r}", key=key_path(("patches", patch.index, "part")),
            remedy=f"its parts: {', '.join(shape.parts)}",
        )  # fmt: skip
    try:
        # The budget is the recipe's, so that no number of patches makes resolving it slow; each may name every head thrice.
        kind = patch.method.head_kind
        budget = max(MAX_VISITS // len(recipe.patches), 3 * sum(shape.parts[part].heads(kind)))
        heads: dict[int, Any] = expand_all(patch.heads, shape.parts[part], kind, budget)
    except RecipeError as error:
        raise RecipeError(error.problem, key=f"{patch.key}{error.key or ''}", remedy=error.remedy) from None
    if patch.method.strength_field() is None:
        heads = {layer: tuple(chosen) for layer, chosen in heads.items()}
    if patch.method.family == "cache":
        heads = {layer: heads.get(layer, ()) for layer in shape.parts[part].softmax_layers()}
    return ResolvedPatch(patch.index, patch.method, part, heads, recipe, shape.parts[part])


def check_policies(patches: Iterable[ResolvedPatch]) -> None:
    """Check the cache policies among the patches of one model, all its recipes' together, against the other patches.

    Raises
    ------
    RecipeError
        A part has two policies, or a policy could drop keys that another patch of its part needs.
    """
    patches = tuple(patches)
    policies: dict[str, ResolvedPatch] = {}
    for patch in patches:
        if patch.method.family == "cache" and policies.setdefault(patch.part, patch) is not patch:
            raise RecipeError(
                f"the part {patch.part!r} already has a cache policy ({policies[patch.part].method.name})",
                key=key_path(("patches", patch.index)), remedy="keep one of the two",
            )  # fmt: skip
    for patch in patches:
        policy = getattr(policies.get(patch.part), "method", None)
        if policy is None or patch.method.family == "cache":
            continue
        lost = [name for name in patch.method.operands() if name in KEYED and not policy.keeps(name)]
        if lost:
            raise RecipeError(
                f"{patch.method.name} needs {lost[0]!r}, and {policy.name} may drop keys of it",
                key=key_path(("patches", patch.index)),
                remedy=f"let {policy.name} keep it" if lost == ["first_token"] else "leave one of the two patches out",
            )  # fmt: skip


def _check_model(block: Mapping[str, Any], shape: ModelShape) -> None:
    """Compare the ``model:`` block with a model; its `name` only informs."""
    part = shape.parts[shape.main]
    if block.get("model_type", shape.model_type) != shape.model_type:
        raise _mismatch("model_type", short(block["model_type"]), short(shape.model_type))
    if block.get("num_layers", part.num_layers) != part.num_layers:
        raise _mismatch("num_layers", short(block["num_layers"]), str(part.num_layers))
    for key in ("num_heads", "num_kv_heads", "head_dim"):
        if key in block:
            _check_per_layer(key, block[key], getattr(part, key), part)


def _check_per_layer(key: str, wanted: int | tuple[int, ...], actual: tuple[int, ...], part: PartShape) -> None:
    """One number speaks of the layers that have softmax attention; a list of all layers."""
    if isinstance(wanted, tuple) and len(wanted) != part.num_layers:
        raise _mismatch(key, f"a list for {len(wanted)} layers", f"{part.num_layers} layers")
    for layer in part.softmax_layers() if isinstance(wanted, int) or key == "head_dim" else range(part.num_layers):
        here = wanted if isinstance(wanted, int) else wanted[layer]
        if here != actual[layer]:
            raise _mismatch(key, str(here), f"{actual[layer]} in layer {layer}")


def _mismatch(key: str, wanted: str, actual: str) -> RecipeError:
    return RecipeError(
        f"the recipe says {wanted}, the model has {actual}", key=f"model.{key}",
        remedy="use a recipe that was made for this model: the same heads mean something else in another",
    )  # fmt: skip
