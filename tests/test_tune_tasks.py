"""Tasks as pairs: prompts, scores, function vectors, and from pairs to recipes, in Python and by command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from injecting import task
from learning import PAIRS, PARTS, SETTINGS, STYLE, folder, loaded, model, vectors

import headpatch
from headpatch import cli, tune
from headpatch.errors import HeadpatchError
from headpatch.find.data import Row
from headpatch.tune.function_vector import HeadWriter, addition, best_layer, function_vector, mediation
from headpatch.tune.measure import Answers, answers, few_shot_answers, questions
from headpatch.tune.pairs import (
    Format,
    Pair,
    answer_tokens,
    drawn,
    exact_match,
    first_tokens,
    pairs_of,
    prefix_match,
    split,
)

__all__ = ["folder", "loaded", "model", "vectors"]


# --- prompts --------------------------------------------------------------------------------------------------------------


def test_the_published_format():
    shown = [Pair("one", "eins"), Pair("dog", "3")]
    assert STYLE.prompt("two", shown) == "Q: one\nA: eins\n\nQ: dog\nA:3\n\nQ: two\nA:"
    assert (STYLE.said("eins"), STYLE.said("12"), STYLE.said("1.5"), STYLE.said("٣")) == (" eins", "12", " 1.5", " ٣")
    chat = Format(chat=True)
    assert chat.prompt("two", shown) == [
        ("user", "one"), ("assistant", "eins"), ("user", "dog"), ("assistant", "3"), ("user", "two")
    ]  # fmt: skip
    assert chat.said("eins") == "eins"


def test_the_first_answer_token(model, loaded):
    tokenizer = loaded[1]
    ids, firsts = first_tokens(model, [STYLE.prompt("the film")], [" good"])
    assert ids[0] == tuple(tokenizer(STYLE.prompt("the film"))["input_ids"])
    assert firsts == [tokenizer(STYLE.prompt("the film") + " good")["input_ids"][len(ids[0])]]
    asked = model.encode([Format(chat=True).prompt("the film", PAIRS[:1])])[0]
    assert tokenizer.decode(asked).endswith("user: the film\nassistant:")

    class Merging:
        def encode(self, prompts, answers=None, closed=False):
            return [(1, 2)] if answers is None else [(1, 3, 4)]

    with pytest.raises(HeadpatchError, match="merges with the end of its prompt"):
        first_tokens(Merging(), ["x"], ["y"])  # type: ignore[arg-type]


@pytest.mark.parametrize("chat", [False, True])
def test_what_ends_an_answer(model, loaded, chat):
    """A line break, and in a chat the token that ends the turn."""
    tokenizer, style = loaded[1], Format(chat=chat)
    _, ((*answer, end),) = answer_tokens(model, [style.prompt("the film")], [style.said("good")], line=True)
    _, (plain,) = answer_tokens(model, [style.prompt("the film")], [style.said("good")])
    assert tuple(answer) == plain and end in model.ends
    assert end == tokenizer.eos_token_id if chat else "\n" in tokenizer.decode([end])


def test_splits_and_draws():
    parts = split(PAIRS, 3)
    assert [len(p) for p in parts] == [63, 8, 19] and sorted(sum(parts, ())) == sorted(PAIRS)
    assert split(PAIRS, 3) == parts != split(PAIRS, 4)
    for shown, asked in drawn(parts.train, 5, 7, 0):
        assert len({*shown, asked}) == 6
    assert drawn(parts.train, 5, 7, 0) == drawn(parts.train, 5, 7, 0) != drawn(parts.train, 5, 7, 1)
    with pytest.raises(HeadpatchError, match="need 11 training pairs"):
        drawn(PAIRS[:5], 10, 1, 0)
    with pytest.raises(HeadpatchError, match="too few for a split"):
        split(PAIRS[:4])


def test_scores():
    assert prefix_match(" cats and dogs\nQ:", "cat") and not exact_match(" cats and dogs", "cat")
    assert exact_match(" Cat.\nQ: next", "cat") and not exact_match(" Cat.", "cat", case=True)
    assert prefix_match(" 12 (twelve)", "12") and not prefix_match("", "a")
    found = Answers.of([" cats", "dog"], [Pair("", "cat"), Pair("", "dog")], 9.5)
    assert (found.prefix, found.exact) == ((1, 1), (0, 1))
    assert found.accuracy[1].value == 0.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": "a"}, "no text in field 'output'"),
        ({"input": "a", "output": True}, "no text"),
        ({"input": "a", "output": " "}, "is empty"),
    ],
)
def test_rows_that_are_no_pairs(fields, words):
    with pytest.raises(HeadpatchError, match=rf"data\.jsonl:3: .*{words}"):
        pairs_of([Row(fields, "data.jsonl:3")])
    assert pairs_of([Row({"q": "x", "n": 7})], "q", "n") == [Pair("x", "7")]


# --- function vectors -----------------------------------------------------------------------------------------------------


def test_mediation_is_one_replaced_head_in_a_shuffled_prompt(loaded, model, vectors):
    """Each head's effect, with the replacement done by a recipe on the whole prompt."""
    import random

    base = loaded[0]
    effects = mediation(model, [(PARTS.train, vectors)], STYLE, prompts=2, shots=3, seed=5)
    rng, expected = random.Random("shuffle 5"), dict.fromkeys(effects, 0.0)
    for shown, asked in drawn(PARTS.train, 3, 2, 5):
        wrong = [pair.answer for pair in shown]
        rng.shuffle(wrong)
        text = STYLE.prompt(asked.question, [Pair(p.question, a) for p, a in zip(shown, wrong, strict=True)])
        ids, first = first_tokens(model, [text], [STYLE.said(asked.answer)])

        def chance(ids=ids, first=first):
            with torch.no_grad():
                return float(base(torch.tensor(ids)).logits[0, -1].double().softmax(-1)[first[0]])

        before = chance()
        for head in effects:
            layer, h = map(int, head.split("."))
            with headpatch.applied(base, task({head: 1.0}, {f"t.{head}": vectors[layer][h]})):
                expected[head] += (chance() - before) / 2
    assert effects == pytest.approx(expected, abs=1e-6)


