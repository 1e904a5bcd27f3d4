"""The flag: ``--additional-config '{"headpatch": {...}}'``.

It is read once, in the front end, before the engine starts. What it means is written back into the config under ``resolved`` as
plain values, recipes in full, so that every process of the engine works from the same recipes, whatever happens to their files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headpatch.adapters.vllm.plan import compile_recipe
from headpatch.adapters.vllm.segment_numbers import check_layers
from headpatch.adapters.vllm.shape import model_shape
from headpatch.adapters.vllm.split import Split
from headpatch.adapters.vllm.split_flag import find_split
from headpatch.adapters.vllm.supplies import check_supplied, engine_features, is_affine, is_row_edit, is_segment_edit
from headpatch.errors import EngineError, RecipeError
from headpatch.recipe import Recipe, ResolvedPatch, resolve
from headpatch.registry import closest
from headpatch.sources import load_recipe

if TYPE_CHECKING:
    from headpatch.heads import ModelShape

__all__ = ["DEFAULT", "KEY", "NONE", "Armed", "Flag", "arm", "armed", "without_recipes"]

KEY = "headpatch"
DEFAULT = "default"
"""Name under which requests reach the recipe of ``{"recipe": ...}``."""
NONE = "none"
"""What a request says that wants no recipe."""
SLOTS = 8
MAX_SLOTS = 1024
MAX_UNIT = 1024
KNOWN = {
    "recipe", "recipes", "default", "allow_inline", "admin", "arrays", "segments", "slots", "kv_unit", "unverified", "resolved",
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """The flag as the user gave it, with its recipes loaded.

    Attributes
    ----------
    recipes
        Served names and their recipes.
    default
        The name that requests get which name none; None for no recipe.
    allow_inline
        Whether requests may bring whole recipes.
    admin
        Whether recipes can be added and removed over HTTP.
    slots
        How many recipes, beyond those that the flag names, may be live at once.
    kv_unit
        Places for KV heads in a full piece, where a cache policy cuts layers (:mod:`headpatch.adapters.vllm.split`); None: chosen.
    arrays
        Whether recipes that come later may have arrays: tables for vectors of all heads are made, and captured in graphs.
    segments
        Whether recipes that come later may edit attention to segments of keys: on GPUs a kernel is armed for all heads (on CPUs,
        engines that take later recipes at all always take such ones).
    unverified
        Start although the engine's version, or a feature, is one that headpatch was never run with.
    """

    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    default: str | None = None
    allow_inline: bool = False
    admin: bool = False
    slots: int = SLOTS
    kv_unit: int | None = None
    arrays: bool = False
    segments: bool = False
    unverified: bool = False

    @classmethod
    def read(cls, given: Any) -> Flag:
        """Check what stands under the key, and load its recipes.

        Raises
        ------
        RecipeError
            A key, a value or a recipe is wrong.
        """
        if not isinstance(given, Mapping):
            raise _error(
                f"is a {type(given).__name__}", None, '{"recipe": "name-or-path"}, or {} to arm the engine only'
            )
        if unknown := sorted(set(given) - KNOWN):
            raise _error("no such key", unknown[0], closest(unknown[0], KNOWN - {"resolved"}))
        if "recipe" in given and ("recipes" in given or "default" in given):
            raise _error("stands beside recipe", "recipes", "give one recipe, or served names with a default")
        served: dict[str, Recipe] = {}
        if given.get("recipe") is not None:
            served[DEFAULT] = load_recipe(given["recipe"])
        named = given.get("recipes") or {}
        if not isinstance(named, Mapping):
            raise _error(f"is a {type(named).__name__}", "recipes", '{"calm": "a.yaml", "sharp": "b.yaml"}')
        for name, source in named.items():
            check_name(name)
            served[name] = load_recipe(source)
        default = given.get("default", DEFAULT if DEFAULT in served else None)
        if default == NONE:
            default = None
        if default is not None and default not in served:
            raise _error(f"{default!r} is not a served name", "default", closest(str(default), served))
        slots, unit = given.get("slots", SLOTS), given.get("kv_unit")
        if not _whole(slots, MAX_SLOTS):
            raise _error(f"{slots!r} is no number of recipes", "slots", f"1 to {MAX_SLOTS}")
        if unit is not None and not _whole(unit, MAX_UNIT):
            raise _error(f"{unit!r} is no number of KV heads", "kv_unit", f"1 to {MAX_UNIT}")
        switches = {}
        for name in ("allow_inline", "admin", "arrays", "segments", "unverified"):
            switches[name] = given.get(name, False)
            if not isinstance(switches[name], bool):
                raise _error(f"{switches[name]!r} is neither true nor false", name, "true or false")
        return cls(served, default, slots=slots, kv_unit=unit, **switches)

    @property
    def open(self) -> bool:
        """Whether recipes other than the flag's may come: then every layer is armed."""
        return self.allow_inline or self.admin or self.arrays or self.segments or not self.recipes


