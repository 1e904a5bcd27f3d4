"""Random recipes come back as they were, from dicts and from files; random text is never anything but a RecipeError."""

from __future__ import annotations

import copy
import pickle
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_tools import HYBRID, LLAMA, SPEECH, add_methods, arrays_recipe, complaint, safetensors_bytes, same

from headpatch import yamlio
from headpatch.heads import PARTS
from headpatch.recipe import Recipe, resolve
from headpatch.sources import load_recipe

SETTINGS = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def extra():
    with pytest.MonkeyPatch.context() as patch:
        add_methods(patch)
        yield


def span(last: int) -> st.SearchStrategy[str]:
    numbers = st.integers(0, last)
    ranges = st.tuples(numbers, numbers).map(lambda ab: f"{min(ab)}-{max(ab)}")
    return st.just("*") | numbers.map(str) | ranges


selectors = st.builds("{}.{}".format, span(29), span(8))
kv_selectors = st.builds("{}.{}".format, span(29), span(2))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(int(low), int(high))


def patch(
    method: str, strength: str, least: float, most: float, required: dict[str, st.SearchStrategy[object]] | None = None,
    **params: st.SearchStrategy[object],
) -> st.SearchStrategy[dict]:  # fmt: skip
    """Patches of one method, with strengths in either place; `required` are parameters without a default."""
    optional = {"part": st.just("text"), **params}
    name = {"method": st.just(method), **(required or {})}
    table = st.fixed_dictionaries(
        name | {"heads": st.dictionaries(selectors, numbers(least, most), min_size=1, max_size=6)}, optional=optional
    )
    beside = st.fixed_dictionaries(
        name | {"heads": st.lists(selectors, min_size=1, max_size=6), strength: numbers(least, most)},
        optional=optional,
    )
    return table | beside


patches = st.one_of(
    patch("zerotuning", "gamma", 0, 1e6),
    patch("head_scaling", "scale", -1e6, 1e6, positions=st.sampled_from(["all", "last", "decode"])),
    patch(
        "act", "beta", 0, 1,
        threshold=st.floats(1e-3, 1e4), threshold_per=st.sampled_from(["fixed", "prompt_length"]), keep_first=st.booleans(),
        min_queries=st.integers(1, 1024),
    ),
    patch("image_bias", "bias", -50, 50, queries=st.sampled_from(["all", "text"])),
    patch("pai", "alpha", 0, 10, queries=st.sampled_from(["last", "all"])),
    patch(
        "paint", "weight", 0, 10, alpha=st.floats(0, 10), beta=st.floats(0, 10), local_share=st.floats(0, 1),
        local_layer=st.integers(-1024, 1023), summary_layer=st.integers(-1024, 1023), summary_fence=st.floats(0, 1e4),
    ),
    patch(
        "var", "recycle", 0, 1, required={"sink_dimensions": st.lists(st.integers(0, 5000), min_size=1, max_size=3)},
        sink_threshold=st.floats(0.1, 1e4), min_visual_mass=st.floats(0, 1), min_nonsink_ratio=st.floats(0, 1),
        require_visual_sink=st.booleans(),
    ),
    patch(
        "vhr", "alpha", -10, 10, selection=st.sampled_from(["online", "listed"]), outliers=st.booleans(),
        reinforce_reference=st.booleans(),
    ),
    patch("pasta", "alpha", 0, 1, target_mass=st.floats(0, 0.99)) | patch("pasta", "alpha", 0, 1, keep_first=st.booleans()),
    patch(
        "test_spans", "alpha", 0, 100,
        dims=st.lists(st.integers(0, 100), max_size=3), rounds=st.sampled_from([1, 2]), strict=st.booleans(), low=numbers(-9, 0),
    ),
    st.fixed_dictionaries(
        {"method": st.just("test_cache"), "full_kv_heads": st.lists(kv_selectors, min_size=1, max_size=6)},
        optional={"window": st.integers(1, 4096), "part": st.just("text")},
    ),
)  # fmt: skip

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
per_layer = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
model = st.fixed_dictionaries(
    {},
    optional={"name": text, "model_type": st.just("llama"), "num_layers": st.just(30)}
    | {key: st.sampled_from([value, [value] * 30]) for key, value in per_layer.items()},
)


def goes_together(several: list[dict[str, object]]) -> bool:
    """A cache policy is alone, or beside patches of nothing but the first token."""
    policies = [p for p in several if p["method"] == "test_cache"]
    free = {"zerotuning", "head_scaling", "test_cache"}
    return not policies or (len(policies) == 1 and all(p["method"] in free for p in several))


recipes = st.fixed_dictionaries(
    {"headpatch": st.just(1), "patches": st.lists(patches, min_size=1, max_size=4).filter(goes_together)},
    optional={
        "name": text,
        "description": text,
        "model": model,
        "provenance": st.dictionaries(text, plain, max_size=4),
    },
)


