"""Patched models under torch.compile(fullgraph=True): one graph per shape, changes take effect, the report knows that it fires.

Graphs are counted by a backend that runs them as they are: what is tested here is tracing, guards and recompilation. One test
compiles with inductor.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from compat import A, B, C, ids, left_padded, logits, new_tokens, one_thread, quiet_transformers, recipe
from naive import define, of, patch, registered
from torch import Tensor
from transformers import StaticCache
from zoo import ZOO

import headpatch
from headpatch.adapters.huggingface import attention
from headpatch.adapters.huggingface.controller import controller_of
from headpatch.adapters.huggingface.selfcheck import check_layers
from headpatch.operands import Segment, first_token

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor imports it
]


@pytest.fixture(autouse=True)
def silent():
    """transformers has nothing to warn about, and no test sees the graphs of another."""
    torch.compiler.reset()
    with quiet_transformers():
        yield
    torch.compiler.reset()


class Graphs:
    """A compiler backend that counts the graphs it gets, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def _one_layer() -> Any:
    """A Llama of one layer, where tracing time matters more than depth."""
    model = ZOO["llama"].build()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def compiled(model: Any, graphs: Graphs, dynamic: bool | None = False) -> Any:
    return torch.compile(model, fullgraph=True, backend=graphs, dynamic=dynamic)


@pytest.mark.parametrize(("entry", "padded"), [("llama", False), ("mistral", True), ("gpt2", False)])
def test_fifty_calls_make_one_graph_per_shape(entry, padded):
    model, graphs = ZOO[entry].build(), Graphs()
    handles = [headpatch.apply(model, r) for r in (A, B)]
    shapes = [(12, 7), (9, 9, 2)]
    batches = [
        [left_padded(shape, seed) if padded else {"input_ids": ids(len(shape), max(shape), seed)} for seed in range(3)]
        for shape in shapes
    ]
    expected = [[logits(model, b, use_cache=False) for b in of_shape] for of_shape in batches]
    report = handles[0].report()
    assert all(layer.calls == 6 and layer.traced == 0 for layer in report.layers)
    run = compiled(model, graphs)
    for i, of_shape in enumerate(batches):
        for call in range(50):
            found = logits(run, of_shape[call % 3], use_cache=False)
            torch.testing.assert_close(found, expected[i][call % 3], rtol=0, atol=1e-5)
        assert graphs.count == i + 1
    layers = handles[0].report(self_check=False).layers
    assert all(layer.calls == 6 and layer.traced == 2 for layer in layers)


def test_dynamic_shapes_stop_compiling():
    """With dynamic shapes the second length gives a graph for all others, as in the untouched model."""
    model, graphs = _one_layer(), Graphs()
    headpatch.apply(model, recipe("zerotuning", {"0.0-1": 4.0}))
    run = compiled(model, graphs, dynamic=None)
    for length in (6, 7, 8, 30):
        batch = {"input_ids": ids(2, length)}
        torch.testing.assert_close(
            logits(run, batch, use_cache=False), logits(model, batch, use_cache=False), rtol=0, atol=1e-5
        )
    assert graphs.count == 2


