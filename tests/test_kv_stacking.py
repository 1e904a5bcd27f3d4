"""Cache policies beside other patches: masses are those of what is kept; and under torch.compile, with a static cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from compat import ids, left_padded, logits, new_tokens, quiet_transformers
from kv_cases import cache_of, duo, feed, full_heads, reference_logits, visible, window_edit
from method_cases import Written, inputs_of
from naive import Call
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import ZOO

import headpatch

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # inductor imports it
]
GAMMAS = {0: 4.0, 1: 0.0, 2: 0.3}
SCALES = {1: -0.5, 3: 2.0}


@pytest.fixture(autouse=True)
def silent():
    torch.compiler.reset()
    with quiet_transformers():
        yield
    torch.compiler.reset()


def stacked(**policy: Any) -> dict[str, Any]:
    """A policy between two other patches."""
    return {
        "headpatch": 1,
        "patches": [
            {"method": "head_scaling", "heads": {f"*.{h}": s for h, s in SCALES.items()}},
            *duo("llama", **policy)["patches"],
            {"method": "zerotuning", "heads": {f"*.{h}": g for h, g in GAMMAS.items()}},
        ],
    }


def written_out(real: Tensor, sink: int = 3, recent: int = 5) -> Written:
    """Mask, then the first token's share times gamma, renormalised, then the outputs scaled."""

    def of_layer(layer: int) -> Any:
        def run(call: Call) -> Tensor:
            seen = visible(call, real.to(torch.bool), full_heads("llama")[layer], sink, recent)
            p = call.scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            first = real[:, : p.shape[-1]].to(torch.uint8).argmax(-1)
            for head, gamma in GAMMAS.items():
                weight = torch.ones(p.shape[0], p.shape[-1], dtype=p.dtype).scatter(1, first[:, None], gamma)
                new = p[:, head] * weight[:, None]
                total = new.sum(-1, keepdim=True)
                p[:, head] = torch.where(total > 0, new / total.clamp_min(1e-300), p[:, head])
            out = call.out(p)
            for head, scale in SCALES.items():
                out[:, :, head] *= scale
            return out

        return run

    return of_layer


