"""Function vectors: which heads carry a task from its demonstrations, the one vector that they write, and its form as head outputs.

    t[l,h]   = mean of head outputs at the last token of few-shot prompts (:func:`headpatch.tune.soft.embed`)
    effect   = p(answer | o[l,h,last] <- t[l,h]) - p(answer),  in few-shot prompts whose answers are shuffled; mean over prompts
    f        = sum over the heads with the largest effects of W_O[l][:, h] t[l,h]
    v        : sum over h of W_O[layer][:, h] v[h] = f,  of least norm

The heads are found once for a model, over prompts of several tasks; f is a task's own. Which layer it enters, and how strongly, is
chosen on validation pairs.

Source: Todd et al., arXiv 2310.15213, github.com/ericwtodd/function_vectors (commit fb9eac7). Where this differs from the code:
prompts come from a seed, their last token alone is run again for each head, and f enters with a layer's attention output instead of
behind its MLP.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headpatch.errors import HeadpatchError
from headpatch.tune.engine import Beginnings, Edit, LastTokens
from headpatch.tune.pairs import Format, Pair, drawn, first_tokens

__all__ = ["HeadWriter", "addition", "best_layer", "function_vector", "mediation"]

ROWS = 256
"""Heads, or layers' rows, that are tried in one batch; on a GPU more are."""