@pytest.mark.parametrize("entry", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_apply_and_remove_after_compile_take_effect(entry):
    """Graphs made before a recipe came or went are not used on; old ones are found again."""
    model, graphs, inputs = ZOO[entry].build(), Graphs(), ZOO[entry].make_inputs().kwargs
    more = {"use_cache": False} if ZOO[entry].caches else {}
    run = compiled(model, graphs)

    def check(applied: list[Any]) -> None:
        fresh = ZOO[entry].build()
        for one in applied:
            headpatch.apply(fresh, one)
        torch.testing.assert_close(logits(run, inputs, **more), logits(fresh, inputs, **more), rtol=0, atol=1e-5)
        assert torch.equal(logits(model, inputs, **more), logits(fresh, inputs, **more))

    check([])
    first = headpatch.apply(run, A)
    check([A])
    second = headpatch.apply(model, B)
    check([A, B])
    first.remove()
    check([B])
    second.remove()
    check([])
    with headpatch.applied(model, C):
        check([C])
    assert graphs.count <= 6
    before = graphs.count
    check([])
    assert graphs.count == before


def test_a_model_compiled_in_place():
    """model.compile() wraps the call, not the model."""
    model, graphs = ZOO["llama"].build(), Graphs()
    plain = logits(model, use_cache=False)
    model.compile(fullgraph=True, backend=graphs)
    assert torch.equal(logits(model, use_cache=False), plain)
    with headpatch.applied(model, A):
        fresh = ZOO["llama"].build()
        headpatch.apply(fresh, A)
        torch.testing.assert_close(logits(model, use_cache=False), logits(fresh, use_cache=False), rtol=0, atol=1e-5)
    assert torch.equal(logits(model, use_cache=False), plain)
    assert graphs.count >= 2


MANY = pytest.mark.xfail(
    strict=False, reason="each apply() is a new graph of one code object; the compiler's limit is 8"
)


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=[pytest.mark.slow, MANY])])
def test_a_compiled_model_takes_one_recipe_after_another(count):
    model, graphs = _one_layer(), Graphs()
    run = compiled(model, graphs)
    found = []
    for gamma in range(count):
        with headpatch.applied(model, recipe("zerotuning", ["*.0-2"], gamma=3.0 * gamma)):
            found.append(logits(run, use_cache=False))
            torch.testing.assert_close(found[-1], logits(model, use_cache=False), rtol=0, atol=1e-5)
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(found))
    assert graphs.count <= count


# ------------------------------------------------------------------------------------------------------- static caches


def _decode(run: Any, model: Any, batch: dict[str, Tensor], steps: int, padded: bool, size: int = 32) -> Tensor:
    """Greedy decoding by hand through a StaticCache, the step compiled."""
    cache = StaticCache(config=model.config, max_cache_len=size)
    mask = batch.get("attention_mask")
    given = dict(batch)
    if padded:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    found = [logits(model, given, past_key_values=cache)[:, -1:]]
    for _ in range(steps):
        given = {"input_ids": found[-1].argmax(-1)}
        if padded:
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
            wide = torch.nn.functional.pad(mask, (0, size - mask.shape[1]))
            given["attention_mask"] = wide
            given["position_ids"] = mask.sum(-1, keepdim=True) - 1
        found.append(logits(run, given, past_key_values=cache))
    return torch.cat(found, 1)


