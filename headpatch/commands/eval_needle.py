"""``headpatch eval-needle``: is what was said long ago still found? A grid of lengths and depths, with and without recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("eval-needle")
    def needles(
        model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
        recipe: Annotated[
            list[str] | None,
            typer.Option(
                "--recipe",
                "-r",
                help="Shipped name, file or hf://owner/repo; several are compared.",
                show_default=False,
            ),
        ] = None,
        lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "256,512,1024,2048",
        depths: Annotated[str, typer.Option(help="Depths of the needle, in percent.")] = "0,25,50,75,100",
        prompts: Annotated[int, typer.Option(help="Prompts of each length and depth.", min=1)] = 4,
        needle: Annotated[
            str, typer.Option(help="What is hidden: fact, number or words (the latter two are passkeys).")
        ] = "fact",
        sentence: Annotated[str | None, typer.Option(help="A needle of your own, ...", show_default=False)] = None,
        question: Annotated[str | None, typer.Option(help="... what to ask, ...", show_default=False)] = None,
        answer: Annotated[str | None, typer.Option(help="... and the answer.", show_default=False)] = None,
        text: Annotated[
            Path | None, typer.Option(help="A plain text to hide it in. Default: a generated one.", show_default=False)
        ] = None,
        chat: Annotated[
            bool | None,
            typer.Option(help="Whether to use the chat template; default: where there is one.", show_default=False),
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 48,
        seed: Annotated[int, typer.Option(help="Of needles and texts.")] = 0,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
        ] = "auto",
        dtype: Annotated[
            str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")
        ] = "float32",
        png: Annotated[
            Path | None, typer.Option("--png", help="Also draw the grids into this PNG file.", show_default=False)
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    ) -> None:
        """Measure whether a needle in a long text is found, by its length and the needle's depth."""
        from headpatch.commands.calibrate import load
        from headpatch.commands.options import chat_of, needle_of, numbers, percents
        from headpatch.errors import HeadpatchError
        from headpatch.find.haystack import load_haystack
        from headpatch.needle_grid import evaluate_needles
        from headpatch.sources import load_recipe
        from headpatch.terminal import Shown, print_json

        recipes = {}
        for given in recipe or ():
            one = load_recipe(given)
            name = given if (one.name or given) in recipes else one.name or given
            if name in recipes:
                raise HeadpatchError(f"the recipe {given} is named twice")
            recipes[name] = one
        haystack, own = load_haystack(text), needle_of(sentence, question, answer)
        sizes, places = numbers(lengths, "--lengths"), percents(depths, "--depths")
        loaded, tokenizer = load(model, device, dtype)
        in_chat = chat_of(chat, loaded, tokenizer)
        with Shown() as shown:
            grid = evaluate_needles(
                loaded, tokenizer, recipes, lengths=sizes, depths=places, prompts=prompts, kind=needle, needle=own, haystack=haystack,
                chat=in_chat, max_new_tokens=max_new_tokens, seed=seed, progress=shown.progress,
            )  # fmt: skip
        if png is not None:
            from headpatch import plots

            plots.save_figure(plots.draw_needles(grid), png)
        if json:
            print_json(grid.plain())
            return
        sys.stdout.write("\n".join(grid.lines()) + "\n")
        if png is not None:
            sys.stdout.write(f"drawn into {png}\n")
