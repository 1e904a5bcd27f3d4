"""The small vision-language model of examples/tiny_vlm, at toy size: what is said of scenes is true, training
goes on where it stopped, and the export is an ordinary LLaVA.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headpatch import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_vlm"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import model as tiny
import tiny_vlm_measure as measure
import tiny_vlm_sinks as sinks
import train as training
import world as scenes_of
from world import COLOURS, SHAPES, SPLITS, WORDS, World


def words(ids: Any) -> list[str]:
    return [WORDS[i] for i in ids.tolist() if WORDS[i] != "<pad>"]


# --- the world ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "anchor", "companion"),
    [("train", (0.93, 0.98), (0.83, 0.9)), ("balanced", (1, 1), (0.46, 0.54)), ("counterfactual", (1, 1), (0, 0)),
     ("clear", (1, 1), (0, 0)), ("decorrelated", (0.1, 0.4), (0.1, 0.4))],
)  # fmt: skip
def test_splits_differ_in_the_companion_alone(split: str, anchor: Any, companion: Any) -> None:
    drawn = World(0).scenes(3000, split)
    for shape, (low, high) in ((drawn.anchor, anchor), (drawn.companion, companion)):
        assert low <= float(drawn.has(shape).double().mean()) <= high
    assert torch.equal(drawn.present.sum(1), drawn.real.sum(1)), "an object per shape that is there"
    assert float(drawn.noise.max()) <= (0.0 if split == "clear" else 0.19)
    faint = (drawn.shape == drawn.companion[:, None]) & drawn.real
    if split != "decorrelated" and faint.any():
        assert set(drawn.size[faint].tolist()) == {0}
        assert float(drawn.contrast[faint].max()) <= 0.8
    again = World(0).scenes(3000, split)
    assert all(
        torch.equal(a, b)
        for a, b in zip(vars(drawn).values(), vars(again).values(), strict=True)
        if torch.is_tensor(a)
    )


def test_no_other_splits() -> None:
    with pytest.raises(ValueError, match="no split 'easy'; there are train"):
        World(0).scenes(1, "easy")
    assert set(scenes_of.ANCHORS) | set(scenes_of.COMPANIONS) == set(SHAPES)


@pytest.mark.parametrize("split", SPLITS)
def test_everything_said_is_true(split: str) -> None:
    world = World(1)
    drawn = world.scenes(200, split)
    for row, (ids, learned) in enumerate(zip(*world.captions(drawn), strict=True)):
        said = words(ids[learned])
        assert words(ids)[:5] == ["describe", "the", "image", ".", "ASSISTANT:"]
        assert said[:3] == ["the", "image", "shows"]
        assert said[-1] == "</s>"
        objects = {
            (scenes_of.SIZES[drawn.size[row, o]], COLOURS[drawn.colour[row, o]], SHAPES[drawn.shape[row, o]])
            for o in range(6) if drawn.real[row, o]
        }  # fmt: skip
        named = [tuple(said[i + 1 : i + 4]) for i, w in enumerate(said) if w == "a"]
        assert set(named) == objects
        assert len(named) == len(objects)
    for row, (ids, learned) in enumerate(zip(*world.dialogues(drawn), strict=True)):
        for start in range(0, 45, 9):
            turn = words(ids[start : start + 9])
            shape = SHAPES.index(turn[3])
            if turn[0] == "what":
                at = (drawn.shape[row] == shape).nonzero()[0, 0]
                assert turn[6] == COLOURS[drawn.colour[row, at]]
                assert drawn.present[row, shape]
            else:
                assert turn[6] == ("yes" if drawn.present[row, shape] else "no")
            assert learned[start : start + 9].tolist() == [False] * 6 + [True, True, False]


def test_pictures_show_their_objects() -> None:
    """In each object's middle stands its colour (rings and moons have a hole), elsewhere nothing."""
    world = World(2, noise=0.0)
    drawn = world.scenes(300, "decorrelated")
    drawn.contrast[:] = 1.0
    pixels = world.render(drawn) * scenes_of.STD + scenes_of.MEAN
    empty = world.render(drawn, objects=False) * scenes_of.STD + scenes_of.MEAN
    assert pixels.shape == (300, 3, 64, 64)
    assert float((empty - 0.42).abs().max()) < 0.3
    checked = 0
    for row in range(300):
        for o in range(6):
            if drawn.real[row, o] and SHAPES[drawn.shape[row, o]] not in ("ring", "moon", "star", "bolt", "arrow"):
                at = pixels[row, :, int(drawn.y[row, o]), int(drawn.x[row, o])]
                assert float((at - world.rgb[drawn.colour[row, o]]).abs().max()) < 0.02
                checked += 1
    assert checked > 100
    distance = scenes_of.distance_textures()
    middle = distance[:, 32, 32]
    assert [s for s, d in zip(SHAPES, middle.tolist(), strict=True) if d > 0] == ["ring", "moon"]
    assert bool((distance[:, 0] > 0).all()), "the border is outside of every shape"


