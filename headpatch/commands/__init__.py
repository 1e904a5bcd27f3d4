"""One module per command of ``headpatch``; each has ``register(app)``, which adds its command to the application.

No module here imports torch or an engine at its top: ``headpatch --help`` must be quick.
"""

from __future__ import annotations

__all__ = ["COMMANDS"]

COMMANDS = (
    "demo",
    "recipes",
    "methods",
    "show",
    "check",
    "generate",
    "calibrate",
    "find",
    "import_",
    "eval",
    "eval_needle",
    "lm_eval",
    "export",
    "serve",
    "doctor",
)
"""Modules of this package, in the order in which ``headpatch --help`` lists them: a command's name, with _ for -, and one
more where the name means something in Python."""
