"""Putting helping edits together, under constraints.

What an edit does to every log-probability of every row is known from measuring it by itself. To first order these changes add up, so
that a combination can be predicted for nothing; predictions propose, and only measurements decide:

1. From the combination so far, predict every addition, replacement and removal, and blocks of several of them.
2. Measure the best proposals on the search rows; keep the best one if it raises the score.
3. When nothing does, measure the edits anew around the combination (and at other strengths), and go on for another round.

Every combination that was kept is a step of a *path*. Search rows choose the path; rows held out from the search choose the step on
it (:func:`choose`), and must show a gain whose confidence bound is above zero, or there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headpatch.find import stats
from headpatch.find.engine import Outcome
from headpatch.find.measure import Goal, Sample, compare, join, stack
from headpatch.find.search import Candidate, Combo, Evaluator

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Choice", "Limits", "Step", "choose", "combine"]

SLACK = 0.5
"""Share of what may be lost that the search may spend: the rest is for the difference between its rows and others."""
BLOCKS = (2, 4, 8, 16)
MIN_GAIN = 2e-4
"""A step must raise the score by so much: 0.02 points of a probability."""


@dataclass(frozen=True)
class Limits:
    """What must be kept, in absolute numbers, and the score that says how much it is broken."""

    goal: Goal
    gold: Tensor
    valid: float
    unrestricted: float
    nats: float

    @classmethod
    def of(cls, base: Outcome, gold: Tensor, goal: Goal) -> Limits:
        """From the untouched model's outcome on the same rows."""
        valid, unrestricted, nats = _kept(base, gold)
        slack = SLACK * goal.keep
        return cls(
            goal, gold, float(valid) - slack, float(unrestricted) - slack,
            float(nats) + math.log1p(0.9 * goal.perplexity),
        )  # fmt: skip

    def gain(self, outcome: Outcome) -> Tensor:
        """The goal's metric [...], whatever it costs."""
        rows = self.goal.rows(outcome, self.gold).double()
        if self.goal.metric != "entropy":
            rows = rows[..., self.gold >= 0]
        return rows.mean(-1)

    def score(self, outcome: Outcome) -> Tensor:
        """What the search maximises [...]: the goal's metric less penalties for whatever is not kept."""
        valid, unrestricted, nats = _kept(outcome, self.gold)
        # Steep enough that no gain of the metric pays for a loss of what must be kept.
        lost = 4 * (self.valid - valid).clamp_min(0) + 4 * (self.unrestricted - unrestricted).clamp_min(0)
        return self.gain(outcome) - lost - 20 * (nats - self.nats).clamp_min(0)

    def kept(self, outcome: Outcome) -> bool:
        """Whether an outcome keeps everything."""
        valid, unrestricted, nats = _kept(outcome, self.gold)
        return bool(valid >= self.valid and unrestricted >= self.unrestricted and nats <= self.nats)


@dataclass(frozen=True)
class Step:
    """A combination on the path, and its score on the search rows."""

    combo: Combo
    score: float


@dataclass(frozen=True)
class Choice:
    """What the held-out rows say.

    Attributes
    ----------
    combo
        The chosen combination; empty where none is better than the untouched model beyond doubt.
    step
        Its place on the path; None where there is none.
    gain
        Gain of the goal's metric on the held-out rows, with an interval corrected for the number of steps to choose from.
    why
        In words.
    """

    combo: Combo
    step: int | None
    gain: stats.Estimate | None
    why: str


