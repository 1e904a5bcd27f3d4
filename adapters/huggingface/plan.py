"""What is done to one attention layer: the edits of all handles, in DESIGN's order, with their strengths on the right device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.methods.base import ORDER, MassMethod, Method, OutputMethod
from headpatch.operands import Segment
from headpatch.segments import in_numbers

__all__ = ["Edit", "LayerPlan", "home", "rows_key"]


GENTLE = 0.25
"""From this weight on, correcting a finished attention output loses at most two bits, less than bf16's own rounding of it."""


FAR = 64.0
"""Largest logarithm of a weight that is added to a score: that keeps five decimals in fp32."""


ALIKE = frozenset({"position", "prompt_len", "image_queries"})
"""Operands that are the same for all heads."""


@dataclass
class Edit:
    """One method on the heads of one layer.

    Attributes
    ----------
    method
        The method with its parameters.
    heads
        Query heads, int64 [h], ascending.
    strength
        [h] in the model's arithmetic dtype (fp64 for fp64 models, else fp32); a leaf with gradients when strengths are trained.
    key
        (digest of the recipe, patch index): whose edit this is; state is kept under it, also when the recipe is applied again.
    arrays
        What the method picked of the recipe's tensors for these heads, floating-point ones in the dtype of `strength`.
    handle
        Id of the record that it came with: under :func:`rows_key` of it a call says which rows the edit is for.
    dense
        Strength of every head [H], neutral where the edit names none, and which heads it names, bool [H, 1, 1]: compilers fuse what
        is done to all heads, and not what is done to some. None where the method needs numbers of single heads, or a strength is
        trained.
    segments, asked
        The method's segments, and the operands that it is given in every call beside those that its state is derived from; worked
        out once, because every layer of a call asks.
    """

    method: Method
    heads: Tensor
    strength: Tensor
    key: tuple[str, int]
    arrays: dict[str, Tensor] = field(default_factory=dict)
    handle: int = 0
    dense: tuple[Tensor, Tensor] | None = None
    segments: tuple[Segment, ...] = field(init=False, repr=False)
    asked: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        method = self.method
        self.segments = method.segments()
        alone = set(method.state_needs) - set(method.needs)
        self.asked = method.needs if self.segments else tuple(o for o in method.operands() if o not in alone)

    def prepare(self, num_heads: int) -> None:
        """Fill `dense` in, once the layer's number of heads is known."""
        if not self.method.state and not self.strength.requires_grad and ALIKE.issuperset(self.method.needs):
            chosen = self.spread(torch.ones_like(self.heads), num_heads, 0).bool()
            self.dense = self.spread(self.strength, num_heads, self.method.identity()), chosen[:, None, None]

    def spread(self, values: Tensor, num_heads: int, neutral: float = 1.0) -> Tensor:
        """[h] values on their heads, `neutral` on all others: [num_heads]."""
        full = torch.full((num_heads,), neutral, dtype=values.dtype, device=values.device)
        return full.index_put((self.heads,), values)


