"""Running a causal language model from a chosen layer on, so that what lies below the first edited layer is computed once.

Nothing of the model is reimplemented: its own forward runs, and layers that are skipped return the hidden states that are known
already. Masks, positions, the last norm and the output projection are the model's; so are the hooks around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.discover import Layout

__all__ = ["Skipper"]


class _Enough(Exception):  # noqa: N818  (it ends a forward pass on purpose)
    """The layer that was waited for has been reached."""


class _Known:
    """Stands for the forward of a layer whose output is known."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Skipper:
    """The decoder layers of one model as a chain that can be entered anywhere.

    Parameters
    ----------
    root
        The model.
    layout
        Its attention layers.
    ids
        [b, q] token ids to try it on: entered in the middle, the model must give bit-equal logits.

    Attributes
    ----------
    problem
        Why the chain cannot be entered in the middle; empty where it can. Then whole forwards are the only way.
    """

    def __init__(self, root: Any, layout: Layout, ids: Tensor) -> None:
        self.root = root
        self.layers: list[nn.Module] = []
        self.tails: list[tuple[Any, ...] | None] = []
        self.problem = self._find(layout) or self._try(ids)

    def forward(self, ids: Tensor, layer: int = 0, hidden: Tensor | None = None) -> Any:
        """The model's output; `hidden` [b, q, D] is what enters `layer`, if that is not the first."""
        with self._skipping(layer, hidden):
            return self.root(input_ids=ids, use_cache=False, return_dict=True)

    def enter(self, ids: Tensor, start: int, hidden: Tensor | None, layer: int) -> Tensor:
        """Hidden states [b, q, D] that enter `layer`, computed from those that enter `start`."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_stream(args, kwargs))
            raise _Enough

        hook = self.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with contextlib.suppress(_Enough):
                self.forward(ids, start, hidden)
        finally:
            hook.remove()
        return seen[0]

    @contextlib.contextmanager
    def _skipping(self, layer: int, hidden: Tensor | None) -> Iterator[None]:
        skipped = [m.__dict__ for m in self.layers[:layer]]
        before = [d.get("forward") for d in skipped]
        try:
            for d, tail in zip(skipped, self.tails, strict=False):
                d["forward"] = _Known(hidden if tail is None else (hidden, *tail))
            yield
        finally:
            for d, old in zip(skipped, before, strict=True):
                d.pop("forward", None)
                if old is not None:
                    d["forward"] = old

    def _find(self, layout: Layout) -> str:
        """The list of layers that the main part's attention modules are in."""
        main = layout.shape.main
        holders = {}
        for (part, _), where in layout.attention.items():
            path = where.path.split(".")
            numbers = [i for i, name in enumerate(path) if name.isdigit()]
            if part == main and numbers:
                holders[".".join(path[: numbers[0]])] = where
        if len(holders) != 1:
            return "its attention layers are not in one list of layers"
        holder = next(iter(holders))
        self.layers = list(self.root.get_submodule(holder).children())
        if len(self.layers) != layout.shape.parts[main].num_layers:
            return f"{holder} holds more than its layers"
        return ""

    def _try(self, ids: Tensor) -> str:
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Any] = {}
        order: list[int] = []

        def entering(index: int) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs[index] = _stream(args, kwargs)
                order.append(index)

            return note

        def leaving(index: int) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                outputs[index] = output

            return note

        hooks = [m.register_forward_pre_hook(entering(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        hooks += [m.register_forward_hook(leaving(i)) for i, m in enumerate(self.layers)]
        try:
            whole = self.forward(ids).logits
        finally:
            for hook in hooks:
                hook.remove()
        if order != list(range(len(self.layers))):
            return "its layers do not run once each, in order"
        for index, output in outputs.items():
            head = output[0] if isinstance(output, tuple) else output
            if not isinstance(head, Tensor) or (index + 1 in inputs and inputs[index + 1] is not head):
                return f"layer {index + 1} is not entered by what leaves layer {index}"
            tail = output[1:] if isinstance(output, tuple) else None
            if tail and any(t is not None for t in tail):
                return f"layer {index} gives more than hidden states"
            self.tails.append(tail)
        # Whatever else passes between layers (shared keys and values, say) would be missed here; what a module may have kept from the
        # call above is overwritten first.
        self.forward(ids.roll(1, 1))
        for layer in sorted({len(self.layers) // 2, len(self.layers) - 1} - {0}):
            if not torch.equal(self.forward(ids, layer, inputs[layer]).logits, whole):
                return f"entered at layer {layer}, it gives other logits"
        return ""


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")
