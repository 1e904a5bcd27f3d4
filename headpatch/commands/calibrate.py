"""``headpatch calibrate``: choose heads and strengths on data, and write a recipe. One subcommand per method.

All subcommands share the options of :func:`headpatch.commands.calibrate_options.shared`; each adds a few of its own. The option of
the strength bears its name in recipes.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headpatch.commands.calibrate_options import KINDS, shared, signature

if TYPE_CHECKING:
    from headpatch.find.calibration import Calibration
    from headpatch.find.subject import Settings, Subject

__all__ = ["load", "register"]


def register(app: typer.Typer) -> None:
    """Add the command and its subcommands."""
    from headpatch.commands import tasks

    group = typer.Typer(no_args_is_help=True, help="Choose heads and strengths for a task, and write a recipe.")
    app.add_typer(group, name="calibrate")

    @group.callback()
    def common() -> None:
        """Choose heads and strengths for a task, and write a recipe."""

    for name in KINDS:
        group.command(name)(_subcommand(name))
    tasks.register(group)


def _subcommand(method: str) -> Callable[..., None]:
    """The function of one subcommand: a signature of its own options and the shared ones."""

    def command(**given: Any) -> None:
        _calibrate(method, given)

    command.__doc__, command.__name__ = KINDS[method][0].__doc__, method
    command.__signature__ = signature(method)  # type: ignore[attr-defined]
    return command


def _subject(method: str, given: Mapping[str, Any]) -> tuple[Subject, Mapping[str, Settings]]:
    """What the method brings, and its efforts."""
    from headpatch.find import act, pasta, zerotuning

    params = tuple(sorted((key, given[key]) for key in KINDS[method][2] if given[key] is not None))
    if method == "act":
        return act.Act(params=params), act.EFFORTS
    if method == "pasta":
        return pasta.Pasta(params=params), pasta.EFFORTS
    return zerotuning.SUBJECT, zerotuning.EFFORTS


def _calibrate(method: str, given: dict[str, Any]) -> None:
    from headpatch.errors import HeadpatchError
    from headpatch.find.calibration import calibrate
    from headpatch.find.data import Task, load_rows, parse_labels, unescape
    from headpatch.terminal import Shown

    subject, known = _subject(method, given)
    effort, output = given["effort"], given["output"]
    if effort not in known:
        raise HeadpatchError(f"no effort {effort!r}; choose {', '.join(known)}")
    preset = known[effort]
    settings = dataclasses.replace(preset, **_settings(method, given))
    task = Task(
        tuple(unescape(t) for t in given["template"]), parse_labels(given["labels"]), given["label_field"], given["chat"],
        tuple(given.get("span_field") or ()),
    )  # fmt: skip
    rows, test = load_rows(given["train"]), load_rows(given["eval_"])
    work = output.with_name(f"{output.name}.work")
    if given["restart"]:
        work.unlink(missing_ok=True)
    command = _command(method, given, settings, preset)
    verify = _verify(given)
    loaded, tokenizer = load(given["model"], given["device"], given["dtype"])
    with Shown() as shown:
        found = calibrate(
            subject, loaded, tokenizer, rows, test, task, settings, name=given["name"] or output.stem,
            description=given["description"], model_name=given["model_name"], work=work,
            provenance=_provenance(command, verify, given["train"], given["eval_"], len(rows), len(test)),
            progress=shown.progress, say=shown.say,
        )  # fmt: skip
    if given["profile"] is not None:
        _write_profile(found, given["profile"])
    _finish(found, subject, output, work)


def _settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the options override."""
    strengths = given[KINDS[method][1]]
    found = {
        "strengths": tuple(strengths) if strengths else None, "screen": _numbers("screen", given["screen"], "60,180"),
        "keep": None if given["keep"] is None else given["keep"] / 100,
        "perplexity": None if given["perplexity"] is None else given["perplexity"] / 100,
        **{k: given[k] for k in ("metric", "held_out", "rounds", "width", "max_steps", "layers", "seed", "anyway", "slopes")},
        "indices": given.get("indices"),
    }  # fmt: skip
    if (top := _numbers("top", given.get("top"), "5,10,20")) is not None:
        found["top"] = tuple(k for k in top if k)
    return {k: v for k, v in found.items() if v is not None}


