"""`headpatch show --png` and headpatch.plots: markers stand where the recipe's heads are."""

from __future__ import annotations

import builtins

import pytest

import headpatch
from headpatch import cli, plots
from headpatch.grid import grids, shape_of
from headpatch.heads import ModelShape, PartShape

FOLLOW = "smollm2-135m-instruct/follow-context"


@pytest.fixture(autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib")


def marked(figure, panel=0):
    """{(layer, head): (marker vertices, colour)} of the markers with an edge: not the small squares of untouched heads."""
    found = {}
    for collection in figure.axes[panel].collections:
        colours = collection.get_facecolor()
        if len(collection.get_offsets()) and collection.get_linewidths()[0] > 0:
            for i, (x, y) in enumerate(collection.get_offsets()):
                shape = collection.get_paths()[0].vertices.tobytes()
                found.setdefault((int(x), int(y)), []).append((shape, tuple(colours[i % len(colours)])))
    return found


def test_markers_stand_where_the_heads_are():
    figure = plots.draw(headpatch.load_recipe(FOLLOW))
    found = marked(figure)
    assert found.keys() == {(12, 5), (13, 0), (14, 7), (16, 1), (14, 5), (17, 2), (23, 4)}
    shape = {place: marks[0][0] for place, marks in found.items()}
    assert len({shape[place] for place in [(12, 5), (13, 0), (14, 7), (16, 1)]}) == 1
    assert shape[12, 5] != shape[14, 5], "methods differ without colour"
    colour = {place: marks[0][1] for place, marks in found.items()}
    assert colour[12, 5] == colour[16, 1] != colour[14, 7]
    assert colour[14, 7][0] > colour[14, 7][2], "stronger is red"
    assert colour[12, 5][0] < colour[12, 5][2], "weaker is blue"
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "zerotuning: 4 heads, gamma 0.3 to 3" in legend
    assert "head_scaling: 3 heads, scale 0" in legend


def test_every_head_has_its_place():
    recipe = headpatch.load_recipe(FOLLOW)
    figure = plots.draw(recipe)
    background = figure.axes[0].collections[0].get_offsets()
    assert {(int(x), int(y)) for x, y in background} == {(layer, head) for layer in range(30) for head in range(9)}


def test_layers_without_softmax_heads_are_empty():
    shape = ModelShape("x", {"text": PartShape((4, 0, 4), (2, 0, 2), (8, 0, 8))}, "text")
    recipe = headpatch.load_recipe({"headpatch": 1, "patches": [{"method": "zerotuning", "heads": {"*.3": 0.0}}]})
    (grid,) = grids(recipe, shape)
    assert grid.marks.keys() == {(0, 3), (2, 3)}
    figure = plots.draw(recipe, shape)
    assert {int(x) for x, _ in figure.axes[0].collections[0].get_offsets()} == {0, 2}


def test_the_file_is_a_picture_and_always_the_same(tmp_path, capsys):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    for path in (first, second):
        assert cli.main(["show", FOLLOW, "--png", str(path)]) == 0
    assert str(second) in capsys.readouterr().out.replace("\n", "")
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == second.read_bytes()
    from matplotlib import pyplot

    assert not pyplot.get_fignums(), "a figure was left in matplotlib's global list"


def test_a_suffix_that_is_no_picture(tmp_path, capsys):
    assert cli.main(["show", FOLLOW, "--png", str(tmp_path / "a.txt")]) == 2
    assert "name it .png" in capsys.readouterr().err
    assert not (tmp_path / "a.txt").exists()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert cli.main(["show", FOLLOW, "--png", str(tmp_path / "no" / "a.png")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["show", FOLLOW, "--png", str(tmp_path / "a.png")]) == 2
    assert "pip install 'headpatch[plots]'" in capsys.readouterr().err


def test_the_recipe_s_own_shape_is_its_model_s():
    shape = shape_of(headpatch.load_recipe(FOLLOW))
    assert shape.parts["text"] == PartShape((9,) * 30, (3,) * 30, (64,) * 30)
