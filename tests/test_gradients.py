"""Gradients through a patched model equal autograd through the reference, strengths included, and nothing quadratic is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from exact import Recipe, edits_for, recipes
from reference import Edits, Reference
from torch import Tensor
from zoo import ZOO, Entry, Inputs, output

import headpatch

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-10
NAMES = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_oss", "whisper", "vit", "llava", "deepseek_v3", "bart")
ENTRIES = [pytest.param(ZOO[name], id=name) for name in NAMES]
LENGTHS = [10, 7, 4]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _inputs(entry: Entry, side: str | None = "left") -> Inputs:
    """Inputs with embeddings in place of token ids, as a leaf that wants a gradient, where the model takes them."""
    side = side if entry.caches else None
    inputs = entry.make_inputs(lengths=LENGTHS if side else None, padding_side=side).to(torch.float64)
    leaf = next((k for k in ("pixel_values", "input_features") if k in inputs.kwargs), None)
    if leaf is None:
        table = entry.build(torch.float64, entry.attn[0]).get_input_embeddings()
        inputs.kwargs["inputs_embeds"] = table(inputs.kwargs.pop("input_ids")).detach()
        leaf = "inputs_embeds"
    inputs.kwargs[leaf].requires_grad_()
    if entry.caches:
        inputs.kwargs["use_cache"] = False
    return inputs


def _leaf(inputs: Inputs) -> Tensor:
    return next(v for v in inputs.kwargs.values() if torch.is_tensor(v) and v.requires_grad)


def _gradients(model: Any, inputs: Inputs, more: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the outputs of real tokens: of the inputs, all parameters, and `more`."""
    g = torch.Generator().manual_seed(3)
    result = output(model(**inputs.kwargs))
    probe = torch.randn(result.shape, generator=g, dtype=torch.float64)
    loss = (torch.tanh(result.double()) * probe)[inputs.real].sum()
    named = {"inputs": _leaf(inputs), **{k: p for k, p in model.named_parameters() if p.requires_grad}}
    named |= {f"more.{i}": t for i, t in enumerate(more)}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {k: f for k, f in zip(named, found, strict=True) if f is not None}


def _truth(entry: Entry, inputs: Inputs, edits: Edits, more: list[Tensor]) -> dict[str, Tensor]:
    base = entry.attn[0]
    with Reference(entry).under(inputs, edits, base=base) as model:
        return _gradients(model, inputs, more)


def _compare(mine: dict[str, Tensor], truth: dict[str, Tensor], limit: float = LIMIT) -> None:
    assert mine.keys() == truth.keys()
    for name, value in truth.items():
        scale = max(1.0, float(value.abs().max()))
        difference = float((mine[name].double() - value).abs().max())
        assert difference <= limit * scale, f"gradient of {name}: off by {difference:.3g}, largest entry {scale:.3g}"


def _check(entry: Entry, inputs: Inputs, applied: list[Recipe], prepare: Any = None) -> None:
    model = entry.build(torch.float64, entry.attn[0])
    if prepare is not None:
        prepare(model)
    handles = [headpatch.apply(model, recipe) for recipe in applied]
    mine = _gradients(model, inputs, [])
    for handle in handles:
        handle.remove()
    _compare(mine, _truth(entry, inputs, edits_for(entry, applied), []))