def load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer, by folder, hub name or the demo's short name."""
    from headpatch.commands.generate import load as load_named

    return load_named(model, device, dtype)


def _numbers(option: str, text: str | None, example: str) -> tuple[int, ...] | None:
    from headpatch.errors import HeadpatchError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise HeadpatchError(f'--{option} takes numbers, as in "{example}"; got {text!r}') from None


def _write_profile(found: Calibration, path: Path) -> None:
    import json

    steps = [{"score": s.score, "heads": [[c.selector, c.strength] for c in s.combo]} for s in found.path]
    path.write_text(
        json.dumps({"edits": found.profile(), "path": steps, "choice": found.choice.why}, indent=1) + "\n", "utf-8"
    )


def _finish(found: Calibration, subject: Subject, output: Path, work: Path) -> None:
    write = sys.stdout.write
    write("\n")
    for side, words, heads in zip(
        ("up", "down"), subject.directions, (found.up_effective(), found.down_effective()), strict=True
    ):
        if words:
            write(f"{side}-effective ({words}): {', '.join(heads) or 'none'}\n")
    write("\n" + "\n".join(found.report.lines()) + "\n\n")
    if found.recipe is None:
        write(f"no recipe: {found.choice.why}. {work} keeps what was measured.\n")
        return
    found.recipe.save(output)
    write(f"wrote {output} ({found.choice.why}); {work} keeps what was measured and may be deleted\n")
    write(f"measure again:     {found.recipe.provenance['verify']}\n")
    write(f"search once more:  {found.recipe.provenance['command']}\n")


def _provenance(
    command: str, verify: str, train: Path, evaluation: Path, rows: int, test: int
) -> dict[str, Any]:  # fmt: skip
    from headpatch.find.data import file_sha256

    return {
        "command": command,
        "verify": verify,
        "data": {
            "train": {"file": train.name, "sha256": file_sha256(train), "rows": rows},
            "eval": {"file": evaluation.name, "sha256": file_sha256(evaluation), "rows": test},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _named(model: str) -> str:
    return Path(model).name if Path(model).exists() else model


def _verify(given: Mapping[str, Any]) -> str:
    """The command that measures the recipe's figures again, on any machine; templates, labels and spans are in the recipe."""
    words = ["headpatch", "eval", "--model", _named(given["model"]), "--recipe", given["output"].name]
    words += ["--data", given["eval_"].name]
    for option in ("label_field", "dtype"):
        words += _unless_default(option, given)
    return shlex.join(words)


def _unless_default(option: str, given: Mapping[str, Any]) -> list[str]:
    default = inspect.signature(shared).parameters[option].default
    return [] if given[option] == default else [f"--{option.replace('_', '-')}", str(given[option])]


def _command(method: str, given: Mapping[str, Any], settings: Settings, preset: Settings) -> str:
    """The command that does this again: options that differ from their defaults, files by name."""
    words = ["headpatch", "calibrate", method, "--model", _named(given["model"])]
    words += ["--train", given["train"].name, "--eval", given["eval_"].name]
    for template in given["template"]:
        words += ["--template", template]
    words += ["--labels", given["labels"], "-o", given["output"].name, "--effort", given["effort"]]
    words += _unless_default("label_field", given)
    words += ["--chat"] if given["chat"] else []
    words += _unless_default("dtype", given)
    for field in given.get("span_field") or ():
        words += ["--span-field", field]
    for key in KINDS[method][2]:
        if given[key] is not None:
            words += _flag(key, given[key])
    changed = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != getattr(preset, f.name)
    }
    for key, value in changed.items():
        if key == "strengths":
            words += [w for g in value for w in (f"--{KINDS[method][1]}", f"{g:g}")]
        elif key in ("screen", "top"):
            words += [f"--{key}", ",".join(map(str, value)) or "0"]
        elif key == "anyway":
            words += ["--anyway"]
        elif key in ("keep", "perplexity"):
            words += [f"--{key}", f"{100 * value:g}"]
        else:
            words += _flag(key, value)
    return shlex.join(words)


def _flag(key: str, value: Any) -> list[str]:
    option = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
