"""``headpatch find sinks`` and ``headpatch find sink-dimensions``: where attention goes that looks at nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")]
Text = Annotated[Path | None, typer.Option(help="A plain text. Default: a generated one.", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Seed = Annotated[int, typer.Option(help="Of the places in the text.")]


def register(group: typer.Typer) -> None:
    """Add both subcommands."""

    @group.command()
    def sinks(
        model: Model,
        text: Text = None,
        prompts: Annotated[int, typer.Option(help="Pieces of the text.", min=1)] = 32,
        tokens: Annotated[int, typer.Option(help="Tokens of each piece.", min=2)] = 64,
        eps: Annotated[float, typer.Option(help="Mean attention above which a head counts.", min=0.0, max=1.0)] = 0.3,
        position: Annotated[int, typer.Option(help="The position that is looked at.", min=0)] = 0,
        least: Annotated[
            float, typer.Option(help="Share of the pieces in which a sink head counts.", min=0.0, max=1.0)
        ] = 0.5,
        seed: Seed = 0,
        device: Device = "auto",
        dtype: Dtype = "float32",
        json: Json = False,
    ) -> None:
        """Measure how often heads pay one position, usually the first, a large average attention."""
        from headpatch.commands.calibrate import load
        from headpatch.errors import HeadpatchError
        from headpatch.find.haystack import load_haystack
        from headpatch.find.sinks import sink_metric
        from headpatch.terminal import console, plain_table, print_json

        haystack = load_haystack(text)
        loaded, tokenizer = load(model, device, dtype)
        rows, special = _pieces(loaded, tokenizer, haystack, prompts, tokens, seed)
        found = sink_metric(loaded, rows, tokens=tokens, eps=eps, position=position)
        heads = found.heads(least)
        means = {head: float(a.mean()) for head, a in found.alphas.items()}
        if json:
            print_json({
                "model": model, "data": haystack.about(), "prompts": prompts, "tokens": tokens, "eps": eps, "position": position,
                "first_token": special, "metric": found.value, "mean": found.mean, "sink_heads": heads,
                "frequencies": found.frequencies, "means": means,
            })  # fmt: skip
            return
        if not heads:
            raise HeadpatchError(
                f"this model shows no sinks at position {position}: no head pays it more than {eps:g} on average in {least:.0%} of "
                f"{prompts} pieces of {tokens} tokens (mean attention {found.mean:.3f}, the metric {found.value:.3f})"
            )
        out = sys.stdout.write
        out(f"Sink_{position} at eps {eps:g} and {tokens} tokens: {100 * found.value:.1f} % of pieces and heads\n")
        out(f"mean attention to position {position}: {found.mean:.3f}; the pieces begin with {special}\n")
        out(f"{len(heads)} of {len(means)} heads are sink heads\n")
        table = plain_table("head", "mean attention", "pieces above eps")
        for head in sorted(heads, key=lambda h: -means[h])[:20]:
            table.add_row(head, f"{means[head]:.3f}", f"{100 * found.frequencies[head]:.0f} %")
        console().print(table)

    @group.command("sink-dimensions")
    def dimensions(
        model: Model,
        text: Text = None,
        prompts: Annotated[int, typer.Option(help="Pieces of the text.", min=1)] = 50,
        tokens: Annotated[int, typer.Option(help="Tokens of each piece.", min=2)] = 128,
        layers: Annotated[
            str | None,
            typer.Option(
                help='Layers as in a selector, "3-29". Default: all but the first three and the last two, where a model has eight.',
                show_default=False,
            ),
        ] = None,
        threshold: Annotated[
            float | None, typer.Option(help="Default: 0.3125 times the root of the width.", show_default=False)
        ] = None,
        seed: Seed = 0,
        device: Device = "auto",
        dtype: Dtype = "float32",
        json: Json = False,
    ) -> None:
        """Find the dimensions of the residual stream that mark a model's sinks; an error where it shows none."""
        from headpatch.commands.calibrate import load
        from headpatch.find.haystack import load_haystack
        from headpatch.find.sink_dimensions import sink_dimensions
        from headpatch.terminal import print_json

        haystack = load_haystack(text)
        loaded, tokenizer = load(model, device, dtype)
        rows, _ = _pieces(loaded, tokenizer, haystack, prompts, tokens, seed)
        layers = layers or _inner(loaded)
        found = sink_dimensions(loaded, rows, layers=layers, threshold=threshold)
        if json:
            print_json({
                "model": model, "data": haystack.about(), "prompts": prompts, "tokens": tokens, "layers": layers,
                "sink_dimensions": list(found.dimensions), "sink_threshold": found.threshold, "width": found.width,
                "lift": found.lift,
            })  # fmt: skip
            return
        named = ", ".join(map(str, found.dimensions))
        sys.stdout.write(
            f"sink_dimensions: [{named}]\nsink_threshold: {found.threshold:.6g}\n# of {found.width}; the tokens they mark receive "
            f"{found.lift:.1f} times an even share of attention\n"
        )


def _inner(model: Any) -> str:
    """The layers between those where sinks form and those where they vanish."""
    from headpatch.registry import find_adapter

    shape = find_adapter(model).shape(model)
    count = shape.parts[shape.main].num_layers
    return f"3-{count - 3}" if count >= 8 else "*"


def _pieces(
    model: Any, tokenizer: Any, haystack: Any, prompts: int, tokens: int, seed: int
) -> tuple[list[tuple[int, ...]], str]:
    """Pieces of a text as tokens, the tokenizer's own first token included, and what they begin with, in words."""
    from headpatch.find.engine import open_bench
    from headpatch.find.needles import rng_of

    bench = open_bench(model, tokenizer)
    rows: list[tuple[int, ...]] = []
    for number in range(prompts):
        characters = 6 * tokens
        ids: tuple[int, ...] = ()
        while len(ids) < tokens:
            text = " ".join(haystack.draw(rng_of(seed, number), characters))
            ids, offsets = bench.encode(text)
            characters *= 2
        rows.append(ids[:tokens])
    special = offsets[0][1] == offsets[0][0]
    return rows, f"the special token {ids[0]}" if special else "a word, since the tokenizer adds no first token"
