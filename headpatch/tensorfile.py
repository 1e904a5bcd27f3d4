"""The safetensors file that may belong to a recipe: where it may lie, whether it is the right one, loading and copying it.

Loading never runs code. The file lies in the recipe's folder; the one exception are links inside a hub cache, where
``snapshots/<revision>/file`` links to ``blobs/<etag>`` of the same repository, and that to a store shared by the whole cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from headpatch.errors import RecipeError
from headpatch.show import short

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_TENSOR_BYTES", "TensorFile", "atomic_write", "check_file_name", "find_tensors"]

MAX_TENSOR_BYTES = 2 << 30
"""Largest safetensors file of a recipe."""
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorFile:
    """A recipe's safetensors file.

    Attributes
    ----------
    file
        As the recipe writes it, relative to its folder.
    sha256
        What the file's bytes must hash to.
    path
        Where it lies on this machine; means nothing where `data` is given.
    data
        The file's bytes, where they came with the recipe and not from a disk.
    """

    file: str
    sha256: str
    path: Path
    data: bytes | None = field(default=None, repr=False)

    def verify(self) -> None:
        """Check size, header and hash, reading the file once.

        Raises
        ------
        RecipeError
            Anything that is wrong.
        """
        digest = hashlib.sha256()
        with self._open() as (file, size):
            head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 9 or length > min(size - 8, _MAX_HEADER) or head[8:] != b"{":
                raise _error("is not a safetensors file", "save arrays with safetensors.torch.save_file")
            digest.update(head)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        self._compare(digest.hexdigest())

    def load(self) -> dict[str, Tensor]:
        """Arrays by name, on the CPU. What is hashed is what is loaded, whatever happened to the file since :meth:`verify`.

        Raises
        ------
        RecipeError
            The file is gone, has changed, is damaged, or holds NaN or infinity.
        """
        import safetensors
        import safetensors.torch

        data = self.read()
        try:
            arrays: dict[str, Tensor] = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise _error(
                f"cannot be read: {short(str(error))}", "save arrays with safetensors.torch.save_file"
            ) from None
        for name, array in arrays.items():
            if array.is_floating_point() and not bool(array.float().isfinite().all()):
                raise _error(f"array {short(name)} holds NaN or infinity", "save finite numbers")
        return arrays

    def copy_to(self, folder: Path) -> None:
        """Copy the file to its place under `folder`; nothing where it lies there already.

        Raises
        ------
        RecipeError
            Another file of that name is there, or the source is no longer what the recipe says.
        """
        target = folder / self.file
        if target.exists():
            try:
                TensorFile(self.file, self.sha256, target).verify()
            except RecipeError:
                raise _error(f"{target} exists and is another file", "save to another folder, or remove it") from None
            return
        digest = hashlib.sha256()
        with self._open() as (file, _), atomic_write(target) as out:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
            self._compare(digest.hexdigest())

    def read(self) -> bytes:
        """The file's bytes, checked."""
        with self._open() as (file, _):
            data = file.read(MAX_TENSOR_BYTES + 1)
        self._compare(hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], int]]:
        if self.data is not None:
            yield io.BytesIO(self.data), len(self.data)
            return
        try:
            status = self.path.stat()  # before opening: opening a pipe would wait for ever
            if not stat.S_ISREG(status.st_mode):
                raise _error(f"{short(self.file)} is not a regular file", "name a safetensors file")
            if status.st_size > MAX_TENSOR_BYTES:
                raise _error(f"{status.st_size} bytes are too many", f"at most {MAX_TENSOR_BYTES} bytes")
            with self.path.open("rb") as file:
                yield file, status.st_size
        except OSError as error:
            raise _error(f"{short(self.file)} cannot be read: {error.strerror}", "put it beside the recipe") from None

    def _compare(self, sha256: str) -> None:
        if sha256 != self.sha256:
            raise RecipeError(
                f"{short(self.file)} has another SHA-256, {sha256}", key="tensors.sha256",
                remedy="get the file that belongs to the recipe, or write this hash if you trust it",
            )  # fmt: skip


def check_file_name(file: str) -> PurePosixPath:
    """Check a file name of a recipe's: a relative path with forward slashes that leads nowhere else."""
    path = PurePosixPath(file)
    if not file or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", file):
        raise _error(f"{short(file)} leads out of the recipe's folder", "name a file in the folder of the recipe")
    if path.suffix != ".safetensors":
        raise _error(f"{short(file)} is not a safetensors file", "arrays are read from .safetensors files only")
    return path


def find_tensors(file: str, sha256: str, folder: Path) -> TensorFile:
    """The safetensors file `file` of a recipe that lies in `folder`; its contents are not looked at yet.

    Raises
    ------
    RecipeError
        No such file, or one outside the folder (by its name or through links).
    """
    path = folder.absolute() / check_file_name(file)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links that go round in circles
        raise _error(f"{short(file)} is not there", f"put it into {folder}") from None
    if not real.is_relative_to(folder.resolve()) and not _in_hub_cache(path, real):
        raise _error(f"{short(file)} is a link that leads out of the recipe's folder", "put the file itself there")
    return TensorFile(file, sha256, path)


def _in_hub_cache(path: Path, real: Path) -> bool:
    """Whether `path`, in ``<cache>/<repo>/snapshots/<revision>/``, leads to a blob of its repository or of its cache."""
    for snapshots in path.parents:
        if snapshots.name == "snapshots":
            repo = snapshots.parent.resolve()
            # huggingface_hub 2 keeps one store of blobs for all repositories: <cache>/blobs/<2 digits>/<64 digits>
            shared = repo.parent / "blobs" / real.name[:2]
            return real.parent == repo / "blobs" or (
                real.parent == shared and re.fullmatch(r"[0-9a-f]{64}", real.name) is not None
            )
    return False


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all, with the permissions that a new file has. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _error(problem: str, remedy: str) -> RecipeError:
    return RecipeError(problem, key="tensors.file", remedy=remedy)
