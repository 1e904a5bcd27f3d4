"""The last token of prompts, run again and again on what was computed before it: see :class:`headpatch.tune.engine.LastTokens`.

Nothing of the model is reimplemented: its own forward runs over one token, with a cache that holds the rest. Prompts of a batch are
padded in the cache and masked; positions are given. Head outputs are changed by hooks before the output projections.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from headpatch.adapters.huggingface.controller import controller_of
from headpatch.adapters.huggingface.discover import find_layout, output_projection
from headpatch.adapters.huggingface.projections import projections
from headpatch.adapters.huggingface.scoring import HuggingFaceBench
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.tune.engine import Beginnings, Edit, Prompt

if TYPE_CHECKING:
    from headpatch.heads import ModelShape

__all__ = ["HuggingFaceLastTokens"]

TOKENS = {"cuda": 1 << 15, "cpu": 1 << 11}
"""Padded tokens of one batch of beginnings."""
WIDER = 4
"""What a GPU runs at once, in rows of a CPU's batch."""


class HuggingFaceLastTokens:
    """One transformers model and its tokenizer."""

    def __init__(self, root: Any, tokenizer: Any) -> None:
        self.bench = HuggingFaceBench(root, tokenizer)  # refuses what is no causal language model
        self.root, self.tokenizer = root, tokenizer
        self.layout = find_layout(root)
        self.device = root.get_input_embeddings().weight.device
        self.wider = 1 if self.device.type == "cpu" else WIDER
        accepted = inspect.signature(inspect.unwrap(type(root).forward)).parameters
        if missing := {"attention_mask", "position_ids", "past_key_values"} - accepted.keys():
            raise UnsupportedModelError(f"{type(root).__name__} takes no {', '.join(sorted(missing))}")
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.windowed = getattr(root.config.get_text_config(decoder=True), "sliding_window", None) is not None
        self.modules: dict[int, nn.Module] = {}
        for layer, sites in projections(root).items():
            if sites.gated:
                raise UnsupportedModelError(
                    f"{sites.path}: a gate stands between head outputs and the output projection, where they cannot be learned yet"
                )
            self.modules[layer] = root.get_submodule(sites.playing("o").path)
        if len(self.modules) != self.shape.parts[self.shape.main].num_layers:
            raise UnsupportedModelError(
                f"{type(root).__name__} has layers without softmax attention, whose state of a prompt is more than keys and values"
            )

    @property
    def shape(self) -> ModelShape:
        """Heads of the model."""
        return self.layout.shape

    def about(self) -> dict[str, str]:
        """Model, engine, versions, device and dtype."""
        return self.bench.about()

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer of one line."""
        generation: Any = getattr(self.root, "generation_config", None)
        given = getattr(generation, "eos_token_id", None)
        stops = {given} if isinstance(given, int) else set(given or ())
        stops |= {self.tokenizer.eos_token_id} - {None}
        breaks = (i for i in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([i]))
        return frozenset({*breaks, *stops})

    def encode(
        self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None, closed: bool = False
    ) -> list[tuple[int, ...]]:
        """Tokens of texts, or of messages in the chat template."""
        found = []
        for prompt, answer in zip(prompts, answers or [""] * len(prompts), strict=True):
            if isinstance(prompt, str):
                ids = self.tokenizer(prompt + answer + "\n" * closed)["input_ids"]
            elif getattr(self.tokenizer, "chat_template", None) is None:
                raise HeadpatchError("this model's tokenizer has no chat template; leave the chat option out")
            else:
                messages = [{"role": role, "content": text} for role, text in prompt]
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids = self.tokenizer(text + answer, add_special_tokens=False)["input_ids"]
                end = self.tokenizer.eos_token_id
                ids = [*ids, end] if closed and end is not None else ids
            if not ids:
                raise HeadpatchError("a prompt has no tokens")
            found.append(tuple(ids))
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def writer(self, layer: int) -> Tensor:
        """[H, d, D]."""
        where = self.layout.attention[self.shape.main, layer]
        return output_projection(where.module, where.num_heads, f"{where.part}.{layer}").detach()

    # --- beginnings -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]], shared: int = 0) -> Beginnings:
        """Keys and values of all but the last tokens, in batches of prompts of similar length."""
        self._refuse_patched()
        if not prompts or min(map(len, prompts)) <= shared:
            raise HeadpatchError("every prompt needs at least one token of its own")
        # Padding behind shared tokens lies between a query and its keys: a window would count it.
        shared = 0 if self.windowed else shared
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        width = max(map(len, prompts)) - 1
        found: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
        start = self._start(prompts[0][:shared])
        while order:
            longest = len(prompts[order[-1]]) - shared
            size = max(1, TOKENS.get(self.device.type, TOKENS["cuda"]) // longest)
            rows, order = order[-size:], order[:-size]
            real, keys, values = self._beginning([prompts[i][shared:-1] for i in rows], start, shared)
            pad = width - real.shape[1]
            wide = [[nn.functional.pad(x, (0, 0, pad, 0)) for x in side] for side in (keys, values)]
            at = torch.tensor(rows)
            kept = torch.cat([at[:, None], nn.functional.pad(real, (pad, 0)).long()], 1)
            found.append((kept, wide[0], wide[1]))
        at = torch.cat([f[0][:, 0] for f in found]).argsort()
        real = torch.cat([f[0][:, 1:] for f in found])[at].bool()
        place = at.to(self.device)
        keys, values = _joined([f[1] for f in found], place), _joined([f[2] for f in found], place)
        last = torch.tensor([p[-1] for p in prompts], device=self.device)
        return Beginnings(keys, values, real.to(self.device), last)

    def _start(self, ids: Sequence[int]) -> Any:
        """Cache of the shared tokens; None where there are none."""
        if not ids:
            return None
        return self.root(
            input_ids=torch.tensor([list(ids)], device=self.device), use_cache=True, **self.keep
        ).past_key_values

    def _beginning(
        self, rows: list[Sequence[int]], start: Any, shared: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[b, w] which columns are real, and per layer keys and values [b, K, w, d]; padding stands behind what is shared."""
        wide, b = max(map(len, rows)), len(rows)
        real = torch.tensor([[False] * (wide - len(row)) + [True] * len(row) for row in rows], dtype=torch.bool).view(
            b, wide
        )
        real = torch.cat([torch.ones(b, shared, dtype=torch.bool), real], 1)
        cache = DynamicCache()
        for i, layer in enumerate(start.layers if start is not None else ()):
            cache.update(layer.keys.expand(b, -1, -1, -1), layer.values.expand(b, -1, -1, -1), i)
        if wide:
            ids = torch.tensor([[0] * (wide - len(row)) + list(row) for row in rows], device=self.device)
            positions = (real.cumsum(-1) - 1).clamp_min(0)[:, shared:]
            self.root(
                input_ids=ids, attention_mask=real.long().to(self.device), position_ids=positions.to(self.device),
                past_key_values=cache, use_cache=True, **self.keep,
            )  # fmt: skip
        elif start is None:  # prompts of one token: nothing comes before it
            part = self.shape.parts[self.shape.main]
            weight = self.root.get_input_embeddings().weight
            none = [weight.new_zeros(b, k, 0, d) for k, d in zip(part.num_kv_heads, part.head_dim, strict=True)]
            return real, none, list(none)
        kept: list[tuple[Any, Any]] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
        ]
        if len(kept) != len(self.modules) or any(k is None or k.shape[2] != real.shape[1] for k, _ in kept):
            raise UnsupportedModelError(
                f"{type(self.root).__name__} keeps another state of a prompt than its keys and values"
            )
        return real, [k for k, _ in kept], [v for _, v in kept]

    # --- last tokens ------------------------------------------------------------------------------------------------------

    def run(
        self, beginnings: Beginnings, rows: Sequence[int], edit: Edit | None = None,
        behind: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [n, vocabulary] behind the last token, or [n, 1 + m, vocabulary] behind it and each that follows."""
        logits = self._last(beginnings, rows, edit, behind or ())[0]
        return logits[:, -1] if behind is None else logits

    @torch.no_grad()
    def answer(
        self, beginnings: Beginnings, rows: Sequence[int], edit: Edit | None, tokens: int, ends: Collection[int]
    ) -> list[list[int]]:  # fmt: skip
        """Greedy continuations."""
        logits, cache, mask, positions = self._last(beginnings, rows, edit)
        logits = logits[:, -1]
        stop = torch.tensor(sorted(ends), dtype=torch.long)
        made: list[Tensor] = []
        done = torch.zeros(len(rows), dtype=torch.bool)
        for step in range(tokens):
            token = logits.argmax(-1)
            made.append(token.cpu())
            done |= torch.isin(made[-1], stop)
            if bool(done.all()) or step == tokens - 1:
                break
            mask = nn.functional.pad(mask, (0, 1), value=1)
            positions = positions + 1
            logits = self.root(
                input_ids=token[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]  # fmt: skip
        texts = torch.stack(made, 1).tolist() if made else [[] for _ in rows]
        return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in texts]

    def _last(
        self, beginnings: Beginnings, rows: Sequence[int], edit: Edit | None, behind: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Any, Tensor, Tensor]:
        """(logits, cache, mask, positions) of one forward over the last token, and what stands behind it."""
        self._refuse_patched()
        at = torch.tensor(list(rows), device=self.device)
        real = beginnings.real.index_select(0, at)
        # Columns that none of these rows needs are left out.
        first = min((beginnings.starts[i] for i in rows), default=real.shape[1])
        more = max(map(len, behind), default=0)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(zip(beginnings.keys, beginnings.values, strict=True)):
            cache.update(keys[:, :, first:].index_select(0, at), values[:, :, first:].index_select(0, at), i)
        # Shorter rows are filled up on the right, where nothing that counts sees it.
        mask = nn.functional.pad(real[:, first:].long(), (0, 1 + more), value=1)
        positions = real.sum(-1, keepdim=True) + torch.arange(1 + more, device=self.device)
        ids = beginnings.last.index_select(0, at)[:, None]
        if more:
            filled = [[*row, *[0] * (more - len(row))] for row in behind]
            ids = torch.cat([ids, torch.tensor(filled, device=self.device)], 1)
        with self._edited(edit, len(ids)):
            logits = self.root(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                **dict.fromkeys(self.keep, 1 + more),
            ).logits  # fmt: skip
        return logits, cache, mask, positions

    @contextlib.contextmanager
    def _edited(self, edit: Edit | None, rows: int) -> Iterator[None]:
        hooks = []
        heads = self.shape.parts[self.shape.main].num_heads
        for layer, module in self.modules.items() if edit is not None else ():

            def before(module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> tuple[Any, ...]:
                assert edit is not None
                given: Tensor = args[0]
                wide = given.reshape(rows, -1, given.shape[-1])  # the prompt's last token, and what stands behind it
                new = edit(layer, wide[:, 0].reshape(rows, heads[layer], -1)).to(given.dtype).reshape(rows, 1, -1)
                new = new if wide.shape[1] == 1 else torch.cat([new, wide[:, 1:]], 1)
                return (new.view(given.shape), *args[1:])

            hooks.append(module.register_forward_pre_hook(before))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _refuse_patched(self) -> None:
        if controller_of(self.root) is not None:
            raise HeadpatchError(
                "a recipe is on this model; remove its handle before anything is learned on the model"
            )


def _joined(parts: list[list[Tensor]], place: Tensor) -> list[Tensor]:
    """Per layer, all batches [N, K, w, d] in the order `place`; a layer's batches are let go of as soon as they are joined."""
    made = []
    for i in range(len(parts[0])):
        made.append(torch.cat([part[i] for part in parts]).index_select(0, place))
        for part in parts:
            part[i] = place
    return made
