"""Calibration: which heads should be edited for a task, and how strongly. The same for every method; a method brings a
:class:`Subject`.

1. Every candidate edit is measured by itself on rows to search on, and counts as helping only if a paired test says so.
2. Paths of combinations: the best single edits taken together, as papers do it (:func:`top`), and the shared search under
   constraints (:func:`headpatch.find.combine.combine`).
3. Rows held out from the search choose a step of the paths, or none. Evaluation rows only report.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headpatch.errors import HeadpatchError
from headpatch.find.combine import Choice, Limits, Step, choose, combine
from headpatch.find.data import Row, Task
from headpatch.find.engine import Bench, Outcome, open_bench
from headpatch.find.journal import Journal
from headpatch.find.measure import Goal, Sample, join, sample
from headpatch.find.neutral import PASSAGES
from headpatch.find.provenance import versions
from headpatch.find.report import Report, report
from headpatch.find.search import Candidate, Combo, Effect, Evaluator, Progress, patches_of, profile, slopes
from headpatch.find.subject import Settings, Subject
from headpatch.heads import select_heads
from headpatch.recipe import Recipe
from headpatch.registry import get_method

__all__ = ["Calibration", "Settings", "Subject", "calibrate", "top"]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes
    ----------
    recipe
        The recipe with its provenance; None where nothing beats the untouched model on held-out rows.
    report
        Figures on the evaluation rows, before and after, with controls; before only, where there is no recipe.
    effects
        The profile: what single edits do.
    path, choice
        The combinations that were found, and which one held-out rows chose, and why.
    """

    recipe: Recipe | None
    report: Report
    effects: tuple[Effect, ...]
    path: tuple[Step, ...]
    choice: Choice

    def profile(self) -> list[dict[str, Any]]:
        """The profile as plain values, one entry per single edit: shares as fractions, intervals of 95 %."""
        return [
            {
                "selector": e.candidate.selector, "strength": e.candidate.strength, "verdict": e.verdict, "p": e.p,
                "gain": [e.gain.value, e.gain.low, e.gain.high],
                "accuracy": None if e.accuracy is None else [e.accuracy.value, e.accuracy.low, e.accuracy.high],
                "valid": [e.valid.value, e.valid.low, e.valid.high], "log_perplexity": e.log_perplexity,
            }
            for e in self.effects
        ]  # fmt: skip

    def up_effective(self) -> list[str]:
        """Selectors whose heads help at a strength above the identity, beyond doubt."""
        return self._effective(lambda strength, identity: strength > identity)

    def down_effective(self) -> list[str]:
        """Selectors whose heads help at a strength below the identity, beyond doubt."""
        return self._effective(lambda strength, identity: strength < identity)

    def _effective(self, side: Callable[[float, float], bool]) -> list[str]:
        helping = [e.candidate for e in self.effects if e.verdict > 0]
        return sorted({c.selector for c in helping if side(c.strength, get_method(c.method).identity())})


