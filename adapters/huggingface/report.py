"""What a recipe did to a model, and whether it fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.adapters.huggingface.discover import find_layout
from headpatch.adapters.huggingface.selfcheck import CheckResult, check_layers

if TYPE_CHECKING:
    from headpatch.adapters.huggingface.controller import Controller, Record

__all__ = ["CacheReport", "LayerReport", "Report", "build_report"]


@dataclass(frozen=True)
class CacheReport:
    """What the cache of the last call holds, under a cache policy.

    Attributes
    ----------
    columns
        Tokens a row, padding included.
    stored
        Bytes allocated for keys and values in the layers under the policy, spare slots included.
    untouched
        Bytes of the same layers and tokens in an untouched cache, without spare slots.
    """

    columns: int
    stored: int
    untouched: int

    @property
    def saved(self) -> int:
        """Bytes saved; negative while a few tokens are less than the block that storage grows by."""
        return self.untouched - self.stored

    def __str__(self) -> str:
        held, plain = self.stored / 2**20, self.untouched / 2**20
        times = f", {self.untouched / self.stored:.2f} times less" if self.stored else ""
        return (
            f"cache of the last call, {self.columns} tokens a row: {held:.1f} MiB in place of {plain:.1f} MiB{times}"
        )


@dataclass(frozen=True)
class LayerReport:
    """One patched layer.

    Attributes
    ----------
    part, layer, path
        Attention stack, 0-based layer, and the module's name in the model.
    edits
        Per method, ``{head: strength}`` of the heads that are not at the identity.
    calls
        Eager calls since the layer was patched; compiled calls are not counted.
    traced
        How often a compiler traced the patched path.
    policy
        What a cache policy keeps here, in words; empty without one.
    """

    part: str
    layer: int
    path: str
    edits: tuple[tuple[str, dict[int, float]], ...]
    calls: int
    traced: int
    policy: str = ""


@dataclass(frozen=True)
class Report:
    """What was patched. ``str(report)`` is for people.

    Attributes
    ----------
    recipe, model
        Names.
    layers
        One :class:`LayerReport` per patched layer.
    identity
        Heads that the recipe names at the identity strength; they are not touched.
    silent
        Attention modules of the model that do not route, and so cannot be patched.
    self_check
        Results per kind of layer, or an empty tuple where none was run.
    cache
        What the cache of the last call holds; None without a cache policy, or before the first call with a cache.
    windowed
        Layers that the recipe's cache policy leaves alone because they have a window of their own.
    """

    recipe: str
    model: str
    layers: tuple[LayerReport, ...]
    identity: int
    silent: tuple[str, ...]
    self_check: tuple[CheckResult, ...] = ()
    cache: CacheReport | None = None
    windowed: tuple[int, ...] = ()

    @property
    def num_heads(self) -> int:
        """Edits in all: heads counted once per method."""
        return sum(len(heads) for layer in self.layers for _, heads in layer.edits)

    @property
    def fires(self) -> bool | None:
        """Whether every patched layer was called, or traced with a passed self-check; None before the first call."""
        if not self.layers or all(not (r.calls or r.traced) for r in self.layers):
            return None
        passed = bool(self.self_check) and all(c.passed for c in self.self_check)
        return all(r.calls or (r.traced and passed) for r in self.layers)

    def __str__(self) -> str:
        heads, layers = self.num_heads, len(self.layers)
        lines = [f"{self.recipe} on {self.model}: {heads} head edits in {layers} layers"]
        for r in self.layers:
            edits = "; ".join([*(f"{name} {_compact(given)}" for name, given in r.edits), *filter(None, [r.policy])])
            fired = f"{r.calls} calls" + (f", traced {r.traced}x" if r.traced else "")
            lines.append(f"  {r.part}.{r.layer}: {edits} [{fired}]")
        if self.windowed:
            lines.append(
                f"  layers {', '.join(map(str, self.windowed))} have a window of their own: their cache is left as it is"
            )
        if self.cache is not None:
            lines.append(f"  {self.cache}")
        if self.identity:
            lines.append(f"  {self.identity} heads at the identity strength: not touched")
        if self.silent:
            lines.append(f"  not patchable (own softmax): {', '.join(self.silent)}")
        lines += [f"  self-check {check}" for check in self.self_check]
        return "\n".join(lines)


def build_report(controller: Controller, record: Record, self_check: bool | None) -> Report:
    """Report on one recipe; see :meth:`HuggingFaceHandle.report`."""
    layers, identity = [], 0
    policies = [patch for patch in record.resolved if patch.method.family == "cache"]
    for path, state in controller.states.items():
        edits = []
        for patch in record.resolved:
            if patch.part != state.part or state.layer not in patch.heads or patch.method.family == "cache":
                continue
            values = record.strengths[patch.index, patch.part, state.layer].detach().tolist()
            pairs = dict(zip(patch.heads[state.layer], values, strict=True))
            touched = {h: v for h, v in pairs.items() if record.trainable or v != patch.method.identity()}
            if touched:
                edits.append((patch.method.name, touched))
        mine = state.policy is not None and any(p.part == state.part for p in policies)
        if edits or mine:
            words = str(state.policy) if mine else ""
            layers.append(LayerReport(state.part, state.layer, path, tuple(edits), state.calls, state.traced, words))
    for patch in record.resolved:
        if not record.trainable and patch.method.family != "cache":
            identity += sum(v == patch.method.identity() for heads in patch.heads.values() for v in heads.values())
    layers.sort(key=lambda r: (r.part, r.layer))
    if self_check is None:
        self_check = any(r.traced and not r.calls for r in layers)
    checks: tuple[CheckResult, ...] = ()
    if self_check:
        checks = check_layers(controller, [r.path for r in layers], compiled=any(r.traced for r in layers))
    root: Any = controller.root
    name = getattr(root.config, "_name_or_path", "") or type(root).__name__
    cache, ledger = None, controller.ledger
    if policies and ledger is not None and ledger.held:
        cache = CacheReport(ledger.columns, ledger.stored, ledger.untouched)
    kept = {r.layer for r in layers if r.policy}
    windowed = tuple(sorted({layer for patch in policies for layer in patch.heads} - kept))
    return Report(
        record.recipe.name or "recipe",
        name,
        tuple(layers),
        identity,
        find_layout(root).silent,
        checks,
        cache,
        windowed,
    )


def _compact(given: dict[int, float]) -> str:
    values = set(given.values())
    if len(values) == 1:
        return f"{next(iter(values)):g} on heads {', '.join(map(str, given))}"
    return ", ".join(f"{h}: {v:g}" for h, v in given.items())