def combine(
    evaluator: Evaluator, pool: Sequence[tuple[Candidate, Outcome]], base: Outcome, samples: Sequence[Sample], goal: Goal, *,
    width: int = 16, rounds: int = 2, fresh: int = 64, max_steps: int = 40,
    vary: Callable[[Candidate], Sequence[Candidate]] = lambda c: (), note: Callable[[str], object] = lambda line: None,
) -> list[Step]:  # fmt: skip
    """Find a path of combinations, each better than the one before on the search rows.

    Parameters
    ----------
    pool
        Edits to combine, with what each does by itself on `samples`.
    base
        The untouched model's outcome on `samples`.
    width
        Proposals measured per step, blocks not counted.
    rounds
        How often edits are measured around the combination so far; 1 uses what they do by themselves only.
    fresh
        How many unused edits are measured anew in a later round.
    vary
        Other strengths of an edit that is in use.
    """
    import torch

    gold = torch.cat([s.gold for s in samples])
    limits = Limits.of(base, gold, goal)
    table = {c: _minus(o, base) for c, o in pool}
    state = _State((), base, float(limits.score(base)))
    path = [Step((), state.score)]

    def measure(combos: Sequence[Combo], what: str) -> list[Outcome]:
        parts = [evaluator.many(combos, s, what, texts=i == 0) for i, s in enumerate(samples)]
        return [join(o) for o in zip(*parts, strict=True)]

    for round_ in range(rounds):
        if round_ and (not state.combo or len(path) > max_steps):
            break
        if round_:
            table = _renew(
                state, table, measure, limits, fresh, vary, f"round {round_ + 1}: edits around {len(state.combo)}"
            )
        while len(path) <= max_steps and table:
            proposals = _propose(state, table, limits, width)
            if round_ and len(state.combo) > 1:
                proposals += [tuple(v) for v in zip(*(vary(c) for c in state.combo), strict=False)]
            if not proposals:
                break
            outcomes = measure(proposals, f"step {len(path)}: combinations of up to {max(map(len, proposals))} edits")
            scores = [float(limits.score(o)) for o in outcomes]
            best = max(range(len(scores)), key=scores.__getitem__)
            if scores[best] <= state.score + MIN_GAIN:
                break
            state = _State(proposals[best], outcomes[best], scores[best])
            path.append(Step(state.combo, state.score))
            note(f"step {len(path) - 1}: {len(state.combo)} edits, score {state.score:.4f}")
    return path


def choose(
    evaluator: Evaluator, path: Sequence[Step], held_out: Sample, goal: Goal, alpha: float = 0.05, anyway: bool = False
) -> tuple[Choice, list[Outcome]]:
    """Choose a step of the path on rows that the search has not seen; also gives all steps' outcomes there.

    The best step that keeps what must be kept is taken. Its gain is tested one-sided at `alpha` divided by the number of steps,
    because it was the best of so many. With `anyway` the best step is taken whatever the tests say, and the choice's words say that
    it was not confirmed.
    """
    outcomes = evaluator.many([s.combo for s in path], held_out, f"path on {held_out.rows} held-out rows")
    base, gold = outcomes[0], held_out.gold
    limits = Limits.of(base, gold, goal)
    steps = [i for i in range(1, len(path)) if limits.kept(outcomes[i])]
    kept = bool(steps)
    if not kept and not anyway:
        return Choice((), None, None, "no combination keeps what must be kept on held-out rows"), outcomes
    best = max(steps or range(1, len(path)), key=lambda i: float(limits.score(outcomes[i])))

    def rows(outcome: Outcome) -> Tensor:
        values = goal.agreement(outcome, gold).double()
        known = gold.view(held_out.templates, -1)[0] >= 0
        averaged = values.view(held_out.templates, -1).mean(0)
        return averaged if goal.metric == "entropy" else averaged[known]

    gain = stats.paired(rows(outcomes[best]), rows(base), 1 - 2 * alpha / len(path))
    accuracy = compare(outcomes[best], base, held_out).values.get("accuracy")
    doubt = "" if kept else "it does not keep what must be kept on held-out rows"
    if gain.low <= 0 or (goal.metric != "entropy" and accuracy is not None and accuracy.value <= 0):
        doubt = doubt or "the gain on held-out rows is not above chance"
    if doubt and anyway:
        return Choice(
            path[best].combo, best, gain, f"step {best} of {len(path) - 1}, not confirmed: {doubt}"
        ), outcomes
    if doubt:
        return Choice((), None, gain, doubt), outcomes
    return Choice(path[best].combo, best, gain, f"step {best} of {len(path) - 1}, chosen on held-out rows"), outcomes


@dataclass(frozen=True)
class _State:
    combo: Combo
    outcome: Outcome
    score: float


