"""What the cache policies of a recipe keep in a model, in numbers and words: what `headpatch show` and `headpatch check` say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.heads import PartShape, to_selectors
from headpatch.policies import SelectionMethod, WindowMethod

if TYPE_CHECKING:
    from headpatch.resolve import ResolvedPatch

__all__ = ["LENGTHS", "Keeping", "keepings"]

LENGTHS = (8192, 32768, 131072)
"""Tokens at which the share of the cache that stays is named."""
NAMED = 12
"""Selectors up to which the heads that keep everything are named one by one."""


@dataclass(frozen=True)
class Keeping:
    """One cache policy in one attention stack.

    Attributes
    ----------
    index, method, part
        The patch in its recipe, the policy, the stack.
    full, rest
        ``{layer: (KV head, ...)}``: those that keep every token, and those that do not. Layers in `windowed` are in neither.
    windowed
        Layers with a sliding window of their own, which a policy leaves as they are.
    stack
        The stack's shape.
    """

    index: int
    method: WindowMethod | SelectionMethod
    part: str
    full: Mapping[int, tuple[int, ...]]
    rest: Mapping[int, tuple[int, ...]]
    windowed: tuple[int, ...]
    stack: PartShape

    @property
    def num_full(self) -> int:
        """KV heads that keep every token."""
        return sum(map(len, self.full.values()))

    @property
    def num_rest(self) -> int:
        """KV heads that do not."""
        return sum(map(len, self.rest.values()))

    @property
    def rule(self) -> str:
        """What the others keep: ``the first 64 and the last 256 tokens``, or ``0.5 of the prompt's tokens, chosen where it ends``."""
        if isinstance(self.method, WindowMethod):
            first = f"the first {self.method.sink} and " if self.method.sink else ""
            return f"{first}the last {self.method.recent} tokens"
        size = self.method.size
        kept = f"{size} of the prompt's tokens" if size else f"{self.method.ratio:g} of the prompt's tokens"
        each = " on average" if len(self.rest) and max(map(len, self.rest.values())) > 1 else ""
        return f"{kept}{each}, chosen where it ends, and all later ones"

    def share(self, tokens: int) -> float:
        """What the cache of the layers under the policy holds of an untouched one, for `tokens` tokens a row.

            (F T + W min(T, sink + recent)) / (K T)        summed over layers, each head counted with its width

        For a policy that chooses tokens, `tokens` is the prompt's length, and its budget stands for the window. Storage grows by
        blocks (docs/kv-cache.md), which is not counted here.
        """
        method = self.method
        kept = min(tokens, method.sink + method.recent) if isinstance(method, WindowMethod) else method.budget(tokens)
        held = plain = 0
        for layer, full in self.full.items():
            width = self.stack.head_dim[layer] or 1
            held += width * (len(full) * tokens + len(self.rest[layer]) * kept)
            plain += width * (len(full) + len(self.rest[layer])) * tokens
        return held / plain if plain else 1.0

    def lines(self) -> list[str]:
        """What people want to know, a line each."""
        full, rest = self.num_full, self.num_rest
        selectors = list(to_selectors({n: dict.fromkeys(h) for n, h in self.full.items() if h}, self.stack, "kv"))
        names = f" ({', '.join(selectors)})" if full and len(selectors) <= NAMED else ""
        words = f"{full} of {full + rest} KV heads keep every token{names}; " if full else ""
        others = f"{rest} keep" if full else f"all {rest} KV heads keep"
        stack = "" if self.part == "text" else f" ({self.part})"
        lines = []
        if rest:
            lines.append(f"{self.method.name}{stack}: {words}{others} {self.rule}")
            shares = ", ".join(f"{self.share(n):.3g} at {n:,}" for n in LENGTHS)
            which = "of these layers" if self.windowed else "that stays"
            unit = "tokens" if isinstance(self.method, WindowMethod) else "tokens of prompt"
            lines.append(f"share of the cache {which}: {shares} {unit}")
        elif full:
            lines.append(f"{self.method.name}{stack}: all {full} KV heads keep every token; nothing is saved")
        if self.windowed:
            layers = ", ".join(map(str, self.windowed))
            lines.append(f"left as they are, for they have a window of their own: layers {layers}")
        if not full + rest:
            lines.append(
                "every layer has a window of its own: there is nothing for the policy to do, and it is refused"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "patch": self.index, "method": self.method.name, "part": self.part,
            "full_kv_heads": {str(n): list(h) for n, h in self.full.items() if h}, "num_full": self.num_full,
            "num_rest": self.num_rest, "rest_keep": self.rule, "windowed_layers": list(self.windowed),
            "share": {str(n): self.share(n) for n in LENGTHS},
        }  # fmt: skip


def keepings(
    patches: Iterable[ResolvedPatch], windowed: Mapping[str, Collection[int]] | None = None
) -> list[Keeping]:  # fmt: skip
    """What each cache policy among `patches` keeps.

    Parameters
    ----------
    patches
        As :func:`headpatch.resolve.resolve` gives them.
    windowed
        By part, the layers with a sliding window of their own, where that is known.
    """
    found = []
    for patch in patches:
        method = patch.method
        if not isinstance(method, WindowMethod | SelectionMethod):
            continue
        bounded = tuple(sorted(set((windowed or {}).get(patch.part, ())) & patch.heads.keys()))
        full = {layer: tuple(heads) for layer, heads in patch.heads.items() if layer not in bounded}
        rest = {n: tuple(h for h in range(patch.stack.num_kv_heads[n]) if h not in heads) for n, heads in full.items()}
        found.append(Keeping(patch.index, method, patch.part, full, rest, bounded, patch.stack))
    return found
