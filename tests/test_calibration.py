"""Calibration where the right recipe is known (tests/planted.py): found, not imagined, and the same after an interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planted
import pytest
import torch

import headpatch
from headpatch import cli
from headpatch.errors import HeadpatchError
from headpatch.evaluate import evaluate_labels
from headpatch.find.data import Row, Task
from headpatch.find.zerotuning import EFFORTS, Calibration, Settings, calibrate
from headpatch.sources import load_recipe

SETTINGS = Settings(
    strengths=(0.02, 8.0), screen=(60, 140), held_out=150, width=4, rounds=2, fresh=6, max_steps=6, random_draws=3, perplexity=1.0,
)  # fmt: skip


def run(
    train: list[Row], evaluation: list[Row], settings: Settings = SETTINGS, task: Task = planted.TASK, **more: Any
) -> Calibration:
    return calibrate(
        planted.model(), planted.tokenizer(), train, evaluation, task, settings, texts=planted.TEXTS, **more
    )


@pytest.fixture(scope="module")
def found() -> Calibration:
    rows = planted.labelled(900)
    return run(rows[:400], rows[400:], name="planted")


def test_it_finds_what_was_planted(found: Calibration) -> None:
    assert found.recipe is not None
    difference = found.report.difference.values["accuracy"]
    assert difference.low > 0.1, "76 % of the rows are right without the secret recipe"
    assert found.report.after.values["accuracy"].value > 0.93
    assert "0.3" in found.down_effective(), "the secret is a low gamma on head 0.3"
    assert "0.3" not in found.up_effective()
    heads = found.recipe.to_dict()["patches"][0]["heads"]
    assert heads.get("0.3", heads.get("*.3")) < 1


def test_controls_stand_beside_it(found: Calibration) -> None:
    report = found.report
    assert report.bias.keys() == {"fitted logit bias", "contextual calibration"}
    assert (
        report.before.values["accuracy"].value
        < report.bias["fitted logit bias"].value
        < report.after.values["accuracy"].value
    )
    assert len(report.random) == 3
    best_random = max(f.values["accuracy"].value for f in report.random)
    assert best_random < report.difference.values["accuracy"].value / 2
    text = "\n".join(report.lines())
    for word in (
        "accuracy",
        "unrestricted",
        "valid",
        "entropy",
        "perplexity",
        "random heads",
        "fitted logit bias",
        "difference",
    ):
        assert word in text


def test_figures_are_those_of_whole_forwards(found: Calibration) -> None:
    """Recomputed here with the model's own calls under headpatch.apply."""
    rows, model = planted.labelled(900)[400:], planted.model()
    tokenizer, right, valid, nats = planted.tokenizer(), [0, 0], [0, 0], [0.0, 0.0]
    answers = [tokenizer.convert_tokens_to_ids(word.strip()) for word in planted.TASK.labels.values()]
    gold = planted.TASK.gold(rows)
    for when in range(2):
        handle = headpatch.apply(model, found.recipe) if when else None
        with torch.no_grad():
            for prompt, label in zip(planted.TASK.prompts(rows), gold, strict=True):
                logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
                right[when] += int(logits[answers].argmax()) == label
                valid[when] += int(logits.argmax()) in answers
            count = 0
            for text in planted.TEXTS:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                logp = model(ids).logits[0, :-1].log_softmax(-1)
                nats[when] -= float(logp.gather(1, ids[0, 1:, None]).sum())
                count += ids.shape[1] - 1
        if handle:
            handle.remove()
    for when, figures in enumerate((found.report.before, found.report.after)):
        assert figures.values["accuracy"].value == pytest.approx(right[when] / len(rows), abs=1e-9)
        assert figures.values["valid"].value == pytest.approx(valid[when] / len(rows), abs=1e-9)
        assert figures.values["perplexity"].value == pytest.approx(
            torch.tensor(nats[when] / count).exp().item(), rel=1e-3
        )


@pytest.mark.parametrize("metric", ["probability", "accuracy"])
def test_noise_gives_nothing(metric: str) -> None:
    for seed in range(3):
        rows = planted.shuffled(700, seed)
        got = run(rows[:400], rows[400:], dataclasses.replace(SETTINGS, metric=metric, seed=seed))
        assert got.recipe is None, f"seed {seed}: {got.choice}"
        assert got.report.after is None
        assert "before" in got.report.lines()[0]


