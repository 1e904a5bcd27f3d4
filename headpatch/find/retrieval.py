"""Retrieval heads: which heads look at the very token that the model is about to copy.

A needle stands in a long text and is asked for; the model answers greedily. With n0..n1 the tokens of the needle's answer in the
prompt, w_t the t-th token that is written, and a_h[t] the attention [keys] of the query that predicts it,

    hit(h, t) = 1  iff  j = argmax a_h[t],  n0 <= j < n1  and  prompt[j] == w_t
    score of one run = sum over t of hit(h, t) / (n1 - n0);    score of a head = its mean over the runs that succeed

A run succeeds if more than half of the answer's words are in what was written. Only the rows of the queries that write are looked at,
one at a time; the prompt is read by the model's own kernels, unobserved.

Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574; code:
github.com/nightdessert/Retrieval_Head, whose counts (repeats included, so that a score can exceed 1) are taken, not the paper's
sets. Differences: an answer that is not found in the prompt's tokens is an error there to be silent about, here to be loud; needles
are drawn anew for every prompt; runs are counted, and standard errors given, by head; it may stop early, once the ranking is
stable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.api import observe
from headpatch.errors import HeadpatchError
from headpatch.find.engine import open_bench
from headpatch.find.haystack import Haystack, generated
from headpatch.find.needles import Needle, Prompt, make_needle, needle_prompt, rng_of
from headpatch.find.provenance import versions
from headpatch.find.ranking import HeadScores

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.find.engine import Bench

__all__ = ["Probe", "Retrieval", "Run", "recall", "retrieval_heads", "watch"]

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Probe:
    """Which prompts are asked.

    Attributes
    ----------
    lengths, depths
        Tokens of the prompts, and depths of the needle (0 to 1): every pair of them, `rounds` times.
    kind, needle
        A generator of needles (:data:`headpatch.find.needles.KINDS`), or one needle for all prompts.
    chat
        Use the model's chat template.
    max_new_tokens
        Tokens of an answer, at most; it also ends at a line break or where the model ends it.
    success
        Share of the answer's words that a run must write, more than this.
    stable, top
        Stop once the `top` best heads were the same after this many rounds in a row; 0 never stops early.
    seed
        Of needles and texts.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rounds: int = 3
    kind: str = "fact"
    needle: Needle | None = None
    chat: bool = False
    max_new_tokens: int = 50
    success: float = 0.5
    stable: int = 0
    top: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or self.rounds < 1:
            raise HeadpatchError("retrieval scores need at least one length, one depth and one round")


@dataclass(frozen=True)
class Run:
    """One prompt: what was written, whether that succeeded, and hits over answer tokens by layer, [H]."""

    length: int
    depth: float
    answer: str
    written: str
    recall: float
    success: bool
    scores: Mapping[int, Tensor]


@dataclass(frozen=True)
class Retrieval:
    """What :func:`retrieval_heads` found.

    Attributes
    ----------
    scores
        Of query heads.
    errors
        Standard errors of the means, like the scores; 0 with a single run.
    runs
        Every run, those that failed too.
    """

    scores: HeadScores
    errors: Mapping[int, tuple[float, ...]]
    runs: tuple[Run, ...]

    def heads(self, above: float = 0.1) -> list[tuple[int, int, float]]:
        """Retrieval heads, best first: those with a score above this."""
        return [entry for entry in self.scores.ranked() if entry[2] > above]


def retrieval_heads(
    model: Any, tokenizer: Any, probe: Probe | None = None, *, haystack: Haystack = generated, model_name: str | None = None,
    progress: Progress = lambda what, done, total: None, say: Callable[[str], object] = lambda line: None,
) -> Retrieval:  # fmt: skip
    """Measure every query head of the model's main part; nothing about the model is changed. Recipes that are on it stay on.

    Raises
    ------
    HeadpatchError
        No run succeeds, so that there is nothing to score by; or as :func:`headpatch.find.needles.needle_prompt`.
    """
    import torch

    probe = probe or Probe()
    bench = open_bench(model, tokenizer)
    runs: list[Run] = []
    best: list[list[tuple[int, int]]] = []
    total = len(probe.lengths) * len(probe.depths) * probe.rounds
    for number in range(probe.rounds):
        for length in probe.lengths:
            for depth in probe.depths:
                progress("needles", len(runs), total)
                runs.append(_run(model, bench, haystack, probe, length, depth, number))
        good = [r for r in runs if r.success]
        say(f"round {number + 1}: {len(good)} of {len(runs)} needles were found")
        if good and probe.stable:
            ranked = _scores(bench, good, {}, model_name).ranked()
            best.append([(layer, head) for layer, head, _ in ranked[: probe.top]])
            if len(best) > probe.stable and all(b == best[-1] for b in best[-probe.stable - 1 :]):
                say(f"the {probe.top} best heads have not changed for {probe.stable} rounds: that is enough")
                break
    progress("needles", len(runs), len(runs))
    good = [r for r in runs if r.success]
    if not good:
        raise HeadpatchError(
            f"the model found none of {len(runs)} needles, and failed runs say nothing about its heads; ask for shorter prompts, for "
            "another kind of needle, or for the chat template. It wrote, for instance: "
            f"{runs[0].written.strip()[:80]!r} where {runs[0].answer!r} was right"
        )
    about = {
        "data": {**haystack.about(), "needles": probe.kind if probe.needle is None else probe.needle.sentence},
        "lengths": list(probe.lengths), "depths": list(probe.depths), "runs": len(runs), "successful": len(good), "chat": probe.chat,
        "seed": probe.seed, **versions(bench.about()),
    }  # fmt: skip
    errors = {}
    for layer in good[0].scores:
        stacked = torch.stack([r.scores[layer] for r in good])
        spread = stacked.std(0) / len(good) ** 0.5 if len(good) > 1 else torch.zeros(stacked.shape[1])
        errors[layer] = tuple(spread.tolist())
    return Retrieval(_scores(bench, good, about, model_name), errors, tuple(runs))


