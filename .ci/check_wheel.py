"""Build the source distribution and from it the wheel, install the wheel elsewhere, and check that it is what users should get.

    python .ci/check_wheel.py

1. What is in the wheel is what is in the tree: nothing missing, nothing else, no top-level `adapters` or `recipes`.
2. From another folder, in a virtual environment that knows the wheel and not the tree: the smoke test below passes.
3. `import headpatch` takes under 0.3 s and imports no torch, no transformers, no vllm.

Run it with a Python that has headpatch's dependencies and `build`; nothing is written into the tree.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"headpatch": "headpatch", "adapters": "headpatch/adapters", "recipes": "headpatch/recipes"}
SHIPPED = {".py", ".yaml", ".json", ".jsonl", ".safetensors", ".typed"}
IMPORT_LIMIT = 0.3  # seconds
HEAVY = ("torch", "transformers", "vllm")

SMOKE = """
import pathlib, sys
import headpatch
here = pathlib.Path(headpatch.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"not the installed one: {here}"
names = headpatch.list_recipes()
assert names, "no shipped recipes"
for name in names:
    recipe = headpatch.load_recipe(name)
    assert recipe.name == name, (recipe.name, name)
assert {"zerotuning", "head_scaling"} <= set(headpatch.list_methods()), headpatch.list_methods()
import headpatch.adapters.huggingface
assert "vllm" not in sys.modules
from headpatch.registry import adapters
assert "huggingface" in [adapter.name for adapter in adapters()]
for name in ("adapters", "recipes"):
    try:
        module = __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"a top-level module {name!r} is importable: {module.__file__}")
print(f"smoke test: {len(names)} recipe(s), headpatch {headpatch.__version__} in {here.parent}")
"""

IMPORT = """
import time
start = time.perf_counter()
import headpatch
seconds = time.perf_counter() - start
import sys
heavy = [name for name in {heavy!r} if name in sys.modules]
print(seconds, *heavy)
"""


def copy_tree(target: Path) -> Path:
    """A copy of what the distributions are made from, so that no build folder of the checkout leaks in, nor one is left there."""
    target.mkdir()
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(work: Path) -> Path:
    """The wheel, built from the source distribution, in `work`."""
    source = copy_tree(work / "source")
    command = [sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def install(wheel: Path, target: Path) -> Path:
    """A virtual environment with the wheel in it; what the wheel depends on it finds where this Python finds it."""
    venv.create(target, with_pip=False, symlinks=sys.platform != "win32")
    python = target / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # Paths in a .pth file are not searched for .pth files themselves: an editable headpatch over there stays unseen.
    Path(site, "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def check_contents(wheel: Path) -> list[str]:
    """What is wrong with the list of files."""
    wrong, expected = [], set()
    for folder, place in MAPPED.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            if path.suffix not in SHIPPED:
                wrong.append(
                    f"{path.relative_to(ROOT)}: a file of this kind is not known to ship; move it or add the kind"
                )
            expected.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        info = {name for name in archive.namelist() if name.split("/")[0].endswith(".dist-info")}
        found = set(archive.namelist()) - info
        top = {name.split("/")[0] for name in found}
        kept = {name.split("/", 1)[1] for name in info}
    wrong += [f"in the tree, not in the wheel: {name}" for name in sorted(expected - found)]
    wrong += [f"in the wheel, not in the tree: {name}" for name in sorted(found - expected)]
    if top != {"headpatch"}:
        wrong.append(f"top-level names installed: {sorted(top)}; only headpatch may be")
    if missing := {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} - kept:
        wrong.append(f"missing from dist-info: {sorted(missing)}")
    if "headpatch/py.typed" not in found:
        wrong.append("headpatch/py.typed is missing: type checkers would ignore the annotations")
    return wrong


def check_import(python: Path, folder: Path) -> list[str]:
    """What is wrong with `import headpatch`."""
    times = []
    for _ in range(7):
        line = subprocess.run(
            [python, "-c", IMPORT.format(heavy=HEAVY)], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()
        if line[1:]:
            return [f"`import headpatch` imports {', '.join(line[1:])}"]
        times.append(float(line[0]))
    seconds = statistics.median(times)
    print(f"import headpatch: {seconds * 1000:.0f} ms (median of {len(times)})")
    return (
        [f"`import headpatch` takes {seconds:.2f} s; the limit is {IMPORT_LIMIT} s"] if seconds > IMPORT_LIMIT else []
    )


def main() -> int:
    """Run all checks; 0 where nothing is wrong."""
    with tempfile.TemporaryDirectory(prefix="headpatch-wheel-") as temporary:
        work = Path(temporary)
        wheel = build_wheel(work)
        wrong = check_contents(wheel)
        python = install(wheel, work / "venv")
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        wrong += check_import(python, elsewhere)
        smoke = subprocess.run([python, "-c", SMOKE], cwd=elsewhere, capture_output=True, text=True, check=False)
        print(smoke.stdout.strip())
        if smoke.returncode:
            wrong.append(f"the smoke test failed:\n{smoke.stderr.strip()}")
        print(f"{wheel.name}: {len(zipfile.ZipFile(wheel).namelist())} files")
    for line in wrong:
        print("WRONG", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
