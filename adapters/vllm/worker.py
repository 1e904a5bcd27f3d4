"""The worker's half: one for each engine and rank, hung on vLLM's worker; it owns the tables and the patched layers.

Before each step it reads the scheduler's output: requests that end let go of their recipe's slot, requests that come (or come back
after preemption) take one, and the first block of each is written down as that slot's.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

from headpatch.adapters.vllm.request import FIELD, unpack
from headpatch.adapters.vllm.row_ranges import RowRanges
from headpatch.adapters.vllm.running import Running, prompt_len
from headpatch.adapters.vllm.shape import model_shape
from headpatch.adapters.vllm.tables import NOBODY, Tables
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headpatch.adapters.vllm.flag import Armed
    from headpatch.adapters.vllm.hook import LayerPatch

__all__ = ["Worker", "worker_of"]

logger = logging.getLogger("vllm.headpatch")
SPARE = 1
"""Slots beyond those that are promised: the self-check needs one."""

# The model is built with nothing but its config at hand. Weak, and by identity: an entry lives as long as its worker.
_by_config: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()


def worker_of(vllm_config: Any) -> Worker | None:
    """The worker half that belongs to this very config, or to the one that it was derived from.

    A vision-language model builds its language model under a config of its own, which vLLM derives from the engine's; both hold the
    object in which attention layers are registered. So does a draft model's config, but that is another model's, or no part of one.
    """
    found = _by_config.get(id(vllm_config))
    if found is not None and found.vllm_config is vllm_config:
        return found
    model = getattr(vllm_config, "model_config", None)
    if model is None or not getattr(model, "is_submodel_config", True):
        return None
    for worker in list(_by_config.values()):
        whole = worker.vllm_config
        if whole.compilation_config is vllm_config.compilation_config and whole.model_config.model == model.model:
            return worker
    return None


class Worker:
    """See the module. `tables` is None until the engine's cache exists; until then nothing is edited. `batch`: the step's rows."""

    def __init__(self, worker: Any, armed: Armed) -> None:
        self.armed = armed
        self.vllm_config = worker.vllm_config
        self.shape = model_shape(self.vllm_config.model_config)
        self.layers: list[LayerPatch] = []
        self.skipped: list[str] = []
        self.tables: Tables | None = None
        self.by_rows = False
        self.checks: list[dict[str, Any]] = []
        self.capacity: dict[str, Any] | None = None
        self.steps: dict[int, Any] = {}
        self.scratch: dict[Any, Any] = {}
        self.batch: list[Running] = []
        self.ranges: RowRanges | None = None
        self._ordered: list[str] | None = None
        self._beside: Any = None
        self._requests: dict[str, Running] = {}
        self._worker = weakref.ref(worker)
        _by_config[id(self.vllm_config)] = self
        worker.headpatch = self
        self._execute = worker.execute_model
        self._initialize = worker.initialize_from_config
        worker.execute_model = self.execute_model
        worker.initialize_from_config = self.initialize_from_config
        worker.headpatch_report = self.report

    # --- start-up -------------------------------------------------------------------------------------------------------

    def initialize_from_config(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        """VLLM's own, then: tables, how each layer's masses are had, the self-check. Graphs are captured after it."""
        result = self._initialize(kv_cache_config, *args, **kwargs)
        worker = self._worker()
        assert worker is not None
        self._ready(worker, kv_cache_config)
        return result

    def _ready(self, worker: Any, kv_cache_config: Any) -> None:
        from headpatch.adapters.vllm.selfcheck import check_engine

        self._check_layers()
        runner = worker.model_runner
        device = self.layers[0].layer_device()
        scheduler = self.vllm_config.scheduler_config
        rows = max(int(scheduler.max_num_seqs), int(scheduler.max_num_batched_tokens)) + 1
        local: list[list[Sequence[int]]] = [[] for _ in range(self.shape.parts[self.shape.main].num_layers)]
        for patch in self.layers:
            local[patch.index].append(patch.heads)
        slots = len({r.digest for r in self.armed.recipes.values()}) + self.armed.slots + SPARE
        blocks = int(kv_cache_config.num_blocks)
        in_numbers = self.armed.segments and device.type != "cpu"
        tables = Tables(self.shape, local, slots, blocks, rows, device, self.armed.vectors, in_numbers)
        if tables.numbers is not None:
            self.ranges = RowRanges(rows, int(scheduler.max_num_seqs), device)
        for recipe in self.armed.recipes.values():
            tables.put(recipe, pinned=True)
        windowed = any(patch.window for patch in self.layers)
        # On a GPU a row's own number is there at once; by its first block the kernel would wait for memory once more.
        self.by_rows = windowed or self.armed.rows or self.armed.segments or device.type == "cuda"
        if self.by_rows:
            self._watch_rows(runner)
        sizes = {
            name: int(group.kv_cache_spec.block_size)
            for group in kv_cache_config.kv_cache_groups
            for name in group.layer_names
        }
        self.tables = tables
        for patch in self.layers:
            patch.ready(tables, sizes.get(patch.name))
        if self.armed.split is not None:
            from headpatch.adapters.vllm.split_report import capacity

            self.capacity = capacity(self, kv_cache_config)
        self.checks = check_engine(self, runner)
        for line in self.summary():
            logger.info("headpatch: %s", line)

    def _check_layers(self) -> None:
        """Every layer that the config promised is there, with the heads that it promised."""
        part, split = self.shape.parts[self.shape.main], self.armed.split
        world = int(getattr(self.vllm_config.parallel_config, "tensor_parallel_size", 1) or 1)
        found = {patch.index: patch for patch in self.layers}
        for layer in part.softmax_layers():
            if layer not in found:
                wanted = self.armed.layers is None or layer in self.armed.layers or split is not None
                if wanted and not self._elsewhere(layer):
                    raise EngineError(
                        f"layer {layer} of this model has no attention that can be patched: {', '.join(self.skipped) or 'not found'}"
                    )
                continue
            heads = sum(len(patch.heads) for patch in self.layers if patch.index == layer) * world
            if (heads, found[layer].head_dim) != (part.num_heads[layer], part.head_dim[layer]):
                raise EngineError(
                    f"layer {layer} has {heads} query heads of {found[layer].head_dim}, its config says "
                    f"{part.num_heads[layer]} of {part.head_dim[layer]}"
                )
        if not self.layers:
            raise EngineError(f"found no attention that can be patched: {', '.join(self.skipped) or 'no layers'}")

    def _elsewhere(self, layer: int) -> bool:
        """Whether another pipeline rank holds the layer."""
        return int(getattr(self.vllm_config.parallel_config, "pipeline_parallel_size", 1) or 1) > 1

    def _watch_rows(self, runner: Any) -> None:
        """Learn the order of the batch: both runners fix it in one method, before the forward pass."""
        first = hasattr(runner, "input_batch")
        name = "_prepare_inputs" if first else "prepare_inputs"
        original = getattr(runner, name, None)
        if original is None:
            raise EngineError(f"{type(runner).__name__} has no {name}: the order of its batches cannot be known")

        def prepare(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.order((runner.input_batch if first else result).req_ids)
            return result

        setattr(runner, name, prepare)

    def beside(self) -> Any:
        """A stream of this engine's own for what can run beside the model, or None where there are no streams."""
        import torch
        from vllm.platforms import current_platform

        if self._beside is None and current_platform.is_cuda_alike():
            self._beside = torch.cuda.Stream()
        return self._beside

    # --- steps ----------------------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """VLLM's own, after the tables were brought up to date."""
        self.step(scheduler_output)
        return self._execute(scheduler_output, *args, **kwargs)

    def step(self, scheduler_output: Any) -> None:
        """Bring slots and maps up to date with what is about to run."""
        self.steps.clear()
        tables = self.tables
        if tables is None:
            return
        for request_id in scheduler_output.finished_req_ids:
            slot = self._requests.pop(request_id, Running()).slot
            if slot != NOBODY:
                tables.release(slot)
        for new in scheduler_output.scheduled_new_reqs:
            self._admit(new)
        if tables.numbers is not None:
            self._check_whole(scheduler_output)
        if not self.by_rows:
            self._mark_blocks(tables, scheduler_output)

    def _check_whole(self, scheduler_output: Any) -> None:
        """What is marked in a prompt's blocks must be found when all of it comes, or nothing would be: see one_step.py."""
        cached, counts = scheduler_output.scheduled_cached_reqs, scheduler_output.num_scheduled_tokens
        come = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
        come += [
            (name, done)
            for name, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            if name in cached.resumed_req_ids
        ]
        for name, done in come:
            request = self._requests.get(name, Running())
            if request.whole and (done or counts[name] < request.prompt):
                raise EngineError(
                    f"operand 'column_sinks' needs the whole prompt in one step, and of {request.prompt} tokens {counts[name]} came "
                    f"behind {done}; this is a bug in headpatch, please report it"
                )

    def _mark_blocks(self, tables: Tables, scheduler_output: Any) -> None:
        """Say whose the first blocks of requests are that are new or come back after preemption."""
        cached = scheduler_output.scheduled_cached_reqs
        given = [(new.req_id, new.block_ids) for new in scheduler_output.scheduled_new_reqs]
        given += [
            (request_id, blocks)
            for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
            if request_id in cached.resumed_req_ids and blocks is not None
        ]
        firsts = [
            (group[0], self._requests.get(name, Running()).slot) for name, groups in given for group in groups if group
        ]
        tables.mark_blocks([block for block, _ in firsts], [slot for _, slot in firsts])

    def _admit(self, new: Any) -> None:
        """Find the slot of a request that is new to this worker, or comes back after preemption."""
        assert self.tables is not None
        if new.req_id in self._requests:
            return
        params = new.sampling_params
        wire = (params.extra_args or {}).get(FIELD) if params is not None else None
        slot = NOBODY
        if wire is not None:
            slot = self.tables.by_key.get(wire["key"], NOBODY)
            if slot == NOBODY:
                slot = self.tables.put(unpack(wire["body"]))
            self.tables.use(slot)
        self._requests[new.req_id] = Running.of(slot, prompt_len(new), wire or {})
        self._ordered = None  # it may come where one of its name was

    def order(self, request_ids: Any) -> None:
        """Write the maps by row for a batch in this order."""
        ids = list(request_ids)
        if self.tables is not None and ids != self._ordered:  # a batch that decodes is the same for many steps
            self._ordered = ids
            self.batch = [self._requests.get(request_id, Running()) for request_id in request_ids]
            self.tables.order([(request.slot, request.prompt) for request in self.batch])
            if self.ranges is not None:
                self.ranges.order(self.batch)

    # --- report ---------------------------------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """Start-up lines for the log."""
        layers = [patch for patch in self.layers if patch.armed]
        kinds = sorted({f"{patch.backend} ({patch.how})" for patch in layers})
        served = ", ".join(self.armed.recipes) or "none"
        cut = []
        if self.armed.split is not None and self.capacity is not None:
            room, uncut = self.capacity["tokens"], self.capacity["unsplit_tokens"]
            cut = [f"KV cache: {self.capacity['split']}; room for {room} tokens, {uncut} if nothing were dropped"]
        return [
            f"{len(layers)} layers armed{', ' * bool(kinds)}{', '.join(kinds)}; recipes: {served}; slots for {self.armed.slots} more",
            *cut,
            *(
                f"self-check: {check['layer']}: error {check['error']:.1e} (bound {check['bound']:.0e})"
                for check in self.checks
            ),
        ]

    def report(self) -> dict[str, Any]:
        """What is patched on this rank, and whether it fires; plain values, for a remote call."""
        tables = self.tables
        return {
            "layers": [patch.report() for patch in self.layers],
            "skipped": list(self.skipped),
            "checks": list(self.checks),
            "slots": [] if tables is None else [[s.key, s.users, s.pinned] for s in tables.slots if s is not None],
            "requests": len(self._requests),
            "cache": self.capacity,
        }
