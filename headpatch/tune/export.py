"""Edits of head outputs as weights, so that engines without headpatch serve them: a LoRA adapter, or other output projections.

    o_h -> f_h * o_h     is     W_o[:, h] -> W_o[:, h] * f_h           (columns; f_h one number or one per coordinate)
                         or     W_o + B A,  B = W_o[:, S],  A = diag(f - 1) on the columns S, nothing elsewhere: rank |S| d
    o_h -> o_h + v_h     is     a bias of the output projection:  b = sum_h W_o[:, h] v_h

The same numbers whatever the input, at every position: that is what can be folded. What depends on the input is refused.

Source: [derived] from the output being linear in head outputs; LoFiT (arXiv 2406.01563) folds its biases so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import EngineError, HeadpatchError, RecipeError
from headpatch.heads import ModelShape
from headpatch.recipe import Recipe
from headpatch.registry import find_adapter
from headpatch.resolve import ResolvedPatch, resolve
from headpatch.tensorfile import atomic_write
from headpatch.tune.adapters import _is_quantised, _task
from headpatch.tune.engine import Projection, load_peft, projections_of
from headpatch.tune.vectors import HeadVectors

__all__ = ["MAX_RANK", "Agreement", "Fold", "attach", "compare_logits", "fold", "to_lora", "to_weights"]

MAX_RANK = 512
"""Largest rank that vLLM serves."""

Vectors = dict[tuple[str, int], dict[int, Tensor]]
"""By part and layer, a float64 vector per query head: [d], or [1] for all coordinates alike."""


@dataclass(frozen=True)
class Fold:
    """A constant edit of head outputs: `factors` multiply, then `biases` are added; both as in :data:`Vectors`."""

    factors: Vectors = field(default_factory=dict)
    biases: Vectors = field(default_factory=dict)

    def then(self, other: Fold) -> Fold:
        """This edit, followed by `other`."""
        keys = self.factors.keys() | self.biases.keys() | other.factors.keys() | other.biases.keys()
        factors: Vectors = {}
        biases: Vectors = {}
        for key in keys:
            f, g, b, c = (found.get(key, {}) for found in (self.factors, other.factors, self.biases, other.biases))
            one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            if f or g:
                factors[key] = {h: f.get(h, one) * g.get(h, one) for h in sorted(f.keys() | g.keys())}
            if b or c:
                biases[key] = {
                    h: b.get(h, nothing) * g.get(h, one) + c.get(h, nothing) for h in sorted(b.keys() | c.keys())
                }
        return Fold(factors, biases)

    @property
    def num_heads(self) -> int:
        """How many heads are changed."""
        keys = self.factors.keys() | self.biases.keys()
        return sum(len(self.factors.get(key, {}).keys() | self.biases.get(key, {}).keys()) for key in keys)


@dataclass(frozen=True)
class Agreement:
    """How close an export is to what it was made from, over the logits of the same input, as log-probabilities.

    Attributes
    ----------
    difference
        Largest difference between export and original, in nats, over the tokens to which either gives a probability above 1e-6.
    effect
        Largest difference between original and untouched model there: what the edit does at all.
    same_tokens
        Share of positions whose most probable token is the same.
    """

    difference: float
    effect: float
    same_tokens: float

    def __str__(self) -> str:
        return (
            f"largest difference in log-probability {self.difference:.2g} (the edit itself changes up to {self.effect:.2g}); "
            f"same token at {self.same_tokens:.2%} of positions"
        )


def fold(source: Recipe | HeadVectors, model: Any) -> Fold:
    """The constant edit that a recipe, or learned numbers, make in a model.

    Parameters
    ----------
    source
        A recipe, or a :class:`headpatch.tune.HeadVectors`.
    model
        The model, or anything whose heads its adapter can tell (a config).

    Raises
    ------
    RecipeError
        The recipe does not fit the model, or a patch depends on the input; the message says how.
    """
    if isinstance(source, HeadVectors):
        return _of_vectors(source)
    shape: ModelShape = find_adapter(model).shape(model)
    whole = Fold()
    for patch in resolve(source, shape):
        whole = whole.then(_of_patch(patch, source))
    return whole


def _of_vectors(source: HeadVectors) -> Fold:
    found: Vectors = {}
    for layer, chosen in source.heads.items():
        rows = source.values[layer].detach().double().cpu()
        found[source.part, layer] = dict(zip(chosen, rows if source.kind == "bias" else 1 + rows, strict=True))
    return Fold(biases=found) if source.kind == "bias" else Fold(factors=found)


WHY = {
    "mass": "it moves attention between tokens, and how much depends on what each input attends to",
    "scores": "it changes attention scores, and what that does depends on each input",
    "cache": "it decides which keys and values are kept, which depends on the length and content of each input",
    "output": "it does not change all positions of all inputs alike",
}


def _of_patch(patch: ResolvedPatch, recipe: Recipe) -> Fold:
    method: Any = patch.method
    if method.family != "output" or not method.is_constant:
        raise RecipeError(
            f"{method.name} cannot become weights: {WHY[method.family]}", source=recipe.source, key=f"patches[{patch.index}]",
            remedy="serve this recipe with headpatch's vLLM plug-in, or leave the patch out of the export",
        )  # fmt: skip
    factors: Vectors = {}
    for layer, heads in patch.heads.items():
        scales = method.scales(torch.tensor(list(heads.values()), dtype=torch.float64)).double()
        changed = {
            h: s.reshape(1)
            for h, s, given in zip(heads, scales, heads.values(), strict=True)
            if given != method.identity()
        }
        if changed:
            factors[patch.part, layer] = changed
    return Fold(factors)


def to_lora(model: Any, edit: Fold, folder: str | os.PathLike[str], *, max_rank: int = MAX_RANK) -> Path:
    """Write a constant edit as an ordinary PEFT LoRA adapter; `model` is read, not changed.

    Every module gets the same rank (shorter factors are filled up with zeros), so that engines that know nothing of rank patterns
    serve it. Numbers are float32 whatever the model's dtype: a head that is ablated cancels no better than they are rounded.

    Parameters
    ----------
    model
        The model whose output projections are read.
    edit
        From :func:`fold`.
    folder
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    max_rank
        What the engine that is to serve it takes.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    HeadpatchError
        Biases, which no LoRA holds; a rank above `max_rank`; nothing to export.
    EngineError
        A quantised output projection.
    """
    import safetensors.torch

    peft = load_peft()

    if any(edit.biases.values()):
        raise HeadpatchError("learned biases are no matrix: a LoRA adapter cannot hold them; export them as weights")
    if not edit.factors:
        raise HeadpatchError("nothing to export: every strength is at its identity")
    pairs = {}
    transposed = False
    for key, factors in edit.factors.items():
        projection, weight = _output(model, *key)
        a, b = _factorise(weight, projection, factors)
        if a.shape[0] > max_rank:
            heads, wide = len(factors), len(projection.heads["o"][0])
            raise HeadpatchError(
                f"layer {key[1]} needs a LoRA of rank {a.shape[0]}: {heads} heads of {wide} coordinates; the limit is {max_rank}. "
                "Export the recipe as weights, or edit fewer heads of a layer"
            )
        pairs[projection.path] = a, b
        transposed |= projection.transposed
    rank = max(a.shape[0] for a, _ in pairs.values())
    tensors = {}
    for path, (a, b) in pairs.items():
        missing = rank - a.shape[0]
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).float().contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).float().contiguous()
    shape = find_adapter(model).shape(model)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(pairs), bias="none", fan_in_fan_out=transposed, inference_mode=True,
        base_model_name_or_path=shape.name, task_type=_task(model),
    )  # fmt: skip
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(target))
    with atomic_write(target / "adapter_model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    return target


def attach(model: Any, folder: str | os.PathLike[str]) -> Any:
    """Put an adapter on a model with plain PEFT, headpatch having no part in it; the PeftModel, in eval mode."""
    peft = load_peft()
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def to_weights(model: Any, edit: Fold) -> None:
    """Fold a constant edit into the output projections of `model`, in place; ``model.save_pretrained`` then writes a checkpoint.

    Raises
    ------
    HeadpatchError
        Nothing to export.
    EngineError
        A quantised projection, one that several layers share, or biases in an architecture that has none; nothing is changed.
    """
    keys = sorted(edit.factors.keys() | edit.biases.keys())
    if not keys:
        raise HeadpatchError("nothing to export: every strength is at its identity")
    places = {key: _output(model, *key) for key in keys}
    shared = _shared_weights(model)
    for projection, _ in places.values():
        if projection.path in shared:
            raise EngineError(
                f"{projection.path} shares its weights with another module, which the edit would reach, too"
            )
    paths = [places[key][0].path for key in edit.biases]
    if paths:
        engine: Any = find_adapter(model)
        engine.add_output_biases(model, paths)
    with torch.no_grad():
        for key, (projection, weight) in places.items():
            module: Any = _inner(model).get_submodule(projection.path)
            for head, vector in edit.biases.get(key, {}).items():
                columns = weight[:, _at(projection.heads["o"][head])].double()
                module.bias += (columns @ vector.to(columns.device).expand(columns.shape[1])).to(module.bias.dtype)
            for head, factor in edit.factors.get(key, {}).items():
                at = _at(projection.heads["o"][head])
                weight[:, at] = (weight[:, at].double() * factor.to(weight.device)).to(weight.dtype)


def compare_logits(untouched: Tensor, original: Tensor, exported: Tensor) -> Agreement:
    """Compare logits [..., vocabulary] of the same input: without the edit, with it, and with its export."""
    base, wanted, got = (logits.double().log_softmax(-1) for logits in (untouched, original, exported))
    likely = torch.maximum(wanted, got) > torch.log(torch.tensor(1e-6, dtype=torch.float64))
    return Agreement(
        difference=float((wanted - got).abs()[likely].max()),
        effect=float((wanted - base).abs()[likely].max()),
        same_tokens=float((wanted.argmax(-1) == got.argmax(-1)).double().mean()),
    )


def _factorise(weight: Tensor, projection: Projection, factors: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """A [rank, H d] and B [D, rank] with B A = the change of the weight [D, H d], of the smaller of two ranks."""
    wide = weight.shape[1]
    change = torch.zeros(wide, dtype=torch.float64)
    for head, factor in factors.items():
        change[_at(projection.heads["o"][head])] = (factor - 1).cpu()
    columns = change.nonzero().flatten()
    dense = weight.detach().double().cpu()
    if len(columns) > dense.shape[0]:
        return dense * change, torch.eye(dense.shape[0], dtype=torch.float64)
    a = torch.zeros(max(len(columns), 1), wide, dtype=torch.float64)
    a[torch.arange(len(columns)), columns] = change[columns]
    return a, dense[:, columns] if len(columns) else torch.zeros(dense.shape[0], 1, dtype=torch.float64)


def _at(span: range) -> slice:
    return slice(span.start, span.stop)


def _inner(model: Any) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


def _output(model: Any, part: str, layer: int) -> tuple[Projection, Tensor]:
    """The output projection of a layer, and its weight as [D, H d] (a view)."""
    sites = projections_of(model, part)
    if layer not in sites:
        raise EngineError(
            f"layer {layer} does not use transformers' attention interface; its weights cannot be told apart"
        )
    projection = sites[layer].playing("o")
    module: Any = _inner(model).get_submodule(projection.path)
    if hasattr(module, "get_base_layer"):
        raise EngineError(f"{projection.path} carries an adapter; merge it first, or give the model without it")
    if _is_quantised(module):
        raise EngineError(f"{projection.path} is quantised: load the model in bfloat16 or float32 to export from it")
    return projection, module.weight.t() if projection.transposed else module.weight


def _shared_weights(model: Any) -> set[str]:
    """Modules whose weight is another module's, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in _inner(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for found in names.values() if len(set(found)) > 1 for name in found}
