"""Keeping a LoRA adapter inside the chosen heads, while it trains.

    W' = W + s B A,    A: [r, in], B: [out, r]

Rows of W that belong to other heads stay as they are if those rows of B are zero (q, k, v); columns, if those columns of A are
(o). So the restriction is a zero pattern in an ordinary LoRA: masked once at the start, and kept by a hook that clears the
gradient of the masked entries. They are 0 and their gradient is 0, so the moments of Adam stay 0, and decoupled weight decay of 0
is 0. The hook is on the leaf: it runs before gradients are accumulated, so clipping sees what the optimiser sees.

What would get past the hook is looked for before every training forward: FSDP and DeepSpeed put other tensors in the parameters'
places and are refused by name; a copy of the model, which loses its hooks, gets them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.errors import EngineError, HeadpatchError

__all__ = ["Masked", "Restriction", "apply_masks", "check", "guard_optimizer", "restriction_of"]

ATTRIBUTE = "_headpatch_tune"


@dataclass
class Masked:
    """The masked factor of one LoRA layer: `weight` is the parameter itself, `keep` bool of its shape, `side` as in Projection."""

    layer: Any
    side: str
    keep: Tensor
    weight: nn.Parameter


class ClearGradient:
    """The hook on a leaf: the gradient is zero outside the mask, whatever it was there (infinities too)."""

    def __init__(self, keep: Tensor) -> None:
        self.clear = ~keep

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.clear.device != gradient.device:
            self.clear = self.clear.to(gradient.device)
        return gradient.masked_fill(self.clear, 0)


@dataclass
class Restriction:
    """What keeps one adapter of a PeftModel inside its heads; called before each of the model's forwards.

    Attributes
    ----------
    adapter
        Name of the PEFT adapter.
    masked
        The masked factors by module path, in the model's order.
    heads
        ``{layer: (head, ...)}``, query heads.
    facts
        What is written beside the adapter: see :mod:`headpatch.tune.files`.
    """

    adapter: str
    masked: Mapping[str, Masked]
    heads: Mapping[int, tuple[int, ...]]
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.arm()

    def factors(self) -> Iterator[tuple[str, nn.Parameter, Masked]]:
        """Module path, masked weight and mask, of every layer."""
        for path, masked in self.masked.items():
            holder = masked.layer.lora_B if masked.side == "out" else masked.layer.lora_A
            yield path, holder[self.adapter].weight, masked

    def arm(self) -> None:
        """Put the hook on every factor that is trained and has none.

        Raises
        ------
        EngineError
            FSDP or DeepSpeed holds the parameters.
        """
        for path, weight, masked in self.factors():
            _refuse_sharding(path, weight, masked)
            if weight.requires_grad and not any(
                isinstance(hook, ClearGradient) for hook in (weight._backward_hooks or {}).values()
            ):
                weight.register_hook(ClearGradient(masked.keep))

    def clear(self) -> None:
        """Set what lies outside the masks to zero."""
        with torch.no_grad():
            for _, weight, masked in self.factors():
                weight.masked_fill_(~masked.keep.to(weight.device), 0)

    def strays(self) -> dict[str, float]:
        """Largest value outside the mask, by module path; only of those that have any but zero."""
        found = {}
        for path, weight, masked in self.factors():
            outside = weight.detach()[~masked.keep.to(weight.device)]
            if outside.numel() and bool((outside != 0).any()):
                found[path] = float(outside.float().abs().max())
        return found

    def install(self, model: Any) -> None:
        """Hang it on the PeftModel whose adapter it restricts."""
        model.__dict__.setdefault(ATTRIBUTE, {})[self.adapter] = self
        model.register_forward_pre_hook(self)
        self.clear()
        self.arm()


def restriction_of(model: Any, adapter: str | None = None) -> Restriction:
    """The restriction of a PeftModel's adapter (default: the active one); HeadpatchError where it has none."""
    found: dict[str, Restriction] = getattr(model, "__dict__", {}).get(ATTRIBUTE, {})
    name = adapter or getattr(model, "active_adapter", None)
    if not isinstance(name, str) or name not in found:
        raise HeadpatchError(
            f"adapter {name!r} of this {type(model).__name__} is not restricted to heads; "
            f"known: {', '.join(found) or 'none'}. Make it with tune.lora, or tune.load"
        )
    return found[name]


def check(model: Any, adapter: str | None = None) -> None:
    """Raise HeadpatchError unless every entry of the adapter that belongs to another head is exactly zero."""
    strays = restriction_of(model, adapter).strays()
    if strays:
        path, value = max(strays.items(), key=lambda item: item[1])
        raise HeadpatchError(
            f"the adapter changes heads that were not chosen: {path} has {value:.3g} outside its mask, and {len(strays) - 1} "
            "other modules do too. Was it trained before the masks were put on, or by an optimiser that adds noise? "
            "tune.apply_masks(model) clears it"
        )


def apply_masks(model: Any, adapter: str | None = None) -> None:
    """Set every entry of the adapter that belongs to another head to zero. Not needed after ordinary optimisers."""
    restriction_of(model, adapter).clear()


def guard_optimizer(model: Any, optimizer: torch.optim.Optimizer, adapter: str | None = None) -> Any:
    """Apply the masks after every step of `optimizer`, for one that adds noise or moves what has no gradient.

    Returns
    -------
    handle
        ``remove()`` ends it.
    """
    restriction = restriction_of(model, adapter)
    return optimizer.register_step_post_hook(lambda *_: restriction.clear())


def _refuse_sharding(path: str, weight: Any, masked: Masked) -> None:
    engine = None
    if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        engine = "DeepSpeed"
    elif type(weight).__name__ == "DTensor" or hasattr(weight, "placements"):
        engine = "FSDP (fully_shard) or tensor parallelism"
    elif weight is not masked.weight:  # FSDP's own hook runs first, and shows the gathered weights of this forward
        engine = "FSDP, or another wrapper that puts its own tensors in the place of parameters,"
    if engine is not None:
        raise EngineError(
            f"{engine} holds {path}: gradients would not pass through the masks, and heads that nobody chose would be trained. "
            "Train selected heads on one device, or with DistributedDataParallel"
        )
