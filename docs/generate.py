"""Writes the tables in README.md and docs/ that follow from declarations in the code. `make docs` runs it.

    python docs/generate.py            # rewrite what stands between the markers
    python docs/generate.py --check    # say what is out of date; 1 where anything is

A table stands between two markers of Markdown comments, ``generated: NAME`` and ``end``. NAME is one of :data:`TABLES`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import safetensors.torch
import torch

import headpatch
from headpatch.errors import UnsupportedModelError
from headpatch.operands import OPERANDS, refusals
from headpatch.registry import adapters, find_adapter, get_method, method_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- generated: ([a-z_ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def built_in() -> list[Any]:
    """Method classes of headpatch's own, by name."""
    return [cls for cls in map(get_method, method_names()) if cls.__module__.startswith("headpatch.")]


def methods() -> str:
    """Every method in a line."""
    rows = []
    for cls in built_in():
        strength = cls.strength_field()
        what = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        given = f"`{strength.name}`, identity {cls.identity():g}" if strength else "none"
        rows.append((f"[`{cls.name}`](docs/methods.md#{cls.name})", what, given, cls.family))
    return table(("method", "what it does", "strength", "family"), rows)


def parameters(name: str) -> str:
    """The parameters of one method."""
    cls, rows = get_method(name), []
    for f in dataclasses.fields(cls):
        limits = {"ge": "at least {:g}", "gt": "more than {:g}", "le": "at most {:g}", "lt": "less than {:g}"}
        words = [text.format(f.metadata[key]) for key, text in limits.items() if f.metadata.get(key) is not None]
        role = "required" if f.name in _required(cls) else f"default `{f.default}`"
        role = "strength; required" if f.metadata.get("strength") else role
        if f.metadata.get("strength"):
            words.append(f"does nothing at {f.metadata['identity']:g}")
        rows.append((f"`{f.name}`", f.metadata["help"], ", ".join([role, *words])))
    heads = f"heads are {cls.head_kind} heads, under `{cls.heads_key}`" if cls.heads_key else "no heads are listed"
    declared = f"Family *{cls.family}*; version {cls.version}; {heads}.\n\n"
    return declared + table(("parameter", "meaning", "values"), rows)


def recipes() -> str:
    """The shipped recipes."""
    return table(
        ("recipe", "what it is for"), ((f"`{name}`", text) for name, text in headpatch.list_recipes().items())
    )


def results() -> str:
    """What recipes with paired differences in their provenance did on held-out data."""
    from headpatch.commands.demo import held_out

    rows = []
    for name in headpatch.list_recipes():
        recipe = headpatch.load_recipe(name)
        if "difference" in recipe.provenance:
            rows += [(f"`{name}`", words.removeprefix("held out: "), *cells) for words, *cells in held_out(recipe)]
    return table(("recipe", "figure", "untouched", "patched", "difference"), rows)


def matrix() -> str:
    """Which method an adapter can do exactly, from what the one needs and the other supplies."""
    found, rows = adapters(), []
    for label, method in (variant for cls in built_in() for variant in _variants(cls)):
        needs = method.operands()
        cells = ["; ".join(refusals(needs, adapter.supplies())) or "exact" for adapter in found]
        rows.append((label, ", ".join(f"`{name}`" for name in needs) or "none", method.scope, *cells))
    return table(("method", "needs", "scope", *(adapter.name for adapter in found)), rows)


def _variants(cls: Any) -> list[tuple[str, Any]]:
    """A method with its defaults, and with every choice of a parameter that changes what it needs or its scope."""
    plain = _default(cls)
    found = [(f"`{cls.name}`", plain)]
    for name, hint in get_type_hints(cls).items():
        for choice in get_args(hint) if get_origin(hint) is Literal else ():
            other = dataclasses.replace(plain, **{name: choice})
            if (other.operands(), other.scope) != (plain.operands(), plain.scope):
                found.append((f"`{cls.name}`, `{name}: {choice}`", other))
    return found


def _default(cls: Any) -> Any:
    """An instance with default parameters; what has no default gets a neutral value of its type."""
    return cls(**_required(cls))


def _required(cls: Any) -> dict[str, Any]:
    missing = {
        f.name: f.type for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    }
    neutral: dict[str, Any] = {"int": 1, "float": 1.0, "str": "", "bool": False, "tuple[int, ...]": (0,)}
    return {name: neutral.get(str(kind), ()) for name, kind in missing.items()}


