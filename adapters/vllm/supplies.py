"""What this adapter supplies, and which recipes it can therefore do exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headpatch.adapters.vllm.one_step import features
from headpatch.errors import UnsupportedModelError
from headpatch.methods.base import MassMethod, OutputMethod
from headpatch.operands import Supply, refusals

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = [
    "SUPPLIES", "check_supplied", "engine_features", "is_affine", "is_row_edit", "is_segment_edit", "whole_prompt",
]  # fmt: skip

_SEGMENT = ("alibi", "kv_windows")
_WHOLE = (*_SEGMENT, "kv_connector", "recurrent_layers", "this_scheduler")
_IMAGE = (*_SEGMENT, "no_image_tokens")
SUPPLIES: dict[str, Supply] = {
    "first_token": Supply(
        not_with=("alibi",), note="per request; on GPUs constant weights and the forms of one kernel, on CPUs any edit"
    ),
    "spans": Supply(not_with=_SEGMENT, note="given with the request"),
    "beside_spans": Supply(not_with=_SEGMENT, note="given with the request"),
    "column_sinks": Supply(not_with=_WHOLE, note="prompts come in one step, and are not read from the prefix cache"),
    "image_tokens": Supply(not_with=_IMAGE, note="from the request's multimodal placeholders"),
    "image_queries": Supply(not_with=_IMAGE, note="from the request's multimodal placeholders"),
    "prompt_len": Supply(note="fixed when the request starts; kept over preemption"),
    "position": Supply(),
    "kv_windows": Supply(
        not_with=("alibi", "sliding_windows"), note="one policy for the whole engine, by flag; blocks are freed"
    ),
    "arrays": Supply(note="vectors that are added to head outputs, per request"),
}
"""Features are found by :func:`engine_features`, and by hook.py, layer by layer."""
SERVED = frozenset({"position", "prompt_len", "arrays"})
"""Operands that edits of outputs are given."""


def engine_features(vllm_config: Any) -> frozenset[str]:
    """Features of an engine that rule operands out, as far as its config shows them."""
    from vllm.platforms import current_platform

    found = set() if current_platform.is_cpu() else {"gpu"}
    if not getattr(vllm_config.model_config, "is_multimodal_model", False):
        found.add("no_image_tokens")
    return frozenset(found) | features(vllm_config)


def check_supplied(recipe: Recipe, features: frozenset[str] = frozenset()) -> None:
    """Raise UnsupportedModelError where a patch needs what an engine with these features does not supply."""
    for patch in recipe.patches:
        method: Any = patch.method
        words = refusals(method.operands(), SUPPLIES, features)
        if not words and is_segment_edit(method):
            words = [
                f"operand 'first_token' is supplied for constant weights only with {name}"
                for name in _SEGMENT
                if name in features
            ]
        elif not words and method.family == "cache" and "kv_windows" not in method.operands():
            words = ["the only operand of cache policies that is supplied is 'kv_windows'"]
        elif not words and method.family not in ("mass", "scores", "output", "cache"):
            words = [f"methods of the family {method.family!r} are not served"]
        if not words and method.family == "output" and (lacking := set(method.operands()) - SERVED):
            words = [f"operand {name!r} is not supplied to edits of outputs" for name in sorted(lacking)]
        if not words and "arrays" in method.operands() and not is_affine(method):
            words = ["operand 'arrays' is supplied for edits of the form factor x output + vector only"]
        if not words and method.state:
            words = ["state that is derived from a request's prompt is not kept"]
        if words:
            where = recipe.source or recipe.name or "recipe"
            raise UnsupportedModelError(
                f"vllm cannot do this recipe exactly: {where}: patches[{patch.index}] ({method.name}): {'; '.join(words)}"
            )


def is_affine(method: Any) -> bool:
    """Whether a method's edit of an output is a constant factor and a constant vector, at all positions or at some."""
    return isinstance(method, OutputMethod) and (
        method.is_constant or type(method).affine is not OutputMethod.affine
    )  # fmt: skip


def is_row_edit(method: Any) -> bool:
    """Whether a method's result differs from row to row, so that no table of constants can hold it."""
    return isinstance(method, OutputMethod) and not (method.is_constant and not method.operands())


def is_segment_edit(method: Any) -> bool:
    """Whether a method edits attention in another way than by constant weights on the first token."""
    if method.family != "mass":
        return bool(method.family == "scores")
    first = [s.kind for s in method.segments()] == ["first_token"]
    return not (first and isinstance(method, MassMethod) and method.is_constant)


def whole_prompt(recipe: Recipe) -> bool:
    """Whether a recipe needs a prompt in one step, all of it, and none of it from the prefix cache."""
    return "column_sinks" in recipe.needs
