"""Long texts with something hidden: as long as was asked for, hidden where it was asked for, and the same every time."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_model import save_tiny_model

from headpatch import HeadpatchError
from headpatch.find.engine import load_model, open_bench
from headpatch.find.haystack import generated, load_haystack, split_sentences
from headpatch.find.needles import KINDS, hide, make_needle, needle_prompt, rng_of
from headpatch.find.passkeys import Passkeys, sample


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny Llama with 4096 positions, a byte-level tokenizer and a chat template."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), chat_template=True)
    model, tokenizer = load_model(str(folder), device="cpu")
    model.config.max_position_embeddings = 4096
    return open_bench(model, tokenizer)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_stands_where_it_should(bench, kind, depth, chat):
    rng = random.Random(1)
    needle = make_needle(kind, rng)
    prompt = needle_prompt(bench, generated, needle, 1500, depth, rng, chat=chat)
    hidden = prompt.hidden
    assert 1350 < len(hidden.ids) <= 1500
    assert bench.encode(hidden.text, hidden.special_tokens)[0] == hidden.ids
    (start, stop), (first, last) = hidden.needles[0], hidden.answers[0]
    assert bench.text(hidden.ids[start:stop]).strip() == needle.sentence
    assert needle.answer in bench.text(hidden.ids[first:last])
    assert len(bench.text(hidden.ids[first:last]).strip()) <= len(needle.answer) + 1, "and nothing around it"
    assert hidden.text.count(needle.sentence) == 1
    assert hidden.text.rstrip().endswith("Answer:" if not chat else "assistant:")
    begin = len(bench.encode("Read the text and answer the question after it.\n\n", False)[0])
    room = hidden.tail - begin - (stop - start)
    assert (start - begin) / room == pytest.approx(depth, abs=0.06)
    assert bench.text(hidden.ids[hidden.tail :]).strip().startswith("Question:")


def test_the_same_seeds_give_the_same_prompt(bench):
    def made(seed):
        rng = rng_of(seed, 2)
        return needle_prompt(bench, generated, make_needle("fact", rng), 600, 0.5, rng).hidden.text

    assert made(0) == made(0)
    assert made(0) != made(1)


def test_several_sentences_at_their_depths(bench):
    given = [(0.8, "Third one."), (0.1, "First one."), (0.8, "Fourth one."), (0.4, "Second one.")]
    hidden = hide(bench, generated, given, 900, rng_of(0), tail="\n\nAnd now?")
    order = sorted(range(4), key=lambda i: hidden.needles[i])
    assert [given[i][1] for i in order] == ["First one.", "Second one.", "Third one.", "Fourth one."]
    for (start, stop), (_, sentence) in zip(hidden.needles, given, strict=True):
        assert bench.text(hidden.ids[start:stop]).strip() == sentence


def test_impossible_lengths_are_refused(bench):
    needle = make_needle("fact", random.Random(0))
    with pytest.raises(HeadpatchError, match="leave no room"):
        needle_prompt(bench, generated, needle, 60, 0.5, random.Random(0))
    with pytest.raises(HeadpatchError, match="the model takes 4096"):
        needle_prompt(bench, generated, needle, 5000, 0.5, random.Random(0))
    with pytest.raises(HeadpatchError, match="depths run from 0"):
        needle_prompt(bench, generated, needle, 600, 1.5, random.Random(0))
    with pytest.raises(HeadpatchError, match="no needle 'hay'; choose fact"):
        make_needle("hay", random.Random(0))


def test_a_text_of_the_users(bench, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(
        "\n\n".join(f"Sentence number {i} is here. And it said: “Go on!” Then it went." for i in range(300))
    )
    book = load_haystack(path)
    assert book.sentences[1:3] == ("And it said: “Go on!”", "Then it went.")
    assert book.about()["text"] == "book.txt"
    needle = make_needle("number", random.Random(0))
    text = needle_prompt(bench, book, needle, 900, 0.5, random.Random(0)).hidden.text
    assert "Sentence number" in text
    begun = {needle_prompt(bench, book, needle, 900, 0.5, random.Random(i)).hidden.text[60:90] for i in range(5)}
    assert len(begun) > 2, "texts begin at different places"
    path.write_text("Too short. A text.")
    with pytest.raises(HeadpatchError, match=r"book.txt: has \d+ characters"):
        needle_prompt(bench, load_haystack(path), needle, 900, 0.5, random.Random(0))
    path.write_text("")
    with pytest.raises(HeadpatchError, match="holds no text"):
        load_haystack(path)
    with pytest.raises(HeadpatchError, match="cannot be read"):
        load_haystack(tmp_path / "none.txt")


def test_sentences():
    text = 'One two.  Three?\nFour "five." Six\n\nseven. 8 nine... (Ten) no. small'
    assert split_sentences(text) == (
        "One two.",
        "Three?",
        'Four "five."',
        "Six",
        "seven.",
        "8 nine...",
        "(Ten) no. small",
    )


def test_the_generator_does_not_repeat_itself():
    found = generated.draw(random.Random(0), 200_000)
    assert len(set(found)) > 0.7 * len(found)
    assert not any(c.isdigit() for s in found for c in s)
    assert sum(len(s) + 1 for s in found) >= 200_000


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_passkey_samples(bench, chat):
    keys = Passkeys(shortest=1200, longest=2400, lengths=3, count=4, words=5, seed=7, chat=chat)
    assert {keys.length(n) for n in range(40)} == {1200, 1800, 2400}
    hidden, reads = sample(bench, generated, keys, 3)
    assert len(hidden.ids) <= keys.length(3)
    assert reads.stop == len(hidden.ids)
    tail = bench.text(hidden.ids[reads.start :])
    for i, (first, last) in enumerate(hidden.answers):
        phrase = bench.text(hidden.ids[first:last]).strip()
        assert len(phrase.split()) == 5
        assert f"{phrase}." in tail, f"passkey {i} is asked for and answered behind the text"
    assert sample(bench, generated, keys, 3)[0] == hidden
    assert sample(bench, generated, keys, 4)[0] != hidden


def test_passkeys_must_make_sense():
    for wrong in ({"count": 0}, {"count": 13}, {"words": 0}, {"shortest": 9, "longest": 3}, {"lengths": 0}):
        with pytest.raises(HeadpatchError):
            Passkeys(**wrong)


def test_a_session_reads_in_pieces(bench):
    ids = bench.encode("The ferry leaves the eastern pier at ten past six.")[0]
    whole = bench.session().feed(ids)
    session = bench.session()
    session.feed(ids[:5])
    session.feed(ids[5:-1])
    torch.testing.assert_close(session.feed(ids[-1:]), whole, rtol=0, atol=1e-4)
    assert session.length == len(ids)
    with pytest.raises(HeadpatchError, match="no tokens"):
        session.feed([])
