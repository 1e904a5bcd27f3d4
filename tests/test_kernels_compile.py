"""The Triton kernels compile for a Hopper GPU, with no GPU in sight: what a new Triton refuses is seen where there is none."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

HALF = ("Q", "K", "V", "AO", "OUT", "KC", "VC")
FLOATS = ("LSE", "GAMMA", "FACTOR", "SHIFT", "HEAD_SCALE", "SINK", "K_SCALE", "V_SCALE")
INTEGERS = (
    "BLOCK_TABLE", "QUERY_START", "SEQ_LENS", "BLOCK_SLOT", "ROW_SLOT", "TABLE", "STARTS", "LENGTHS", "NEW", "NEW_LENGTHS",
)  # fmt: skip
SHAPE = {"KH": 8, "G": 4, "D": 128, "DV": 128, "DP": 128, "DVP": 128, "GB": 4}
DENSE = {**SHAPE, "BT": 4, "SHIFT": 0, "INPLACE": False, "WINDOW": False, "SOFTCAP": False, "MASK_BOOL": True}
AFFINE = {"H": 32, "D": 128, "DP": 128, "BH": 16, "STEPS": 8}
PAGED = {**SHAPE, "BT": 4, "INPLACE": True, "WINDOW": False, "SOFTCAP": False, "STEPS": 8}


def ptx(name: str, constants: dict[str, Any]) -> str:
    """The assembly of one kernel with these compile-time arguments, others as the adapters pass them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headpatch.kernels import _triton, _triton_affine, _triton_tables

    kernel = getattr({"affine": _triton_affine, "arrange": _triton_tables}.get(name, _triton), name)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("scale", "softcap"):
            signature[argument] = "fp32"
        else:
            pointers = (
                (HALF, "*bf16"),
                (FLOATS, "*fp32"),
                (INTEGERS, "*i32"),
                (("FIRST", "START", "STOP", "ROW_PROMPT"), "*i64"),
                (("MASK",), "*i1"),
            )
            signature[argument] = next((kind for names, kind in pointers if argument in names), "i32")
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("dense", {**DENSE, "COMPLEMENT": True, "PER_QUERY": False, "MASK": None, "SINK": None, "FIRST": None}),
        ("dense", {**DENSE, "COMPLEMENT": True, "PER_QUERY": True, "SINK": None}),
        ("dense", {**DENSE, "COMPLEMENT": False, "PER_QUERY": False, "WINDOW": True, "SOFTCAP": True}),
        ("paged", {**PAGED, "COMPLEMENT": False, "ROW_SLOT": None, "SINK": None, "K_SCALE": None, "V_SCALE": None}),
        ("paged", {**PAGED, "COMPLEMENT": True, "BLOCK_SLOT": None, "WINDOW": True}),
        ("step", {**SHAPE, "COMPLEMENT": True}),
        ("step", {**SHAPE, "COMPLEMENT": False, "HEAD_SCALE": None}),
        ("affine", AFFINE),
        ("affine", {**AFFINE, "SHIFT": None}),
        ("arrange", {"BLOCK": 64}),
    ],
    ids=[
        "prompt",
        "masked",
        "window",
        "paged",
        "paged-rows",
        "step",
        "step-in-place",
        "affine",
        "affine-scales",
        "arrange",
    ],
)
def test_compiles_for_hopper(name: str, constants: dict[str, Any]) -> None:
    assert ".visible .entry" in ptx(name, constants)
