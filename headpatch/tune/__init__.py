"""Fine-tuning of chosen heads: LoRA on their slices alone, trainable gains and biases (LoFiT), export of edits as weights; and tasks
learned as injections at the prompt's last token.

    from headpatch import tune

    model = tune.lora(base, ["12.3", "14.0-2"], r=8)    # a PeftModel; train it as you train any
    ...
    tune.save(model, "adapter")                         # an ordinary PEFT adapter, the heads beside it

Names are imported on first use: importing this package imports neither torch nor PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# No module has the name of a function: importing it would put the module in the function's place.
_HOMES = {
    "lora": "adapters", "merge": "adapters", "report": "adapters",
    "apply_masks": "guard", "check": "guard", "guard_optimizer": "guard",
    "load": "files", "save": "files",
    "HeadVectors": "vectors",
    "lofit": "two_stage",
    "learn_function_vector": "tasks", "learn_injection": "tasks",
    "Fold": "export", "compare_logits": "export", "fold": "export", "to_lora": "export", "to_weights": "export",
}  # fmt: skip

__all__ = [
    "Fold",
    "HeadVectors",
    "apply_masks",
    "check",
    "compare_logits",
    "fold",
    "guard_optimizer",
    "learn_function_vector",
    "learn_injection",
    "load",
    "lofit",
    "lora",
    "merge",
    "report",
    "save",
    "to_lora",
    "to_weights",
]

if TYPE_CHECKING:
    from headpatch.tune.adapters import lora, merge, report
    from headpatch.tune.export import Fold, compare_logits, fold, to_lora, to_weights
    from headpatch.tune.files import load, save
    from headpatch.tune.guard import apply_masks, check, guard_optimizer
    from headpatch.tune.tasks import learn_function_vector, learn_injection
    from headpatch.tune.two_stage import lofit
    from headpatch.tune.vectors import HeadVectors


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'headpatch.tune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headpatch.tune.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
