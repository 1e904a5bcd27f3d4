"""Image tokens of a call: which they are, and which of them the vision tower's class token looks at.

The tower's attention is read while it runs: in the layers that a segment names, one query row of the softmax, that of the class
token, is computed from the queries and keys that the kernel got. The tower's own output stays what it was. What was read goes with
the call, and with the tower's output too, since ``generate()`` encodes pictures before it calls the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.errors import EngineError
from headpatch.operands import Segment

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.attention import LayerState
    from headpatch.adapters.huggingface.controller import Controller
    from headpatch.adapters.huggingface.discover import Layout
    from headpatch.adapters.huggingface.operands import OperandServer
    from headpatch.adapters.huggingface.plan import LayerPlan
    from headpatch.adapters.huggingface.segmentkeys import SegmentKeys

__all__ = [
    "ClassTokenRows", "ClassTokenWatch", "encoded_before", "image_columns", "image_queries", "image_token_of", "salient_columns",
    "tower_layers", "tower_problems",
]  # fmt: skip

SALIENT = "vision_salient"
ON_OUTPUT = "headpatch_class_token"


def image_token_of(config: Any) -> int | None:
    """Id of the image placeholder token, or None where the config names none."""
    token = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if token is None else token


def image_columns(server: SegmentKeys) -> Tensor:
    """[b, columns so far, or fewer] bool: columns of image placeholder tokens; those that are not named are none."""
    rows, name = server.known_rows(), server.state.name
    token = rows.known.get("image_token_id")
    if token is None:
        raise EngineError(f"layer {name}: operand 'image_tokens': the model's config names no image token")
    ids = rows.input_ids if rows.input_ids is not None else rows.known.get("input_ids")
    if rows.images is None:
        if ids is None:
            raise EngineError(f"layer {name}: operand 'image_tokens' needs input_ids in the call")
        kept, here = server.kept(), ids == token
        before = kept.get(("image_tokens",))
        # A compiler must not ask the device: where state is kept, there were calls before this one.
        past = None if torch.compiler.is_compiling() and isinstance(rows.past, Tensor) else int(rows.past)
        if before is not None and past != 0 and not rows.known.get("pictures"):
            # What is generated is no image, and columns that are not named are none: nothing is put together in each step.
            rows.images, rows.image_queries = before[:, :past], torch.zeros_like(here)
            return rows.images
        past = int(rows.past) if past is None else past
        if before is not None and past:
            columns = torch.cat([nn.functional.pad(before, (0, past - before.shape[1])), here], 1)
        elif past:
            raise EngineError(
                f"layer {name}: operand 'image_tokens': the prompt came in before this call; start with an empty cache"
            )
        else:
            columns = here
        rows.images, rows.image_queries = columns, here
        kept["image_tokens",] = columns
    return rows.images


def image_queries(server: SegmentKeys) -> Tensor:
    """[b, queries of this call] bool: which of them are image tokens."""
    image_columns(server)
    found = server.known_rows().image_queries
    assert found is not None
    return found


def salient_columns(server: SegmentKeys, segment: Segment) -> Tensor:
    """[b, columns of the prompt] bool: image tokens whose patch the class token looks at, as the segment's options say."""
    places, name = image_columns(server), server.state.name
    if not bool(places.any()):
        return torch.zeros_like(places)
    seen: list[ClassTokenRows] = server.known_rows().known.get("class_token") or []
    if not seen:
        raise EngineError(
            f"layer {name}: operand 'vision_salient': the vision tower did not run for this call under the recipe; give "
            "pixel_values, or encode the pictures after applying it"
        )
    found = [rows.chosen(segment) for rows in seen]
    chosen = torch.cat([one.flatten() for one in found]).to(places.device)
    # Placeholders take features in reading order. Beams repeat a prompt's row, but its pictures were encoded once.
    copies, rest = divmod(int(places.sum()), chosen.numel())
    fits = copies > 0 and not rest and len(places) % copies == 0
    prompts = places[::copies] if fits else places
    if not fits or not torch.equal(prompts.repeat_interleave(copies, 0), places):
        images = " and ".join(f"{one.shape[0]} images of {one.shape[1]} patches" for one in found)
        raise EngineError(
            f"layer {name}: operand 'vision_salient': the call has {int(places.sum())} image tokens, and the vision tower read "
            f"{images}; each token must stand for one patch"
        )
    return torch.zeros_like(prompts).masked_scatter(prompts, chosen).repeat_interleave(copies, 0)


