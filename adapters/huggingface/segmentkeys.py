"""Which keys of one attention call lie in which segments, and what of a request is kept from its prompt on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.images import image_columns, salient_columns
from headpatch.adapters.huggingface.rows import state_of
from headpatch.adapters.huggingface.statistics import CallStatistics
from headpatch.errors import EngineError
from headpatch.kernels.extreme import extreme
from headpatch.operands import OPERANDS, Segment

__all__ = ["SegmentKeys"]

OF_THE_CALL = frozenset({"spans", "beside_spans", "image_tokens", "vision_salient"})
"""Segments that are the same in all layers of a call."""


class SegmentKeys(CallStatistics):
    """Segments of one attention call of one layer, and state of its request."""

    def prompt_len(self) -> Tensor:
        """[b] real tokens of each row's prompt."""
        return self._once("prompt_len", self._prompt_len)

    def _prompt_len(self) -> Tensor:
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

    def frozen(
        self, key: tuple[Any, ...], compute: Any, whole_prompt: bool = True, of_layer: bool | None = None
    ) -> Tensor:
        """A tensor that is derived from the prompt once and kept with the cache.

        `of_layer`, by default `whole_prompt`, says whether each layer has its own.
        """
        rows, kept = self.known_rows(), self.kept()
        place = (self.state.name, *key) if (whole_prompt if of_layer is None else of_layer) else key
        if place not in kept:
            name = key[0] if key[0] in OPERANDS else key[-1]
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

    # --- segments ---------------------------------------------------------------------------------------------------------

    def segment_masks(self, segments: Sequence[Segment]) -> Any:
        """A function from a range of queries to the segments' key masks, each broadcastable to [b, H, q, n]."""
        known: dict[Segment, Tensor] = {}
        whole = {i: self._whole_segment(s, known) for i, s in enumerate(segments) if s.kind != "first_token"}

        def masks(start: int, stop: int) -> list[Tensor]:
            return [
                self._first_mask(start, stop) if s.kind == "first_token" else whole[i] for i, s in enumerate(segments)
            ]

        return masks

    def key_flags(self, segment: Segment) -> Tensor | None:
        """[b or 1, 1, n, 1] ones in the keys' dtype at a segment's keys; None where those are not the same for all heads."""
        key = self._call_key(segment)

        def flags() -> Tensor:
            (mask,) = self.segment_masks([segment])(0, 1)
            return mask.transpose(2, 3).to(self.call.k.dtype)

        if key is not None:
            return self.known_rows().remember(("flags", self.call.k.dtype, *key), flags)
        found = flags()
        return found if found.shape[1] == found.shape[3] == 1 else None

    def _call_key(self, segment: Segment) -> tuple[Any, ...] | None:
        """All that a segment's keys depend on, where the layer is not among it; else None."""
        call, offset = self.call, self._offset()
        kinds = [s.kind for s in (segment, *segment.minus)]
        firsts, alike = "first_token" in kinds, OF_THE_CALL.issuperset(k for k in kinds if k != "first_token")
        if not alike or not isinstance(offset, int) or (firsts and call.first.index is not None):
            return None
        return segment, self.state.part, offset, call.q.shape[0], call.k.shape[2], call.q.device

    def _first_mask(self, start: int, stop: int) -> Tensor:
        call, b, n = self.call, self.call.q.shape[0], self.call.k.shape[2]
        if call.first.index is None:
            return self._once("first", lambda: (torch.arange(n, device=call.q.device) == 0).view(1, 1, 1, n), n)
        columns = torch.arange(n, device=call.q.device)
        mask = columns == call.first.columns(start, stop, b)
        left = call.first.left(start, stop, b)
        return mask if left is None else mask & ~left.unsqueeze(-1)

    def _whole_segment(self, segment: Segment, known: dict[Segment, Tensor]) -> Tensor:
        """[b, 1 or H, 1, n]; `known` keeps what segments that name one another share in this layer."""
        if segment not in known:
            key = self._call_key(segment)
            known[segment] = (
                self._keys_of(segment, known)
                if key is None
                else self.known_rows().remember(key, lambda: self._keys_of(segment, known))
            )
        return known[segment]

    def _keys_of(self, segment: Segment, known: dict[Segment, Tensor]) -> Tensor:
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
            options: dict[str, Any] = dict(segment.options)
            key = ("residual_sinks", *segment.options)
            dims, threshold = tuple(options["dims"]), float(options["threshold"])
            mask = self._columns(self.frozen(key, lambda: self._extreme(dims, threshold)))
        else:
            raise EngineError(f"unknown segment {segment.kind!r}")
        for other in segment.minus:
            # (Of two booleans the greater is the first without the second.)
            mask = mask > (
                self._first_mask(0, 1) if other.kind == "first_token" else self._whole_segment(other, known)
            )
        return mask

    def _column_sinks(self, segment: Segment) -> Tensor:
        """[b, H, n] keys with a high mean attention in the heads whose edits name the segment; none in the others."""
        options: dict[str, Any] = {"per_length": False, "min_queries": 1, **dict(segment.options)}
        edits = self.state.plan.attention if self.state.plan else ()
        naming = [e.heads for e in edits if any(s.mentions(segment) for s in e.segments)]
        if len(naming) == 1:
            heads = naming[0]
        else:
            every = torch.arange(self.call.q.shape[1], device=self.call.q.device)
            heads = torch.cat(naming) if naming else every
        total, count = self.column_sums(heads, self.prompt_len())

        def limit() -> Tensor:
            threshold: Any = float(options["threshold"])
            if options["per_length"]:
                threshold = (threshold / self.prompt_len().to(total.dtype))[:, None, None]
            least = threshold * count.clamp_min(1).to(total.dtype)
            return least.masked_fill(count < int(options["min_queries"]), math.inf)

        causal = self.call.seen.kind == "causal"  # then counts are the same in every layer
        found = total > (self._once("limit", limit, segment.options, count.shape[2]) if causal else limit())
        shape = found.shape[0], self.call.q.shape[1], found.shape[2]
        return self._once("no keys", lambda: found.new_zeros(shape), *shape).index_copy(1, heads, found)

    def _extreme(self, dims: tuple[int, ...], threshold: float) -> Tensor:
        """[b, n] keys whose residual stream exceeds `threshold` times its own root mean square in one of `dims`."""
        x = self._layer_input()
        places = self._once("dims", lambda: torch.tensor(dims, device=x.device), dims)
        found = extreme(x, places, threshold)
        rows = self.known_rows()
        return found if rows.real is None and rows.first is None else found & self._real_queries()

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
        if not isinstance(offset, int) or offset or mask.shape[-1] != n:
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
