"""``headpatch calibrate soft-injection`` and ``function-vector``: a task's question-answer pairs as a recipe with arrays."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.tune.pairs import Split
    from headpatch.tune.tasks import LearnedTask

__all__ = ["register"]

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")]
Train = Annotated[Path, typer.Option(help="JSON lines, a question and its answer in each.")]
Test = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        help="JSON lines: figures are of these rows. Default: 21 percent of the training rows.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The recipe; its arrays lie beside it.")]
QuestionField = Annotated[str, typer.Option(help="Field with the question.")]
AnswerField = Annotated[str, typer.Option(help="Field with the answer.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Prompts in the model's chat template; serve the recipe with that, too.")
]
Prompts = Annotated[int, typer.Option(help="Few-shot prompts whose head outputs are averaged.")]
Shots = Annotated[int, typer.Option(help="Demonstrations in each.")]
Validation = Annotated[int, typer.Option(help="Rows, at most, that choose the best state; 9 percent are kept for it.")]
Case = Annotated[bool, typer.Option("--case", help="Answers in another letter case are wrong.")]
Seed = Annotated[int, typer.Option(help="Of the split, the prompts and the order of rows.")]
Name = Annotated[str | None, typer.Option(help="Name of the recipe. Default: of its file.", show_default=False)]
Description = Annotated[str | None, typer.Option(help="What it does, in a sentence.", show_default=False)]
ModelName = Annotated[
    str | None, typer.Option(help="Name of the model in the recipe. Default: --model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")]


def register(group: typer.Typer) -> None:
    """Add the subcommands to ``calibrate``."""

    @group.command("soft-injection")
    def soft_injection(
        context: typer.Context, model: Model, train: Train, output: Output, test: Test = None,
        question_field: QuestionField = "input",
        answer_field: AnswerField = "output", chat: Chat = False, prompts: Prompts = 50, shots: Shots = 10,
        steps: Annotated[int, typer.Option(help="Steps of gradient descent.")] = 400,
        batch: Annotated[int, typer.Option(help="Training rows in each.")] = 1,
        lr: Annotated[float, typer.Option(help="Rate.")] = 0.2,
        every: Annotated[int, typer.Option(help="Steps from one look at the validation rows to the next.")] = 50,
        validation: Validation = 100,
        threshold: Annotated[float, typer.Option(help="Heads that take less of their vector are left out.")] = 0.01,
        loss: Annotated[
            str, typer.Option(help="answer: of all of the answer and the line's end; first: of its first token, as published.")
        ] = "answer",
        case: Case = False, seed: Seed = 0, name: Name = None, description: Description = None, model_name: ModelName = None,
        restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run has learned.")] = False,
        device: Device = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        """Learn a task from pairs of question and answer, so that zero-shot prompts are answered as with demonstrations.

        What is learned is kept in OUTPUT.work: interrupt it when you like, and the same command goes on from there.
        """
        from headpatch.commands.generate import load
        from headpatch.terminal import Shown
        from headpatch.tune.pairs import Format
        from headpatch.tune.soft import Settings
        from headpatch.tune.tasks import learn_injection

        settings = Settings(prompts, shots, steps, batch, lr, every, validation, seed, loss)
        parts = _parts(train, test, question_field, answer_field, seed)
        work = output.with_name(f"{output.name}.work")
        if restart:
            work.unlink(missing_ok=True)
        loaded, tokenizer = load(model, device, dtype)
        with Shown() as shown:
            if work.exists():
                shown.say(f"going on from {work}")
            shown.say(f"embedding: {prompts} prompts of {shots} demonstrations")
            found = learn_injection(
                loaded, tokenizer, parts, Format(chat=chat), settings, threshold=threshold, case=case, name=name or output.stem,
                description=description, model_name=model_name or _plain(model), work=work,
                provenance=_provenance(context, train, test),
                progress=lambda s: shown.progress(f"learning, loss {s.loss:.3f}", s.step, s.steps, "learning"),
            )  # fmt: skip
        _finish(found, output)
        work.unlink(missing_ok=True)

    @group.command("function-vector")
    def function_vector(
        context: typer.Context, model: Model, train: Train, output: Output, test: Test = None,
        question_field: QuestionField = "input",
        answer_field: AnswerField = "output", chat: Chat = False, prompts: Prompts = 50, shots: Shots = 10,
        heads: Annotated[int, typer.Option(help="Heads that the vector is the sum of.")] = 10,
        validation: Validation = 100, case: Case = False, seed: Seed = 0, name: Name = None, description: Description = None,
        model_name: ModelName = None, device: Device = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        """Find the heads that carry a task from its demonstrations, and the one vector that they write."""
        from headpatch.commands.generate import load
        from headpatch.terminal import Shown
        from headpatch.tune.pairs import Format
        from headpatch.tune.soft import Settings
        from headpatch.tune.tasks import learn_function_vector

        settings = Settings(prompts=prompts, shots=shots, validation=validation, seed=seed)
        parts = _parts(train, test, question_field, answer_field, seed)
        loaded, tokenizer = load(model, device, dtype)
        with Shown() as shown:
            shown.say(f"embedding: {prompts} prompts of {shots} demonstrations")
            found = learn_function_vector(
                loaded, tokenizer, parts, Format(chat=chat), settings, heads=heads, case=case, name=name or output.stem,
                description=description, model_name=model_name or _plain(model), provenance=_provenance(context, train, test),
                progress=lambda done, total: shown.progress("heads that carry the task", done, total),
            )  # fmt: skip
        _finish(found, output)


def _parts(train: Path, test: Path | None, question: str, answer: str, seed: int) -> Split:
    from headpatch.find.data import load_rows
    from headpatch.tune.pairs import Split, pairs_of, split

    pairs = pairs_of(load_rows(train), question, answer)
    if test is None:
        return split(pairs, seed)
    parts = split(pairs, seed, test=0.0)
    return Split(parts.train, parts.valid, tuple(pairs_of(load_rows(test), question, answer)))


def _provenance(context: typer.Context, train: Path, test: Path | None) -> dict[str, Any]:
    from headpatch.find.data import file_sha256

    files = {"train": train, **({} if test is None else {"eval": test})}
    return {
        "command": _command(context),
        "data": {name: {"file": path.name, "sha256": file_sha256(path)} for name, path in files.items()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _command(context: typer.Context) -> str:
    """The command that does this again: options as they were given, files by name."""
    words = ["headpatch", "calibrate", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name == "restart":
            continue
        words.append(max(parameter.opts, key=len))
        if not isinstance(value, bool):
            words.append(value.name if isinstance(value, Path) else _plain(str(value)))
    return shlex.join(words)


def _plain(model: str) -> str:
    return Path(model).name if Path(model).exists() else model


def _finish(found: LearnedTask, output: Path) -> None:
    sys.stdout.write("\n" + "\n".join(found.lines()) + "\n")
    if found.learned is not None:
        losses = ", ".join(f"{x:.3f}" for x in found.learned.valid)
        sys.stdout.write(f"validation loss: {losses} nats; kept: the state after {found.learned.step} steps\n")
    found.recipe.save(output)
    assert found.recipe.tensors is not None
    sys.stdout.write(f"wrote {output} and {output.with_name(found.recipe.tensors.file)}\n")
