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

    def windowed_layers(self, config: Any) -> dict[str, tuple[int, ...]]:
        """By part, the layers of the model that a config describes which have a sliding window of their own."""
        layout = self._load().layout_of_config(config)
        from headpatch.adapters.huggingface.kvdetect import windowed_parts

        return windowed_parts(layout)

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

    def projections(self, obj: Any, part: str | None = None) -> dict[int, Any]:
        """Which weights of the model inside `obj` belong to which head, by layer, for :mod:`headpatch.tune`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.projections import projections

        return projections(root, part)

    def add_output_biases(self, obj: Any, paths: list[str]) -> None:
        """Give output projections of the model inside `obj` biases of zeros; EngineError where a checkpoint would lose them."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.projections import add_output_biases

        add_output_biases(root, paths)

    def last_tokens(self, obj: Any, tokenizer: Any) -> Any:
        """The last tokens of prompts of the model inside `obj`, for :mod:`headpatch.tune`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.last_tokens import HuggingFaceLastTokens

        return HuggingFaceLastTokens(root, tokenizer)

    def load(self, name: str, device: str = "auto", dtype: str = "float32", vision: bool = False) -> tuple[Any, Any]:
        """A causal language model and its tokenizer (with `vision` one that sees, and its processor), by folder or hub name."""
        self._load()
        from headpatch.adapters.huggingface.loading import load

        return load(name, device, dtype, vision)

    def pose(self, obj: Any, reader: Any, prompt: str, **options: Any) -> Any:
        """A prompt as the model inside `obj` is given it: see :func:`headpatch.adapters.huggingface.looking.pose`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.looking import pose

        return pose(root, reader, prompt, **options)

    def bench(self, obj: Any, tokenizer: Any, **options: Any) -> Any:
        """The model inside `obj`, ready to be measured under many recipes."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.scoring import HuggingFaceBench

        return HuggingFaceBench(root, tokenizer, **options)

    def mixture(self, obj: Any, first: int, recent: int) -> Any:
        """The model inside `obj` with a mixture of full and near attention: see :mod:`headpatch.adapters.huggingface.mixture`."""
        root = self._model(obj)
        from headpatch.adapters.huggingface.mixture import Mixture

        return Mixture(root, first, recent)

    def load_config(self, name: str) -> Any:
        """The config of a model, by folder or hub name, without its weights; EngineError where there is none."""
        self._load()
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise EngineError(f"cannot read the config of {name!r} with transformers: {first}") from error

    def write(self, model: Any, tokenizer: Any, prompt: str, *hear: Any, **options: Any) -> Any:
        """Continue a prompt, piece by piece: see :func:`headpatch.adapters.huggingface.writing.write`."""
        self._load()
        from headpatch.adapters.huggingface.writing import write

        return write(model, tokenizer, prompt, *hear, **options)

    def logits(self, model: Any, tokenizer: Any, prompt: str, chat: bool | None = None) -> Any:
        """Logits [1, n, vocabulary] of one prompt, in the model's chat template where it has one."""
        self._load()
        from headpatch.adapters.huggingface.writing import logits

        return logits(model, tokenizer, prompt, chat)

    def hushed(self) -> Any:
        """A context manager that silences the engine's progress bars and warnings."""
        self._load()
        from headpatch.adapters.huggingface.writing import hushed

        return hushed()

    def unpack_gguf(self, gguf: Any, target: Any) -> None:
        """Write a quantised GGUF file as a plain checkpoint: see :func:`headpatch.adapters.huggingface.gguf.unpack`."""
        self._load()
        from headpatch.adapters.huggingface.gguf import unpack

        unpack(gguf, target)

    def versions(self) -> dict[str, str | None]:
        """Versions of the packages that this engine is made of or works with; None for what is not installed."""
        self._load()
        from headpatch.adapters.huggingface.doctor import versions

        return versions()

    def specimen(self, device: str = "cpu") -> tuple[Any, Any]:
        """A tiny random model and a function that gives its logits, for self-checks."""
        self._load()
        from headpatch.adapters.huggingface.doctor import specimen

        return specimen(device)

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
