"""Read-only access to operands while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headpatch.adapters.huggingface.controller import NEVER_WITH, Controller, controller_of
from headpatch.adapters.huggingface.discover import find_layout
from headpatch.adapters.huggingface.operands import SUPPLIES
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.heads import select_heads
from headpatch.operands import OPERANDS, refusals
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
    "image_tokens",
    "residual_sinks",
    "first_token",
    "without_image",
)
REFUSED = ("arrays", "all_heads")


class Observed(dict[tuple[str, str], list[Tensor]]):
    """``(operand, "layer.head") -> one tensor per forward call``, detached, on the model's device.

    ``output`` is [b, q, d]; operands per head lose their head dimension (``lse``: [b, q]); ``k`` and ``v`` are those of the KV head
    that serves the query head; operands of a whole layer are under ``(operand, "layer")``.
    """

    def __init__(self, part: str, operands: tuple[str, ...], heads: dict[int, tuple[int, ...]], window: int) -> None:
        super().__init__()
        self.operands, self.heads, self.window = operands, heads, window
        self.layers = {(part, layer) for layer in heads}
        self.needs = set(operands) - {"output"}

    def __missing__(self, key: tuple[str, str]) -> list[Tensor]:
        return []

    def record(self, state: LayerState, server: OperandServer, output: Tensor) -> None:
        """Called by a patched layer after its attention, before output edits."""
        groups = state.num_heads // state.num_kv_heads
        for name in self.operands:
            if name == "output":
                value = output
            elif name == "window_scores":
                value = server.window_scores(self.window)
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
    root: nn.Module, operands: Iterable[Any], heads: Any, part: str | None = None, window: Any = 32
) -> Iterator[Observed]:
    """See :func:`headpatch.observe`."""
    names = tuple(operands)
    if not names:
        raise HeadpatchError("nothing to observe: name at least one operand, or 'output'")
    for name in names:
        if not isinstance(name, str) or (name != "output" and (name not in OPERANDS or name in REFUSED)):
            raise HeadpatchError(
                f"cannot observe {name!r}; {closest(name, ['output', *(OPERANDS.keys() - set(REFUSED))])}"
            )
        if name == "column_sinks":
            raise HeadpatchError("column_sinks depend on a threshold: observe 'column_means' and compare")
        if name == "residual_sinks":
            raise HeadpatchError("residual_sinks depend on dimensions and a threshold: observe 'layer_input'")
    names = tuple(dict.fromkeys(names))
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise HeadpatchError(f"window must be a whole number of queries, at least 1; it is {window!r}")
    layout = find_layout(root)
    part = part or layout.shape.main
    if part not in layout.shape.parts:
        raise HeadpatchError(f"the model has no part {part!r}; it has {', '.join(layout.shape.parts)}")
    chosen = select_heads(heads if isinstance(heads, Iterable) else [heads], layout.shape.parts[part])
    for layer in chosen:
        where = layout.attention[part, layer]
        problems = [NEVER_WITH[f] for f in where.features if f in NEVER_WITH]
        problems += refusals([n for n in names if n != "output"], SUPPLIES, where.features)
        if problems:
            raise UnsupportedModelError(f"layer {part}.{layer} ({type(where.module).__name__}): {'; '.join(problems)}")
    seen = Observed(part, names, chosen, window)
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