def test_what_must_be_kept_is_kept() -> None:
    """The planted edit raises perplexity by 8 %; where 2 % are allowed, nothing that breaks it is chosen."""
    rows = planted.labelled(900)
    got = run(rows[:400], rows[400:], dataclasses.replace(SETTINGS, perplexity=0.02))
    assert any(e.verdict > 0 for e in got.effects)
    if got.recipe is not None:
        assert got.report.difference.values["perplexity"].value < 0.02
    else:
        assert "keeps what must be kept" in got.choice.why


def test_entropy_needs_no_labels() -> None:
    rows = planted.rows(300)
    got = run(
        rows[:200],
        rows[200:],
        dataclasses.replace(
            SETTINGS, metric="entropy", screen=(60,), held_out=80, rounds=1, max_steps=2, perplexity=10.0
        ),
    )
    assert got.recipe is not None
    assert got.report.difference.values["entropy"].high < 0, "beyond doubt"
    assert "accuracy" not in got.report.before.values
    assert got.report.bias == {}


def test_several_templates_are_averaged_by_row() -> None:
    task = dataclasses.replace(planted.TASK, templates=(planted.TASK.templates[0], "film {text} review"))
    rows = planted.labelled(500)
    got = run(rows[:300], rows[300:], dataclasses.replace(SETTINGS, screen=(120,), rounds=1), task)
    accuracy = got.report.before.values["accuracy"]
    assert accuracy.rows == 200, "rows of data, not prompts"
    separate = []
    for template in task.templates:
        one = evaluate_labels(
            planted.model(), planted.tokenizer(), None, rows[300:], dataclasses.replace(task, templates=(template,))
        )
        separate.append(one.before.values["accuracy"].value)
    assert accuracy.value == pytest.approx(sum(separate) / 2)
    assert abs(separate[0] - separate[1]) > 0.01


def test_refusals(tmp_path: Path) -> None:
    rows = planted.labelled(900)
    with pytest.raises(HeadpatchError, match="too few"):
        run(rows[:100], rows[400:])
    with pytest.raises(HeadpatchError, match="rows:7: 'label' is null"):
        run([Row({"text": "good"}, "rows:7")] * 400, rows[400:])
    with pytest.raises(HeadpatchError, match="other than 1"):
        run(rows[:400], rows[400:], dataclasses.replace(SETTINGS, strengths=(1.0,)))
    with pytest.raises(HeadpatchError, match="no metric"):
        dataclasses.replace(SETTINGS, metric="luck")
    (tmp_path / "w").write_text("{}\n")
    with pytest.raises(HeadpatchError, match="no work file"):
        run(rows[:400], rows[400:], work=tmp_path / "w")


def test_a_work_file_of_other_weights_or_settings_is_refused(tmp_path: Path) -> None:
    rows, work = planted.labelled(500), tmp_path / "w"
    small = dataclasses.replace(SETTINGS, screen=(40,), held_out=40, rounds=1)
    run(rows[:100], rows[100:], small, work=work)
    with pytest.raises(HeadpatchError, match="other data, settings"):
        run(rows[:100], rows[100:], dataclasses.replace(small, seed=1), work=work)
    model = planted.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(HeadpatchError, match="other weights"):
        calibrate(
            model, planted.tokenizer(), rows[:100], rows[100:], planted.TASK, small, texts=planted.TEXTS, work=work
        )


class InterruptionError(Exception):
    """Stands for whatever stops a calibration."""


