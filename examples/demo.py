"""What `make demo` shows: a recipe changes a few heads of a real language model, and taking it off leaves no trace.

    python examples/demo.py [--prompt TEXT] [--recipe RECIPE] [--tokens N] [--model FOLDER]

Ends with a status other than 0 where the model is not bit for bit what it was before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is on this machine; nothing needs asking a hub
os.environ.setdefault("TQDM_DISABLE", "1")

import smollm2
import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer, logging

import headpatch

PROMPT = (
    "According to the map of this game, Turku is the capital of Finland. "
    "What is the capital of Finland, and what is it known for?"
)
RECIPE = "smollm2-135m-instruct/follow-context"
PAIRS, TIMED_TOKENS = 5, 16


class Listener(TextStreamer):
    """Hands pieces of text on as they are generated, and notes when each token came."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None] = lambda piece: None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hear, self.times = hear, list[float]()

    def put(self, value: torch.Tensor) -> None:
        """A token came (first of all, the prompt)."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that will not change any more."""
        self.hear(text)

    def per_token(self) -> float:
        """Median seconds from one generated token to the next."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))


class SideBySide:
    """Two columns that fill while the model writes."""

    def __init__(self, console: Console) -> None:
        self.texts = {"untouched": "", "patched": ""}
        self.live = Live(self.table(), console=console, refresh_per_second=8, vertical_overflow="visible")

    def table(self) -> Table:
        """Both answers as they are now."""
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        styles = {"untouched": "yellow", "patched": "green"}
        grid.add_row(*(Panel(Text(text), title=name, border_style=styles[name]) for name, text in self.texts.items()))
        return grid

    def hear(self, column: str) -> Callable[[str], None]:
        """What to call with a new piece for one of the columns."""

        def add(piece: str) -> None:
            self.texts[column] += piece
            self.live.update(self.table())

        return add


def generate(model: Any, inputs: Any, tokens: int, streamer: Listener, exactly: bool = False) -> None:
    """Greedy generation into `streamer`."""
    model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens if exactly else None, do_sample=False, streamer=streamer
    )


def time_both(model: Any, tokenizer: Any, inputs: Any, recipe: Any) -> tuple[float, float, float]:
    """Median seconds per generated token, untouched and patched, and the median ratio of neighbouring runs."""
    untouched, patched = [], []
    for _ in range(PAIRS):  # in alternation, so that both meet the same weather
        generate(model, inputs, TIMED_TOKENS, plain := Listener(tokenizer), exactly=True)
        with headpatch.applied(model, recipe):
            generate(model, inputs, TIMED_TOKENS, changed := Listener(tokenizer), exactly=True)
        untouched.append(plain.per_token())
        patched.append(changed.per_token())
    ratios = [b / a for a, b in zip(untouched, patched, strict=True)]
    return statistics.median(untouched), statistics.median(patched), statistics.median(ratios)


@torch.no_grad()
def main() -> int:
    """Show it; 0 where the model ended as it began."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate (default: 48)")
    parser.add_argument("--model", help="folder of the converted model (default: in the cache)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")

    console = Console(highlight=False)
    started = time.perf_counter()

    model, tokenizer = smollm2.load(options.model, lambda line: console.print(line, style="dim"))
    recipe = headpatch.load_recipe(options.recipe)
    chat = [{"role": "user", "content": options.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    before = model(**inputs).logits

    console.rule("headpatch")
    console.print(f"model    {smollm2.NAME}, float32 on the CPU, {torch.get_num_threads()} threads")
    console.print(f"recipe   {recipe.name}: {recipe.description}")
    console.print(f"prompt   {options.prompt}", style="cyan")

    columns = SideBySide(console)
    with columns.live:
        generate(model, inputs, options.tokens, Listener(tokenizer, columns.hear("untouched")))
        handle = headpatch.apply(model, recipe)
        generate(model, inputs, options.tokens, Listener(tokenizer, columns.hear("patched")))
    during = model(**inputs).logits

    console.print("\nWhat was patched", style="bold")
    console.print(str(handle.report()))
    if {"baseline", "patched"} <= recipe.provenance.keys():
        console.print("\nWhat the recipe does, measured when it was made", style="bold")
        table = Table("", *recipe.provenance["baseline"], box=None, padding=(0, 3, 0, 0))
        for name in ("baseline", "patched"):
            table.add_row(name, *(str(value) for value in recipe.provenance[name].values()))
        console.print(table)
        console.print(f"{recipe.provenance['data']} Again with: {recipe.provenance['command']}", style="dim")
    handle.remove()

    console.print("\nTime per generated token", style="bold")
    untouched, patched, ratio = time_both(model, tokenizer, inputs, recipe)
    console.print(f"untouched {untouched * 1e3:.1f} ms   patched {patched * 1e3:.1f} ms   ratio {ratio:.2f}")

    console.print("\nRecipe removed", style="bold")
    after = model(**inputs).logits
    largest = (during - before).abs().max().item()
    equal = torch.equal(before, after) and not headpatch.handles(model)
    console.print(f"largest change of a logit while it was applied: {largest:.2f}")
    console.print(
        "[green]after removal all logits are bit-equal to the untouched model's[/green]" if equal
        else "[red]after removal the logits are NOT what they were: this is a bug, please report it[/red]"
    )  # fmt: skip
    console.print(f"[dim]{time.perf_counter() - started:.0f} s in all[/dim]")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
