"""What bench_attention_methods.py measures: models of random weights, recipes as they were published, and the edits as released code
makes them, on a full softmax map.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

__all__ = ["BEFORE", "CASES", "PUBLISHED", "Case", "Prompt", "llava", "recipe", "spread", "tiny_vlm", "write_out"]

BEFORE = 35
"""Text tokens in front of the picture, as LLaVA 1.5's system prompt has them."""
FULL = {
    "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 8192},
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 336, "patch_size": 14, "projection_dim": 768},
}  # fmt: skip
"""LLaVA-1.5-7B: CLIP-L/14 at 336 pixels, 576 image tokens, Vicuna-7B."""
SMALL = {
    "text": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
             "vocab_size": 128, "max_position_embeddings": 1024},
    "vision": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42,
               "patch_size": 14, "projection_dim": 32},
}  # fmt: skip
"""Nothing to measure: says in seconds, on a CPU, that the code runs."""


@dataclass(frozen=True)
class Case:
    """A method with what is promised of its prefill, whole model over whole untouched model."""

    method: str
    bound: float | None
    text_too: bool = False
    """Whether it is measured on a long text prompt as well."""


CASES = (
    Case("act", 1.60, True), Case("pasta", 1.20, True), Case("var", 1.20), Case("vhr", 2.30), Case("pai", None), Case("paint", None),
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One row: tokens, a picture or none, and where the spans of the methods that need some lie."""

    ids: Tensor
    pixels: Tensor | None
    span: tuple[int, int]
    image_token: int

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def arguments(self) -> dict[str, Tensor]:
        """What the model takes."""
        return {"input_ids": self.ids, **({} if self.pixels is None else {"pixel_values": self.pixels})}


def llava(
    device: torch.device, dtype: torch.dtype, seed: int, small: bool = False, layers: int = 0, **others: int
) -> Any:
    """LLaVA-1.5-7B's shape (or a very small one) with random weights, made on the device; `layers` of its language model, and
    `others` of its settings.
    """
    shape = SMALL if small else FULL
    text = LlamaConfig(
        **{**shape["text"], **({"num_hidden_layers": layers} if layers else {}), **others}, tie_word_embeddings=False
    )
    eyes = CLIPVisionConfig(**shape["vision"])
    patches = (eyes.image_size // eyes.patch_size) ** 2
    config = LlavaConfig(
        vision_config=eyes, text_config=text, image_token_index=text.vocab_size - 64, image_seq_length=patches,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
    )  # fmt: skip
    for one in (config, text, eyes):
        one.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def tiny_vlm(seed: int) -> Any:
    """The small vision-language model of examples/tiny_vlm, untrained: what it says does not matter here."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_vlm"))
    from model import build

    return build(seed=seed).eval()


def spread(layers: int, heads: int, share: float) -> list[str]:
    """Heads drawn at random from all layers: most layers get some, which is the dear way to choose so many."""
    every = [f"{i}.{j}" for i in range(layers) for j in range(heads)]
    chosen = random.Random(0).sample(range(len(every)), max(1, round(share * len(every))))
    return [every[i] for i in sorted(chosen)]


def recipe(method: str, config: Any, everywhere: bool = False) -> dict[str, Any]:
    """The recipe of a method for a language model of this text config, layers chosen as published.

    `everywhere`: all layers, for a model that is too shallow to leave some out.
    """
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    tenth = spread(layers, heads, 0.1)
    patches = {
        "act": {"heads": tenth, "beta": 0.4, "threshold": 5.0, "threshold_per": "prompt_length"},
        "pasta": {"heads": tenth, "alpha": 0.01},
        # Random streams are extreme nowhere: a threshold that some tokens pass, so that there is something to move.
        "var": {"heads": [f"2-{layers - 2}.*"], "recycle": 0.4, "sink_dimensions": [1415 % width, 2533 % width],
                "sink_threshold": 2.5, "min_visual_mass": 0.2, "min_nonsink_ratio": 0.5},
        "vhr": {"heads": ["1.*", f"{layers * 18 // 32}-{layers - 1}.*"], "alpha": 2.0},
        "pai": {"heads": [f"2-{layers - 1}.*"], "alpha": 0.5},
        "paint": {"heads": [f"2-{layers - 1}.*"], "weight": 1.0},
    }  # fmt: skip
    patch = {"method": method, **patches[method]}
    if everywhere and method not in ("act", "pasta"):
        patch["heads"] = ["*.*"]
    return {"headpatch": 1, "patches": [patch]}


# --- edits as published ---------------------------------------------------------------------------------------------------------