def test_a_vector_as_heads(model, vectors, monkeypatch):
    f = function_vector(model, vectors, ["0.1", "2.3"])
    by_hand = (
        vectors[0][1].double() @ model.writer(0)[1].double() + vectors[2][3].double() @ model.writer(2)[3].double()
    )
    torch.testing.assert_close(f, by_hand)
    for layer in range(3):
        values, missing = HeadWriter(model.writer(layer), cut=0.0)(f)
        assert missing < 1e-6 and values.shape == (4, 16)
        written = torch.einsum("hd,hdk->k", values.double(), model.writer(layer).double())
        torch.testing.assert_close(written, f, rtol=0, atol=1e-4)
        assert HeadWriter(model.writer(layer), cut=0.3)(f)[1] > 0.01
    asked = questions(model, PARTS.valid, STYLE)
    layer, tried = best_layer(model, f, asked.prompts, range(len(asked.pairs)), asked.firsts)
    assert tried[layer] == max(tried.values()) and len(tried) == 3
    for layer in range(3):
        with torch.no_grad():
            edit = addition(layer, HeadWriter(model.writer(layer))(f)[0])
            logp = model.run(asked.prompts, range(len(asked.pairs)), edit).log_softmax(-1)
        assert tried[layer] == pytest.approx(float(logp.gather(-1, asked.firsts[:, None]).mean()), abs=1e-5)
    # Two layers a batch, the last one with a single one; and one layer a batch where the rows are many.
    for most in (2 * len(asked.pairs), 1):
        monkeypatch.setattr("headpatch.tune.function_vector.ROWS", most)
        again = best_layer(model, f, asked.prompts, range(len(asked.pairs)), asked.firsts)[1]
        assert again == pytest.approx(tried, abs=1e-5)
    with pytest.raises(HeadpatchError, match="name at least one"):
        function_vector(model, vectors, [])


# --- tasks and commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3, 12])
def test_few_shot_answers_however_they_are_batched(model, draws):
    """Prompts that share demonstrations are computed from there; each answer is the one to its own prompt."""
    asked = questions(model, PARTS.test, STYLE)
    texts, length = few_shot_answers(model, asked, PARTS.train, STYLE, shots=2, draws=draws, seed=1)
    import random

    rng = random.Random("ICL 1")
    for draw in range(draws):
        shown = rng.sample(list(PARTS.train), 2)
        for i in range(draw, 12, draws):
            begun = model.begin(model.encode([STYLE.prompt(PARTS.test[i].question, shown)]))
            assert answers(model, begun, None, asked.tokens) == [texts[i]]
    assert length > asked.length


