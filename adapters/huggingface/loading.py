"""Loading a model and its tokenizer by name."""

from __future__ import annotations

from typing import Any

import torch

from headpatch.errors import EngineError, HeadpatchError

__all__ = ["load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(name: str, device: str = "auto", dtype: str = "float32", vision: bool = False) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer; with `vision` one that sees, and its processor.

    Raises
    ------
    HeadpatchError
        No such model, device or dtype.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise HeadpatchError(f"no dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise HeadpatchError("this machine has no CUDA device that torch can use; choose --device cpu")
    except RuntimeError as error:
        raise HeadpatchError(f"no device {device!r}: {error}") from None
    try:
        reader = (AutoProcessor if vision else AutoTokenizer).from_pretrained(name)
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model: Any = auto.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EngineError(f"cannot load {name!r} with transformers: {first}") from error
    return model.to(where).eval(), reader
