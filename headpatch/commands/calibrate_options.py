"""Options of ``headpatch calibrate``: those that every subcommand has, and those of each method, as signatures for typer."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["KINDS", "shared", "signature"]

Strengths = Annotated[
    list[float] | None, typer.Option(help="Strengths to try; give it several times.", show_default=False)
]
Top = Annotated[
    str | None,
    typer.Option(
        help='Sizes of lists of the best single heads to try as they are: "5,10,20"; 0 for none.', show_default=False
    ),
]


def shared(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
    train: Annotated[Path, typer.Option(help="JSON lines: heads are chosen on these rows.")],
    eval_: Annotated[
        Path,
        typer.Option("--eval", help="JSON lines: figures are reported on these rows; nothing is chosen on them."),
    ],
    template: Annotated[
        list[str],
        typer.Option(help=r"Prompt with {field} for a row's field; \n is a line break. Several are averaged."),
    ],
    labels: Annotated[
        str,
        typer.Option(
            help='"negative, positive" answers with " negative" and " positive"; "NUM= number, ..."; or JSON.'
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe.")],
    label_field: Annotated[str, typer.Option(help="Field with the label.")] = "label",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, probability (of the right label), or entropy, which needs no labels.",
            show_default="probability",
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(help="quick, standard, or thorough (for a GPU); options below override parts of it.")
    ] = "standard",
    screen: Annotated[
        str | None, typer.Option(help='Rows to search on, in stages: "60,180".', show_default=False)
    ] = None,
    held_out: Annotated[int | None, typer.Option(help="Rows that choose between results.", show_default=False)] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Points that unrestricted accuracy and valid answers may lose.", show_default="1"),
    ] = None,
    perplexity: Annotated[
        float | None, typer.Option(help="Percent that the neutral text's perplexity may rise.", show_default="2")
    ] = None,
    slopes: Annotated[
        float | None,
        typer.Option(
            help="Share of the edits that are measured at all, by the slopes that a backward pass gives.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Times that edits are measured around a combination.", show_default=False)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Combinations measured per step.", show_default=False)] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps of the combination at most.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Layers to try, as in a selector: "2-28".', show_default="all")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write the best combination even if held-out rows do not confirm it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the split and of the random heads.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Name of the recipe. Default: of its file.", show_default=False)
    ] = None,
    description: Annotated[str | None, typer.Option(help="What it does, in a sentence.", show_default=False)] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model in the recipe. Default: --model.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Write what single edits do, and the path of combinations, to this JSON file.", show_default=False
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run has measured.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "float32",
) -> None:
    """Options of every subcommand."""


def _zerotuning(
    gamma: Strengths = None,
    indices: Annotated[bool, typer.Option(help="Try one head index in all layers, too.")] = True,
) -> None:
    """Choose heads whose attention to the first token is rescaled (ZeroTuning), and by how much.

    What is measured is kept in OUTPUT.work: interrupt it when you like, and the same command goes on from there.
    """


def _act(
    beta: Strengths = None,
    threshold: Annotated[
        float | None, typer.Option(help="Mean attention from which a key is a sink.", show_default="0.1")
    ] = None,
    threshold_per: Annotated[
        Literal["fixed", "prompt_length"] | None,
        typer.Option(help="Whether the threshold is divided by the prompt's length.", show_default="fixed"),
    ] = None,
    min_queries: Annotated[
        int | None, typer.Option(help="Keys that fewer queries see are no sinks.", show_default="1")
    ] = None,
    top: Top = None,
) -> None:
    """Choose heads in which sinks amid the prompt should get less attention (ACT), and how much less.

    Heads without such sinks on the training rows are left out. What is measured is kept in OUTPUT.work: interrupt it when you like,
    and the same command goes on from there.
    """


def _pasta(
    span_field: Annotated[
        list[str], typer.Option(help="Field with the marked piece of the row's prompt (or a list of pieces).")
    ],
    alpha: Strengths = None,
    target_mass: Annotated[
        float | None, typer.Option(help="Steer only rows that give the spans less than this share.", show_default="0")
    ] = None,
    keep_first: Annotated[
        bool | None, typer.Option(help="Leave attention to the first token alone.", show_default="no")
    ] = None,
    top: Top = None,
) -> None:
    """Profile heads for steering towards spans that the caller marks (PASTA), and choose some.

    What is measured is kept in OUTPUT.work: interrupt it when you like, and the same command goes on from there.
    """


KINDS: Mapping[str, tuple[Callable[..., None], str, tuple[str, ...]]] = {
    "zerotuning": (_zerotuning, "gamma", ()),
    "act": (_act, "beta", ("threshold", "threshold_per", "min_queries")),
    "pasta": (_pasta, "alpha", ("target_mass", "keep_first")),
}
"""Per method: its own options, the one that is the strength, and those that are parameters of the patch."""


def signature(method: str) -> inspect.Signature:
    """Shared options and a method's own, all by keyword, with their annotations resolved."""
    return inspect.Signature(
        [
            p.replace(annotation=typing.get_type_hints(f, include_extras=True)[p.name], kind=p.KEYWORD_ONLY)
            for f in (shared, KINDS[method][0])
            for p in inspect.signature(f).parameters.values()
        ]
    )