def calibrate(
    subject: Subject, model: Any, tokenizer: Any, train: Sequence[Row], evaluation: Sequence[Row], task: Task, settings: Settings, *,
    texts: Sequence[str] = PASSAGES, name: str | None = None, description: str | None = None, model_name: str | None = None,
    work: str | Path | None = None, provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None, say: Callable[[str], object] = lambda line: None,
) -> Calibration:  # fmt: skip
    """Choose heads and strengths on training rows, and report on evaluation rows.

    Parameters
    ----------
    subject
        The method; modules beside this one have theirs.
    model, tokenizer
        Of an engine whose adapter can measure models (:func:`headpatch.find.engine.open_bench`).
    train, evaluation
        Rows (:func:`headpatch.find.data.load_rows`). Nothing is chosen on `evaluation`.
    task
        Templates and labels.
    settings
        How to search; modules of methods have some under ``EFFORTS``.
    texts
        Neutral texts whose perplexity must be kept.
    name, description, model_name
        Of the recipe, and of the model in it.
    work
        Work file: each measurement is kept in it, and an interrupted calibration that is called again goes on from there.
    provenance
        What to add to the recipe's provenance: data files, the command.
    progress, say
        Told how far it is; told what was found, line by line.

    Raises
    ------
    HeadpatchError
        Rows that do not fit the task, too few rows, settings that do not suit the method, or a work file of another calibration.
    """
    subject.check(settings, task)
    bench = open_bench(model, tokenizer)
    supervised = settings.metric != "entropy"
    split = _split(len(train), settings)
    samples = [
        sample(bench, f"screen{i}", [train[j] for j in rows], task, supervised) for i, rows in enumerate(split[:-1])
    ]
    held_out = sample(bench, "held-out", [train[j] for j in split[-1]], task, supervised)
    test = sample(bench, "evaluation", evaluation, task, False)
    journal = Journal(work, _fingerprint(bench, subject, task, settings, texts, [*samples, held_out, test]))
    if journal.reused:
        say(f"{journal.reused} measurements found in {work}: going on from there")
    try:
        evaluator = Evaluator(bench, bench.texts(texts), journal, progress)
        evaluator.confirm(samples[0])
        goal = _goal(evaluator.one((), samples[0], "untouched model"), samples[0], settings)
        every = subject.candidates(bench.shape.parts[bench.shape.main], settings)
        candidates = subject.prune(every, bench, samples)
        if len(candidates) < len(every):
            say(f"{len(candidates)} of {len(every)} single edits can change anything on these rows")
        effects, path, why = _search(subject, candidates, evaluator, samples, goal, settings, say)
        choice = Choice((), None, None, why)
        if len(path) > 1:
            choice, _ = choose(evaluator, path, held_out, goal, settings.alpha, settings.anyway)
        say(choice.why)
        fitted = [*samples, held_out] if supervised else []
        drawn = _heads(candidates) if len(candidates) < len(every) else None
        found = report(evaluator, choice.combo, test, fitted, task, settings.random_draws, settings.seed, drawn)
    finally:
        journal.close()
    recipe = None
    if choice.combo:
        about = bench.about()
        recipe = Recipe.from_dict({
            "headpatch": 1,
            "name": name or "calibrated",
            "description": description or f"{subject.words} in {len(choice.combo)} edits, calibrated on {len(train)} rows.",
            "model": bench.shape.to_block(model_name or about["model"]),
            "patches": patches_of(choice.combo),
            "provenance": {
                **(provenance or {}), "templates": list(task.templates), "labels": dict(task.labels), "chat": task.chat,
                **({"span_fields": list(task.span_fields)} if task.span_fields else {}),
                **found.plain(), "choice": choice.why, "seed": settings.seed, "settings": _plain(settings), **versions(about),
            },
        })  # fmt: skip
    return Calibration(recipe, found, tuple(effects), tuple(path), choice)


def _split(rows: int, settings: Settings) -> list[list[int]]:
    """Row numbers of each screening stage and, last, of the held-out part."""
    need = sum(settings.screen)
    if rows < need + 20:
        raise HeadpatchError(
            f"{rows} training rows are too few: {need} for the search and at least 20 held out; give more, or a smaller screen"
        )
    order = list(range(rows))
    random.Random(settings.seed).shuffle(order)  # noqa: S311
    parts, start = [], 0
    for n in (*settings.screen, min(settings.held_out, rows - need)):
        parts.append(sorted(order[start : start + n]))
        start += n
    return parts


def _search(
    subject: Subject, candidates: list[Candidate], evaluator: Evaluator, samples: Sequence[Sample], goal: Goal, settings: Settings,
    say: Callable[[str], object],
) -> tuple[list[Effect], list[Step], str]:  # fmt: skip
    """What single edits do, the paths of combinations as one, and why there is none where it has nothing but the untouched model."""
    path = [Step((), 0.0)]
    if not candidates:
        return [], path, "no edit changes anything on these rows"
    promising = _promising(subject, candidates, evaluator, samples, goal, settings)
    if len(promising) < len(candidates):
        say(f"{len(promising)} of {len(candidates)} single edits are measured, by the slopes of the metric")
    elif settings.slopes < 1:
        say("labels share their first token, and slopes are of first tokens: every single edit is measured")
    total = len(candidates)
    effects, outcomes, base = profile(evaluator, promising, samples, goal, alpha=settings.alpha, total=total)
    pool = _pool(effects, outcomes, settings)
    helping = sum(e.verdict > 0 for e in effects)
    say(f"{helping} of {len(effects)} single edits help beyond doubt; {len(pool)} go into combinations")
    if helping and settings.max_steps:
        path = combine(
            evaluator, pool, base, samples, goal, width=settings.width, rounds=settings.rounds, fresh=settings.fresh,
            max_steps=settings.max_steps, vary=subject.vary, note=say,
        )  # fmt: skip
    path += _lists(evaluator, effects, samples, goal, base, settings, say)
    why = "no edit that helps keeps what must be kept (see keep and perplexity)"
    return effects, path, why if helping else "no single edit helps beyond doubt"


