"""`headpatch generate` and `headpatch doctor`: what is written is what the model writes under the recipe, and faults are found."""

from __future__ import annotations

import io
import json

import pytest
import torch
import yaml
from tiny_model import RECIPE, save_tiny_model

import headpatch
from headpatch import cli
from headpatch.adapters.huggingface import ADAPTER
from headpatch.adapters.huggingface.writing import write
from headpatch.policies import CacheMethod
from headpatch.registry import get_method

PROMPT = "What is the capital"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def reference(loaded, tokens, recipe=None, prompt=PROMPT):
    """Greedy tokens by hand: one whole forward per token, no cache, no generate()."""
    model, tokenizer = loaded
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    handle = None if recipe is None else headpatch.apply(model, str(recipe))
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
    if handle is not None:
        handle.remove()
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_patched_answer_is_the_patched_model_s(run, folder, recipe, loaded):
    common = ("generate", PROMPT, "--model", folder, "--device", "cpu", "--max-new-tokens", 12)
    status, plain, _ = run(*common)
    assert status == 0
    assert plain == reference(loaded, 12) + "\n"
    status, patched, _ = run(*common, "--recipe", recipe)
    assert status == 0
    assert patched == reference(loaded, 12, recipe) + "\n"
    assert patched != plain


def test_the_answer_comes_in_pieces(loaded):
    pieces = []
    done = write(*loaded, "What is known for the film", pieces.append, max_new_tokens=20, exactly=True)
    assert len(pieces) > 1
    assert "".join(pieces) == done.text
    assert done.tokens == 20
    assert 0 < done.seconds < 10


def test_compare_shows_both(run, folder, recipe, loaded):
    status, out, _ = run(
        "generate", PROMPT, "--model", folder, "--device", "cpu", "--max-new-tokens", 6, "-r", recipe, "--compare"
    )
    assert status == 0
    assert "untouched" in out
    assert "patched" in out
    letters = "".join(c for c in out if c.isalnum())
    for text in (reference(loaded, 6), reference(loaded, 6, recipe)):
        assert "".join(c for c in text if c.isalnum())[:20] in letters


def test_the_prompt_can_come_from_standard_input(run, folder, loaded, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Review: the film"))
    status, out, _ = run("generate", "-", "--model", folder, "--device", "cpu", "--max-new-tokens", 5)
    assert status == 0
    assert out == reference(loaded, 5, prompt="Review: the film") + "\n"


def test_recipes_stack(run, folder, recipe, loaded, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(
        yaml.safe_dump({"headpatch": 1, "patches": [{"method": "head_scaling", "heads": {"0.*": -2.0}}]})
    )
    common = ("generate", PROMPT, "--model", folder, "--device", "cpu", "--max-new-tokens", 10)
    with headpatch.applied(loaded[0], str(second)):
        wanted = reference(loaded, 10, recipe)
    _, out, _ = run(*common, "-r", second, "-r", recipe)
    assert out == wanted + "\n"
    assert out != run(*common, "-r", recipe)[1]


def test_draws_depend_on_the_seed_alone(loaded):
    state = torch.random.get_rng_state()
    texts = [write(*loaded, PROMPT, max_new_tokens=16, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_chat_template_is_used_where_there_is_one(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = save_tiny_model(tmp_path, chat_template=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    by_hand = "<s>user: What\nassistant:"
    plain = write(model, tokenizer, by_hand, max_new_tokens=8, chat=False).text
    assert write(model, tokenizer, "What", max_new_tokens=8).text == plain
    assert write(model, tokenizer, "What", max_new_tokens=8, chat=False).text != plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare"], "--compare needs a recipe"),
        (["--recipe", "no/such"], "no shipped recipe"),
        (["--recipe", "smollm2-135m-instruct/follow-context"], "the model has 3"),
        (["--chat"], "no chat template"),
        (["--device", "nowhere"], "nowhere"),
        (["--dtype", "int3"], "int3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(run, folder, arguments, said):
    status, out, err = run("generate", PROMPT, "--model", folder, *arguments)
    assert status == 2
    assert out == ""
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_no_such_model(run, tmp_path):
    status, _, err = run("generate", PROMPT, "--model", tmp_path / "nothing")
    assert status == 2
    assert "cannot load" in err


# ----------------------------------------------------------------------------------------------------------------- doctor


def own(name):
    return get_method(name).__module__.startswith("headpatch.")


def test_doctor_finds_nothing_wrong_here(run):
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["headpatch"]
    engine = next(a for a in found["adapters"] if a["name"] == "huggingface")
    import transformers

    assert engine["versions"]["transformers"] == transformers.__version__
    assert engine["operands"] == sorted(name for name, s in ADAPTER.supplies().items() if s.exact)
    passed = {check["name"]: check["detail"] for check in found["checks"] if check["passed"]}
    assert {"huggingface: zerotuning", "huggingface: head_scaling"} <= passed.keys()
    policies = {n for n in found["methods"] if issubclass(get_method(n), CacheMethod) and own(n)}
    assert len(policies) >= 6
    for name in policies:
        assert "equal where all is kept" in passed[f"huggingface: {name}"]
    assert "removal bit-equal" in passed["huggingface: zerotuning"]
    assert "error" in passed["huggingface: zerotuning"]
    _, text, _ = run("doctor")
    assert "passed" in text
    assert "FAILED" not in text


def broken_removal(monkeypatch):
    monkeypatch.setattr("headpatch.adapters.huggingface.handle.HuggingFaceHandle.remove", lambda self: None)


def broken_arithmetic(monkeypatch):
    from headpatch.adapters.huggingface import selfcheck

    right = selfcheck._reference
    monkeypatch.setattr(selfcheck, "_reference", lambda *args: right(*args) * 1.01)


def edits_that_do_nothing(monkeypatch):
    run = ADAPTER.specimen

    def frozen(device="cpu"):
        model, call = run(device)
        value = call()
        return model, lambda *_: value.clone()

    monkeypatch.setattr(type(ADAPTER), "specimen", lambda self, device="cpu": frozen(device))


def broken_ring(monkeypatch):
    from headpatch.adapters.huggingface import kvring

    right = kvring.write
    monkeypatch.setattr(kvring, "write", lambda buffer, new, *where: right(buffer, -new, *where))


def broken_choice(monkeypatch):
    """A policy that says it chose, and keeps everything."""
    from headpatch.policies import SelectionMethod

    monkeypatch.setattr(SelectionMethod, "budget", lambda self, length: length)


def a_crash(monkeypatch):
    def crash(*_):
        raise RuntimeError("the kernel is not there")

    monkeypatch.setattr(type(ADAPTER), "specimen", crash)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (broken_removal, "TRACES"), (broken_arithmetic, "edit WRONG"), (edits_that_do_nothing, "edit WRONG"),
        (broken_ring, "what it keeps is WRONG"), (broken_choice, "what it keeps is WRONG"),
        (a_crash, "the kernel is not there"),
    ],
)  # fmt: skip
def test_doctor_finds_faults(run, monkeypatch, fault, said):
    fault(monkeypatch)
    status, out, _ = run("doctor")
    assert status == 1
    assert "FAILED" in out
    assert said in out


def test_doctor_says_that_an_engine_is_missing(run, monkeypatch):
    def missing(self):
        raise headpatch.EngineError("transformers is not installed; pip install 'headpatch[hf]'")

    monkeypatch.setattr(type(ADAPTER), "_load", missing)
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0  # an engine that is not installed is no fault
    assert "not installed" in next(a for a in found["adapters"] if a["name"] == "huggingface")["problem"]
