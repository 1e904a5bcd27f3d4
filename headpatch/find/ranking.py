"""Scores of heads, and the recipe that keeps the full cache of the best ones.

Scores rank the KV heads of the whole model, so that layers get unequal counts. Of heads with equal scores the one in the lower layer,
then with the lower number, comes first: the same scores give the same recipe everywhere. A recipe holds the list of heads; scores are
in its provenance and in the JSON file.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.heads import to_selectors
from headpatch.recipe import Recipe
from headpatch.show import describe, short

if TYPE_CHECKING:
    from headpatch.heads import PartShape

__all__ = ["HeadScores", "default_sparsity", "full_heads", "keep_full"]

FORMAT = 1


@dataclass(frozen=True)
class HeadScores:
    """What a finder measured.

    Attributes
    ----------
    what
        The score, in a word.
    kind
        ``query`` or ``kv``: which heads it is of.
    values
        ``{layer: (score of head 0, ...)}``; layers that cannot stream (they see a window only) are missing.
    about
        How it was measured: data, seed, settings, versions.
    model
        A recipe's ``model:`` block.
    """

    what: str
    kind: str
    values: Mapping[int, tuple[float, ...]]
    about: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("query", "kv"):
            raise HeadpatchError(f"scores are of query or of kv heads, not of {short(self.kind)}")
        wrong = [(n, h) for n, row in self.values.items() for h, v in enumerate(row) if not math.isfinite(v)]
        if wrong or not self.values:
            raise HeadpatchError(f"head {wrong[0][0]}.{wrong[0][1]} has no score" if wrong else "there are no scores")

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, score), best first, ties in the order of layers and heads."""
        found = [(layer, head, v) for layer, row in self.values.items() for head, v in enumerate(row)]
        return sorted(found, key=lambda e: (-e[2], e[0], e[1]))

    def of_kv_heads(self, shape: PartShape) -> HeadScores:
        """Scores of KV heads: the best of the query heads that each one serves."""
        if self.kind == "kv":
            return self
        values = {}
        for layer, row in self.values.items():
            groups = len(row) // shape.num_kv_heads[layer]
            values[layer] = tuple(max(row[k * groups : (k + 1) * groups]) for k in range(shape.num_kv_heads[layer]))
        return HeadScores(self.what, "kv", values, self.about, self.model)

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        plain = {
            "headpatch_scores": FORMAT, "what": self.what, "kind": self.kind, "model": dict(self.model), "about": dict(self.about),
            "scores": {str(layer): list(row) for layer, row in self.values.items()},
        }  # fmt: skip
        Path(path).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what :meth:`save` wrote; HeadpatchError where the file is something else."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HeadpatchError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(data, dict) or data.get("headpatch_scores") != FORMAT:
            raise HeadpatchError(f"{path}: is no file of scores that `headpatch find ... --scores` wrote")
        try:
            values = {int(layer): tuple(map(float, row)) for layer, row in data["scores"].items()}
            return cls(str(data["what"]), str(data["kind"]), values, dict(data["about"]), dict(data["model"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HeadpatchError(f"{path}: the file of scores is damaged: {describe(error)} {error}") from None


def default_sparsity(shape: PartShape) -> float:
    """Share of KV heads that stream, where nobody says: 0.5 where query heads share KV heads, 0.75 where each has its own."""
    shared = any(h > k for h, k in zip(shape.num_heads, shape.num_kv_heads, strict=True))
    return 0.5 if shared else 0.75


def full_heads(
    scores: HeadScores, *, sparsity: float | None = None, threshold: float | None = None
) -> dict[int, tuple[int, ...]]:
    """KV heads that keep everything, ``{layer: (head, ...)}``, ascending.

    Parameters
    ----------
    sparsity
        Share of the scored heads that stream, 0 to 1; what does not come out even is kept.
    threshold
        Instead: heads with a score of at least this are kept.

    Raises
    ------
    HeadpatchError
        Both or neither are given, one is out of range, or no head would be kept (streaming_llm is the method for that).
    """
    if scores.kind != "kv":
        raise HeadpatchError("a cache is kept per KV head; these are scores of query heads")
    if (sparsity is None) == (threshold is None):
        raise HeadpatchError("give a sparsity or a threshold")
    ranked = scores.ranked()
    if sparsity is not None:
        if not 0 <= sparsity <= 1:
            raise HeadpatchError(f"a sparsity of {sparsity:g}: it is the share of heads that stream, 0 to 1")
        kept = ranked[: math.ceil(round((1 - sparsity) * len(ranked), 9))]
    else:
        assert threshold is not None
        kept = [entry for entry in ranked if entry[2] >= threshold]
    if not kept:
        raise HeadpatchError(
            "no head would keep its full cache; if that is meant, write a recipe of method streaming_llm"
        )
    found: dict[int, list[int]] = {}
    for layer, head, _ in kept:
        found.setdefault(layer, []).append(head)
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(found.items())}


def keep_full(
    scores: HeadScores, shape: PartShape, *, sink: int, recent: int, sparsity: float | None = None,
    threshold: float | None = None, name: str, description: str | None = None, provenance: Mapping[str, Any] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe: KV heads with the best scores keep everything, the others the first `sink` and the last `recent` tokens.

    Parameters
    ----------
    scores
        Of KV heads. Heads of layers without scores, which see a window only, keep all that their window holds.
    shape
        Of the scored attention stack.
    sparsity, threshold
        As for :func:`full_heads`.
    name, description, provenance
        Of the recipe; scores, and how they were measured, are added to the provenance.

    Raises
    ------
    HeadpatchError
        As :func:`full_heads`; or scores and shape do not belong together.
    """
    for layer, row in scores.values.items():
        if layer >= shape.num_layers or len(row) != shape.num_kv_heads[layer]:
            raise HeadpatchError(f"layer {layer} of the scores has {len(row)} KV heads, the model has others")
    full = full_heads(scores, sparsity=sparsity, threshold=threshold)
    kept = {
        layer: dict.fromkeys(full.get(layer, ()) if layer in scores.values else range(shape.num_kv_heads[layer]), True)
        for layer in shape.softmax_layers()
    }
    selectors = to_selectors({layer: heads for layer, heads in kept.items() if heads}, shape, "kv")
    count = sum(map(len, full.values()))
    total = sum(map(len, scores.values.values()))
    chosen: dict[str, Any] = {"sparsity": sparsity} if sparsity is not None else {"threshold": threshold}
    lowest = scores.ranked()[count - 1][2]
    tied = [(layer, head) for layer, head, v in scores.ranked() if v == lowest]
    if len(tied) > 1 and any(head not in full.get(layer, ()) for layer, head in tied):
        among = sum(head in full.get(layer, ()) for layer, head in tied)
        chosen["ties"] = (
            f"{among} of {len(tied)} heads with the lowest kept score are kept: those of the lowest layers"
        )
    return Recipe.from_dict({
        "headpatch": 1,
        "name": name,
        "description": description
        or f"{count} of {total} KV heads keep everything, the others {sink} first and {recent} last tokens.",
        "model": dict(scores.model),
        "patches": [{"method": "duo_attention", "full_kv_heads": list(selectors), "sink": sink, "recent": recent}],
        "provenance": {
            "score": scores.what, **chosen, "streaming": f"{total - count} of {total} KV heads", **(provenance or {}), **scores.about,
            "scores": {str(layer): [float(f"{v:.6g}") for v in row] for layer, row in scores.values.items()},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
    })  # fmt: skip
