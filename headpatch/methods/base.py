"""The contract between a method and every engine.

A method is a frozen dataclass. Its fields are its parameters, made with :func:`param`; one is the strength, made with
:func:`strength`, with the identity value at which an adapter does not touch the tensor at all. It says which *family* it
belongs to by subclassing one of

* :class:`MassMethod`: gives the segments it names new shares of each query row's attention;
* :class:`ScoresMethod`: attends to segments with transformed scores;
* :class:`OutputMethod`: changes head outputs before the output projection;
* :class:`headpatch.policies.CacheMethod`: decides which keys and values a KV head keeps.

It says what it *needs* (:data:`headpatch.operands.OPERANDS`), its *scope* (what may be shared between requests) and which
*state* is derived once per request and frozen at the absolute position ``prompt_len``. Functions are torch code with static
shapes and no host synchronisation; arithmetic is in fp32 (fp64 for fp64 models), the adapter casts back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from headpatch.errors import RecipeError
from headpatch.operands import OPERANDS, Segment
from headpatch.show import short

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.kernels.segments import Form

__all__ = [
    "FAMILIES",
    "ORDER",
    "MassMethod",
    "Method",
    "OutputMethod",
    "ScoresMethod",
    "head_vectors",
    "param",
    "strength",
]

Operands = Mapping[str, Any]
"""What a method asked for, by operand name; ``heads`` is always there: ids of the selected query heads, int64 [h]."""


def param(
    default: Any = dataclasses.MISSING, *, help: str, ge: float | None = None, gt: float | None = None,
    le: float | None = None, lt: float | None = None,
) -> Any:  # fmt: skip
    """A parameter of a method: default, help text and range. The annotation gives the type (float, int, bool, str, Literal)."""
    meta = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def strength(identity: float, *, help: str, ge: float | None = None, le: float | None = None) -> Any:
    """The parameter that recipes give per head. At `identity` an adapter leaves the head alone."""
    meta = {"help": help, "ge": ge, "le": le, "gt": None, "lt": None, "strength": True, "identity": float(identity)}
    return dataclasses.field(default=float(identity), metadata=meta)


def head_vectors(
    arrays: Mapping[str, Tensor], word: str, layer: int, heads: Sequence[int], head_dim: int
) -> Tensor:  # fmt: skip
    """Arrays ``{word}.{layer}.{head}`` of these heads, [h, d] fp32 (fp64 if they are).

    Raises
    ------
    RecipeError
        One is missing, no floating-point vector, or of another width.
    """
    import torch

    found = []
    for head in heads:
        name = f"{word}.{layer}.{head}"
        array = arrays.get(name)
        if array is None:
            raise RecipeError(
                f"holds no array {short(name)}, the vector of head {layer}.{head}", key="tensors.file",
                remedy=f"it holds {', '.join(sorted(arrays)[:3]) or 'nothing'}, ...; write one per head that the patch names",
            )  # fmt: skip
        if not array.is_floating_point() or tuple(array.shape) != (head_dim,):
            raise RecipeError(
                f"array {short(name)} is {tuple(array.shape)} of {array.dtype}, the head's output has {head_dim} numbers",
                key="tensors.file", remedy="use the file that was made for this model",
            )  # fmt: skip
        found.append(array.to(torch.promote_types(array.dtype, torch.float32)))
    return torch.stack(found)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all families. Subclass a family, not this.

    Class attributes
    ----------------
    name
        What recipes write under ``method:``.
    family
        ``mass``, ``scores``, ``output`` or ``cache``; set by the family class.
    version
        Raised whenever the numbers change: it enters the prefix-cache salt.
    needs
        Operands beyond those of the segments it names.
    heads_key, head_kind
        The recipe key that lists heads, and whether those are ``query`` or ``kv`` heads. The key is None for a cache policy
        that treats all KV heads of the part alike: its patch lists none.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    heads_key: ClassVar[str | None] = "heads"
    head_kind: ClassVar[str] = "query"

    @property
    def scope(self) -> str:
        """One of :data:`headpatch.operands.SCOPES`. Depends on parameters in some methods, hence a property."""
        return "prefix"

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the tensors that :meth:`derive` returns, if any."""
        return ()

    @property
    def state_needs(self) -> tuple[str, ...]:
        """Operands that :meth:`derive` alone is given, beyond `needs`: asked for once in a request, where its prompt ends."""
        return ()

    def segments(self) -> tuple[Segment, ...]:
        """The segments this method names, disjoint, in the order of the shares it is given."""
        return ()

    def operands(self) -> tuple[str, ...]:
        """All operands this method needs, its segments' included."""
        of_segments = (o for s in self.segments() for o in s.operands())
        return tuple(dict.fromkeys((*self.needs, *of_segments, *self.state_needs)))

    def pick(
        self, arrays: Mapping[str, Tensor], layer: int, heads: Sequence[int], head_dim: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the operand ``arrays`` is to hold for these heads of one layer, out of the recipe's tensors; default: all of them.

        Called when a recipe is applied or checked, so that what is missing or of another shape is a RecipeError then.
        """
        return dict(arrays)

    def derive(self, operands: Operands) -> dict[str, Tensor]:
        """State to freeze at the end of the prompt: the tensors named in `state`, each with a leading row dimension."""
        return {}

    @classmethod
    def strength_field(cls) -> dataclasses.Field[Any] | None:
        """The field made with :func:`strength`; None for methods that have none (cache policies)."""
        return next((f for f in dataclasses.fields(cls) if f.metadata.get("strength")), None)

    @classmethod
    def identity(cls) -> float:
        """Strength at which the method does nothing; NaN for methods without a strength."""
        found = cls.strength_field()
        return math.nan if found is None else found.metadata["identity"]

    @classmethod
    def check(cls) -> None:
        """Raise TypeError where a subclass breaks the contract. Called on registration."""
        where = f"method class {cls.__name__}"
        params = getattr(cls, "__dataclass_params__", None)
        if params is None or "__dataclass_params__" not in vars(cls) or not params.frozen:
            raise TypeError(f"{where}: must itself be decorated with @dataclass(frozen=True)")
        if not cls.name or not cls.name.replace("_", "").isalnum() or cls.name != cls.name.lower():
            raise TypeError(f"{where}: class attribute `name` must be a lower-case identifier, is {cls.name!r}")
        if cls.family not in FAMILIES:
            raise TypeError(f"{where}: subclass MassMethod, ScoresMethod, OutputMethod or CacheMethod")
        for f in dataclasses.fields(cls):
            if not f.metadata.get("help"):
                raise TypeError(f"{where}: field {f.name!r} has no help text; make it with param() or strength()")
        if sum(bool(f.metadata.get("strength")) for f in dataclasses.fields(cls)) > 1:
            raise TypeError(f"{where}: only one field may be the strength")
        if cls.strength_field() is None and cls.family != "cache":
            raise TypeError(f"{where}: one field must be made with strength()")
        if cls.heads_key is None and cls.family != "cache":
            raise TypeError(f"{where}: only a cache policy may go without a list of heads (heads_key = None)")
        if cls.family == "cache" and (cls.head_kind != "kv" or cls.strength_field() is not None):
            raise TypeError(f"{where}: a cache policy lists KV heads (head_kind = 'kv') and has no strength")
        unknown = sorted(set(cls.needs) - OPERANDS.keys())
        if unknown:
            raise TypeError(f"{where}: needs unknown operands {unknown}; the closed list is in headpatch/operands.py")


@dataclasses.dataclass(frozen=True)
class MassMethod(Method):
    """Attention of a query row is a distribution over keys; the method gives segments new shares of it.

    Inside a segment, and inside the rest, proportions stay. A subclass whose result is a constant weight per (head, segment)
    sets ``constant = True`` and overrides :meth:`weights` alone: an adapter may then use its fused kernel. Otherwise it
    overrides :meth:`reshare`.

    A subclass may set ``conserves = True`` where its :meth:`reshare` gives nothing to a segment without attention, and always keeps
    the sum: an adapter then does without the work that sees to both.
    """

    family: ClassVar[str] = "mass"
    constant: ClassVar[bool] = False
    conserves: ClassVar[bool] = False

    @property
    def is_constant(self) -> bool:
        """Whether the result is a constant weight per (head, segment), under these parameters."""
        return self.constant

    def acts_on(self, operands: Operands) -> Tensor | None:
        """[b, q] bool: queries of a whole prompt in one call that the method can change; None: any.

        `operands` are those that the method's `needs` names. An adapter may spare the others the work, and need not.
        """
        return None

    def form(self, operands: Operands) -> Form | None:
        """What :meth:`reshare` does, as one of the forms that fused kernels know (:mod:`headpatch.kernels.segments`); None: none.

        `operands` as for :meth:`reshare`. An adapter may go by it instead, and need not.
        """
        return None

    def weights(self, strength: Tensor) -> Tensor:
        """Constant weights [h, S] >= 0 that multiply each segment's attention before one normalisation; strength is [h]."""
        raise NotImplementedError(f"{type(self).__name__} must override weights() or reshare()")

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        """New shares of one row's attention.

        Parameters
        ----------
        shares
            [S + 1, b, h, q] of the S segments and, last, of the rest; sums to one over the first dimension.
        strength
            [h], one per selected head.

        Returns
        -------
        Tensor
            Same shape, same sum.
        """
        import torch

        w = self.weights(strength).to(shares).t()[:, None, :, None]
        weighted = torch.cat([shares[:-1] * w, shares[-1:]])
        total = weighted.sum(0, keepdim=True)
        # A row that sees nothing but emptied segments stays as it is.
        return torch.where(total > 0, weighted / total.clamp_min(torch.finfo(shares.dtype).tiny), shares)


@dataclasses.dataclass(frozen=True)
class ScoresMethod(Method):
    """Attention over the segments it names with transformed scores, and over the rest as it was, under one softmax."""

    family: ClassVar[str] = "scores"

    @property
    def span(self) -> tuple[int | None, int | None]:
        """Positions outside of which :meth:`transform` changes nothing, as in :attr:`OutputMethod.span`; an adapter may know."""
        return (None, None)

    def form(self, operands: Operands) -> Form | None:
        """What :meth:`transform` does inside :attr:`span`, as one of the forms that fused kernels know; None: none.

        As for :meth:`MassMethod.form`.
        """
        return None

    def transform(self, scores: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        """New scores over the keys of one segment; called for each of them, with the scores as they were before.

        Parameters
        ----------
        scores
            [b, h, q, n] fp32, scaled by the attention's own scale; keys outside the segment are -inf and must stay so.
        strength
            [h].
        operands
            What the method needs, and ``segment``, the segment's place in :meth:`segments`.
        """
        raise NotImplementedError(f"{type(self).__name__} must override transform()")


@dataclasses.dataclass(frozen=True)
class OutputMethod(Method):
    """Changes head outputs, [b, q, H, d], before the output projection.

    A subclass whose result is a constant factor per head sets ``constant = True`` and overrides :meth:`scales` alone. One whose
    result is ``o' = factor o + shift`` with constants per head, at all positions or at those that :attr:`span` says, overrides
    :meth:`affine` (and `span`) alone: an adapter may then put it into tables. Any other overrides :meth:`edit`.
    """

    family: ClassVar[str] = "output"
    constant: ClassVar[bool] = False

    @property
    def is_constant(self) -> bool:
        """Whether the result is a constant factor per head, under these parameters."""
        return self.constant

    @property
    def span(self) -> tuple[int | None, int | None]:
        """Positions that are edited, first and one behind the last, counted from the end of the prompt; None: no bound.

        (-1, 0) is the prompt's last token alone, (0, None) all generated tokens.
        """
        return (None, None)

    def operands(self) -> tuple[str, ...]:
        bounded = () if self.span == (None, None) else ("position", "prompt_len")
        return tuple(dict.fromkeys((*super().operands(), *bounded)))

    def scales(self, strength: Tensor) -> Tensor:
        """Constant factors [h]; strength is [h]."""
        raise NotImplementedError(f"{type(self).__name__} must override scales(), affine() or edit()")

    def affine(self, strength: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
        """The constants (factor [h], shift [h, d] or None for none); None where the edit is not of that form.

        Parameters
        ----------
        strength
            [h].
        arrays
            What :meth:`pick` gave; empty for a method that needs none.
        """
        return (self.scales(strength), None) if self.is_constant else None

    def edit(self, output: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        """New outputs of the selected heads.

        Parameters
        ----------
        output
            [b, q, h, d] outputs of the selected heads, fp32 or fp64.
        strength
            [h].

        Returns
        -------
        Tensor
            Same shape.
        """
        constants = self.affine(strength, operands.get("arrays", {}))
        if constants is None:
            raise NotImplementedError(f"{type(self).__name__} must override scales(), affine() or edit()")
        factor, shift = constants
        new = output * factor.to(output)[:, None]
        if shift is not None:
            new = new + shift.to(output)
        inside = self.inside(operands)
        return new if inside is None else new.where(inside[:, :, None, None], output)

    def inside(self, operands: Operands) -> Tensor | None:
        """Which queries lie in :attr:`span`, [b, q] bool; None for all."""
        start, stop = self.span
        found = None
        for bound, compare in ((start, "ge"), (stop, "lt")):
            if bound is not None:
                edge = (operands["prompt_len"] + bound)[:, None]
                side: Tensor = getattr(operands["position"], compare)(edge)
                found = side if found is None else found & side
        return found


FAMILIES = ("mass", "scores", "output", "cache")
ORDER: tuple[tuple[str, ...], ...] = (("cache",), ("mass", "scores"), ("output",))
"""Families in the order they act, whatever the order in a recipe; inside one, recipe order, then handle order."""
