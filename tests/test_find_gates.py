"""Gates of KV heads: the mixture against a float64 reference written from the formula, and a head that must keep its cache."""

from __future__ import annotations

import copying
import pytest
import torch
from compat import fingerprint, ids, logits, one_thread, silent
from naive import Naive
from torch import Tensor
from zoo import ZOO

import headpatch
from headpatch import HeadpatchError, UnsupportedModelError
from headpatch.adapters.huggingface.mixture import near
from headpatch.find import gates as gates_module
from headpatch.find.engine import open_mixture
from headpatch.find.gates import Training, train_gates
from headpatch.find.haystack import Haystack
from headpatch.find.loss import near_loss
from headpatch.find.passkeys import Passkeys

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

KEYS = Passkeys(shortest=150, longest=260, lengths=3, count=2, words=4, seed=1)
HAY = Haystack("words", None, tuple(" ".join((*copying.FILL[i : i + 5], "x.")) for i in range(35)) * 9)


def visible(n: int, first: int, recent: int) -> Tensor:
    """[n, n]: the first keys and the last ones up to the query's own."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (j <= i) & ((j < first) | (j > i - recent))


@pytest.mark.parametrize(
    ("n", "first", "recent"), [(300, 4, 16), (130, 0, 1), (257, 70, 3), (64, 32, 32), (65, 32, 32), (1, 2, 3)]
)
def test_near_attention_is_the_masked_softmax(n, first, recent):
    torch.manual_seed(n)
    q, k, v = (torch.randn(1, h, n, d, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~visible(n, first, recent), -torch.inf)
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(near(q, k, v, 0.3, first, recent), wanted, rtol=0, atol=1e-12)


def reference(entry, row, reads, gates, first, recent, full):
    """Loss and gradients of the gates, from whole attention maps."""
    naive = Naive(ZOO[entry])
    with torch.no_grad():
        teacher = naive.model.base_model(row, use_cache=False).last_hidden_state[0, reads]
        kept = {layer: naive.calls(layer)[0].out() for layer in naive.taps}
    seen = visible(row.shape[1], first, recent)
    given = {layer: g.double().requires_grad_() for layer, g in gates.items()}

    def mixing(layer):
        def edit(call):
            near_scores = call.scores.masked_fill(~seen, -torch.inf)
            part = call.out(near_scores.softmax(-1))
            whole = kept[layer] if full == "teacher" else call.out()
            g = given[layer].repeat_interleave(call.q.shape[1] // call.k.shape[1])[:, None]
            return g * whole + (1 - g) * part

        return edit

    with naive.edited({layer: mixing(layer) for layer in gates}):
        student = naive.model.base_model(row, use_cache=False).last_hidden_state[0, reads]
    loss = (student - teacher).square().mean(-1).mean()
    loss.backward()
    return loss.detach(), {layer: g.grad for layer, g in given.items()}


@pytest.mark.parametrize("entry", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("full", ["teacher", "student"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_mixture_and_its_gradients(entry, full, recompute):
    model = ZOO[entry].build(torch.float64)
    before = fingerprint(model)
    row, reads = ids(1, 40, seed=2), [25, 38, 39]
    mixture = open_mixture(model, 2, 5)
    values = {
        layer: torch.linspace(0.1 + 0.2 * layer, 0.9, k, dtype=torch.float64) for layer, k in mixture.layers.items()
    }
    given = {layer: g.clone().requires_grad_() for layer, g in values.items()}
    target = mixture.targets(row[0].tolist(), reads, keep=full == "teacher")
    with mixture.mixed(row[0].tolist(), reads, given, recompute) as student:
        loss = (student - target).square().mean(-1).mean()
        loss.backward()
    wanted, grads = reference(entry, row, reads, values, 2, 5, full)
    assert float(wanted) > 1e-3, "near attention does make a difference here"
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-6, atol=1e-9)
    for layer, g in given.items():
        torch.testing.assert_close(g.grad, grads[layer], rtol=1e-6, atol=1e-9)
    assert fingerprint(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("entry", ["llama", "qwen3", "gpt2"])
def test_gates_of_zero_and_one_are_the_recipe_that_they_become(entry):
    model = ZOO[entry].build(torch.float64)
    row = ids(1, 40, seed=4)
    mixture = open_mixture(model, 2, 5)
    gates = {layer: torch.arange(k).double() % 2 for layer, k in mixture.layers.items()}
    mixture.targets(row[0].tolist(), [0], keep=False)
    with torch.no_grad(), mixture.mixed(row[0].tolist(), range(40), gates) as hidden:
        wanted = model.get_output_embeddings()(hidden)
    full = [f"{layer}.{head}" for layer, g in gates.items() for head in range(len(g)) if g[head]]
    patch = {"method": "duo_attention", "full_kv_heads": full, "sink": 2, "recent": 5}
    untouched = logits(model, row)[0]
    with headpatch.applied(model, {"headpatch": 1, "patches": [patch]}):
        found = logits(model, row)[0]
    assert float((untouched - wanted).abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_mixture_on_a_gpu():
    """bf16 on the device against float64 on the host: hidden states and gradients."""
    row, reads, found = ids(1, 200, seed=2)[0].tolist(), [120, 199], []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        mixture = open_mixture(ZOO["llama"].build(torch.float64).to(device, dtype), 4, 16)
        gates = {layer: torch.full((k,), 0.4, requires_grad=True) for layer, k in mixture.layers.items()}
        target = mixture.targets(row, reads)
        with mixture.mixed(row, reads, {n: g.to(device) for n, g in gates.items()}) as student:
            ((student - target).float().square().mean(-1).mean()).backward()
        found.append((student.detach().double().cpu(), torch.cat([g.grad for g in gates.values()])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.05, atol=0.05 * float(found[0][0].abs().max()))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.2, atol=0.1 * float(found[0][1].abs().max()))


def test_gates_of_one_change_nothing():
    model = ZOO["llama"].build()
    mixture = open_mixture(model, 2, 5)
    row = ids(1, 30)[0].tolist()
    target = mixture.targets(row, [7, 29])
    with mixture.mixed(row, [7, 29], {layer: torch.ones(k) for layer, k in mixture.layers.items()}) as student:
        assert torch.equal(student.detach(), target)


def test_layers_with_a_window_have_no_gates():
    assert list(open_mixture(ZOO["gemma3"].build(), 2, 5).layers) == [2]
    assert not open_mixture(ZOO["mistral"].build(), 2, 5).layers


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(UnsupportedModelError, match="softcap"):
        open_mixture(ZOO["gemma2"].build(), 2, 5)
    model = ZOO["llama"].build()
    recipe = {"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"0.1": 2.0}}]}
    with headpatch.applied(model, recipe), pytest.raises(HeadpatchError, match="take that off first"):
        open_mixture(model, 2, 5)
    mixture = open_mixture(model, 2, 5)
    mixture.targets([3] * 20, [19])
    with (
        pytest.raises(HeadpatchError, match="other tokens"),
        mixture.mixed([3] * 21, [20], {0: torch.ones(2)}),
    ):
        pass


def looking(layer: int = 1, head: int = 2):
    """The copying model with another head planted: every token looks for the word that stands before a passkey."""
    made = copying.model(layer, head)
    own, width = slice(head * copying.DIM, (head + 1) * copying.DIM), copying.HEADS * copying.DIM
    weight = made.transformer.h[layer].attn.c_attn.weight
    with torch.no_grad():
        weight[:, :width][:, own] = 0.0
        weight[: len(copying.WORDS), :width][:, own.start + copying.WORDS.index("is:")] = 1.0
    return made


@pytest.fixture
def words(monkeypatch):
    """A vocabulary in which what precedes a passkey is a word of its own."""
    monkeypatch.setattr(copying, "WORDS", (*copying.WORDS, "is:"))


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (2, 3)])
def test_the_head_that_looks_far_keeps_its_gate(words, layer, head):
    training = Training(KEYS, sink=2, recent=8, steps=24, rate=0.12)
    lines = []
    found = train_gates(looking(layer, head), copying.tokenizer(), training, haystack=HAY, say=lines.append)
    best, second = found.scores.ranked()[:2]
    assert best[:2] == (layer, head)
    assert best[2] > 0.8
    assert second[2] < 0.2
    assert len(found.losses) == 24
    assert found.scores.about["sink"] == 2
    assert len(lines) == 12


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (2, 3)])
def test_the_quick_score_sees_it_too(words, layer, head):
    model = looking(layer, head)
    before = fingerprint(model)
    found = near_loss(model, copying.tokenizer(), KEYS, samples=2, sink=2, recent=8, haystack=HAY)
    assert fingerprint(model) == before
    assert found.ranked()[0][:2] == (layer, head)
    assert found.kind == "kv"


def test_the_quick_score_is_the_distance_of_outputs(monkeypatch):
    """Against whole maps, in pieces of a few queries, with two query heads to a KV head."""
    from headpatch.find import loss

    model, naive = ZOO["qwen3"].build(torch.float64), Naive(ZOO["qwen3"])
    row, start, n = ids(1, 40, seed=5), 30, 40
    hidden = type("Hidden", (), {"ids": tuple(row[0].tolist())})
    monkeypatch.setattr(loss, "sample", lambda *_: (hidden, range(start, n)))
    monkeypatch.setattr(loss, "BUDGET", 3 * n * 2 * 4)
    found = near_loss(model, copying.tokenizer(), KEYS, samples=1, sink=2, recent=6)
    with torch.no_grad():
        naive.model(row, use_cache=False)
    for layer in naive.taps:
        call = naive.calls(layer)[0]
        full = call.out()[0, start:]
        part = call.out(call.scores.masked_fill(~visible(n, 2, 6), -torch.inf).softmax(-1))[0, start:]
        lost = (full - part).square().sum(-1) / (full.square().sum(-1) + part.square().sum(-1))
        wanted = lost.mean(0).view(call.k.shape[1], -1).mean(1)
        torch.testing.assert_close(torch.tensor(found.values[layer]), wanted.float(), rtol=1e-5, atol=1e-7)


def test_layers_with_a_window_have_no_quick_score():
    with pytest.raises(HeadpatchError, match="nothing to save"):
        near_loss(ZOO["mistral"].build(), copying.tokenizer(), KEYS, samples=1, sink=2, recent=8, haystack=HAY)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", [5, 7, 11])
def test_an_interrupted_training_ends_where_another_would(words, tmp_path, at):
    training = Training(KEYS, sink=2, recent=8, steps=12)
    model, tokenizer = looking(), copying.tokenizer()
    whole = train_gates(model, tokenizer, training, haystack=HAY)

    def stop(what, done, total):
        if done == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_gates(model, tokenizer, training, haystack=HAY, work=tmp_path / "work", progress=stop)
    lines = []
    again = train_gates(model, tokenizer, training, haystack=HAY, work=tmp_path / "work", say=lines.append)
    assert "going on from there" in lines[0]
    assert again.scores.values == whole.scores.values
    assert again.losses == whole.losses
    done = train_gates(model, tokenizer, training, haystack=HAY, work=tmp_path / "work", progress=stop)
    assert done.scores.values == whole.scores.values, "and a finished one is not run again"


def test_work_of_another_training_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.setattr(gates_module, "KEEP_EVERY", 1)
    model, tokenizer, work = looking(), copying.tokenizer(), tmp_path / "work"
    train_gates(model, tokenizer, Training(KEYS, sink=2, recent=8, steps=1), haystack=HAY, work=work)
    with pytest.raises(HeadpatchError, match="made with other settings"):
        train_gates(model, tokenizer, Training(KEYS, sink=3, recent=8, steps=1), haystack=HAY, work=work)
    for damage in ("", "{}", '{"headpatch_gates'):
        work.write_text(damage)
        with pytest.raises(HeadpatchError, match="no work file"):
            train_gates(model, tokenizer, Training(KEYS, sink=2, recent=8, steps=1), haystack=HAY, work=work)


def test_settings_that_make_no_sense_are_refused():
    for wrong in (
        {"steps": 0}, {"rate": 0.0}, {"reg": -1.0}, {"full": "both"}, {"recent": 0}, {"sink": -1}, {"sink": 200, "recent": 60},
    ):  # fmt: skip
        with pytest.raises(HeadpatchError):
            Training(KEYS, **{"sink": 2, "recent": 8, **wrong})


def test_the_rate_climbs_and_falls():
    training = Training(KEYS, sink=2, recent=8, steps=100, rate=1.0)
    assert training.rate_at(0) == pytest.approx(0.1)
    assert training.rate_at(9) == pytest.approx(0.5)
    assert training.rate_at(50) == 1.0
    assert training.rate_at(90) == pytest.approx(0.5)
    assert training.rate_at(99) == pytest.approx(0.1)