def watch(
    model: Any, bench: Bench, prompt: Prompt, max_new_tokens: int, stop: Callable[[str], bool]
) -> tuple[list[int], dict[int, Tensor]]:
    """Let the model answer; how often each head's strongest key was the answer's token that is being copied.

    Returns
    -------
    (list, dict)
        The tokens that were written, and hits by layer, [H] int64.
    """
    import torch

    ids, (first, last) = prompt.hidden.ids, prompt.hidden.answers[0]
    session = bench.session()
    part = bench.shape.parts[bench.shape.main]
    session.feed(ids[:-1])
    written: list[int] = []
    hits = {layer: torch.zeros(part.num_heads[layer], dtype=torch.long) for layer in part.softmax_layers()}
    token = ids[-1]
    with observe(model, "window_scores", "*.*", window=1) as seen:
        while len(written) < max_new_tokens:
            seen.clear()
            token = int(session.feed([token]).argmax())
            # A layer that sees a window holds the last keys only: count from the end.
            for layer, found in _strongest(seen, part.num_heads, session.length).items():
                for head, place in enumerate(found):
                    hits[layer][head] += first <= place < last and ids[place] == token
            if token in bench.ends:
                break
            written.append(token)
            if stop(bench.text(written)):
                break
    return written, hits


def _strongest(
    seen: Mapping[tuple[str, str], Sequence[Tensor]], heads: Sequence[int], length: int
) -> dict[int, list[int]]:
    """The strongest key of each head in the last call, counted from the sequence's first token."""
    import torch

    found = {}
    for layer, count in enumerate(heads):
        if not count:
            continue
        rows = torch.stack([seen["window_scores", f"{layer}.{h}"][-1][0, -1] for h in range(count)])
        missing = max(0, length - rows.shape[-1])
        found[layer] = [place + missing for place in rows.argmax(-1).tolist()]
    return found


def recall(text: str, answer: str) -> float:
    """Share of the answer's words that the text has, each as often as the answer has it: the recall of ROUGE-1."""
    have, wanted = _bag(text), _bag(answer)
    return sum(min(n, have.get(w, 0)) for w, n in wanted.items()) / max(1, sum(wanted.values()))


def _bag(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in re.findall(r"\w+", text.casefold()):
        found[word] = found.get(word, 0) + 1
    return found


def _run(model: Any, bench: Bench, haystack: Haystack, probe: Probe, length: int, depth: float, number: int) -> Run:
    rng = rng_of(probe.seed, number, length, depth)
    needle = probe.needle or make_needle(probe.kind, rng)
    prompt = needle_prompt(bench, haystack, needle, length, depth, rng, chat=probe.chat)
    first, last = prompt.hidden.answers[0]
    if last <= first:
        raise HeadpatchError(f"the answer {needle.answer!r} was not found among the prompt's tokens")
    written, hits = watch(model, bench, prompt, probe.max_new_tokens, lambda text: "\n" in text.lstrip())
    text = bench.text(written)
    got = recall(text, needle.answer)
    scores = {layer: h.double() / (last - first) for layer, h in hits.items()}
    return Run(length, depth, needle.answer, text, got, got > probe.success, scores)


def _scores(bench: Bench, good: Sequence[Run], about: Mapping[str, Any], model_name: str | None) -> HeadScores:
    import torch

    values = {layer: tuple(torch.stack([r.scores[layer] for r in good]).mean(0).tolist()) for layer in good[0].scores}
    name = model_name or bench.about()["model"]
    return HeadScores("retrieval score", "query", values, about, bench.shape.to_block(name))