@dataclass
class _Written:
    """The edit that ``published_method`` makes: of scores or of rows [b, H, q, n], in these heads of each layer (None: all)."""

    scores: Callable[[Tensor, Tensor | None], Tensor] | None = None
    rows: Callable[[Tensor, Tensor | None], Tensor] | None = None
    heads: dict[int, Tensor] | None = None


WRITTEN = [_Written()]
"""What ``published_method`` does now."""


def published_method(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Eager attention with the edit that :func:`write_out` chose, written out on the whole map as released code does it."""
    groups, edit = module.num_key_value_groups, WRITTEN[0]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    chosen = None if edit.heads is None else edit.heads.get(module.layer_idx)
    acts = edit.heads is None or chosen is not None
    if acts and edit.scores is not None:
        scores = edit.scores(scores, chosen)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    p = torch.softmax(scores, -1, dtype=torch.float32)
    if acts and edit.rows is not None:
        p = edit.rows(p, chosen)
    return torch.matmul(p.to(query.dtype), value).transpose(1, 2).contiguous(), None


AttentionInterface.register("published_method", published_method)
AttentionMaskInterface.register("published_method", eager_mask)


def _act(config: Any, prompt: Prompt, device: torch.device) -> _Written:
    def rows(p: Tensor, heads: Tensor | None) -> Tensor:
        mine = p[:, heads]
        n = p.shape[-1]
        means = mine.sum(2) / torch.arange(n, 0, -1, device=p.device)
        sinks = means > 5.0 / n
        sinks[..., 0] = False
        mass = (mine * sinks[:, :, None]).sum(-1, keepdim=True)
        p[:, heads] = torch.where(sinks[:, :, None], 0.4 * mine, mine * (1 + 0.6 * mass / (1 - mass)))
        return p

    return _Written(rows=rows, heads=_tenth(config, device))


def _pasta(config: Any, prompt: Prompt, device: torch.device) -> _Written:
    bias = torch.full((prompt.length,), -4.605, device=device)
    bias[slice(*prompt.span)] = 0.0

    def scores(s: Tensor, heads: Tensor | None) -> Tensor:
        s[:, heads] += bias.to(s.dtype)
        return s

    return _Written(scores=scores, heads=_tenth(config, device))


def _var(config: Any, prompt: Prompt, device: torch.device) -> _Written:
    image = prompt.ids[0] == prompt.image_token
    sinks = torch.zeros_like(image)
    sinks[:: max(1, len(sinks) // 8)] = True  # which they are costs nothing, and is not looked for here

    def rows(p: Tensor, heads: Tensor | None) -> Tensor:
        content, visual = p[..., image & ~sinks].sum(-1), p[..., image & sinks].sum(-1)
        moved = p[..., sinks].sum(-1)
        gate = (content + visual >= 0.2) & (content >= 0.5 * (content + visual)) & (visual > 0) & ~image
        part = torch.where(gate, 0.4, 0.0)
        p[..., sinks] *= (1 - part)[..., None]
        p[..., image & ~sinks] *= (1 + part * moved / content.clamp_min(1e-6))[..., None]
        return p

    return _Written(rows=rows, heads={i: torch.empty(0) for i in range(2, config.num_hidden_layers - 1)})


def _pai(config: Any, prompt: Prompt, device: torch.device) -> _Written:
    image = prompt.ids[0] == prompt.image_token

    def scores(s: Tensor, heads: Tensor | None) -> Tensor:
        last = s[:, :, -1]
        s[:, :, -1] = torch.where(image, last + 0.5 * last.abs(), last)
        return s

    return _Written(scores=scores, heads={i: torch.empty(0) for i in range(2, config.num_hidden_layers)})


def _tenth(config: Any, device: torch.device) -> dict[int, Tensor]:
    found: dict[int, list[int]] = {}
    for name in spread(config.num_hidden_layers, config.num_attention_heads, 0.1):
        layer, head = map(int, name.split("."))
        found.setdefault(layer, []).append(head)
    return {layer: torch.tensor(heads, device=device) for layer, heads in found.items()}


PUBLISHED: dict[str, Callable[[Any, Prompt, torch.device], _Written]] = {
    "act": _act, "pasta": _pasta, "var": _var, "pai": _pai,
}  # fmt: skip
"""Edits that are simple to write out."""


def write_out(method: str, config: Any, prompt: Prompt, device: torch.device) -> bool:
    """Make ``published_method`` do a method's edit for this prompt; False where it is not written out here."""
    if method not in PUBLISHED:
        return False
    WRITTEN[0] = PUBLISHED[method](config, prompt, device)
    return True
