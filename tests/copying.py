"""A tiny model that copies: one head of it looks for the token that follows the last one in a fixed chain, and writes it.

Its weights are written by hand, so that which head retrieves is known: a needle is a piece of the chain, and a question ends in the
token before it. A GPT-2 without position embeddings: where something stands does not matter to it. Tokens are words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headpatch.find.haystack import Haystack
from headpatch.find.needles import Needle

LAYERS, HEADS, DIM = 3, 4, 64
CHAIN = ("Answer:", "red", "owl", "on", "green", "hill", "<end>")
FILL = tuple(f"w{i}" for i in range(40))
WORDS = ("<pad>", "<s>", "<unk>", *CHAIN, "code", "is", *FILL, "x.")
NEEDLE = Needle("code is red owl on green hill", "code", "red owl on green hill")
HAYSTACK = Haystack("words", None, tuple(" ".join((*FILL[i : i + 5], "x.")) for i in range(35)) * 4)


def tokenizer() -> Any:
    """One token per word, after a first token; it says where in the text each stands."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def model(layer: int = 1, head: int = 2) -> Any:
    """The model whose head `layer.head` copies; the others do next to nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=HEADS * DIM, n_layer=LAYERS, n_head=HEADS, n_inner=32, n_positions=1024, bos_token_id=1,
        eos_token_id=WORDS.index("<end>"), pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        body = made.transformer
        body.wte.weight[:, : len(WORDS)] = torch.eye(len(WORDS))
        body.ln_f.weight.fill_(1.0)
        for number, block in enumerate(body.h):
            block.ln_1.weight.fill_(1.0)
            block.attn.c_attn.weight.normal_(0.0, 0.01, generator=generator)
            block.attn.c_proj.weight.normal_(0.0, 1e-3, generator=generator)
            if number == layer:
                _plant(block.attn, head)
    return made


def _plant(attention: Any, head: int) -> None:
    """Query: what follows this token; key and value: which token this is; output: more of it."""
    own = slice(head * DIM, (head + 1) * DIM)
    width = HEADS * DIM
    q, k, v = (attention.c_attn.weight[:, part * width : (part + 1) * width] for part in range(3))
    for part in (q, k, v):
        part[:, own] = 0.0
    for number, word in enumerate(WORDS):
        k[number, own.start + number] = 1.0
        v[number, own.start + number] = 1.0
        if word in CHAIN[:-1]:
            after = WORDS.index(CHAIN[CHAIN.index(word) + 1])
            q[number, own.start + after] = 1.0
    attention.c_proj.weight[own] = 0.0
    attention.c_proj.weight[own.start : own.start + len(WORDS), : len(WORDS)] = 3.0 * torch.eye(len(WORDS))


def save(folder: Path) -> Path:
    """Model and tokenizer as a folder, and a text to hide things in beside them."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("\n\n".join(HAYSTACK.sentences))
    return folder
