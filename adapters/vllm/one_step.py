"""Prompts that must come in one step, all of them: what is derived from a whole prompt acts on that very prompt.

The scheduler cuts a prompt where a step's budget ends, and takes up whatever of it is in the prefix cache. Requests that are marked
(``whole`` in their field) do neither: they read nothing from the prefix cache, and one whose prompt does not fit into what is left of
a step waits at the head of the queue for the next, as vLLM's own requests do where there is no room for their keys. A prompt that
fits into no step at all is refused by the front end. Once it has come, nothing is special any more: what was derived stays with the
request on CPU workers, preemption or not; on GPUs it lies beside the keys, is lost with them, and derived again when they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headpatch.adapters.vllm.request import FIELD

__all__ = ["WHOLE", "features", "hold", "install_scheduler", "longest_prompt", "too_many_images"]

WHOLE = "whole"
SEAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.config", "SchedulerConfig.get_scheduler_cls", ()),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", ("request", "num_new_tokens")),
    ("vllm", "SamplingParams", ("skip_reading_prefix_cache",)),
)
"""What this relies on beyond :data:`headpatch.adapters.vllm.window.SEAMS`."""


def features(vllm_config: Any) -> frozenset[str]:
    """Features of an engine under which prompts cannot be kept in one step."""
    from headpatch.adapters.vllm.window import lacking

    found = set()
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        found.add("kv_connector")
    if getattr(vllm_config.model_config, "is_hybrid", False):
        found.add("recurrent_layers")
    if lacking(SEAMS):
        found.add("this_scheduler")
    return frozenset(found)


def longest_prompt(vllm_config: Any) -> int:
    """Tokens of the longest prompt that one step can take."""
    scheduler, speculation = vllm_config.scheduler_config, getattr(vllm_config, "speculative_config", None)
    drafts = 0 if speculation is None else int(getattr(speculation, "max_num_new_slots_for_drafting", 0) or 0)
    bounds = [
        int(scheduler.max_num_batched_tokens) - drafts,
        getattr(scheduler, "max_num_scheduled_tokens", None),
        getattr(scheduler, "long_prefill_token_threshold", None),
    ]
    return min(int(bound) for bound in bounds if bound)


def too_many_images(vllm_config: Any, features: Any) -> bool:
    """Whether the pictures of one prompt are more than the encoder takes in one step."""
    scheduler = vllm_config.scheduler_config
    bounds = [getattr(scheduler, name, None) for name in ("max_num_encoder_input_tokens", "encoder_cache_size")]
    room = min((int(bound) for bound in bounds if bound), default=None)
    return room is not None and sum(int(feature.mm_position.length) for feature in features or ()) > room


def hold(allocate: Callable[..., Any], again: bool = False) -> Callable[..., Any]:
    """``KVCacheManager.allocate_slots`` that has no room for a part of a prompt which must come whole.

    `again`: after preemption, too, for what was derived lies beside the keys and goes with them.
    """

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        fresh = request.num_computed_tokens == 0 and (again or not getattr(request, "num_preemptions", 0))
        if fresh and num_new_tokens < request.num_prompt_tokens and _is_whole(request):
            return None
        return allocate(request, num_new_tokens, *args, **kwargs)

    return allocate_slots


def _is_whole(request: Any) -> bool:
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    wire = extra.get(FIELD)
    return isinstance(wire, dict) and bool(wire.get(WHOLE))


def install_scheduler(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``SchedulerConfig.get_scheduler_cls``, which an engine's core calls before it makes its scheduler."""
    from headpatch.adapters.vllm.install import wrap

    found = original(self, *args, **kwargs)
    owner = next((cls for cls in getattr(found, "__mro__", ()) if "__init__" in vars(cls)), object)
    if owner is not object:
        wrap(owner, "__init__", _scheduler_init)
    return found


def _scheduler_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    from headpatch.adapters.vllm.flag import armed

    found = armed(getattr(self, "vllm_config", None))
    if found is not None and found.segments:
        self.kv_cache_manager.allocate_slots = hold(
            self.kv_cache_manager.allocate_slots, again="gpu" in found.features
        )
    return result
