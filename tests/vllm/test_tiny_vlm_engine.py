"""The small vision-language model in stock vLLM: an ordinary LLaVA there, too, with the same answers as in transformers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start, stop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="vLLM reads pictures with torchvision"),
]
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny_vlm"))

import model as tiny  # noqa: E402
from world import MEAN, STD, World  # noqa: E402

QUESTIONS = ("is there a star ?", "describe the image .", "what colour is moon ?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tiny.build(seed=3), tmp_path_factory.mktemp("tiny_vlm"), torch.float32)


def pictures() -> list[Any]:
    from PIL import Image

    world = World(3)
    pixels = world.render(world.scenes(len(QUESTIONS)))
    return [Image.fromarray(((p * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy()) for p in pixels]


def test_it_says_the_same(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vllm import SamplingParams

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    texts, shown = [tiny.prompt(q) for q in QUESTIONS], pictures()
    llm = start(folder, max_num_batched_tokens=256, max_model_len=256, limit_mm_per_prompt={"image": 1})
    try:
        asked = [{"prompt": t, "multi_modal_data": {"image": i}} for t, i in zip(texts, shown, strict=True)]
        found = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True))
    finally:
        stop(llm)
    for out, text, image in zip(found, texts, shown, strict=True):
        inputs = processor(text=text, images=image, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == list(out.prompt_token_ids)
        with torch.no_grad():
            made = model.generate(
                **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        logp = made.logits[0][0].log_softmax(-1)
        for token, said in out.outputs[0].logprobs[0].items():
            assert said.logprob == pytest.approx(float(logp[token]), abs=1e-4)
        assert made.sequences[0, inputs["input_ids"].shape[1] :].tolist() == list(out.outputs[0].token_ids)