@dataclass(frozen=True)
class Armed:
    """What the flag means for this model: what all processes read.

    Attributes
    ----------
    recipes
        Served names and their recipes; those of the flag have slots of their own, in this order.
    default, allow_inline, admin, slots
        As in :class:`Flag`.
    layers
        Layers whose kernels are patched: None for all.
    weights, scales, rows, vectors
        Whether any recipe may have first-token weights, head scales, edits that differ from row to row, vectors in these.
    segments, later_segments
        Whether any recipe may edit attention to segments of keys, and whether one that comes later may.
    features
        Features of this engine under which some operands cannot be had (:mod:`headpatch.adapters.vllm.supplies`).
    graphs
        Whether CUDA graphs may hold the whole model: then nothing can be patched later that was not armed.
    split
        How layers are cut, where the recipes have a cache policy; None where they have none.
    unverified
        As in :class:`Flag`.
    """

    recipes: Mapping[str, Recipe]
    default: str | None
    allow_inline: bool
    admin: bool
    slots: int
    layers: frozenset[int] | None
    weights: bool
    scales: bool
    rows: bool
    vectors: bool
    graphs: bool
    split: Split | None = None
    unverified: bool = False
    segments: bool = False
    later_segments: bool = False
    features: frozenset[str] = frozenset()

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for the config."""
        plain = {name: getattr(self, name) for name in ("default", "allow_inline", "admin", "slots", "unverified")}
        plain |= {name: getattr(self, name) for name in ("weights", "scales", "rows", "vectors", "graphs")}
        plain |= {name: getattr(self, name) for name in ("segments", "later_segments")}
        plain["features"] = sorted(self.features)
        plain["layers"] = None if self.layers is None else sorted(self.layers)
        plain["recipes"] = {
            name: {"recipe": recipe.to_dict(), "arrays": _as_text(recipe)} for name, recipe in self.recipes.items()
        }
        plain["split"] = None if self.split is None else self.split.to_plain()
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Armed:
        """Back from plain values."""
        recipes = {
            name: Recipe.from_dict(data["recipe"], source=name, arrays=_as_bytes(data["arrays"]))
            for name, data in plain["recipes"].items()
        }
        layers = None if plain["layers"] is None else frozenset(plain["layers"])
        split = None if plain["split"] is None else Split.from_plain(plain["split"])
        features = frozenset(plain["features"])
        return cls(**{**plain, "recipes": recipes, "layers": layers, "split": split, "features": features})

    def unarmed(self, recipe: Recipe, shape: ModelShape) -> str:
        """Why a recipe that came later cannot be patched in here; an empty string where it can."""
        layers = {layer for patch in _edits(recipe, shape) for layer in patch.heads}
        lacking = sorted(layers - self.layers) if self.layers is not None else []
        if lacking:
            return f"layer {lacking[0]} was not armed when the engine started"
        if recipe.digest in {served.digest for served in self.recipes.values()}:
            return ""
        methods = [patch.method for patch in recipe.patches]
        rows = [method for method in methods if is_row_edit(method)]
        if any(map(is_segment_edit, _masses(recipe))) and not self.later_segments:
            return (
                "edits of attention to segments of keys were not armed for later recipes when the engine started "
                '({"segments": true} in the flag does it)'
            )
        if self.graphs and not all(map(is_affine, rows)):
            return "a patch that differs from row to row must be in a recipe that the flag names"
        if (rows and not self.rows) or (recipe.tensors is not None and not self.vectors):
            return (
                "edits of some positions, and arrays, were not armed when the engine started "
                '(unless another recipe has them, {"arrays": true} in the flag does)'
            )
        if not self.graphs and "gpu" not in self.features:
            return ""  # what the CPU's edit reads is there in any case
        masses = any(method.family == "mass" for method in methods)
        scales = any(method.family == "output" and not is_row_edit(method) for method in methods)
        if (masses and not self.weights) or (scales and not self.scales):
            return "what it edits was not armed when the engine started"
        return ""


def _as_text(recipe: Recipe) -> str | None:
    return None if recipe.tensors is None else base64.b64encode(recipe.tensors.read()).decode()


def _as_bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def check_name(name: object) -> str:
    """A served name, or RecipeError: names must not look like JSON or mean something else."""
    if (
        not isinstance(name, str)
        or not name.strip()
        or name.strip() != name
        or name.startswith(("{", "["))
        or len(name) > 200
    ):
        raise _error(f"{name!r} is no name for a served recipe", "recipes", "a plain word")
    if name == NONE:
        raise _error(f"{NONE!r} means that a request wants no recipe", "recipes", "choose another name")
    return name


def check_fits(recipe: Recipe, shape: ModelShape, features: frozenset[str]) -> None:
    """Raise RecipeError or UnsupportedModelError where an engine with these features could not do exactly what the recipe says."""
    check_supplied(recipe, features)
    for patch in resolve(recipe, shape):
        for layer, heads in patch.heads.items():
            patch.pick(layer, list(heads))
    if "gpu" in features and any(map(is_segment_edit, _masses(recipe))):
        check_layers(compile_recipe(recipe, shape), recipe.source or recipe.name or "recipe")


def arm(vllm_config: Any) -> Armed | None:
    """Read the flag of a fresh config, check it against the model, and write what it means into the config.

    Returns None where there is no flag. Raises RecipeError, UnsupportedModelError or EngineError before anything has started.
    """
    config = vllm_config.additional_config
    given = config.get(KEY) if isinstance(config, Mapping) else None
    if given is None:
        return None
    from headpatch.adapters.vllm.window import check_config, may_capture_whole_model

    flag = Flag.read(given)
    check_config(vllm_config, flag)
    shape = model_shape(vllm_config.model_config)
    features = engine_features(vllm_config)
    for recipe in flag.recipes.values():
        check_fits(recipe, shape, features)
    split = find_split(flag, shape, vllm_config)
    if split is not None:
        features |= {"kv_windows"}
        if flag.segments:
            raise _error(
                "stands beside a recipe whose cache policy cuts layers", "segments", "leave one of the two out"
            )
        for recipe in flag.recipes.values():
            check_supplied(recipe, features)
    patched = [patch for recipe in flag.recipes.values() for patch in _edits(recipe, shape)]
    rows = any(is_row_edit(patch.method) for patch in patched)
    graphs = may_capture_whole_model(vllm_config)
    has_arrays = any(recipe.tensors is not None for recipe in flag.recipes.values())
    later = flag.segments or (flag.open and not features & {"gpu", "kv_windows"})
    vectors = has_arrays or flag.arrays or (flag.open and not graphs)
    found = Armed(
        recipes=flag.recipes, default=flag.default, allow_inline=flag.allow_inline, admin=flag.admin, slots=flag.slots,
        layers=None if flag.open else frozenset(layer for patch in patched for layer in patch.heads),
        weights=flag.open or any(patch.method.family == "mass" and not is_segment_edit(patch.method) for patch in patched),
        scales=flag.open or any(patch.method.family == "output" and not is_row_edit(patch.method) for patch in patched),
        rows=rows or flag.arrays or (flag.open and not graphs), vectors=vectors, graphs=graphs,
        split=split, unverified=flag.unverified, features=features,
        segments=later or any(is_segment_edit(patch.method) for patch in patched), later_segments=later,
    )  # fmt: skip
    vllm_config.additional_config = {**config, KEY: {**given, "resolved": json.loads(json.dumps(found.to_plain()))}}
    return found


def armed(vllm_config: Any) -> Armed | None:
    """What :func:`arm` wrote into this config; None where the engine has no flag."""
    config = getattr(vllm_config, "additional_config", None)
    given = config.get(KEY) if isinstance(config, Mapping) else None
    if given is None:
        return None
    if "resolved" not in given:
        raise EngineError(
            "this engine's config has a headpatch flag that was never checked: it was not made by EngineArgs.create_engine_config"
        )
    return Armed.from_plain(given["resolved"])


def without_recipes(config: Any) -> Any:
    """An additional_config in which the flag says only that it is there, and how layers are cut: code is compiled for no more."""
    if not (isinstance(config, Mapping) and KEY in config):
        return config
    split = ((config[KEY] or {}).get("resolved") or {}).get("split")
    return {**config, KEY: "armed" if split is None else split}


def _edits(recipe: Recipe, shape: ModelShape) -> list[ResolvedPatch]:
    """What a recipe does to outputs; what caches keep is settled by the split."""
    return [patch for patch in resolve(recipe, shape) if patch.method.family != "cache"]


def _masses(recipe: Recipe) -> list[Any]:
    return [patch.method for patch in recipe.patches if patch.method.family in ("mass", "scores")]


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _error(problem: str, key: str | None, remedy: str) -> RecipeError:
    return RecipeError(
        problem, source="--additional-config", key=KEY if key is None else f"{KEY}.{key}", remedy=remedy
    )
