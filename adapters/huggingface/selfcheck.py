"""Proof that a patched layer does what it should, on random tensors and through the same code path as the model's calls.

One identity edit must come out bit-equal to the untouched kernel; the layer's real edits must equal a plain float64 reference that
edits the full softmax. Under torch.compile the same two run compiled. Where edits need more than the first token, the call is a
decoding step after a prompt: spans, pictures, residual streams and the prompt's length are made up, and what is frozen at its end
is derived from them eagerly, as it is when a model generates.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import attention as patched
from headpatch.adapters.huggingface.images import ClassTokenRows
from headpatch.adapters.huggingface.masks import Visible
from headpatch.adapters.huggingface.mass import Call, FirstKey
from headpatch.adapters.huggingface.operands import OperandServer
from headpatch.adapters.huggingface.plan import LayerPlan, home
from headpatch.adapters.huggingface.rows import Rows
from headpatch.adapters.huggingface.spans import Spans

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller
    from headpatch.adapters.huggingface.kvplan import Policy

__all__ = ["CheckResult", "check_layers"]

CANNOT = frozenset({"without_image", "o_proj"})
"""Operands that cannot be made up: a companion row of the batch, and the model's own weights."""
IMAGE_TOKEN = 7

TOKENS = 17
BOUND = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from the reference, as a share of the largest output."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one layer's self-check: `error` is the largest difference from the reference over the largest output."""

    layer: str
    compiled: bool
    identity_equal: bool
    error: float
    bound: float
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether both halves held."""
        return not self.skipped and self.identity_equal and self.error <= self.bound

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        if self.skipped:
            return f"{self.layer} ({how}): not run, {self.skipped}"
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{self.layer} ({how}): {verdict}; identity {'bit-equal' if self.identity_equal else 'DIFFERS'}, "
            f"error {self.error:.1e} (bound {self.bound:.0e})"
        )


def check_layers(controller: Controller, paths: list[str], compiled: bool) -> tuple[CheckResult, ...]:
    """Check one layer of each kind (same shape, same methods) among `paths`."""
    seen, results = set(), []
    for path in paths:
        state = controller.states[path]
        edits = () if state.plan is None else state.plan.edits
        policy = state.policy
        window = None if policy is None else (bool(policy.full), bool(policy.streaming), policy.sink, policy.recent)
        kind = (state.part, state.num_heads, state.num_kv_heads, window, tuple(e.method for e in edits))
        if kind not in seen:
            seen.add(kind)
            results.append(_check(controller.root.get_submodule(path), state, compiled))
    return tuple(results)


def _check(module: Any, state: patched.LayerState, compiled: bool) -> CheckResult:
    plan, policy = state.plan or LayerPlan.build(state.num_heads, []), state.policy
    beyond = plan.needs - {"first_token"}
    if missing := beyond & CANNOT:
        return CheckResult(state.name, compiled, True, 0.0, 0.0, f"its methods need {', '.join(sorted(missing))}")
    if policy is not None and beyond:
        return CheckResult(
            state.name, compiled, True, 0.0, 0.0, "some heads drop keys beside edits that need operands"
        )
    device, _ = home(module)
    dtype = next((p.dtype for p in module.parameters() if p.dtype in BOUND), torch.float32)
    width = int(getattr(module, "head_dim", 0) or 32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, TOKENS, width, generator=generator).to(device, dtype)
        for heads in (state.num_heads, state.num_kv_heads, state.num_kv_heads)
    )
    scale = width**-0.5
    causal = bool(getattr(module, "is_causal", True)) and state.part != "cross"
    rows: Rows | None = None
    if plan.needs - {"first_token"}:
        rows = _prompt(module, state, q, k, v, scale, causal)
        q = q[:, :, -1:]

    # A few tokens are to show what a policy drops.
    if policy is not None:
        policy = dataclasses.replace(policy, sink=min(policy.sink, 2), recent=min(policy.recent, 4))
        rows = Rows(length=TOKENS)

    def call(with_plan: LayerPlan | None, with_policy: Policy | None = None) -> Tensor:
        stand_in = _StandIn(module, _state(state, with_plan, with_policy, rows))

        def run(stand_in: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return patched.headpatch_attention(stand_in, q, k, v, None, scaling=scale, is_causal=causal)[0]

        # The compiler counts what it compiled by code object, and refuses after some: this one is used once.
        run.__code__ = run.__code__.replace()
        with torch.no_grad():
            return (torch.compile(run, fullgraph=True, dynamic=False) if compiled else run)(stand_in, q, k, v)

    untouched = call(None)
    neutral = LayerPlan.build(plan.num_heads, [])
    seen = Visible("causal" if causal and q.shape[2] > 1 else "all", q.shape[2], TOKENS, q.device)
    server = OperandServer(
        module, _state(state, plan, None, rows), Call(q, k, v, seen, scale, None, None, FirstKey()), rows or Rows()
    )
    error = (call(plan, policy).double() - _reference(plan, policy, server)).abs().max()
    size = untouched.double().abs().max().clamp_min(1e-9)
    same = torch.equal(call(neutral), untouched)
    if policy is not None:  # a window that drops nothing; two kernel calls may round otherwise than one
        wide = call(neutral, dataclasses.replace(policy, recent=TOKENS))
        same = bool((wide - untouched).abs().max() / size <= BOUND[dtype])
    return CheckResult(state.name, compiled, same, float(error / size), BOUND[dtype])


class _Hooks:
    """Stands for a stack's hooks while one call is made."""

    def __init__(self, rows: Rows | None) -> None:
        self.rows = rows

    def current(self) -> Rows | None:
        return self.rows


