"""A tiny random Llama with a real tokenizer, saved as a folder: what the command line and the harness load by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
RECIPE: dict[str, Any] = {
    "headpatch": 1,
    "name": "tiny",
    "description": "Two patches for a tiny model.",
    "model": {
        "model_type": "llama", "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
    },
    "patches": [
        {"method": "zerotuning", "heads": {"0.*": 0.1, "1.2": 8.0}},
        {"method": "head_scaling", "heads": ["1.2", "2.0"], "scale": 0.0},
    ],
}  # fmt: skip
TEXTS = (
    "Review: the film is good and the film is bad\nSentiment (positive or negative): positive",
    "Review: nobody laughed and everybody laughed\nSentiment (positive or negative): negative",
    "What is the capital of this country, and what is it known for?",
)


def save_tiny_model(
    folder: Path, chat_template: bool = False, layers: int = LAYERS, heads: int = HEADS, kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> Path:  # fmt: skip
    """Write config, weights and tokenizer into `folder`; the same numbers at every call."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16 * heads, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
