"""Learning a soft injection: last tokens run again, embeddings, gradient descent on strengths, and what an interruption changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from injecting import task
from learning import PAIRS, PARTS, SETTINGS, STYLE, folder, loaded, model, vectors
from zoo import ZOO

import headpatch
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.tune.engine import last_tokens
from headpatch.tune.measure import answers, edit_of, questions
from headpatch.tune.pairs import Pair, drawn, first_tokens
from headpatch.tune.soft import Lesson, Settings, embed, injection, learn

__all__ = ["folder", "loaded", "model", "vectors"]


class Letters:
    """A tokenizer for zoo models: one token per character."""

    chat_template = None
    eos_token_id = 95

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % 90 for c in text]}

    def __len__(self) -> int:
        return 96

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def nothing(layer: int, o: torch.Tensor) -> torch.Tensor:
    return o


# --- last tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "gpt_neox", "opt", "phi3", "gpt_oss", "deepseek_v3"],
)
def test_the_last_token_alone_is_the_whole_prompt(name):
    """Prompts of several lengths, one of a single token; a shared beginning; rows several times and in any order."""
    entry = ZOO[name]
    base = entry.build(torch.float32, entry.attn[0])
    found = last_tokens(base, Letters())
    prompts = found.encode(["hello there", "hi", "a", "hello you all are here today"])
    with torch.no_grad():
        wanted = torch.stack([base(torch.tensor([ids])).logits[0, -1] for ids in prompts])
        begun = found.begin(prompts)
        got = found.run(begun, [3, 0, 1, 2, 1])
        torch.testing.assert_close(got, wanted[[3, 0, 1, 2, 1]], rtol=0, atol=5e-5)
        assert torch.equal(found.run(begun, [3, 0, 1, 2, 1], nothing), got)
        shared = found.run(found.begin([prompts[0], prompts[3]], 6), [1, 0])
        torch.testing.assert_close(shared, wanted[[3, 0]], rtol=0, atol=5e-5)
    assert begun.lengths.tolist() == [len(ids) for ids in prompts]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_what_stands_behind_the_last_token_is_read_with_it(name):
    """Rows with different numbers of tokens behind, none among them; an edit acts at the prompt's last token alone."""
    entry = ZOO[name]
    base = entry.build(torch.float32, entry.attn[0])
    found = last_tokens(base, Letters())
    prompts, behind = found.encode(["hello there", "a", "hi"]), [(5, 9, 7), (), (8,)]
    begun = found.begin(prompts)
    acted = []

    def edit(layer, o):
        acted.append(tuple(o.shape))
        return 0.5 * o + 1

    with torch.no_grad():
        got = found.run(begun, [2, 0, 1], None, [behind[2], behind[0], behind[1]])
        edited = found.run(begun, [0, 1], edit, [behind[0], behind[1]])
        last = found.run(begun, [0, 1], edit)
        for row, i in enumerate([2, 0, 1]):
            whole = base(torch.tensor([prompts[i] + behind[i]])).logits[0, len(prompts[i]) - 1 :]
            torch.testing.assert_close(got[row, : len(whole)], whole, rtol=0, atol=5e-5)
    assert got.shape[:2] == (3, 4) and len({shape[0] for shape in acted}) == 1
    torch.testing.assert_close(edited[:, 0], last, rtol=0, atol=5e-5)
    assert (edited[0, 1:] - got[1, 1:]).abs().max() > 1e-4  # later tokens see the change in keys and values


def test_answers_are_what_generate_gives(loaded, model):
    base, tokenizer = loaded
    prompts = ["the film is", "everybody", "what is the capital of this country"]
    begun = model.begin(model.encode(prompts))
    found = model.answer(begun, [2, 0, 1], None, 6, frozenset())
    for row, i in enumerate([2, 0, 1]):
        ids = tokenizer(prompts[i], return_tensors="pt")
        out = base.generate(**ids, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=1)
        assert found[row] == out[0, ids["input_ids"].shape[1] :].tolist()
    cut = model.answer(begun, [2, 0, 1], None, 6, frozenset(row[2] for row in found))
    assert all(len(row) <= 2 for row in cut)
    assert {tokenizer.eos_token_id, tokenizer("\n")["input_ids"][0]} <= model.ends


