"""The shipped checkpoint of the small vision-language model in stock vLLM: an ordinary LLaVA there, too, with the same answers as in
transformers, untouched and under recipes, those that act on its image tokens included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start, stop

import headpatch

pytestmark = [
    pytest.mark.slow,
    # vLLM's module of LLaVA imports one of transformers' that does, whether there are pictures or not.
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="vLLM's LLaVA needs torchvision"),
]
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny_vlm"))

import model as tiny  # noqa: E402
from world import MEAN, STD, World  # noqa: E402

WEIGHTS = Path(__file__).parents[1] / "data" / "tiny_vlm_seed1.safetensors"
QUESTIONS = ("is there a star ?", "describe the image .", "what colour is moon ?")
RECIPES: dict[str, Any] = {
    "listed": "tiny-vlm-seed1/vhr-listed",
    "bias": {"headpatch": 1, "patches": [{"method": "image_bias", "heads": {"1-4.*": 2.0}}]},
    "pai": {"headpatch": 1, "patches": [{"method": "pai", "heads": {"2-5.*": 0.5}}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tiny.load(WEIGHTS), tmp_path_factory.mktemp("tiny_vlm"), torch.float32)


def pictures() -> list[Any]:
    from PIL import Image

    world = World(3)
    pixels = world.render(world.scenes(len(QUESTIONS)))
    return [Image.fromarray(((p * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy()) for p in pixels]


def test_it_says_the_same(folder: Path) -> None:
    """One engine, plain requests and patched ones; and its own answer to one picture is a caption of it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    texts, shown = [tiny.prompt(q) for q in QUESTIONS], pictures()
    llm = start(
        folder, max_num_batched_tokens=256, max_model_len=256, limit_mm_per_prompt={"image": 1},
        additional_config={"headpatch": {"recipes": RECIPES}},
    )  # fmt: skip
    found = {}
    try:
        asked = [{"prompt": t, "multi_modal_data": {"image": i}} for t, i in zip(texts, shown, strict=True)]
        for name in (None, *RECIPES):
            params = headpatch.sampling_params(name, temperature=0.0, max_tokens=8, logprobs=3)
            found[name] = llm.generate(asked, params)
    finally:
        stop(llm)
    first = {}
    for name, outs in found.items():
        with headpatch.applied(model, RECIPES[name]) if name else contextlib.nullcontext():
            for out, text, image in zip(outs, texts, shown, strict=True):
                inputs = processor(text=text, images=image, return_tensors="pt")
                assert inputs["input_ids"][0].tolist() == list(out.prompt_token_ids)
                with torch.no_grad():
                    made = model.generate(
                        **inputs, max_new_tokens=8, do_sample=False, output_logits=True,
                        return_dict_in_generate=True,
                    )  # fmt: skip
                logp = made.logits[0][0].log_softmax(-1)
                for token, said in out.outputs[0].logprobs[0].items():
                    assert said.logprob == pytest.approx(float(logp[token]), abs=1e-4)
                assert made.sequences[0, inputs["input_ids"].shape[1] :].tolist() == list(out.outputs[0].token_ids)
                first[name, text] = logp
    assert " ".join(found[None][1].outputs[0].text.split()[:3]) == "the image shows"
    for name in RECIPES:
        assert max(float((first[None, t] - first[name, t]).abs().max()) for t in texts) > 0.1, f"{name} acts"
