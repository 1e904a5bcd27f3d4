"""A recipe as tables of numbers: what each layer's kernel multiplies by, head by head.

Constant first-token weights and constant head scales become rows of tables, which kernels read; so do factors and vectors that act at
some positions of a request. Whatever else differs from row to row of the batch stays a method: output edits run as captured tensor
operations, edits of attention to segments on CPUs (:mod:`headpatch.adapters.vllm.segment_edits`); on GPUs those become numbers, too
(:mod:`headpatch.adapters.vllm.segment_numbers`).
All come from the method contract alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.vllm.supplies import is_affine, is_row_edit, is_segment_edit
from headpatch.methods.base import ORDER
from headpatch.recipe import Recipe, resolve

if TYPE_CHECKING:
    from headpatch.heads import ModelShape

__all__ = ["Affine", "LayerEdits", "RowEdit", "compile_recipe"]


@dataclass(frozen=True)
class RowEdit:
    """An edit that no table holds: of outputs, or of attention to segments of keys.

    Attributes
    ----------
    method
        The method with its parameters.
    heads
        Query heads of the whole model, int64 [h], ascending.
    strength
        [h] fp32.
    arrays
        By name, [h, ...]: one row per head.
    """

    method: Any
    heads: Tensor
    strength: Tensor
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def local(self, heads: Sequence[int]) -> RowEdit | None:
        """The same on these heads alone, numbered as they come; None where none of its heads is among them."""
        place = {head: i for i, head in enumerate(heads)}
        here = torch.tensor([head in place for head in self.heads.tolist()], dtype=torch.bool)
        if not bool(here.any()):
            return None
        found = torch.tensor([place[head] for head in self.heads[here].tolist()], dtype=torch.int64)
        arrays = {name: array[here] for name, array in self.arrays.items()}
        return RowEdit(self.method, found, self.strength[here], arrays)

    def to(self, device: torch.device) -> RowEdit:
        """The same with its tensors on `device`."""
        arrays = {name: array.to(device) for name, array in self.arrays.items()}
        return RowEdit(self.method, self.heads.to(device), self.strength.to(device), arrays)


@dataclass
class Affine:
    """``o <- factor o + shift`` at positions ``prompt_len + start`` to ``prompt_len + stop``, the latter not included.

    Attributes
    ----------
    span
        (start, stop); None for no bound.
    factor, shift
        [H] and [H, d] fp32 over all heads of the layer; `shift` is None where no edit has a vector.
    """

    span: tuple[int | None, int | None]
    factor: Tensor
    shift: Tensor | None = None

    def then(self, heads: Tensor, factor: Tensor, shift: Tensor | None) -> None:
        """Append an edit of some heads, at the same positions."""
        self.factor[heads] *= factor
        if self.shift is not None:
            self.shift[heads] *= factor[:, None]
        if shift is not None:
            if self.shift is None:
                self.shift = torch.zeros(len(self.factor), shift.shape[1])
            self.shift[heads] += shift


@dataclass
class LayerEdits:
    """What a recipe does to one layer.

    Attributes
    ----------
    weight, scale
        [H] fp32 over all heads of the layer: factor on the first token's attention, factor on the head's output. None: ones.
    affine
        Constant edits of some positions, if all such edits of the layer are of the same positions.
    rows
        Output edits that no table holds, in recipe order. Where there is one, all of the recipe's output edits of the layer are
        here, so that their order holds.
    segments
        Edits of attention to segments, in the order they act. Where there is one, constant first-token weights of the layer are
        here, too.
    """

    weight: Tensor | None = None
    scale: Tensor | None = None
    affine: Affine | None = None
    rows: list[RowEdit] = field(default_factory=list)
    segments: list[RowEdit] = field(default_factory=list)


def compile_recipe(recipe: Recipe, shape: ModelShape) -> dict[int, LayerEdits]:
    """What a recipe does, by layer; heads at the identity strength, and layers without any other, are left out."""
    rank = {family: i for i, families in enumerate(ORDER) for family in families}
    # What a cache keeps was settled when the engine started.
    patches = [patch for patch in resolve(recipe, shape) if patch.method.family != "cache"]
    patches.sort(key=lambda patch: rank[patch.method.family])
    by_layer: dict[int, list[_Found]] = {}
    for patch in patches:
        identity = patch.method.identity()
        for layer, heads in patch.heads.items():
            touched = {head: value for head, value in heads.items() if value != identity}
            if touched:
                found = _Found(patch.method, touched, patch.pick(layer, list(touched)))
                by_layer.setdefault(layer, []).append(found)
    num_heads = shape.parts[shape.main].num_heads
    return {layer: _layer(found, num_heads[layer]) for layer, found in by_layer.items()}


@dataclass(frozen=True)
class _Found:
    """One patch in one layer: its method, ``{head: strength}``, and what it takes of the recipe's arrays."""

    method: Any
    heads: Mapping[int, float]
    arrays: Mapping[str, Tensor]


def _layer(found: Sequence[_Found], num_heads: int) -> LayerEdits:
    edits = LayerEdits()
    outputs = [f.method for f in found if f.method.family == "output"]
    spans = {method.span for method in outputs if is_row_edit(method)}
    in_table = len(spans) == 1 and all(map(is_affine, outputs))
    in_open = any(is_segment_edit(f.method) for f in found)
    for f in found:
        method = f.method
        index = torch.tensor(list(f.heads), dtype=torch.int64)
        strength = torch.tensor(list(f.heads.values()), dtype=torch.float32)
        if in_open and method.family in ("mass", "scores"):
            edits.segments.append(RowEdit(method, index, strength, dict(f.arrays)))
        elif method.family == "mass":
            edits.weight = _times(edits.weight, index, method.weights(strength)[:, 0], num_heads)
        elif not spans or (in_table and not is_row_edit(method)):
            # What acts at all positions can be done first: vectors that were added before it are multiplied, too.
            scales = method.scales(strength).float()
            edits.scale = _times(edits.scale, index, scales, num_heads)
            if edits.affine is not None and edits.affine.shift is not None:
                edits.affine.shift[index] *= scales[:, None]
        elif in_table:
            if edits.affine is None:
                edits.affine = Affine(method.span, torch.ones(num_heads))
            factor, shift = method.affine(strength, f.arrays)
            edits.affine.then(index, factor.float(), None if shift is None else shift.float())
        else:
            edits.rows.append(RowEdit(method, index, strength, dict(f.arrays)))
    return edits


def _times(total: Tensor | None, index: Tensor, values: Tensor, num_heads: int) -> Tensor:
    total = torch.ones(num_heads) if total is None else total
    total[index] *= values.float()
    return total
