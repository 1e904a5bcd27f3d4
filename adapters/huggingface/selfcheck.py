"""Proof that a patched layer does what it should, on random tensors and through the same code path as the model's calls.

One identity edit must come out bit-equal to the untouched kernel; the layer's real edits must equal a plain float64 reference that
edits the full softmax. Under torch.compile the same two run compiled.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import attention as patched
from headpatch.adapters.huggingface.plan import LayerPlan, home

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller

__all__ = ["CheckResult", "check_layers"]

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
        assert state.plan is not None
        kind = (state.part, state.num_heads, state.num_kv_heads, tuple(e.method for e in state.plan.edits))
        if kind not in seen:
            seen.add(kind)
            results.append(_check(controller.root.get_submodule(path), state, compiled))
    return tuple(results)


def _check(module: Any, state: patched.LayerState, compiled: bool) -> CheckResult:
    plan = state.plan
    assert plan is not None
    if plan.needs - {"first_token"}:
        return CheckResult(state.name, compiled, True, 0.0, 0.0, f"its methods need {', '.join(sorted(plan.needs))}")
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

    def call(with_plan: LayerPlan | None) -> Tensor:
        stand_in = _StandIn(module, dataclasses.replace(state, plan=with_plan, observers=[], hooks=None))
        run: Any = patched.headpatch_attention
        if compiled:
            run = torch.compile(run, fullgraph=True, dynamic=False)
        with torch.no_grad():
            return run(stand_in, q, k, v, None, scaling=scale, is_causal=causal)[0]

    untouched = call(None)
    neutral = LayerPlan.build(plan.num_heads, [])
    error = (call(plan).double() - _reference(plan, q, k, v, scale, causal)).abs().max()
    size = untouched.double().abs().max().clamp_min(1e-9)
    return CheckResult(state.name, compiled, torch.equal(call(neutral), untouched), float(error / size), BOUND[dtype])


class _StandIn(nn.Module):
    """What an attention function reads of its module, without the module's hooks and weights."""

    def __init__(self, module: Any, state: patched.LayerState) -> None:
        super().__init__()
        self._headpatch = state
        self.config = module.config
        self.num_key_value_groups = state.num_heads // state.num_kv_heads
        self.is_causal = getattr(module, "is_causal", True)
        self.eval()


def _reference(plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    p = scores.softmax(-1)
    for edit in plan.family("mass"):
        chosen = p[:, edit.heads]
        shares = torch.stack([chosen[..., 0], chosen[..., 1:].sum(-1)])
        new = edit.method.reshare(shares, edit.strength.detach().double(), {"heads": edit.heads})  # type: ignore[attr-defined]
        factor = (new / shares).where(shares > 0, 1.0)
        p[:, edit.heads] = torch.cat(
            [chosen[..., :1] * factor[0][..., None], chosen[..., 1:] * factor[1][..., None]], -1
        )
    out = (p @ v).transpose(1, 2)
    for edit in plan.family("output"):
        out[:, :, edit.heads] = edit.method.edit(  # type: ignore[attr-defined]
            out[:, :, edit.heads], edit.strength.detach().double(), {"heads": edit.heads}
        )
    return out
