"""From scores to a recipe: ranks, ties, rounding; and what published patterns must look like."""

from __future__ import annotations

import json
import random

import pytest
from recipe_tools import LLAMA, MODEL_BLOCK, SMOL

from headpatch import HeadpatchError, load_recipe
from headpatch.find.patterns import load_pattern
from headpatch.find.ranking import HeadScores, default_sparsity, full_heads, keep_full
from headpatch.heads import PartShape
from headpatch.recipe import resolve


def scores(values, kind="kv", **more):
    return HeadScores("score", kind, values, {"seed": 3}, MODEL_BLOCK, **more)


def smol(seed=0):
    rng = random.Random(seed)
    return scores({layer: tuple(rng.random() for _ in range(3)) for layer in range(30)})


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.985])
def test_the_best_heads_are_kept(sparsity):
    found = smol()
    recipe = keep_full(found, SMOL, sink=4, recent=12, sparsity=sparsity, name="x")
    (patch,) = resolve(recipe, LLAMA)
    kept = {(layer, head) for layer, heads in patch.heads.items() for head in heads}
    streaming = [v for layer, head, v in found.ranked() if (layer, head) not in kept]
    assert len(streaming) == int(sparsity * 90 + 1e-9), "what does not come out even is kept"
    assert min(v for layer, head, v in found.ranked() if (layer, head) in kept) > max(streaming, default=-1)
    assert (patch.method.name, patch.method.sink, patch.method.recent) == ("duo_attention", 4, 12)
    assert "ties" not in recipe.provenance


def test_a_recipe_holds_heads_and_its_provenance_the_scores():
    found = smol()
    recipe = keep_full(found, SMOL, sink=4, recent=12, sparsity=0.5, name="x", provenance={"command": "c"})
    plain = recipe.to_dict()
    assert plain["patches"] == [
        {"method": "duo_attention", "full_kv_heads": plain["patches"][0]["full_kv_heads"], "sink": 4, "recent": 12}
    ]
    assert all(isinstance(s, str) for s in plain["patches"][0]["full_kv_heads"])
    assert plain["model"] == MODEL_BLOCK
    said = plain["provenance"]
    assert (said["seed"], said["sparsity"], said["command"], said["score"]) == (3, 0.5, "c", "score")
    assert said["streaming"] == "45 of 90 KV heads"
    assert said["scores"]["7"] == [float(f"{v:.6g}") for v in found.values[7]]


def test_ties_go_to_lower_layers_and_heads_whatever_the_order():
    tied = {0: (0.5, 1.0), 1: (1.0, 1.0), 2: (1.0, 0.2)}
    for order in ((0, 1, 2), (2, 0, 1)):
        found = scores({layer: tied[layer] for layer in order})
        assert found.ranked()[:4] == [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 1.0), (2, 0, 1.0)]
        assert full_heads(found, sparsity=0.5) == {0: (1,), 1: (0, 1)}
    part = PartShape((2,) * 3, (2,) * 3, (8,) * 3)
    recipe = keep_full(HeadScores("s", "kv", tied), part, sink=1, recent=2, sparsity=0.5, name="x")
    assert recipe.provenance["ties"].startswith("3 of 4 heads with the lowest kept score are kept")


@pytest.mark.parametrize("heads", [10, 30])
def test_shares_that_floats_cannot_say_come_out_right(heads):
    found = scores({layer: (layer / 100,) for layer in range(heads)})
    for tenths in range(10):
        kept = sum(map(len, full_heads(found, sparsity=tenths / 10).values()))
        assert kept == heads * (10 - tenths) // 10


def test_a_threshold():
    found = scores({0: (0.2, 0.5), 1: (0.7, 0.1)})
    assert full_heads(found, threshold=0.5) == {0: (1,), 1: (0,)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "a sparsity or a threshold"), ({"sparsity": 0.5, "threshold": 0.5}, "a sparsity or a threshold"),
        ({"sparsity": 1.0}, "streaming_llm"), ({"threshold": 2.0}, "streaming_llm"), ({"sparsity": 1.5}, "0 to 1"),
        ({"sparsity": float("nan")}, "0 to 1"),
    ],
)  # fmt: skip
def test_what_leaves_nothing_is_refused(given, words):
    with pytest.raises(HeadpatchError, match=words):
        full_heads(scores({0: (0.2, 0.5)}), **given)


