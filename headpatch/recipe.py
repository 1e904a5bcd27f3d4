"""Recipes: which heads of a model, what is done to them and how strongly.

A :class:`Recipe` is immutable and checked as far as it can be without a model; :func:`resolve` checks it against a model's heads
and says for each patch which heads it means. ``load_recipe`` (:mod:`headpatch.sources`) makes one from a file, a shipped name or the
hub, :meth:`Recipe.from_dict` from a dict.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from headpatch import schema, yamlio
from headpatch.errors import RecipeError, UnsupportedModelError
from headpatch.heads import ModelShape
from headpatch.operands import refusals, widest_scope
from headpatch.resolve import CheckedPatch, RecipeCheck, ResolvedPatch, check_shape, resolve
from headpatch.show import key_path
from headpatch.tensorfile import TensorFile, atomic_write, check_file_name, find_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.methods.base import Method

__all__ = ["CheckedPatch", "Patch", "Recipe", "RecipeCheck", "ResolvedPatch", "resolve"]


@dataclass(frozen=True)
class Patch:
    """One entry of ``patches``.

    Attributes
    ----------
    index
        Its place in the recipe, from 0.
    method
        The method with the patch's parameters. Where strengths differ by head, its own strength means nothing.
    part
        The attention stack it names; None for the model's main one.
    heads
        Pairs of selector and strength in the recipe's order, later ones overriding earlier ones; the strength is None for a method
        that has none. Empty for a cache policy that lists no heads.
    """

    index: int
    method: Method
    part: str | None
    heads: tuple[tuple[str, float | None], ...]

    @property
    def key(self) -> str:
        """Path of its heads in the recipe, for error messages: ``patches[0].heads``; of the patch where it lists none."""
        listed = self.method.heads_key
        return key_path(("patches", self.index, *([] if listed is None else [listed])))

    def content(self) -> dict[str, Any]:
        """What decides the numbers: method, version, parameters, heads with strengths; the form they were written in does not."""
        strength = self.method.strength_field()
        params = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method) if f is not strength}
        heads = [(selector, None if value is None else value + 0.0) for selector, value in self.heads]  # -0.0 is 0.0
        return {
            "method": self.method.name, "version": self.method.version, "part": self.part, "params": params, "heads": heads
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recipe:
    """Patches for a model. Made by :meth:`from_dict` or :func:`headpatch.load_recipe`, and never changed.

    Attributes
    ----------
    patches
        What is done, in order.
    name, description
        None where the recipe does not say.
    model
        The ``model:`` block; empty where there is none.
    tensors
        The recipe's safetensors file; None where there is none.
    provenance
        The ``provenance:`` block; empty where there is none.
    source
        Where it came from, for error messages.

    Two recipes are equal if their ``to_dict()`` are; `digest` is equal if they do the same to a model.
    """

    patches: tuple[Patch, ...]
    name: str | None = None
    description: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    tensors: TensorFile | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    _data: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, source: str | None = None, folder: str | os.PathLike[str] | None = None,
        arrays: bytes | None = None,
    ) -> Recipe:  # fmt: skip
        """Check a recipe and make it.

        Parameters
        ----------
        data
            As in a recipe file; it is copied.
        source
            What error messages call it.
        folder
            Where the recipe's safetensors file lies; a recipe with ``tensors:`` needs one.
        arrays
            The bytes of that file instead, for a recipe that is not on a disk; :meth:`save` writes it beside the recipe.

        Raises
        ------
        RecipeError
            Anything that is wrong; the message names the key and what would be right.
        """
        return cls._make(data, source, None if folder is None else Path(folder), True, arrays)

    @classmethod
    def _make(
        cls, data: object, source: str | None, folder: Path | None, verify: bool, arrays: bytes | None = None
    ) -> Recipe:  # fmt: skip
        try:
            plain = yamlio.check_plain(dict(data) if isinstance(data, Mapping) else data)
            schema.check_envelope(plain)
            patches = tuple(
                Patch(index, *schema.check_patch(index, patch)) for index, patch in enumerate(plain["patches"])
            )
            tensors = _find_tensors(plain, patches, folder, arrays)
            if tensors is not None and verify:
                tensors.verify()
        except RecipeError as error:
            raise error.at(source=source) from None
        return cls(
            patches=patches, name=plain.get("name"), description=plain.get("description"),
            model=_frozen(plain.get("model", {})), tensors=tensors,
            provenance=_frozen(plain.get("provenance", {})), source=source, _data=plain,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """A copy of the recipe as plain values, as it was written; :meth:`from_dict` takes it back."""
        return copy.deepcopy(self._data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as YAML, and its safetensors file beside it; each file appears whole or not at all.

        Returns
        -------
        Path
            The YAML file. Its folder is made if need be.

        Raises
        ------
        RecipeError
            `path` is a folder, or another safetensors file of that name lies beside it.
        """
        path = Path(path)
        if path.is_dir():
            raise RecipeError("is a folder", source=str(path), remedy="name a file in it, as in recipe.yaml")
        try:
            if self.tensors is not None:
                self.tensors.copy_to(path.parent)
            with atomic_write(path) as file:
                file.write(yamlio.dumps(self._data).encode())
        except OSError as error:
            raise RecipeError(
                f"cannot be written: {error.strerror or error}",
                source=str(path),
                remedy="name a file in a writable folder",
            ) from None
        except RecipeError as error:
            raise error.at(source=self.source) from None
        return path

    def push_to_hub(self, repo_id: str, *, path_in_repo: str = "recipe.yaml", **options: Any) -> str:
        """Upload the recipe and its safetensors file to huggingface.co in one commit; see :func:`headpatch.hub.push`."""
        from headpatch import hub

        address: str = hub.push(self, repo_id, path_in_repo=path_in_repo, **options)
        return address

    def check(self, model_or_config: Any) -> RecipeCheck:
        """Say what the recipe would patch, and touch nothing.

        Parameters
        ----------
        model_or_config
            A model or config that an adapter knows, or a :class:`~headpatch.heads.ModelShape`.

        Raises
        ------
        RecipeError
            The recipe does not fit the model.
        UnsupportedModelError
            No adapter knows the object, or its adapter cannot supply an operand.
        """
        from headpatch.registry import find_adapter

        if isinstance(model_or_config, ModelShape):
            return check_shape(self, model_or_config)
        adapter = find_adapter(model_or_config)
        if words := refusals(self.needs, adapter.supplies()):
            raise UnsupportedModelError(f"{adapter.name} cannot do this recipe exactly: {'; '.join(words)}")
        return check_shape(self, adapter.shape(model_or_config))

    def arrays(self) -> dict[str, Tensor]:
        """The recipe's arrays by name, on the CPU, read and checked on first use; empty where there are none."""
        return self._arrays

    @functools.cached_property
    def _arrays(self) -> dict[str, Tensor]:
        try:
            return {} if self.tensors is None else self.tensors.load()
        except RecipeError as error:
            raise error.at(source=self.source) from None

    @property
    def scope(self) -> str:
        """What requests may share, the narrowest of the patches': one of :data:`headpatch.operands.SCOPES`."""
        return widest_scope(patch.method.scope for patch in self.patches)

    @property
    def needs(self) -> tuple[str, ...]:
        """Operands that an engine must supply: see :data:`headpatch.operands.OPERANDS`."""
        return tuple(dict.fromkeys(name for patch in self.patches for name in patch.method.operands()))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) over what decides the numbers: methods, versions, parameters, heads, strengths, arrays.

        Name, description, model and provenance do not enter, nor does the form in which heads are written.
        """
        content = {
            "headpatch": schema.FORMAT,
            "patches": [patch.content() for patch in self.patches],
            "tensors": None if self.tensors is None else self.tensors.sha256,
        }
        return _hash(content)

    def salt(self, call_data: Any = None, prompt: Any = None) -> str:
        """Salt for a prefix cache: requests may share cached keys and values if it is equal.

        Parameters
        ----------
        call_data
            Data given with the call (spans), of plain values or arrays; enters if a patch has the scope *request*.
        prompt
            The whole prompt: token ids, and hashes of what else it holds (images); enters if a patch has the scope *prompt*.

        Raises
        ------
        ValueError
            A patch has the scope *prompt* and no prompt is given: sharing would be wrong.
        """
        scopes = {patch.method.scope for patch in self.patches}
        if "prompt" in scopes and prompt is None:
            raise ValueError("this recipe depends on the whole prompt (scope: prompt): its salt needs prompt=")
        return _hash([self.digest, call_data if "request" in scopes else None, prompt if "prompt" in scopes else None])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        return self._data == other._data and self.digest == other.digest  # the order of selectors counts, too

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Handles go to worker processes. The file was verified here, and is again when its arrays are read there.
        found = self.tensors
        if found is None or found.data is not None:
            return Recipe._make, (self._data, self.source, None, False, None if found is None else found.data)
        return Recipe._make, (self._data, self.source, found.path.parents[len(Path(found.file).parts) - 1], False)


def _find_tensors(
    data: dict[str, Any], patches: tuple[Patch, ...], folder: Path | None, arrays: bytes | None
) -> TensorFile | None:  # fmt: skip
    block = data.get("tensors")
    needing = [patch.method.name for patch in patches if "arrays" in patch.method.operands()]
    if block is None:
        if needing:
            raise RecipeError(
                f"is missing: {needing[0]} needs arrays", key="tensors",
                remedy="add tensors: {file: ..., sha256: ...}, a safetensors file beside the recipe",
            )  # fmt: skip
        return None
    if not needing:
        raise RecipeError("no patch of this recipe needs arrays", key="tensors", remedy="remove tensors")
    name = check_file_name(block["file"])
    if arrays is not None:
        return TensorFile(block["file"], block["sha256"], Path(name), arrays)
    if folder is None:
        raise RecipeError(
            "a recipe given as a dict has no folder in which its arrays lie", key="tensors.file",
            remedy="load the recipe from its file, or pass folder= to Recipe.from_dict",
        )  # fmt: skip
    return find_tensors(block["file"], block["sha256"], folder)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _hash(content: object) -> str:
    text = json.dumps(_canonical(content), separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    """Values as JSON in which different values never look alike; arrays count as the lists that they hold."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Mapping):
        return {
            "map": sorted(
                ([_canonical(k), _canonical(v)] for k, v in value.items()), key=lambda pair: json.dumps(pair[0])
            )
        }
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if hasattr(value, "tolist"):
        return _canonical(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be part of a cache salt; give plain values or arrays")