class _Kept:
    """Stands for a cache: what is frozen at the prompt's end hangs on it."""


def _state(
    state: patched.LayerState, plan: LayerPlan | None, policy: Policy | None, rows: Rows | None
) -> patched.LayerState:
    hooks: Any = _Hooks(rows)
    parts = (None, None) if policy is None else policy.split(plan)
    return dataclasses.replace(
        state, plan=plan, policy=policy, parts=parts, observers=[], hooks=hooks, cache_layer=None
    )


def _prompt(
    module: Any, state: patched.LayerState, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> Rows:
    """Run a made-up prompt of all tokens but the last through the layer; returns the rows of the step that follows."""
    length = TOKENS - 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((1, TOKENS), IMAGE_TOKEN + 1)
    ids[:, 3:8] = IMAGE_TOKEN
    stream = torch.randn(1, TOKENS, getattr(module.config, "hidden_size", 0) or 64, generator=generator)
    stream[:, [0, 5], ::2] *= 50.0  # a sink in the text and one in the picture, whatever the dimensions
    known = {
        "prompt_len": [length], "spans": Spans.of([[(2, 4), (9, 11)]]), "image_token_id": IMAGE_TOKEN, "pictures": True,
        "class_token": [ClassTokenRows(0, _AnyLayer())],
    }  # fmt: skip
    kept = _Kept()

    def rows(past: int, stop: int) -> Rows:
        made = Rows(first=torch.zeros(1, dtype=torch.long, device=q.device), past=past, length=stop - past, cache=kept)
        made.input_ids = ids[:, past:stop].to(q.device)
        made.layer_inputs[state.layer] = stream[:, past:stop].to(q)
        made.known = known
        return made

    stand_in = _StandIn(module, _state(state, state.plan, None, rows(0, length)))
    with torch.no_grad():
        q, k, v = (x[:, :, :length] for x in (q, k, v))
        patched.headpatch_attention(stand_in, q, k, v, None, scaling=scale, is_causal=causal)
    step = rows(length, TOKENS)
    step.known = {**known, "pictures": False}
    return step


class _AnyLayer(dict[int, Tensor]):
    """Stands for a vision tower that read one picture of five patches, and found another one of them outstanding in each layer."""

    def __missing__(self, layer: int) -> Tensor:
        return torch.tensor([[1.0, 2.0, 3.0, 2.0, 50.0]]).roll(layer, -1)


class _StandIn(nn.Module):
    """What an attention function reads of its module, without the module's hooks and weights."""

    def __init__(self, module: Any, state: patched.LayerState) -> None:
        super().__init__()
        self._headpatch = state
        self.config = module.config
        self.num_key_value_groups = state.num_heads // state.num_kv_heads
        self.is_causal = getattr(module, "is_causal", True)
        self.eval()


def _reference(plan: LayerPlan, policy: Policy | None, server: OperandServer) -> Tensor:
    """[1, q, H, d] in float64: the edits one after the other on full rows of scores."""
    call = server.call
    groups, n_q = call.groups, call.q.shape[2]
    q, k, v = (
        call.q.double(),
        call.k.double().repeat_interleave(groups, 1),
        call.v.double().repeat_interleave(groups, 1),
    )
    scores = q @ k.transpose(2, 3) * call.scale
    mask = call.seen.block(0, n_q)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if policy is not None:
        at = torch.arange(TOKENS, device=q.device)
        dropped = (at >= policy.sink) & (at <= at[:, None] - policy.recent)
        heads = [kv * groups + g for kv in policy.streaming for g in range(groups)]
        scores[:, heads] = scores[:, heads].masked_fill(dropped, -math.inf)
    masks = server.segment_masks(plan.segments)(0, n_q) if plan.segments else []
    for edit, owned in zip(plan.attention, plan.owned, strict=True):
        given = server.operands_of(edit, 0, n_q)
        inside = [masks[i].expand_as(scores)[:, edit.heads] for i in owned]
        chosen, strength = scores[:, edit.heads], edit.strength.detach().double()
        if edit.method.family == "scores":
            free = ~torch.isneginf(chosen)
            for place, one in enumerate(inside):
                new = edit.method.transform(  # type: ignore[attr-defined]
                    chosen.masked_fill(~(one & free), -math.inf), strength, {**given, "segment": place}
                )
                scores[:, edit.heads] = torch.where(one & free, new.double(), scores[:, edit.heads])
                free = free & ~one
            continue
        p, free, parts = chosen.softmax(-1), torch.ones_like(inside[0]), []
        for one in inside:  # a key that lies in two of a method's segments belongs to the first
            parts.append(one & free)
            free = free & ~one
        parts.append(free)
        shares = torch.stack([(p * part).sum(-1) for part in parts])
        new = edit.method.reshare(shares, strength, given)  # type: ignore[attr-defined]
        factor = (new / shares).where(shares > 0, 1.0)
        whole = torch.stack([f.unsqueeze(-1) * part for f, part in zip(factor, parts, strict=True)]).sum(0)
        scores[:, edit.heads] = chosen + whole.log()
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    for edit in plan.family("output"):
        given = server.operands_of(edit, 0, n_q)
        if "all_heads" in edit.method.operands():
            given["all_heads"] = out
        out[:, :, edit.heads] = edit.method.edit(  # type: ignore[attr-defined]
            out[:, :, edit.heads], edit.strength.detach().double(), given
        ).double()
    return out
