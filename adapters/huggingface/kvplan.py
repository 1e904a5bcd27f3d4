"""What a cache policy means for one attention layer: which KV heads keep everything, and which keep a window."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.kvdetect import windowed_layers
from headpatch.errors import UnsupportedModelError
from headpatch.methods.base import MassMethod
from headpatch.policies import SelectionMethod
from headpatch.resolve import check_policies

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.discover import Layout
    from headpatch.adapters.huggingface.plan import LayerPlan

__all__ = ["Policy", "check_together", "find_policies", "part_of", "unbounded"]

CHOOSE_BY = {"kv_windows", "kv_selection", "window_scores", "k", "v", "o_proj", "depth"}
"""What a cache policy may need: how it stores, and what it chooses by."""


@dataclass(frozen=True)
class Policy:
    """A cache policy on one layer.

    Attributes
    ----------
    full, streaming
        KV heads that keep every token, and those that keep the first `sink` and the last `recent` ones; ascending.
    sink, recent
        As in :class:`headpatch.policies.WindowMethod`.
    groups
        Query heads per KV head.
    key
        (digest of the recipe, patch index).
    selection, depth
        A policy that chooses tokens of the prompt instead, and the layer's place among those of its part; `full` then lists all
        KV heads, which keep everything until the prompt ends.
    """

    full: tuple[int, ...]
    streaming: tuple[int, ...]
    sink: int
    recent: int
    groups: int
    key: tuple[str, int]
    selection: SelectionMethod | None = None
    depth: tuple[int, int] = (0, 1)
    _indices: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return len(self.full) + len(self.streaming)

    def __str__(self) -> str:
        if self.selection is not None:
            kept = (
                f"{self.selection.size} tokens" if self.selection.size else f"{self.selection.ratio:g} of the prompt"
            )
            return f"{len(self.full)} KV heads keep {kept}, and what is generated"
        full = f"KV heads {', '.join(map(str, self.full))} keep all" if self.full else "no KV head keeps all"
        return f"{full}; {len(self.streaming)} keep the first {self.sink} and the last {self.recent} tokens"

    @property
    def window(self) -> int:
        """Tokens up to which a streaming head drops nothing."""
        return self.sink + self.recent

    def kv_order(self, device: torch.device) -> Tensor | None:
        """KV heads with the full ones in front, int64; None where they lie so anyway."""
        return self._index("kv", self.full + self.streaming, device)

    def query_order(self, device: torch.device) -> Tensor | None:
        """Query heads in the same order."""
        return self._index("query", self._queries(), device)

    def output_order(self, device: torch.device) -> Tensor | None:
        """Where in that order each query head lies."""
        order = self._queries()
        back = [0] * len(order)
        for place, head in enumerate(order):
            back[head] = place
        return self._index("output", tuple(back), device)

    def split(self, edits: LayerPlan | None) -> tuple[LayerPlan | None, LayerPlan | None]:
        """A layer's constant edits, for the query heads of the full and of the streaming group."""
        if edits is None or not edits.edits_masses:
            return None, None
        order, middle = self._queries(), len(self.full) * self.groups
        return part_of(edits, order[:middle]), part_of(edits, order[middle:])

    def _queries(self) -> tuple[int, ...]:
        return tuple(kv * self.groups + g for kv in self.full + self.streaming for g in range(self.groups))

    def _index(self, name: str, order: tuple[int, ...], device: torch.device) -> Tensor | None:
        if order == tuple(range(len(order))):
            return None
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor(order, dtype=torch.long, device=device)
        found: Tensor = self._indices[name, device]
        return found


def part_of(edits: LayerPlan, heads: tuple[int, ...]) -> LayerPlan | None:
    """A plan of constant first-token weights, for these query heads alone."""
    if edits.trainable or edits.first_weight is None:
        return replace(edits, part_of=heads)
    weight = edits.first_weight[list(heads)]
    if bool((weight == 1).all()):
        return None
    return replace(edits, num_heads=len(heads), first_weight=weight, scale=None, part_of=heads, bias=None)


def find_policies(records: Iterable[Any], layout: Layout) -> dict[tuple[str, int], Policy]:
    """The policy of each layer, by (part, layer); layers with a window of their own have none."""
    found = {}
    for patch in (p for record in records for p in record.resolved if p.method.family == "cache"):
        bounded = windowed_layers(where for (part, _), where in layout.attention.items() if part == patch.part)
        for layer, listed in patch.heads.items():
            if layer in bounded:
                continue
            where, method = layout.attention[patch.part, layer], patch.method
            chosen = isinstance(method, SelectionMethod)
            full = tuple(range(where.num_kv_heads)) if chosen else tuple(listed)
            sink, recent = (0, 1) if chosen else (method.sink, method.recent)
            found[patch.part, layer] = Policy(
                full, tuple(h for h in range(where.num_kv_heads) if h not in full), sink, recent,
                where.num_heads // where.num_kv_heads, (patch.recipe.digest, patch.index), method if chosen else None,
                (list(patch.heads).index(layer), len(patch.heads)),
            )  # fmt: skip
    return found


def unbounded(patch: Any, layout: Layout) -> tuple[str, ...]:
    """The feature that no layer of a policy's part is without a window of its own; then there is nothing for it to do."""
    mine = [where for (part, _), where in layout.attention.items() if part == patch.part]
    if not all(where.part in ("text", "decoder") for where in mine):
        return ()
    return () if {where.layer for where in mine} - windowed_layers(mine) else ("no_unbounded_layer",)


def check_together(records: Iterable[Any]) -> None:
    """Raise where a cache policy does not go with another patch of the same part, over all recipes of a model."""
    patches = [patch for record in records for patch in record.resolved]
    check_policies(patches)
    policies = {patch.part: patch.method.name for patch in patches if patch.method.family == "cache"}
    for patch in patches:
        method = patch.method
        if method.family == "cache":
            other = sorted(set(method.operands()) - CHOOSE_BY)
            if other:
                raise UnsupportedModelError(
                    f"patches[{patch.index}] ({method.name}): operand {other[0]!r} is not supplied to a cache policy by this adapter"
                )
        if method.family == "cache" or patch.part not in policies:
            continue
        problem = None
        if method.family != "output" and not (isinstance(method, MassMethod) and method.is_constant):
            problem = "only constant weights on the first token"
        elif method.family == "output" and "lse" in method.operands():
            problem = "no output edit that needs operand 'lse'"
        elif method.state:
            problem = "no state that is derived from the prompt"
        if problem is not None:
            raise UnsupportedModelError(
                f"patches[{patch.index}] ({method.name}): beside the cache policy {policies[patch.part]}, this adapter supplies "
                f"{problem}"
            )