@dataclass
class LayerPlan:
    """The edits of one layer.

    Attributes
    ----------
    edits, attention
        In the order they act: mass and scores, then output; inside each, recipe order, then handle order. Of these, the mass and
        scores edits.
    first_weight
        [H] product of all constant first-token weights, where nothing else touches this layer's masses: then one closed form
        does it all. None otherwise.
    scale
        [H] product of all constant output factors, where no other output edit is there. None otherwise.
    trainable, needs, edits_masses, simple
        Whether a strength has gradients; operands that any edit needs; whether there is a mass or scores edit; whether all are
        constants that need no operand. Worked out once, because a decoding step asks in every layer.
    segments, owned
        Distinct segments that the mass and scores edits name, and each such edit's places among them.
    gentle
        Whether no first-token weight is below GENTLE.
    log_weights
        [h, 1] logarithms of the weights on a segment, where the only mass or scores edit is constant and names one segment, and no
        weight is so far from 1 that its logarithm beside a score would cost digits.
    closed
        Whether `first_weight` and `scale` say all that is done to this layer.
    until
        Where the last edited position is, counted from the end of the prompt, if no edit goes on for ever (and none is of masses):
        calls behind it are the untouched model's.
    restrictions
        What a call's data is looked through for: see :func:`rows_key`.
    bias, columns
        Buffers of :meth:`first_bias` and :meth:`bias_columns`.
    part_of
        The query heads of which this is a part of a layer's plan; empty for the plan of a layer.
    """

    num_heads: int
    edits: tuple[Edit, ...] = ()
    attention: tuple[Edit, ...] = ()
    first_weight: Tensor | None = None
    scale: Tensor | None = None
    trainable: bool = False
    needs: frozenset[str] = frozenset()
    edits_masses: bool = False
    simple: bool = True
    segments: tuple[Segment, ...] = ()
    owned: tuple[tuple[int, ...], ...] = ()
    gentle: bool = False
    log_weights: Tensor | None = None
    closed: bool = False
    until: int | None = None
    restrictions: frozenset[str] = frozenset()
    bias: Tensor | None = field(default=None, repr=False)
    columns: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    part_of: tuple[int, ...] = ()

    @classmethod
    def build(cls, num_heads: int, edits: Sequence[Edit]) -> LayerPlan:
        """Put `edits` (recipe order, then handle order) into acting order and take closed forms where there are any."""
        rank = {family: i for i, families in enumerate(ORDER) for family in families}
        ordered = tuple(sorted(edits, key=lambda e: rank[e.method.family]))
        attention = tuple(e for e in ordered if e.method.family in ("mass", "scores"))
        plan = cls(
            num_heads, ordered, attention, trainable=any(e.strength.requires_grad for e in ordered),
            needs=frozenset(name for e in ordered for name in e.method.operands()), edits_masses=bool(attention),
            simple=all(getattr(e.method, "is_constant", False) and not e.method.operands() for e in ordered),
            restrictions=frozenset(rows_key(e.handle) for e in ordered),
        )  # fmt: skip
        stops = [e.method.span[1] if isinstance(e.method, OutputMethod) else None for e in ordered]
        plan.until = max(stops) if stops and None not in stops else None  # type: ignore[type-var]
        named = [e.segments for e in plan.attention]
        for edit in plan.attention:
            edit.prepare(num_heads)
        plan.segments = tuple(dict.fromkeys(s for of_edit in named for s in of_edit))
        plan.owned = tuple(tuple(plan.segments.index(s) for s in of_edit) for of_edit in named)
        if not plan.trainable:
            plan.first_weight, plan.scale = plan.constants()
            plan.gentle = plan.first_weight is not None and float(plan.first_weight.min()) >= GENTLE
            plan.log_weights = _log_weights(plan.attention)
            plan.closed = plan.first_weight is not None and (plan.scale is not None or not plan.family("output"))
        return plan

    def family(self, *families: str) -> tuple[Edit, ...]:
        """Edits of these families, in acting order."""
        return tuple(e for e in self.edits if e.method.family in families)

    def restricted(self, known: Mapping[str, Any]) -> bool:
        """Whether this call's data keeps an edit to some of its rows."""
        return not self.restrictions.isdisjoint(known)

    @property
    def first_only(self) -> bool:
        """Whether all mass edits are constant weights on the first token."""
        return all(
            isinstance(e.method, MassMethod) and e.method.is_constant and _is_first(e.method) for e in self.attention
        )

    def first_bias(self, keys: int, weight: Tensor) -> Tensor:
        """[1, H, 1, keys] log weight at key 0, zero elsewhere: a view of a buffer that grows by doubling. Eager calls only."""
        if self.bias is None or self.bias.shape[-1] < keys or self.bias.dtype != weight.dtype:
            room = max(256, 1 << (keys - 1).bit_length())
            self.bias = torch.zeros(1, self.num_heads, 1, room, dtype=weight.dtype, device=weight.device)
            # finfo.min and not -inf for weight 0: the kernel adds it to a score.
            self.bias[0, :, 0, 0] = weight.log().clamp_min(torch.finfo(weight.dtype).min)
        return self.bias[..., :keys]

    def bias_columns(self, q: Tensor, scale: float, everywhere: bool) -> Tensor:
        """[h, e] numbers that make of ones in a key `log_weights` on its score, in as many head dimensions as kernels like.

        `everywhere`: [H, e], of all heads, zeros where there is no edit.
        """
        key = (q.dtype, q.device, q.shape[-1], scale, everywhere)
        if key in self.columns and not torch.compiler.is_compiling():
            return self.columns[key]
        assert self.log_weights is not None
        found = in_numbers(self.log_weights.to(q.device) / scale, q.dtype)
        made = torch.nn.functional.pad(torch.cat(found, 1), (0, -(q.shape[-1] + len(found)) % 8))
        if everywhere:
            heads = self.attention[0].heads
            made = made.new_zeros(self.num_heads, made.shape[1]).index_copy(0, heads, made)
        if not torch.compiler.is_compiling():
            self.columns[key] = made
        return made

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """(first_weight, scale) from the strengths as they are now, differentiable."""
        mass, output = self.attention, self.family("output")
        weight = scale = None
        if mass and self.first_only:
            weight = _product(
                [e.spread(e.method.weights(e.strength)[:, 0], self.num_heads) for e in mass]  # type: ignore[attr-defined]
            )
            if self.part_of:
                weight = weight[list(self.part_of)]
        if output and all(isinstance(e.method, OutputMethod) and e.method.is_constant for e in output):
            scale = _product(
                [e.spread(e.method.scales(e.strength), self.num_heads) for e in output]  # type: ignore[attr-defined]
            )
        return weight, scale


def rows_key(handle: int) -> str:
    """Under what a call's data says which rows the recipe of one handle is for."""
    return f"rows of {handle}"


def _is_first(method: Any) -> bool:
    return [s.kind for s in method.segments()] == ["first_token"]


def _log_weights(edits: tuple[Edit, ...]) -> Tensor | None:
    if len(edits) != 1 or not isinstance(method := edits[0].method, MassMethod) or not method.is_constant:
        return None
    found = method.weights(edits[0].strength).log()
    return found if found.shape[1] == 1 and float(found.abs().max()) <= FAR else None


def _product(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for t in tensors[1:]:
        total = total * t
    return total


def home(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and arithmetic dtype of a layer's strengths."""
    found = next((p for p in module.parameters()), None)
    hook: Any = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = found.device if found is not None and found.device.type != "meta" else "cpu"
    double = found is not None and found.dtype == torch.float64
    return torch.device(device), torch.float64 if double else torch.float32
