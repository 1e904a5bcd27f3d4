"""The cache of heads that keep the first `sink` and the last `recent` tokens: its description and its manager in vLLM's scheduler.

Blocks between the sinks and the window go back to the pool that all groups share as soon as no step in flight can read them. vLLM's
own sliding-window cache does the same at the front; here the front stays.

Importing this module makes both known to vLLM. Descriptions travel from the workers to the engine's core, and unpickling one imports
the module, so that whoever sees one has its manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from headpatch.adapters.vllm.install import wrap
from headpatch.adapters.vllm.split import longest_hit

__all__ = ["SinkWindowManager", "SinkWindowSpec", "pool_of"]


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Keeps the first `sink_tokens` and the last ``sliding_window - sink_tokens`` tokens; `sliding_window` is what kernels are given.

    What vLLM works out from `sliding_window` (the most blocks that a request holds, hence how many requests fit) is right for both
    parts together: `sink_tokens` is a whole number of blocks.
    """

    sink_tokens: int = 0


class SinkWindowManager(SlidingWindowManager):
    """Keeps sinks and window, frees what lies between."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.sink_blocks = kv_cache_spec.sink_tokens // kv_cache_spec.block_size
        self.recent = kv_cache_spec.sliding_window - kv_cache_spec.sink_tokens

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Nothing at the front of a request is ever skipped."""
        return 0

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *_: Any, **__: Any) -> None:
        """Free the blocks that no query from `processed_computed_tokens` on sees."""
        behind = max(0, processed_computed_tokens - self.recent + 1) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, behind)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool, alignment_tokens: int, dcp_world_size: int = 1, pcp_world_size: int = 1, **_: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """The longest prefix of which the sinks and the window that its next token sees are cached.

        What lies between may be gone. vLLM asks the group of full heads first, so that `max_length` is what those have.
        """
        assert not drop_eagle_block, "headpatch refuses draft models at start"
        size = kv_cache_spec.block_size
        hashes = kv_cache_utils.resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup, alignment_tokens=alignment_tokens,
        )  # fmt: skip
        sinks = kv_cache_spec.sink_tokens // size
        needed = -(-(kv_cache_spec.sliding_window - kv_cache_spec.sink_tokens - 1) // size)

        def cached(index: int) -> list[Any] | None:
            found: list[Any] | None = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            return found

        end, kept = longest_hit(max_length // size, sinks, needed, max(1, alignment_tokens // size), cached)
        blocks: tuple[list[Any], ...] = tuple(
            [kept[i][group] if i in kept else block_pool.null_block for i in range(end)]
            for group in range(len(kv_cache_group_ids))
        )
        return blocks, end * size

    @classmethod
    def reachable_block_mask(cls, *_: Any, **__: Any) -> None:
        """Every block may serve a hit: as a sink, or as part of the window of a later token."""
        return


def _grouped(original: Any, kv_cache_spec: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Groups of layers: all full pieces in one, since it is their memory that grows with a context.

    vLLM's own rule makes all groups as long as the shortest or the longest kind, which can leave a part of every block empty where
    the kinds have unequally many pieces. The window pieces are cut into groups no longer than the full one.
    """
    window = [name for name, spec in kv_cache_spec.items() if isinstance(spec, SinkWindowSpec)]
    full = [name for name in kv_cache_spec if name not in set(window)]
    if not window or not full or any(len({kv_cache_spec[name] for name in names}) > 1 for names in (window, full)):
        return original(kv_cache_spec, *args, **kwargs)
    groups = -(-len(window) // len(full))
    return kv_cache_utils.create_kv_cache_group_specs(
        kv_cache_spec, [full, *(window[i::groups] for i in range(groups))]
    )


def pool_of(core: Any) -> dict[str, Any]:
    """Blocks of an engine, as its scheduler counts them: all, free ones, and per group what requests hold."""
    manager = core.scheduler.kv_cache_manager
    groups: Sequence[Any] = manager.coordinator.single_type_managers
    return {
        "blocks": int(manager.block_pool.num_gpu_blocks),
        "free": int(manager.block_pool.get_num_free_blocks()),
        "groups": [
            {
                "window": isinstance(group, SinkWindowManager),
                "block_size": int(group.block_size),
                "held": {
                    request: [sum(not block.is_null for block in blocks), len(blocks)]
                    for request, blocks in group.req_to_blocks.items()
                },
            }
            for group in groups
        ],
    }


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
wrap(kv_cache_utils, "_get_kv_cache_groups_uniform_page_size", _grouped)
core: Any = EngineCore
core.headpatch_pool = pool_of
