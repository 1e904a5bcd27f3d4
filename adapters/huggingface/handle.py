"""The handle that ``headpatch.apply`` returns for a transformers model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.controller import Controller, Record, controller_of
from headpatch.adapters.huggingface.plan import rows_key
from headpatch.adapters.huggingface.report import Report, build_report
from headpatch.adapters.huggingface.spans import ChosenRows, Spans, row_numbers, token_spans
from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["HuggingFaceHandle"]


class HuggingFaceHandle:
    """One recipe on one transformers model.

    Keeps no model alive: once the model is gone, :meth:`remove` does nothing and everything else raises HeadpatchError.
    """

    def __init__(self, root: nn.Module, record: Record) -> None:
        self._root = weakref.ref(root)
        self._id = record.id
        self._recipe = record.recipe

    def __repr__(self) -> str:
        root = self._root()
        state = "model gone" if root is None else ("applied" if self._find() else "removed")
        return f"<headpatch handle: {self._recipe.name or 'unnamed recipe'} on {type(root).__name__}, {state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceHandle) and (self._id, self._root) == (other._id, other._root)

    def __hash__(self) -> int:
        return hash(self._id)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""
        return self._recipe

    @property
    def active(self) -> bool:
        """Whether the recipe is on the model."""
        return self._find() is not None

    def remove(self) -> None:
        """Take the recipe off; the model is bit for bit as before. A second call does nothing.

        Raises HeadpatchError while the model is running. Caches that were filled under the recipe refuse to be used on.
        """
        root = self._root()
        found = controller_of(root) if root is not None else None
        if found is not None:
            found.uninstall(self._id)

    def report(self, self_check: bool | None = None) -> Report:
        """What was patched, and whether it fires.

        Parameters
        ----------
        self_check
            Run each kind of patched layer once on random tensors: an identity edit must be bit-equal to the untouched kernel, the
            real edit must equal a plain float64 reference. Default: where a compiler traced the model, whose calls cannot be
            counted.

        Returns
        -------
        Report
            Printable; per layer the heads, methods, strengths and eager calls; modules that do not route; the self-check's result.
        """
        controller, record = self._on_model()
        return build_report(controller, record, self_check)

    @contextlib.contextmanager
    def inputs(
        self, *, spans: Sequence[Any] | None = None, prompt_len: Sequence[int] | None = None,
        without_image: Sequence[int | None] | None = None, rows: Sequence[bool] | None = None,
        prompts: Sequence[str] | None = None, tokenizer: Any = None,
    ) -> Iterator[None]:  # fmt: skip
        """Data for the calls inside the with block, one entry per row of the batch.

        Parameters
        ----------
        spans
            Per row, a list of spans of that row's unpadded prompt: a token range ``(start, stop)``, ``{"tokens": [start, stop]}``,
            ``{"chars": [start, stop]}``, or a substring (its first occurrence). Characters and substrings need `prompts` and
            `tokenizer`. Several spans of a row act as their union.
        prompt_len
            Real tokens of each row's prompt, where the first call does not show them (chunks fed by hand).
        without_image
            Per row, the row of the same batch that holds the prompt without its image; None for rows that need none.
        rows
            Per row, whether this handle's recipe acts on it at all. All other data is for every recipe on the model; this is for
            this handle's, so that one batch can carry another recipe in each row: see :func:`headpatch.by_row`. Recipes that edit
            head outputs only.
        prompts, tokenizer
            The rows' texts and a fast tokenizer, called as ``tokenizer(prompt)``.

        Raises
        ------
        HeadpatchError
            A span is not found, out of range or of another type; an entry is given twice; the handle is off.
        """
        controller, record = self._on_model()
        data: dict[str, Any] = {}
        if spans is not None:
            data["spans"] = Spans.of(token_spans(spans, prompts, tokenizer))
        if prompt_len is not None:
            data["prompt_len"] = torch.tensor(row_numbers("prompt_len", prompt_len, 1))
        if without_image is not None:
            data["without_image"] = row_numbers("without_image", without_image, 0, or_none=True)
        if rows is not None:
            others = {patch.method.name for patch in self._recipe.patches if patch.method.family != "output"}
            if others:
                raise HeadpatchError(
                    f"inputs(rows=...) can keep edits of head outputs to some rows, and {', '.join(sorted(others))} does more: "
                    "run those rows in a batch of their own"
                )
            data[rows_key(record.id)] = ChosenRows.of(rows)
        if not data:
            raise HeadpatchError("inputs() was given nothing; name spans, prompt_len, rows or without_image")
        with controller.given(data):
            yield

    def strengths(self, trainable: bool | None = None) -> dict[str, Tensor]:
        """The recipe's strengths on this model, per patch and layer.

        Parameters
        ----------
        trainable
            True turns them into leaves with ``requires_grad``, for an optimiser; False turns that off; None changes nothing.

        Returns
        -------
        dict
            ``"patches.{i}.{part}.{layer}"`` -> tensor [h], the patch's heads of that layer in ascending order.
        """
        controller, record = self._on_model()
        if trainable is not None and trainable != record.trainable:
            controller.refuse_while_running("change strengths")
            record.trainable = trainable
            for key, value in record.strengths.items():
                record.strengths[key] = nn.Parameter(value.detach().clone()) if trainable else value.detach()
            if not trainable:
                controller.freeze(record)
            controller.refresh()
        return {f"patches.{i}.{part}.{layer}": t for (i, part, layer), t in record.strengths.items()}

    def _find(self) -> Record | None:
        root = self._root()
        controller = controller_of(root) if root is not None else None
        return next((r for r in controller.records if r.id == self._id), None) if controller else None

    def _on_model(self) -> tuple[Controller, Record]:
        root = self._root()
        if root is None:
            raise HeadpatchError("the model of this handle no longer exists; apply the recipe to a live model")
        controller, record = controller_of(root), self._find()
        if controller is None or record is None:
            raise HeadpatchError("this handle's recipe was removed from its model; apply it again")
        return controller, record
