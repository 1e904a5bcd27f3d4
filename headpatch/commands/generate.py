"""``headpatch generate``: a model's answer under a recipe, as it is written; with ``--compare`` beside the untouched one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def generate(
        prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
        model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
        recipe: Annotated[
            list[str] | None,
            typer.Option(
                "--recipe", "-r", help="Shipped name, file or hf://owner/repo; several stack.", show_default=False
            ),
        ] = None,
        compare: Annotated[
            bool, typer.Option("--compare", help="Show the untouched model's answer beside it.")
        ] = False,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 128,
        temperature: Annotated[
            float, typer.Option(help="0 takes the most probable token each time; above it tokens are drawn.", min=0.0)
        ] = 0.0,
        seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
        chat: Annotated[
            bool | None,
            typer.Option(help="Whether to use the chat template; default: where there is one.", show_default=False),
        ] = None,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
        ] = "auto",
        dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "auto",
    ) -> None:
        """Write an answer to a prompt under a recipe."""
        from headpatch.errors import HeadpatchError
        from headpatch.sources import load_recipe

        recipes = [load_recipe(name) for name in recipe or ()]
        if compare and not recipes:
            raise HeadpatchError("--compare needs a recipe to compare with; name one with --recipe")
        text = sys.stdin.read() if prompt == "-" else prompt
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
        }
        loaded, tokenizer = load(model, device, dtype)
        with hushed():
            (both if compare else one)(loaded, tokenizer, text, recipes, options)


def load(model: str, device: str = "auto", dtype: str = "auto", vision: bool = False) -> tuple[Any, Any]:
    """A model and its tokenizer (with `vision` its processor), by folder, hub name or the demo's short name; what takes time is said
    on stderr.
    """
    from headpatch.demo_model import locate
    from headpatch.find.engine import load_model
    from headpatch.terminal import console

    with hushed():
        return load_model(
            locate(model, lambda line: console(stderr=True).print(line, style="dim")),
            device=device,
            dtype=dtype,
            vision=vision,
        )


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No progress bars and warnings of any engine that can be asked to be silent, inside the with block."""
    from headpatch.registry import adapters

    with contextlib.ExitStack() as stack:
        for adapter in adapters():
            if hasattr(adapter, "hushed"):
                stack.enter_context(adapter.hushed())
        yield


def one(model: Any, tokenizer: Any, prompt: str, recipes: Sequence[Recipe], options: dict[str, Any]) -> None:
    """One answer, streamed to stdout."""
    from headpatch.registry import find_adapter

    def say(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    writer: Any = find_adapter(model)
    with applied_all(model, recipes):
        writer.write(model, tokenizer, prompt, say, **options)
    say("\n")


def both(model: Any, tokenizer: Any, prompt: str, recipes: Sequence[Recipe], options: dict[str, Any]) -> None:
    """Two answers side by side: untouched first, then patched."""
    from headpatch.registry import find_adapter
    from headpatch.terminal import SideBySide, console

    writer: Any = find_adapter(model)
    with SideBySide(console()) as columns:
        writer.write(model, tokenizer, prompt, columns.hear("untouched"), **options)
        with applied_all(model, recipes):
            writer.write(model, tokenizer, prompt, columns.hear("patched"), **options)


@contextlib.contextmanager
def applied_all(model: Any, recipes: Sequence[Recipe]) -> Iterator[None]:
    """Several recipes on a model for the length of a with block, in their order."""
    from headpatch.api import applied

    with contextlib.ExitStack() as stack:
        for recipe in recipes:
            stack.enter_context(applied(model, recipe))
        yield
