"""Trainable numbers on head outputs: a factor per head, a factor per coordinate, or a bias per coordinate.

    z: [..., H, d] head outputs before the output projection, at every position

    scale    z_h <- (1 + a_h) z_h       one number per head; becomes a recipe of head_scaling
    gain     z_h <- (1 + A_h) * z_h     A_h: [d]; LoFiT selects heads by its norm
    bias     z_h <- z_h + v_h           v_h: [d]; LoFiT tunes with it

The numbers act through a hook before the output projection, while the model's own weights are frozen; heads that were not chosen
are multiplied by exactly one, or have exactly zero added. What was learned can leave as weights: :mod:`headpatch.tune.export`.

Source: Yin, Ye and Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563,
github.com/fc2869/lo-fit.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from headpatch.errors import HeadpatchError
from headpatch.recipe import Recipe
from headpatch.registry import find_adapter
from headpatch.tune.engine import Projection, projections_of
from headpatch.tune.which import chosen_heads

__all__ = ["KINDS", "HeadVectors"]

KINDS = ("scale", "gain", "bias")


class HeadVectors:
    """Trainable numbers on the outputs of chosen heads of one model, until :meth:`remove`; usable in a with block.

    Parameters
    ----------
    model
        A transformers model. Its parameters are frozen; :meth:`remove` unfreezes those that were not.
    heads, part, top
        As in :func:`headpatch.tune.which.chosen_heads`. Default: all heads.
    kind
        One of :data:`KINDS`.
    std
        Standard deviation of the start; LoFiT's is 1e-3, and 0 starts at the untouched model.
    seed
        Of the start.

    Attributes
    ----------
    heads
        ``{layer: (head, ...)}``.
    values
        ``{layer: parameter}``, [n, 1] for a scale and [n, d] otherwise, float32, rows in the order of `heads`.

    Raises
    ------
    RecipeError
        A head that the model does not have.
    UnsupportedModelError
        A layout that headpatch does not know.
    """

    def __init__(
        self, model: Any, heads: Any = "*.*", *, kind: str = "gain", std: float = 1e-3, seed: int = 0, part: str | None = None,
        top: int | None = None,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise HeadpatchError(f"kind is {kind!r}; choose {', '.join(KINDS)}")
        self.kind = kind
        self.shape = find_adapter(model).shape(model)
        self.part = part or self.shape.main
        self.heads: Mapping[int, tuple[int, ...]] = chosen_heads(heads, self.shape, part, top)
        sites = projections_of(model, part)
        absent = [layer for layer in self.heads if layer not in sites]
        if absent:
            raise HeadpatchError(
                f"layer {absent[0]} does not use transformers' attention interface; its heads cannot be reached"
            )
        self.projections: dict[int, Projection] = {layer: sites[layer].playing("o") for layer in self.heads}
        random = torch.Generator().manual_seed(seed)
        self.values: dict[int, nn.Parameter] = {}
        self._hooks: list[Any] = []
        self._seen: dict[int, tuple[Tensor, int]] | None = None
        self._unfrozen = [p for p in model.parameters() if p.requires_grad]
        for p in self._unfrozen:
            p.requires_grad_(False)
        inner = getattr(model, "get_base_model", lambda: model)()
        for layer, chosen in self.heads.items():
            projection = self.projections[layer]
            module: Any = inner.get_submodule(projection.path)
            width = 1 if kind == "scale" else len(projection.heads["o"][0])
            start = torch.randn(len(chosen), width, generator=random) * std
            device = next(p.device for p in module.parameters())
            self.values[layer] = nn.Parameter(start.to(device))
            self._hooks.append(module.register_forward_pre_hook(_Edit(self, layer)))

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser is given."""
        return list(self.values.values())

    def penalty(self) -> Tensor:
        """Sum of absolute values: LoFiT's L1 term while it selects."""
        return torch.stack([value.abs().sum() for value in self.values.values()]).sum()

    def scores(self, sizes: Mapping[int, Tensor] | None = None) -> dict[str, float]:
        """L2 norm of each head's numbers by ``layer.head``: a ranking that ``heads=`` takes, with ``top=``.

        It can favour heads whose outputs are small, where a large factor costs nothing: with `sizes`, from :meth:`sizes`, the numbers
        are multiplied by them first.
        """
        with torch.no_grad():
            found: dict[str, float] = {}
            for layer, chosen in self.heads.items():
                rows = self.values[layer] * (1 if sizes is None else sizes[layer].to(self.values[layer].device))
                found |= {f"{layer}.{head}": float(row.norm()) for head, row in zip(chosen, rows, strict=True)}
            return found

    def sizes(self, run: Callable[[], object]) -> dict[int, Tensor]:
        """Mean absolute outputs of the heads before they are edited, [n, d] float32 by layer, over what `run` has the model read."""
        self._seen = {}
        try:
            with torch.no_grad():
                run()
            return {layer: total / count for layer, (total, count) in self._seen.items()}
        finally:
            self._seen = None

    def remove(self) -> None:
        """Take the numbers off the model, which is as it was; they stay readable here. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._unfrozen:
            self._unfrozen.pop().requires_grad_(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: types.TracebackType | None
    ) -> None:
        self.remove()

    def to_recipe(
        self, name: str | None = None, description: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> Recipe:  # fmt: skip
        """A learned scale as a recipe, which any engine of headpatch's applies without this class.

        Parameters
        ----------
        name, description, provenance
            Of the recipe: the data's hash, seed, steps and losses belong into its provenance.

        Raises
        ------
        HeadpatchError
            Gains and biases are vectors; no method of recipes takes them. :mod:`headpatch.tune.export` makes weights of them.
        """
        if self.kind != "scale":
            raise HeadpatchError(
                f"a {self.kind} is a vector per head, and recipes hold numbers: export it as weights instead"
            )
        heads = {
            f"{layer}.{head}": 1.0 + float(row)
            for layer, chosen in self.heads.items()
            for head, row in zip(chosen, self.values[layer].detach(), strict=True)
        }
        patch: dict[str, Any] = {"method": "head_scaling", "heads": heads}
        data: dict[str, Any] = {"headpatch": 1}
        data |= {
            key: text
            for key, text in (("name", name), ("description", description), ("provenance", provenance))
            if text
        }
        if self.part == self.shape.main:
            data["model"] = self.shape.to_block(self.shape.name)  # the block describes the main part
        else:
            patch["part"] = self.part
        return Recipe.from_dict({**data, "patches": [patch]})

    def state_dict(self) -> dict[str, Tensor]:
        """The numbers by layer, as float32 tensors on the CPU: what :meth:`load_state_dict` takes, and safetensors saves."""
        return {str(layer): value.detach().cpu().clone() for layer, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the numbers; HeadpatchError where they are of other heads."""
        if {key: tuple(value.shape) for key, value in state.items()} != {
            str(layer): tuple(value.shape) for layer, value in self.values.items()
        }:
            raise HeadpatchError("these numbers belong to other heads, or to another kind")
        with torch.no_grad():
            for layer, value in self.values.items():
                value.copy_(state[str(layer)])


