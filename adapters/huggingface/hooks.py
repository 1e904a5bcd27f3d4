"""Hooks that only some operands need. Each is picklable and deep-copyable with the model it is on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.companions import prefill_beside
from headpatch.adapters.huggingface.images import encoded_before, image_token_of
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller
    from headpatch.adapters.huggingface.rows import StackHooks

__all__ = ["LayerInputHook", "PrefillProbe", "RootHook"]


EMBEDDED = ("image_embeds", "image_features")
"""Arguments under which some models take pictures that were encoded before."""


class LayerInputHook:
    """Keeps the residual stream that enters a decoder layer for the attention inside it."""

    def __init__(self, root: nn.Module, attention_path: str, hooks: StackHooks | None, layer: int) -> None:
        self.hooks, self.layer = hooks, layer
        path = attention_path
        while "." in path and not path.rsplit(".", 1)[1].isdigit():
            path = path.rsplit(".", 1)[0]
        self.handle = root.get_submodule(path).register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Publish the layer's first tensor argument."""
        rows = self.hooks.current() if self.hooks is not None else None
        stream = args[0] if args else kwargs.get("hidden_states")
        if rows is not None and isinstance(stream, Tensor):
            rows.layer_inputs[self.layer] = stream

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()


class RootHook:
    """Keeps the token ids that the outermost model got: inner stacks of vision-language models see embeddings only."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.handle = controller.root.register_forward_pre_hook(self.before, with_kwargs=True)
        self.token = image_token_of(controller.root.config)
        self.names = tuple(inspect.signature(inspect.unwrap(type(controller.root).forward)).parameters)[1:]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Publish input_ids, or that there are none."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        data = self.controller.call_data
        outputs = given.get("mm_encoder_outputs")  # from generate(), which encodes pictures before the first call
        data["pictures"] = any(
            v is not None for n, v in given.items() if n.startswith("pixel_values") or n in EMBEDDED
        ) or (isinstance(outputs, dict) and any(v is not None for v in outputs.values()))
        data["class_token"] = encoded_before(outputs)
        data["image_token_id"] = self.token
        data["input_ids"] = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()
        for data in (*self.controller.data_by_thread.values(), self.controller.traced_data):
            data.pop("input_ids", None)
            data.pop("image_token_id", None)
            data.pop("pictures", None)
            data.pop("class_token", None)


class PrefillProbe:
    """Stands before ``model._prefill`` of generate(): the only place that sees a whole prompt when it is prefilled in chunks."""

    def __init__(self, controller: Controller, companions: bool = False) -> None:
        self.controller, self.companions = controller, companions
        if hasattr(type(controller.root), "_prefill"):
            controller.root.__dict__["_prefill"] = self

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Note each row's prompt length, then prefill as transformers does."""
        root: Any = self.controller.root
        cache = model_kwargs.get("past_key_values")
        if cache is not None and self.controller.by_prompt and int(cache.get_seq_length()) > 0:
            raise EngineError(
                "a recipe whose edits depend on the whole prompt cannot continue on a cache from an earlier turn; start with an "
                "empty cache"
            )
        if cache is None and self.controller.by_prompt:
            raise EngineError(
                "a recipe whose edits depend on the whole prompt cannot run under generate(use_cache=False), where every step looks "
                "like a longer prompt; leave the cache on"
            )
        run = type(root)._prefill.__get__(root)
        if self.companions and "without_image" not in self.controller.call_data:
            options = (generation_config, *args)
            return prefill_beside(self.controller, run, input_ids, model_kwargs, *options, **kwargs)
        if "prompt_len" in self.controller.call_data:
            return run(input_ids, generation_config, model_kwargs, *args, **kwargs)
        mask = model_kwargs.get("decoder_attention_mask" if root.config.is_encoder_decoder else "attention_mask")
        lengths = (
            mask.sum(-1) if mask is not None and mask.ndim == 2 else torch.full((len(input_ids),), input_ids.shape[1])
        )
        with self.controller.given({"prompt_len": lengths}):
            return run(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def remove(self) -> None:
        """Give generate() its own prefill back."""
        if self.controller.root.__dict__.get("_prefill") is self:
            del self.controller.root.__dict__["_prefill"]
