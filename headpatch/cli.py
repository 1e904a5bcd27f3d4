"""The command ``headpatch``. Each command is a module of :mod:`headpatch.commands`; this one puts them together.

Errors that headpatch raises on purpose, and files that cannot be read or written, end in one line on stderr and status 2; the
traceback is shown with ``headpatch --debug COMMAND ...``. Status 1 says that a check failed, 130 that the user interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from headpatch import __version__
from headpatch.commands import COMMANDS
from headpatch.errors import HeadpatchError

__all__ = ["build", "main"]

FAILED, WRONG, INTERRUPTED = 1, 2, 130


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headpatch {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The command-line application, with every command of :data:`headpatch.commands.COMMANDS`; imports no engine."""
    app = typer.Typer(
        name="headpatch", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
        help="Change what single attention heads do, in a model that is already running.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip

    @app.callback()
    def common(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
        ] = False,
    ) -> None:
        """What every command takes; `main` reads --debug itself, before anything can go wrong."""

    for name in COMMANDS:
        importlib.import_module(f"headpatch.commands.{name}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``headpatch`` with `arguments` (default: those of the process) and return the exit status.

    Raises
    ------
    Exception
        Whatever went wrong, if ``--debug`` stands before the command; otherwise nothing.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given[: next((i for i, word in enumerate(given) if not word.startswith("-")), len(given))]
    try:
        build()(given, prog_name="headpatch")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
        if code == INTERRUPTED:
            _complain("interrupted")
        return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except HeadpatchError as error:
        if debug:
            raise
        _complain(str(error))
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        _complain(f"{error.strerror or error}{where}")
    except ModuleNotFoundError as error:
        if debug:
            raise
        _complain(f"{error}; pip install 'headpatch[hf]' brings the usual engine and all that goes with it")
    except Exception as error:
        if debug:
            raise
        _complain(
            f"{type(error).__name__}: {error}\n`headpatch --debug ...` shows where; if headpatch is to blame, please report it"
        )
    return WRONG


def _complain(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {text}\n")
