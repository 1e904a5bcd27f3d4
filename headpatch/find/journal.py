"""The work file of a search: every measurement, as soon as it is made, so that an interrupted search goes on where it was.

JSON lines. The first says what the measurements depend on; each other one holds one measurement, under the digest of the recipe and
the sample's name. Lines are only ever appended and flushed to the disk; a last line that was cut off is dropped. A search is a pure
function of its settings and these measurements, so that it takes the same decisions again.
"""

from __future__ import annotations

import array
import base64
import hashlib
import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from torch import Tensor

    from headpatch.find.engine import Outcome

__all__ = ["Journal"]

FORMAT = 1
_PARTS = ("first", "whole", "other", "entropy", "text")


class Journal:
    """Measurements by key, kept in memory and, where a path is given, in a work file.

    Parameters
    ----------
    path
        The work file; None keeps nothing.
    settings
        Plain values that decide what a measurement gives; a file made under others is refused.

    Raises
    ------
    HeadpatchError
        The file belongs to other settings, or is no work file.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[str, Outcome] = {}
        self.vectors: dict[str, Tensor] = {}
        self.reused = 0
        self.file: IO[bytes] | None = None
        header = {"headpatch_work": FORMAT, "settings": hashlib.sha256(_dumps(settings)).hexdigest()}
        if self.path is None:
            return
        if self.path.exists():
            self._read(header)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
        self.file = self.path.open("ab")
        if self.path.stat().st_size == 0:
            self._append(header)

    def get(self, key: str) -> Outcome | None:
        """The measurement under `key`, if it was made."""
        return self.known.get(key)

    def vector(self, key: str) -> Tensor | None:
        """The numbers under `key`, if they were kept."""
        return self.vectors.get(key)

    def keep(self, key: str, vector: Tensor) -> None:
        """Keep numbers [n] that are no measurement of one edit."""
        self.vectors[key] = vector
        if self.file is not None:
            self._append({"key": key, "vector": _pack(vector)})

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep a measurement; it is on the disk when this returns."""
        self.known[key] = outcome
        if self.file is not None:
            parts = {name: _pack(getattr(outcome, name)) for name in _PARTS}
            if outcome.whole is outcome.first:
                del parts["whole"]
            self._append({"key": key, **parts})

    def close(self, delete: bool = False) -> None:
        """Close the work file; `delete` removes it."""
        if self.file is not None:
            self.file.close()
            self.file = None
        if delete and self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(_dumps(line) + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self, header: dict[str, Any]) -> None:
        from headpatch.find.engine import Outcome

        assert self.path is not None
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError:
            raise self._refusal("is no work file of headpatch's") from None
        if lines and (not isinstance(lines[0], dict) or "headpatch_work" not in lines[0]):
            raise self._refusal("is no work file of headpatch's")
        if lines and lines[0] != header:
            raise self._refusal("was made with other data, settings or versions")
        for line in lines[1:]:
            if "vector" in line:
                self.vectors[line["key"]] = _unpack(line["vector"])
                continue
            parts = {name: _unpack(line[name]) for name in _PARTS if name in line}
            parts.setdefault("whole", parts["first"])
            self.known[line["key"]] = Outcome(**parts)
        self.reused = len(self.known)
        if len(whole) < len(data):  # cut off in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _refusal(self, what: str) -> HeadpatchError:
        return HeadpatchError(f"{self.path}: {what}; start afresh with another work file, or with --restart")


def _dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _pack(tensor: Tensor) -> dict[str, Any]:
    raw = array.array("f", tensor.flatten().tolist()).tobytes()
    return {"shape": list(tensor.shape), "data": base64.b64encode(raw).decode()}


def _unpack(packed: dict[str, Any]) -> Tensor:
    import torch

    raw = bytearray(base64.b64decode(packed["data"]))
    flat = torch.frombuffer(raw, dtype=torch.float32).clone() if raw else torch.empty(0)
    return flat.view(packed["shape"])