@pytest.mark.parametrize("name", ["soft_injection", "function_vector"])
def test_an_edit_here_is_the_recipe_applied(loaded, model, name):
    """The learner's shortcut against headpatch.apply on whole prompts, and against answers of generate()."""
    base, tokenizer = loaded
    recipe = task({"0.1": 0.4, "1.3": 1.0, "2.0": 0.7}, method=name)
    prompts = [STYLE.prompt(pair.question) for pair in PAIRS[:5]]
    begun = model.begin(model.encode(prompts))
    with torch.no_grad():
        found = model.run(begun, range(5), edit_of(recipe, model))
        plain = model.run(begun, range(5))
    said = answers(model, begun, edit_of(recipe, model), 4)
    with headpatch.applied(base, recipe), torch.no_grad():
        with pytest.raises(HeadpatchError, match="a recipe is on this model"):
            model.run(begun, [0])
        for i, prompt in enumerate(prompts):
            ids = tokenizer(prompt, return_tensors="pt")
            torch.testing.assert_close(found[i], base(**ids).logits[0, -1], rtol=0, atol=1e-4)
            out = base.generate(**ids, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=1)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text.startswith(said[i])
    assert (found - plain).abs().max() > 0.1


def test_models_that_cannot_learn_here_say_why():
    with pytest.raises(UnsupportedModelError, match="a gate stands between"):
        last_tokens(ZOO["qwen3_next"].build(), Letters())
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        last_tokens(ZOO["bart"].build(), Letters())
    found = last_tokens(ZOO["llama"].build(), Letters())
    with pytest.raises(HeadpatchError, match="no chat template"):
        found.encode([[("user", "hello")]])


# --- learning -------------------------------------------------------------------------------------------------------------


def test_the_embedding_is_the_mean_of_observed_outputs(loaded, model, vectors):
    base, tokenizer = loaded
    total = [0.0] * 3
    for shown, asked in drawn(PARTS.train, 2, 4, 0):
        ids = tokenizer(STYLE.prompt(asked.question, shown), return_tensors="pt")
        with torch.no_grad(), headpatch.observe(base, ["output"], "*.*") as seen:
            base(**ids)
        for layer in range(3):
            heads = [seen["output", f"{layer}.{h}"][0][0, -1] for h in range(4)]
            total[layer] = total[layer] + torch.stack(heads)
    for layer in range(3):
        torch.testing.assert_close(vectors[layer], total[layer] / 4, rtol=0, atol=1e-5)


