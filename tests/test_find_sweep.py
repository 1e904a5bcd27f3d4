"""Measuring many recipes with shared layers gives what each gives by itself: whole forwards of single rows under headpatch.apply."""

from __future__ import annotations

import random
from typing import Any

import planted
import pytest
import torch
from torch import nn
from zoo import ZOO

import headpatch
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.find.engine import Outcome, load_model, open_bench
from headpatch.recipe import Recipe

ARCHITECTURES = (
    "llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "gpt_oss", "deepseek_v3", "llava",
)  # fmt: skip
LABELS = [" negative", " positive", " good"]


def recipes(layers: int) -> list[Recipe | None]:
    """Edits that begin in each layer, of both families, out of order, with heads at the identity below the first real edit."""
    made: list[Recipe | None] = [None]
    for layer in reversed(range(layers)):
        patch = {"method": "zerotuning", "heads": {"0.0": 1.0, f"{layer}.1": 0.2, f"{layers - 1}.2": 4.0}}
        made.append(Recipe.from_dict({"headpatch": 1, "patches": [patch]}))
        patch = {"method": "head_scaling", "heads": {f"{layer}.0-1": 0.3}}
        made.append(Recipe.from_dict({"headpatch": 1, "patches": [patch]}))
    return made


def alone(model: Any, questions: Any, texts: Any, recipe: Recipe | None) -> Outcome:
    """The outcome by whole forwards of unpadded rows."""
    handle = headpatch.apply(model, recipe) if recipe else None
    first, other, entropy, text = [], [], [], []
    with torch.no_grad():
        for passage in questions.passages:
            logp = model(torch.tensor([passage.ids])).logits[0, -1].log_softmax(-1)
            first.append(logp[list(questions.starts)])
            rest = logp.clone()
            rest[list(questions.starts)] = -torch.inf
            other.append(rest.max())
            entropy.append(-(logp.exp() * logp).sum())
        for passage in texts:
            logp = model(torch.tensor([passage.ids])).logits[0].log_softmax(-1)
            text.append(logp[range(len(passage.ids)), list(passage.targets)])
    if handle:
        handle.remove()
    return Outcome(torch.stack(first), torch.stack(first), torch.stack(other), torch.stack(entropy), torch.cat(text))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sweep_is_exact(name: str, attn: str) -> None:
    entry = ZOO[name]
    if attn not in entry.attn:
        pytest.skip(f"{name} has no {attn} attention")
    model = entry.build(attn=attn)
    bench = open_bench(model, planted.tokenizer(), max_tokens=64)  # several batches, of different lengths
    questions = bench.questions(planted.TASK.prompts(planted.rows(5)), LABELS)
    texts = bench.texts(planted.TEXTS[:1])
    layers = entry.parts[entry.main].num_layers
    asked = recipes(layers)
    found = dict(bench.run(asked, questions, texts))
    assert bench.skipper.problem == "", "this architecture is a plain chain of layers"
    assert found.keys() == set(range(len(asked)))
    for index, recipe in enumerate(asked):
        truth = alone(model, questions, texts, recipe)
        for part in ("first", "other", "entropy", "text"):
            torch.testing.assert_close(getattr(found[index], part), getattr(truth, part), atol=3e-4, rtol=1e-4)
    assert not headpatch.handles(model)
    moved = [float((found[i].first - found[0].first).abs().max()) for i in range(1, len(asked))]
    assert max(moved) > 0.01, "the edits must be seen to do something"


def test_a_sweep_leaves_no_trace() -> None:
    model = planted.model()
    ids = torch.randint(3, 60, (2, 11))
    before, forwards = model(ids).logits, [dict(m.__dict__) for m in model.model.layers]
    bench = open_bench(model, planted.tokenizer())
    questions = bench.questions(planted.TASK.prompts(planted.rows(3)), LABELS)
    run = bench.run(recipes(2), questions)
    next(run)
    run.close()  # given up in the middle, with a recipe on its way
    list(bench.run(recipes(2), questions))
    assert torch.equal(model(ids).logits, before)
    assert [m.__dict__.keys() for m in model.model.layers] == [d.keys() for d in forwards]
    assert not headpatch.handles(model)


def test_recipes_on_the_model_are_part_of_what_is_measured() -> None:
    model, other = planted.model(), planted.model()
    bench = open_bench(model, planted.tokenizer())
    questions = bench.questions(planted.TASK.prompts(planted.rows(3)), LABELS)
    top = recipes(2)[1]
    with headpatch.applied(model, planted.SECRET):
        stacked = dict(bench.run([None, top], questions))
    both = {"headpatch": 1, "patches": planted.SECRET["patches"] + top.to_dict()["patches"]}
    merged = dict(
        open_bench(other, planted.tokenizer()).run(
            [Recipe.from_dict(planted.SECRET), Recipe.from_dict(both)], questions
        )
    )
    for i in range(2):
        torch.testing.assert_close(stacked[i].first, merged[i].first, atol=1e-5, rtol=1e-5)


class Wrapped(nn.Module):
    """A decoder layer that shares something with another layer behind everybody's back: says it, or hears it."""

    def __init__(self, inner: nn.Module, said: list[torch.Tensor], hears: bool) -> None:
        super().__init__()
        self.inner, self.said, self.hears = inner, said, hears

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(hidden, *args, **kwargs)
        if self.hears:
            return out + self.said[0]
        self.said[:] = [out.mean(1, keepdim=True)]
        return out


