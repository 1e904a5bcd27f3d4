"""headpatch as a model type of lm-evaluation-harness: transformers models with a recipe applied.

    lm_eval --model headpatch --model_args pretrained=NAME,recipe=RECIPE --tasks ...

Versions of the harness that discover models through the entry-point group ``lm_eval.models`` find it by themselves. Releases up to
0.4.13 do not: there ``headpatch lm-eval`` registers it and hands over, with the same arguments. Everything but the recipe is the
harness's own ``hf`` model type.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    from headpatch.errors import EngineError

    raise EngineError(f"lm-evaluation-harness cannot be used here ({error}); pip install 'headpatch[eval]'") from error

from headpatch.api import apply
from headpatch.demo_model import locate
from headpatch.sources import load_recipe

__all__ = ["HeadpatchLM", "register", "run"]

NAME = "headpatch"


class HeadpatchLM(HFLM):
    """The harness's ``hf`` model with a recipe applied for as long as it lives.

    Parameters
    ----------
    pretrained
        As for the harness's ``hf`` type: a folder, a name on the hub, a model; or the demo model's short name.
    recipe
        What :func:`headpatch.load_recipe` takes as a string. None leaves the model untouched, which makes it the ``hf`` type.
    kwargs
        As for the harness's ``hf`` type: ``dtype``, ``device``, ``batch_size``, ...

    Raises
    ------
    HeadpatchError
        The recipe is wrong, or does not fit the model.
    """

    def __init__(self, pretrained: Any, recipe: str | None = None, **kwargs: Any) -> None:
        # The recipe first: a wrong name is said before a model is loaded.
        loaded = None if recipe is None else load_recipe(recipe)
        if isinstance(pretrained, str):
            pretrained = locate(pretrained)
        super().__init__(pretrained, **kwargs)
        self.handle = None if loaded is None else apply(self.model, loaded)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's own facts about the model, with the recipe's name and the digest of what it does."""
        info: dict[str, Any] = super().get_model_info()
        if self.handle is not None:
            info.update(headpatch_recipe=self.handle.recipe.name, headpatch_digest=self.handle.recipe.digest)
        return info


def register() -> None:
    """Make the model type known to the harness of this process. A second call does nothing."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=HeadpatchLM)


def run(arguments: Sequence[str]) -> None:
    """The harness's own command line with the model type registered; `arguments` are the harness's."""
    from lm_eval.__main__ import cli_evaluate

    register()
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
