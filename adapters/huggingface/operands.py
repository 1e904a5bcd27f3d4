"""Serves operands to methods: each by name, computed when first asked for, for one attention call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface.discover import output_projection
from headpatch.adapters.huggingface.lse import attend, repeat_kv, score_dtype
from headpatch.errors import EngineError
from headpatch.operands import Segment, Supply

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.mass import Call
    from headpatch.adapters.huggingface.plan import Edit
    from headpatch.adapters.huggingface.rows import Rows

__all__ = ["SUPPLIES", "OperandServer"]

_NEVER_WITH = ("position_bias", "implementation_branch", "tensor_parallel")
_PROMPT = (*_NEVER_WITH,)
SUPPLIES: dict[str, Supply] = {
    "first_token": Supply(not_with=_NEVER_WITH, note="all masks, caches and packings"),
    "spans": Supply(not_with=_NEVER_WITH, note="given with handle.inputs(spans=...)"),
    "image_tokens": Supply(not_with=_NEVER_WITH, note="where the model's config names an image token"),
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
    "without_image": Supply(note="companion rows of the same batch, given with handle.inputs(without_image=...)"),
    "all_heads": Supply(not_with=("tensor_parallel",)),
}
"""What this adapter supplies, and with which features of a layer it cannot; features are found by discover.py."""


class OperandServer:
    """Operands of one attention call of one layer."""

    def __init__(self, module: nn.Module, state: LayerState, call: Call, rows: Rows | None) -> None:
        self.module, self.state, self.call, self.rows = module, state, call, rows

    def operands_of(self, edit: Edit, start: int, stop: int) -> dict[str, Any]:
        """Everything that an edit's method asked for, for queries start..stop, its state, and ``heads``."""
        given = self._asked(edit, start, stop)
        for name in edit.method.state:
            given[name] = self.frozen((*edit.key, name), lambda n=name: edit.method.derive(self._asked(edit))[n])
        return given

    def _asked(self, edit: Edit, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        given: dict[str, Any] = {"heads": edit.heads}
        for name in edit.method.needs if edit.method.segments() else edit.method.operands():
            if name == "arrays":
                given[name] = edit.arrays
            elif name == "window_scores":
                given[name] = self.window_scores(int(getattr(edit.method, "window", 32)))
            elif name != "all_heads":
                given[name] = self.get(name, start, stop)
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
        if name in ("first_token", "spans", "image_tokens", "column_sinks", "residual_sinks"):
            return self.segment_masks([Segment(name)])(start, stop)[0]
        raise EngineError(f"layer {self.state.name}: operand {name!r} has no single value in this call")

    # --- rows -------------------------------------------------------------------------------------------------------------

    def _known(self) -> Rows:
        if self.rows is None:
            raise EngineError(f"layer {self.state.name} was called outside its model's forward; call the model")
        return self.rows

    def _first(self, of_keys: bool = False) -> Tensor:
        """[b] or [b, q] column of the first real token, of the queries or (in cross-attention another thing) of the keys."""
        rows, q = self._known(), self.call.q
        first = rows.cross_first if of_keys and self.state.part == "cross" else rows.first
        if first is None:
            return torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
        first = first.to(q.device)
        return first if first.shape[0] == q.shape[0] else first.repeat_interleave(q.shape[0] // first.shape[0], 0)

    def position(self) -> Tensor:
        """[b, q] position of each query, counted from its row's first real token."""
        rows, n_q = self._known(), self.call.q.shape[2]
        first = self._first()
        columns = torch.arange(n_q, device=first.device) + rows.past
        return columns[None] - (first if first.ndim == 2 else first[:, None])

    def prompt_len(self) -> Tensor:
        """[b] real tokens of each row's prompt."""
        rows, q = self._known(), self.call.q
        given = rows.known.get("prompt_len")
        if given is not None and self.state.part in ("text", "decoder", "cross"):
            b = q.shape[0]
            if not len(given) or b % len(given):
                raise EngineError(
                    f"inputs(prompt_len=...) has {len(given)} entries, the batch has {b} rows: give one per row"
                )
            length = torch.as_tensor(given, device=q.device).repeat_interleave(b // len(given), 0)
            self._kept()["prompt_len",] = length  # later steps of the request come without it
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
            return torch.full((q.shape[0],), rows.length, device=q.device) - first

        return self.frozen(("prompt_len",), count, whole_prompt=False)

    def frozen(self, key: tuple[Any, ...], compute: Any, whole_prompt: bool = True) -> Tensor:
        """A tensor that is derived from the prompt once and kept with the cache."""
        rows, kept = self._known(), self._kept()
        place = (self.state.name, *key) if whole_prompt else key
        if place not in kept:
            started = rows.past if isinstance(rows.past, int) else int(rows.past)
            if started > 0:
                raise EngineError(
                    f"layer {self.state.name}: operand {key[-1]!r} is derived from the prompt, which came in before this call; "
                    "start with an empty cache"
                )
            if whole_prompt and bool((self.prompt_len() > rows.length).any()):
                raise EngineError(
                    f"layer {self.state.name}: operand {key[-1]!r} needs the whole prompt in one call, and it came in chunks; "
                    "turn chunked prefill off"
                )
            kept[place] = compute()
        return kept[place]

    def _kept(self) -> dict[tuple[Any, ...], Tensor]:
        """State of this request: kept with its cache, or with the call until that has made one."""
        rows = self._known()
        kept: dict[tuple[Any, ...], Tensor] = (
            rows.derived if rows.cache is None else rows.cache.__dict__.setdefault("headpatch_state", {})
        )
        return kept

    def _layer_input(self) -> Tensor:
        found = self._known().layer_inputs.get(self.state.layer)
        if found is None:
            raise EngineError(f"layer {self.state.name}: operand 'layer_input' was not seen in this call")
        return found

    def _companions(self) -> Tensor:
        rows, b = self._known(), self.call.q.shape[0]
        given = rows.known.get("without_image")
        if given is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'without_image' is needed; put each prompt's copy without its image into the "
                "batch and name its row: with handle.inputs(without_image=[1, None]): ..."
            )
        if len(given) != b:
            raise EngineError(f"inputs(without_image=...) names {len(given)} rows, the batch has {b}")
        for row, other in enumerate(given):
            if other is not None and not (0 <= other < b and other != row):
                raise EngineError(
                    f"inputs(without_image=...)[{row}] is {other}: name another row, 0 to {b - 1}, or None"
                )
        return torch.tensor([-1 if r is None else int(r) for r in given], device=self.call.q.device)

    # --- attention statistics ---------------------------------------------------------------------------------------------

    def lse(self, start: int, stop: int) -> Tensor:
        """[b, H, q] log-sum-exp of the untouched scores, learned sinks included."""
        call = self.call
        if call.seen.kind == "causal" and start == 0 and stop == call.q.shape[2]:
            k, v = call.k[:, :, : call.seen.keys], call.v[:, :, : call.seen.keys]
            lse = attend(call.q, k, v, causal=True, scale=call.scale, softcap=call.softcap)[1]
        else:  # a block of the mask at a time
            step = 1024
            lse = torch.cat([self._block_lse(i, min(stop, i + step)) for i in range(start, stop, step)], 2)
        return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.to(lse)[:, None])

    def _block_lse(self, start: int, stop: int) -> Tensor:
        call, k, v = self.call, self.call.k, self.call.v
        mask = call.seen.block(start, stop)
        if mask is not None and mask.shape[-1] < k.shape[2]:
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        return attend(call.q[:, :, start:stop], k, v, mask=mask, scale=call.scale, softcap=call.softcap)[1]

    def _weights(self, start: int, stop: int) -> Tensor:
        """[b, H, stop - start, n] attention of a block of queries, fp32."""
        call = self.call
        q = call.q[:, :, start:stop].to(score_dtype(call.q))
        scores = torch.matmul(q, repeat_kv(call.k, call.groups).to(q.dtype).transpose(2, 3)) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        mask = call.seen.block(start, stop)
        if mask is not None:
            if mask.shape[-1] < scores.shape[-1]:
                mask = nn.functional.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            else:
                scores = scores + mask.to(scores.dtype)
        return torch.exp(scores - self.lse(start, stop).unsqueeze(-1)).nan_to_num(0.0)

    def _real_queries(self, start: int, stop: int) -> Tensor:
        """[b, q] which queries of this call are real tokens."""
        rows = self._known()
        real = self.position() >= 0
        if rows.real is not None and isinstance(rows.past, int):
            real = real & rows.real[:, rows.past : rows.past + rows.length].to(real.device)
        return real[:, start:stop]

    def column_means(self) -> Tensor:
        """[b, H, n]: attention each key receives, averaged over the real queries of this call that can see it."""
        total, count = torch.zeros(()), torch.zeros(())
        n_q, step = self.call.q.shape[2], 256
        for start in range(0, n_q, step):
            stop = min(n_q, start + step)
            real = self._real_queries(start, stop)[:, None, :, None]
            total = total.to(self.call.q.device) + (self._weights(start, stop) * real).sum(2)
            mask = self.call.seen.block(start, stop)
            if mask is None:
                mask = torch.ones(1, 1, stop - start, self.call.k.shape[2], dtype=torch.bool, device=real.device)
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            if seen.shape[-1] < self.call.k.shape[2]:
                seen = nn.functional.pad(seen, (0, self.call.k.shape[2] - seen.shape[-1]))
            count = count.to(real.device) + (seen & real).sum(2)
        return total / count.clamp_min(1)

    def window_scores(self, window: int) -> Tensor:
        """[b, H, w, n] attention of the last w queries of this call."""
        n_q = self.call.q.shape[2]
        return self._weights(max(0, n_q - window), n_q)

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
        elif segment.kind == "image_tokens":
            mask = self._columns(self._image_columns())
        elif segment.kind == "column_sinks":
            threshold = float(segment.option("threshold"))  # type: ignore[arg-type]
            mask = self._columns(self.frozen(("column_sinks", threshold), lambda: self.column_means() > threshold))
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

    def _extreme(self, dims: tuple[int, ...], threshold: float) -> Tensor:
        """[b, n] keys whose residual stream exceeds `threshold` times its own root mean square in one of `dims`."""
        x = self._layer_input().float()
        rms = torch.sqrt(x.square().mean(-1) + 1e-6)
        return (x[..., list(dims)].abs().amax(-1) / rms >= threshold) & self._real_queries(0, x.shape[1])

    def _offset(self) -> Any:
        """Column of this layer's key 0."""
        rows, layer = self._known(), self.state.cache_layer
        return rows.offsets.get(layer, 0) if layer is not None and self.state.part != "cross" else 0

    def _columns(self, mask: Tensor) -> Tensor:
        """Absolute columns [b, c] or [b, H, c] -> this layer's keys, [b, 1 or H, 1, n]; columns not yet named are False."""
        call, offset = self.call, self._offset()
        mask = mask.to(call.q.device)
        mask = mask if mask.ndim == 3 else mask[:, None]
        n, b = call.k.shape[2], call.q.shape[0]
        mask = nn.functional.pad(mask, (0, max(0, offset + n - mask.shape[-1])))[..., offset : offset + n]
        if mask.shape[0] != b:
            mask = mask.repeat_interleave(b // mask.shape[0], 0)
        return mask[:, :, None]

    def _span_mask(self) -> Tensor:
        """[b, 1, 1, n] keys of this layer that lie in a span of their row."""
        rows = self._known()
        spans = rows.known.get("spans")
        if spans is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'spans' is needed and none were given: with handle.inputs(spans=[...]): ..."
            )
        b, inside = self.call.q.shape[0], spans.inside
        if not len(inside) or b % len(inside):
            raise EngineError(f"inputs(spans=...) has {len(inside)} entries, the batch has {b} rows: give one per row")
        if self.state.part != "cross":
            self._check_spans(spans.ranges)
        first = self._first(of_keys=True)
        start = first if first.ndim == 1 else first[:, 0]
        inside = inside.to(first.device).repeat_interleave(b // len(inside), 0)
        columns = torch.arange(self.call.k.shape[2], device=first.device)[None] + self._offset() - start[:, None]
        last = inside.shape[1] - 1
        found = torch.gather(inside, 1, columns.clamp(0, last)) & (columns >= 0) & (columns <= last)
        return found[:, None, None].to(self.call.q.device)

    def _check_spans(self, spans: list[list[tuple[int, int]]]) -> None:
        """Refuse spans that end beyond their row's prompt, once per request: they would grow into what is generated."""
        kept = self._kept()
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

    def _image_columns(self) -> Tensor:
        rows = self._known()
        token = rows.known.get("image_token_id")
        if token is None:
            raise EngineError(
                f"layer {self.state.name}: operand 'image_tokens': the model's config names no image token"
            )
        ids = rows.input_ids if rows.input_ids is not None else rows.known.get("input_ids")

        if rows.images is None:
            if ids is None:
                raise EngineError(f"layer {self.state.name}: operand 'image_tokens' needs input_ids in the call")
            kept, here = self._kept(), ids == token
            before = kept.get(("image_tokens",))
            past = int(rows.past)
            if before is not None and past:
                here = torch.cat([nn.functional.pad(before, (0, past - before.shape[1])), here], 1)
            elif past:
                raise EngineError(
                    f"layer {self.state.name}: operand 'image_tokens': the prompt came in before this call; start with an empty "
                    "cache"
                )
            rows.images = kept["image_tokens",] = here
        return rows.images
