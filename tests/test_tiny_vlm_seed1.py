"""The checkpoint of the small vision-language model that ships with the tests (seed 1 of docs/tiny-vlm.md): it loads as an ordinary
LLaVA, it sees, and it names what usually goes together; the recipes made for it fit it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headpatch
from headpatch import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_vlm"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import model as tiny
import tiny_vlm_measure as measure
import train as training
from world import World

WEIGHTS = Path(__file__).parent / "data" / "tiny_vlm_seed1.safetensors"
SCENES = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``train.py --export`` writes."""
    target = tmp_path_factory.mktemp("tiny_vlm_seed1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train.py", "--export", str(WEIGHTS), str(target)])
        training.main()
    return target


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Iterator[measure.Speaker]:
    """The exported model, in float32; tiny models are fastest on one thread."""
    from transformers import AutoModelForImageTextToText

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure.Speaker(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())
    torch.set_num_threads(threads)


def percent(logits: torch.Tensor) -> float:
    """Share of yes."""
    return 100 * float((logits > 0).double().mean())


# --- loading --------------------------------------------------------------------------------------------------------------


def test_it_ships() -> None:
    assert WEIGHTS.stat().st_size < 14 * 2**20


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "LlavaForConditionalGeneration"])
def test_it_loads_as_an_ordinary_llava(folder: Path, name: str) -> None:
    """Nothing missing, nothing left over, and every weight is that of the file."""
    import transformers

    model, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    known = tiny.load(WEIGHTS).state_dict()
    assert all(torch.equal(v.float(), known[k].float()) for k, v in model.state_dict().items())


# --- what it says ---------------------------------------------------------------------------------------------------------


def test_it_sees_and_believes(speaker: measure.Speaker) -> None:
    """What is there it finds, what is unrelated it denies, and the absent companion it affirms often. Bounds are wide for as few
    scenes; benchmarks/results/tiny_vlm_h100.md has more of them, drawn by a GPU's generator.
    """
    world = World(41)
    unusual = world.scenes(SCENES, "counterfactual")
    pixels = world.render(unusual)
    others = unusual.present.clone()
    others[torch.arange(SCENES), unusual.companion] = True
    unrelated = torch.where(others, -1.0, world.uniform(*others.shape)).argmax(1)
    anchor, companion, nothing = (
        percent(speaker.ask(s, pixels)) for s in (unusual.anchor, unusual.companion, unrelated)
    )
    assert anchor > 93, "97.9 on 1000 scenes"
    assert 30 < companion < 60, "45.5 on 2000 scenes"
    assert nothing < 7, "1.6 on 1000 scenes"
    assert companion > nothing + 20, "what it says wrongly is what usually goes along"
    assert percent(speaker.ask(unusual.companion[:40], None)) > 90, "without a picture its prior speaks alone: 100"


def test_it_describes_what_it_sees(speaker: measure.Speaker) -> None:
    world = World(42)
    scenes = world.scenes(80, "train")
    said = measure.captions(speaker.describe(world.render(scenes)), scenes)
    assert said["f1"] > 87, "92.3 on 500 scenes"
    assert said["ended"] > 95


# --- recipes --------------------------------------------------------------------------------------------------------------

RECIPES = sorted(name for name in headpatch.list_recipes() if name.startswith("tiny-vlm-seed1/"))


def test_there_are_recipes() -> None:
    assert [name.split("/")[1] for name in RECIPES] == ["var", "vhr", "vhr-listed"]
    for name in RECIPES:
        facts = headpatch.load_recipe(name).provenance
        assert "does not help" in facts["caution"] or "no effect" in facts["caution"], "what was measured is said"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", name, "--model", str(folder)]) == 0
    assert f"{name} fits" in capsys.readouterr().out


def test_what_recipes_do(speaker: measure.Speaker) -> None:
    """VHR changes answers, and where it is listed as head_scaling would; VAR has no sinks to take from, and changes nothing."""
    world = World(43)
    scenes = world.scenes(24, "counterfactual")
    pixels = world.render(scenes)
    plain = speaker.ask(scenes.companion, pixels)

    def under(recipe: Any) -> torch.Tensor:
        data = headpatch.load_recipe(recipe).to_dict() if isinstance(recipe, str) else recipe
        return speaker.ask(scenes.companion, pixels, data)

    listed = headpatch.load_recipe("tiny-vlm-seed1/vhr-listed").to_dict()
    doubled = {"method": "head_scaling", "heads": listed["patches"][0]["heads"], "scale": 2.0}
    said = under(listed)
    assert float((said - plain).abs().max()) > 0.5
    torch.testing.assert_close(said, under({"headpatch": 1, "patches": [doubled]}), atol=1e-4, rtol=1e-4)
    assert float((under("tiny-vlm-seed1/vhr") - plain).abs().max()) > 0.5
    torch.testing.assert_close(under("tiny-vlm-seed1/var"), plain, atol=1e-4, rtol=1e-4)


def test_why_var_does_nothing(speaker: measure.Speaker) -> None:
    """No sink dimensions; and in those that the recipe names no token of any scene here reaches its threshold."""
    from headpatch.find.sink_dimensions import sink_dimensions

    world = World(44)
    scenes = world.scenes(24, "train")
    pixels, asked = world.render(scenes), speaker.ids(speaker.question(scenes.companion))
    prompts = [{"input_ids": i[None], "pixel_values": p[None]} for i, p in zip(asked, pixels, strict=True)]
    with pytest.raises(headpatch.HeadpatchError, match="shows no sink dimensions"):
        sink_dimensions(speaker.model, prompts, layers="2-4")
    (patch,) = headpatch.load_recipe("tiny-vlm-seed1/var").to_dict()["patches"]
    with torch.no_grad(), headpatch.observe(speaker.model, "layer_input", patch["heads"]) as seen:
        speaker.model(input_ids=asked, pixel_values=pixels)
    for value in seen.values():
        stream = value[0].float()
        extreme = stream[..., patch["sink_dimensions"]].abs().amax(-1) / stream.square().mean(-1).sqrt()
        assert float(extreme.max()) < patch["sink_threshold"]
