"""What `headpatch show`, its picture and `headpatch check` say about cache policies, against counting."""

from __future__ import annotations

import json
import random

import pytest
import torch
import yaml
from test_cli import grid_of
from test_plots import marked
from zoo import ZOO

from headpatch import Recipe, RecipeError, cli, plots
from headpatch.grid import grids
from headpatch.heads import ModelShape, PartShape
from headpatch.keeping import keepings
from headpatch.resolve import resolve

SHAPE = {"num_layers": 4, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16}
DUO = {"method": "duo_attention", "full_kv_heads": ["1.2", "3.*"], "sink": 2, "recent": 4}
FULL = {(1, 2), (3, 0), (3, 1), (3, 2)}
UNEVEN = ModelShape("x", {"text": PartShape((4, 0, 6, 8), (2, 0, 3, 8), (16, 0, 32, 8))}, "text")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def write(tmp_path):
    def call(*patches, **more):
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({"headpatch": 1, "patches": list(patches), **more}))
        return path

    return call


@pytest.fixture
def config(tmp_path):
    def call(entry):
        ZOO[entry].config().save_pretrained(tmp_path / entry)
        return tmp_path / entry

    return call


def of(*patches):
    return Recipe.from_dict({"headpatch": 1, "patches": list(patches)})


@pytest.mark.parametrize("seed", range(4))
def test_the_share_is_what_counting_gives(seed):
    """Every head of every layer asked which of the positions it keeps."""
    rng = random.Random(seed)
    sink, recent, tokens = rng.choice([0, 2, 9]), rng.choice([1, 5, 40]), rng.choice([3, 7, 50])
    patch = {"method": "duo_attention", "full_kv_heads": ["0.1", "2.0-1", "3.5"], "sink": sink, "recent": recent}
    (resolved,) = resolve(of(patch), UNEVEN)
    (keeping,) = keepings([resolved])
    held = plain = 0
    for layer, listed in resolved.heads.items():
        for head in range(UNEVEN.parts["text"].num_kv_heads[layer]):
            kept = resolved.method.keep(torch.arange(tokens), torch.tensor([tokens]), head in listed)
            held += int(kept.sum()) * UNEVEN.parts["text"].head_dim[layer]
            plain += tokens * UNEVEN.parts["text"].head_dim[layer]
    assert keeping.share(tokens) == pytest.approx(held / plain)
    assert (keeping.num_full, keeping.num_rest) == (4, 9)


def test_the_share_of_a_policy_that_chooses_is_its_budget():
    (keeping,) = keepings(resolve(of({"method": "ada_kv", "size": 512}), UNEVEN))
    assert keeping.share(2048) == 0.25
    assert keeping.share(100) == 1.0
    assert "512 of the prompt's tokens on average" in keeping.lines()[0]
    (keeping,) = keepings(resolve(of({"method": "snapkv", "ratio": 0.25}), UNEVEN))
    assert keeping.share(1000) == 0.25
    assert "tokens of prompt" in keeping.lines()[1]


def test_layers_with_a_window_are_not_counted():
    (keeping,) = keepings(resolve(of({**DUO, "full_kv_heads": ["0.*", "2.0"]}), UNEVEN), {"text": (0, 3)})
    assert (keeping.windowed, keeping.num_full, keeping.num_rest) == ((0, 3), 1, 2)
    assert keeping.share(60) == pytest.approx((60 + 2 * 6) / 180)


def test_show_draws_every_kv_head(run, write):
    status, out, _ = run("show", write(DUO, model=SHAPE), "--ascii")
    assert status == 0
    drawn = grid_of(out)
    assert drawn == {(n, h): "A" if (n, h) in FULL else "a" for n in range(4) for h in range(3)}
    assert "A keep all  a keep some" in out
    assert "4 of 12 KV heads keep every token (1.2, 3.*); 8 keep the first 2 and the last 4 tokens" in out
    assert "share of the cache that stays: 0.334 at 8,192, 0.333 at 32,768" in out
    assert "untouched" not in out


def test_show_without_a_list(run, write):
    status, out, _ = run("show", write({"method": "streaming_llm"}, model=SHAPE), "--ascii")
    assert status == 0
    assert set(grid_of(out).values()) == {"a"}
    assert "all 12 KV heads keep the first 4 and the last 2000 tokens" in out
    assert f"{2004 / 8192:.3g} at 8,192" in out


