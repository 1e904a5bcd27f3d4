"""Unpacking a quantised GGUF file into a plain checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headpatch.errors import EngineError

__all__ = ["unpack"]


def unpack(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of `gguf` to the folder `target`, as transformers keeps them, in bfloat16.

    Raises
    ------
    EngineError
        A package that transformers reads such files with is missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from headpatch.adapters.huggingface.writing import hushed

    with hushed(), _explained():
        quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it describes the file; the weights in memory are plain
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict())
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineError(f"{error}; pip install 'headpatch[demo]' brings what reads GGUF files") from error
