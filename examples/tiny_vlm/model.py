"""The model: an ordinary LLaVA of 5.7 million parameters, and the tokenizer and processor that make it loadable anywhere.

Nothing here is a class of its own: `LlavaForConditionalGeneration` with a CLIP vision tower of 64 patches and a Llama of six layers
with eight query heads on four KV heads. :func:`export` writes a folder that transformers and vLLM load like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from world import MEAN, PIXELS, STD, WORDS, encode

__all__ = [
    "FULL",
    "PREFIXES",
    "TOY",
    "Size",
    "build",
    "export",
    "features",
    "load",
    "prompt",
    "save",
    "sequence",
    "take",
]

PATCH = 8
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
PREFIXES = {
    "user": "<s> USER:",
    "none": "<s>",
    "long": "<s> you see a picture and say what is in it and what is not in it . USER:",
}
"""What stands before the image; all but the first are for the experiment on sinks."""
TEMPLATE = (
    "<s> {% for m in messages %}{% if m.role == 'user' %}USER: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {{ m.content if m.content is string else m.content[0].text }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


NAMES = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."), ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."), ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)  # fmt: skip
"""Prefixes of weights in the classes, and in published checkpoints."""


@dataclass(frozen=True)
class Size:
    """Widths and depths; `width` is the language model's."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 640
    eye_width: int = 192
    eye_layers: int = 4
    eye_heads: int = 6
    eye_mlp: int = 512


FULL = Size()
TOY = Size(width=64, layers=4, heads=4, kv_heads=2, mlp=96, eye_width=32, eye_layers=1, eye_heads=2, eye_mlp=48)
"""For tests on a CPU; heads are 16 wide."""


def build(size: Size = FULL, seed: int = 0) -> Any:
    """A fresh model in float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    eyes = CLIPVisionConfig(
        image_size=PIXELS, patch_size=PATCH, hidden_size=size.eye_width, num_hidden_layers=size.eye_layers,
        num_attention_heads=size.eye_heads, intermediate_size=size.eye_mlp, projection_dim=size.eye_width,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(WORDS) + -len(WORDS) % 16, hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.width // size.heads,
        intermediate_size=size.mlp, max_position_embeddings=512, tie_word_embeddings=False, **_special(),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=eyes, text_config=language, image_token_index=WORDS.index("<image>"), image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        tie_word_embeddings=False, **_special(),
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def _special() -> dict[str, int]:
    return {
        "pad_token_id": WORDS.index("<pad>"),
        "bos_token_id": WORDS.index("<s>"),
        "eos_token_id": WORDS.index("</s>"),
    }


def features(model: Any, pixels: Tensor) -> Tensor:
    """What the eyes say of pictures, [n, 64, eye width], before the projector."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def sequence(model: Any, seen: Tensor | None, text: Tensor, prefix: str = "user") -> Tensor:
    """Embeddings [n, t, D] of ``<s> USER: image text``: `seen` [n, 64, D] projected pictures or None, `text` [n, w] ids."""
    embed = model.model.language_model.embed_tokens
    before = torch.tensor(encode(PREFIXES[prefix]), device=text.device).expand(len(text), -1)
    parts = [embed(before), *([] if seen is None else [seen.to(embed.weight.dtype)]), embed(text)]
    return torch.cat(parts, 1)


def prompt(text: str, image: bool = True, prefix: str = "user") -> str:
    """A prompt as the tokenizer takes it; the first token comes by itself."""
    return " ".join([*PREFIXES[prefix].split()[1:], *(["<image>"] if image else []), text, "ASSISTANT:"])


def tokenizer() -> Any:
    """One token per word; ``<s>`` is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",  # noqa: S106
        additional_special_tokens=["<image>"], padding_side="left", chat_template=TEMPLATE, model_max_length=512,
    )  # fmt: skip


def processor() -> Any:
    """Tokenizer and image processor in one: pictures of any size are scaled to 64 x 64."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": PIXELS, "width": PIXELS}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=TEMPLATE,  # noqa: S106
    )  # fmt: skip


def export(model: Any, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write model, tokenizer and processor into one folder.

    Weights bear the names that published LLaVA checkpoints have: every version of transformers and vLLM reads those, while the names
    inside the classes have changed from one version to the next.
    """
    folder = Path(folder)
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save(model, folder / "model.safetensors", dtype)
    processor().save_pretrained(folder)
    return folder


def save(model: Any, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights alone, under their published names."""
    from safetensors.torch import save_file

    weights = {
        _published(name): value.detach().to(dtype).cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, path, {"format": "pt"})


def _published(name: str) -> str:
    for inside, outside in NAMES:
        if name.startswith(inside):
            return outside + name.removeprefix(inside)
    raise ValueError(f"no published name for {name}")


def load(weights: str | Path, size: Size = FULL) -> Any:
    """A model from a file of :func:`save`, in float32."""
    model = build(size)
    take(model, weights)
    return model.eval()


def take(model: Any, weights: str | Path, part: str = "") -> None:
    """Take weights over from a file of :func:`save`; only those whose names inside the model begin with `part`."""
    from safetensors.torch import load_file

    known, own = load_file(str(weights)), model.state_dict()
    model.load_state_dict({k: known[_published(k)].float() if k.startswith(part) else v for k, v in own.items()})
