"""``headpatch lm-eval``: lm-evaluation-harness with the model type ``headpatch``."""

from __future__ import annotations

from typing import Any

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        "lm-eval", add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )  # fmt: skip
    def lm_eval(context: typer.Context) -> None:
        """Run lm-evaluation-harness with `--model headpatch`; all arguments are the harness's own.

        headpatch lm-eval --model headpatch --model_args pretrained=MODEL,recipe=RECIPE --tasks TASK
        """
        import importlib

        # By name, because only adapters import engines; the harness's own model type is one.
        harness: Any = importlib.import_module(harness_module())
        harness.run(context.args)


def harness_module() -> str:
    """Where the harness's model type is: the module that the entry point ``lm_eval.models`` names."""
    from importlib.metadata import entry_points

    from headpatch.errors import EngineError

    for entry in entry_points(group="lm_eval.models"):
        if entry.name == "headpatch":
            return entry.module
    raise EngineError("headpatch's model type for lm-evaluation-harness is not installed; install headpatch again")
