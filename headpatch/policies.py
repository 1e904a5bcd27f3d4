"""The contract between a cache policy and every engine: :class:`headpatch.methods.base.Method` with a rule for what is kept."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from headpatch.methods.base import Method, Operands, param

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheMethod", "SelectionMethod", "WindowMethod"]


@dataclasses.dataclass(frozen=True)
class CacheMethod(Method):
    """Decides which keys and values a KV head keeps. Subclass :class:`WindowMethod` or :class:`SelectionMethod`, not this.

    A policy acts on *every* softmax layer of its part: ``ResolvedPatch.heads`` has an entry for each, with the KV heads that
    the recipe lists there, ``()`` where it lists none. `heads_key` says what happens to the KV heads that it lists; they are KV
    heads, never query heads. A part carries one policy at most.
    """

    family: ClassVar[str] = "cache"
    heads_key: ClassVar[str | None] = "full_kv_heads"
    head_kind: ClassVar[str] = "kv"

    def keeps(self, operand: str) -> bool:
        """Whether no key that the operand `operand` (of :data:`headpatch.operands.KEYED`) needs is ever dropped.

        Patches that need others are refused beside this policy: masses and operands are those of what is kept.
        """
        return False


@dataclasses.dataclass(frozen=True)
class WindowMethod(CacheMethod):
    """Listed KV heads keep every token, all others of the part the first `sink` and the last `recent` ones.

    This is all that an engine needs to know of such a policy: `sink`, `recent`, and for each layer the listed heads
    (``ResolvedPatch.heads``). With positions counted from the row's first real token, the query at position i sees key p iff

        p < sink    or    i - recent < p <= i    or    the head is listed (then p <= i)

    whatever chunks a prompt comes in.
    """

    sink: int = param(
        64, ge=0, le=2**20, help="first tokens that every KV head keeps, counted from a row's first real one"
    )
    recent: int = param(256, ge=1, le=2**24, help="last tokens that every KV head keeps, the current one included")

    needs: ClassVar[tuple[str, ...]] = ("kv_windows",)

    def keep(self, positions: Tensor, length: Tensor, listed: bool) -> Tensor:
        """Which positions a KV head keeps once `length` tokens have been seen: what the query at ``length - 1`` sees.

        Parameters
        ----------
        positions
            [n] int64, counted from the row's first real token.
        length
            [b] int64, real tokens seen so far.
        listed
            Whether the recipe lists this KV head.

        Returns
        -------
        Tensor
            [b, n] bool.
        """
        seen = positions < length[:, None]
        if listed:
            return seen
        return seen & ((positions < self.sink) | (positions >= length[:, None] - self.recent))

    def keeps(self, operand: str) -> bool:
        return operand == "first_token" and self.sink > 0


@dataclasses.dataclass(frozen=True)
class SelectionMethod(CacheMethod):
    """Each KV head keeps some of the prompt's tokens, chosen once, where the prompt ends; every later token is kept, too.

    Queries of the prompt still see all of it: what is chosen matters from the first generated token on. A row is chosen for by
    itself, without its padding. `needs` names, beside ``kv_selection``, what :meth:`select` reads.
    """

    size: int = param(
        0,
        ge=0,
        le=2**24,
        help="tokens that a KV head keeps of the prompt, on average over a layer's; 0: `ratio` decides",
    )
    ratio: float = param(0.5, gt=0.0, le=1.0, help="share of the prompt's tokens that stays, where `size` is 0")

    heads_key: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ("kv_selection",)

    @property
    def scope(self) -> str:
        return "prompt"

    @property
    def interval(self) -> int:
        """Generated tokens after which :meth:`thin` chooses anew; 0: never."""
        return 0

    def budget(self, length: int) -> int:
        """Tokens that a KV head keeps on average, of `length`."""
        return min(length, self.size or max(1, int(length * self.ratio)))

    def select(self, operands: Operands) -> tuple[Tensor, ...]:
        """Positions that each KV head of a layer keeps of one row's prompt.

        Parameters
        ----------
        operands
            What the method needs, of this row alone (b = 1, no padding), and ``depth``. Host synchronisation is allowed: this runs
            once a prompt.

        Returns
        -------
        tuple of Tensor
            Per KV head, int64, ascending. A few different lengths are best: heads of the same length are stored together.
        """
        raise NotImplementedError(f"{type(self).__name__} must override select()")

    def thin(self, keys: Tensor, seen: int) -> Tensor:
        """What one KV head keeps of the tokens that it still holds, while decoding.

        Parameters
        ----------
        keys
            [m, d], in the order of their positions.
        seen
            Tokens that the row has had so far.

        Returns
        -------
        Tensor
            Ascending indices into `keys`, as many for every head.
        """
        raise NotImplementedError(f"{type(self).__name__} must override thin(), or leave `interval` at 0")