def mediation(
    model: LastTokens, tasks: Sequence[tuple[Sequence[Pair], Sequence[Tensor]]], style: Format, *, prompts: int = 25,
    shots: int = 10, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """What each head's mean output does to the answer's probability where demonstrations say nothing, by ``layer.head``.

    Parameters
    ----------
    tasks
        Each task's training pairs and its vectors, per layer [H, d].
    prompts, shots
        Prompts of each task, and their demonstrations.
    progress
        Called with prompts done and prompts in all.

    Returns
    -------
    dict
        Mean effects; a ranking that :func:`headpatch.tune.lora` and others take, with ``top=``.
    """
    heads = [(layer, h) for layer, n in enumerate(model.shape.parts[model.shape.main].num_heads) for h in range(n)]
    total, done = torch.zeros(len(heads), dtype=torch.float64), 0
    for pairs, vectors in tasks:
        rng = random.Random(f"shuffle {seed}")  # noqa: S311
        texts, answers = [], []
        for shown, asked in drawn(pairs, shots, prompts, seed):
            wrong = [pair.answer for pair in shown]
            rng.shuffle(wrong)
            texts.append(
                style.prompt(asked.question, [Pair(p.question, a) for p, a in zip(shown, wrong, strict=True)])
            )
            answers.append(style.said(asked.answer))
        encoded, firsts = first_tokens(model, texts, answers)
        for ids, first in zip(encoded, firsts, strict=True):
            total += _effects(model, model.begin([ids]), first, vectors, heads)
            done += 1
            if progress is not None:
                progress(done, prompts * len(tasks))
    return {f"{layer}.{h}": float(x) / done for (layer, h), x in zip(heads, total, strict=True)}


def _effects(
    model: LastTokens, prompt: Beginnings, first: int, vectors: Sequence[Tensor], heads: Sequence[tuple[int, int]]
) -> Tensor:  # fmt: skip
    """[heads] differences of the probability of token `first`."""
    found = []
    with torch.no_grad():
        before = model.run(prompt, [0]).double().softmax(-1)[0, first]
        size = ROWS * model.wider
        for start in range(0, len(heads), size):
            some = heads[start : start + size]
            after = model.run(prompt, [0] * len(some), _one_each(some, vectors)).double().softmax(-1)[:, first]
            found.append((after - before).cpu())
    return torch.cat(found)


def _one_each(heads: Sequence[tuple[int, int]], vectors: Sequence[Tensor]) -> Edit:
    """Row i has the output of the i-th head replaced by its mean."""
    at: dict[int, tuple[list[int], list[int]]] = {}
    for row, (layer, head) in enumerate(heads):
        rows, which = at.setdefault(layer, ([], []))
        rows.append(row)
        which.append(head)

    def edit(layer: int, o: Tensor) -> Tensor:
        if layer not in at:
            return o
        rows, which = (torch.tensor(x, device=o.device) for x in at[layer])
        return o.index_put((rows, which), vectors[layer].index_select(0, which).to(o.dtype))

    return edit


def function_vector(model: LastTokens, vectors: Sequence[Tensor], heads: Sequence[str]) -> Tensor:
    """What these heads (``layer.head``) write together, [D] float64."""
    total: Any = 0.0
    for head in heads:
        layer, h = map(int, head.split("."))
        total = total + vectors[layer][h].double() @ model.writer(layer)[h].double()
    if not isinstance(total, Tensor):
        raise HeadpatchError("a function vector is the sum of what some heads write; name at least one")
    return total


class HeadWriter:
    """Writes vectors of the residual stream as head outputs of one layer.

    Parameters
    ----------
    writer
        [H, d, D] the layer's output projection.
    cut
        Directions that the projection weakens to less than this share of its strongest are left out: they would ask for outputs so
        large that low precision could not hold what is left of them.
    """

    def __init__(self, writer: Tensor, cut: float = 0.01) -> None:
        self.shape = writer.shape[:2]
        self.writer = writer.double().flatten(0, 1)  # [H d, D]
        left, sizes, right = torch.linalg.svd(self.writer, full_matrices=False)
        keep = sizes > cut * sizes[0]
        self.solver = (left[:, keep] / sizes[keep]) @ right[keep]

    def __call__(self, vector: Tensor) -> tuple[Tensor, float]:
        """Head outputs [H, d] float32 of least norm that write `vector` [D], and what is missing of it as a share of its norm."""
        target = vector.to(self.solver)
        v = self.solver @ target
        missing = float((v @ self.writer - target).norm() / target.norm().clamp_min(1e-30))
        return v.view(self.shape).float(), missing


def addition(layer: int, values: Tensor, scale: float = 1.0) -> Edit:
    """The edit itself: head outputs [H, d] added in one layer at the last token."""

    def edit(at: int, o: Tensor) -> Tensor:
        return o if at != layer else o.float() + scale * values.to(o.device)

    return edit


def best_layer(
    model: LastTokens, vector: Tensor, beginnings: Beginnings, rows: Sequence[int], targets: Tensor,
    writers: Mapping[int, HeadWriter] | None = None, scale: float = 1.0,
) -> tuple[int, Mapping[int, float]]:  # fmt: skip
    """The layer where adding a function vector makes the first answer tokens most probable.

    Parameters
    ----------
    beginnings, rows, targets
        Zero-shot prompts of validation pairs, and the first token of each one's answer, [n].
    writers
        Of the layers to try; default: of all. Making one takes a decomposition of the projection, so keep them for several tasks.

    Returns
    -------
    (int, mapping)
        The layer, and the mean log-probability of the targets, in nats, for each.
    """
    every = range(model.shape.parts[model.shape.main].num_layers)
    writers = {n: HeadWriter(model.writer(n)) for n in every} if writers is None else writers
    found: dict[int, float] = {}
    layers, n = list(writers), len(rows)
    together = max(1, ROWS * model.wider // n)
    for start in range(0, len(layers), together):
        # Several layers in one batch, a block of rows each: a run of few rows costs little less than one of many.
        values = {layer: writers[layer](vector)[0] for layer in layers[start : start + together]}
        block = {layer: slice(i * n, (i + 1) * n) for i, layer in enumerate(values)}

        def edit(
            at: int, o: Tensor, values: Mapping[int, Tensor] = values, block: Mapping[int, slice] = block
        ) -> Tensor:
            if at not in values:
                return o
            changed = o.float().clone()
            changed[block[at]] += scale * values[at].to(o.device)
            return changed

        with torch.no_grad():
            logp = model.run(beginnings, list(rows) * len(values), edit).float().log_softmax(-1)
        right = logp.gather(-1, targets.repeat(len(values))[:, None]).view(len(values), n).mean(1)
        found.update(zip(values, right.tolist(), strict=True))
    return max(found, key=lambda layer: found[layer]), found
