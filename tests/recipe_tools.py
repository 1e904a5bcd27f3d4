"""What the recipe tests share: shapes, small recipes, methods of every kind, safetensors files made by hand."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from headpatch import registry
from headpatch.errors import RecipeError
from headpatch.heads import ModelShape, PartShape
from headpatch.methods.base import MassMethod, OutputMethod, param, strength
from headpatch.operands import Segment
from headpatch.policies import WindowMethod

SMOL = PartShape((9,) * 30, (3,) * 30, (64,) * 30)
LLAMA = ModelShape("llama", {"text": SMOL}, "text", "HuggingFaceTB/SmolLM2-135M-Instruct")
# Layers 1 and 2 have no softmax attention; layer 3 has fewer heads.
HYBRID = ModelShape("hybrid", {"text": PartShape((8, 0, 0, 4), (2, 0, 0, 2), (64, 0, 0, 32))}, "text")
SPEECH = ModelShape(
    "whisper",
    {
        "encoder": PartShape((6, 6), (6, 6), (64, 64)),
        "decoder": PartShape((4,) * 3, (4,) * 3, (64,) * 3),
        "cross": PartShape((4,) * 3, (4,) * 3, (64,) * 3),
    },
    "decoder",
)

MODEL_BLOCK = {
    "name": "HuggingFaceTB/SmolLM2-135M-Instruct", "model_type": "llama", "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
    "head_dim": 64,
}  # fmt: skip
FULL = {
    "headpatch": 1,
    "name": "smollm2-135m-instruct/both",
    "description": "Two patches.",
    "model": MODEL_BLOCK,
    "patches": [
        {"method": "zerotuning", "heads": {"1.3": 3.0, "8.*": 2}},
        {"method": "head_scaling", "part": "text", "heads": ["12.0-2", "*.7"], "scale": 0, "positions": "last"},
    ],
    "provenance": {"data": "sst2", "seed": 0, "patched": {"accuracy": 0.9}, "date": "2026-01-31", "curve": [1, 2.5]},
}


def zero(**patch: Any) -> dict[str, Any]:
    """A recipe with one zerotuning patch; keyword arguments are added to the patch."""
    return {"headpatch": 1, "patches": [{"method": "zerotuning", **(patch or {"heads": {"1.3": 2.0}})}]}


@dataclass(frozen=True)
class NeedsArrays(OutputMethod):
    """Adds a vector from the recipe's arrays."""

    amount: float = strength(0.0, ge=-10, le=10, help="factor on the vector")
    name: ClassVar[str] = "test_arrays"
    needs: ClassVar[tuple[str, ...]] = ("arrays",)


@dataclass(frozen=True)
class KeepsHeads(WindowMethod):
    """Keeps everything in the KV heads that it lists."""

    window: int = param(256, ge=1, le=4096, help="tokens that other heads keep")
    name: ClassVar[str] = "test_cache"
    heads_key: ClassVar[str] = "full_kv_heads"


@dataclass(frozen=True)
class ReadsSpans(MassMethod):
    """Strengthens the caller's spans."""

    alpha: float = strength(1.0, ge=0.0, le=100.0, help="factor on the spans")
    dims: tuple[int, ...] = param((), help="some dimensions")
    rounds: Literal[1, 2] = param(1, help="how often")
    strict: bool = param(False, help="whether to be strict")
    low: float = param(0.0, help="below high")
    high: float = param(1.0, help="above low")
    name: ClassVar[str] = "test_spans"

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")

    @property
    def scope(self) -> str:
        return "request"

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("spans"),)


def add_methods(monkeypatch: Any) -> None:
    """Register the methods above for one test."""
    for cls in (NeedsArrays, KeepsHeads, ReadsSpans):
        cls.check()
        monkeypatch.setitem(registry._methods, cls.name, cls)


def safetensors_bytes(name: str = "v", values: tuple[float, ...] = (1.0, 2.0)) -> bytes:
    """A safetensors file with one fp32 vector, made by hand: nothing here imports torch."""
    header = {name: {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(values)}f", *values)


def arrays_recipe(data: bytes, file: str = "task.safetensors", **patch: Any) -> dict[str, Any]:
    """A recipe that needs arrays and says which."""
    return {
        "headpatch": 1,
        "patches": [{"method": "test_arrays", "heads": {"1.3": 2.0}, **patch}],
        "tensors": {"file": file, "sha256": hashlib.sha256(data).hexdigest()},
    }


def disk(folder: Path) -> dict[str, object]:
    """Everything under a folder: what is there, and of files when they were written and, of small ones, what."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            found[str(path.relative_to(folder))] = "folder"
            continue
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and status.st_size < 2**21 else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def complaint(call: Callable[..., object], *args: Any) -> RecipeError | None:
    """The RecipeError that a call raises, if any; every other error comes through."""
    try:
        call(*args)
    except RecipeError as error:
        return error
    return None


def same(left: object, right: object) -> bool:
    """Equal as text: the order of keys counts, and 2 is not 2.0."""
    return json.dumps(left) == json.dumps(right)
