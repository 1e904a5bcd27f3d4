"""Selectors, query-head and KV-head maps, tensor-parallel slices."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_tools import HYBRID, LLAMA, SMOL, SPEECH

from headpatch.errors import RecipeError
from headpatch.heads import (
    SELECTOR_PATTERN,
    ModelShape,
    PartShape,
    expand,
    expand_all,
    kv_head_of,
    local_heads,
    parse_selector,
    query_heads_of,
    select_heads,
    to_selectors,
)

HYBRID_TEXT = HYBRID.parts["text"]


@pytest.mark.parametrize(
    ("text", "layers", "heads"),
    [
        ("12.3", range(12, 13), range(3, 4)),
        ("12.10", range(12, 13), range(10, 11)),
        ("0.0", range(1), range(1)),
        ("8.*", range(8, 9), None),
        ("*.7", None, range(7, 8)),
        ("*.*", None, None),
        ("0-5.2", range(6), range(2, 3)),
        ("12.0-2", range(12, 13), range(3)),
        ("3-3.4-4", range(3, 4), range(4, 5)),
    ],
)
def test_selectors_are_read(text, layers, heads):
    assert parse_selector(text) == (layers, heads)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "1", "1.", ".1", "1.2.3", "1,2", "a.b", " 1.2", "1.2 ", "1 .2", "1. 2", "1.2\n", "+1.2", "-1.2", "1.-2", "1.2-",
        "1-.2", "1--2.3", "1-2-3.4", "01.2", "1.02", "1.0x2", "1e1.2", "١.٢", "１.２", "²1.2", "1.2;", "**.1", "1.*-2", "1_0.2",  # noqa: RUF001
        "1000000.1", pytest.param("1." + "9" * 5000, id="many digits"), pytest.param("x" * 100_000, id="long"),
    ],
)  # fmt: skip
def test_what_is_no_selector_is_refused(text):
    with pytest.raises(RecipeError, match=r"is not a selector .*layer\.head") as caught:
        parse_selector(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["5-3.1", "1.5-3"])
def test_reversed_ranges_say_how_to_turn_them(text):
    with pytest.raises(RecipeError, match=r"5-3.*is reversed \(write 3-5\)"):
        parse_selector(text)


@pytest.mark.parametrize("value", [12.1, 12, True, None, ["1.2"], (1, 2), pytest.param(10**5000, id="huge")])
def test_a_selector_is_a_string(value):
    with pytest.raises(RecipeError, match="write it in quotes"):
        parse_selector(value)


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(alphabet="0123456789.-*", max_size=12))
def test_the_published_pattern_says_what_the_parser_says(text):
    try:
        parse_selector(text)
        reads = True
    except RecipeError as error:
        reads = "reversed" in str(error)
    assert reads == bool(re.fullmatch(SELECTOR_PATTERN, text))


def test_expansion_of_query_and_kv_heads():
    assert expand("8.*", SMOL) == {8: range(9)}
    assert expand("8.*", SMOL, "kv") == {8: range(3)}
    assert expand("*.7", SMOL) == {layer: range(7, 8) for layer in range(30)}
    assert expand("28-29.0-1", SMOL) == {28: range(2), 29: range(2)}


def test_star_means_all_layers_with_softmax_heads():
    assert expand("*.*", HYBRID_TEXT) == {0: range(8), 3: range(4)}
    assert expand("*.1", HYBRID_TEXT, "kv") == {0: range(1, 2), 3: range(1, 2)}


@pytest.mark.parametrize(
    ("selector", "kind", "words"),
    [
        ("30.0", "query", ["layer 30", "layers are 0-29"]),
        ("0-30.0", "query", ["layer 30", "layers are 0-29"]),
        ("0.9", "query", ["head 9", "layer 0", "query heads are 0-8"]),
        ("*.8-9", "query", ["head 9", "layer 0", "query heads are 0-8"]),
        ("0.3", "kv", ["head 3", "KV heads (not query heads) are 0-2"]),
        ("999999.999999", "query", ["layer 999999"]),
    ],
)
def test_what_the_model_does_not_have(selector, kind, words):
    with pytest.raises(RecipeError) as caught:
        expand(selector, SMOL, kind)
    assert all(word in str(caught.value) for word in [selector, *words])


@pytest.mark.parametrize("selector", ["1.0", "1.*", "0-3.0"])
def test_naming_a_layer_without_softmax_heads_says_so(selector):
    with pytest.raises(RecipeError, match=r"layer 1,.*no softmax attention.*name layers of 0, 3"):
        expand(selector, HYBRID_TEXT)


def test_star_must_hold_in_every_layer():
    with pytest.raises(RecipeError, match=r"head 5 .* does not exist in layer 3 .*0-3"):
        expand("*.5", HYBRID_TEXT)
    with pytest.raises(RecipeError, match="selects nothing"):
        expand("*.0", PartShape((0, 0), (0, 0), (0, 0)))


def test_later_selectors_override_earlier_ones():
    chosen = expand_all([("1.*", 1.0), ("1.3", 2.0), ("*.3-4", 3.0), ("1.4", 4.0)], SMOL)
    assert chosen[1] == {0: 1.0, 1: 1.0, 2: 1.0, 3: 3.0, 4: 4.0, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}
    assert chosen[0] == {3: 3.0, 4: 3.0}
    assert list(chosen) == sorted(chosen)
    assert all(list(heads) == sorted(heads) for heads in chosen.values())


def test_the_offending_selector_is_the_key():
    with pytest.raises(RecipeError) as caught:
        expand_all([("1.1", 1.0), ("12.99", 1.0)], SMOL)
    assert caught.value.key == '["12.99"]'


def test_overlapping_selectors_cannot_hang():
    with pytest.raises(RecipeError, match=r"overlap too often .*name each head once"):
        expand_all([("*.*", float(i)) for i in range(100_000)], SMOL)


def test_select_heads():
    assert select_heads("0.0-1", SMOL) == {0: (0, 1)}
    assert select_heads(["0.1", "0.0", "2.*"], SMOL, "kv") == {0: (0, 1), 2: (0, 1, 2)}
    with pytest.raises(RecipeError, match="no heads are named"):
        select_heads([], SMOL)


heads_of = st.dictionaries(
    st.integers(0, 3).filter(lambda layer: layer in (0, 3)),
    st.dictionaries(st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.5]), min_size=1),
    max_size=2,
)


@settings(deadline=None)  # a busy machine is no failure
@given(heads_of)
def test_to_selectors_is_the_inverse_of_expansion_on_a_hybrid(heads):
    assert expand_all(to_selectors(heads, HYBRID_TEXT).items(), HYBRID_TEXT) == heads


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(
        st.integers(0, 29), st.dictionaries(st.integers(0, 8), st.sampled_from([0.0, 2.5]), min_size=1), max_size=30
    )
)
def test_to_selectors_is_the_inverse_of_expansion(heads):
    selectors = to_selectors(heads, SMOL)
    assert expand_all(selectors.items(), SMOL) == heads
    # They do not overlap, so their order means nothing.
    assert expand_all(reversed(selectors.items()), SMOL) == heads
    assert len(selectors) <= sum(map(len, heads.values()))


@pytest.mark.parametrize(
    "selectors",
    [
        {"*.*": 1.0}, {"*.7": 1.0}, {"8.*": 2.0}, {"0-4.2-3": 1.0, "6.0": 2.0}, {"1.3": 3.0, "8.*": 2.0}, {"*.0": 1.0, "*.2": 2.0},
    ],
)  # fmt: skip
def test_the_compact_form_is_what_a_person_would_write(selectors):
    assert to_selectors(expand_all(selectors.items(), SMOL), SMOL) == selectors


def test_the_compact_form_uses_star_over_layers_of_different_sizes():
    assert to_selectors({0: dict.fromkeys(range(8), 1.0), 3: dict.fromkeys(range(4), 1.0)}, HYBRID_TEXT) == {
        "*.*": 1.0
    }
    assert to_selectors({0: {0: 1, 1: 1}}, HYBRID_TEXT, "kv") == {"0.*": 1}


@pytest.mark.parametrize(("heads", "kv"), [(9, 3), (32, 8), (8, 8), (16, 1)])
def test_query_and_kv_heads_map_onto_each_other(heads, kv):
    owners = [kv_head_of(h, heads, kv) for h in range(heads)]
    assert owners == [h * kv // heads for h in range(heads)]
    for k in range(kv):
        assert [h for h in range(heads) if owners[h] == k] == list(query_heads_of(k, heads, kv))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kv_head_of(9, 9, 3), "head 9 .*query heads are 0-8"),
        (lambda: kv_head_of(-1, 9, 3), "head -1"),
        (lambda: query_heads_of(3, 9, 3), "head 3 .*KV heads .*0-2"),
        (lambda: kv_head_of(0, 9, 2), "2 KV heads do not divide 9"),
        (lambda: query_heads_of(0, 9, 0), "0 KV heads"),
        (lambda: local_heads(9, 3, 0, 2), r"cannot be split evenly over 2 ranks \(choose a tensor-parallel size"),
        (lambda: local_heads(12, 6, 0, 4), "cannot be split evenly"),
        (lambda: local_heads(9, 3, 3, 3), "no rank 3 of 3"),
        (lambda: local_heads(9, 3, 0, 0), "no rank 0 of 0"),
        (lambda: local_heads(9, 3, -1, 3), "no rank -1"),
    ],
)
def test_impossible_heads_and_ranks(call, words):
    with pytest.raises(RecipeError, match=words):
        call()


@pytest.mark.parametrize(
    ("heads", "kv", "world"), [(9, 3, 1), (9, 3, 3), (9, 3, 9), (32, 8, 4), (32, 8, 16), (8, 8, 8), (16, 1, 4)]
)
def test_tensor_parallel_slices(heads, kv, world):
    slices = [local_heads(heads, kv, rank, world) for rank in range(world)]
    # Query heads: each on one rank, in order.
    assert [h for s in slices for h in s.query] == list(range(heads))
    # KV heads: exactly those that the rank's query heads read, so that no head looks for its KV elsewhere.
    for s in slices:
        assert set(s.kv) == {kv_head_of(h, heads, kv) for h in s.query}
        assert len(s.kv) == max(1, kv // world)
    holders = [sum(k in s.kv for s in slices) for k in range(kv)]
    assert holders == [max(1, world // kv)] * kv


@pytest.mark.parametrize("shape", [LLAMA, HYBRID, SPEECH])
def test_shapes_can_be_copied_and_pickled(shape):
    for other in (pickle.loads(pickle.dumps(shape)), copy.deepcopy(shape)):
        assert other == shape
        assert other.parts[other.main].num_layers == shape.parts[shape.main].num_layers


def test_a_shape_has_its_main_part():
    with pytest.raises(ValueError, match="main part 'text'"):
        ModelShape("x", {"vision": SMOL}, "text")
    assert HYBRID_TEXT.softmax_layers() == (0, 3)
    assert HYBRID_TEXT.heads("kv") == (2, 0, 0, 2)