def test_a_step_is_adam_on_the_recipe_s_own_gradient(loaded, model, vectors):
    """One step from alpha = 1/2, with the gradient taken through headpatch.apply on the whole prompt."""
    base = loaded[0]
    train, valid = PARTS.train[:1], PARTS.valid[:2]
    settings = Settings(steps=1, every=1, validation=2, lr=0.3, loss="first")
    learned = learn(model, [Lesson(vectors, train, valid)], STYLE, settings)[0]
    arrays = {f"t.{layer}.{h}": vectors[layer][h] for layer in range(3) for h in range(4)}
    handle = headpatch.apply(base, task({name[2:]: 0.5 for name in arrays}, arrays))
    alphas = handle.strengths(trainable=True)
    ids, first = first_tokens(model, [STYLE.prompt(train[0].question)], [STYLE.said(train[0].answer)])
    loss = -base(torch.tensor(ids)).logits[0, -1].log_softmax(-1)[first[0]]
    gradients = torch.autograd.grad(loss, list(alphas.values()))
    handle.remove()
    assert not any(p.grad is not None for p in base.parameters())
    assert learned.train[0] == pytest.approx(float(loss.detach()), abs=1e-4)
    after = []
    for g in gradients:
        g = g * 0.25  # d alpha / d z at one half
        after.append(torch.sigmoid(-0.3 * g / (g.abs() + 1e-8)))
    expected = after if learned.step == 1 else [torch.full((4,), 0.5)] * 3
    for a, b in zip(learned.alpha, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert learned.valid[learned.step] == min(learned.valid)


def test_the_whole_answer_and_the_end_of_its_line_can_be_learned(loaded, model, vectors):
    """The loss is minus the log-probability of all of it, behind the prompt in one piece."""
    tokenizer = loaded[1]
    pairs = [Pair("the film", "good"), Pair("the country", "known good bad"), Pair("nobody", "laughed what")]
    settings = Settings(steps=6, every=3, validation=3, lr=0.5, loss="answer")
    with torch.no_grad():
        asked = model.begin(model.encode([STYLE.prompt(p.question) for p in pairs]))
        start = injection([torch.full((4,), 0.5)] * 3, vectors)
        wanted = []
        for row, pair in enumerate(pairs):
            prompt = STYLE.prompt(pair.question)
            ids = tokenizer(f"{prompt}{STYLE.said(pair.answer)}\n")["input_ids"][len(tokenizer(prompt)["input_ids"]) :]
            assert ids[-1] in model.ends and not set(ids[:-1]) & model.ends
            logp = model.run(asked, [row], start, [ids[:-1]])[0].log_softmax(-1)
            wanted.append(-float(logp.gather(-1, torch.tensor(ids)[:, None]).sum()))
    found = learn(model, [Lesson(vectors, pairs, pairs)], STYLE, settings)[0]
    assert found.valid[0] == pytest.approx(sum(wanted) / 3, abs=1e-3)
    assert min(found.valid) < found.valid[0]
    with pytest.raises(HeadpatchError, match="choose first or answer"):
        Settings(loss="last")


def test_it_learns_and_keeps_the_best_state(model, vectors):
    """Validation falls below the start; the state that is given is the one with the lowest loss, measured anew."""
    lesson = Lesson(vectors, PARTS.train, PARTS.valid)
    found = learn(model, [lesson], STYLE, SETTINGS)[0]
    assert len(found.valid) == 4 and len(found.train) == 3
    assert min(found.valid) < found.valid[0] - 0.1
    assert found.valid[found.step // 4] == min(found.valid)
    asked = questions(model, PARTS.valid[:8], STYLE)
    with torch.no_grad():
        logits = model.run(asked.prompts, range(8), injection(found.alpha, vectors))
    assert float(torch.nn.functional.cross_entropy(logits, asked.firsts)) == pytest.approx(min(found.valid), abs=1e-4)
    wild = learn(model, [lesson], STYLE, dataclasses.replace(SETTINGS, lr=40.0, steps=16))[0]
    assert wild.valid[wild.step // 4] == min(wild.valid) and wild.step < 16  # the last state is not the best


def test_tasks_side_by_side_are_as_alone(model, vectors):
    other = embed(model, PARTS.train[5:], STYLE, 2, 2, 1)
    lessons = [Lesson(vectors, PARTS.train, PARTS.valid, 3), Lesson(other, PARTS.train[::-1], PARTS.valid[4:], 1)]
    together = learn(model, lessons, STYLE, SETTINGS)
    for lesson, found in zip(lessons, together, strict=True):
        alone = learn(model, [lesson], STYLE, SETTINGS)[0]
        assert alone.step == found.step
        for a, b in zip(alone.alpha, found.alpha, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
        assert alone.valid == pytest.approx(found.valid, abs=1e-3)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [3, 6, 12])
def test_a_stopped_run_ends_where_a_whole_one_does(model, vectors, tmp_path, after):
    lesson, work, steps = Lesson(vectors, PARTS.train, PARTS.valid), tmp_path / "x.work", []

    def stop(step):
        steps.append(step)
        if step.step == after:
            raise StoppedError

    whole = learn(model, [lesson], STYLE, SETTINGS)[0]
    with pytest.raises(StoppedError):
        learn(model, [lesson], STYLE, SETTINGS, work=work, progress=stop)
    assert work.exists() == (after > 4)
    done = []
    again = learn(model, [lesson], STYLE, SETTINGS, work=work, progress=done.append)[0]
    assert len(done) == 12 - (after - 1) // 4 * 4
    assert again == dataclasses.replace(whole, alpha=again.alpha)
    assert all(torch.equal(a, b) for a, b in zip(again.alpha, whole.alpha, strict=True))
    assert done[-1].seconds_left == 0 and done[0].steps == 12 and math.isfinite(done[0].loss)
    with pytest.raises(HeadpatchError, match="other settings"):
        learn(model, [lesson], STYLE, dataclasses.replace(SETTINGS, lr=0.1), work=work)


def test_what_cannot_be_learned_is_said(model, vectors):
    with pytest.raises(HeadpatchError, match="training and validation pairs"):
        learn(model, [Lesson(vectors, PARTS.train, ())], STYLE)
    with pytest.raises(HeadpatchError, match="steps must be above 0"):
        Settings(steps=0)
    broken = [torch.full_like(t, torch.inf) for t in vectors]
    with pytest.raises(HeadpatchError, match="the loss is nan"):
        learn(model, [Lesson(broken, PARTS.train, PARTS.valid)], STYLE, SETTINGS)
