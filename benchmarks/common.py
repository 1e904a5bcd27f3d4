"""What every benchmark shares: alternated pairs with an interval, the machine's description, result files."""

from __future__ import annotations

import datetime
import gc
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PAIRS = 7
SLACK = 0.02
"""How far the upper end of an interval may exceed a bound."""


@dataclass
class Row:
    """One comparison: `ratio` is the median of the paired ratios patched / untouched, `low` and `high` its 95 % interval."""

    name: str
    untouched: float
    patched: float
    ratio: float
    low: float
    high: float
    unit: str = "ms"
    bound: float | None = None
    memory_ratio: float | None = None
    notes: str = ""
    pairs: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """pass, FAIL, or - where nothing was promised."""
        if self.bound is None:
            return "-"
        good = self.ratio <= self.bound and self.high <= self.bound + SLACK
        if self.memory_ratio is not None:
            good = good and self.memory_ratio <= 1.02
        return "pass" if good else "FAIL"


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, the device drained before and after, no garbage collected in between."""
    gc.collect()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3
    finally:
        gc.enable()


def alternate(
    name: str, untouched: Callable[[], Any], patched: Callable[[], Any], device: torch.device, *, pairs: int = PAIRS,
    warm: int = 1, bound: float | None = None, per: int = 1, turns: int = 1, notes: str = "",
) -> Row:  # fmt: skip
    """Time `untouched` and `patched` in turn, `pairs` times; the order inside a pair alternates too.

    A pair is the sum over `turns` turns of both: with short calls that wait for the host, one turn would measure what else the
    host did in that moment. The interval is the 2.5 and 97.5 percentile of the median over 10,000 bootstrap resamples of the
    paired ratios (seed 0).
    """
    for _ in range(warm):
        untouched()
        patched()
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        first = second = 0.0
        for turn in range(turns):
            if (i + turn) % 2:
                second += timed(patched, device) / (per * turns)
                first += timed(untouched, device) / (per * turns)
            else:
                first += timed(untouched, device) / (per * turns)
                second += timed(patched, device) / (per * turns)
        times.append((first, second))
    ratios = [b / a for a, b in times]
    low, high = interval(ratios)
    return Row(
        name, statistics.median(a for a, _ in times), statistics.median(b for _, b in times), statistics.median(ratios), low,
        high, bound=bound, notes=notes, pairs=ratios,
    )  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(10_000))
    return medians[250], medians[9749]


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date."""
    import transformers

    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def short_name(device: str) -> str:
    """What names of result files call a device by its full name: h100, h200, or cpu."""
    return next(
        (word for word in ("h100", "h200") if word in device.lower()), "gpu" if "nvidia" in device.lower() else "cpu"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return f"{names[0]} ({len(names)} cores)"
    return platform.processor() or platform.machine()


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| what | untouched | patched | ratio | 95 % interval | memory | bound | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        memory = "" if r.memory_ratio is None else f"{r.memory_ratio:.3f}"
        bound = "" if r.bound is None else f"{r.bound:.2f}"
        lines.append(
            f"| {r.name}{' (' + r.notes + ')' if r.notes else ''} | {r.untouched:.2f} {r.unit} | {r.patched:.2f} {r.unit} | "
            f"{r.ratio:.3f} | {r.low:.3f}-{r.high:.3f} | {memory} | {bound} | {r.verdict} |"
        )
    return "\n".join(lines)


def write(stem: str, rows: list[Row], about: dict[str, Any], extra: list[str], folder: Path = RESULTS) -> None:
    """Write `stem`.json and `stem`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": about, "rows": [{**asdict(r), "verdict": r.verdict} for r in rows], "notes": extra}
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
    head = ", ".join(f"{k} {v}" for k, v in about.items())
    text = f"# {stem}\n\n{head}\n\n{table(rows)}\n\n" + "".join(f"- {line}\n" for line in extra)
    (folder / f"{stem}.md").write_text(text)
    print(f"\n{head}\n{table(rows)}")
    for line in extra:
        print(f"- {line}")
