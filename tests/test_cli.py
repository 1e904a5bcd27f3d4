"""The command `headpatch`: what it prints is what is so, and errors are one line."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from tiny_model import RECIPE

import headpatch
from headpatch import cli
from headpatch.commands import COMMANDS
from headpatch.registry import get_method, method_names

FOLLOW = "smollm2-135m-instruct/follow-context"


@pytest.fixture
def run(capsys, monkeypatch):
    """Call `headpatch` with arguments: (status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe and give its path."""

    def write(patches, name="r.yaml", **more):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"headpatch": 1, "patches": patches, **more}))
        return path

    return write


def command(module):
    return module.rstrip("_").replace("_", "-")


def test_help_lists_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for name in COMMANDS:
        assert re.search(rf"\b{command(name)}\b", out), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run, name):
    if name == "lm_eval":
        pytest.skip("its help is the harness's own")
    status, out, _ = run(command(name), "--help")
    assert status == 0
    assert "Usage: headpatch" in out


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["methods"], ["show", FOLLOW]], ids=" ".join)
def test_looking_around_loads_no_engine(arguments):
    code = (
        "import sys; from headpatch.cli import main; status = main(sys.argv[1:]);"
        "print('LOADED', *sorted({'torch', 'transformers', 'vllm', 'matplotlib', 'lm_eval'} & set(sys.modules)));"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_python_m_headpatch_is_the_command():
    done = subprocess.run([sys.executable, "-m", "headpatch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"headpatch {headpatch.__version__}\n"


def test_recipes(run):
    status, out, _ = run("recipes", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert {name: row["description"] for name, row in rows.items()} == headpatch.list_recipes()
    assert rows[FOLLOW]["heads"] == 7
    assert rows[FOLLOW]["methods"] == ["zerotuning", "head_scaling"]
    _, table, _ = run("recipes")
    assert all(name in table for name in rows)


def test_methods(run):
    status, out, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert list(rows) == method_names()
    gamma = rows["zerotuning"]["parameters"][0]
    assert gamma["name"] == "gamma"
    assert "at least 0" in gamma["values"]
    assert "does nothing at 1" in gamma["values"]
    positions = next(p for p in rows["head_scaling"]["parameters"] if p["name"] == "positions")
    assert "one of all, last, decode" in positions["values"]
    _, table, _ = run("methods")
    for name in method_names():
        assert name in table
        for field in dataclasses.fields(get_method(name)):
            assert field.name in table
    status, one, _ = run("methods", "zerotuning")
    assert status == 0
    assert "head_scaling" not in one


def grid_of(out):
    """What an ASCII grid says: {(layer, head): symbol}, blocks joined."""
    found, start = {}, 0
    for line in out.splitlines():
        if re.match(r"\s*layer\b", line):
            ruler = line
            start = int(re.search(r"\d+", ruler)[0])
            column = re.search(r"\d+", ruler).start()
        elif head := re.match(r"\s*head (\d+) (.*)", line):
            first = line.index(head[2])
            assert first == column, "the ruler does not stand over its columns"
            cells = head[2].rstrip()
            step = 2 if set(cells[1::2]) == {" "} else 1
            for i, symbol in enumerate(cells[::step]):
                found[start + i, int(head[1])] = symbol
    return found


def test_show_draws_each_head_where_it_is(run):
    status, out, _ = run("show", FOLLOW, "--ascii")
    assert status == 0
    drawn = grid_of(out)
    assert len(drawn) == 30 * 9
    marked = {place: symbol for place, symbol in drawn.items() if symbol != "."}
    assert marked == {
        (12, 5): "a", (13, 0): "a", (14, 7): "A", (16, 1): "a",  # zerotuning 0.3, 0.3, 3, 0.3
        (14, 5): "b", (17, 2): "b", (23, 4): "b",  # head_scaling 0
    }  # fmt: skip
    assert "gamma 0.3 on 12.5, 13.0, 16.1; 3 on 14.7" in out


def test_show_is_split_where_the_terminal_is_narrow(run, monkeypatch):
    wide = grid_of(run("show", FOLLOW, "--ascii")[1])
    monkeypatch.setenv("COLUMNS", "30")
    out = run("show", FOLLOW, "--ascii")[1]
    blocks = [line for line in out.splitlines() if re.match(r"\s*layer\b", line)]
    assert len(blocks) == 2  # 20 layers of one column each, and 10
    assert grid_of(out) == wide


def test_show_splits_deep_models_into_blocks_of_layers(run, recipe_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = recipe_file(
        [{"method": "zerotuning", "heads": {"*.1": 2.0, "70.0": 0.5}}], model={"num_layers": 80, "num_heads": 3}
    )
    out = run("show", path, "--ascii")[1]
    drawn = grid_of(out)
    assert len(drawn) == 240
    assert {layer for (layer, head), symbol in drawn.items() if head == 1 and symbol == "A"} == set(range(80))
    assert drawn[70, 0] == "a"
    assert max(map(len, (line for line in out.splitlines() if "head 0" in line))) <= 60


def test_show_tells_patches_apart_without_colour(run, recipe_file):
    path = recipe_file(
        [
            {"method": "zerotuning", "heads": {"0.0": 2.0, "0.1": 0.5, "1.1": 1.0}},
            {"method": "head_scaling", "heads": {"0.2": 0.5, "0.0": 2.0, "1.0": 3.0}},
        ],
        model={"num_layers": 3, "num_heads": 4},
    )
    out = run("show", path)[1]
    assert "\x1b[" not in out
    symbols = {place: s for place, s in grid_of(out.replace("·", ".")).items() if s != "."}
    assert symbols == {(0, 0): "*", (0, 1): "▼", (0, 2): "○", (1, 0): "●", (1, 1): "="}
    assert "* several patches" in out


def test_show_needs_a_shape_for_stars(run, recipe_file, tmp_path):
    path = recipe_file([{"method": "zerotuning", "heads": {"*.0": 2.0}}])
    status, out, err = run("show", path)
    assert status == 2
    assert not out
    assert "--model" in err
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, hidden_size=32).save_pretrained(
        tmp_path
    )
    status, out, _ = run("show", path, "--model", tmp_path, "--ascii")
    assert status == 0
    assert sum(symbol == "A" for symbol in grid_of(out).values()) == 5


def test_show_json_has_the_recipe_and_its_heads(run):
    data = json.loads(run("show", FOLLOW, "--json")[1])
    resolved = data.pop("resolved")
    assert headpatch.Recipe.from_dict(data) == headpatch.load_recipe(FOLLOW)
    assert resolved[0]["heads"]["14"] == {"7": 3.0}
    assert resolved[1]["heads"] == {"14": {"5": 0.0}, "17": {"2": 0.0}, "23": {"4": 0.0}}


@pytest.fixture
def config_folder(tmp_path):
    """A model folder that holds a config and nothing else."""
    from transformers import LlamaConfig

    shape = RECIPE["model"]
    folder = tmp_path / "model"
    LlamaConfig(
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"], head_dim=shape["head_dim"],
        num_key_value_heads=shape["num_kv_heads"], hidden_size=64, intermediate_size=96, vocab_size=50,
    ).save_pretrained(folder)  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_check_reads_the_config_alone(run, recipe_file, config_folder):
    path = recipe_file(RECIPE["patches"], model=RECIPE["model"])
    status, out, _ = run("check", path, "--model", config_folder, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["num_heads"] == 4 + 1 + 2
    assert found["needs"] == ["first_token"]
    assert found["patches"][0]["heads"] == {"0": [0, 1, 2, 3], "1": [2]}
    status, out, _ = run("check", path, "--model", config_folder)
    assert status == 0
    assert "5 query" in out
    assert [p.name for p in config_folder.iterdir()] == ["config.json"]


def test_check_refuses_what_does_not_fit(run, recipe_file, config_folder):
    status, out, err = run("check", FOLLOW, "--model", config_folder)
    assert status == 2
    assert not out
    assert "model.num_layers: the recipe says 30, the model has 3" in err
    path = recipe_file([{"method": "zerotuning", "heads": {"0.4": 2.0}}])
    status, _, err = run("check", path, "--model", config_folder)
    assert status == 2
    assert 'patches[0].heads["0.4"]' in err
    status, _, err = run("check", FOLLOW, "--model", config_folder / "nothing")
    assert status == 2
    assert err.startswith("error: cannot read the config of")


def test_errors_are_one_line_and_debug_shows_the_traceback(run):
    status, out, err = run("show", "no/such")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    with pytest.raises(headpatch.RecipeError):
        run("--debug", "show", "no/such")


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: Permission denied: /x/y\n"),
        (headpatch.EngineError("not this engine"), 2, "error: not this engine\n"),
        (ModuleNotFoundError("No module named 'transformers'"), 2, "pip install 'headpatch[hf]'"),
        (ZeroDivisionError("oh"), 2, "error: ZeroDivisionError: oh\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_is_said_without_a_traceback(run, monkeypatch, failure, status, said):
    def fail():
        raise failure

    monkeypatch.setattr("headpatch.commands.recipes.shipped", fail)
    code, out, err = run("recipes")
    assert (code, out) == (status, "")
    assert said in err
    assert "Traceback" not in err
    if not isinstance(failure, KeyboardInterrupt):
        with pytest.raises(type(failure)):
            run("--debug", "recipes")


def test_wrong_usage_is_status_2(run):
    assert run("show")[0] == 2
    assert run("no-such-command")[0] == 2
    assert run("show", FOLLOW, "--no-such-option")[0] == 2
