"""Read-only access to operands while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headpatch.adapters.huggingface.controller import NEVER_WITH, Controller, controller_of
from headpatch.adapters.huggingface.discover import find_layout
from headpatch.adapters.huggingface.operands import SUPPLIES
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError
from headpatch.heads import select_heads
from headpatch.operands import KEYED, OPERANDS, refusals
from headpatch.registry import closest

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.operands import OperandServer

__all__ = ["Observed", "observing"]

PER_KV_HEAD = ("k", "v")
PER_LAYER = (
    "layer_input",
    "position",
    "prompt_len",
    "spans",
    "beside_spans",
    "image_tokens",
    "image_queries",
    "residual_sinks",
    "first_token",
    "without_image",
)
REFUSED = ("arrays", "all_heads", "kv_windows", "kv_selection", "depth")
OF_THE_LAYER = ("output", "weights")
"""What is recorded beside operands: results of the layer, its edits included."""
BY_KEY = KEYED | {"lse"}
"""What heads that hold different keys have no common form of."""


class Observed(dict[tuple[str, str], list[Tensor]]):
    """``(operand, "layer.head") -> one tensor per forward call``, detached, on the model's device.

    ``output`` is [b, q, d]; operands per head lose their head dimension (``lse``: [b, q]); ``k`` and ``v`` are those of the KV head
    that serves the query head; operands of a whole layer are under ``(operand, "layer")``. ``weights`` is [b, asked queries, n], the
    attention of these queries as the layer's edits leave it.
    """

    def __init__(
        self,
        part: str,
        operands: tuple[str, ...],
        heads: dict[int, tuple[int, ...]],
        window: int,
        queries: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.operands, self.heads, self.window, self.queries = operands, heads, window, queries
        self.layers = {(part, layer) for layer in heads}
        self.needs = set(operands) - set(OF_THE_LAYER)

    def __missing__(self, key: tuple[str, str]) -> list[Tensor]:
        return []

    def record(self, state: LayerState, server: OperandServer, output: Tensor) -> None:
        """Called by a patched layer after its attention, before output edits."""
        if state.policy is not None and self.needs & BY_KEY:
            raise EngineError(
                f"layer {state.name}: {min(self.needs & BY_KEY)!r} cannot be observed under a cache policy, whose heads hold "
                "different keys; observe the model without it"
            )
        groups = state.num_heads // state.num_kv_heads
        for name in self.operands:
            if name == "output":
                value = output
            elif name == "window_scores":
                value = server.window_scores(self.window)
            elif name == "weights":
                value = server.weights(self.queries)
            else:
                value = server.get(name)
            value = value.detach().clone()
            if name in PER_LAYER:
                self.setdefault((name, str(state.layer)), []).append(value)
                continue
            for head in self.heads[state.layer]:
                if name == "output":
                    one = value[:, :, head]
                elif name == "o_proj":
                    one = value[head]
                elif name in PER_KV_HEAD:
                    one = value[:, head // groups if value.shape[1] == state.num_kv_heads else head]
                else:
                    one = value[:, head]
                self.setdefault((name, f"{state.layer}.{head}"), []).append(one)


@contextlib.contextmanager
def observing(
    root: nn.Module, operands: Iterable[Any], heads: Any, part: str | None = None, window: Any = 32,
    queries: Any = (-1,),
) -> Iterator[Observed]:  # fmt: skip
    """See :func:`headpatch.observe`."""
    names = tuple(operands)
    if not names:
        raise HeadpatchError("nothing to observe: name at least one operand, or 'output'")
    known = {*OF_THE_LAYER, *OPERANDS} - {*REFUSED}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise HeadpatchError(f"cannot observe {name!r}; {closest(name, known)}")
        if name == "column_sinks":
            raise HeadpatchError("column_sinks depend on a threshold: observe 'column_means' and compare")
        if name == "residual_sinks":
            raise HeadpatchError("residual_sinks depend on dimensions and a threshold: observe 'layer_input'")
        if name == "vision_salient":
            raise HeadpatchError(
                "vision_salient depends on a layer and a share: observe 'weights' of query 0 in part 'vision', and compare"
            )
    names = tuple(dict.fromkeys(names))
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise HeadpatchError(f"window must be a whole number of queries, at least 1; it is {window!r}")
    asked = tuple(queries) if isinstance(queries, Sequence) and not isinstance(queries, str) else ()
    if not asked or not all(isinstance(q, int) and not isinstance(q, bool) for q in asked):
        raise HeadpatchError(
            f"queries must be whole numbers, as in [0, -1] for the first and the last; they are {queries!r}"
        )
    layout = find_layout(root)
    part = part or layout.shape.main
    if part not in layout.shape.parts:
        raise HeadpatchError(f"the model has no part {part!r}; it has {', '.join(layout.shape.parts)}")
    chosen = select_heads(heads if isinstance(heads, Iterable) else [heads], layout.shape.parts[part])
    for layer in chosen:
        where = layout.attention[part, layer]
        problems = [NEVER_WITH[f] for f in where.features if f in NEVER_WITH]
        # Weights can be had where scores can be computed from queries and keys, and nowhere else.
        operands = ["lse" if n == "weights" else n for n in names if n != "output"]
        problems += refusals(operands, SUPPLIES, where.features)
        if problems:
            raise UnsupportedModelError(f"layer {part}.{layer} ({type(where.module).__name__}): {'; '.join(problems)}")
    seen = Observed(part, names, chosen, window, asked)
    controller = controller_of(root) or Controller(root)
    controller.refuse_while_running("observe")
    controller.observers.append(seen)
    try:
        controller.refresh()
        yield seen
    finally:
        # By identity: two observers of the same heads are equal as dictionaries.
        controller.observers = [o for o in controller.observers if o is not seen]
        controller.refresh()
