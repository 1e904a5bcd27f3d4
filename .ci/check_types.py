"""mypy on the installed wheel: the source tree maps adapters/ and recipes/ into the package, which mypy cannot see through."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from check_wheel import ROOT, build_wheel


def main() -> int:
    """Build, install into an empty folder, run mypy from there. 0 where nothing is wrong."""
    with tempfile.TemporaryDirectory(prefix="headpatch-types-") as temporary:
        work = Path(temporary)
        site = work / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, str(build_wheel(work))], check=True)
        mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "headpatch"]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.run(
            [*mypy, *cache], cwd=site, env={**os.environ, "MYPYPATH": str(site)}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
