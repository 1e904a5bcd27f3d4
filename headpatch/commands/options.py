"""What several commands do with their options: needles, percentages, the chat template, and the command that does the same again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

    from headpatch.find.needles import Needle

__all__ = ["again", "chat_of", "needle_of", "numbers", "percents"]


def again(context: typer.Context) -> str:
    """The command line that does this again: options that differ from their defaults, files and local models by name."""
    words = context.command_path.split()
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if value is None or value == param.get_default(context) or value == ():
            continue
        option = max(param.opts, key=len)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool):
                words.append(option if one else max(param.secondary_opts, key=len))
                continue
            text = (
                Path(one).name if isinstance(one, Path) or (param.name == "model" and Path(one).exists()) else str(one)
            )
            words += [text] if param.param_type_name == "argument" else [option, text]
    return shlex.join(words)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    from headpatch.errors import HeadpatchError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise HeadpatchError(f"{option} takes whole numbers with commas between them; got {text!r}") from None


def percents(text: str, option: str) -> tuple[float, ...]:
    """Percentages with commas between them, as fractions."""
    from headpatch.errors import HeadpatchError

    try:
        found = tuple(float(part) / 100 for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= d <= 1 for d in found):
        raise HeadpatchError(f"{option} takes percentages from 0 to 100 with commas between them; got {text!r}")
    return found


def needle_of(sentence: str | None, question: str | None, answer: str | None) -> Needle | None:
    """A needle of the user's own; None where nothing of it is given."""
    from headpatch.errors import HeadpatchError
    from headpatch.find.needles import Needle

    given = [sentence, question, answer]
    if not any(given):
        return None
    if sentence is None or question is None or answer is None:
        raise HeadpatchError("a needle of your own takes all of --sentence, --question and --answer")
    return Needle(sentence, question, answer)


def chat_of(wanted: bool | None, model: Any, tokenizer: Any) -> bool:
    """Whether to use the chat template: as asked for, else where there is one."""
    from headpatch.find.engine import open_bench

    return open_bench(model, tokenizer).has_chat if wanted is None else wanted