@pytest.mark.parametrize(("chat", "loss"), [(False, "first"), (False, "answer"), (True, "answer")])
def test_a_learned_task(loaded, chat, loss, tmp_path):
    base, tokenizer = loaded
    settings = dataclasses.replace(SETTINGS, loss=loss)
    found = tune.learn_injection(
        base, tokenizer, PARTS, Format(chat=chat), settings, threshold=0.4, name="words", provenance={"data": "x"}
    )
    assert 0 < found.heads < found.of == 12
    strengths = dict(found.recipe.patches[0].heads)
    assert len(strengths) == found.heads and min(strengths.values()) >= 0.4
    assert set(found.recipe.arrays()) == {f"t.{head}" for head in strengths}
    assert all(a.dtype == torch.float16 for a in found.recipe.arrays().values())
    known = found.recipe.provenance
    assert known["settings"]["loss"] == loss
    assert known["data"] == "x" and known["seed"] == 0 and known["steps"] == found.learned.step
    assert list(known["losses"]["validation"]) == [round(x, 4) for x in found.learned.valid]
    assert set(found.answers) == {"zero-shot", "2-shot", "soft injection"} and known["patched"] and known["baseline"]
    found.recipe.save(tmp_path / "words.yaml")
    assert found.size == (tmp_path / "words.safetensors").stat().st_size
    assert f"{found.heads} of 12 heads" in found.lines()[-1]
    # What is reported is what the saved recipe does, one prompt after the other through generate().
    right = 0
    with headpatch.applied(base, str(tmp_path / "words.yaml")):
        for pair, said in zip(PARTS.test, found.answers["soft injection"].prefix, strict=True):
            prompt = Format(chat=chat).prompt(pair.question)
            text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
                [{"role": r, "content": c} for r, c in prompt], tokenize=False, add_generation_prompt=True
            )  # fmt: skip
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
            out = base.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=1)
            out_text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            right += prefix_match(out_text, pair.answer) == bool(said)
    assert right == len(PARTS.test)
    with pytest.raises(HeadpatchError, match="nothing was learned"):
        tune.learn_injection(base, tokenizer, PARTS, Format(chat=chat), settings, threshold=1.0)


def test_a_learned_function_vector(loaded):
    base, tokenizer = loaded
    found = tune.learn_function_vector(base, tokenizer, PARTS, STYLE, SETTINGS, heads=3, name="words")
    assert found.heads == 4 and found.recipe.patches[0].method.name == "function_vector"
    assert len(found.recipe.provenance["heads"]) == 3 and set(found.answers) >= {"zero-shot", "function vector"}


def rows(path: Path, pairs: Any) -> Path:
    path.write_text("".join(json.dumps({"input": p.question, "output": p.answer}) + "\n" for p in pairs))
    return path


def test_the_commands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    train, test = rows(tmp_path / "train.jsonl", PAIRS[:60]), rows(tmp_path / "test.jsonl", PAIRS[60:80])
    out = tmp_path / "words.yaml"
    shared = [
        "--model",
        str(folder),
        "--train",
        str(train),
        "--eval",
        str(test),
        "--device",
        "cpu",
        "--shots",
        "2",
        "--prompts",
        "3",
    ]
    few = ["--steps", "6", "--every", "2", "--validation", "4", "--lr", "0.5"]
    assert cli.main(["calibrate", "soft-injection", *shared, *few, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "soft injection" in said and "KiB of arrays" in said and "kept: the state after" in said
    assert not out.with_name("words.yaml.work").exists()
    first = headpatch.load_recipe(out)
    known = yaml.safe_load(out.read_text())["provenance"]
    assert known["settings"]["loss"] == "answer"  # unless told otherwise
    assert known["data"]["train"]["file"] == "train.jsonl" and len(known["data"]["eval"]["sha256"]) == 64
    assert (
        known["command"].startswith("headpatch calibrate soft-injection --model ") and "--steps 6" in known["command"]
    )
    assert str(tmp_path) not in out.read_text()

    # Interrupted after the second look at the validation rows, and run once more.
    from headpatch.terminal import Shown

    real = Shown.progress

    def stop(self, what, done, total, stage=None):
        if done == 5:
            raise KeyboardInterrupt
        real(self, what, done, total, stage)

    again = tmp_path / "again" / "words.yaml"
    with monkeypatch.context() as patched:
        patched.setattr(Shown, "progress", stop)
        assert cli.main(["calibrate", "soft-injection", *shared, *few, "-o", str(again)]) == 130
    assert again.with_name("words.yaml.work").exists() and not again.exists()
    capsys.readouterr()
    assert cli.main(["calibrate", "soft-injection", *shared, *few, "-o", str(again)]) == 0
    assert "going on from" in capsys.readouterr().err
    assert headpatch.load_recipe(again).digest == first.digest

    other = tmp_path / "fv.yaml"
    assert cli.main(["calibrate", "function-vector", *shared, "--heads", "2", "-o", str(other)]) == 0
    assert headpatch.load_recipe(other).patches[0].method.name == "function_vector"
    assert cli.main(["calibrate", "soft-injection", *shared, "--question-field", "q", "-o", str(other)]) == 2
    assert "no text in field 'q'" in capsys.readouterr().err


def test_the_page_runs_from_top_to_bottom(loaded, tmp_path, monkeypatch):
    import re
    import shutil

    base, tokenizer = loaded
    page = (Path(__file__).resolve().parent.parent / "docs" / "soft-injection.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "capitals.jsonl", PAIRS)
    ids = torch.randint(2, 60, (3, 9))
    names = {
        "headpatch": headpatch, "model": base, "tokenizer": tokenizer,
        "three_rows": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 1},
    }  # fmt: skip
    exec(compile(blocks[0], "docs/soft-injection.md", "exec"), names)
    shutil.copy("capitals.yaml", "plurals.yaml")
    exec(compile(blocks[1], "docs/soft-injection.md", "exec"), names)
    for handle in headpatch.handles(base):
        handle.remove()
