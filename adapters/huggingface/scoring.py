"""Measuring a causal language model under many recipes: answers to questions, and how it predicts texts.

Batches are padded on the right and given no mask: under causal attention the padding comes after everything that is read, so each
row is computed as it would be alone, on the quickest kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.adapters.huggingface.controller import Controller, controller_of
from headpatch.adapters.huggingface.discover import find_layout
from headpatch.adapters.huggingface.handle import HuggingFaceHandle
from headpatch.adapters.huggingface.observe import observing
from headpatch.adapters.huggingface.outcomes import assemble, at
from headpatch.adapters.huggingface.session import Session, encode, ends, max_length
from headpatch.adapters.huggingface.spans import Spans, token_spans
from headpatch.adapters.huggingface.sweep import Skipper
from headpatch.errors import HeadpatchError, UnsupportedModelError
from headpatch.find.engine import Outcome, Passage, Questions
from headpatch.recipe import Recipe, resolve

if TYPE_CHECKING:
    from headpatch.heads import ModelShape

__all__ = ["HuggingFaceBench"]

LOGITS = 1 << 27
"""Logits that one batch may have, read positions times vocabulary."""
TOKENS = {"cuda": 1 << 15, "cpu": 1 << 11}
"""Padded tokens of one batch: many where launching kernels is what takes time, few where padding is."""


@dataclass
class _Batch:
    """Rows of one forward: ids [b, q]; reads [b, P] positions; targets [b, P]; `members` are places among the passages; `data` is
    what a caller would give with the call.
    """

    ids: Tensor
    reads: Tensor
    targets: Tensor
    members: list[int]
    data: dict[str, Any]


class HuggingFaceBench:
    """One transformers model and its tokenizer, ready to be measured. See :class:`headpatch.find.engine.Bench`."""

    def __init__(self, root: Any, tokenizer: Any, max_tokens: int | None = None) -> None:
        if root.config.is_encoder_decoder or root.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{type(root).__name__} is no causal language model; calibration needs one")
        self.root, self.tokenizer = root, tokenizer
        self.layout = find_layout(root)
        self.device = root.get_input_embeddings().weight.device
        self.max_tokens = max_tokens or TOKENS.get(self.device.type, TOKENS["cuda"])
        self.skipper: Skipper | None = None

    @property
    def shape(self) -> ModelShape:
        """Heads of the model."""
        return self.layout.shape

    def about(self) -> dict[str, str]:
        """Model, engine, versions, device and dtype."""
        import transformers

        weight = self.root.get_input_embeddings().weight
        name = str(getattr(self.root.config, "_name_or_path", "") or type(self.root).__name__)
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model": name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name,
            "engine": f"transformers {transformers.__version__}", "torch": str(torch.__version__), "device": gpu,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def chat(self, prompt: str) -> str:
        """The prompt in the model's chat template."""
        if not self.has_chat:
            raise HeadpatchError("this model's tokenizer has no chat template; leave the chat option out")
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    @property
    def max_length(self) -> int | None:
        """Positions that the model has."""
        return max_length(self.root)

    def encode(self, text: str, special_tokens: bool = True) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Tokens of a text and their places in it."""
        return encode(self.tokenizer, text, special_tokens)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens at which generate() stops."""
        return ends(self.root, self.tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def session(self) -> Session:
        """A sequence to be read piece by piece."""
        return Session(self.root)

    def questions(
        self, prompts: Sequence[str], labels: Sequence[str], special_tokens: bool = True,
        spans: Sequence[Sequence[str]] | None = None,
    ) -> Questions:  # fmt: skip
        """Tokens of prompts and labels."""
        asked = self._encode(prompts, special_tokens)
        marked = self._marked(prompts, special_tokens, spans)
        label_ids = [self._label(prompts[0], asked[0], label, special_tokens) for label in labels] if asked else []
        starts = tuple(ids[0] for ids in label_ids)
        if len({*label_ids}) < len(label_ids):
            raise HeadpatchError(f"two of the labels {list(labels)} have the same tokens; give each its own text")
        if len({*starts}) == len(starts):
            plain = tuple(Passage(ids, spans=m) for ids, m in zip(asked, marked, strict=True))
            return Questions(plain, starts, len(asked), False)
        whole = tuple(
            Passage((*ids, *label[:-1]), label, len(ids), m)
            for ids, m in zip(asked, marked, strict=True)
            for label in label_ids
        )
        return Questions(whole, starts, len(asked), True)

    def texts(self, texts: Sequence[str]) -> tuple[Passage, ...]:
        """Tokens of texts, cut off where the model's positions end."""
        encoded = self._encode(texts, True, cut=True)
        if short := [text for text, ids in zip(texts, encoded, strict=True) if len(ids) < 2]:
            raise HeadpatchError(f"a text of fewer than two tokens has no perplexity: {short[0]!r}")
        return tuple(Passage(ids[:-1], ids[1:], spans=()) for ids in encoded)

    def _encode(self, texts: Sequence[str], special_tokens: bool, cut: bool = False) -> list[tuple[int, ...]]:
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]
        limit = getattr(self.root.config, "max_position_embeddings", None)
        for text, ids in zip(texts, found, strict=True):
            if not ids:
                raise HeadpatchError(f"{text[:60]!r} has no tokens")
            if limit and len(ids) > limit and not cut:
                raise HeadpatchError(f"a prompt of {len(ids)} tokens; the model takes {limit}: {text[:60]!r}...")
        return [tuple(ids[:limit]) for ids in found]

    def _marked(
        self, prompts: Sequence[str], special_tokens: bool, spans: Sequence[Sequence[str]] | None
    ) -> list[tuple[tuple[int, int], ...] | None]:
        """Token ranges of the spans of each prompt."""
        if spans is None:
            return [None] * len(prompts)
        found = token_spans([list(s) for s in spans], list(prompts), self.tokenizer, special_tokens)
        return [tuple(ranges) for ranges in found]

    def _label(self, prompt: str, ids: tuple[int, ...], label: str, special_tokens: bool) -> tuple[int, ...]:
        both = self._encode([prompt + label], special_tokens)[0]
        end = self._encode([prompt], special_tokens)[0]
        tail = len(end) - len(ids)  # an end token that the tokenizer may add comes off both
        if both[: len(ids)] != ids or len(both) - tail <= len(ids):
            raise HeadpatchError(
                f"label {label!r} merges with the end of the prompt ({prompt[-20:]!r}) into other tokens; begin the label with a "
                "space, or end the template differently"
            )
        return both[len(ids) :]

    # --- measuring --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, recipes: Sequence[Recipe | None], questions: Questions | None, texts: Sequence[Passage] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """Measure every recipe, in the order of their first edited layers."""
        asked = questions.passages if questions else ()
        batches = self._batches(asked, 0) + self._batches(texts, len(asked))
        if not batches:
            raise HeadpatchError("nothing to measure: neither questions nor texts")
        if self.skipper is None:
            self.skipper = Skipper(self.root, self.layout, batches[0].ids[:4])
        skipper = self.skipper
        first = [0 if r is None or skipper.problem else self._first_layer(r) for r in recipes]
        at, streams = 0, [None] * len(batches)
        for index in sorted(range(len(recipes)), key=lambda i: first[i]):
            if first[index] > at:
                streams = [
                    skipper.enter(b.ids, at, s, first[index])  # type: ignore[misc]
                    for b, s in zip(batches, streams, strict=True)
                ]
                at = first[index]
            with self._applied(recipes[index]):
                parts = [self._told(b, at, s, questions) for b, s in zip(batches, streams, strict=True)]
            yield index, assemble([batch.members for batch in batches], parts, questions, texts)

    @property
    def shares_layers(self) -> str:
        """How edits are measured: from the first edited layer on, or, with the reason, by whole forwards."""
        if self.skipper is None or not self.skipper.problem:
            return "layers below the first edited one are computed once"
        return f"whole forwards, because {self.skipper.problem}"

    def generate(
        self, prompts: Sequence[str], recipe: Recipe | None, max_new_tokens: int, special_tokens: bool = True,
        spans: Sequence[Sequence[str]] | None = None,
    ) -> list[str]:  # fmt: skip
        """Greedy continuations, left-padded in batches of similar length."""
        encoded, marked = self._encode(prompts, special_tokens), self._marked(prompts, special_tokens, spans)
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        answers = [""] * len(encoded)
        size = max(1, self.max_tokens // (max(map(len, encoded), default=1) + max_new_tokens))
        with self._applied(recipe), torch.no_grad():
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                width = max(len(encoded[i]) for i in rows)
                ids = torch.tensor([[pad] * (width - len(encoded[i])) + list(encoded[i]) for i in rows])
                mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in rows])
                with self._given({} if spans is None else {"spans": _spans([marked[i] for i in rows])}):
                    made = self.root.generate(
                        input_ids=ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens,
                        do_sample=False, num_beams=1, pad_token_id=pad,
                    )  # fmt: skip
                texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
                for row, text in zip(rows, texts, strict=True):
                    answers[row] = text
        return answers

    @contextlib.contextmanager
    def _applied(self, recipe: Recipe | None) -> Iterator[Any]:
        """The recipe on the model. The layout is known: walking through the model for each of thousands of edits is not needed."""
        if recipe is None:
            yield
            return
        controller = controller_of(self.root) or Controller(self.root)
        record = controller.install(recipe, self.layout)
        try:
            yield record
        finally:
            controller.uninstall(record.id, self.layout)

    def slopes(
        self, recipe: Recipe, questions: Questions, objective: Callable[[Outcome, Sequence[int]], Tensor]
    ) -> dict[str, float]:
        """Derivatives of a sum over questions, by one backward pass per batch."""
        batches = self._batches(questions.passages, 0, self.max_tokens // 4)  # what a backward pass keeps takes memory
        if self.skipper is None:
            with torch.no_grad():
                self.skipper = Skipper(self.root, self.layout, batches[0].ids[:4])
        total: dict[str, float] = {}
        with self._applied(recipe) as record, torch.enable_grad():
            strengths = HuggingFaceHandle(self.root, record).strengths(trainable=True)
            for batch in batches:
                values = self._told(batch, 0, None, questions)
                k, none = len(questions.starts), values.new_empty(0)
                first = values[:, :k]
                outcome = Outcome(first, first, values[:, k], values[:, k + 1], none)
                value = objective(outcome, batch.members).sum()
                found: tuple[Any, ...] = torch.autograd.grad(value, list(strengths.values()), allow_unused=True)
                for name, gradient in zip(strengths, found, strict=True):
                    layer = name.rsplit(".", 1)[1]
                    heads = sorted(record.resolved[0].heads[int(layer)])
                    for head, slope in zip(heads, [] if gradient is None else gradient.tolist(), strict=False):
                        total[f"{layer}.{head}"] = total.get(f"{layer}.{head}", 0.0) + slope
        return total

    @torch.no_grad()
    def observed(self, operand: str, passages: Sequence[Passage]) -> Iterator[dict[str, Tensor]]:
        """One operand of each head over the prompts, one by one."""
        for passage in passages:
            ids = torch.tensor([passage.ids[: passage.prompt]], device=self.device)
            with observing(self.root, [operand], "*.*") as seen:
                self.root(input_ids=ids, use_cache=False)
            yield {head: values[0][0].cpu() for (_, head), values in seen.items()}

    def _given(self, data: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Data for the rows of one call, where a recipe is on the model that could ask for it."""
        controller = controller_of(self.root)
        return controller.given(data) if controller is not None and data else contextlib.nullcontext()

    def _first_layer(self, recipe: Recipe) -> int:
        """The lowest layer that the recipe changes; 0 where it changes another part of the model, caches, or nothing."""
        layers = []
        for patch in resolve(recipe, self.shape):
            if patch.part != self.shape.main or patch.method.family == "cache":
                return 0
            identity = patch.method.identity()
            layers += [layer for layer, heads in patch.heads.items() if any(v != identity for v in heads.values())]
        return min(layers, default=0)

    def _batches(self, passages: Sequence[Passage], offset: int, most: int | None = None) -> list[_Batch]:
        """Passages of similar length together: few batches, and little padding in them."""
        vocabulary = int(self.root.get_output_embeddings().weight.shape[0])
        most = most or self.max_tokens
        order = sorted(range(len(passages)), key=lambda i: (len(passages[i].ids), i))
        groups: list[list[int]] = []
        reads = 0
        for i in order:  # lengths rise, so the newest member is the longest
            length = len(passages[i].ids)
            reads = max(reads, len(passages[i].targets), 1)
            room = min(most // length, LOGITS // (reads * vocabulary))
            if groups and len(groups[-1]) < room:
                shortest = len(passages[groups[-1][0]].ids)
                # A batch that is worth its launches may end where its shortest rows would be a fifth padding.
                if length <= 1.25 * shortest or length * len(groups[-1]) < most // 8:
                    groups[-1].append(i)
                    continue
            groups.append([i])
            reads = max(len(passages[i].targets), 1)
        return [self._batch([passages[i] for i in g], [offset + i for i in g]) for g in groups]

    def _batch(self, rows: list[Passage], members: list[int]) -> _Batch:
        width, reads = max(len(p.ids) for p in rows), max(1, *(len(p.targets) for p in rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        at = torch.zeros(len(rows), reads, dtype=torch.long)
        targets = torch.zeros_like(at)
        for row, p in enumerate(rows):
            n = max(len(p.targets), 1)
            ids[row, : len(p.ids)] = torch.tensor(p.ids)
            at[row] = torch.arange(len(p.ids) - n, len(p.ids) - n + reads).clamp_max(len(p.ids) - 1)
            targets[row, : len(p.targets)] = torch.tensor(p.targets, dtype=torch.long)
        data: dict[str, Any] = {
            "prompt_len": torch.tensor([len(p.ids) if p.prompt is None else p.prompt for p in rows])
        }
        if all(p.spans is not None for p in rows):
            data["spans"] = _spans([p.spans for p in rows])
        return _Batch(ids.to(self.device), at.to(self.device), targets.to(self.device), members, data)

    def _told(self, batch: _Batch, layer: int, hidden: Tensor | None, questions: Questions | None) -> Tensor:
        """:meth:`_read` of a batch whose rows' prompts and spans are known to methods that ask for them."""
        with self._given(batch.data):
            return self._read(batch, layer, hidden, questions)

    def _read(self, batch: _Batch, layer: int, hidden: Tensor | None, questions: Questions | None) -> Tensor:
        """[b, K + 2 + P]: label starts, the best other token, entropy, and the targets' log-probabilities."""
        assert self.skipper is not None
        gathered: list[bool] = []

        def keep(module: Any, args: tuple[Any, ...]) -> Any:
            if args and isinstance(args[0], Tensor) and args[0].shape[:2] == batch.ids.shape:
                gathered.append(True)
                return (at(args[0], batch.reads), *args[1:])
            return None

        hook = self.root.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            logits = self.skipper.forward(batch.ids, layer, hidden).logits
        finally:
            hook.remove()
        logits = logits if gathered else at(logits, batch.reads)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = logits.gather(-1, batch.targets[..., None])[..., 0] - logits.logsumexp(-1)
        if questions is None or batch.members[0] >= len(questions.passages):
            return targets.float().cpu()
        logp = logits[:, 0].log_softmax(-1)
        starts = torch.tensor(questions.starts, device=logp.device)
        first = logp[:, starts]
        entropy = -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1, keepdim=True)
        other = logp.index_fill(-1, starts, -torch.inf).amax(-1, keepdim=True)
        return torch.cat([first, other, entropy, targets], -1).float().cpu()


def _spans(rows: Sequence[tuple[tuple[int, int], ...] | None]) -> Spans:
    return Spans.of([list(ranges or ()) for ranges in rows])
