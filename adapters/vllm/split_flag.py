"""Recipes of the flag whose cache policy splits the engine: one policy for the whole engine, checked before it starts.

A policy says what a layer's cache holds, and an engine has one cache. So the recipes that a flag names have the same policy or none
of them has one, and a request cannot have another: what is refused is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headpatch.adapters.vllm.split import Split, check_whole, plan_split
from headpatch.errors import EngineError, RecipeError, UnsupportedModelError
from headpatch.recipe import Recipe, resolve

if TYPE_CHECKING:
    from headpatch.adapters.vllm.flag import Flag
    from headpatch.heads import ModelShape

__all__ = ["find_split", "policy_of", "refuse_policy"]

Policy = tuple[int, int, dict[int, tuple[int, ...]]]

SEAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry.register",
     ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec")),
    ("vllm.v1.core.single_type_kv_cache_manager", "SlidingWindowManager._remove_blocks_in_range",
     ("request_id", "first_block", "last_block")),
    ("vllm.v1.core.single_type_kv_cache_manager", "SlidingWindowManager.find_longest_cache_hit",
     ("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block", "alignment_tokens")),
    ("vllm.v1.core.kv_cache_utils", "_get_kv_cache_groups_uniform_page_size", ("kv_cache_spec",)),
    ("vllm.v1.core.kv_cache_utils", "create_kv_cache_group_specs", ("kv_cache_spec", "grouped_layer_names")),
    ("vllm.v1.core.kv_cache_utils", "resolve_block_hashes", ("block_hashes", "hash_block_size", "block_size")),
    ("vllm.v1.kv_cache_interface", "SlidingWindowSpec", ("block_size", "num_kv_heads", "head_size", "sliding_window")),
    ("vllm.model_executor.layers.attention.attention", "get_attention_context", ("layer_name",)),
    ("vllm.v1.attention.backend", "subclass_attention_backend", ("name_prefix", "attention_backend_cls", "builder_cls")),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata",
     ("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "max_query_len", "max_seq_len", "block_table_tensor",
      "seq_lens_cpu_upper_bound", "is_prefilling")),
    ("vllm.model_executor.layers.attention.attention", "Attention.__init__",
     ("num_heads", "head_size", "num_kv_heads", "per_layer_sliding_window", "attn_backend", "prefix")),
)  # fmt: skip
"""What cutting layers relies on beyond :data:`headpatch.adapters.vllm.window.SEAMS`."""


def policy_of(recipe: Recipe, shape: ModelShape) -> Policy | None:
    """First and last tokens that a recipe's cache policy keeps, and by layer the KV heads that keep all; None without a policy.

    A policy that lists every KV head drops nothing and counts as none.
    """
    found = next((patch for patch in resolve(recipe, shape) if patch.method.family == "cache"), None)
    if found is None:
        return None
    if found.part != shape.main:
        where = recipe.source or recipe.name or "recipe"
        raise UnsupportedModelError(
            f"{where}: patches[{found.index}]: a cache policy on the part {found.part!r} is not served"
        )
    part, method = shape.parts[shape.main], found.method
    full = {layer: tuple(heads) for layer, heads in found.heads.items()}
    if all(len(heads) == part.num_kv_heads[layer] for layer, heads in full.items()):
        return None
    return int(method.sink), int(method.recent), full  # type: ignore[attr-defined]


def find_split(flag: Flag, shape: ModelShape, vllm_config: Any) -> Split | None:
    """The split that the flag's recipes ask for; None where they have no cache policy.

    Raises
    ------
    RecipeError
        They do not have the same policy, or requests could come without one.
    EngineError, UnsupportedModelError
        The engine or the model cannot be split exactly.
    """
    policies = {name: policy_of(recipe, shape) for name, recipe in flag.recipes.items()}
    asked = {name: policy for name, policy in policies.items() if policy is not None}
    if not asked:
        if flag.kv_unit is not None:
            raise _error("no recipe has a cache policy", "kv_unit", "leave it out")
        return None
    (first, policy), *others = asked.items()
    without = next((name for name in policies if name not in asked), None)
    other = next((name for name, its in others if its != policy), without)
    if other is not None:
        how = "has no cache policy" if other == without else "keeps other tokens"
        raise _error(
            f"{other!r} {how}, and {first!r} decides what this engine's cache keeps, for all requests", f"recipes.{other}",
            "give all of them the same policy, or serve them from two engines",
        )  # fmt: skip
    if flag.default is None:
        raise _error(
            f"{first!r} has a cache policy, which every request gets, and requests that name no recipe would have none",
            "default", f"name one, as in {first!r}",
        )  # fmt: skip
    _check_config(vllm_config, flag.unverified)
    sink, recent, full = policy
    world = int(getattr(vllm_config.parallel_config, "tensor_parallel_size", 1) or 1)
    split = plan_split(full, sink, recent, shape.parts[shape.main], world, flag.kv_unit)
    check_whole(split, _smallest_block())
    return split


def refuse_policy(recipe: Recipe, shape: ModelShape, split: Split | None, stacked: bool) -> str:
    """Why an engine with this split cannot serve a recipe that comes later; an empty string where it can.

    Parameters
    ----------
    stacked
        Whether the recipe goes on top of the default, which then brings the policy.
    """
    policy = policy_of(recipe, shape)
    if policy is None:
        lacks = split is not None and not stacked
        return (
            "it has no cache policy, and this engine's cache drops tokens for all requests: add the same policy"
            if lacks
            else ""
        )
    if split is None:
        return "a cache policy splits the whole engine when it starts: name the recipe in the flag"
    if policy != (split.sink, split.recent, dict(split.full)):
        return "its cache policy is not the one that this engine was started with"
    return ""


def _smallest_block() -> int:
    """Fewest tokens of a block on this platform."""
    from vllm.platforms import current_platform

    return 32 if current_platform.is_cpu() else 16


def _check_config(vllm_config: Any, unverified: bool) -> None:
    """Refuse, by name, what cut layers cannot live with."""
    from headpatch.adapters.vllm.window import lacking

    missing = lacking(SEAMS)
    if missing:
        raise EngineError(f"operand 'kv_windows' is not supplied on this vLLM, which lacks {', '.join(missing)}")
    if words := _model_words(vllm_config.model_config):
        raise UnsupportedModelError(
            f"vllm: operand 'kv_windows' cannot be had with {vllm_config.model_config.model}: {'; '.join(words)}"
        )
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    words = []
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        words.append("disable_hybrid_kv_cache_manager, which gives every layer a cache of the same length")
    if vllm_config.kv_transfer_config is not None:
        words.append("KV connectors and offloading (kv_transfer_config), which move caches of whole prefixes")
    if int(getattr(parallel, "pipeline_parallel_size", 1) or 1) > 1:
        words.append("pipeline parallelism")
    if speculation is not None and str(getattr(speculation, "method", "")) != "ngram":
        words.append(
            f"speculation by {getattr(speculation, 'method', '')!r}: draft models bring caches of their own; ngram works"
        )
    if words:
        raise EngineError(f"vllm: operand 'kv_windows' cannot be had with {'; '.join(words)}")
    events = getattr(vllm_config, "kv_events_config", None)
    if events is not None and getattr(events, "enable_kv_cache_events", False) and not unverified:
        raise EngineError(
            "vllm: headpatch was never run with KV-cache events beside a cache policy; "
            '{"unverified": true} in the flag starts it all the same'
        )


def _model_words(model: Any) -> list[str]:
    text = model.hf_text_config
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or ()]
    words = []
    if any("sliding" in kind or "chunked" in kind for kind in kinds) or model.get_sliding_window() is not None:
        words.append("sliding windows of its own, which already bound its cache")
    if getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False):
        words.append("layers that keep a state in place of keys")
    return words


def _error(problem: str, key: str, remedy: str) -> RecipeError:
    from headpatch.adapters.vllm.flag import KEY

    return RecipeError(problem, source="--additional-config", key=f"{KEY}.{key}", remedy=remedy)
