"""DuoAttention's published patterns: gates of KV heads that its authors trained, read from their folder.

A folder holds ``full_attention_heads.tsv`` (a row per layer, a column per KV head, tab-separated gates as they came out of the
optimiser, so that some lie a little below 0: they are clipped to 0..1) and ``config.json`` (the training's arguments, ``sink_size``
and ``recent_size`` among them). Gates were stored in bf16 and hold many ties, which :mod:`headpatch.find.ranking` breaks by layer
and head; the project's own loader breaks them with unseeded noise.

Source: github.com/mit-han-lab/duo-attention, folder attn_patterns; Xiao et al., arXiv 2410.10819.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headpatch.errors import HeadpatchError
from headpatch.find.ranking import HeadScores
from headpatch.show import describe, short

__all__ = ["Pattern", "load_pattern"]

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"
SLACK = 0.1
"""How far a gate may lie outside 0..1."""
TOLD = (
    "dataset_name",
    "dataset_format",
    "num_steps",
    "lr",
    "reg_weight",
    "context_length_min",
    "context_length_max",
    "num_passkeys",
    "seed",
)


@dataclass(frozen=True)
class Pattern:
    """A published pattern.

    Attributes
    ----------
    scores
        Its gates, of KV heads.
    sink, recent
        What streaming heads saw in training.
    name
        Name of the model that it is for, as far as the folder says.
    """

    scores: HeadScores
    sink: int
    recent: int
    name: str

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.scores.values)

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer."""
        return len(self.scores.values[0])


def load_pattern(folder: str | Path) -> Pattern:
    """Read a pattern's folder.

    Raises
    ------
    HeadpatchError
        A file is missing or damaged, rows differ in length, a gate is no number or far outside 0..1, or sizes are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HeadpatchError(f"{folder}: is no folder; give the one that holds {TABLE} and {CONFIG}")
    table, raw = _table(folder / TABLE)
    config = _config(folder / CONFIG)
    sizes = []
    for key, least in (("sink_size", 0), ("recent_size", 1)):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise HeadpatchError(
                f"{folder / CONFIG}: {key} is {describe(value)}; it must be a whole number of at least {least}"
            )
        sizes.append(value)
    name = config.get("model_name")
    name = name.rstrip("/").rsplit("/", 1)[-1] if isinstance(name, str) and name.strip("/") else folder.parent.name
    about: dict[str, Any] = {
        "source": "published gates of mit-han-lab/duo-attention; not verified here", "pattern": folder.name,
        "sha256": hashlib.sha256(raw).hexdigest(), "training": {k: config[k] for k in TOLD if config.get(k) is not None},
    }  # fmt: skip
    about["training"] |= {"sink": sizes[0], "recent": sizes[1]}
    block = {"name": name, "num_layers": len(table), "num_kv_heads": len(table[0])}
    scores = HeadScores("DuoAttention gate", "kv", dict(enumerate(table)), about, block)
    return Pattern(scores, sizes[0], sizes[1], name)


def _table(path: Path) -> tuple[list[tuple[float, ...]], bytes]:
    raw = _read(path)
    rows: list[tuple[float, ...]] = []
    for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = tuple(float(cell) for cell in line.split("\t"))
        except ValueError:
            raise HeadpatchError(
                f"{path}:{number}: {short(line)} is no row of numbers with tabs between them"
            ) from None
        wrong = [v for v in row if not (math.isfinite(v) and -SLACK <= v <= 1 + SLACK)]
        if wrong:
            raise HeadpatchError(f"{path}:{number}: {wrong[0]:g} is no gate; gates lie between 0 and 1")
        if rows and len(row) != len(rows[0]):
            raise HeadpatchError(f"{path}:{number}: has {len(row)} heads, the rows above have {len(rows[0])}")
        rows.append(tuple(min(1.0, max(0.0, v)) for v in row))
    if not rows:
        raise HeadpatchError(f"{path}: holds no gates")
    return rows, raw


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise HeadpatchError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise HeadpatchError(f"{path}: {describe(config)} is no configuration")
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HeadpatchError(f"{path}: cannot be read: {error.strerror or error}") from None
