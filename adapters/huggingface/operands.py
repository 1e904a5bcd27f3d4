"""Serves operands to methods: each by name, computed when first asked for, for one attention call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.discover import output_projection
from headpatch.adapters.huggingface.images import image_columns, image_queries, salient_columns
from headpatch.adapters.huggingface.plan import rows_key
from headpatch.adapters.huggingface.rows import state_of
from headpatch.adapters.huggingface.scores import explicit
from headpatch.adapters.huggingface.statistics import CallStatistics
from headpatch.errors import EngineError
from headpatch.operands import Segment, Supply

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.plan import Edit, LayerPlan

__all__ = ["SUPPLIES", "OperandServer"]

_NEVER_WITH = ("position_bias", "implementation_branch", "tensor_parallel")
_PROMPT = (*_NEVER_WITH,)
_CACHE = (*_NEVER_WITH, "no_kv_cache", "keys_after_update", "other_cache_layer", "no_unbounded_layer")
_IMAGE = (*_NEVER_WITH, "no_image_tokens")
SUPPLIES: dict[str, Supply] = {
    "first_token": Supply(not_with=_NEVER_WITH, note="all masks, caches and packings"),
    "spans": Supply(not_with=_NEVER_WITH, note="given with handle.inputs(spans=...)"),
    "beside_spans": Supply(not_with=_NEVER_WITH, note="given with handle.inputs(spans=...)"),
    "image_tokens": Supply(not_with=_IMAGE, note="where the model's config names an image token"),
    "vision_salient": Supply(
        not_with=(*_IMAGE, "no_class_token", "merged_patches"),
        note="LLaVA with a tower that has a class token; frozen at the end of a prompt that comes in one call",
    ),
    "column_sinks": Supply(not_with=_PROMPT, note="frozen at the end of a prompt that comes in one call"),
    "residual_sinks": Supply(not_with=_PROMPT, note="frozen at the end of a prompt that comes in one call"),
    "lse": Supply(not_with=_NEVER_WITH),
    "q": Supply(not_with=("tensor_parallel",)),
    "k": Supply(not_with=("tensor_parallel",)),
    "v": Supply(not_with=("tensor_parallel",)),
    "column_means": Supply(not_with=_NEVER_WITH, note="second tiled pass over the call's queries"),
    "window_scores": Supply(not_with=_NEVER_WITH),
    "layer_input": Supply(note="the decoder layer's input"),
    "o_proj": Supply(not_with=("tensor_parallel",), note="unquantised projections"),
    "arrays": Supply(),
    "prompt_len": Supply(note="from the first call on an empty cache, generate(), or handle.inputs(prompt_len=...)"),
    "position": Supply(),
    "image_queries": Supply(not_with=("no_image_tokens",), note="where the model's config names an image token"),
    "without_image": Supply(
        not_with=("no_image_tokens",),
        note="made by generate() in its prefill; elsewhere rows of the same batch, named with handle.inputs(without_image=...)",
    ),
    "all_heads": Supply(not_with=("tensor_parallel",)),
    "kv_windows": Supply(
        not_with=_CACHE,
        note="dynamic, static and quantised caches; layers with a window of their own are left as they are",
    ),
    "kv_selection": Supply(
        not_with=_CACHE,
        note="dynamic caches, not in compiled calls; layers with a window of their own are left as they are",
    ),
    "depth": Supply(note="for policies that choose tokens"),
}
"""What this adapter supplies, and with which features of a layer it cannot; features are found by discover.py."""


class OperandServer(CallStatistics):
    """Operands of one attention call of one layer; `edited`: whether the call's masses or scores are."""

    edited = False

    def weights(self, queries: Sequence[int]) -> Tensor:
        """[b, H, queries, n] attention of single queries of this call (negative: from its end), as the layer's edits leave it."""
        n_q, plan = self.call.q.shape[2], self.state.plan
        edits = plan.family("mass", "scores") if self.edited and plan is not None else ()
        masks, owned = (
            (self.segment_masks(plan.segments), plan.owned) if edits and plan else (lambda start, stop: [], ())
        )
        found = []
        for query in queries:
            at = query + n_q if query < 0 else query
            if not 0 <= at < n_q:
                raise EngineError(
                    f"layer {self.state.name}: query {query} of a call with {n_q} queries; give {-n_q} to {n_q - 1}"
                )
            found.append(explicit(self.call, edits, masks, owned, self.operands_of, (at, at + 1)))
        return torch.cat(found, 2)

    def operands_of(self, edit: Edit, start: int, stop: int, all_heads: Tensor | None = None) -> dict[str, Any]:
        """Everything that an edit's method asked for, for queries start..stop, its state, and ``heads``."""
        method, alone = edit.method, set(edit.method.state_needs) - set(edit.method.needs)
        asked = method.needs if method.segments() else [o for o in method.operands() if o not in alone]
        given = self._asked(edit, asked, all_heads, start, stop)
        if method.state:
            known = list(dict.fromkeys((*asked, *method.state_needs)))
            for name in method.state:
                derived = self.frozen(
                    (*edit.key, name), lambda n=name: method.derive(self._asked(edit, known, all_heads))[n]
                )
                given[name] = self._of_batch(derived)
        return given

    def _asked(
        self, edit: Edit, names: Iterable[str], all_heads: Tensor | None, start: int = 0, stop: int | None = None
    ) -> dict[str, Any]:
        given: dict[str, Any] = {"heads": edit.heads}
        for name in names:
            if name == "arrays":
                given[name] = edit.arrays
            elif name == "window_scores":
                given[name] = self.window_scores(int(getattr(edit.method, "window", 32)))
            elif name != "all_heads":
                given[name] = self.get(name, start, stop)
            elif all_heads is not None:
                given[name] = all_heads
        return given

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """One operand by name; those with a query dimension for queries start..stop."""
        stop = self.call.q.shape[2] if stop is None else stop
        if name == "q":
            return self.call.q[:, :, start:stop]
        if name in ("k", "v"):
            return getattr(self.call, name)
        if name == "lse":
            return self.lse(start, stop)
        if name == "position":
            return self.position()[:, start:stop]
        if name == "layer_input":
            return self._layer_input()[:, start:stop]
        if name == "column_means":
            return self.column_means()
        if name == "o_proj":
            return output_projection(self.module, self.state.num_heads, self.state.name)
        if name == "prompt_len":
            return self.prompt_len()
        if name == "without_image":
            return self._companions()
        if name == "image_queries":
            return self._of_batch(image_queries(self))[:, start:stop]
        if name in ("first_token", "spans", "beside_spans", "image_tokens", "column_sinks", "residual_sinks"):
            return self.segment_masks([Segment(name)])(start, stop)[0]
        raise EngineError(f"layer {self.state.name}: operand {name!r} has no single value in this call")

    # --- rows -------------------------------------------------------------------------------------------------------------

    def prompt_len(self) -> Tensor:
        """[b] real tokens of each row's prompt."""
        rows, q = self.known_rows(), self.call.q
        given = rows.known.get("prompt_len")
        if given is not None and self.state.part in ("text", "decoder", "cross"):
            b = q.shape[0]
            if not len(given) or b % len(given):
                raise EngineError(
                    f"inputs(prompt_len=...) has {len(given)} entries, the batch has {b} rows: give one per row"
                )
            length = torch.as_tensor(given, device=q.device).repeat_interleave(b // len(given), 0)
            self.kept()["prompt_len",] = length  # later steps of the request come without it
            return length

        def count() -> Tensor:
            if rows.real is not None:
                return rows.real.sum(-1).to(q.device)
            first = self._first()
            if first.ndim == 2:
                if not torch.compiler.is_compiling() and bool((first != first[:, -1:]).any()):
                    raise EngineError(
                        f"layer {self.state.name}: operand 'prompt_len' is not one number in a row that packs several sequences"
                    )
                first = first[:, -1]
            # A stack that is called with pictures or sounds does not say how many positions it makes of them.
            return torch.full((q.shape[0],), rows.length or q.shape[2], device=q.device) - first

        return self.frozen(("prompt_len",), count, whole_prompt=False)

    def restricted(self, plan: LayerPlan) -> bool:
        """Whether this call keeps an edit of the plan to some of its rows."""
        return self.rows is not None and plan.restricted(self.rows.known)

    def rows_of(self, edit: Edit) -> Tensor | None:
        """[b] bool, the rows that an edit is for; None for all."""
        given = None if self.rows is None else self.rows.known.get(rows_key(edit.handle))
        if given is None:
            return None
        b, mask = self.call.q.shape[0], given.mask
        if not len(mask) or b % len(mask):
            raise EngineError(f"inputs(rows=...) has {len(mask)} entries, the batch has {b} rows: give one per row")
        return self._of_batch(mask.to(self.call.q.device))

    def frozen(
        self, key: tuple[Any, ...], compute: Any, whole_prompt: bool = True, of_layer: bool | None = None
    ) -> Tensor:
        """A tensor that is derived from the prompt once and kept with the cache.

        `of_layer`, by default `whole_prompt`, says whether each layer has its own.
        """
        rows, kept = self.known_rows(), self.kept()
        place = (self.state.name, *key) if (whole_prompt if of_layer is None else of_layer) else key
        if place not in kept:
            name = key[0] if key[0] in SUPPLIES else key[-1]
            if rows.begins_at() > 0:
                raise EngineError(
                    f"layer {self.state.name}: operand {name!r} is derived from the prompt, which came in before this call; "
                    "start with an empty cache"
                )
            if whole_prompt and rows.whole is None:  # once in a call: every layer would wait for the device
                rows.whole = not bool((self.prompt_len() > (rows.length or self.call.q.shape[2])).any())
            if whole_prompt and not rows.whole:
                raise EngineError(
                    f"layer {self.state.name}: operand {name!r} needs the whole prompt in one call, and it came in chunks; "
                    "turn chunked prefill off"
                )
            kept[place] = compute()
        return kept[place]

    def kept(self) -> dict[tuple[Any, ...], Tensor]:
        """State of this request: kept with its cache, or with the call until that has made one."""
        rows = self.known_rows()
        return rows.derived if rows.cache is None else state_of(rows.cache)

    def _layer_input(self) -> Tensor:
        found = self.known_rows().layer_inputs.get(self.state.layer)
        if found is None:
            raise EngineError(f"layer {self.state.name}: operand 'layer_input' was not seen in this call")
        return found

    def _companions(self) -> Tensor:
        rows, b = self.known_rows(), self.call.q.shape[0]
        given = rows.known.get("without_image")
        if given is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'without_image' is needed. generate() without an assistant makes each prompt's "
                "copy without its image itself; elsewhere put it into the batch and name its row: "
                "with handle.inputs(without_image=[1, None]): ..."
            )
        if len(given) != b:
            raise EngineError(f"inputs(without_image=...) names {len(given)} rows, the batch has {b}")
        for row, other in enumerate(given):
            if other is not None and not (0 <= other < b and other != row):
                raise EngineError(
                    f"inputs(without_image=...)[{row}] is {other}: name another row, 0 to {b - 1}, or None"
                )
        return torch.tensor([-1 if r is None else int(r) for r in given], device=self.call.q.device)

    # --- segments ---------------------------------------------------------------------------------------------------------

    def segment_masks(self, segments: Sequence[Segment]) -> Any:
        """A function from a range of queries to the segments' key masks, each broadcastable to [b, H, q, n]."""
        whole = {i: self._whole_segment(s) for i, s in enumerate(segments) if s.kind != "first_token"}

        def masks(start: int, stop: int) -> list[Tensor]:
            return [
                self._first_mask(start, stop) if s.kind == "first_token" else whole[i] for i, s in enumerate(segments)
            ]

        return masks

    def _first_mask(self, start: int, stop: int) -> Tensor:
        call, b, n = self.call, self.call.q.shape[0], self.call.k.shape[2]
        columns = torch.arange(n, device=call.q.device)
        if call.first.index is None:
            return (columns == 0).view(1, 1, 1, n)
        mask = columns == call.first.columns(start, stop, b)
        left = call.first.left(start, stop, b)
        return mask if left is None else mask & ~left.unsqueeze(-1)

    def _whole_segment(self, segment: Segment) -> Tensor:
        if segment.kind == "spans":
            mask = self._span_mask()
        elif segment.kind == "beside_spans":
            mask = self._beside_spans()
        elif segment.kind == "image_tokens":
            mask = self._columns(image_columns(self))
        elif segment.kind == "vision_salient":
            key = ("vision_salient", *segment.options)
            mask = self._columns(self.frozen(key, lambda: salient_columns(self, segment), of_layer=False))
        elif segment.kind == "column_sinks":
            key = ("column_sinks", *segment.options)
            mask = self._columns(self.frozen(key, lambda: self._column_sinks(segment)))
        elif segment.kind == "residual_sinks":
            options = dict(segment.options)
            key = ("residual_sinks", *segment.options)
            mask = self._columns(
                self.frozen(key, lambda: self._extreme(tuple(options["dims"]), float(options["threshold"])))  # type: ignore[arg-type]
            )
        else:
            raise EngineError(f"unknown segment {segment.kind!r}")
        for other in segment.minus:
            mask = mask & ~(self._first_mask(0, 1) if other.kind == "first_token" else self._whole_segment(other))
        return mask

    def _column_sinks(self, segment: Segment) -> Tensor:
        """[b, H, n] keys with a high mean attention in the heads whose edits name the segment; none in the others."""
        options: dict[str, Any] = {"per_length": False, "min_queries": 1, **dict(segment.options)}
        edits = self.state.plan.family("mass", "scores") if self.state.plan else ()
        naming = [e.heads for e in edits if any(s.mentions(segment) for s in e.method.segments())]
        heads = torch.cat(naming) if naming else torch.arange(self.call.q.shape[1], device=self.call.q.device)
        total, count = self.column_sums(heads, self.prompt_len())
        threshold: Any = float(options["threshold"])
        if options["per_length"]:
            threshold = (threshold / self.prompt_len().to(total.dtype))[:, None, None]
        found = (total / count.clamp_min(1) > threshold) & (count >= int(options["min_queries"]))
        return found.new_zeros(found.shape[0], self.call.q.shape[1], found.shape[2]).index_copy(1, heads, found)

    def _extreme(self, dims: tuple[int, ...], threshold: float) -> Tensor:
        """[b, n] keys whose residual stream exceeds `threshold` times its own root mean square in one of `dims`."""
        x = self._layer_input().float()
        rms = torch.sqrt(x.square().mean(-1) + 1e-6)
        return (x[..., list(dims)].abs().amax(-1) / rms >= threshold) & self._real_queries(0, x.shape[1])

    def _offset(self) -> Any:
        """Column of this layer's key 0."""
        rows, layer = self.known_rows(), self.state.cache_layer
        return rows.offsets.get(layer, 0) if layer is not None and self.state.part != "cross" else 0

    def _columns(self, mask: Tensor) -> Tensor:
        """Absolute columns [b, c] or [b, H, c] -> this layer's keys, [b, 1 or H, 1, n]; columns not yet named are False."""
        call, offset = self.call, self._offset()
        mask = mask.to(call.q.device)
        mask = mask if mask.ndim == 3 else mask[:, None]
        n = call.k.shape[2]
        mask = nn.functional.pad(mask, (0, max(0, offset + n - mask.shape[-1])))[..., offset : offset + n]
        return self._of_batch(mask)[:, :, None]

    def _of_batch(self, rows: Tensor) -> Tensor:
        """A tensor with an entry per row of the request, for the rows of this call: beams repeat them."""
        b = self.call.q.shape[0]
        return rows if rows.shape[0] == b else rows.repeat_interleave(b // rows.shape[0], 0)

    def _span_mask(self) -> Tensor:
        """[b, 1, 1, n] keys of this layer that lie in a span of their row."""
        rows = self.known_rows()
        spans = rows.known.get("spans")
        if spans is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'spans' is needed and none were given: with handle.inputs(spans=[...]): ..."
            )
        b, inside = self.call.q.shape[0], spans.on(self.call.q.device)
        if not len(inside) or b % len(inside):
            raise EngineError(f"inputs(spans=...) has {len(inside)} entries, the batch has {b} rows: give one per row")
        if self.state.part != "cross":
            self._check_spans(spans.ranges)
        columns = self._key_positions()
        inside = self._of_batch(inside.to(columns.device))
        last = inside.shape[1] - 1
        found = torch.gather(inside, 1, columns.clamp(0, last)) & (columns >= 0) & (columns <= last)
        return found[:, None, None].to(self.call.q.device)

    def _beside_spans(self) -> Tensor:
        """[b, 1, 1, n] keys of the prompt in no span of their row, in rows that have one."""
        marked, columns = self._span_mask(), self._key_positions()
        prompt = columns >= 0
        if self.state.part != "cross":  # whose keys are all prompt
            prompt = prompt & (columns < self.prompt_len()[:, None])
        has_one = self._of_batch(self.known_rows().known["spans"].on(columns.device).any(-1))
        return (prompt & has_one[:, None])[:, None, None].to(marked.device) & ~marked

    def _key_positions(self) -> Tensor:
        """[b, n] position of this layer's keys, counted from the row's first real key; negative before it."""
        first = self._first(of_keys=True)
        start = first if first.ndim == 1 else first[:, 0]
        return torch.arange(self.call.k.shape[2], device=first.device)[None] + self._offset() - start[:, None]

    def _check_spans(self, spans: list[list[tuple[int, int]]]) -> None:
        """Refuse spans that end beyond their row's prompt, once per request: they would grow into what is generated."""
        kept = self.kept()
        if ("spans",) in kept or torch.compiler.is_compiling():
            return
        lengths = self.prompt_len()
        for row, length in enumerate(lengths[:: len(lengths) // len(spans)].tolist()):
            end = max((stop for _, stop in spans[row]), default=0)
            if end > length:
                raise EngineError(
                    f"inputs(spans=...): spans[{row}] ends at token {end}, and that row's prompt has {length}. If the prompt "
                    "comes in chunks, say how long it is with inputs(prompt_len=...)"
                )
        kept["spans",] = lengths
