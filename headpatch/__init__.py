"""headpatch: change what single attention heads do, in a model that is already running in somebody else's engine.

    import headpatch
    handle = headpatch.apply(model, "smollm2-135m-instruct/steady")   # or a path, a dict, hf://owner/repo
    ...
    handle.remove()                                                   # bit for bit as before

Names are imported on first use, so that ``import headpatch`` is instant and imports no engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "apply": "api", "applied": "api", "by_row": "api", "handles": "api", "list_methods": "api", "observe": "api",
    "list_recipes": "sources", "load_recipe": "sources",
    "Recipe": "recipe",
    "Handle": "registry", "register_method": "registry",
    "add_recipe": "serving", "remove_recipe": "serving", "sampling_params": "serving",
    "EngineError": "errors", "HeadpatchError": "errors", "RecipeError": "errors", "UnsupportedModelError": "errors",
}  # fmt: skip

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604  (built from the table above)

if TYPE_CHECKING:
    from headpatch.api import applied, apply, by_row, handles, list_methods, observe
    from headpatch.errors import EngineError, HeadpatchError, RecipeError, UnsupportedModelError
    from headpatch.recipe import Recipe
    from headpatch.registry import Handle, register_method
    from headpatch.serving import add_recipe, remove_recipe, sampling_params
    from headpatch.sources import list_recipes, load_recipe


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'headpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headpatch.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
