"""Image edits in families of vision-language models that place their images differently: Qwen2.5-VL and SmolVLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from compat import ids, logits, one_thread, silent
from method_cases import on_rows, recipe_of
from naive import Naive
from test_method_image import AMOUNTS, BIASES, bias, pai
from torch import Tensor
from transformers import DynamicCache
from zoo import BOS, IMAGE, Entry, Part
from zoo_base import HEADS, HIDDEN, KV_HEADS, PAD, VOCAB

import headpatch

__all__ = ["one_thread", "silent"]
pytestmark = pytest.mark.filterwarnings("error")

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
}  # fmt: skip


def qwen() -> Any:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=94,
        vision_start_token_id=93, vision_end_token_id=92,
    )  # fmt: skip


def smol() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    return transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=vision,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


VISION = {"qwen2_5_vl": "model.visual.blocks.{}.attn", "smolvlm": "model.vision_model.encoder.layers.{}.self_attn"}
TEXTS = {"qwen2_5_vl": "model.language_model.layers.{}.self_attn", "smolvlm": "model.text_model.layers.{}.self_attn"}
CLASSES = {
    "qwen2_5_vl": (qwen, "Qwen2_5_VLForConditionalGeneration"),
    "smolvlm": (smol, "SmolVLMForConditionalGeneration"),
}
FAMILIES = {
    name: Entry(name, *CLASSES[name], {"text": Part.of(TEXTS[name], 2), "vision": Part.of(VISION[name], 1, 2, 2)})
    for name in CLASSES
}


def batch(family: str, padded: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Two rows: one image in the first, two in the second, with text around them; and which tokens are real."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 90, (2, 24), generator=g)
    tokens[:, 0] = BOS
    for row, starts in ((0, (10,)), (1, (4, 14))):
        for start in starts:
            tokens[row, start : start + 4] = IMAGE
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :6], mask[0, :6], tokens[0, 6] = PAD, 0, BOS
    given: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": mask}
    if family == "smolvlm":  # 4 x 4 patches, 2 x 2 of which are one token
        given["pixel_values"] = torch.randn(2, 2, 3, 16, 16, generator=g, dtype=torch.float64)
        given["pixel_attention_mask"] = torch.ones(2, 2, 16, 16, dtype=torch.bool)
        given["pixel_values"][0, 1] = 0.0  # one image only: the model drops what is all zero
        given["pixel_attention_mask"][0, 1] = False
    else:
        given["pixel_values"] = torch.randn(3 * 16, 3 * 2 * 4 * 4, generator=g, dtype=torch.float64)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 3)
        given["mm_token_type_ids"] = (tokens == IMAGE).long()
    return given, mask.bool()


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("method", ["image_bias", "pai"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_decoding(family, method, padded):
    """The prompt with its images, then single tokens, on the model's own kind of positions."""
    entry, (given, real) = FAMILIES[family], batch(family, padded)

    inputs = SimpleNamespace(kwargs=given, prompt=24, first={"text": real.long().argmax(-1)}, real=real)
    strengths, row = (BIASES, bias(inputs, BIASES)) if method == "image_bias" else (AMOUNTS, pai(inputs, AMOUNTS))
    model, naive, plain = entry.build(torch.float64), Naive(entry), entry.build(torch.float64)
    headpatch.apply(model, recipe_of(method, strengths))
    caches, mask, call = [DynamicCache() for _ in range(3)], given["attention_mask"], dict(given)
    with naive.edited(dict.fromkeys(naive.taps, on_rows(row))) as other:
        for i in range(4):
            seen = real if i == 0 else torch.ones(2, 1, dtype=torch.bool)
            found, expected, was = (
                logits(m, call, past_key_values=cache)[seen]
                for m, cache in zip((model, other, plain), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
            assert (expected - was).abs().max() > 1e-3
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            call = {"input_ids": ids(2, 1, i), "attention_mask": mask}
            if family == "qwen2_5_vl":  # time, height and width are one and the same for text
                call["position_ids"] = torch.full((3, 2, 1), 24 + i)