def test_resumed_after_every_stage_it_is_the_same(tmp_path: Path, found: Calibration) -> None:
    """Stopped again and again, some measurements further each time, with half a line written: the same recipe, nothing done twice."""
    rows, work = planted.labelled(900), tmp_path / "w"
    stops = 0

    def lines() -> int:
        return work.read_bytes().count(b"\n") if work.exists() else 0

    while True:
        start = lines()

        def progress(what: str, done: int, total: int, start: int = start) -> None:
            if lines() >= start + 15:
                raise InterruptionError

        try:
            got = run(rows[:400], rows[400:], name="planted", work=work, progress=progress)
            break
        except InterruptionError:
            stops += 1
            with work.open("ab") as file:
                file.write(b'{"key": "half a li')
    assert stops >= 2
    assert got.recipe.to_dict() == found.recipe.to_dict()
    keys = [json.loads(line)["key"] for line in work.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted world as files."""
    folder = tmp_path_factory.mktemp("planted")
    planted.model().save_pretrained(folder / "tiny")
    planted.tokenizer().save_pretrained(folder / "tiny")
    rows = planted.labelled(700)
    for name, part in (("train", rows[:300]), ("eval", rows[300:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(dict(r.fields)) + "\n" for r in part))
    return folder


def arguments(folder: Path, output: str) -> list[str]:
    return [
        "calibrate", "zerotuning", "--model", str(folder / "tiny"), "--train", str(folder / "train.jsonl"), "--eval",
        str(folder / "eval.jsonl"), "--template", "review {text} sentiment", "--labels", "no= negative, yes= positive", "--effort",
        "quick", "--gamma", "0.02", "--gamma", "8", "--screen", "120", "--held-out", "100", "--perplexity", "1000", "--rounds", "1",
        "--no-indices", "-o", str(folder / output), "--name", "planted", "--device", "cpu",
    ]  # fmt: skip


def test_killed_and_called_again_it_writes_the_same_bytes(files: Path) -> None:
    """The process is killed (SIGKILL) while it measures; the same command goes on and writes what an undisturbed run writes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "headpatch", *arguments(files, "killed.yaml")]
    work = files / "killed.yaml.work"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not work.exists() or work.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "it must not be over yet"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    measured = work.read_bytes().count(b"\n")
    assert not (files / "killed.yaml").exists()
    assert cli.main(arguments(files, "killed.yaml")) == 0
    assert cli.main(arguments(files, "whole.yaml")) == 0
    assert work.read_bytes().count(b"\n") > measured
    texts = [(files / f"{n}.yaml").read_text().replace(f"{n}.yaml", "out.yaml") for n in ("killed", "whole")]
    dates = [line for line in texts[0].splitlines() if "date:" in line]
    assert len(dates) == 1
    assert texts[0].replace(dates[0], "") == texts[1].replace(dates[0], "")


def test_the_command_in_the_provenance_gives_its_numbers(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments(files, "first.yaml"), "--profile", str(files / "profile.json")]) == 0
    out = capsys.readouterr().out
    recipe = load_recipe(str(files / "first.yaml"))
    command = recipe.provenance["command"]
    assert command in out
    words = shlex.split(command)
    assert words[0] == "headpatch"
    monkeypatch.chdir(files)
    (files / "first.yaml").rename(files / "kept.yaml")
    (files / "first.yaml.work").unlink()
    assert cli.main(words[1:]) == 0
    again = load_recipe(str(files / "first.yaml"))
    for key in ("baseline", "patched", "difference", "controls", "data", "choice"):
        assert again.provenance[key] == recipe.provenance[key]
    assert again.digest == recipe.digest
    profile = json.loads((files / "profile.json").read_text())
    assert {e["selector"] for e in profile["edits"]} == {f"{layer}.{h}" for layer in range(2) for h in range(4)}


def test_calibrated_recipes_bring_their_task_to_eval(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second command of the provenance measures its figures again."""
    output = files / "task.yaml"
    assert cli.main(arguments(files, "task.yaml")) == 0
    assert capsys.readouterr().out
    recipe = load_recipe(str(output))
    words = shlex.split(recipe.provenance["verify"])
    assert words[0] == "headpatch"
    monkeypatch.chdir(files)
    assert cli.main([*words[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert round(100 * said["patched"]["accuracy"]["value"], 2) == recipe.provenance["patched"]["accuracy"]
    assert round(100 * said["untouched"]["accuracy"]["value"], 2) == recipe.provenance["baseline"]["accuracy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--effort", "heroic"), "no effort"), (("--labels", "no"), "at least two"), (("--screen", "many"), "--screen takes numbers"),
        (("--template", "no field"), "names no field"), (("--train", "nothing.jsonl"), "nothing.jsonl: cannot be read"),
        (("--template", "{tekst}"), "no text in field 'tekst'"), (("--gamma", "-1"), "at least 0"),
    ],
)  # fmt: skip
def test_wrong_calls_end_in_one_line(
    files: Path, capfd: pytest.CaptureFixture[str], change: tuple[str, str], words: str
) -> None:
    given = arguments(files, "wrong.yaml")
    if change[0] in given and change[0] not in ("--template", "--gamma"):
        given[given.index(change[0]) + 1] = change[1]
    else:
        given += change
    assert cli.main(given) == 2
    error = capfd.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (files / "wrong.yaml").exists()


def test_efforts_are_settings() -> None:
    assert set(EFFORTS) == {"quick", "standard", "thorough"}
    assert all(isinstance(s, Settings) for s in EFFORTS.values())