def _promising(
    subject: Subject,
    candidates: list[Candidate],
    evaluator: Evaluator,
    samples: Sequence[Sample],
    goal: Goal,
    settings: Settings,
) -> list[Candidate]:
    """The share of the candidates that promises the most by the slope of the metric in their heads' strengths; in their order."""
    if settings.slopes >= 1 or samples[0].questions.whole:  # slopes are of labels that differ in their first token
        return candidates
    part = evaluator.bench.shape.parts[evaluator.bench.shape.main]
    heads = {c.selector: select_heads([c.selector], part) for c in candidates}
    every = [f"{layer}.{h}" for layer in part.softmax_layers() for h in range(part.num_heads[layer])]
    named = {f"{layer}.{h}" for found in heads.values() for layer, ids in found.items() for h in ids}
    template = candidates[0].at(subject.identity)
    slope = slopes(evaluator, template, [h for h in every if h in named], samples, goal)

    def promise(c: Candidate) -> float:
        own = sum(slope[f"{layer}.{h}"] for layer, ids in heads[c.selector].items() for h in ids)
        return own * (subject.step(c.strength) - subject.step(subject.identity))

    keep = sorted(range(len(candidates)), key=lambda i: -promise(candidates[i]))
    kept = keep[: max(1, round(settings.slopes * len(candidates)))]
    return [candidates[i] for i in sorted(kept)]


def top(effects: Sequence[Effect], size: int) -> Combo:
    """The `size` best single edits that gain anything at all, at most one per selector: how papers make their lists of heads."""
    ranked = sorted((e for e in effects if e.gain.value > 0), key=lambda e: -e.gain.value)
    best: dict[str, Candidate] = {}
    for e in ranked:
        best.setdefault(e.candidate.selector, e.candidate)
    return tuple(best.values())[:size]


def _lists(
    evaluator: Evaluator, effects: Sequence[Effect], samples: Sequence[Sample], goal: Goal, base: Outcome, settings: Settings,
    say: Callable[[str], object],
) -> list[Step]:  # fmt: skip
    """The lists of :func:`top` as steps, measured on the search rows."""
    import torch

    combos = [combo for combo in dict.fromkeys(top(effects, size) for size in settings.top) if combo]
    parts = [evaluator.many(combos, s, "lists of the best single edits", texts=i == 0) for i, s in enumerate(samples)]
    limits = Limits.of(base, torch.cat([s.gold for s in samples]), goal)
    steps = []
    for combo, outcomes in zip(combos, zip(*parts, strict=True), strict=True):
        steps.append(Step(combo, float(limits.score(join(outcomes)))))
        say(f"the {len(combo)} best single edits: score {steps[-1].score:.4f}")
    return steps


def _heads(candidates: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(c.selector for c in candidates))


def _goal(base: Outcome, sample: Sample, settings: Settings) -> Goal:
    """The temperature of ``probability`` is half the spread of the label margins, so that rows near the border count most."""
    best = base.whole.topk(2, -1).values
    spread = float((best[:, 0] - best[:, 1]).double().std()) if len(best) > 1 else 1.0
    signed = base.whole - base.whole.mean(-1, keepdim=True)
    spread = max(spread, float(signed.double().std(0).mean())) if len(best) > 1 else spread
    return Goal(settings.metric, settings.keep, settings.perplexity, max(0.05, 0.5 * spread))


def _pool(
    effects: Sequence[Effect], outcomes: Sequence[Outcome], settings: Settings
) -> list[tuple[Candidate, Outcome]]:
    """Edits that help, surest first, and edits that pay for what those cost: more valid answers, or a lower perplexity."""
    order = sorted(range(len(effects)), key=lambda i: (effects[i].p, i))
    helping = [i for i in order if effects[i].verdict > 0]
    others = [i for i in order if effects[i].verdict == 0]
    raising = sorted((i for i in others if effects[i].valid.low > 0), key=lambda i: -effects[i].valid.value)
    lowering = sorted(
        (i for i in others if effects[i].log_perplexity < -0.002), key=lambda i: effects[i].log_perplexity
    )
    room = max(0, settings.pool - len(helping))
    chosen = dict.fromkeys((*helping[: settings.pool], *raising[: room // 2], *lowering[: room // 4]))
    return [(effects[i].candidate, outcomes[i]) for i in chosen]


def _fingerprint(
    bench: Bench, subject: Subject, task: Task, settings: Settings, texts: Sequence[str], samples: Sequence[Sample]
) -> dict[str, Any]:
    """What measurements depend on. Settings that only steer the search are in it too: another search is another work file."""
    return {
        "about": bench.about(), "subject": dataclasses.asdict(subject), "task": dataclasses.asdict(task),
        "settings": _plain(settings), "texts": list(texts),
        "samples": [
            [s.name, [[p.ids, p.spans] for p in s.questions.passages], s.gold.tolist()] for s in samples
        ],
    }  # fmt: skip


def _plain(settings: Settings) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