@pytest.mark.parametrize(("entry", "padded"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_a_compiled_static_cache_decode_is_one_graph(entry, padded):
    """The decode loop that generate() compiles on accelerators."""
    model, graphs = ZOO[entry].build(), Graphs()
    headpatch.apply(model, A)
    headpatch.apply(model, B)
    batch = left_padded((6, 4, 1)) if padded else {"input_ids": ids(2, 6)}
    eager = _decode(model, model, batch, 14, padded)
    run = compiled(model, graphs)
    torch.testing.assert_close(_decode(run, model, batch, 14, padded), eager, rtol=0, atol=1e-4)
    assert graphs.count == 1
    torch.testing.assert_close(_decode(run, model, batch, 14, padded), eager, rtol=0, atol=1e-4)
    assert graphs.count == 1, "a new cache of the same size needs no new graph"
    assert torch.equal(new_tokens(model, batch, 15), eager.argmax(-1)), "generate() with a cache of its own"


SPANNING = define(
    "mass", "spanning", constant=True, segments=lambda self: (Segment("spans"),), weights=lambda self, s: s[:, None]
)
HALVING = define(
    "mass", "halving", segments=lambda self: (first_token,),
    reshare=lambda self, shares, s, ops: torch.cat([shares[:1] / 2, shares[1:] + shares[:1] / 2]),
)  # fmt: skip
SHARPENING = define(
    "scores", "sharpening", segments=lambda self: (first_token,), transform=lambda self, x, s, ops: x * 1.5
)
LOOKING = define(
    "output", "looking", needs=("position", "prompt_len", "lse"), edit=lambda self, out, s, ops: out * s[:, None]
)


@pytest.mark.parametrize("method", [SPANNING, HALVING, SHARPENING, LOOKING], ids=lambda cls: cls.name)
def test_methods_of_every_family_compile(method):
    """Forward, and decoding through a static cache: what has no closed form runs as traced tensor operations."""
    model = _one_layer()
    with registered(method):
        handle = headpatch.apply(model, of(patch(method, {"*.0-1": 3.0})))
        batch, other = left_padded((6, 4, 1)), left_padded((6, 2, 5), 1)
        with handle.inputs(spans=[[(1, 3)], [(0, 1)], []]):
            graphs = Graphs()
            run = compiled(model, graphs)
            for one in (batch, other, batch):
                torch.testing.assert_close(
                    logits(run, one, use_cache=False), logits(model, one, use_cache=False), rtol=0, atol=1e-5
                )
            assert graphs.count == 1
            eager, graphs = _decode(model, model, batch, 4, padded=True), Graphs()
            run = compiled(model, graphs)
            torch.testing.assert_close(_decode(run, model, batch, 4, padded=True), eager, rtol=0, atol=1e-5)
            assert graphs.count == 1


def test_other_spans_need_no_new_graph():
    """Data given with the call is an input of the graph, not a constant in it."""
    model, graphs = _one_layer(), Graphs()
    run = compiled(model, graphs)
    with registered(SPANNING):
        handle = headpatch.apply(model, of(patch(SPANNING, {"*.0-1": 9.0})))
        found = []
        for spans in ([[(1, 3)], []], [[(2, 7)], [(0, 2), (5, 6)]], [[], [(3, 4)]]):
            with handle.inputs(spans=spans):
                found.append(logits(run, use_cache=False))
                torch.testing.assert_close(found[-1], logits(model, use_cache=False), rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])
    assert graphs.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_a_compiled_static_cache_decode_through_a_window(padded):
    """The window moves past the first token. transformers counts its steps in Python: as many graphs as untouched."""
    batch = left_padded((6, 4, 1)) if padded else {"input_ids": ids(2, 6)}
    count = []
    for applied in ([], [A, B]):
        model, graphs = ZOO["mistral"].build(), Graphs()
        for one in applied:
            headpatch.apply(model, one)
        eager = _decode(model, model, batch, 14, padded)
        assert torch.equal(new_tokens(model, batch, 15), eager.argmax(-1))
        run = compiled(model, graphs, dynamic=None)
        torch.testing.assert_close(_decode(run, model, batch, 14, padded), eager, rtol=0, atol=1e-4)
        count.append(graphs.count)
        torch.compiler.reset()
    assert count[1] <= count[0]


def test_static_cache_through_generate():
    """On a CPU generate() does not compile by itself; told to, it does, and gives the same tokens."""
    model = ZOO["llama"].build()
    batch = left_padded()
    plain = new_tokens(model, batch)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), plain)
    handle = headpatch.apply(model, A)
    patched = new_tokens(model, batch)
    assert not torch.equal(patched, plain)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), patched)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), patched)
    handle.remove()
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), plain)


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_report_of_a_compiled_model():
    """Compiled calls are not counted: the report says traced, and a self-check shows that the compiled path does its work."""
    model, graphs = ZOO["llama"].build(), Graphs()
    run = compiled(model, graphs)
    handle = headpatch.apply(model, {"headpatch": 1, "patches": [*A["patches"], *B["patches"]]})
    assert handle.report().fires is None
    logits(run, use_cache=False)
    report = handle.report()
    assert [(layer.calls, layer.traced) for layer in report.layers] == [(0, 1), (0, 1)]
    assert report.self_check and all(c.compiled and c.passed and c.identity_equal for c in report.self_check)
    assert report.fires is True
    assert "traced 1x" in str(report) and "(compiled): passed; identity bit-equal" in str(report)
    unchecked = handle.report(self_check=False)
    assert unchecked.fires is False and not unchecked.self_check
    assert [(layer.calls, layer.traced) for layer in handle.report().layers] == [(0, 1), (0, 1)], (
        "checking counts nothing"
    )


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ("llama", {"method": "head_scaling", "scale": 0.5, "positions": "decode"}),
        ("llama", {"method": "pasta", "alpha": 0.1}),
        ("llama", {"method": "act", "beta": 0.3, "threshold": 0.05}),
        pytest.param("llava", {"method": "pai", "alpha": 0.5, "part": "text"}, marks=pytest.mark.slow),
        pytest.param(
            "llava",
            {"method": "var", "recycle": 0.5, "sink_dimensions": [2, 4], "sink_threshold": 3.0, "min_visual_mass": 0.01,
             "min_nonsink_ratio": 0.1, "part": "text"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else given["method"],
)  # fmt: skip
def test_what_is_checked_of_edits_that_need_more_than_the_first_token(entry, method, monkeypatch):
    """A decoding step after a made-up prompt, compiled; an attention that lies is caught."""
    model = ZOO[entry].build()
    handle = headpatch.apply(model, {"headpatch": 1, "patches": [{**method, "heads": ["0.*"]}]})
    controller = controller_of(model)
    (path,) = controller.states
    (found,) = check_layers(controller, [path], compiled=True)
    assert found.passed and found.compiled, str(found)
    assert handle.report(self_check=True).self_check[0].passed
    honest = attention.edit_outputs if method["method"] == "head_scaling" else attention._edited
    lying = (lambda out, plan, server: honest(out, plan, server) * 1.01) if honest is attention.edit_outputs else (
        lambda *args, **kwargs: (honest(*args, **kwargs)[0] * 1.01, False)
    )  # fmt: skip
    monkeypatch.setattr(attention, honest.__name__, lying)
    (found,) = check_layers(controller, [path], compiled=False)
    assert not found.passed


def test_the_report_of_an_eager_model():
    """Calls are counted per layer, and only of layers that were called."""
    model = ZOO["whisper"].build()
    handle = headpatch.apply(
        model,
        {"headpatch": 1, "patches": [
            {"method": "zerotuning", "heads": {"*.*": 2.0}, "part": part} for part in ("encoder", "decoder", "cross")
        ]},
    )  # fmt: skip
    assert handle.report().fires is None
    inputs = ZOO["whisper"].make_inputs(continuation=2)
    with torch.no_grad():
        encoded = model.model.encoder(inputs.kwargs["input_features"])
    report = handle.report()
    assert {layer.part: layer.calls for layer in report.layers} == {"encoder": 1, "decoder": 0, "cross": 0}
    assert report.fires is False
    with torch.no_grad():
        model(encoder_outputs=encoded, decoder_input_ids=inputs.kwargs["decoder_input_ids"], use_cache=False)
    report = handle.report()
    assert {(r.part, r.layer, r.calls, r.traced) for r in report.layers} == {
        (part, layer, 1, 0) for part in ("encoder", "decoder", "cross") for layer in range(2)
    }
    assert report.fires is True and report.self_check == () and report.num_heads == 24
    assert "encoder.0: zerotuning 2 on heads 0, 1, 2, 3 [1 calls]" in str(report)
    checked = handle.report(self_check=True)
    assert len(checked.self_check) == 3 and all(c.passed and not c.compiled for c in checked.self_check)


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_inductor(padded):
    """The compiler that users have: same numbers, one graph, a passed self-check."""
    model = ZOO["llama"].build()
    handle = headpatch.apply(model, A)
    headpatch.apply(model, B)
    batch = left_padded() if padded else {"input_ids": ids()}
    expected = logits(model, batch, use_cache=False)
    model_calls = [layer.calls for layer in handle.report().layers]
    run = torch.compile(model, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        torch.testing.assert_close(logits(run, batch, use_cache=False), expected, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [layer.calls for layer in handle.report(self_check=False).layers] == model_calls
