"""``headpatch find retrieval-heads`` and ``headpatch find streaming-heads``: scores of heads, and a recipe that keeps the best."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.find.ranking import HeadScores

__all__ = ["register", "write_recipe"]

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The recipe; without it scores are only shown.", show_default=False),
]
Scores = Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.", show_default=False)]
Text = Annotated[
    Path | None, typer.Option(help="A plain text to hide things in. Default: a generated one.", show_default=False)
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of KV heads that stream. Default: 0.5, or 0.75 where every query head has its own.",
        show_default=False,
    ),
]
Sink = Annotated[int, typer.Option(help="First tokens that streaming heads keep.", min=0)]
Recent = Annotated[int, typer.Option(help="Last tokens that streaming heads keep.", min=1)]
Chat = Annotated[
    bool | None,
    typer.Option(help="Whether to use the chat template; default: where there is one.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of texts and of what is hidden in them.")]
Name = Annotated[str | None, typer.Option(help="Name of the recipe. Default: of its file.", show_default=False)]
ModelName = Annotated[
    str | None, typer.Option(help="Name of the model in the recipe. Default: --model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")]
Top = Annotated[int, typer.Option(help="Heads to show.", min=0)]


def register(group: typer.Typer) -> None:
    """Add both subcommands."""

    @group.command("retrieval-heads")
    def retrieval(
        context: typer.Context,
        model: Model,
        output: Output = None,
        scores: Scores = None,
        text: Text = None,
        lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "256,512,1024",
        depths: Annotated[str, typer.Option(help="Depths of the needle, in percent.")] = "0,25,50,75,100",
        rounds: Annotated[int, typer.Option(help="Prompts of every length and depth.", min=1)] = 3,
        stable: Annotated[
            int, typer.Option(help="Stop when the ten best heads stayed the same for so many rounds; 0 never.", min=0)
        ] = 0,
        needle: Annotated[str, typer.Option(help="What is hidden: fact, number or words.")] = "fact",
        sentence: Annotated[str | None, typer.Option(help="A needle of your own, ...", show_default=False)] = None,
        question: Annotated[str | None, typer.Option(help="... what to ask, ...", show_default=False)] = None,
        answer: Annotated[
            str | None, typer.Option(help="... and the words of it to be copied.", show_default=False)
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 50,
        sparsity: Sparsity = None,
        sink: Sink = 64,
        recent: Recent = 256,
        chat: Chat = None,
        seed: Seed = 0,
        name: Name = None,
        model_name: ModelName = None,
        device: Device = "auto",
        dtype: Dtype = "float32",
        top: Top = 20,
    ) -> None:
        """Find heads that copy from anywhere in the context, by what they look at while the model copies.

        A KV head is as good as the best of the query heads that it serves; the recipe lets the best KV heads keep everything.
        """
        from headpatch.commands.calibrate import load
        from headpatch.commands.options import again, chat_of, needle_of, numbers, percents
        from headpatch.find.haystack import load_haystack
        from headpatch.find.retrieval import Probe, retrieval_heads
        from headpatch.terminal import Shown

        haystack, own = load_haystack(text), needle_of(sentence, question, answer)
        sizes, places = numbers(lengths, "--lengths"), percents(depths, "--depths")
        loaded, tokenizer = load(model, device, dtype)
        probe = Probe(
            sizes,
            places,
            rounds,
            needle,
            own,
            chat_of(chat, loaded, tokenizer),
            max_new_tokens,
            stable=stable,
            seed=seed,
        )
        with Shown() as shown:
            found = retrieval_heads(
                loaded, tokenizer, probe, haystack=haystack, model_name=_named(model, model_name), progress=shown.progress,
                say=shown.say,
            )  # fmt: skip
        good = [r for r in found.runs if r.success]
        sys.stdout.write(
            f"{len(good)} of {len(found.runs)} needles found; {len(found.heads())} heads score above 0.1\n"
        )
        _show(found.scores, top, found.errors)
        _finish(context, again(context), loaded, found.scores, output, scores, sparsity, sink, recent, name)

    @group.command("streaming-heads")
    def streaming(
        context: typer.Context,
        model: Model,
        output: Output = None,
        score: Annotated[
            str, typer.Option(help="gates (trained, as in DuoAttention) or quick (one forward pass per sample).")
        ] = "gates",
        scores: Scores = None,
        text: Text = None,
        lengths: Annotated[str, typer.Option(help="Shortest and longest sample, in tokens.")] = "1000,32000",
        passkeys: Annotated[int, typer.Option(help="Passkeys in a sample.", min=1, max=12)] = 10,
        words: Annotated[int, typer.Option(help="Words of a passkey.", min=1)] = 32,
        steps: Annotated[int, typer.Option(help="Training steps, a sample each.", min=1)] = 2000,
        samples: Annotated[int, typer.Option(help="Samples of the quick score.", min=1)] = 8,
        rate: Annotated[float, typer.Option(help="Learning rate of the gates.")] = 0.02,
        reg: Annotated[float, typer.Option(help="Weight of the gates' mean in the loss.")] = 0.05,
        full: Annotated[
            str, typer.Option(help="Whose full attention the student mixes with: teacher, as released, or student.")
        ] = "teacher",
        recompute: Annotated[
            bool, typer.Option(help="Save memory by computing each layer again on the way back.")
        ] = True,
        train_sink: Annotated[
            int | None,
            typer.Option(
                help="First tokens that streaming heads see while they are scored.", show_default="--sink", min=0
            ),
        ] = None,
        train_recent: Annotated[
            int | None, typer.Option(help="Last tokens, likewise.", show_default="--recent", min=1)
        ] = None,
        sparsity: Sparsity = None,
        sink: Sink = 128,
        recent: Recent = 256,
        chat: Chat = None,
        seed: Seed = 42,
        name: Name = None,
        model_name: ModelName = None,
        restart: Annotated[
            bool, typer.Option("--restart", help="Forget what an interrupted run has learned.")
        ] = False,
        device: Device = "auto",
        dtype: Dtype = "float32",
        top: Top = 20,
    ) -> None:
        """Find heads that do without the middle of the context; the recipe lets all others keep everything.

        The training is kept in OUTPUT.work: interrupt it when you like, and the same command goes on from there.
        """
        from headpatch.commands.calibrate import load
        from headpatch.commands.options import again, chat_of, numbers
        from headpatch.errors import HeadpatchError
        from headpatch.find.gates import Training, train_gates
        from headpatch.find.haystack import load_haystack
        from headpatch.find.loss import near_loss
        from headpatch.find.passkeys import Passkeys
        from headpatch.terminal import Shown

        if score not in ("gates", "quick"):
            raise HeadpatchError(f"no score {score!r}; choose gates or quick")
        span = numbers(lengths, "--lengths")
        if len(span) != 2:
            raise HeadpatchError(f"--lengths takes the shortest and the longest, as in 1000,32000; got {lengths!r}")
        near = (sink if train_sink is None else train_sink, recent if train_recent is None else train_recent)
        haystack, work = load_haystack(text), _work(output, scores)
        if restart and work is not None:
            work.unlink(missing_ok=True)
        Training(
            Passkeys(*span, count=passkeys, words=words), *near, steps, rate, reg, full
        )  # checked before a model is loaded
        loaded, tokenizer = load(model, device, dtype)
        keys = Passkeys(*span, count=passkeys, words=words, chat=chat_of(chat, loaded, tokenizer), seed=seed)
        shown_as: dict[str, Any] = {"haystack": haystack, "model_name": _named(model, model_name)}
        with Shown() as shown:
            if score == "quick":
                found = near_loss(
                    loaded,
                    tokenizer,
                    keys,
                    samples=samples,
                    sink=near[0],
                    recent=near[1],
                    progress=shown.progress,
                    **shown_as,
                )
            else:
                training = Training(keys, *near, steps, rate, reg, full, recompute)
                found = train_gates(
                    loaded, tokenizer, training, work=work, progress=shown.progress, say=shown.say, **shown_as
                ).scores
        _show(found, top)
        _finish(context, again(context), loaded, found, output, scores, sparsity, sink, recent, name)
        if score == "gates" and work is not None:
            sys.stdout.write(f"{work} keeps what was learned and may be deleted\n")


def write_recipe(
    found: HeadScores, part: Any, output: Path, *, sparsity: float | None, threshold: float | None, sink: int, recent: int,
    name: str | None, command: str, description: str | None = None,
) -> None:  # fmt: skip
    """Write the recipe that keeps the best KV heads whole, and say so."""
    from headpatch.find.ranking import default_sparsity, keep_full

    if sparsity is None and threshold is None:
        sparsity = default_sparsity(part)
    recipe = keep_full(
        found.of_kv_heads(part), part, sink=sink, recent=recent, sparsity=sparsity, threshold=threshold, name=name or output.stem,
        description=description, provenance={"command": command},
    )  # fmt: skip
    recipe.save(output)
    sys.stdout.write(f"wrote {output}: {recipe.description}\n")


def _named(model: str, name: str | None) -> str:
    return name or (Path(model).name if Path(model).exists() else model)


def _work(output: Path | None, scores: Path | None) -> Path | None:
    """Beside what is written, so that the same command finds it again; nothing is kept where nothing is written."""
    beside = output or scores
    return None if beside is None else beside.with_name(f"{beside.name}.work")


def _show(found: HeadScores, top: int, errors: Any = None) -> None:
    """The best heads as a table on stdout."""
    from headpatch.terminal import console, plain_table

    if not top:
        return
    table = plain_table(
        {"query": "head", "kv": "KV head"}[found.kind], found.what, *(["standard error"] if errors else [])
    )
    for layer, head, value in found.ranked()[:top]:
        extra = [f"{errors[layer][head]:.3f}"] if errors else []
        table.add_row(f"{layer}.{head}", f"{value:.4g}", *extra)
    console().print(table)


def _finish(
    context: typer.Context, command: str, model: Any, found: HeadScores, output: Path | None, scores: Path | None,
    sparsity: float | None, sink: int, recent: int, name: str | None,
) -> None:  # fmt: skip
    from headpatch.registry import find_adapter

    if scores is not None:
        found.save(scores)
        sys.stdout.write(f"wrote {scores}: all scores; `headpatch find pick` makes recipes of them\n")
    if output is None:
        return
    shape = find_adapter(model).shape(model)
    write_recipe(
        found,
        shape.parts[shape.main],
        output,
        sparsity=sparsity,
        threshold=None,
        sink=sink,
        recent=recent,
        name=name,
        command=command,
    )
    measured = context.params["model"]
    sys.stdout.write(f"measure it:  headpatch eval-needle --model {measured} --recipe {output}\n")
