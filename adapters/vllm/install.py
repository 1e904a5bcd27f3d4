"""The hooks, each of them one attribute of a vLLM class, put in once a process.

In the front end: ``EngineArgs.create_engine_config`` (the flag is checked before anything starts), ``InputProcessor`` (a request's
field becomes what workers need), ``OutputProcessor.add_request`` and the engines' constructors (room for recipes). In the engine's
core: ``SchedulerConfig.get_scheduler_cls``, on the way to the scheduler of armed engines
(:mod:`headpatch.adapters.vllm.one_step`). In workers: ``WorkerBase.__init__``, which gives armed engines a
:class:`~headpatch.adapters.vllm.worker.Worker` of their own, and ``Attention.__init__``, which patches the layers of such engines.
All of them hand over at once to what they wrap where an engine has no flag; nothing is kept per process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from headpatch.adapters.vllm.request import FIELD

__all__ = ["install", "install_front_end"]

MARK = "_headpatch_wraps"
_lock = threading.RLock()


def install() -> None:
    """Put in what every process needs. vLLM calls it often; the second call does nothing."""
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    from headpatch.adapters.vllm.one_step import install_scheduler

    with _lock:
        if "get_scheduler_cls" in vars(SchedulerConfig):
            wrap(SchedulerConfig, "get_scheduler_cls", install_scheduler)
        wrap(EngineArgs, "create_engine_config", _create_engine_config)
        wrap(VllmConfig, "compute_hash", _compute_hash)
        wrap(WorkerBase, "__init__", _worker_init)


def install_front_end() -> None:
    """Put in what a process needs that takes requests: any that makes an engine config."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor

    from headpatch.adapters.vllm.admin import install_server

    install_server()
    with _lock:
        wrap(InputProcessor, "__init__", _processor_init)
        wrap(InputProcessor, "process_inputs", _process_inputs)
        wrap(OutputProcessor, "add_request", _add_request)
        for engine in (LLMEngine, AsyncLLM):
            wrap(engine, "__init__", _engine_init)
        wrap(AsyncLLM, "generate", _generate)


def install_layers() -> None:
    """Put in what a worker of an armed engine needs, before its model is built."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms import current_platform

    with _lock:
        wrap(Attention, "__init__", _attention_init)
        if current_platform.is_cpu():
            from vllm.v1.attention.backends import cpu_attn

            wrap(cpu_attn, "_get_attn_isa", _attn_isa)


def wrap(owner: Any, name: str, by: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``by(original, *args, **kwargs)``, once."""
    original = vars(owner)[name]
    if getattr(original, MARK, None) is not None:
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return by(original, *args, **kwargs)

    setattr(wrapper, MARK, original)
    setattr(owner, name, wrapper)


# --- every process ------------------------------------------------------------------------------------------------------


def _create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(self, *args, **kwargs)
    install_front_end()
    from headpatch.adapters.vllm.flag import KEY, arm

    if isinstance(config.additional_config, dict) and KEY in config.additional_config:
        arm(config)
    return config


def _compute_hash(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The compile cache's key: what is compiled depends on the flag being there, not on any recipe."""
    from headpatch.adapters.vllm.flag import KEY, without_recipes

    config = self.additional_config
    if not (isinstance(config, dict) and KEY in config):
        return original(self, *args, **kwargs)
    view = object.__new__(type(self))
    view.__dict__.update(self.__dict__)
    view.__dict__["additional_config"] = without_recipes(config)
    return original(view, *args, **kwargs)


def _worker_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    from headpatch.adapters.vllm.flag import KEY, armed

    config = self.vllm_config.additional_config
    if isinstance(config, dict) and KEY in config:
        from headpatch.adapters.vllm.worker import Worker

        found = armed(self.vllm_config)
        assert found is not None
        install_layers()
        Worker(self, found)
    return result


# --- the front end ------------------------------------------------------------------------------------------------------


def _processor_init(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, vllm_config, *args, **kwargs)
    from headpatch.adapters.vllm.flag import armed
    from headpatch.adapters.vllm.frontend import FrontEnd

    found = armed(vllm_config)
    self.headpatch = None if found is None else FrontEnd(vllm_config, found, getattr(self, "tokenizer", None))
    return result


def _process_inputs(
    original: Any, self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    front = vars(self).get("headpatch")
    if front is None:
        _refuse_unarmed(params)
        return original(self, request_id, prompt, params, *args, **kwargs)
    params, entry, data = front.split(params)
    request = original(self, request_id, prompt, params, *args, **kwargs)
    front.mark(request, entry, data, prompt)
    return request


def _refuse_unarmed(params: Any) -> None:
    """A request that asks for a recipe must not be answered without one."""
    if FIELD in (getattr(params, "extra_args", None) or ()):
        from headpatch.adapters.vllm.errors import bad_request

        raise bad_request(
            "this engine was not started for headpatch; start it with additional_config={'headpatch': {...}} "
            "(vllm serve: --additional-config '{\"headpatch\": {...}}')"
        )


def _engine_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    processor = getattr(self, "input_processor", None)
    self.output_processor.headpatch = None if processor is None else vars(processor).get("headpatch")
    return result


def _add_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    front = vars(self).get("headpatch")
    if front is not None:
        front.admit(request, self.request_states)
    return original(self, request, *args, **kwargs)


def _generate(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """AsyncLLM.generate is an async generator; what is wrong with a request is said when it is called, while a server can still
    answer with a status.
    """
    params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
    front = vars(self.input_processor).get("headpatch")
    if front is None:
        _refuse_unarmed(params)
    elif params is not None:
        prompt = kwargs.get("prompt", args[0] if args else None)
        front.check_request(params, self.output_processor.request_states, prompt)
    return original(self, *args, **kwargs)


# --- workers ------------------------------------------------------------------------------------------------------------


def _attn_isa(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU kernel's variant.

    The one for AMX keeps values interleaved, where no single one can be read or set; armed engines take the vector variant there.
    """
    from vllm.config import get_current_vllm_config_or_none

    from headpatch.adapters.vllm.worker import worker_of

    found = original(*args, **kwargs)
    return "vec" if found == "amx" and worker_of(get_current_vllm_config_or_none()) is not None else found


def _attention_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    from headpatch.adapters.vllm.hook import build

    build(original, self, *args, **kwargs)