# --- training -------------------------------------------------------------------------------------------------------------


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = training.train(training.TINY, tmp_path, "whole", say=lambda line: None)
    assert whole is not None
    calls = 0
    while True:

        def until(limit: int = 5) -> bool:
            nonlocal calls
            calls += 1
            return calls % limit == 0

        parts = training.train(training.TINY, tmp_path, "parts", until=until, every=1, say=lambda line: None)
        if parts is not None:
            break
    assert calls > 10
    assert parts.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "parts.state").exists()
    log = json.loads((tmp_path / "whole.json").read_text())["log"]
    assert set(log) == set(training.STAGES)
    assert training.train(training.TINY, tmp_path, "whole") == whole, "what is done is not done again"


def test_a_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    trainer = training.Trainer(training.TINY)
    next(trainer.run())
    trainer.save(tmp_path / "x.state")
    with pytest.raises(ValueError, match="another plan"):
        training.Trainer(dataclasses.replace(training.TINY, seed=9)).restore(tmp_path / "x.state")


def test_stages_train_what_they_say(tmp_path: Path) -> None:
    trainer = training.Trainer(training.TINY)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    moved: dict[str, set[str]] = {}
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for stage, _ in trainer.run():
        after = trainer.model.state_dict()
        moved.setdefault(stage, set()).update(
            p for p in parts for k in after if k.startswith(p) and not torch.equal(after[k], before[k])
        )
        before = {k: v.clone() for k, v in after.items()}
    assert moved == {
        "eyes": {parts[0]},
        "language": set(parts[2:]),
        "projector": {parts[1]},
        "instructions": set(parts[1:]),
    }
    weights = training.train(training.TINY, tmp_path, "eyes", say=lambda line: None)
    other = training.Trainer(sinks.plan("wider", weights, toy=True))
    assert other.stage == 1
    assert other.model.config.text_config.hidden_size == 96
    seen = {k: v for k, v in other.model.state_dict().items() if "vision_tower" in k}
    known = tiny.load(weights, tiny.TOY).state_dict()
    assert all(torch.equal(v, known[k]) for k, v in seen.items())


# --- the model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_vlm")
    weights = training.train(training.TINY, folder, "seed1", say=lambda line: None)
    return tiny.export(tiny.load(weights, tiny.TOY), folder / "model")


def picture(seed: int = 4) -> tuple[Any, torch.Tensor]:
    from PIL import Image

    world = World(seed)
    pixels = world.render(world.scenes(1))
    shown = ((pixels[0] * scenes_of.STD + scenes_of.MEAN) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(shown.numpy()), (
        shown.permute(2, 0, 1)[None].float() / 255 - scenes_of.MEAN
    ) / scenes_of.STD


def test_the_export_is_an_ordinary_llava(exported: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, said = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), "every weight is found under its published name"
    processor = AutoProcessor.from_pretrained(exported)
    image, pixels = picture()
    text = tiny.prompt("is there a star ?")
    inputs = processor(text=text, images=image, return_tensors="pt")
    assert words(inputs["input_ids"][0]) == [
        "<s>",
        "USER:",
        *["<image>"] * 64,
        "is",
        "there",
        "a",
        "star",
        "?",
        "ASSISTANT:",
    ]
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=0)
    asked = torch.tensor([scenes_of.encode("is there a star ? ASSISTANT:")])
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        seen = model.model.multi_modal_projector(tiny.features(model, pixels))
        hidden = model.model.language_model(inputs_embeds=tiny.sequence(model, seen, asked)).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden[:, -1]), logits, atol=1e-5, rtol=0)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a star ?"}]}]
    chat = processor.apply_chat_template(message, add_generation_prompt=True)
    assert words(processor.tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"][0]) == [
        "<s>", "USER:", "<image>", "is", "there", "a", "star", "?", "ASSISTANT:",
    ]  # fmt: skip
    speaker = measure.Speaker(model)
    assert torch.equal(speaker.ids(asked), inputs["input_ids"])
    star = torch.tensor([SHAPES.index("star")])
    assert float(speaker.ask(star, pixels)) == pytest.approx(
        float(logits[0, measure.YES] - logits[0, measure.NO]), abs=1e-4
    )


def test_the_full_size_fits(tmp_path: Path) -> None:
    folder = tiny.export(tiny.build(), tmp_path)
    total = sum(f.stat().st_size for f in folder.iterdir())
    assert 10 * 2**20 < total < 14 * 2**20


def test_where_heads_look_in_a_picture(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`headpatch show --attention` with an image: overlay and map; shares on the picture are those of its tokens."""
    picture()[0].resize((100, 80)).save(tmp_path / "scene.png")
    (tmp_path / "r.yaml").write_text('headpatch: 1\npatches:\n- {method: image_bias, heads: ["1.*"], bias: 3.0}\n')
    call = [
        "show",
        str(tmp_path / "r.yaml"),
        "--attention",
        "--model",
        str(exported),
        "--image",
        str(tmp_path / "scene.png"),
    ]
    call += ["--prompt", "is there a star ?", "--heads", "1.0-1"]
    assert cli.main([*call, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"][0] == "<s>"
    places = [i for i, t in enumerate(said["tokens"]) if t == "<image>"]
    assert len(places) == 64
    before, after = (sum(said[k][0][0][i] for i in places) for k in ("before", "after"))
    assert after > before > 0.5
    pytest.importorskip("matplotlib")
    assert cli.main([*call, "-o", str(tmp_path / "o.png")]) == 0
    out = capsys.readouterr().out
    assert "the picture" in out
    assert "before" in out
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*call, "--span", "star"]) == 2
    assert "leave the picture out" in capsys.readouterr().err
