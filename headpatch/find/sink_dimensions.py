"""Which dimensions of the residual stream mark a model's sinks, for methods that find sinks by them.

Tokens that collect attention without content have, in trained language models, an abnormally large activation in a few fixed
dimensions. With x a layer's input at a token, [D], and phi_d = |x_d| / rms(x):

    candidates: dimensions with phi_d >= tau at the first token in most (prompt, layer) pairs
    kept:       those of them that reach tau at some later token, in some layer, in enough of the prompts

tau is 0.3125 sqrt(D), which is the published 20 at D = 4096 (phi cannot exceed sqrt(D)). A model shows such dimensions or it does
not: where none is kept, or where the tokens that they mark draw no more attention than others, this raises and names the reason,
for a method that goes by them would edit arbitrary tokens.

Source: the sink score is that of Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv
2503.03321, which lists dimensions for some models. The procedure is our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.api import observe
from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SinkDimensions", "sink_dimensions"]


@dataclass(frozen=True)
class SinkDimensions:
    """What :func:`sink_dimensions` found.

    Attributes
    ----------
    dimensions
        Ascending, as ``sink_dimensions`` of a recipe.
    threshold
        tau, as ``sink_threshold`` of a recipe.
    width
        D.
    lift
        Mean attention to the tokens that they mark, over what an even spread would give them.
    """

    dimensions: tuple[int, ...]
    threshold: float
    width: int
    lift: float


def sink_dimensions(
    model: Any, prompts: Iterable[Sequence[int] | Mapping[str, Tensor]], *, layers: str = "*", threshold: float | None = None,
    share_first: float = 0.9, share_later: float = 0.5, least_lift: float = 3.0, part: str | None = None,
) -> SinkDimensions:  # fmt: skip
    """Find them by running prompts; nothing about the model is changed.

    Parameters
    ----------
    model
        A model that :func:`headpatch.observe` takes, called with ``input_ids``.
    prompts
        Some fifty; token ids, with the punctuation and newlines that natural text has; or what the model is called with, as tensors
        of one row, for prompts with images.
    layers
        Layers as in a selector: sinks form after the first few and vanish in the last, so ``"3-29"`` of 32.
    threshold
        tau; default 0.3125 sqrt(D).
    share_first, share_later
        In which share of (prompt, layer) pairs the first token must be extreme, and in which share of prompts a later token.
    least_lift
        How many times an even share the marked tokens must receive.

    Raises
    ------
    HeadpatchError
        The model shows none, for the reason given; or there are no prompts.
    """
    import torch

    options: dict[str, Any] = {} if part is None else {"part": part}
    first: list[Tensor] = []  # [layers, D] per prompt: which dimensions are extreme at the first token
    later: list[Tensor] = []  # [D] per prompt: at some later token of some layer
    streams: list[tuple[list[Tensor], list[Tensor]]] = []
    bound, width = threshold, 0
    for prompt in prompts:
        device = next(model.parameters()).device
        given = prompt if isinstance(prompt, Mapping) else {"input_ids": torch.tensor([list(prompt)], device=device)}
        with torch.no_grad(), observe(model, ("layer_input", "column_means"), f"{layers}.*", **options) as seen:
            model(**given)
        names = sorted({key[1] for key in seen if key[0] == "layer_input"}, key=int)
        phi = []
        for name in names:
            x = seen["layer_input", name][0][0].float().cpu()
            phi.append(x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        width = phi[0].shape[-1]
        bound = 0.3125 * math.sqrt(width) if bound is None else bound
        extreme = torch.stack(phi) >= bound  # [layers, n, D]
        first.append(extreme[:, 0])
        later.append(extreme[:, 1:].any(1).any(0))
        means = []
        for name in names:
            heads = [v[0][0] for (op, h), v in seen.items() if op == "column_means" and h.split(".")[0] == name]
            means.append(torch.stack(heads).float().mean(0).cpu())
        streams.append((phi, means))
    if not first or bound is None:
        raise HeadpatchError("no prompts were given")
    candidates = torch.cat(first).double().mean(0) >= share_first
    kept = candidates & (torch.stack(later).double().mean(0) >= share_later)
    dims = tuple(kept.nonzero().flatten().tolist())
    words = f"(threshold {bound:.3g}, {len(first)} prompts)"
    if not dims:
        reason = "extreme at the first token" if not candidates.any() else "extreme at any later token"
        raise HeadpatchError(f"this model shows no sink dimensions: none is {reason} {words}")
    lift = _lift(streams, dims, bound)
    if not lift >= least_lift:
        raise HeadpatchError(
            f"this model shows no sink dimensions: tokens extreme in {', '.join(map(str, dims))} receive {lift:.2g} times an even "
            f"share of attention, less than {least_lift:g} {words}"
        )
    return SinkDimensions(dims, bound, width, lift)


def _lift(streams: Sequence[tuple[list[Tensor], list[Tensor]]], dims: tuple[int, ...], bound: float) -> float:
    """Attention to marked later tokens over an even share: of key k, the mean of 1 / (i + 1) over the queries i >= k."""
    import torch

    ratios = []
    for phi, means in streams:
        n = phi[0].shape[0]
        inverse = 1 / torch.arange(1, n + 1, dtype=torch.float64)
        even = inverse.flip(0).cumsum(0).flip(0) / torch.arange(n, 0, -1)
        for x, received in zip(phi, means, strict=True):
            marked = (x[:, list(dims)] >= bound).any(-1)
            marked[0] = False  # the first token is a sink in any case
            ratios.append((received.double() / even)[marked])
    found = torch.cat(ratios)
    return float(found.mean()) if len(found) else 0.0