def _kept(outcome: Outcome, gold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of valid and of unrestrictedly right answers, and nats per token of the texts, each [...]."""
    best = outcome.first.amax(-1)
    valid = (best > outcome.other).double()
    right = outcome.first.gather(-1, gold.clamp_min(0)[:, None].expand(*outcome.first.shape[:-1], 1))[..., 0] >= best
    labelled = gold >= 0
    unrestricted = (valid * right)[..., labelled].mean(-1) if bool(labelled.any()) else valid.mean(-1)
    nats = -outcome.text.double().mean(-1) if outcome.text.shape[-1] else valid.new_zeros(valid.shape[:-1])
    return valid.mean(-1), unrestricted, nats


def _map(function: Callable[..., Tensor], *outcomes: Outcome) -> Outcome:
    names = [f.name for f in dataclasses.fields(Outcome)]
    return Outcome(**{n: function(*(getattr(o, n) for o in outcomes)) for n in names})


def _minus(a: Outcome, b: Outcome) -> Outcome:
    # A token that an edit makes impossible has no finite change; as low as float32 probabilities go is enough.
    return _map(lambda x, y: (x - y).nan_to_num(0.0, 100.0, -100.0), a, b)


def _plus(a: Outcome, b: Outcome) -> Outcome:
    return _map(lambda x, y: x + y, a, b)


def _moved(combo: Combo, candidate: Candidate) -> Combo:
    """The combination with a candidate in it, in the place of one that does the same at another strength."""
    if any(c.place == candidate.place for c in combo):
        return tuple(candidate if c.place == candidate.place else c for c in combo)
    return (*combo, candidate)


def _predict(
    outcome: Outcome, combo: Combo, table: dict[Candidate, Outcome], limits: Limits
) -> list[tuple[float, float, Combo, Outcome]]:
    """Predicted score, predicted gain, combination and outcome of every single move, best score first."""
    here = {c.place: c for c in combo}
    moves: list[tuple[Combo, Outcome]] = []
    for c, delta in table.items():
        old = here.get(c.place)
        if old == c:
            moves.append((tuple(x for x in combo if x != c), _map(lambda d: -d, delta)))
        elif old is None or old in table:
            moves.append((_moved(combo, c), delta if old is None else _minus(delta, table[old])))
    if not moves:
        return []
    predicted = [_plus(outcome, delta) for _, delta in moves]
    together = stack(predicted)
    scores, gains = limits.score(together).tolist(), limits.gain(together).tolist()
    order = sorted(range(len(moves)), key=lambda i: -scores[i])
    return [(scores[i], gains[i], moves[i][0], predicted[i]) for i in order]


def _propose(state: _State, table: dict[Candidate, Outcome], limits: Limits, width: int) -> list[Combo]:
    """What to measure next, by prediction: the most promising single moves; the moves that would gain the most if they cost nothing,
    each with the move that best pays for it; and blocks of moves that are best one after the other.
    """
    ranked = _predict(state.outcome, state.combo, table, limits)
    proposals = [combo for _, _, combo, _ in ranked[:width]]
    for _, _, combo, outcome in sorted(ranked, key=lambda r: -r[1])[: max(2, width // 2)]:
        paid = _predict(outcome, combo, table, limits)
        if paid and paid[0][0] > state.score + MIN_GAIN:
            proposals.append(paid[0][2])
    combo, outcome, score = state.combo, state.outcome, state.score
    for size in range(1, max(BLOCKS) + 1):
        found = _predict(outcome, combo, table, limits) if size > 1 else ranked
        if not found or found[0][0] <= score + MIN_GAIN:
            break
        score, _, combo, outcome = found[0]
        if size in BLOCKS:
            proposals.append(combo)
    return [combo for combo in dict.fromkeys(proposals) if combo]


def _renew(
    state: _State, table: dict[Candidate, Outcome], measure: Callable[[Sequence[Combo], str], list[Outcome]], limits: Limits,
    fresh: int, vary: Callable[[Candidate], Sequence[Candidate]], what: str,
) -> dict[Candidate, Outcome]:  # fmt: skip
    """Measure what edits do around a combination: without each of its own, each at other strengths, and with others."""
    used = {c.place for c in state.combo}
    without = {c: tuple(x for x in state.combo if x != c) for c in state.combo}
    varied = {v: c for c in state.combo for v in (*vary(c), *(t for t in table if t.place == c.place and t != c))}
    ranked = [combo for _, _, combo, _ in _predict(state.outcome, state.combo, table, limits)]
    added = [combo[-1] for combo in ranked if combo and combo[-1].place not in used][:fresh]
    plan: list[tuple[Candidate, Combo]] = [(c, combo) for c, combo in without.items() if combo]
    plan += [(v, _moved(state.combo, v)) for v in varied]
    plan += [(c, (*state.combo, c)) for c in added]
    outcomes = dict(zip([c for c, _ in plan], measure([combo for _, combo in plan], what), strict=True))
    renewed = {c: _minus(state.outcome, outcomes[c]) for c in without if c in outcomes}
    for v, c in varied.items():
        change = _minus(outcomes[v], state.outcome)
        renewed[v] = _plus(change, renewed[c]) if c in renewed else _plus(change, table[c])
    for c in without:
        renewed.setdefault(c, table[c])
    for c in added:
        renewed[c] = _minus(outcomes[c], state.outcome)
    return renewed
