"""What a zoo entry is: how a tiny random model is built, and what it is run on. The entries are in zoo.py.

Each model has 2 to 4 layers and a width of 64, is built in milliseconds and seeded, and has weights large enough that attention
is far from uniform: an edit of attention that is wrong by a little shows in the logits. In several of them a *sink* is planted
(:func:`plant_rope_sink`, :func:`plant_position_sink`): the first token carries most of the attention of most heads, as in trained
models; that is where cancelling formulas lose their digits.

Nothing here asks headpatch anything. Which module is which layer of which part is written down as plain name tables, so that a
wrong idea in an adapter cannot repeat itself in the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

BOS, PAD, IMAGE, VOCAB = 1, 0, 95, 96
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
WINDOW = 8
"""Sliding window of the models that have one; shorter than every test sequence."""
SOURCE = 10
"""Encoder positions of the encoder-decoders."""


@dataclass(frozen=True)
class Part:
    """One attention stack: its layers that have softmax attention, as module names, and its head counts.

    Attributes
    ----------
    modules
        Layer number to module name; layers without softmax attention are missing.
    num_layers
        Layers of the stack, those without softmax attention included.
    """

    modules: Mapping[int, str]
    num_layers: int
    num_heads: int = HEADS
    num_kv_heads: int = KV_HEADS

    @classmethod
    def of(
        cls, name: str, layers: int, heads: int = HEADS, kv_heads: int = KV_HEADS, only: tuple[int, ...] = ()
    ) -> Part:
        """`name` has one ``{}`` for the layer number; `only` lists the softmax layers where not all are."""
        return cls({i: name.format(i) for i in (only or range(layers))}, layers, heads, kv_heads)


@dataclass(frozen=True)
class Inputs:
    """What a model is run on, and what a test must know about it.

    Attributes
    ----------
    kwargs
        Arguments of one forward over everything.
    real
        [b, n] bool: positions whose outputs are compared; the others are padding.
    first
        Part to the key index of the first real token: [b], or [b, q] where it differs between the query rows of one row.
    prompt
        Positions before this belong to the prompt, from it on to the continuation.
    """

    kwargs: dict[str, Any]
    real: Tensor
    first: Mapping[str, Tensor]
    prompt: int

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same inputs with floating-point tensors (images, sounds, embeddings) in `dtype`."""
        moved = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.kwargs.items()}
        return replace(self, kwargs=moved)


@dataclass(frozen=True, eq=False)
class Entry:
    """One architecture of the zoo.

    Attributes
    ----------
    config
        Makes the config.
    model_class
        Name of the transformers class.
    parts
        Attention stacks by name, main one first (the one a patch without ``part:`` means).
    attn
        Attention implementations to test.
    kind
        What the inputs look like: ``text``, ``image`` (a classifier without text), ``speech``, ``image_text``, ``text_text``.
    sliding
        Whether some layers see only a window.
    std
        Standard deviation of random weights.
    plant
        Makes the first token a sink.
    exact64
        Whether every attention implementation of this model computes in float64 when the weights are float64. Most eager
        functions cast their softmax to float32; ``sdpa`` never does.
    """

    name: str
    config: Callable[[], Any]
    model_class: str
    parts: Mapping[str, Part]
    attn: tuple[str, ...] = ("sdpa", "eager")
    kind: str = "text"
    sliding: bool = False
    std: float = 0.2
    plant: Callable[[Any], None] | None = None
    exact64: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def main(self) -> str:
        return next(iter(self.parts))

    @property
    def generates(self) -> bool:
        """Whether ``generate()`` makes sense with nothing but text inputs."""
        return self.kind == "text"

    @property
    def caches(self) -> bool:
        """Whether the model decodes with a cache."""
        return self.kind != "image"

    def build(
        self, dtype: torch.dtype = torch.float32, attn: str = "sdpa", *, weights: torch.dtype | None = None
    ) -> Any:
        """A fresh model in eval mode; the same weights at every call.

        Parameters
        ----------
        dtype
            Dtype of the parameters. Buffers (rotary frequencies) stay in float32, as ``from_pretrained(dtype=)`` leaves them.
        attn
            Attention implementation.
        weights
            Round the weights to this dtype first, so that a float64 model has exactly the weights of a bfloat16 one.
        """
        model = _empty(self, attn)
        model.load_state_dict(_weights(self))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(weights or dtype).to(dtype)
        return model.eval()

    def make_inputs(
        self, batch: int = 2, lengths: list[int] | None = None, padding_side: str | None = None, continuation: int = 0,
        seed: int = 0,
    ) -> Inputs:  # fmt: skip
        """Seeded inputs.

        Parameters
        ----------
        batch
            Rows.
        lengths
            Real tokens of each row's prompt; default 14 each. Image-text models add their image tokens to it.
        padding_side
            ``left`` or ``right``: pad the prompts to the longest and pass an attention mask. None: no mask at all; the lengths must
            be equal.
        continuation
            Real tokens after the (padded) prompt, which decode tests feed in steps.
        """
        lengths = list(lengths or [14] * batch)
        g = torch.Generator().manual_seed(1000 + seed)
        if self.kind == "image":
            pixels = torch.randn(len(lengths), 3, 16, 16, generator=g)
            zero = torch.zeros(len(lengths), dtype=torch.long)
            return Inputs(
                {"pixel_values": pixels}, torch.ones(len(lengths), 17, dtype=torch.bool), {self.main: zero}, 17
            )

        image_tokens = 16 if self.kind == "image_text" else 0
        lengths = [n + image_tokens for n in lengths]
        width, b = max(lengths), len(lengths)
        if padding_side is None and min(lengths) != width:
            raise ValueError("rows of different lengths need a padding side")
        ids = torch.randint(2, IMAGE, (b, width + continuation), generator=g)
        mask = torch.ones_like(ids)
        first = torch.zeros(b, dtype=torch.long)
        for row, n in enumerate(lengths):
            if padding_side == "left":
                first[row] = width - n
                mask[row, : width - n] = 0
            else:
                mask[row, n:width] = 0
            ids[row, first[row]] = BOS
            ids[row, first[row] + 1 : first[row] + 1 + image_tokens] = IMAGE
        ids[mask == 0] = PAD
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        zero = torch.zeros_like(first)
        given = mask if padding_side else None
        everything: dict[str, Any]
        if self.kind == "text":
            everything = {"input_ids": ids, "attention_mask": given, "position_ids": positions}
            firsts = {self.main: first}
        elif self.kind == "image_text":
            pixels = torch.randn(b, 3, 16, 16, generator=g)
            everything = {"input_ids": ids, "attention_mask": given, "position_ids": positions, "pixel_values": pixels}
            firsts = {"text": first, "vision": zero}
        elif self.kind == "speech":
            sound = torch.randn(b, 8, 2 * SOURCE, generator=g)
            everything = {
                "input_features": sound, "decoder_input_ids": ids, "decoder_attention_mask": given,
                "decoder_position_ids": positions,
            }  # fmt: skip
            firsts = {"encoder": zero, "decoder": first, "cross": zero}
        else:
            source = torch.randint(2, IMAGE, (b, SOURCE), generator=g)
            source_mask, start = torch.ones_like(source), zero.clone()
            for row in range(b if padding_side else 0):  # sources of 10, 8, 6, ... tokens, padded on the same side
                missing = 2 * (row % 4)
                start[row] = missing if padding_side == "left" else 0
                source_mask[row, slice(None, missing) if padding_side == "left" else slice(SOURCE - missing, None)] = 0
            source[source_mask == 0] = PAD
            everything = {
                "input_ids": source,
                "attention_mask": source_mask if padding_side else None,
                "decoder_input_ids": ids,
                "decoder_attention_mask": given,
            }
            firsts = {"encoder": start, "decoder": first, "cross": start}
        return Inputs(everything, mask.bool(), firsts, width)