def test_scores_must_be_scores():
    with pytest.raises(HeadpatchError, match=r"head 1\.1 has no score"):
        scores({0: (0.1,), 1: (0.2, float("nan"))})
    with pytest.raises(HeadpatchError, match="no scores"):
        scores({})
    with pytest.raises(HeadpatchError, match="query or of kv"):
        scores({0: (0.1,)}, kind="head")
    with pytest.raises(HeadpatchError, match="scores of query heads"):
        full_heads(scores({0: (0.1,)}, kind="query"), sparsity=0.0)
    with pytest.raises(HeadpatchError, match="the model has others"):
        keep_full(scores({0: (0.1, 0.2)}), SMOL, sink=1, recent=2, sparsity=0.5, name="x")


def test_a_kv_head_is_as_good_as_its_best_query_head():
    part = PartShape((4, 4), (2, 2), (8, 8))
    found = scores({0: (0.1, 0.9, 0.3, 0.2), 1: (0.0, 0.0, 0.5, 0.6)}, kind="query").of_kv_heads(part)
    assert found.values == {0: (0.9, 0.3), 1: (0.0, 0.6)}
    assert found.kind == "kv"
    assert found.of_kv_heads(part) is found


def test_layers_that_see_a_window_keep_what_they_have():
    part = PartShape((2,) * 3, (2,) * 3, (8,) * 3)
    found = HeadScores("s", "kv", {1: (0.1, 0.7)})
    recipe = keep_full(found, part, sink=1, recent=2, sparsity=0.5, name="x")
    assert recipe.to_dict()["patches"][0]["full_kv_heads"] == ["0.*", "1.1", "2.*"]


def test_default_sparsity():
    assert default_sparsity(SMOL) == 0.5
    assert default_sparsity(PartShape((8, 8), (8, 8), (4, 4))) == 0.75


def test_scores_are_read_as_they_were_written(tmp_path):
    found = smol()
    found.save(tmp_path / "s.json")
    assert HeadScores.load(tmp_path / "s.json") == found
    good = json.loads((tmp_path / "s.json").read_text())
    for wrong, words in (
        ("", "cannot be read"), ("[]", "no file of scores"), ("{}", "no file of scores"),
        (json.dumps({**good, "scores": {"a": [1]}}), "damaged"), (json.dumps({**good, "scores": {"0": ["x"]}}), "damaged"),
        (json.dumps({k: v for k, v in good.items() if k != "kind"}), "damaged"),
    ):  # fmt: skip
        (tmp_path / "s.json").write_text(wrong)
        with pytest.raises(HeadpatchError, match=words):
            HeadScores.load(tmp_path / "s.json")


# --- published patterns ---------------------------------------------------------------------------------------------------

