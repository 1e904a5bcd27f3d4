"""transformers, through its own attention interface: every architecture that routes through it, without per-model code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headpatch.errors import EngineError, UnsupportedModelError
from headpatch.operands import Supply

if TYPE_CHECKING:
    from headpatch.heads import ModelShape
    from headpatch.recipe import Recipe
    from headpatch.registry import Handle

__all__ = ["ADAPTER", "HuggingFaceAdapter"]

OLDEST = (5, 16, 1)
MODEL_BASES = {"PreTrainedModel", "PeftModel", "Pipeline", "OptimizedModule"}
CONFIG_BASES = {"PreTrainedConfig", "PretrainedConfig"}


class HuggingFaceAdapter:
    """Patches transformers models. Importing this module imports neither torch nor transformers."""

    name = "huggingface"

    def matches(self, obj: object) -> bool:
        """A transformers model or config, or a pipeline, PeftModel, compiled module or nn.Module that holds one."""
        bases = {c.__name__ for c in type(obj).__mro__}
        if bases & (MODEL_BASES | CONFIG_BASES):
            return True
        inner = (
            [getattr(obj, name, None) for name in ("model", "module", "base_model", "_orig_mod")]
            if "Module" in bases
            else []
        )
        return any({c.__name__ for c in type(m).__mro__} & MODEL_BASES for m in inner)

    def shape(self, obj: Any) -> ModelShape:
        """Heads of a model, or of the model that a config describes."""
        discover = self._load()
        if {c.__name__ for c in type(obj).__mro__} & CONFIG_BASES:
            return discover.layout_of_config(obj).shape
        return discover.find_layout(discover.unwrap(obj)).shape

    def supplies(self) -> dict[str, Supply]:
        """What this adapter supplies, by operand."""
        self._load()
        from headpatch.adapters.huggingface.operands import SUPPLIES

        return dict(SUPPLIES)

    def apply(self, obj: Any, recipe: Recipe) -> Handle:
        """Patch the model inside `obj`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.controller import Controller, controller_of
        from headpatch.adapters.huggingface.handle import HuggingFaceHandle

        controller = controller_of(root) or Controller(root)
        return HuggingFaceHandle(root, controller.install(recipe))

    def handles(self, obj: Any) -> list[Handle]:
        """Handles on the model inside `obj`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.controller import controller_of
        from headpatch.adapters.huggingface.handle import HuggingFaceHandle

        controller = controller_of(root)
        return [HuggingFaceHandle(root, r) for r in controller.records] if controller else []

    def observe(self, obj: Any, operands: Iterable[str], heads: Any, **options: Any) -> Any:
        """Record operands of the model inside `obj`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.observe import observing

        return observing(root, operands, heads, **options)

    def _model(self, obj: Any) -> Any:
        if {c.__name__ for c in type(obj).__mro__} & CONFIG_BASES:
            raise UnsupportedModelError(f"a {type(obj).__name__} describes a model but is none; give the model")
        return self._load().unwrap(obj)

    def _load(self) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise EngineError("transformers is not installed; pip install 'headpatch[hf]'") from error
        found = tuple(int(x) for x in transformers.__version__.split(".")[:3] if x.isdigit())
        if found < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise EngineError(f"transformers {transformers.__version__} is too old; headpatch needs {oldest} or newer")
        from headpatch.adapters.huggingface import discover

        return discover


ADAPTER = HuggingFaceAdapter()