@pytest.mark.parametrize("patch", [{"method": "streaming_llm"}, {"method": "duo_attention", "full_kv_heads": ["0.1"]}])
def test_a_policy_without_a_shape_asks_for_the_model(run, write, config, patch):
    """It acts on heads that the recipe does not name, too."""
    path = write(patch)
    status, _, err = run("show", path)
    assert status == 2
    assert "acts on all KV heads of a part" in err
    assert "--model" in err
    status, out, _ = run("show", path, "--ascii", "--model", config("llama"))
    assert status == 0
    assert len(grid_of(out)) == 2 * 2


def test_show_json_has_the_numbers(run, write):
    (kept,) = json.loads(run("show", write(DUO, model=SHAPE), "--json")[1])["cache"]
    assert kept["full_kv_heads"] == {"1": [2], "3": [0, 1, 2]}
    assert (kept["num_full"], kept["num_rest"]) == (4, 8)
    assert kept["share"]["8192"] == pytest.approx((4 * 8192 + 8 * 6) / (12 * 8192))
    assert "cache" not in json.loads(run("show", "smollm2-135m-instruct/follow-context", "--json")[1])


def test_the_picture_tells_them_apart():
    pytest.importorskip("matplotlib")
    figure = plots.draw(Recipe.from_dict({"headpatch": 1, "patches": [DUO], "model": SHAPE}))
    found = marked(figure)
    assert found.keys() == {(n, h) for n in range(4) for h in range(3)}
    colours = {place: marks[0][1] for place, marks in found.items()}
    assert {place for place, colour in colours.items() if colour[0] < 0.5} == FULL
    assert {colours[place] for place in found.keys() - FULL} == {(1.0, 1.0, 1.0, 1.0)}
    assert len(figure.axes) == 1, "no strength, no colour bar"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0] == "duo_attention: 4 KV heads keep every token"
    assert legend[1] == "duo_attention: 8 KV heads keep the first 2 and the last 4 tokens"
    assert "0.33 at 8k" in legend[2]


def test_beside_a_strength_the_scale_is_there():
    pytest.importorskip("matplotlib")
    zero = {"method": "zerotuning", "heads": {"0.1": 2.0}}
    figure = plots.draw(Recipe.from_dict({"headpatch": 1, "patches": [DUO, zero], "model": SHAPE}))
    assert len(figure.axes) == 3
    assert marked(figure, 1).keys() == {(0, 1)}


def test_check_says_what_stays(run, write, config):
    path = write({**DUO, "full_kv_heads": ["1.0"]})
    status, out, _ = run("check", path, "--model", config("llama"))
    assert status == 0
    assert "1 of 4 KV" in out
    assert "1 of 4 KV heads keep every token (1.0); 3 keep the first 2 and the last 4 tokens" in out
    found = json.loads(run("check", path, "--model", config("llama"), "--json")[1])
    assert found["cache"][0]["share"]["32768"] == pytest.approx((32768 + 3 * 6) / (4 * 32768))


def test_check_names_layers_with_a_window(run, write, config):
    path = write({"method": "streaming_llm"})
    out = run("check", path, "--model", config("gemma2"))[1]
    assert "all 4 KV heads keep" in out
    assert "left as they are, for they have a window of their own: layers 0, 2" in out
    assert json.loads(run("check", path, "--model", config("gemma2"), "--json")[1])["cache"][0]["windowed_layers"] == [
        0,
        2,
    ]
    assert grid_of(run("show", path, "--model", config("gemma2"), "--ascii")[1])[0, 0] == "."
    assert "every layer has a window of its own" in run("check", path, "--model", config("mistral"))[1]


def test_a_policy_in_another_part_needs_its_shape():
    recipe = of({"method": "streaming_llm", "part": "decoder"})
    with pytest.raises(RecipeError, match="acts on all KV heads"):
        grids(recipe)
    shape = ModelShape("w", {n: PartShape((4,) * 2, (4,) * 2, (8,) * 2) for n in ("decoder", "encoder")}, "decoder")
    (grid,) = grids(recipe, shape)
    assert (grid.part, len(grid.marks)) == ("decoder", 8)
