"""`headpatch eval-needle`, `headpatch find` and their pictures, on a model that copies with one head that is known."""

from __future__ import annotations

import json

import copying
import pytest
from compat import one_thread, silent

from headpatch import HeadpatchError, cli, load_recipe
from headpatch.needle_grid import evaluate_needles

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

OFF = {"headpatch": 1, "name": "off", "patches": [{"method": "head_scaling", "heads": ["1.2"], "scale": 0.0}]}
OTHER = {"headpatch": 1, "name": "other", "patches": [{"method": "head_scaling", "heads": ["0.2"], "scale": 0.0}]}
NEEDLE = (
    "--sentence",
    copying.NEEDLE.sentence,
    "--question",
    copying.NEEDLE.question,
    "--answer",
    copying.NEEDLE.answer,
)


@pytest.fixture(scope="module")
def grid():
    return evaluate_needles(
        copying.model(), copying.tokenizer(), {"off": OFF, "other": OTHER}, lengths=(150, 100), depths=(0.0, 1.0), prompts=2,
        needle=copying.NEEDLE, haystack=copying.HAYSTACK, max_new_tokens=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copying.save(tmp_path_factory.mktemp("copying"))


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        status = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_needles_are_found_until_the_head_is_off(grid):
    assert grid.names == ("untouched", "off", "other")
    assert grid.lengths == (100, 150)
    assert grid.matrix("untouched") == grid.matrix("other") == [[1.0, 1.0], [1.0, 1.0]]
    assert grid.matrix("off") == [[0.0, 0.0], [0.0, 0.0]]
    assert grid.share("untouched").rows == 8
    assert grid.share("off", length=100).rows == 4
    assert grid.recalled("untouched") == 1.0
    change, p = grid.difference("off")
    assert change.value == -1.0
    assert p == pytest.approx(2 / 2**8)
    assert grid.difference("other")[1] == 1.0
    assert all(a.tokens <= a.length for a in grid.asked)


def duo(heads):
    patch = {"method": "duo_attention", "full_kv_heads": heads, "sink": 2, "recent": 8}
    return {"headpatch": 1, "patches": [patch]}


def test_the_needle_is_lost_where_the_head_that_copies_streams():
    """Unless it is among the last tokens, which every head keeps."""
    recipes = {
        "right": duo(["1.2"]), "wrong": duo(["0.*", "1.0-1", "1.3", "2.*"]),
        "none": {"headpatch": 1, "patches": [{"method": "streaming_llm", "sink": 2, "recent": 8}]},
    }  # fmt: skip
    grid = evaluate_needles(
        copying.model(), copying.tokenizer(), recipes, lengths=(100,), depths=(0.0, 0.5, 1.0), needle=copying.NEEDLE,
        haystack=copying.HAYSTACK, max_new_tokens=8,
    )  # fmt: skip
    assert grid.matrix("right") == grid.matrix("untouched") == [[1.0], [1.0], [1.0]]
    assert grid.matrix("wrong") == grid.matrix("none") == [[0.0], [0.0], [1.0]]


def test_a_grid_as_text_and_as_json(grid):
    lines = grid.lines()
    assert "untouched: 100.0 % of 8 needles found" in lines[0]
    assert "off: -100.0 points" in lines[-2]
    plain = json.loads(json.dumps(grid.plain()))
    assert plain["results"]["off"]["grid"] == [[0.0, 0.0], [0.0, 0.0]]
    assert plain["results"]["off"]["difference"]["value"] == -1.0
    assert plain["results"]["untouched"]["by_length"]["150"]["value"] == 1.0
    assert plain["data"]["needles"] == copying.NEEDLE.sentence
    assert len(plain["prompts"]) == 8


def test_a_grid_as_a_picture(grid, tmp_path):
    pytest.importorskip("matplotlib")
    from headpatch import plots

    figure = plots.draw_needles(grid)
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["untouched: 100 %", "off: 0 %", "other: 100 %"]
    for axis, name in zip(panels, grid.names, strict=True):
        assert (axis.images[0].get_array() / 100).tolist() == grid.matrix(name)
        assert [t.get_text() for t in axis.texts] == [f"{100 * v:.0f}" for row in grid.matrix(name) for v in row]
    plots.save_figure(figure, tmp_path / "a.png")
    plots.save_figure(plots.draw_needles(grid), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_asked_is_refused():
    for given in ({"lengths": ()}, {"lengths": (99,), "depths": ()}, {"lengths": (99,), "prompts": 0}):
        with pytest.raises(HeadpatchError, match="at least one"):
            evaluate_needles(copying.model(), copying.tokenizer(), **given)
    with pytest.raises(HeadpatchError, match="another name"):
        evaluate_needles(copying.model(), copying.tokenizer(), {"untouched": OFF}, lengths=(99,))


def test_eval_needle(run, folder, tmp_path):
    load_recipe(OFF).save(tmp_path / "off.yaml")
    base = (
        "eval-needle",
        "-m",
        folder,
        "--text",
        folder / "text.txt",
        *NEEDLE,
        "--lengths",
        "100",
        "--depths",
        "0,100",
    )
    base = (*base, "--prompts", "1", "--max-new-tokens", "8", "--device", "cpu", "--recipe", tmp_path / "off.yaml")
    status, out, _ = run(*base, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["results"]["untouched"]["found"]["value"] == 1.0
    assert found["results"]["off"]["found"]["value"] == 0.0
    pytest.importorskip("matplotlib")
    status, out, _ = run(*base, "--png", tmp_path / "grid.png")
    assert status == 0
    assert "untouched: 100.0 % of 2 needles found" in out
    assert (tmp_path / "grid.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--depths", "0,120"), "--depths takes percentages"), (("--lengths", "x"), "--lengths takes whole numbers"),
        (("--sentence", "only this"), "all of --sentence, --question and --answer"), (("--needle", "hay"), "no needle 'hay'"),
        (("--lengths", "20"), "leave no room"), (("--lengths", "5000"), "the model takes 1024"), (("--chat",), "no chat template"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(run, folder, given, words):
    status, _, err = run("eval-needle", "-m", folder, "--prompts", "1", "--device", "cpu", "--lengths", "100", *given)
    assert status == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_find_retrieval_heads(run, folder, tmp_path):
    target, scores = tmp_path / "duo.yaml", tmp_path / "scores.json"
    status, out, _ = run(
        "find", "retrieval-heads", "-m", folder, "-o", target, "--scores", scores, "--text", folder / "text.txt", *NEEDLE,
        "--lengths", "100", "--depths", "0,50", "--rounds", "1", "--max-new-tokens", "8", "--sparsity", "0.9", "--sink", "2",
        "--recent", "8", "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    assert "2 of 2 needles found" in out
    recipe = load_recipe(target)
    patch = recipe.to_dict()["patches"][0]
    assert (patch["sink"], patch["recent"]) == (2, 8)
    assert "1.2" in patch["full_kv_heads"]
    assert len(patch["full_kv_heads"]) == 2, "ceil of a tenth of twelve heads"
    said = recipe.provenance
    assert said["data"]["text"] == "text.txt"
    assert "--sparsity 0.9" in said["command"]
    assert str(tmp_path) not in said["command"]
    assert said["scores"]["1"][2] == 1.0
    assert said["successful"] == 2
    status, out, _ = run(
        "eval-needle", "-m", folder, "-r", target, "--text", folder / "text.txt", *NEEDLE, "--lengths", "100", "--depths", "0",
        "--prompts", "2", "--max-new-tokens", "8", "--device", "cpu", "--seed", "5", "--json",
    )  # fmt: skip
    assert json.loads(out)["results"]["duo"]["found"]["value"] == 1.0, "and the recipe keeps what it was made for"
    picked = tmp_path / "picked.yaml"
    status, out, _ = run("find", "pick", scores, "-o", picked, "--threshold", "0.9", "--sink", "1")
    assert status == 0
    assert load_recipe(picked).to_dict()["patches"] == [
        {"method": "duo_attention", "full_kv_heads": ["1.2"], "sink": 1, "recent": 256}
    ]
    status, _, err = run("find", "pick", folder / "text.txt", "-o", picked)
    assert status == 2
    assert "text.txt: cannot be read" in err


@pytest.mark.parametrize("score", ["gates", "quick"])
def test_find_streaming_heads(run, folder, tmp_path, score):
    target = tmp_path / "duo.yaml"
    arguments = (
        "find", "streaming-heads", "-m", folder, "-o", target, "--score", score, "--text", folder / "text.txt", "--lengths",
        "200,260",
        "--passkeys", "2", "--words", "4", "--steps", "3", "--samples", "1", "--sink", "2", "--recent", "8", "--device", "cpu",
        "--sparsity", "0.5",
    )  # fmt: skip
    status, _, err = run(*arguments)
    assert status == 0, err
    recipe = load_recipe(target)
    assert recipe.provenance["streaming"] == "6 of 12 KV heads"
    assert recipe.provenance["seed"] == 42
    assert recipe.provenance["sink"] == 2
    assert (tmp_path / "duo.yaml.work").exists() == (score == "gates")
    if score == "gates":
        before = target.read_bytes()
        status, _, err = run(*arguments)
        assert status == 0
        assert "3 steps found" in err
        assert target.read_bytes() == before
        status, _, err = run(*arguments, "--rate", "0.5")
        assert status == 2
        assert "--restart" in err
        assert run(*arguments, "--rate", "0.5", "--restart")[0] == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--score", "slow"), "no score 'slow'"), (("--lengths", "200"), "shortest and the longest"),
        (("--lengths", "100,200"), "are all within"), (("--full", "both"), "choose teacher or student"),
    ],
)  # fmt: skip
def test_wrong_training_is_refused_before_a_model_is_loaded(run, given, words):
    status, _, err = run("find", "streaming-heads", "-m", "no/such-model", *given)
    assert status == 2
    assert words in err


def test_find_sinks(run, folder):
    base = ("-m", folder, "--text", folder / "text.txt", "--prompts", "3", "--tokens", "20", "--device", "cpu")
    status, out, _ = run("find", "sinks", *base, "--eps", "0.01", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["first_token"] == "the special token 1"
    assert found["metric"] == 1.0
    assert len(found["sink_heads"]) == 12
    status, out, _ = run("find", "sinks", *base, "--eps", "0.01")
    assert "12 of 12 heads are sink heads" in out
    status, _, err = run("find", "sinks", *base, "--eps", "0.9")
    assert status == 2
    assert "shows no sinks at position 0" in err
    status, _, err = run("find", "sinks", *base, "--position", "20")
    assert status == 2
    assert "outside the prompts" in err
    status, _, err = run("find", "sink-dimensions", *base)
    assert status == 2
    assert "shows no sink dimensions" in err
