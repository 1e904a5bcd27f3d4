"""LoRA on chosen heads: stock PEFT layers with a zero pattern, saved as an ordinary adapter.

    shared (default)   one pair of factors per module serves all chosen heads of the layer: rank r
    per head           each chosen head has factors of its own, stacked: rank r times the heads, B (q, k, v) or A (o) in blocks

Rows of q, k and v projections, and columns of the output projection, belong to heads; k and v belong to KV heads, each shared by
H / K query heads. Biases stay as they are. Why the pattern holds in training: :mod:`headpatch.tune.guard`.

Source: LoRA, Hu et al., arXiv 2106.09685, as in PEFT; tuning only the heads that matter, Zhang et al., "Interpreting and Improving
Large Language Models in Arithmetic Calculation", arXiv 2409.01659 (no code was released). Where this differs from that paper: it
trains the slices themselves with gradients scaled by H / h, which an optimiser of Adam's kind divides out again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.errors import EngineError, HeadpatchError
from headpatch.heads import ModelShape, kv_head_of, query_heads_of, to_selectors
from headpatch.registry import find_adapter
from headpatch.tune.engine import ROLES, AttentionSites, Projection, load_peft, projections_of
from headpatch.tune.guard import Masked, Restriction, check, restriction_of
from headpatch.tune.which import chosen_heads

__all__ = ["KV_POLICIES", "TuneReport", "lora", "merge", "report"]

KV_POLICIES = ("none", "group_if_all", "group")
"""What to do with k and v, which a KV head's query heads share: leave them; train them where every query head of the KV head is
chosen; or train them wherever one is, which changes the others, too (the report lists them)."""
PASSED_ON = {
    "lora_dropout", "use_rslora", "task_type", "init_lora_weights", "autocast_adapter_dtype", "low_cpu_mem_usage", "revision"
}  # fmt: skip


@dataclass(frozen=True)
class TuneReport:
    """What an adapter trains.

    Attributes
    ----------
    heads
        ``{layer: (head, ...)}``, the chosen query heads.
    kv_heads
        KV heads whose k and v rows are trained, by layer; empty under ``kv="none"``.
    also_touched
        Query heads that nobody chose and that share one of those KV heads.
    trainable, stored
        Numbers of the adapter that can become other than zero, and all that its file holds.
    """

    heads: Mapping[int, tuple[int, ...]]
    kv_heads: Mapping[int, tuple[int, ...]]
    also_touched: Mapping[int, tuple[int, ...]]
    trainable: int
    stored: int

    def __str__(self) -> str:
        def count(found: Mapping[int, tuple[int, ...]]) -> str:
            return f"{sum(map(len, found.values()))} in {len(found)} layers"

        lines = [
            f"query heads: {count(self.heads)}",
            f"trainable numbers: {self.trainable:,} of {self.stored:,} stored",
        ]
        if self.kv_heads:
            lines.insert(1, f"KV heads: {count(self.kv_heads)}")
        if self.also_touched:
            extra = ", ".join(f"{layer}.{head}" for layer, heads in self.also_touched.items() for head in heads)
            lines.append(f"also changed, because they share a KV head: {extra}")
        return "\n".join(lines)


def lora(
    model: Any, heads: Any, *, r: int = 8, lora_alpha: float | None = None, roles: Sequence[str] = ("q", "o"), kv: str = "none",
    per_head: bool = False, part: str | None = None, top: int | None = None, adapter_name: str = "default", **options: Any,
) -> Any:  # fmt: skip
    """Put a LoRA adapter on the slices of chosen heads, ready to be trained by anything that trains a PeftModel.

    Parameters
    ----------
    model
        A transformers model, quantised by bitsandbytes or not. Its weights are frozen.
    heads, part, top
        As in :func:`headpatch.tune.which.chosen_heads`: a selector, a list, a recipe, or a ranking with `top`.
    r
        Rank; with `per_head`, of each head.
    lora_alpha
        Strength is ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora=True``). Default: `r`.
    roles
        Which of ``q`` (where the head looks) and ``o`` (what it writes) are trained.
    kv
        One of :data:`KV_POLICIES`.
    per_head
        Give each head factors of its own.
    options
        Passed to ``peft.LoraConfig`` or ``peft.get_peft_model``: lora_dropout, use_rslora, task_type, init_lora_weights (True or
        "gaussian"), autocast_adapter_dtype, low_cpu_mem_usage, revision. Others could reach beyond the heads and are refused.

    Returns
    -------
    peft.PeftModel
        Its file format is PEFT's own. :func:`report` says what it trains, :func:`headpatch.tune.save` writes it.

    Raises
    ------
    RecipeError
        A head that the model does not have.
    UnsupportedModelError
        A layout that headpatch does not know.
    HeadpatchError
        An option that cannot be kept to single heads, DoRA among them; a model that already has an adapter.
    """
    peft = load_peft()
    _check_options(r, roles, kv, options)
    if isinstance(model, peft.PeftModel):
        raise HeadpatchError(
            "this model already has adapters; give the model itself (merge_and_unload() or unload() gives it)"
        )
    engine = find_adapter(model)
    shape = engine.shape(model)
    chosen = chosen_heads(heads, shape, part, top)
    plan = _plan(projections_of(model, part), chosen, roles, kv)
    ranks = {path: r * len(blocks) if per_head else r for path, (_, blocks) in plan.items()}
    alpha: Any = r if lora_alpha is None else lora_alpha  # PEFT calls it an int, and takes any number
    # What scales an update is alpha / rank, or alpha / sqrt(rank): with ranks that differ, alpha follows, so that it stays.
    grow = math.sqrt if options.get("use_rslora") else float
    config_options = {k: v for k, v in options.items() if k not in ("autocast_adapter_dtype", "low_cpu_mem_usage")}
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=list(plan), bias="none",
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={path: alpha * grow(rank / r) for path, rank in ranks.items() if rank != r},
        fan_in_fan_out=any(_is_transposed(model, path) for path in plan),
        **{"task_type": _task(model), **config_options},
    )  # fmt: skip
    more = {k: v for k, v in options.items() if k in ("autocast_adapter_dtype", "low_cpu_mem_usage")}
    wrapped = peft.get_peft_model(model, config, adapter_name=adapter_name, **more)
    masked = _masks(wrapped, plan, r if per_head else None, adapter_name)
    facts = _facts(shape, part or shape.main, chosen, r, roles, kv, per_head)
    Restriction(adapter_name, masked, chosen, facts).install(wrapped)
    if options.get("init_lora_weights", True) is True:
        _redraw(wrapped, adapter_name)
    return wrapped


def report(model: Any, adapter: str | None = None) -> TuneReport:
    """What an adapter made by :func:`lora` trains."""
    restriction = restriction_of(model, adapter)
    facts, shared = restriction.facts, {}
    stack = {k: facts["model"][k] for k in ("num_heads", "num_kv_heads")}
    kv_heads = {int(layer): tuple(groups) for layer, groups in facts["kv_heads"].items()}
    for layer, groups in kv_heads.items():
        reached = {
            q for g in groups for q in query_heads_of(g, stack["num_heads"][layer], stack["num_kv_heads"][layer])
        }
        if extra := reached - set(restriction.heads[layer]):
            shared[layer] = tuple(sorted(extra))
    trainable = stored = 0
    for _, weight, masked in restriction.factors():
        other = (masked.layer.lora_A if masked.side == "out" else masked.layer.lora_B)[restriction.adapter].weight
        trainable += int(masked.keep.sum()) + other.numel()
        stored += weight.numel() + other.numel()
    return TuneReport(restriction.heads, kv_heads, shared, trainable, stored)


def merge(model: Any, adapter: str | None = None) -> Any:
    """Fold an adapter made by :func:`lora` into the weights; other heads' slices stay bit for bit as they were.

    Returns
    -------
    model
        The transformers model, without PEFT.

    Raises
    ------
    EngineError
        The base is quantised: merging would round every block of weights again, other heads' among them.
    HeadpatchError
        The adapter reaches beyond its heads.
    """
    restriction = restriction_of(model, adapter)
    check(model, adapter)
    for path, masked in restriction.masked.items():
        if _is_quantised(masked.layer.get_base_layer()):
            raise EngineError(
                f"{path} is quantised: merging rounds whole blocks of weights again, those of other heads among them, so the edit "
                "would not stay in the chosen heads. tune.save() the adapter, load the base model in bfloat16 or float32, "
                "tune.load() the adapter onto it, and merge there"
            )
    return model.merge_and_unload(adapter_names=[restriction.adapter])


# --- which coordinates, and their masks ---------------------------------------------------------------------------------------

Plan = dict[str, tuple[Projection, list[range]]]
"""By module path: the projection, and the coordinates of each block that is trained, one block per head and role."""


def _plan(
    sites: Mapping[int, AttentionSites], chosen: Mapping[int, tuple[int, ...]], roles: Iterable[str], kv: str
) -> Plan:
    plan: Plan = {}
    for layer, heads in chosen.items():
        if layer not in sites:
            raise EngineError(
                f"layer {layer} does not use transformers' attention interface; its heads cannot be told apart"
            )
        here = sites[layer]
        wanted = [(role, head) for role in ROLES if role in roles for head in heads]
        wanted += [
            (role, group) for role in ("k", "v") for group in _groups(heads, here.num_heads, here.num_kv_heads, kv)
        ]
        for role, head in wanted:
            projection = here.playing(role)
            plan.setdefault(projection.path, (projection, []))[1].append(projection.heads[role][head])
    if not plan:
        raise HeadpatchError('nothing would be trained: no role is named, and kv="group_if_all" found no whole group')
    return plan


def _groups(heads: Sequence[int], num_heads: int, num_kv_heads: int, kv: str) -> list[int]:
    """KV heads that the policy trains along with these query heads."""
    if kv == "none":
        return []
    touched = sorted({kv_head_of(head, num_heads, num_kv_heads) for head in heads})
    if kv == "group":
        return touched
    return [g for g in touched if set(query_heads_of(g, num_heads, num_kv_heads)) <= set(heads)]


def _masks(model: Any, plan: Plan, per_head: int | None, adapter: str) -> dict[str, Masked]:
    masked = {}
    for path, (projection, blocks) in plan.items():
        layer = model.base_model.model.get_submodule(path)
        weight = (layer.lora_B if projection.side == "out" else layer.lora_A)[adapter].weight
        keep = torch.zeros(weight.shape, dtype=torch.bool)
        view = keep if projection.side == "out" else keep.t()
        for i, block in enumerate(blocks):
            view[
                block.start : block.stop, slice(None) if per_head is None else slice(i * per_head, (i + 1) * per_head)
            ] = True
        masked[path] = Masked(layer, projection.side, keep.to(weight.device), weight)
    return masked


def _redraw(model: Any, adapter: str) -> None:
    """Draw the kept columns of A anew: each row of it reads fewer inputs than PEFT drew it for, and would start out too small."""
    for _, weight, masked in restriction_of(model, adapter).factors():
        if masked.side == "in":
            inputs = masked.keep.sum(1, keepdim=True)  # [rank, 1]
            with torch.no_grad():
                drawn = (torch.rand_like(weight, dtype=torch.float32) * 2 - 1) / inputs.clamp_min(1).sqrt()
                weight.copy_(torch.where(masked.keep, drawn, 0))


# --- options and facts --------------------------------------------------------------------------------------------------------


def _check_options(r: int, roles: Sequence[str], kv: str, options: Mapping[str, Any]) -> None:
    if type(r) is not int or r < 1:
        raise HeadpatchError(f"r is {r!r}; a rank is a whole number from 1")
    unknown = sorted(set(roles) - {"q", "o"})
    if isinstance(roles, str) or unknown:
        raise HeadpatchError(f"roles are {roles!r}; name q, o or both in a list; kv= decides about k and v")
    if kv not in KV_POLICIES:
        raise HeadpatchError(f"kv is {kv!r}; choose {', '.join(KV_POLICIES)}")
    if options.get("use_dora"):
        raise HeadpatchError(
            "DoRA cannot be kept to single heads: it rescales each row of a weight by the row's norm, and a row of the output "
            "projection spans all heads; in q, k and v, weight decay would move the magnitudes of heads that were not chosen"
        )
    init = options.get("init_lora_weights", True)
    if init is not True and init != "gaussian":
        raise HeadpatchError(
            f"init_lora_weights is {init!r}; choose True or 'gaussian': others start B away from zero or rewrite the base's weights"
        )
    refused = sorted(options.keys() - PASSED_ON - {"use_dora"})
    if refused:
        raise HeadpatchError(
            f"tune.lora takes no {refused[0]}=: it could reach beyond the chosen heads; options: {', '.join(sorted(PASSED_ON))}"
        )


def _facts(
    shape: ModelShape,
    part: str,
    chosen: Mapping[int, tuple[int, ...]],
    r: int,
    roles: Sequence[str],
    kv: str,
    per_head: bool,
) -> dict[str, Any]:
    stack = shape.parts[part]
    selectors = to_selectors({layer: dict.fromkeys(heads) for layer, heads in chosen.items()}, stack)
    groups = {
        layer: _groups(heads, stack.num_heads[layer], stack.num_kv_heads[layer], kv) for layer, heads in chosen.items()
    }
    return {
        "headpatch": 1, "kind": "lora", "part": part, "heads": list(selectors), "roles": list(roles), "kv": kv,
        "per_head": per_head, "r": r, "kv_heads": {str(layer): found for layer, found in groups.items() if found},
        "model": {
            "name": shape.name, "model_type": shape.model_type, "num_heads": list(stack.num_heads),
            "num_kv_heads": list(stack.num_kv_heads), "head_dim": list(stack.head_dim),
        },
    }  # fmt: skip


def _task(model: Any) -> str | None:
    name = type(model).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _is_transposed(model: nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).__name__ == "Conv1D"


def _is_quantised(layer: Any) -> bool:
    """Whether the weight is anything but a plain floating-point parameter."""
    weight: Tensor | None = getattr(layer, "weight", None)
    return (
        weight is None
        or type(weight) is not nn.Parameter
        or not weight.is_floating_point()
        or weight.element_size() < 2
    )