GATES = ((0.6055, -1.2e-05, 0.96875), (1.0, 1.0, 0.0), (0.25, 1.0, 1.0004))
CONFIG = {
    "model_name": "models/Some-8B-Instruct", "sink_size": 128, "recent_size": 256, "lr": 0.02, "num_steps": 2000, "reg_weight": 0.05,
    "deploy_sink_size": None, "seed": 42,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A pattern of three layers with three KV heads, as that project writes them."""

    def write(rows=GATES, config=CONFIG, text=None):
        made = tmp_path / "Some-8B-Instruct" / "lr=0.02-reg=0.05-ctx=1000_128000-multi_passkey10"
        made.mkdir(parents=True, exist_ok=True)
        lines = "\n".join("\t".join(f"{v:.18e}" for v in row) for row in rows) + "\n"
        (made / "full_attention_heads.tsv").write_text(lines if text is None else text)
        (made / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return made

    return write


def test_a_published_pattern(folder):
    found = load_pattern(folder())
    assert found.scores.values == {0: (0.6055, 0.0, 0.96875), 1: (1.0, 1.0, 0.0), 2: (0.25, 1.0, 1.0)}
    assert (found.sink, found.recent, found.name) == (128, 256, "Some-8B-Instruct")
    assert (found.layers, found.kv_heads) == (3, 3)
    assert found.scores.model == {"name": "Some-8B-Instruct", "num_layers": 3, "num_kv_heads": 3}
    assert found.scores.about["training"]["num_steps"] == 2000
    assert "not verified" in found.scores.about["source"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": ""}, "holds no gates"), ({"text": "0.1\t0.2\n0.3\n"}, r"heads.tsv:2: has 1 heads, the rows above have 2"),
        ({"text": "0.1 0.2\n"}, "no row of numbers with tabs"), ({"text": "0.1\tnan\n"}, "is no gate"),
        ({"text": "0.1\t7\n"}, "7 is no gate"), ({"config": "{"}, "config.json: not JSON"), ({"config": "[]"}, "is no configuration"),
        ({"config": {**CONFIG, "sink_size": None}}, "sink_size is"), ({"config": {**CONFIG, "recent_size": 0}}, "recent_size is"),
        ({"config": {**CONFIG, "recent_size": True}}, "recent_size is"),
    ],
)  # fmt: skip
def test_damaged_patterns_are_refused(folder, given, words):
    with pytest.raises(HeadpatchError, match=words):
        load_pattern(folder(**given))


def test_what_is_no_pattern_is_refused(tmp_path):
    with pytest.raises(HeadpatchError, match="is no folder"):
        load_pattern(tmp_path / "none")
    with pytest.raises(HeadpatchError, match=r"full_attention_heads.tsv: cannot be read"):
        load_pattern(tmp_path)


def run(*arguments):
    from headpatch import cli

    return cli.main([str(a) for a in arguments])


def test_importing_a_pattern(folder, tmp_path, capsys):
    target = tmp_path / "duo.yaml"
    assert run("import", "duo-attention", folder(), "-o", target) == 2
    assert "--sparsity or --threshold" in capsys.readouterr().err
    assert not target.exists()
    assert run("import", "duo-attention", folder(), "-o", target, "--sparsity", "0.5") == 0
    assert "was not compared" in capsys.readouterr().out
    recipe = load_recipe(target)
    assert recipe.to_dict()["patches"] == [
        {"method": "duo_attention", "full_kv_heads": ["0.2", "1.0-1", "2.1-2"], "sink": 128, "recent": 256}
    ]
    assert recipe.provenance["command"].startswith("headpatch import duo-attention lr=0.02")
    assert "/" not in recipe.provenance["command"]
    assert (
        run("import", "duo-attention", folder(), "-o", target, "--threshold", "0.99", "--sink", "4", "--recent", "9")
        == 0
    )
    patch = load_recipe(target).to_dict()["patches"][0]
    assert patch == {"method": "duo_attention", "full_kv_heads": ["1.0-1", "2.1-2"], "sink": 4, "recent": 9}


def test_importing_a_pattern_for_a_model(folder, tmp_path, capsys):
    from transformers import LlamaConfig

    target = tmp_path / "duo.yaml"
    sizes = {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    LlamaConfig(**sizes, num_hidden_layers=3).save_pretrained(tmp_path / "right")
    LlamaConfig(**sizes, num_hidden_layers=4).save_pretrained(tmp_path / "wrong")
    assert run("import", "duo-attention", folder(), "-o", target, "--model", tmp_path / "right") == 0
    assert load_recipe(target).model["num_heads"] == 6
    assert load_recipe(target).provenance["sparsity"] == 0.5
    assert run("import", "duo-attention", folder(), "-o", target, "--model", tmp_path / "wrong") == 2
    assert "3 layers of 3 KV heads" in capsys.readouterr().err
