"""Tiny random models of every architecture that exactness is promised for, with their inputs.

Each model has 2 to 4 layers and a width of 64, is built in milliseconds and seeded, and has weights large enough that attention
is far from uniform: an edit of attention that is wrong by a little shows in the logits. In several of them a *sink* is planted:
the first token carries most of the attention of most heads, as in trained models; that is where cancelling formulas lose their
digits.

Nothing here asks headpatch anything. Which module is which layer of which part is written down as plain name tables, so that a
wrong idea in an adapter cannot repeat itself in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from zoo_base import (
    BOS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    KV_HEADS,
    PAD,
    SOURCE,
    VOCAB,
    WINDOW,
    Entry,
    Inputs,
    Part,
    chunk,
    output,
    plant_position_sink,
    plant_rope_sink,
)  # fmt: skip

__all__ = [
    "BOS", "FULL", "IMAGE", "PAD", "PARTIAL", "REFUSED", "SOURCE", "WINDOW", "ZOO", "Entry", "Inputs", "Part", "chunk", "output",
]  # fmt: skip

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": None,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_DECODER = "model.layers.{}.self_attn"


def _llava() -> Any:
    text = transformers.LlamaConfig(**_TEXT)
    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=HIDDEN)
    # The last layer's features: with the default of -2 nothing would see the last layer of the vision tower.
    return transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1
    )


def _whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=8, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=SOURCE,
        max_target_positions=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2, decoder_start_token_id=BOS,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def _config(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**_TEXT, **more})


_ENTRIES = (
    Entry("llama", _config("LlamaConfig"), "LlamaForCausalLM", {"text": Part.of(_DECODER, 2)}, plant=plant_rope_sink),
    Entry("qwen2", _config("Qwen2Config"), "Qwen2ForCausalLM", {"text": Part.of(_DECODER, 2)}, plant=plant_rope_sink),
    Entry("qwen3", _config("Qwen3Config", head_dim=32), "Qwen3ForCausalLM", {"text": Part.of(_DECODER, 2)}),
    Entry(
        "mistral", _config("MistralConfig", sliding_window=WINDOW, num_hidden_layers=3), "MistralForCausalLM",
        {"text": Part.of(_DECODER, 3)}, sliding=True, plant=plant_rope_sink,
    ),
    Entry("phi3", _config("Phi3Config"), "Phi3ForCausalLM", {"text": Part.of(_DECODER, 2)}),
    Entry(
        "gemma2",
        _config(
            "Gemma2Config", num_hidden_layers=4, sliding_window=WINDOW, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM,
            attn_logit_softcapping=3.0,
        ),
        "Gemma2ForCausalLM", {"text": Part.of(_DECODER, 4)}, sliding=True,
    ),
    Entry(
        "gemma3",
        _config(
            "Gemma3TextConfig", num_hidden_layers=4, sliding_window=WINDOW, head_dim=HEAD_DIM,
            query_pre_attn_scalar=HEAD_DIM,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        "Gemma3ForCausalLM", {"text": Part.of(_DECODER, 4)}, sliding=True,
    ),
    Entry(
        "gpt2",
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=512, bos_token_id=BOS, eos_token_id=None,
        ),
        "GPT2LMHeadModel", {"text": Part.of("transformer.h.{}.attn", 2, HEADS, HEADS)}, plant=plant_position_sink,
        exact64=True,
    ),
    Entry(
        "gpt_neox",
        lambda: transformers.GPTNeoXConfig(**{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}),
        "GPTNeoXForCausalLM", {"text": Part.of("gpt_neox.layers.{}.attention", 2, HEADS, HEADS)},
    ),
    Entry(
        "opt",
        lambda: transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=96, num_hidden_layers=2,
            num_attention_heads=HEADS, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None,
        ),
        "OPTForCausalLM", {"text": Part.of("model.decoder.layers.{}.self_attn", 2, HEADS, HEADS)},
    ),
    Entry(
        "gpt_oss",
        _config(
            "GptOssConfig", num_hidden_layers=4, sliding_window=WINDOW, head_dim=HEAD_DIM, num_local_experts=2,
            num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "GptOssForCausalLM", {"text": Part.of(_DECODER, 4)}, attn=("eager",), sliding=True, exact64=True,
    ),
    Entry(
        "whisper", _whisper, "WhisperForConditionalGeneration",
        {
            "decoder": Part.of("model.decoder.layers.{}.self_attn", 2, HEADS, HEADS),
            "encoder": Part.of("model.encoder.layers.{}.self_attn", 2, HEADS, HEADS),
            "cross": Part.of("model.decoder.layers.{}.encoder_attn", 2, HEADS, HEADS),
        },
        kind="speech", exact64=True,
    ),
    Entry(
        "vit", lambda: transformers.ViTConfig(**_VISION), "ViTModel",
        {"vision": Part.of("layers.{}.attention", 2, HEADS, HEADS)}, kind="image",
    ),
    Entry(
        "llava", _llava, "LlavaForConditionalGeneration",
        {
            "text": Part.of("model.language_model.layers.{}.self_attn", 2),
            "vision": Part.of("model.vision_tower.encoder.layers.{}.self_attn", 2, HEADS, HEADS),
        },
        kind="image_text",
    ),
    # (gpt-oss: every expert of every token, so that rounding cannot change the routing.)
    Entry(
        "deepseek_v3",
        _config(
            "DeepseekV3Config", num_key_value_heads=HEADS, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2, num_nextn_predict_layers=0,
        ),
        "DeepseekV3ForCausalLM", {"text": Part.of(_DECODER, 2, HEADS, HEADS)},
    ),
    Entry(
        "bart",
        lambda: transformers.BartConfig(
            vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2, decoder_start_token_id=BOS, forced_eos_token_id=None,
        ),
        "BartForConditionalGeneration",
        {
            "decoder": Part.of("model.decoder.layers.{}.self_attn", 2, HEADS, HEADS),
            "encoder": Part.of("model.encoder.layers.{}.self_attn", 2, HEADS, HEADS),
            "cross": Part.of("model.decoder.layers.{}.encoder_attn", 2, HEADS, HEADS),
        },
        kind="text_text", exact64=True,
    ),
    # Below: models on which ZeroTuning must be refused by name, or reaches only some layers.
    Entry(
        "t5",
        lambda: transformers.T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=HEAD_DIM, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=HEADS,
            pad_token_id=PAD, decoder_start_token_id=BOS, eos_token_id=2,
        ),
        "T5ForConditionalGeneration",
        {
            "decoder": Part.of("decoder.block.{}.layer.0.SelfAttention", 2, HEADS, HEADS),
            "encoder": Part.of("encoder.block.{}.layer.0.SelfAttention", 2, HEADS, HEADS),
            "cross": Part.of("decoder.block.{}.layer.1.EncDecAttention", 2, HEADS, HEADS),
        },
        kind="text_text", std=0.1,
    ),
    Entry(
        "qwen3_next",
        _config(
            "Qwen3NextConfig", num_hidden_layers=4, head_dim=HEAD_DIM, linear_key_head_dim=16, linear_value_head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=4, mlp_only_layers=[0, 1, 2, 3],
        ),
        "Qwen3NextForCausalLM", {"text": Part.of(_DECODER, 4, only=(3,))},
    ),
)  # fmt: skip

ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
REFUSED = ("t5",)
PARTIAL = ("qwen3_next",)
FULL = tuple(name for name in ZOO if name not in REFUSED + PARTIAL)
"""Architectures on which every method must be exact."""