def chunk(entry: Entry, kwargs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Arguments of a forward over positions `start` to `stop`, given that the cache holds what is before."""
    cut = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids", "decoder_input_ids", "decoder_position_ids"):
        if cut.get(name) is not None and (entry.kind != "text_text" or name.startswith("decoder")):
            cut[name] = cut[name][:, start:stop]
    for name in ("attention_mask", "decoder_attention_mask"):
        if cut.get(name) is not None and (entry.kind != "text_text" or name.startswith("decoder")):
            cut[name] = cut[name][:, :stop]
    if start > 0:
        cut.pop("pixel_values", None)
    return cut


def output(outputs: Any) -> Tensor:
    """What is compared: logits of language models, hidden states of models without a head."""
    logits: Tensor | None = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


# ---------------------------------------------------------------------------------------------------------------- weights


def _empty(entry: Entry, attn: str) -> Any:
    """A model of that architecture with whatever weights its class gives it."""
    config = entry.config()
    config._attn_implementation = attn
    config._experts_implementation = "eager"  # the grouped kernel of mixture-of-experts models has no float64
    model = getattr(transformers, entry.model_class)(config)
    model.set_attn_implementation(attn)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        model.generation_config.bos_token_id = BOS
    return model.eval()


@functools.cache
def _weights(entry: Entry) -> dict[str, Tensor]:
    """The float32 weights of a zoo model, by parameter name."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = _empty(entry, entry.attn[0])
        with torch.no_grad():
            for path, p in model.named_parameters():
                if path.endswith("sinks"):
                    p.copy_(torch.randn_like(p) + 1.0)
                elif "relative_attention_bias" in path:
                    p.copy_(torch.randn_like(p))
                elif p.ndim >= 2:
                    p.copy_(torch.randn_like(p) * entry.std)
                else:
                    p.add_(torch.randn_like(p) * 0.1)
            if entry.plant is not None:
                entry.plant(model)
    return model.state_dict()


def plant_rope_sink(model: Any) -> None:
    """Make BOS a sink of a rotary model with separate projections.

    BOS alone has the residual direction u, all tokens share direction v. Queries of every head get a component along c wherever v
    is, keys where u is; c lies in the slowest rotary pair, so that distance does not turn it.
    """
    base = model.get_decoder() if not hasattr(model, "layers") else model
    table = model.get_input_embeddings().weight
    width = table.shape[1]
    u, v = torch.zeros(width), torch.zeros(width)
    u[0], v[1] = 1.0, 1.0
    table[:, :2] = 0.0
    table[:, 1] = 0.5
    table[BOS, 0] = 1.5
    for layer in base.layers:
        attention = layer.self_attn
        d = attention.head_dim
        for projection, direction in ((attention.q_proj, v), (attention.k_proj, u)):
            c = torch.zeros(projection.out_features)
            c[d // 2 - 1 :: d] = 1.0
            projection.weight.add_(1.2 * torch.outer(c, direction))


def plant_position_sink(model: Any) -> None:
    """Make position 0 a sink of GPT-2, whose positions are learned and whose projections have biases."""
    base = model.transformer
    base.wpe.weight[:, 0] = 0.0
    base.wte.weight[:, 0] = 0.0
    base.wpe.weight[0, 0] = 2.0
    for block in base.h:
        n, d = block.attn.embed_dim, block.attn.head_dim
        block.attn.c_attn.weight[0, n : 2 * n : d] += 1.5
        block.attn.c_attn.bias[0:n:d] += 2.0