def test_layers_that_are_no_chain_are_run_whole() -> None:
    """Entered in the middle, such a model gives other logits; that is noticed, and results stay right."""
    model, said = ZOO["llama"].build(), list[torch.Tensor]()
    model.model.layers = nn.ModuleList(Wrapped(m, said, hears=i > 0) for i, m in enumerate(model.model.layers))
    bench = open_bench(model, planted.tokenizer())
    questions = bench.questions(
        planted.TASK.prompts([planted.rows(1)[0]] * 4), LABELS
    )  # no padding: the mean would see it
    asked = [None, Recipe.from_dict({"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"1.0": 0.1}}]})]
    found = dict(bench.run(asked, questions))
    assert "other logits" in bench.skipper.problem
    assert "whole forwards" in bench.shares_layers
    for index, recipe in enumerate(asked):
        truth = alone(model, questions, bench.texts(planted.TEXTS[:1]), recipe)
        torch.testing.assert_close(found[index].first, truth.first, atol=3e-4, rtol=1e-4)


def test_labels_with_the_same_first_token_are_compared_whole() -> None:
    model = planted.model()
    bench = open_bench(model, planted.tokenizer())
    labels = [" good film", " good slow film", " bad"]
    questions = bench.questions(planted.TASK.prompts(planted.rows(5)), labels)
    assert questions.whole
    asked = recipes(2)
    found = dict(bench.run(asked, questions))
    encode = lambda text: planted.tokenizer()(text)["input_ids"]  # noqa: E731
    for index, recipe in enumerate(asked):
        handle = headpatch.apply(model, recipe) if recipe else None
        for row, prompt in enumerate(planted.TASK.prompts(planted.rows(5))):
            start = len(encode(prompt))
            for place, label in enumerate(labels):
                ids = encode(prompt + label)
                with torch.no_grad():
                    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                total = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
                assert abs(total - float(found[index].whole[row, place])) < 3e-4
                assert abs(float(logp[start - 1, ids[start]]) - float(found[index].first[row, place])) < 3e-4
        if handle:
            handle.remove()


def test_generation_in_batches_is_generation_one_by_one() -> None:
    model = planted.model()
    bench = open_bench(model, planted.tokenizer(), max_tokens=60)
    prompts = planted.TASK.prompts(planted.rows(6))
    recipe = Recipe.from_dict(planted.SECRET)
    for asked in (None, recipe):
        together = bench.generate(prompts, asked, 5)
        assert together == [bench.generate([p], asked, 5)[0] for p in prompts]
    assert bench.generate(prompts, None, 5) != bench.generate(prompts, recipe, 5)


def test_what_cannot_be_measured_is_refused() -> None:
    bench = open_bench(planted.model(), planted.tokenizer())
    with pytest.raises(HeadpatchError, match="merges with the end"):
        bench.questions(["review good"], ["film", " bad"])
    with pytest.raises(HeadpatchError, match="same tokens"):
        bench.questions(["review good"], [" film", "  film"])
    with pytest.raises(HeadpatchError, match="neither questions nor texts"):
        list(bench.run([None], None))
    with pytest.raises(HeadpatchError, match="the model takes 256"):
        bench.questions([" ".join(["good"] * 300)], LABELS)
    with pytest.raises(HeadpatchError, match="no chat template"):
        bench.chat("hello")
    with pytest.raises(HeadpatchError, match="fewer than two tokens"):
        bench.texts([""])
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        open_bench(ZOO["bart"].build(), planted.tokenizer())


def test_loading_by_name_fails_in_words(tmp_path: Any) -> None:
    for given, words in (
        ({"name": str(tmp_path / "nothing")}, "cannot load"), ({"name": "x", "dtype": "int3"}, "no dtype"),
        ({"name": "x", "device": "abacus"}, "no device"), ({"name": "x", "engine": "steam"}, "no engine"),
    ):  # fmt: skip
        with pytest.raises(HeadpatchError, match=words):
            load_model(**given)


@pytest.mark.slow
def test_smollm2() -> None:
    """A trained model: 12 heads at random, 6 prompts, within 1e-4 of whole forwards."""
    from headpatch.demo_model import fetch

    model, tokenizer = load_model(str(fetch()), device="cpu")
    bench = open_bench(model, tokenizer)
    rng = random.Random(0)
    prompts = [
        f"Review: a {word} film\nSentiment (positive or negative):"
        for word in ("fine", "dull", "long", "warm", "loud", "thin")
    ]
    questions = bench.questions(prompts, [" negative", " positive"])
    heads = [f"{rng.randrange(30)}.{rng.randrange(9)}" for _ in range(12)]
    asked = [
        Recipe.from_dict({"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {h: 3.0}}]}) for h in heads
    ]
    found = dict(bench.run(asked, questions))
    assert bench.skipper.problem == ""
    for index, recipe in enumerate(asked):
        truth = alone(model, questions, bench.texts(["One short text."]), recipe)
        torch.testing.assert_close(found[index].first, truth.first, atol=1e-4, rtol=1e-5)
