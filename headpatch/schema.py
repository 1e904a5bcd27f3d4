"""What a recipe may hold: pydantic models made from the method dataclasses, and the JSON schema for editors.

One patch model is made per method, from its fields, their ranges and help texts; a new method needs nothing here. Types are
strict: a boolean is no number, a string is no number, a whole number will do for a float. Every complaint of pydantic's becomes a
:class:`~headpatch.errors.RecipeError` that names file, key path and what would be right.

``python -m headpatch.schema > headpatch/recipe.schema.json`` writes the JSON schema of the built-in methods.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from headpatch.errors import RecipeError
from headpatch.heads import PARTS, SELECTOR_PATTERN, parse_selector
from headpatch.registry import closest, get_method, method_names
from headpatch.show import describe, key_path, kind_of, short

if TYPE_CHECKING:
    from headpatch.methods.base import Method

__all__ = ["FORMAT", "Envelope", "check_envelope", "check_patch", "json_schema", "patch_model"]

FORMAT = 1
"""Version of the recipe format that this headpatch reads and writes."""

MAX_PATCHES = 100

# Tags of the forms that a value may take. Pydantic puts them into the path of an error, from where they are taken out again.
_LIST, _OTHER = "<list>", "<other>"


def _form(value: object) -> str:
    return _LIST if isinstance(value, list | tuple) else _OTHER


class _Strict(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


_Count: TypeAlias = Annotated[int, Field(ge=0)]
_PerLayer: TypeAlias = Annotated[
    Annotated[list[_Count], Field(min_length=1), Tag(_LIST)] | Annotated[_Count, Tag(_OTHER)], Discriminator(_form)
]


def _optional(description: str, **options: Any) -> Any:
    """A key that may be left out, but not be null: hence a default that does not fit the annotation."""
    return Field(default=None, description=description, **options)


class ModelBlock(_Strict):
    """The model a recipe was made for; all keys but `name` are checked when it is applied."""

    name: str = _optional("where the model can be had; informs, never refuses")
    model_type: str = _optional("as in a transformers config")
    num_layers: int = _optional("layers of the part that patches mean by default", ge=1)
    num_heads: _PerLayer = _optional("query heads; a list where layers differ")
    num_kv_heads: _PerLayer = _optional("KV heads; a list where layers differ")
    head_dim: _PerLayer = _optional("head dimension; a list where layers differ")


class TensorsBlock(_Strict):
    """Arrays that belong to the recipe, for methods that need them."""

    file: str = Field(description="safetensors file in the recipe's folder")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="SHA-256 of that file, 64 lower-case hexadecimal digits"
    )


class Envelope(_Strict):
    """A recipe: which heads of a model, what is done to them and how strongly."""

    headpatch: int = Field(description="version of the recipe format: 1", json_schema_extra={"const": FORMAT})
    name: str = _optional("as in smollm2-135m-instruct/zerotuning-sst2")
    description: str = _optional("what it does, in a sentence")
    model: ModelBlock = _optional("the model it was made for")
    patches: list[dict[str, Any]] = Field(
        min_length=1, max_length=MAX_PATCHES, description="methods with their heads and strengths"
    )
    tensors: TensorsBlock = _optional("arrays, only for methods that need them")
    provenance: dict[str, Any] = _optional("data, metric, baseline, patched, seed, headpatch, date and the like")


_BLOCKS: dict[str, type[_Strict]] = {"model": ModelBlock, "tensors": TensorsBlock}


def check_envelope(data: object, source: str | None = None) -> Envelope:
    """Check everything about a recipe but the insides of its patches.

    Raises
    ------
    RecipeError
        The first thing that is wrong.
    """
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {kind_of(data)}"
        raise RecipeError(
            f"is {what}, not a recipe",
            source=source,
            remedy=f"a recipe is a mapping that begins with headpatch: {FORMAT}",
        )
    try:
        checked = Envelope.model_validate(data)
    except pydantic.ValidationError as error:
        raise _recipe_error(error, Envelope, ()).at(source=source) from None
    if checked.headpatch != FORMAT:
        raise RecipeError(
            f"format version {short(checked.headpatch)} is not known", source=source, key="headpatch",
            remedy=f"this headpatch reads version {FORMAT}: write headpatch: {FORMAT}, or update headpatch",
        )  # fmt: skip
    return checked


def check_patch(index: int, data: dict[str, Any]) -> tuple[Method, str | None, tuple[tuple[str, float | None], ...]]:
    """Check one entry of ``patches``.

    Returns
    -------
    method
        An instance with the patch's parameters; its strength is set where one strength stands beside a list of selectors.
    part
        The attention stack, None where the patch does not say.
    heads
        Pairs of selector and strength, in order; None for a method that has no strength.

    Raises
    ------
    RecipeError
        The first thing that is wrong.
    """
    path = ("patches", index)
    cls = _method_class(data, path)
    model = patch_model(cls)
    try:
        checked = model.model_validate(data)
    except pydantic.ValidationError as error:
        raise _recipe_error(error, model, path) from None
    given = {name: getattr(checked, name) for name in checked.model_fields_set}
    part = given.pop("part", None)
    heads = [] if cls.heads_key is None else given.pop(cls.heads_key)
    given.pop("method")
    strength = cls.strength_field()
    for i, selector in enumerate(heads):
        try:
            parse_selector(selector)
        except RecipeError as error:
            last = i if isinstance(heads, list) else selector
            raise error.at(key=key_path((*path, cls.heads_key, last))) from None
    if strength is not None and cls.heads_key is not None:
        _check_strength(strength.name, strength.name in given, isinstance(heads, dict), cls.heads_key, path)
    try:
        method = cls(**given)
    except (TypeError, ValueError) as error:  # raised by the method's own checks across its fields
        raise RecipeError(str(error), key=key_path(path), remedy=f"see the parameters of {cls.name}") from None
    if isinstance(heads, dict):
        return method, part, tuple(heads.items())
    value = None if strength is None else getattr(method, strength.name)
    return method, part, tuple((selector, value) for selector in heads)


def _method_class(data: dict[str, Any], path: tuple[object, ...]) -> type[Method]:
    names, key = method_names(), key_path((*path, "method"))
    if "method" not in data:
        near = [k for k in data if closest(k, ["method"]).startswith("did")]
        hint = f"; {short(near[0])} is not it" if near else ""
        raise RecipeError(f"is missing{hint}", key=key, remedy=f"name a method: {', '.join(names)}")
    name = data["method"]
    if not isinstance(name, str):
        raise RecipeError(f"must be a string, is {describe(name)}", key=key, remedy=closest("", names))
    if name not in names:
        raise RecipeError(f"there is no method {short(name)}", key=key, remedy=closest(name[:100], names))
    return get_method(name)


def _check_strength(name: str, beside: bool, mapping: bool, heads_key: str, path: tuple[object, ...]) -> None:
    """Strengths stand in the mapping of heads or beside the list of heads, never in both and never in neither."""
    if mapping and beside:
        raise RecipeError(
            f"strengths stand both in {heads_key} and here", key=key_path((*path, name)),
            remedy=f"remove {name}, or make {heads_key} a list of selectors",
        )  # fmt: skip
    if not mapping and not beside:
        raise RecipeError(
            "is missing", key=key_path((*path, name)),
            remedy=f"give one {name} for the list, or make {heads_key} a mapping from selectors to strengths",
        )  # fmt: skip


_models: dict[type[Method], type[pydantic.BaseModel]] = {}


def patch_model(cls: type[Method]) -> type[pydantic.BaseModel]:
    """The pydantic model of a patch with method `cls`; a TypeError where one of its fields has the name of a recipe key."""
    if cls not in _models:
        _models[cls] = _make_patch_model(cls)
    return _models[cls]


def _make_patch_model(cls: type[Method]) -> type[pydantic.BaseModel]:
    strength = cls.strength_field()
    fields: dict[str, Any] = {
        "method": (Literal[cls.name], Field(description=_first_line(cls))),
        "part": (Literal[PARTS], Field(default=None, description="attention stack; default: the language model's")),
    }
    if cls.heads_key is not None:
        fields[cls.heads_key] = (_heads_type(strength), Field(description=_heads_help(cls)))
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in fields:
            raise TypeError(
                f"method class {cls.__name__}: a field cannot be called {f.name!r}, which is a key of the recipe"
            )
        options: dict[str, Any] = {"description": f.metadata["help"], **_range(f)}
        if f is strength:
            options["default"] = None  # given per head, or beside the list; there is no default
        elif f.default is not dataclasses.MISSING:
            options["default"] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            options["default_factory"] = f.default_factory
        fields[f.name] = (_field_type(hints[f.name]), Field(**options))
    model: type[pydantic.BaseModel] = pydantic.create_model(
        f"{cls.name} patch", __base__=_Strict, __doc__=_first_line(cls), **fields
    )
    if strength is not None and cls.heads_key is not None:
        one: dict[str, Any] = {"required": [strength.name]}
        model.model_config["json_schema_extra"] = {
            "if": {"properties": {cls.heads_key: {"type": "array"}}}, "then": one, "else": {"not": one}
        }  # fmt: skip
    return model


def _heads_type(strength: dataclasses.Field[Any] | None) -> Any:
    # Selectors are strings for pydantic, patterns for editors; parse_selector finds better words for what is wrong.
    selector = Annotated[str, Field(json_schema_extra={"pattern": SELECTOR_PATTERN})]
    several = Annotated[list[selector], Field(min_length=1), Tag(_LIST)]
    if strength is None:
        return Annotated[list[selector], Field(min_length=1)]
    number = Annotated[float, Field(**_range(strength))]
    table = Annotated[
        dict[selector, number],
        Field(min_length=1, json_schema_extra={"propertyNames": {"pattern": SELECTOR_PATTERN}}), Tag(_OTHER),
    ]  # fmt: skip
    return Annotated[several | table, Discriminator(_form)]


def _heads_help(cls: type[Method]) -> str:
    kind = {"query": "query heads", "kv": "KV heads"}[cls.head_kind]
    strength = cls.strength_field()
    if strength is None:
        return f"{kind}, as a list of selectors"
    return f"{kind}: a mapping from selectors to {strength.name}, or a list of selectors with one {strength.name} beside it"


def _field_type(hint: Any) -> Any:
    """The annotation, made as strict as recipes are: YAML lists become tuples, and true is not the literal 1."""
    if "tuple" in str(hint):
        return Annotated[hint, BeforeValidator(_tuples)]
    if typing.get_origin(hint) is Literal:
        return Annotated[hint, BeforeValidator(functools.partial(_exact, typing.get_args(hint)))]
    return hint


def _exact(choices: tuple[object, ...], value: object) -> object:
    """Pydantic compares with ==, which takes true for 1."""
    if any(type(value) is type(choice) for choice in choices):
        return value
    raise PydanticCustomError("literal_error", "not a choice", {"expected": " or ".join(map(repr, choices))})


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _range(f: dataclasses.Field[Any]) -> dict[str, float]:
    return {k: f.metadata[k] for k in ("ge", "gt", "le", "lt") if f.metadata.get(k) is not None}


def _first_line(cls: type[Method]) -> str:
    return (cls.__doc__ or cls.name).strip().splitlines()[0]


_WANTED = {
    "float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number",
    "bool_type": "true or false", "string_type": "a string", "list_type": "a list", "tuple_type": "a list",
    "dict_type": "a mapping", "model_type": "a mapping",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"), "less_than": ("lt", "less than"),
}  # fmt: skip


def _recipe_error(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], path: tuple[object, ...]
) -> RecipeError:
    """Say the first complaint in our words. Unknown keys come first: what is missing is often what was misspelt."""
    found = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    loc = [key for key in found["loc"] if key not in (_LIST, _OTHER)]
    kind, value, ctx = found["type"], found["input"], found.get("ctx", {})
    home = model if len(loc) < 2 else _BLOCKS.get(str(loc[0]), model)
    field = home.model_fields.get(str(loc[-1])) or model.model_fields.get(str(loc[0]))
    about = (field.description if field else None) or "see the recipe format in docs"
    if kind == "extra_forbidden":
        problem, remedy = "unknown key", closest(str(loc[-1])[:100], home.model_fields)
    elif kind == "missing":
        problem, remedy = "is missing", f"add it: {about}"
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        problem, remedy = f"{short(value)} is out of range", f"{words} {ctx[name]}; {about}"
    elif kind == "literal_error":
        problem, remedy = f"is {short(value)}", f"one of {ctx['expected']}; {about}"
    elif kind == "too_short":
        problem, remedy = "is empty", f"name at least one; {about}"
    elif kind == "too_long":
        problem, remedy = f"{ctx['actual_length']} are too many", f"at most {ctx['max_length']}"
    elif kind == "string_pattern_mismatch":
        problem, remedy = f"is {short(value)}", about
    elif kind in _WANTED:
        problem, remedy = f"must be {_WANTED[kind]}, is {describe(value)}", f"write {_WANTED[kind]}; {about}"
        if kind == "string_type" and isinstance(value, int | float) and len(loc) > 1:
            remedy += "; write it in quotes"
    else:
        problem, remedy = found["msg"], about
    return RecipeError(problem, key=key_path((*path, *loc)), remedy=remedy)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes with the built-in methods, for editors; what is shipped as ``recipe.schema.json``."""
    built_in = [cls for cls in map(get_method, method_names()) if cls.__module__.startswith("headpatch.")]
    patches: Any = typing.Union[tuple(patch_model(cls) for cls in built_in)]  # noqa: UP007  (made at run time)
    full = pydantic.create_model(
        "Recipe", __base__=Envelope, __doc__=Envelope.__doc__,
        patches=(list[Annotated[patches, Discriminator("method")]],
                 Field(min_length=1, max_length=MAX_PATCHES, description=Envelope.model_fields["patches"].description)),
    )  # fmt: skip
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **full.model_json_schema()}
    return typing.cast("dict[str, Any]", _tidy(schema)) | {"title": "headpatch recipe"}


def _tidy(schema: Any) -> Any:
    """Drop the titles that pydantic derives from names, and the null defaults of optional keys."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # by type: a property may well be called `title`, and then it is a mapping
    noise = [k for k, kind in (("title", str), ("default", type(None))) if isinstance(schema.get(k, 0), kind)]
    return {k: _tidy(v) for k, v in schema.items() if k not in noise}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