class _Edit:
    """The hook before one output projection."""

    def __init__(self, vectors: HeadVectors, layer: int) -> None:
        self.vectors, self.layer = vectors, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given: Tensor = args[0]
        mine, value = self.vectors, self.vectors.values[self.layer]
        spans = mine.projections[self.layer].heads["o"]
        index = torch.tensor(mine.heads[self.layer], device=value.device)
        if mine._seen is not None:
            mine._seen[self.layer] = self._add(mine._seen.get(self.layer), given, index)
        wide = value.to(given.device).expand(-1, len(spans[0]))
        base = (torch.zeros if mine.kind == "bias" else torch.ones)(len(spans), len(spans[0]), device=given.device)
        full = base.index_copy(0, index.to(given.device), wide if mine.kind == "bias" else 1 + wide).flatten()
        full = full.to(torch.promote_types(full.dtype, given.dtype))
        edited = given + full if mine.kind == "bias" else given * full
        return (edited.to(given.dtype), *args[1:])

    def _add(self, before: tuple[Tensor, int] | None, given: Tensor, index: Tensor) -> tuple[Tensor, int]:
        """The sum of absolute outputs of the chosen heads [n, d], and of how many positions."""
        spans = self.vectors.projections[self.layer].heads["o"]
        z = (
            given.detach()
            .float()
            .flatten(0, -2)
            .unflatten(-1, (len(spans), -1))
            .index_select(1, index.to(given.device))
        )
        total, count = z.abs().sum(0).cpu(), len(z)
        return (total, count) if before is None else (before[0] + total, before[1] + count)
