"""``headpatch export``: a recipe as a LoRA adapter or as weights, for engines that do not know headpatch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.recipe import Recipe
    from headpatch.tune.export import Agreement, Fold

__all__ = ["register"]

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n",
    "Q: A train leaves at nine and arrives at half past eleven. How long does it take?\nA:",
)
"""What the export is compared with the recipe on, at every position."""
ALLOWED = {"float64": 1e-6, "float32": 2e-3}
"""Largest difference of a log-probability, in nats; low precision rounds the weights, so there the same token must come first at
nineteen of twenty positions instead."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def export(
        recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, a file, or hf://owner/repo.")],
        model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
        to: Annotated[
            str,
            typer.Option("--to", help="lora: an adapter for the model as it is; weights: a checkpoint of its own."),
        ],
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder to write; it must not exist, or be empty.")
        ],
        max_rank: Annotated[
            int, typer.Option(help="Largest rank that the engine takes (vLLM: at most 512).", min=1)
        ] = 512,
        device: Annotated[
            str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
        ] = "auto",
        dtype: Annotated[
            str | None,
            typer.Option(
                help="float32, bfloat16, float16, or auto for the checkpoint's.",
                show_default="float32 for lora, auto for weights",
            ),
        ] = None,
    ) -> None:
        """Write a recipe as a LoRA adapter or as weights, and compare the two.

        Only what is the same for every input can be written so: scaling and ablation of heads. Attention edits depend on the input
        and are refused.
        """
        from headpatch.errors import HeadpatchError
        from headpatch.sources import load_recipe
        from headpatch.terminal import console

        if to not in ("lora", "weights"):
            raise HeadpatchError(f"--to is {to!r}; choose lora or weights")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise HeadpatchError(f"{output} exists and is not an empty folder; name another one")
        loaded = load_recipe(recipe)
        refuse_early(loaded, model)
        found, edit = (as_lora if to == "lora" else as_weights)(
            loaded, model, output, max_rank, device, dtype or ("float32" if to == "lora" else "auto")
        )
        say = console()
        say.print(f"wrote {output}: {edit.num_heads} heads of {loaded.name or recipe}", markup=False)
        say.print(f"compared with the recipe: {found[0]}", markup=False)
        if to == "lora":
            say.print(serving(output, model), style="dim", markup=False, soft_wrap=True)
        if not found[1]:
            say.print("the export does not do what the recipe does", style="bold", markup=False)
            raise typer.Exit(1)


Result = tuple[tuple["Agreement", bool], "Fold"]


def refuse_early(recipe: Recipe, model: str) -> None:
    """Say what cannot be exported from the model's config alone, before anything is loaded."""
    from headpatch.commands.check import config_shape
    from headpatch.demo_model import locate
    from headpatch.errors import EngineError
    from headpatch.registry import adapters
    from headpatch.tune.export import fold

    config_shape(model, recipe)
    reader: Any = next((adapter for adapter in adapters() if hasattr(adapter, "load_config")), None)
    if reader is None:
        raise EngineError("no engine that is installed reads configs of models; pip install 'headpatch[hf]'")
    fold(recipe, reader.load_config(locate(model)))


def as_lora(recipe: Recipe, model: str, output: Path, max_rank: int, device: str, dtype: str) -> Result:
    """Write the adapter, put it on the model with plain PEFT, and compare."""
    from headpatch.commands.generate import load
    from headpatch.tune.export import attach, fold, to_lora

    base, tokenizer = load(model, device, dtype)
    untouched, original = both(base, tokenizer, recipe)
    edit = fold(recipe, base)
    to_lora(base, edit, output, max_rank=max_rank)
    adapted = attach(base, output)
    return judged(base, untouched, original, logits(adapted.get_base_model(), tokenizer)), edit


def as_weights(recipe: Recipe, model: str, output: Path, max_rank: int, device: str, dtype: str) -> Result:
    """Write the checkpoint, load it again, and compare."""
    from headpatch.commands.generate import hushed, load
    from headpatch.tune.export import fold, to_weights

    base, tokenizer = load(model, device, dtype)
    untouched, original = both(base, tokenizer, recipe)
    edit = fold(recipe, base)
    to_weights(base, edit)
    with hushed():
        base.save_pretrained(output)
        tokenizer.save_pretrained(output)
    again, tokenizer = load(str(output), device, dtype)
    return judged(again, untouched, original, logits(again, tokenizer)), edit


def both(model: Any, tokenizer: Any, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Logits of the untouched model and under the recipe."""
    from headpatch.api import applied

    untouched = logits(model, tokenizer)
    with applied(model, recipe):
        return untouched, logits(model, tokenizer)


def logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits [n, vocabulary] at every position of the prompts."""
    import torch

    from headpatch.registry import find_adapter

    engine: Any = find_adapter(model)
    return torch.cat([engine.logits(model, tokenizer, prompt, False)[0].float().cpu() for prompt in PROMPTS])


def judged(model: Any, untouched: Tensor, original: Tensor, exported: Tensor) -> tuple[Agreement, bool]:
    """The comparison, and whether it is good enough for the model's dtype."""
    from headpatch.tune.export import compare_logits

    found = compare_logits(untouched, original, exported)
    allowed = ALLOWED.get(str(model.dtype).removeprefix("torch."))
    return found, found.same_tokens >= 0.95 if allowed is None else found.difference <= allowed


def serving(output: Path, model: str) -> str:
    """How vLLM serves the adapter."""
    import json

    from headpatch.demo_model import locate

    rank = json.loads((output / "adapter_config.json").read_text("utf-8"))["r"]
    fits = next((n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512) if n >= rank), None)
    if fits is None:
        return f"rank {rank} is more than vLLM serves (512)"
    return f"vllm serve {locate(model)} --enable-lora --max-lora-rank {fits} --lora-modules {output.name}={output}"
