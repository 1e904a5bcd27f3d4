"""The house: what is installed, what importing it costs, and that its two walls stand."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headpatch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "headpatch").rglob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").rglob("*.py"))
ALL = sorted(
    path for folder in ("headpatch", "adapters", "recipes", "tests", "examples", "benchmarks", "docs", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip
ENGINES = {"accelerate", "bitsandbytes", "llama_cpp", "mlx", "mlx_lm", "peft", "sglang", "transformers", "vllm"}
MAY_IMPORT = {"headpatch/tune": {"peft"}}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; names imported from a module are given with it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}:{node.lineno}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield str(node.args[0].value)


def method_classes() -> dict[str, type]:
    """Methods of headpatch's own, by name: every concrete class under methods/ and kv/."""
    found = {}
    for path in LIBRARY:
        if path.parent.name in {"methods", "kv"} and path.stem not in {"__init__", "base"}:
            module = importlib.import_module(f"headpatch.{path.parent.name}.{path.stem}")
            for _, cls in inspect.getmembers(module, inspect.isclass):
                if cls.__module__ == module.__name__ and getattr(cls, "name", ""):
                    found[cls.name] = cls
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_the_library_imports_no_engine(path):
    allowed = {name for folder, names in MAY_IMPORT.items() if relative(path).startswith(folder) for name in names}
    crossed = {name for name in imports(path) if name.split(".")[0] in ENGINES - allowed}
    assert not crossed, f"{relative(path)} imports {sorted(crossed)}; only adapters know engines"
    inward = {name for name in imports(path) if name.startswith("headpatch.adapters")}
    assert not inward, f"{relative(path)} imports {sorted(inward)}; the registry finds adapters"


@pytest.mark.parametrize("path", ADAPTERS, ids=relative)
def test_adapters_import_no_method(path):
    allowed = {"headpatch.methods", "headpatch.methods.base"}
    crossed = {
        name for name in imports(path)
        if name.startswith("headpatch.kv")
        or (name.startswith("headpatch.methods") and name not in allowed and not name.startswith("headpatch.methods.base."))
    }  # fmt: skip
    assert not crossed, f"{relative(path)} imports {sorted(crossed)}; adapters know operands, not methods"


@pytest.mark.parametrize("path", ADAPTERS, ids=relative)
def test_adapters_name_no_method(path):
    source = path.read_text(encoding="utf-8")
    words = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(value := getattr(node, field, None), str):
                words.add(value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
    for name, cls in method_classes().items():
        # Short names (`act`, `var`) are words of other kinds too: those count as a whole identifier or string only.
        assert name not in words, f"{relative(path)} names the method {name!r}"
        assert not re.search(rf"\b{cls.__name__}\b", source), f"{relative(path)} names the class {cls.__name__}"
        if len(name) > 4:
            assert name not in source.lower(), f"{relative(path)} mentions the method {name!r}"


def test_the_walls_would_be_seen_to_fall(tmp_path):
    """The reader above finds imports wherever they hide."""
    hidden = tmp_path / "x.py"
    hidden.write_text(
        "def f():\n    import transformers.utils as t\n    from vllm import LLM\n"
        "    import importlib\n    importlib.import_module('peft.x')\n"
    )
    found = {name.split(".")[0] for name in imports(hidden)}
    assert found >= {"transformers", "vllm", "peft"}
    assert {"zerotuning", "head_scaling"} <= method_classes().keys()


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_no_file_is_longer_than_400_lines(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{relative(path)} has {lines} lines"


@pytest.mark.parametrize("path", LIBRARY + ADAPTERS, ids=relative)
def test_every_public_name_is_documented(path):
    name = relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if "triton" in set(imports(path)):
        pytest.importorskip("triton", reason="triton has no build for this platform")
    if any(found.startswith("lm_eval") for found in imports(path)):
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    module = importlib.import_module(name if name.startswith("headpatch") else f"headpatch.{name}")
    bare = [] if inspect.getdoc(module) else [name]
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            bare += [f"{key}.{member}" for member in undocumented_members(value)]
        if (inspect.isclass(value) or inspect.isfunction(value)) and not own_doc(value):
            bare.append(key)
    assert not bare, f"{relative(path)}: no docstring on {', '.join(bare)}"


def undocumented_members(cls: type) -> Iterator[str]:
    for key, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not key.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(cls, key)):
            yield key


def own_doc(value: object) -> bool:
    """Whether there is a docstring that dataclasses or a base class did not put there."""
    doc = value.__doc__ or ""
    return bool(doc) and not doc.startswith(f"{getattr(value, '__name__', '')}(")


def test_all_names_exist_and_are_documented():
    assert set(headpatch.__all__) <= set(dir(headpatch))
    for name in headpatch.__all__:
        value = getattr(headpatch, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        _ = headpatch.aply


def test_setup_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    mapped = {"headpatch": "headpatch", "adapters": "headpatch.adapters", "recipes": "headpatch.recipes"}
    present = {
        ".".join([mapped[folder], *path.parent.relative_to(ROOT / folder).parts])
        for folder in mapped
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == present
    lonely = {relative(path.parent) for path in LIBRARY + ADAPTERS if not (path.parent / "__init__.py").exists()}
    assert not lonely, f"folders with code and no __init__.py: {sorted(lonely)}"


def test_every_dependency_has_its_reason():
    """The comment above it in setup.cfg."""
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("install_requires"))
    for i, line in enumerate(lines[start:], start):
        if re.match(r"    [A-Za-z][\w.-]*(\[\w+\])?[<>=~]", line):
            assert lines[i - 1].lstrip().startswith("#"), f"setup.cfg, line {i + 1}: {line.strip()} has no reason"


def test_importing_is_quick_and_imports_no_engine():
    code = (
        "import sys, time; start = time.perf_counter(); import headpatch; seconds = time.perf_counter() - start;"
        "print(seconds, *(set(sys.modules) & {'torch', 'transformers', 'vllm', 'numpy', 'pydantic'}))"
    )
    times = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, *heavy = run.stdout.split()
        assert not heavy, f"`import headpatch` imports {heavy}"
        times.append(float(seconds))
    assert statistics.median(times) < 0.3


def test_adapters_are_found_without_importing_their_engines():
    code = (
        "import sys; from headpatch.registry import adapters; found = [a.name for a in adapters()];"
        "assert 'huggingface' in found, found;"
        "print(*(set(sys.modules) & {'transformers', 'vllm'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.split()
