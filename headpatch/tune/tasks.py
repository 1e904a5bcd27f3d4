"""From a task's pairs to its recipe: learn, drop what does not count, and say what the recipe does on test questions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headpatch.find.stats import paired
from headpatch.recipe import Recipe
from headpatch.resolve import resolve
from headpatch.tune.engine import LastTokens, last_tokens
from headpatch.tune.function_vector import HeadWriter, best_layer, function_vector, mediation
from headpatch.tune.measure import Answers, answers, edit_of, few_shot_answers, questions
from headpatch.tune.pairs import Format, Split
from headpatch.tune.soft import Learned, Lesson, Settings, embed, learn
from headpatch.tune.task_recipes import injection_recipe, vector_recipe
from headpatch.tune.two_stage import Step

__all__ = ["LearnedTask", "learn_function_vector", "learn_injection"]


@dataclass(frozen=True)
class LearnedTask:
    """A learned task.

    Attributes
    ----------
    recipe
        With its arrays in memory; ``save`` writes both files.
    answers
        By name (``zero-shot``, ``10-shot``, the method's), what was said to the test questions. The recipe's own numbers are used:
        rounded, without the heads that were dropped.
    heads, of
        Heads in the recipe, and in the model.
    size
        Bytes of its safetensors file.
    learned
        How it was learned; None for a function vector.
    """

    recipe: Recipe
    answers: Mapping[str, Answers]
    heads: int
    of: int
    size: int
    learned: Learned | None = None

    def lines(self) -> list[str]:
        """For people."""
        rows = [["", "prefix match", "exact match", "prompt tokens"]]
        for name, found in self.answers.items():
            cells = [f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in found.accuracy]
            rows.append([name, *cells, f"{found.prompt_tokens:.0f}"])
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        made = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [*made, f"{self.heads} of {self.of} heads, {self.size / 1024:.0f} KiB of arrays"]


def learn_injection(
    model: Any, tokenizer: Any, parts: Split, style: Format | None = None, settings: Settings | None = None, *,
    threshold: float = 0.01, case: bool = False, name: str | None = None, description: str | None = None,
    model_name: str | None = None, provenance: Mapping[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None, work: str | os.PathLike[str] | None = None,
) -> LearnedTask:  # fmt: skip
    """Learn a soft injection and write it as a recipe.

    Parameters
    ----------
    model, tokenizer
        Of an engine whose models can learn at the last token (transformers).
    parts
        Training, validation and test pairs (:func:`headpatch.tune.pairs.split`); without test pairs nothing is reported.
    style
        Format of the prompts; use the very one that will be served.
    settings
        Default: the published ones.
    threshold
        Heads that take less of their vector are left out.
    case
        Whether letter case counts when answers are scored.
    name, description, model_name, provenance
        Of the recipe; its provenance gets settings, seed, losses and figures in any case.
    progress
        Called after each step, with the loss and the time left.
    work
        A file that keeps the state at each validation: the same call goes on from there.

    Raises
    ------
    HeadpatchError
        Too few pairs, an answer whose first token cannot be told, or a `work` file of another run.
    UnsupportedModelError
        The model keeps more of a prompt than keys and values, or gates its head outputs.
    """
    style, settings = style or Format(), settings or Settings()
    ends = last_tokens(model, tokenizer)
    vectors = embed(ends, parts.train, style, settings.prompts, settings.shots, settings.seed)
    lesson = Lesson(vectors, parts.train, parts.valid, settings.seed)
    (learned,) = learn(ends, [lesson], style, settings, progress=progress, work=work)
    named: dict[str, Any] = {
        "name": name,
        "description": description or f"A task of {len(parts.train)} pairs, injected.",
        "model_name": model_name,
    }
    recipe = injection_recipe(ends.shape, learned.alpha, vectors, threshold=threshold, **named)
    found = _figures(ends, recipe, parts, style, settings, "soft injection", case)
    facts = {
        "settings": {**asdict(settings), "threshold": threshold}, "seed": settings.seed, "steps": learned.step,
        "losses": {"train": _rounded(learned.train), "validation": _rounded(learned.valid)},
    }  # fmt: skip
    recipe = injection_recipe(
        ends.shape, learned.alpha, vectors, threshold=threshold, **named,
        provenance={**(provenance or {}), **facts, **_about(ends, parts, style, found)},
    )  # fmt: skip
    return _task(ends, recipe, found, learned)


def learn_function_vector(
    model: Any, tokenizer: Any, parts: Split, style: Format | None = None, settings: Settings | None = None, *,
    heads: int = 10, case: bool = False, name: str | None = None, description: str | None = None,
    model_name: str | None = None, provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedTask:  # fmt: skip
    """Build a task's function vector and write it as a recipe.

    Heads are found on this task's training pairs alone; for the published form, which finds them over several tasks, call
    :func:`headpatch.tune.function_vector.mediation` with all of them.

    Parameters
    ----------
    settings
        `prompts`, `shots`, `validation` and `seed` count; half as many prompts are used for mediation.
    heads
        How many heads the vector is the sum of.
    progress
        Called with mediation prompts done and in all.

    Other parameters, and errors, as in :func:`learn_injection`.
    """
    style, settings = style or Format(), settings or Settings()
    ends = last_tokens(model, tokenizer)
    vectors = embed(ends, parts.train, style, settings.prompts, settings.shots, settings.seed)
    effects = mediation(
        ends, [(parts.train, vectors)], style, prompts=max(1, settings.prompts // 2), shots=settings.shots, seed=settings.seed,
        progress=progress,
    )  # fmt: skip
    chosen = sorted(effects, key=lambda head: -effects[head])[:heads]
    vector = function_vector(ends, vectors, chosen)
    checked = questions(ends, parts.valid[: settings.validation], style)
    layer, tried = best_layer(ends, vector, checked.prompts, range(len(checked.pairs)), checked.firsts)
    values, missing = HeadWriter(ends.writer(layer))(vector)
    named: dict[str, Any] = {
        "name": name,
        "description": description or f"Function vector of {heads} heads.",
        "model_name": model_name,
    }
    recipe = vector_recipe(ends.shape, layer, values, **named)
    found = _figures(ends, recipe, parts, style, settings, "function vector", case)
    facts = {
        "heads": {head: round(effects[head], 5) for head in chosen}, "seed": settings.seed, "missing": round(missing, 4),
        "settings": {key: getattr(settings, key) for key in ("prompts", "shots", "validation")},
        "log-probability by layer": {str(n): round(x, 3) for n, x in tried.items()},
    }  # fmt: skip
    recipe = vector_recipe(
        ends.shape,
        layer,
        values,
        **named,
        provenance={**(provenance or {}), **facts, **_about(ends, parts, style, found)},
    )
    return _task(ends, recipe, found, None)


def _figures(
    model: LastTokens, recipe: Recipe, parts: Split, style: Format, settings: Settings, method: str, case: bool
) -> dict[str, Answers]:  # fmt: skip
    if not parts.test:
        return {}
    asked = questions(model, parts.test, style)
    shown, tokens = few_shot_answers(
        model, asked, parts.train, style, shots=settings.shots, draws=len(asked.pairs), seed=settings.seed
    )
    plain = answers(model, asked.prompts, None, asked.tokens)
    edited = answers(model, asked.prompts, edit_of(recipe, model), asked.tokens)
    return {
        "zero-shot": Answers.of(plain, asked.pairs, asked.length, case),
        f"{settings.shots}-shot": Answers.of(shown, asked.pairs, tokens, case),
        method: Answers.of(edited, asked.pairs, asked.length, case),
    }


def _about(model: LastTokens, parts: Split, style: Format, found: Mapping[str, Answers]) -> dict[str, Any]:
    """What the provenance says in any case: sizes, format, versions, figures in percent with 95 % intervals."""
    import headpatch

    facts: dict[str, Any] = {
        "pairs": {"train": len(parts.train), "validation": len(parts.valid), "test": len(parts.test)}, "format": asdict(style),
        "headpatch": headpatch.__version__, **{k: v for k, v in model.about().items() if k != "model"},
    }  # fmt: skip
    if not found:
        return facts
    (plain, before), *_, (_, after) = found.items()
    facts["metric"] = "percent of test questions right, with 95 % intervals: [prefix match], [exact match]"
    for name, said in found.items():
        key = {plain: "baseline"}.get(name, "patched" if said is after else f"{name} prompt")
        facts[key] = [[round(100 * x, 1) for x in (e.value, e.low, e.high)] for e in said.accuracy]
    gain = paired(torch.tensor(after.exact), torch.tensor(before.exact))
    facts["difference in exact match"] = [round(100 * x, 1) for x in (gain.value, gain.low, gain.high)]
    facts["prompt tokens"] = {name: round(said.prompt_tokens, 1) for name, said in found.items()}
    return facts


def _task(model: LastTokens, recipe: Recipe, found: Mapping[str, Answers], learned: Learned | None) -> LearnedTask:
    heads = sum(len(chosen) for patch in resolve(recipe, model.shape) for chosen in patch.heads.values())
    every = sum(model.shape.parts[model.shape.main].num_heads)
    assert recipe.tensors is not None
    return LearnedTask(recipe, found, heads, every, len(recipe.tensors.read()), learned)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(x, 4) for x in values]
