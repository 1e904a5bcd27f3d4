"""Can a model still find what was said long ago? Needles at every depth of texts of every length, with and without recipes.

Each cell of the grid (length x depth) has the same prompts for every recipe, so that differences are paired. A needle counts as found
if its answer stands in what the model writes (greedily); the recall of the answer's words says how nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError
from headpatch.evaluate import matches
from headpatch.find import stats
from headpatch.find.engine import open_bench
from headpatch.find.haystack import Haystack, generated
from headpatch.find.needles import Needle, make_needle, needle_prompt, rng_of
from headpatch.find.retrieval import recall
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["Asked", "NeedleGrid", "evaluate_needles"]

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Asked:
    """One prompt: what was right, and what was written under each name."""

    length: int
    depth: float
    tokens: int
    answer: str
    written: Mapping[str, str]

    def found(self, name: str) -> bool:
        """Whether the answer stands in what was written."""
        return matches(self.written[name], self.answer)

    def recall(self, name: str) -> float:
        """Share of the answer's words in what was written."""
        return recall(self.written[name], self.answer)


@dataclass(frozen=True)
class NeedleGrid:
    """What :func:`evaluate_needles` measured.

    Attributes
    ----------
    names
        ``untouched`` first, then the recipes.
    lengths, depths
        The grid.
    asked
        Every prompt.
    about
        Data, seed, engine and versions.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    asked: tuple[Asked, ...]
    about: Mapping[str, Any]

    def share(self, name: str, length: int | None = None, depth: float | None = None) -> stats.Estimate:
        """Share of needles found, of a cell, a row, a column or all, with a 95 % interval."""
        found = [a.found(name) for a in self._of(length, depth)]
        return stats.wilson(sum(found), len(found))

    def recalled(self, name: str, length: int | None = None, depth: float | None = None) -> float:
        """Mean recall of the answers' words."""
        chosen = self._of(length, depth)
        return sum(a.recall(name) for a in chosen) / len(chosen)

    def difference(self, name: str, length: int | None = None) -> tuple[stats.Estimate, float]:
        """Change of the share against the untouched model, paired by prompt, and McNemar's exact p-value."""
        import torch

        chosen = self._of(length, None)
        after, before = (torch.tensor([float(a.found(n)) for a in chosen]) for n in (name, UNTOUCHED))
        return stats.paired(after, before), stats.mcnemar(int((after > before).sum()), int((after < before).sum()))

    def matrix(self, name: str) -> list[list[float]]:
        """Shares as rows of depths and columns of lengths."""
        return [[self.share(name, n, d).value for n in self.lengths] for d in self.depths]

    def _of(self, length: int | None, depth: float | None) -> list[Asked]:
        return [a for a in self.asked if length in (None, a.length) and depth in (None, a.depth)]

    def lines(self) -> list[str]:
        """As tables in plain text: one grid per name, percent found; then the differences."""
        made = []
        for name in self.names:
            whole = self.share(name)
            made.append(
                f"{name}: {100 * whole.value:.1f} % of {whole.rows} needles found ({100 * whole.low:.1f} to {100 * whole.high:.1f})"
            )
            made.append("   depth" + "".join(f"{n:>8}" for n in self.lengths) + "  tokens")
            for depth, row in zip(self.depths, self.matrix(name), strict=True):
                made.append(f"{100 * depth:6.0f} %" + "".join(f"{100 * v:8.0f}" for v in row))
            made.append("")
        for name in self.names[1:]:
            change, p = self.difference(name)
            made.append(
                f"{name}: {100 * change.value:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f}), McNemar p = {p:.2g}"
            )
        return made

    def plain(self) -> dict[str, Any]:
        """For JSON: shares as fractions."""

        def of(e: stats.Estimate) -> dict[str, Any]:
            return {"value": e.value, "low": e.low, "high": e.high, "rows": e.rows}

        made: dict[str, Any] = {
            **self.about,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "confidence": 0.95,
        }
        made["results"] = {
            name: {
                "found": of(self.share(name)), "recall": self.recalled(name), "grid": self.matrix(name),
                "by_length": {str(n): of(self.share(name, n)) for n in self.lengths},
            }
            for name in self.names
        }  # fmt: skip
        for name in self.names[1:]:
            change, p = self.difference(name)
            made["results"][name] |= {"difference": of(change), "mcnemar_p": p}
        made["prompts"] = [
            {"length": a.length, "depth": a.depth, "tokens": a.tokens, "answer": a.answer, "written": dict(a.written)}
            for a in self.asked
        ]
        return made


def evaluate_needles(
    model: Any, tokenizer: Any, recipes: Mapping[str, Recipe | Mapping[str, Any] | str] | None = None, *, lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), prompts: int = 1, kind: str = "fact", needle: Needle | None = None,
    haystack: Haystack = generated, chat: bool = False, max_new_tokens: int = 48, seed: int = 0,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> NeedleGrid:  # fmt: skip
    """Ask the untouched model, and the model under each recipe, the same questions.

    Parameters
    ----------
    recipes
        By name; anything that :func:`headpatch.load_recipe` takes.
    lengths, depths, prompts
        Tokens of a prompt at most, depths of its needle (0 to 1), and prompts of each cell.
    kind, needle
        A generator (:data:`headpatch.find.needles.KINDS`), or one needle for all prompts.
    haystack
        The text.
    seed
        Of needles and texts.

    Raises
    ------
    HeadpatchError
        Nothing to ask, a name that is taken, or as :func:`headpatch.find.needles.needle_prompt`.
    """
    lengths, depths = tuple(sorted(dict.fromkeys(lengths))), tuple(sorted(dict.fromkeys(depths)))
    if not lengths or not depths or prompts < 1:
        raise HeadpatchError("needles need at least one length, one depth and one prompt")
    loaded = {name: load_recipe(recipe) for name, recipe in (recipes or {}).items()}
    if UNTOUCHED in loaded:
        raise HeadpatchError(f"{UNTOUCHED!r} is the model without a recipe; give the recipe another name")
    bench = open_bench(model, tokenizer)
    cells = []  # all of them before the first is asked: what cannot be asked is said at once
    for length in lengths:
        for depth in depths:
            cell = []
            for number in range(prompts):
                rng = rng_of(seed, kind, length, depth, number)
                one = needle or make_needle(kind, rng)
                cell.append(needle_prompt(bench, haystack, one, length, depth, rng, chat=chat))
            cells.append(cell)
    asked: list[Asked] = []
    for cell in cells:
        progress("prompts", len(asked), len(cells) * prompts)
        texts = [p.hidden.text for p in cell]
        written = {
            name: bench.generate(texts, recipe, max_new_tokens, cell[0].hidden.special_tokens)
            for name, recipe in {UNTOUCHED: None, **loaded}.items()
        }
        asked += [
            Asked(p.length, p.depth, len(p.hidden.ids), p.needle.answer, {name: w[i] for name, w in written.items()})
            for i, p in enumerate(cell)
        ]
    progress("prompts", len(asked), len(asked))
    about = {
        "data": {**haystack.about(), "needles": kind if needle is None else needle.sentence}, "chat": chat, "seed": seed,
        "max_new_tokens": max_new_tokens, **bench.about(),
    }  # fmt: skip
    return NeedleGrid((UNTOUCHED, *loaded), lengths, depths, tuple(asked), about)
