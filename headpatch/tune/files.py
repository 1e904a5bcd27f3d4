"""Saving and loading adapters of chosen heads: PEFT's own files, and beside them ``headpatch_heads.json`` with the heads.

Plain PEFT, and every engine that reads PEFT adapters, loads the adapter without headpatch and without that file. It holds
``headpatch`` (its format, 1), ``kind`` (lora), ``heads`` (selectors), ``part``, ``roles``, ``kv``, ``per_head``, ``r``,
``kv_heads`` (by layer) and ``model`` (its shape).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headpatch.errors import HeadpatchError
from headpatch.registry import find_adapter
from headpatch.tensorfile import atomic_write
from headpatch.tune.adapters import KV_POLICIES, _masks, _plan
from headpatch.tune.engine import load_peft, projections_of
from headpatch.tune.guard import Restriction, check, restriction_of
from headpatch.tune.which import chosen_heads

__all__ = ["FILE", "load", "save"]

FILE = "headpatch_heads.json"


def save(model: Any, folder: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Write an adapter made by :func:`headpatch.tune.lora`.

    Parameters
    ----------
    model
        The PeftModel.
    folder
        Gets ``adapter_config.json``, ``adapter_model.safetensors`` and ``headpatch_heads.json``.
    adapter
        Which; default: the active one. As PEFT does, adapters of other names than ``default`` go into a subfolder.

    Returns
    -------
    Path
        Where the files lie.

    Raises
    ------
    HeadpatchError
        The adapter reaches beyond its heads.
    """
    restriction = restriction_of(model, adapter)
    check(model, restriction.adapter)
    model.save_pretrained(str(folder), selected_adapters=[restriction.adapter])
    target = Path(folder) if restriction.adapter == "default" else Path(folder) / restriction.adapter
    with atomic_write(target / FILE) as file:
        file.write((json.dumps(restriction.facts, indent=1) + "\n").encode())
    return target


def load(model: Any, folder: str | os.PathLike[str], *, trainable: bool = False, adapter_name: str = "default") -> Any:
    """Load an adapter that :func:`save` wrote, with its restriction: to train it further, merge it or save it again.

    To use it only, ``peft.PeftModel.from_pretrained`` does as well.

    Parameters
    ----------
    model
        A transformers model of the shape that the adapter was trained on.
    folder
        Where the three files lie.
    trainable
        Whether its numbers are to be trained further.

    Returns
    -------
    peft.PeftModel

    Raises
    ------
    HeadpatchError
        No such file, another model, or an adapter that reaches beyond its heads.
    """
    peft = load_peft()
    facts = _read(Path(folder) / FILE)
    shape = find_adapter(model).shape(model)
    part = facts["part"]
    stack = shape.parts.get(part)
    mine = None if stack is None else {
        "model_type": shape.model_type, "num_heads": list(stack.num_heads), "num_kv_heads": list(stack.num_kv_heads),
        "head_dim": list(stack.head_dim),
    }  # fmt: skip
    wanted = {key: value for key, value in facts["model"].items() if key != "name"}
    if mine != wanted:
        raise HeadpatchError(f"{folder}: this adapter was trained on heads of another model ({wanted['model_type']})")
    chosen = chosen_heads(facts["heads"], shape, part)
    plan = _plan(projections_of(model, part), chosen, facts["roles"], facts["kv"])
    wrapped = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=trainable)
    masked = _masks(wrapped, plan, facts["r"] if facts["per_head"] else None, adapter_name)
    restriction = Restriction(adapter_name, masked, chosen, facts)
    if strays := restriction.strays():
        raise HeadpatchError(
            f"{folder}: the adapter changes heads that its {FILE} does not name, in {next(iter(strays))}"
        )
    restriction.install(wrapped)
    return wrapped


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise HeadpatchError(
            f"{path} is not there: plain PEFT loads any adapter; tune.load needs the heads beside it"
        ) from None
    except (ValueError, OSError) as error:
        raise HeadpatchError(f"{path} cannot be read: {error}") from None
    kinds = {
        "part": str,
        "heads": list,
        "roles": list,
        "kv": str,
        "per_head": bool,
        "r": int,
        "model": dict,
        "kv_heads": dict,
    }
    if not isinstance(facts, dict) or facts.get("headpatch") != 1 or facts.get("kind") != "lora":
        raise HeadpatchError(f"{path} is no list of heads of format 1; a newer headpatch may have written it")
    wrong = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    if wrong or facts["kv"] not in KV_POLICIES or "model_type" not in facts["model"]:
        raise HeadpatchError(f"{path}: {(wrong or ['kv'])[0]} is missing or of another kind")
    return facts