@pytest.mark.parametrize("case", ["per_head", "zero", "scaling", "stacked", "two_zerotuning_handles"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_llama(side: str | None, case: str) -> None:
    """Of the input embeddings and of every parameter, padded or not."""
    entry = ZOO["llama"]
    _check(entry, _inputs(entry, side), recipes(entry, case))


@pytest.mark.parametrize("entry", ENTRIES)
def test_architectures(entry: Entry) -> None:
    """The same, left-padded, for sliding windows, soft-capping's models, sink logits (whose parameter has a gradient), and parts."""
    _check(entry, _inputs(entry), recipes(entry, "stacked"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_eager(name: str) -> None:
    """On eager attention, with soft-capping where there is some. Its softmax is in float32, hence only five digits."""
    entry = ZOO[name]
    inputs, applied = _inputs(entry, None), recipes(entry, "stacked")
    model = entry.build(torch.float64, "eager")
    with headpatch.applied(model, applied[0]):
        mine = _gradients(model, inputs, [])
    with Reference(entry).under(inputs, edits_for(entry, applied), base="eager") as naive:
        truth = _gradients(naive, inputs, [])
    _compare(mine, truth, 1e-4)


def test_gradients_have_power() -> None:
    """A gradient that forgets the edit's own dependence on queries and keys is far off; so is one at the wrong first token."""
    entry = ZOO["llama"]
    inputs, edits = _inputs(entry), edits_for(entry, recipes(entry, "per_head"))
    truth, plain = _truth(entry, inputs, edits, []), _truth(entry, inputs, {}, [])
    assert max(float((truth[k] - plain[k]).abs().max()) for k in truth) > 1e6 * LIMIT
    with pytest.raises(AssertionError, match="gradient of"):
        _compare(plain, truth)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Layers that run a second time in the backward pass see the same first tokens and the same strengths."""
    entry = ZOO[name]

    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()

    if reentrant:  # torch.autograd.grad cannot be used with it
        inputs, applied = _inputs(entry), recipes(entry, "stacked")
        model = entry.build(torch.float64, entry.attn[0])
        prepare(model)
        g = torch.Generator().manual_seed(3)
        with headpatch.applied(model, applied[0]):
            result = output(model(**inputs.kwargs))
            probe = torch.randn(result.shape, generator=g, dtype=torch.float64)
            (torch.tanh(result) * probe)[inputs.real].sum().backward()
        mine = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        truth = _truth(entry, inputs, edits_for(entry, applied), [])
        truth.pop("inputs")
        _compare(mine, truth)
    else:
        _check(entry, _inputs(entry), recipes(entry, "stacked"), prepare)


def test_a_batch_between_forward_and_backward() -> None:
    """With checkpointing, another batch may pass before the first one's backward: layers must not read its first tokens."""
    entry = ZOO["llama"]
    inputs, applied = _inputs(entry), recipes(entry, "per_head")
    model = entry.build(torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with headpatch.applied(model, applied[0]):
        g = torch.Generator().manual_seed(3)
        result = model(**inputs.kwargs).logits
        with torch.no_grad():
            model(**entry.make_inputs(lengths=[4, 10, 7], padding_side="left").kwargs)
        probe = torch.randn(result.shape, generator=g, dtype=torch.float64)
        (torch.tanh(result) * probe)[inputs.real].sum().backward()
    mine = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    truth = _truth(entry, inputs, edits_for(entry, applied), [])
    truth.pop("inputs")
    _compare(mine, truth)


# -------------------------------------------------------------------------------------------------------------- strengths


def _trainable(entry: Entry) -> Recipe:
    """Both methods, part of the heads, an identity strength among them: it must learn, too."""
    return {
        "headpatch": 1,
        "patches": [
            {"method": "zerotuning", "heads": {"0.3": 4.0, "0.0-1": 0.25, "1.*": 2.0, "1.2": 1.0}},
            {"method": "head_scaling", "heads": {"1.3": 0.5, "1.0": 1.0}},
        ],
    }


def _leaf_edits(leaves: dict[str, Tensor]) -> Edits:
    """The same recipe with the strengths' own values as tensors."""
    heads = {"patches.0.text.0": [0, 1, 3], "patches.0.text.1": [0, 1, 2, 3], "patches.1.text.1": [0, 3]}
    assert list(leaves) == list(heads)
    kinds = ("zerotuning", "head_scaling")
    edits: dict[int, list[tuple[str, dict[int, Tensor]]]] = {0: [], 1: []}
    for name, values in leaves.items():
        _, patch, _, layer = name.split(".")
        edits[int(layer)].append((kinds[int(patch)], dict(zip(heads[name], values.unbind(), strict=True))))
    return {"text": edits}


def test_strengths_as_they_are() -> None:
    """What the recipe says, by patch, part and layer, in ascending order of heads; plain tensors unless asked otherwise."""
    entry = ZOO["llama"]
    model = entry.build(torch.float64)
    with headpatch.applied(model, _trainable(entry)) as handle:
        found = handle.strengths()
        assert {k: v.tolist() for k, v in found.items()} == {
            "patches.0.text.0": [0.25, 0.25, 4.0], "patches.0.text.1": [2.0, 2.0, 1.0, 2.0], "patches.1.text.1": [1.0, 0.5],
        }  # fmt: skip
        assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("side", [None, "left"])
def test_strengths_learn(name: str, side: str | None) -> None:
    """Their gradients are the reference's, an identity strength's included; so are everybody else's while they learn."""
    entry = ZOO[name]
    inputs, model = _inputs(entry, side), entry.build(torch.float64, entry.attn[0])
    with headpatch.applied(model, _trainable(entry)) as handle:
        leaves = handle.strengths(trainable=True)
        assert all(v.is_leaf and v.requires_grad for v in leaves.values())
        assert leaves.keys() == handle.strengths().keys()
        mine = _gradients(model, inputs, list(leaves.values()))
        copies = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
        truth = _truth(entry, inputs, _leaf_edits(copies), list(copies.values()))
        for i, leaf in enumerate(leaves.values()):
            # Strengths are kept in float32 (float64 in float64 models); their gradients come in the same dtype.
            limit = LIMIT if leaf.dtype == torch.float64 else 1e-6
            _compare({"g": mine.pop(f"more.{i}")}, {"g": truth.pop(f"more.{i}")}, limit)
        _compare(mine, truth)


def test_a_step_of_training() -> None:
    """An optimiser step moves the strengths, the next forward uses the new ones, and removal still restores every bit."""
    entry = ZOO["llama"]
    inputs, model = _inputs(entry), entry.build(torch.float64)
    with torch.no_grad():
        before = output(model(**inputs.kwargs))
    handle = headpatch.apply(model, _trainable(entry))
    leaves = handle.strengths(trainable=True)
    optimiser = torch.optim.SGD(list(leaves.values()), lr=0.05)
    old = {k: v.detach().clone() for k, v in leaves.items()}
    losses = []
    for _ in range(3):
        loss = output(model(**inputs.kwargs))[inputs.real].square().mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[0]
    assert all(not torch.equal(old[k], v) for k, v in handle.strengths().items())
    with torch.no_grad():
        after = output(model(**inputs.kwargs))
        edits = _leaf_edits({k: v.detach().double() for k, v in leaves.items()})
        truth = Reference(entry)(inputs, edits)
    assert float((after - truth)[inputs.real].abs().max()) < LIMIT
    handle.remove()
    with torch.no_grad():
        assert torch.equal(before, output(model(**inputs.kwargs)))


# ----------------------------------------------------------------------------------------------------------------- memory

TOKENS = 512


@contextmanager
def _saved() -> Iterator[list[int]]:
    """Sizes, in elements really stored, of all tensors that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _largest_saved(model: Any, inputs: Inputs) -> int:
    with _saved() as sizes:
        output(model(**inputs.kwargs)).sum().backward()
    return max(sizes)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3"])
def test_nothing_quadratic_is_stored(name: str, trainable: bool) -> None:
    """512 tokens: no tensor of 512 x 512 elements or more is kept for the backward pass. The reference does keep such."""
    entry = ZOO[name]
    inputs = entry.make_inputs(lengths=[TOKENS])
    quadratic = inputs.prompt**2
    inputs.kwargs["use_cache"] = False
    with Reference(entry, compute=torch.float32).under(inputs, edits_for(entry, recipes(entry, "uniform"))) as naive:
        assert _largest_saved(naive, inputs) >= quadratic
    model = entry.build()
    assert _largest_saved(model, inputs) < quadratic, "the untouched model already stores that much"
    with headpatch.applied(model, recipes(entry, "stacked")[0]) as handle:
        if trainable:
            handle.strengths(trainable=True)
        assert _largest_saved(model, inputs) < quadratic


def test_padding_stores_no_more_than_untouched() -> None:
    """With padding, transformers itself stores one mask of 512 x 512 per row; the patch stores nothing larger than that."""
    entry = ZOO["llama"]
    inputs = entry.make_inputs(lengths=[TOKENS, TOKENS - 100], padding_side="left")
    inputs.kwargs["use_cache"] = False
    model = entry.build()
    untouched = _largest_saved(model, inputs)
    with headpatch.applied(model, recipes(entry, "stacked")[0]):
        assert _largest_saved(model, inputs) <= untouched