@pytest.mark.parametrize("kind", ["bare", "static"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_policy_comes_first_wherever_it_stands(padding, kind):
    inputs = inputs_of("llama", padding, continuation=20)
    width = inputs.real.shape[1]
    expected = reference_logits("llama", inputs, written_out(inputs.real), [0, 1])
    alone = reference_logits("llama", inputs, window_edit(full_heads("llama"), inputs.real), [0, 1])
    assert (expected - alone)[inputs.real].abs().max() > 1e-2
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, stacked()):
        for edges in ([0, *range(inputs.prompt, width + 1)], [0, 4, 15, 16, 30, width], [0, width]):
            found = feed("llama", model, inputs, edges, cache_of("llama", model, kind))
            torch.testing.assert_close(found[inputs.real], expected[inputs.real], rtol=0, atol=1e-8)
        without = logits(model, inputs.kwargs, use_cache=False)
        torch.testing.assert_close(without[inputs.real], expected[inputs.real], rtol=0, atol=1e-8)


def test_handles_stack_as_one_recipe_does():
    inputs = inputs_of("llama", "left", continuation=6)
    model = ZOO["llama"].build(torch.float64)
    with headpatch.applied(model, stacked()):
        expected = logits(model, inputs.kwargs)
    handles = [headpatch.apply(model, {"headpatch": 1, "patches": [patch]}) for patch in stacked()["patches"]]
    torch.testing.assert_close(logits(model, inputs.kwargs)[inputs.real], expected[inputs.real], rtol=0, atol=1e-12)
    handles[1].remove()
    assert not torch.allclose(logits(model, inputs.kwargs)[inputs.real], expected[inputs.real])
    for handle in handles:
        handle.remove()


def test_trained_strengths_have_gradients_under_a_policy():
    model = ZOO["llama"].build(torch.float64)
    handle = headpatch.apply(model, stacked())
    strengths = handle.strengths(trainable=True)
    model(ids(2, 20), use_cache=False).logits.square().mean().backward()
    assert len(strengths) == 4
    assert all(s.grad is not None and s.grad.abs().max() > 1e-6 for s in strengths.values())
    step = 0.03  # norms and angles are computed in float32
    (name, one), *_ = ((n, s) for n, s in strengths.items() if n.startswith("patches.2"))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            one[0] += sign * step
            losses.append(float(model(ids(2, 20), use_cache=False).logits.square().mean()))
            one[0] -= sign * step
    assert abs((losses[0] - losses[1]) / (2 * step) - float(one.grad[0])) < 3e-5, name
    handle.remove()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_self_check_compares_with_a_reference(compiled, monkeypatch):
    model = ZOO["llama"].build()
    with headpatch.applied(model, stacked()) as handle:
        if compiled:
            logits(torch.compile(model, backend="eager"), ids(2, 20), use_cache=False)
        report = handle.report(self_check=True)
        assert [c.passed for c in report.self_check] == [True, True], str(report)
        assert all(c.compiled == compiled for c in report.self_check)
        from headpatch.adapters.huggingface import kvring

        monkeypatch.setattr(kvring, "band", lambda q, s, r, d: torch.ones(1, 1, q, s + r - 1 + q, dtype=torch.bool))
        torch.compiler.reset()
        assert not all(c.passed for c in handle.report(self_check=True).self_check), "a wrong mask would be seen"


class Graphs:
    """A compiler backend that counts the graphs it gets, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("lengths", [(12, 12), (12, 7)])
@pytest.mark.parametrize("data", [duo("llama"), stacked()], ids=["alone", "stacked"])
def test_decoding_steps_are_one_graph(lengths, data):
    """Prefilled in eager mode, as generate() does it; the steps then run in one graph, with and without a mask on the ring."""
    model, graphs = ZOO["llama"].build(torch.float64), Graphs()
    batch = left_padded(lengths)
    steps = [ids(2, 1, seed=n) for n in range(14)]

    def run(call: Any, cache: Any) -> Tensor:
        mask = batch["attention_mask"]
        pieces = [logits(model, batch, past_key_values=cache)]
        for step in steps:
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            given: Any = mask
            if isinstance(cache, StaticCache):  # as prepare_inputs_for_generation does
                given = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
                given[:, 0, 0, : mask.shape[1]] = mask.bool()
            positions = mask.sum(-1, keepdim=True) - 1
            pieces.append(
                logits(
                    call,
                    {"input_ids": step, "attention_mask": given, "position_ids": positions},
                    past_key_values=cache,
                )
            )
        return torch.cat(pieces, 1)

    with headpatch.applied(model, data) as handle:
        expected = run(model, DynamicCache())
        eager = run(model, StaticCache(config=model.config, max_cache_len=40))
        compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
        found = run(compiled, StaticCache(config=model.config, max_cache_len=40))
        real = torch.cat([batch["attention_mask"].bool(), torch.ones(2, len(steps), dtype=torch.bool)], 1)
        torch.testing.assert_close(eager[real], expected[real], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)
        assert graphs.count == 1
        again = run(compiled, StaticCache(config=model.config, max_cache_len=40))
        torch.testing.assert_close(again[real], expected[real], rtol=0, atol=1e-9)
        assert graphs.count == 1, "another cache of the same shape needs no other graph"
        assert handle.report().fires


@pytest.mark.parametrize("data", [duo("llama"), stacked()], ids=["alone", "stacked"])
def test_traced_chunks_equal_the_mask(data):
    """Several queries in a traced call, where nothing is known on the host."""
    model, graphs = ZOO["llama"].build(torch.float64), Graphs()
    tokens = ids(2, 30)
    with headpatch.applied(model, data):
        expected = logits(model, tokens, use_cache=False)
        compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
        whole = logits(compiled, tokens, use_cache=False)
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-9)
        batch = left_padded((20, 13))
        real = batch["attention_mask"].bool()
        padded = logits(compiled, batch, use_cache=False)[real]
        torch.testing.assert_close(padded, logits(model, batch, use_cache=False)[real], rtol=0, atol=1e-9)
        cache = StaticCache(config=model.config, max_cache_len=40)
        pieces = [logits(model, tokens[:, :6], past_key_values=cache)]
        for i, j in itertools.pairwise([6, 9, 12, 24, 25, 30]):
            # generate() makes such a mask; transformers cannot, in one graph
            mask = (torch.arange(40) <= torch.arange(i, j)[:, None])[None, None].expand(2, 1, -1, -1)
            positions = torch.arange(i, j)[None]
            given = {"input_ids": tokens[:, i:j], "attention_mask": mask, "position_ids": positions}
            pieces.append(logits(compiled, given, past_key_values=cache))
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-9)


def test_generate_compiles_its_chunks_and_steps():
    """The static variant through generate() itself, compiled on whatever device there is."""
    from transformers import CompileConfig

    model = ZOO["llama"].build(torch.float32)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    batch = left_padded((16, 11))
    with headpatch.applied(model, stacked()):
        expected = new_tokens(model, batch, 20)
        for more in ({}, {"prefill_chunk_size": 4}):
            found = new_tokens(model, batch, 20, cache_implementation="static", compile_config=config, **more)
            assert torch.equal(found, expected)
            torch.compiler.reset()


@pytest.mark.slow
def test_inductor_agrees():
    model = ZOO["llama"].build(torch.float32)
    tokens = ids(2, 20)
    with headpatch.applied(model, stacked()):
        expected = logits(model, tokens, use_cache=False)
        cache = StaticCache(config=model.config, max_cache_len=24)
        compiled = torch.compile(model, dynamic=False)
        pieces = [logits(model, tokens[:, :14], past_key_values=cache)]
        pieces += [logits(compiled, tokens[:, n : n + 1], past_key_values=cache) for n in range(14, 20)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-4)
