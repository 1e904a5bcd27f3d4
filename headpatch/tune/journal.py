"""The state of a run that can be interrupted: named tensors in one file, which appears whole or stays as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headpatch.errors import HeadpatchError
from headpatch.tensorfile import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Journal"]


class Journal:
    """Tensors by name, in memory and, where a path is given, in a safetensors file.

    Parameters
    ----------
    path
        The file; None keeps nothing on a disk.
    settings
        What the state depends on; a file made under other settings is refused.

    Raises
    ------
    HeadpatchError
        The file belongs to other settings, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: str) -> None:
        self.path, self.settings = None if path is None else Path(path), settings
        self.state: dict[str, Tensor] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        import safetensors

        try:
            with safetensors.safe_open(str(path), "pt") as file:
                written = (file.metadata() or {}).get("settings")
                self.state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
        except (safetensors.SafetensorError, OSError) as error:
            raise HeadpatchError(f"{path} cannot be read: {error}") from None
        if written != self.settings:
            raise HeadpatchError(f"{path} belongs to a run with other settings; delete it to start anew")

    def part(self, prefix: str) -> dict[str, Tensor]:
        """What is kept under names that begin with `prefix` and a dot, by the rest of the name."""
        return {
            key.removeprefix(f"{prefix}."): value for key, value in self.state.items() if key.startswith(f"{prefix}.")
        }

    def keep(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is kept under `prefix`; the tensors are copied to the CPU."""
        self.state = {key: value for key, value in self.state.items() if not key.startswith(f"{prefix}.")}
        self.state |= {
            f"{prefix}.{name}": value.detach().cpu().clone().contiguous() for name, value in tensors.items()
        }
        if self.path is None:
            return
        import safetensors.torch

        with atomic_write(self.path) as file:
            file.write(safetensors.torch.save(self.state, {"settings": self.settings}))