class ClassTokenRows:
    """What one run of a vision tower showed.

    Attributes
    ----------
    depth
        Layers of the tower.
    rows
        Layer to [images, patches]: attention of the class token to each patch, summed over heads.
    """

    def __init__(self, depth: int, rows: dict[int, Tensor] | None = None) -> None:
        self.depth, self.rows = depth, {} if rows is None else rows

    def chosen(self, segment: Segment) -> Tensor:
        """[images, patches] bool: what the options of a segment choose; see :class:`headpatch.operands.Segment`."""
        options: dict[str, Any] = dict(segment.options)
        layer = _absolute(options["layer"], self.depth)
        try:
            scores = self.rows[layer]
        except KeyError:
            raise EngineError(
                f"operand 'vision_salient': layer {layer} of the vision tower was not seen when these pictures were encoded; "
                "encode them under this recipe"
            ) from None
        if "fence" in options:
            low, high = torch.quantile(scores, scores.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
            return scores > high + float(options["fence"]) * (high - low)
        count = int(float(options["share"]) * scores.shape[-1])
        best = torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


class ClassTokenWatch:
    """Reads the class token's attention in some layers of a vision tower, whenever the tower runs."""

    needs: frozenset[str] = frozenset()

    def __init__(self, controller: Controller, layout: Layout, layers: set[tuple[str, int]]) -> None:
        self.controller, self.layers = controller, layers
        self.depth = _depth(layout)
        tower = layout.attention[next(iter(layers))].stack
        self.registered = [tower.register_forward_pre_hook(self.before), tower.register_forward_hook(self.after)]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A run begins."""
        self.controller.call_data["tower"] = ClassTokenRows(self.depth)

    def record(self, state: LayerState, server: OperandServer, output: Tensor) -> None:
        """Called by a layer of the tower after its attention."""
        run = self.controller.call_data.get("tower")
        if run is not None:
            with torch.no_grad():
                run.rows[state.layer] = server.weights((0,))[:, :, 0, 1:].sum(1)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A run is over: keep what it showed for this call, and with its output for a later one."""
        data = self.controller.call_data
        run = data.pop("tower", None)
        if run is not None and run.rows:
            data["class_token"] = [*data.get("class_token", ()), run]
            if not isinstance(output, tuple):
                setattr(output, ON_OUTPUT, run)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.registered:
            hook.remove()
        for data in (*self.controller.data_by_thread.values(), self.controller.traced_data):
            data.pop("tower", None)


def encoded_before(outputs: Any) -> list[ClassTokenRows]:
    """What the tower showed when it made these outputs, given to the model in place of pictures; empty where nobody looked."""
    found = getattr(outputs.get("image"), ON_OUTPUT, None) if isinstance(outputs, dict) else None
    return [] if found is None else [found]


def tower_layers(plans: Iterable[LayerPlan], layout: Layout) -> set[tuple[str, int]]:
    """Layers of the vision tower that the segments of these plans name, as (part, layer)."""
    named = (layer for plan in plans for layer in _named(plan.segments))
    return {("vision", _absolute(layer, _depth(layout))) for layer in named}


def tower_problems(segments: Iterable[Segment], layout: Layout) -> list[str]:
    """Why the layers of the vision tower that these segments name cannot be read; empty where they can, or there is no tower."""
    depth, words = _depth(layout), []
    for layer in sorted(_named(segments)) if depth else ():
        where = layout.attention.get(("vision", _absolute(layer, depth)))
        if where is None:
            words.append(
                f"operand 'vision_salient': the vision tower has {depth} layers, and layer {layer} is none of them"
            )
        else:
            unlike = [f for f in where.features if f in ("position_bias", "implementation_branch", "tensor_parallel")]
            words += [f"operand 'vision_salient' cannot be had with {f} (in the vision tower)" for f in unlike]
    return words


def _named(segments: Iterable[Segment]) -> set[int]:
    found: set[int] = set()
    for segment in segments:
        if segment.kind == SALIENT:
            found.add(int(segment.option("layer")))  # type: ignore[call-overload]
        found |= _named(segment.minus)
    return found


def _depth(layout: Layout) -> int:
    tower = layout.shape.parts.get("vision")
    return 0 if tower is None else len(tower.num_heads)


def _absolute(layer: int, depth: int) -> int:
    return layer + depth if layer < 0 else layer
