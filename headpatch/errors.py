"""The errors headpatch raises on purpose. Each message says what was wrong, where, and what would be right."""

from __future__ import annotations

__all__ = ["EngineError", "HeadpatchError", "RecipeError", "UnsupportedModelError"]


class HeadpatchError(Exception):
    """Base class of every error that headpatch raises on purpose."""


class RecipeError(HeadpatchError):
    """A recipe is wrong, or does not fit the model it is applied to.

    Parameters
    ----------
    problem
        What is wrong, in one sentence.
    source
        The file or name the recipe came from; None for a recipe given as a dict.
    key
        Path of the offending key, as in ``patches[0].heads["12.99"]``.
    remedy
        What would be right.

    All four stay readable as attributes; ``str(error)`` joins them.
    """

    def __init__(
        self, problem: str, *, source: str | None = None, key: str | None = None, remedy: str | None = None
    ) -> None:
        self.problem, self.source, self.key, self.remedy = problem, source, key, remedy
        super().__init__(problem)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.source or "recipe", self.key) if part)
        text = f"{where}: {self.problem}"
        return f"{text} ({self.remedy})" if self.remedy else text

    def at(self, *, source: str | None = None, key: str | None = None) -> RecipeError:
        """Return a copy that says where it happened; what is already known is kept."""
        return RecipeError(self.problem, source=self.source or source, key=self.key or key, remedy=self.remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_recipe_error, (self.problem, self.source, self.key, self.remedy)


def _rebuild_recipe_error(problem: str, source: str | None, key: str | None, remedy: str | None) -> RecipeError:
    """Errors cross process borders (server front end, workers); keyword-only arguments need help with that."""
    return RecipeError(problem, source=source, key=key, remedy=remedy)


class UnsupportedModelError(HeadpatchError):
    """This model, or one of its layers, cannot do exactly what was asked; the message names the operand and the layer."""


class EngineError(HeadpatchError):
    """The engine is in a state, or was started with a feature, under which the edit would not be exact."""