@SETTINGS
@given(recipes)
def test_dicts_come_back(data):
    recipe = Recipe.from_dict(data)
    assert same(recipe.to_dict(), data)
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe
    assert (again.digest, hash(again)) == (recipe.digest, hash(recipe))
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@SETTINGS
@given(recipes)
def test_files_come_back(data):
    recipe = Recipe.from_dict(data)
    with tempfile.TemporaryDirectory() as folder:
        again = load_recipe(recipe.save(Path(folder) / "r.yaml"))
    assert same(again.to_dict(), data)
    assert again == recipe
    assert again.digest == recipe.digest


@settings(max_examples=25, deadline=None)
@given(recipes, st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_files_with_arrays_come_back(data, values):
    content = safetensors_bytes("v", tuple(values))
    needing = arrays_recipe(content, "sub/v.safetensors")
    data = data | {"patches": data["patches"] + needing["patches"], "tensors": needing["tensors"]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sub").mkdir()
        (Path(folder) / "sub" / "v.safetensors").write_bytes(content)
        recipe = Recipe.from_dict(data, folder=folder)
        again = load_recipe(recipe.save(Path(folder) / "other" / "r.yaml"))
        assert again.tensors.path.read_bytes() == content
    assert same(again.to_dict(), data)
    assert again.digest == recipe.digest


def meant(recipe: Recipe) -> list[object]:
    return [(p.index, p.method, p.part, p.heads) for p in resolve(recipe, LLAMA)]


@SETTINGS
@given(recipes)
def test_resolving_agrees_with_the_definition(data):
    """Head by head: the last selector that covers it decides."""

    def covers(text: str, number: int) -> bool:
        first, _, last = text.partition("-")
        return text == "*" or int(first) <= number <= int(last or first)

    recipe = Recipe.from_dict(data)
    for patch, resolved in zip(recipe.patches, resolve(recipe, LLAMA), strict=True):
        count = 3 if patch.method.head_kind == "kv" else 9
        expected: dict[int, dict[int, object]] = {}
        for layer in range(30):
            for head in range(count):
                for selector, strength in patch.heads:
                    of_layer, of_head = selector.split(".")
                    if covers(of_layer, layer) and covers(of_head, head):
                        expected.setdefault(layer, {})[head] = strength
        if count == 3:  # a policy acts on layers of which it lists nothing, too
            expected = {layer: expected.get(layer, {}) for layer in range(30)}
        found = resolved.heads if count == 9 else {n: dict.fromkeys(heads) for n, heads in resolved.heads.items()}
        assert found == expected
    assert meant(Recipe.from_dict(recipe.to_dict())) == meant(recipe)


# --- what is nearly a recipe

yaml_like = st.text(alphabet=string.printable) | st.text() | st.text(alphabet="{}[]:,-*&!|>'\"%#?~ \n\t1.e<")
keys = ["headpatch", "patches", "method", "heads", "zerotuning", "gamma", "tensors", "model", "num_heads", "part"]
scalars = ["1.3", "12.10", "*.*", "1", "1e-2", ".nan", "true", "null"]
signs = [": ", "- ", "{", "}", "[", "]", ", ", "'", '"', "&a", "*a", "!!", "<<", "\n", "\n  ", "---\n"]
words = st.sampled_from([*keys, *scalars, *signs])
near = st.lists(words, max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(
    yaml_like | near | st.builds("headpatch: 1\npatches:\n- method: zerotuning\n  heads: {}".format, yaml_like | near)
)
def test_text_is_a_recipe_or_a_recipe_error(text):
    error = complaint(lambda: Recipe.from_dict(yamlio.loads(text)))
    assert error is None or (error.remedy and "\n" not in str(error))


junk = st.recursive(
    plain
    | st.floats()
    | st.binary()
    | st.integers()
    | st.complex_numbers()
    | st.sampled_from([object, set(), "zerotuning", "1.3"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers() | st.floats() | st.none() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(recipes, st.data())
def test_one_wrong_value_is_a_recipe_error_or_still_a_recipe(data, draw):
    """Some value, anywhere in a good recipe, replaced by junk."""
    data = copy.deepcopy(data)  # strategies hand out the same lists again
    places = list(_places(data))
    holder, key = draw.draw(st.sampled_from(places))
    holder[key] = draw.draw(junk)
    for shape in (LLAMA, HYBRID, SPEECH):
        error = complaint(lambda: Recipe.from_dict(data).check(shape))  # noqa: B023  (called at once)
        assert error is None or error.remedy


def _places(value: object):
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


@settings(deadline=None)
@given(st.text(max_size=20) | st.sampled_from(PARTS))
def test_parts_are_those_of_the_list(part):
    data = {"headpatch": 1, "patches": [{"method": "zerotuning", "part": part, "heads": {"0.0": 2.0}}]}
    error = complaint(Recipe.from_dict, data)
    assert (error is None) == (part in PARTS)