def operands() -> str:
    """What each adapter supplies."""
    found, rows = adapters(), []
    for operand in OPERANDS.values():
        cells = []
        for adapter in found:
            supply = adapter.supplies().get(operand.name)
            if supply is None:
                cells.append("not supplied")
                continue
            words = "exact" if supply.exact else "approximate: refused"
            without = f"; not with {', '.join(f'`{f}`' for f in supply.not_with)}" if supply.not_with else ""
            cells.append(words + without + (f" ({supply.note})" if supply.note else ""))
        rows.append((f"`{operand.name}`", operand.meaning, f"`{operand.shape}`", *cells))
    return table(("operand", "meaning", "shape", *(adapter.name for adapter in found)), rows)


def architectures() -> str:
    """Each architecture of tests/zoo.py, patched with each method on all heads of each of its parts."""
    import transformers

    sys.path.insert(0, str(ROOT / "tests"))
    from zoo import ZOO

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        rows = [_architecture(entry) for entry in ZOO.values()]
    finally:
        transformers.logging.set_verbosity(verbosity)
        sys.path.remove(str(ROOT / "tests"))
    return table(("architecture", "parts", *(f"`{cls.name}`" for cls in built_in())), rows)


def _architecture(entry: Any) -> list[str]:
    model = entry.build(attn=entry.attn[0])
    cells = []
    for cls in built_in():
        strength = cls.strength_field()
        more = {name: list(v) if isinstance(v, tuple) else v for name, v in _required(cls).items()}
        heads: Any = {"*.*": 0.5} if strength else ["*.*"]
        refused = {}
        for part in entry.parts:
            try:
                listed = {cls.heads_key: heads} if cls.heads_key else {}
                patch = {"method": cls.name, "part": part, **listed, **more}
                headpatch.apply(model, _recipe(patch, cls, model)).remove()
            except UnsupportedModelError as error:
                refused[part] = ", ".join(
                    dict.fromkeys(f"`{f}`" for f in re.findall(r"with (\w+)", str(error)))
                ) or str(error)
        if not refused:
            layers = sum(len(part.modules) for part in entry.parts.values())
            total = sum(part.num_layers for part in entry.parts.values())
            cells.append(
                "exact" if layers == total else f"exact in the {layers} of {total} layers that have softmax attention"
            )
        elif len(refused) < len(entry.parts):
            cells.append(f"exact in {', '.join(part for part in entry.parts if part not in refused)}")
        else:
            cells.append(f"refused: {next(iter(refused.values()))}")
    return [f"`{model.config.model_type}` ({type(model).__name__})", ", ".join(entry.parts), *cells]


def _recipe(patch: dict[str, Any], cls: Any, model: Any) -> headpatch.Recipe:
    """A recipe of one patch; with a vector of zeros for every head where the method needs arrays."""
    data: dict[str, Any] = {"headpatch": 1, "patches": [patch]}
    method = _default(cls)
    if "arrays" not in method.operands():
        return headpatch.Recipe.from_dict(data)
    stack = find_adapter(model).shape(model).parts[patch["part"]]
    arrays = {
        f"{method.array}.{layer}.{head}": torch.zeros(stack.head_dim[layer])
        for layer, heads in enumerate(stack.num_heads)
        for head in range(heads)
    }
    packed = safetensors.torch.save(arrays)
    data["tensors"] = {"file": "zeros.safetensors", "sha256": hashlib.sha256(packed).hexdigest()}
    return headpatch.Recipe.from_dict(data, arrays=packed)


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods, "recipes": recipes, "results": results, "matrix": matrix, "operands": operands,
    "architectures": architectures,
    **{f"parameters {name}": (lambda name=name: parameters(name)) for name in method_names()},
}  # fmt: skip


def render(text: str) -> str:
    """The text of a page with its tables made anew; a KeyError names a marker that is none of ours."""
    return MARKED.sub(lambda found: found[1] + "\n" + TABLES[found[2]]() + "\n" + found[3], text)


def main(arguments: list[str]) -> int:
    """Write, or check."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                page.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'out of date, run `make docs`' if '--check' in arguments else 'written'}: {', '.join(stale)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
