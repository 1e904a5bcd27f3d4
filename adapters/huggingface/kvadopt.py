"""How a cache comes to hold head groups: its empty layers are exchanged, whoever made it.

generate() makes its cache in a method of the model's, before which :class:`GenerateProbe` stands; a plain forward makes its own in
the middle of the call, where :class:`CacheProbe` sees it just before the first layer uses it; a cache that a user passes empty is
treated the same. A cache that holds tokens already is refused unless they came in under the same recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

from headpatch.adapters.huggingface.kvcache import KeptLayer
from headpatch.adapters.huggingface.kvrows import Ledger, read_chunk
from headpatch.adapters.huggingface.kvselect import SelectLayer
from headpatch.adapters.huggingface.kvstatic import StaticKeptLayer
from headpatch.errors import EngineError

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller
    from headpatch.adapters.huggingface.kvplan import Policy
    from headpatch.adapters.huggingface.rows import StackHooks

__all__ = ["CacheProbe", "GenerateProbe", "adopt", "begin", "release"]

ATTRIBUTE = "headpatch_kept"


def adopt(cache: Any, policies: dict[int, Policy]) -> Ledger | None:
    """Make the layers of an empty cache hold head groups; what they share, or None where there is no policy.

    Parameters
    ----------
    cache
        A transformers cache, or an encoder-decoder's pair.
    policies
        By cache layer.

    Raises
    ------
    EngineError
        The cache holds tokens that came in without this policy, or is of a kind that cannot hold head groups.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    known: Ledger | None = inner.__dict__.get(ATTRIBUTE)
    if known is not None and (known.policies is policies or known.policies == policies):
        return known
    if known is None and not policies:
        return None
    if torch.compiler.is_compiling():
        raise EngineError(
            "a compiled call was given a cache that is not prepared for this cache policy: fill it in an eager call first, or let "
            "generate() make it"
        )
    if int(inner.get_seq_length()):
        raise EngineError(
            "this cache was filled without the cache policy that is now on the model; start with an empty cache"
        )
    release(cache)
    if not policies:
        return None
    if getattr(inner, "offloading", False):
        raise EngineError(
            "an offloaded cache does not go with a cache policy, which keeps less in the first place; leave cache_implementation out"
        )
    if not isinstance(getattr(inner, "layers", None), list):
        raise EngineError(
            f"a {type(inner).__name__} has no layers that could be exchanged; pass a DynamicCache or a StaticCache"
        )
    layers, lazily = list(inner.layers), getattr(inner, "layer_class_to_replicate", None)
    while lazily is not None and len(layers) <= max(policies):
        layers.append(lazily())
    ledger = Ledger(policies=policies)
    for index, policy in policies.items():
        layers[index] = _exchange(layers[index], policy, ledger, index)
    inner.layers[:] = layers
    inner.__dict__[ATTRIBUTE] = ledger
    return ledger


def _exchange(old: Any, policy: Policy, ledger: Ledger, index: int) -> Any:
    if policy.selection is not None:
        if type(old) is DynamicLayer:
            return SelectLayer(policy, ledger, index, old)
        raise EngineError(
            f"cache layer {index} is a {type(old).__name__}: a policy that chooses tokens needs a DynamicCache, which can grow head "
            "by head"
        )
    if type(old) is DynamicLayer:
        return KeptLayer(policy, ledger, index, old)
    if type(old) is StaticLayer:
        return StaticKeptLayer(policy, ledger, index, old)
    if isinstance(old, QuantizedLayer):
        return KeptLayer(policy, ledger, index, old, old)
    raise EngineError(
        f"cache layer {index} is a {type(old).__name__}, which cannot hold head groups; pass a DynamicCache, a StaticCache or a "
        "QuantizedCache"
    )


def release(cache: Any) -> None:
    """Give an empty cache its own layers back."""
    inner = getattr(cache, "self_attention_cache", cache)
    if inner.__dict__.pop(ATTRIBUTE, None) is not None:
        inner.layers[:] = [layer.replaced if isinstance(layer, KeptLayer) else layer for layer in inner.layers]


def begin(rows: Any, cache: Any, hooks: StackHooks) -> None:
    """A call with a cache starts: adopt the cache, and work out what the call adds."""
    ledger = adopt(cache, hooks.policies)
    if ledger is not None:
        rows.kept = ledger
        if not torch.compiler.is_compiling():
            hooks.controller.ledger = ledger
        ledger.begin(read_chunk(rows, rows.mask, ledger.counts))


class CacheProbe:
    """Stands before an attention layer under a policy: the first place that sees a cache which the model made itself."""

    def __init__(self, root: nn.Module, path: str, hooks: StackHooks) -> None:
        self.hooks = hooks
        self.handle = root.get_submodule(path).register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adopt the cache unless the call brought it."""
        rows = self.hooks.current()
        if rows is None or rows.kept is not None:
            return
        for name in ("past_key_values", "past_key_value", "layer_past"):
            cache = kwargs.get(name)
            if cache is not None:
                rows.cache = cache
                begin(rows, cache, self.hooks)
                return

    def remove(self) -> None:
        """Take the hook off."""
        self.handle.remove()


class GenerateProbe:
    """Stands before ``model._prepare_cache_for_generation``: what generate() makes or was given is adopted before its first use."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        if hasattr(type(controller.root), "_prepare_cache_for_generation"):
            controller.root.__dict__["_prepare_cache_for_generation"] = self

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Let transformers prepare its cache, then exchange the layers."""
        root: Any = self.controller.root
        run = type(root)._prepare_cache_for_generation.__get__(root)
        stacks = [hooks for hooks in self.controller.stacks.values() if hooks.policies]
        chooses = any(policy.selection for hooks in stacks for policy in hooks.policies.values())
        mode = kwargs.get("generation_mode", args[0] if args else None)
        if chooses and getattr(mode, "value", mode) == "assisted_generation":
            raise EngineError(
                "a policy that chooses tokens where the prompt ends does not go with assisted decoding, which feeds drafts together "
                "with the prompt; leave the assistant out"
            )
        result = run(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and stacks and int(cache.get_seq_length()) == 0:
            adopt(cache, stacks[0].policies)
            if getattr(generation_config, "is_assistant", False):
                getattr(cache, "self_attention_cache", cache).activate_past_recording()
        return result

    def remove(self) -> None:
        """Give generate() its own method back."""
        if self.controller.root.__dict__.get("_prepare_cache_for_generation") is self:
            del self.controller.root.__dict__["_prepare_cache_for_generation"]
