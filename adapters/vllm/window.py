"""Which vLLM this is, told by its features, and which of an engine's options an exact edit cannot live with.

Written for 0.26 to 0.33. Nothing asks for a version string except error messages.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import TYPE_CHECKING, Any

from headpatch.errors import EngineError, UnsupportedModelError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.flag import Flag

__all__ = ["check_config", "lacking", "may_capture_whole_model", "missing_features"]

SEAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        ("num_heads", "head_size", "prefix", "attn_type"),
    ),
    ("vllm.v1.worker.worker_base", "WorkerBase.__init__", ("vllm_config", "rank")),
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("request_id", "prompt", "params")),
    ("vllm.v1.engine.output_processor", "OutputProcessor.add_request", ("request",)),
    ("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("prompt", "sampling_params", "request_id")),
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder.build", ("common_prefix_len", "common_attn_metadata")),
    ("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params", "block_ids", "prompt_token_ids")),
    ("vllm.v1.core.sched.output", "CachedRequestData", ("req_ids", "resumed_req_ids", "new_block_ids")),
    (
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids"),
    ),
    ("vllm.v1.engine", "EngineCoreRequest", ("sampling_params", "cache_salt", "mm_features", "prompt_token_ids")),
)
"""What the hooks rely on: module, name in it, parameters (or fields) that it must have."""


def missing_features() -> list[str]:
    """What this vLLM lacks of what the hooks rely on; empty inside the window."""
    return lacking(SEAMS)


def lacking(seams: tuple[tuple[str, str, tuple[str, ...]], ...]) -> list[str]:
    """What this vLLM lacks of these."""
    missing = []
    for module, name, parameters in seams:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            known = set(inspect.signature(found).parameters)
        except (ImportError, AttributeError, ValueError, TypeError):
            missing.append(f"{module}.{name}")
            continue
        missing += [f"{name}({parameter}=)" for parameter in parameters if parameter not in known]
    return missing


def may_capture_whole_model(vllm_config: Any) -> bool:
    """Whether CUDA graphs may hold attention too. Decided before start-up, so rather too often than not."""
    from vllm.platforms import current_platform

    mode = getattr(vllm_config.compilation_config, "cudagraph_mode", None)
    if not current_platform.is_cuda_alike() or bool(getattr(vllm_config.model_config, "enforce_eager", False)):
        return False
    return mode is None or getattr(mode, "name", "") not in ("NONE", "PIECEWISE")


def check_config(vllm_config: Any, flag: Flag) -> None:
    """Refuse, by name, what an edit would not be exact under.

    Raises
    ------
    UnsupportedModelError
        The model's attention is of another kind.
    EngineError
        An engine option, or a vLLM outside the window.
    """
    missing = missing_features()
    if missing and not flag.unverified:
        raise EngineError(
            f"vLLM {_version()} lacks {', '.join(missing)}: headpatch was written for 0.26 to 0.33; "
            '{"unverified": true} in the flag starts it all the same, if the self-check passes'
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if words := _model_words(model):
        raise UnsupportedModelError(f"vllm: {model.model} cannot be patched exactly: {'; '.join(words)}")
    never, unverified = _engine_words(vllm_config)
    if flag.admin and int(getattr(parallel, "_api_process_count", 1) or 1) > 1:
        never.append('several API servers with "admin": true (--api-server-count 1)')
    if never:
        raise EngineError(f"vllm: headpatch cannot be exact with {'; '.join(never)}")
    if unverified and not flag.unverified:
        raise EngineError(
            f"vllm: headpatch was never run with {'; '.join(unverified)}; "
            '{"unverified": true} in the flag starts it all the same, if the self-check passes'
        )


def _model_words(model: Any) -> list[str]:
    words = []
    if getattr(model, "use_mla", False):
        words.append("multi-head latent attention (mla) keeps no keys per head")
    if getattr(model, "runner_type", "generate") != "generate":
        words.append("only generation is patched (runner generate)")
    if getattr(model, "is_encoder_decoder", False):
        words.append("encoder-decoder models")
    if getattr(model, "is_mm_prefix_lm", False):
        words.append("bidirectional attention over image tokens")
    if getattr(model, "rswa_window", None):
        words.append("reference sliding window attention")
    return words


def _engine_words(vllm_config: Any) -> tuple[list[str], list[str]]:
    """Features that can never be exact, and features that nobody has tried."""
    from vllm.platforms import current_platform

    cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
    never: list[str] = []
    unverified: list[str] = []
    never += [
        f"context parallelism ({name}): each rank knows its own keys' log-sum-exp only"
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
        if int(getattr(parallel, name, 1) or 1) > 1
    ]
    dtype = str(getattr(cache, "cache_dtype", "auto"))
    if dtype not in ("auto", "bfloat16", "float16", "float32", "half", "float"):
        never.append(f"a quantised KV cache (kv_cache_dtype {dtype})")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        never.append("kv_sharing_fast_prefill")
    if getattr(parallel, "enable_dbo", False) or int(getattr(parallel, "ubatch_size", 0) or 0) > 1:
        never.append("micro-batches (dual batch overlap)")
    if getattr(model, "disable_cascade_attn", True) is False:
        never.append("cascade attention (disable_cascade_attn=False)")
    if not (current_platform.is_cuda_alike() or current_platform.is_cpu()):
        never.append(f"the platform {current_platform.device_name}")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0", "false", "False"):
        never.append("the Rust front end (VLLM_USE_RUST_FRONTEND), which runs no plugin")
    if int(getattr(parallel, "pipeline_parallel_size", 1) or 1) > 1:
        unverified.append("pipeline parallelism")
    if int(getattr(parallel, "data_parallel_size", 1) or 1) > 1:
        unverified.append("data parallelism")
    return never, unverified


def _version() -> str:
    try:
        return str(getattr(importlib.import_module("vllm.version"), "__version__", "of unknown version"))
    except ImportError:
        return "of unknown version"
