"""Where heads look: weights are those that the patched layer attends with, only the asked rows are computed, and they are drawn."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from compat import ids, left_padded, one_thread, silent
from naive import Naive
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from zoo import IMAGE, ZOO

import headpatch
from headpatch import cli, looks
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

QUERIES = (0, 5, -1)


def patch(method: str, heads: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"method": method, "heads": heads, **more}


TEXT = {
    "zerotuning": [patch("zerotuning", {"0.1": 0.2, "1.*": 5.0})],
    "act": [patch("act", {"0.*": 0.3, "1.2": 0.0}, threshold=0.1)],
    "pasta": [patch("pasta", {"0.*": 0.05, "1.1": 0.3})],
    "spotlight": [patch("pasta", {"1.*": 0.01}, target_mass=0.6)],
    "stacked": [
        patch("head_scaling", {"0.2": 0.0}), patch("zerotuning", {"*.*": 3.0}), patch("act", {"1.*": 0.2}, threshold=0.1),
    ],
}  # fmt: skip
VISION = {
    "pai": [patch("pai", {"*.*": 0.7})],
    "image_bias": [patch("image_bias", {"1.*": 1.5}, queries="text")],
    "var": [patch("var", {"*.*": 0.5}, sink_dimensions=[3, 7], sink_threshold=1.0, min_visual_mass=0.0, min_nonsink_ratio=0.0)],
    "mixed": [patch("pai", {"*.*": 0.7}), patch("zerotuning", {"*.*": 0.3})],
}  # fmt: skip


def watched(model: Any, recipe: Any, batch: dict[str, Any], spans: Any = None) -> Any:
    """One forward under a recipe, with its weights, values and attention outputs."""
    with headpatch.applied(model, {"headpatch": 1, "patches": recipe}) as handle:
        given = contextlib.nullcontext() if spans is None else handle.inputs(spans=spans)
        with (
            headpatch.observe(model, ("weights", "v", "output"), "*.*", queries=QUERIES) as seen,
            torch.no_grad(),
            given,
        ):
            model(**batch, use_cache=False)
    return seen


def check(model: Any, recipe: Any, batch: dict[str, Any], spans: Any = None) -> None:
    """Weights times values are the outputs, rows sum to one, and the recipe moved something."""
    seen = watched(model, recipe, batch, spans)
    moved = watched(model, [patch("zerotuning", {"*.*": 1.0})], batch)
    real = batch.get("attention_mask")
    most = 0.0
    for (name, head), (weights,) in seen.items():
        if name != "weights":
            continue
        rows = torch.ones(len(weights), len(QUERIES), dtype=torch.bool)
        if real is not None:
            rows = real[:, list(QUERIES)].bool()
        expected = seen["output", head][0][:, list(QUERIES)]
        torch.testing.assert_close((weights @ seen["v", head][0])[rows], expected[rows], atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(weights.sum(-1)[rows], torch.ones_like(weights.sum(-1))[rows], atol=1e-9, rtol=0)
        most = max(most, float((weights - moved["weights", head][0])[rows].abs().max()))
    assert most > 0.01


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("recipe", TEXT.values(), ids=TEXT.keys())
@pytest.mark.parametrize("entry", ["llama", "mistral", "gemma2"])
def test_weights_are_what_the_layer_attends_with(entry: str, recipe: Any, padded: bool) -> None:
    if padded and entry != "llama":
        pytest.skip("one architecture says what padding does")
    batch = left_padded((12, 9, 7)) if padded else {"input_ids": ids(3, 12)}
    spans = [[(1, 3)], [(2, 4), (5, 6)], []] if any(p["method"] == "pasta" for p in recipe) else None
    check(ZOO[entry].build(torch.float64), recipe, batch, spans)


@pytest.mark.parametrize("recipe", VISION.values(), ids=VISION.keys())
def test_weights_with_pictures(recipe: Any) -> None:
    check(ZOO["llava"].build(torch.float64), recipe, pictured())


def pictured() -> dict[str, Any]:
    """Two rows of the zoo's LLaVA: text, the image's tokens, text."""
    made = ids(2, 26)
    made[:, 3:19] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"input_ids": made, "pixel_values": pixels}


@pytest.mark.parametrize("entry", ["llama", "gpt_oss", "gpt2"])
def test_untouched_weights_are_the_plain_softmax(entry: str) -> None:
    naive, model = Naive(ZOO[entry]), ZOO[entry].build(torch.float64, attn=ZOO[entry].attn[0])
    batch = {"input_ids": ids(2, 11)}
    naive.model(**batch, use_cache=False)
    with headpatch.observe(model, "weights", "1.*", queries=QUERIES) as seen, torch.no_grad():
        model(**batch, use_cache=False)
    (call,) = naive.calls(1)
    for head in range(call.p.shape[1]):
        torch.testing.assert_close(
            seen["weights", f"1.{head}"][0], call.p[:, head, list(QUERIES)], atol=1e-9, rtol=1e-7
        )


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return out


def test_no_table_of_queries_and_keys_is_made() -> None:
    n, config = 700, ZOO["llama"].build().config
    config.max_position_embeddings = 1024
    model = LlamaForCausalLM(config).eval()
    recipe = {"headpatch": 1, "patches": TEXT["zerotuning"]}
    looking = headpatch.observe(model, "weights", "*.*", queries=(3, -1))
    with Largest() as seen, headpatch.applied(model, recipe), looking, torch.no_grad():
        model(input_ids=ids(1, n), use_cache=False)
    assert seen.most < n * n


def test_a_look_before_and_after() -> None:
    model = planted.model()
    prompt = "review word3 good film word7 sentiment"
    recipe = {
        "headpatch": 1,
        "patches": [patch("zerotuning", {"0.3": 0.01, "1.0": 2.0, "1.1": 1.01, "1.2": 1.02, "1.3": 1.03})],
    }
    found = looks.look(model, planted.tokenizer(), prompt, recipe, queries=(-1, 2))
    assert found.pieces[0] == "<s>"
    assert found.pieces[3] == "good"
    assert found.queries == (6, 2)
    assert len(found.heads) == looks.SHOWN
    assert {"0.3", "1.0"} <= set(found.heads)
    assert "1.1" not in found.heads or "1.3" in found.heads, "those that move most"
    assert found.before.shape == found.after.shape == (4, 2, 7)
    assert float(found.before[:, 1, 3:].sum()) == 0.0, "query 2 sees nothing behind it"
    moved = dict(zip(found.heads, found.moved(), strict=True))
    assert moved["0.3"] > moved["1.0"] > 0.01
    first = looks.look(model, planted.tokenizer(), prompt, recipe, heads="0.3").before[0, 0, 0]
    after = looks.look(model, planted.tokenizer(), prompt, recipe, heads=["0.3"]).after[0, 0, 0]
    assert float(after) == pytest.approx(float(0.01 * first / (1 - 0.99 * first)), rel=1e-4), (
        "the first layer's formula"
    )
    assert looks.look(model, planted.tokenizer(), prompt, heads="1.*").after is None
    assert not headpatch.handles(model)


def test_spans_are_marked_in_the_prompt() -> None:
    recipe = {"headpatch": 1, "patches": [patch("pasta", {"0.1": 0.0})]}
    found = looks.look(
        planted.model(), planted.tokenizer(), "review word3 good film sentiment", recipe, spans=["good film"]
    )
    assert float(found.after[0, 0, 3:5].sum()) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(HeadpatchError, match="marked pieces"):
        looks.look(planted.model(), planted.tokenizer(), "review", recipe)
    with pytest.raises(HeadpatchError, match="does not occur"):
        looks.look(planted.model(), planted.tokenizer(), "review", recipe, spans=["nowhere"])


def test_refusals() -> None:
    model, reader = planted.model(), planted.tokenizer()
    with pytest.raises(HeadpatchError, match="which heads"):
        looks.look(model, reader, "review")
    with pytest.raises(HeadpatchError, match="no part 'vision'; it has text"):
        looks.look(model, reader, "review", heads="0.0", part="vision")
    with pytest.raises(HeadpatchError, match="query 9 is outside the prompt; it has 2 tokens"):
        looks.look(model, reader, "review", heads="0.0", queries=[9])
    with pytest.raises(HeadpatchError, match="the prompt is empty"):
        looks.look(model, reader, "", heads="0.0")
    with pytest.raises(EngineError, match="reads no pictures"):
        looks.look(model, reader, "review", heads="0.0", image=object())
    with pytest.raises(HeadpatchError, match="chat template"):
        looks.look(model, reader, "review", heads="0.0", chat=True)
    wrong = headpatch.observe(model, "weights", "0.0", queries="all")
    with pytest.raises(HeadpatchError, match="queries must be whole numbers"), wrong:
        pass
    looking = headpatch.observe(model, "weights", "0.0", queries=[7])
    with looking, pytest.raises(EngineError, match="query 7 of a call with 3"):
        model(input_ids=ids(1, 3))
    biased = headpatch.observe(ZOO["t5"].build(), "weights", "0.0", part="encoder")
    with pytest.raises(UnsupportedModelError, match="position_bias"), biased:
        pass


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    planted.model().save_pretrained(tmp_path / "tiny")
    planted.tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "r.yaml").write_text(
        'headpatch: 1\npatches:\n- {method: zerotuning, heads: {"0.3": 0.01, "1.0": 4.0}}\n'
    )
    return tmp_path


def test_from_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [
        "show",
        str(tiny / "r.yaml"),
        "--attention",
        "--model",
        str(tiny / "tiny"),
        "--prompt",
        "review word3 good film sentiment",
    ]
    assert cli.main([*call, "--ascii"]) == 0
    out = capsys.readouterr().out
    assert 'head 0.3, query 5 "sentiment"' in out
    assert "before" in out
    assert "% moved" in out
    assert cli.main([*call, "--json", "--query", "2", "--query", "last", "--heads", "0.*"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["heads"] == ["0.0", "0.1", "0.2", "0.3"]
    assert said["queries"] == [2, 5]
    assert len(said["before"][0][0]) == len(said["tokens"]) == 6
    assert sum(said["after"][3][1]) == pytest.approx(1.0, abs=1e-5)
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        assert cli.main([*call, "-o", str(tiny / name)]) == 0
    assert (tiny / "a.png").read_bytes() == (tiny / "b.png").read_bytes()
    for wrong, words in (
        (["--query", "first"], "--query takes last or a number"), (["--image", str(tiny / "r.yaml")], "is no picture"),
        (["--image", "nowhere.png"], "No such file"),
    ):  # fmt: skip
        assert cli.main([*call, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(call[:3]) == 2
    assert "give --model and --prompt" in capsys.readouterr().err


def test_long_prompts_go_on_below() -> None:
    pytest.importorskip("matplotlib")
    from headpatch import plots

    prompt = " ".join(["review", *(f"word{i}" for i in range(59)), "sentiment"])
    found = looks.look(planted.model(), planted.tokenizer(), prompt, heads=["0.0", "1.1"], queries=(-1, 30))
    figure = plots.draw_look(found)
    labels = [[t.get_text() for t in axis.get_xticklabels()] for axis in figure.axes]
    assert [len(line) for line in labels] == [21, 21, 20, 16, 15] * 2
    assert labels[0][0] == "<s>"
    assert labels[2][-1] == "sentiment"
    broken = looks.Look(found.pieces, found.queries, found.heads, found.before, problem="it was cut into tiles")
    with pytest.raises(EngineError, match="cut into tiles"):
        plots.draw_look(broken)
