"""Kernels that read whole prompts, built for NVIDIA GPUs where there is none: what does not compile, or does not fit, shows."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_cases import HAS_TRITON, INTERPRETED

from headpatch.kernels.segments import FORMS, _tile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="builds kernels with Triton, which is not installed"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),  # Triton 3.9 about its own next version
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter, which this run has chosen, compiles nothing"),
]
OUTER = [f"{x}_{dim}" for x in ("q", "k", "v", "y") for dim in ("b", "h", "t")]
INTEGERS = ["N", "n_q", "n_k", "m0_b", "m0_h", "m1_b", "m1_h", "s_b", "c_b", "x_b", "x_t", "length"]
TYPES = {
    **dict.fromkeys(["Q", "K", "V", "OUT", "X"], "*bf16"), **dict.fromkeys(["LSE", "SUMS", "STRENGTH"], "*fp32"),
    **dict.fromkeys(["M0", "M1", "SPARED", "COUNTED", "FOUND"], "*i1"), **dict.fromkeys(["HEADS", "DIMS"], "*i64"),
    **dict.fromkeys(["scale", "least", "ratio", "square", "floor"], "fp32"),
    **dict.fromkeys([*OUTER, "k_n", "v_n", *INTEGERS], "i32"),
}  # fmt: skip
ALIGNED = {"Q", "K", "V", "OUT", "X", *OUTER, "k_n", "v_n"}
SHARED = {80: 163, 86: 99, 90: 227}
"""KiB of shared memory that a program may take, by compute capability."""


def build(
    kernel: Any, constants: dict[str, Any], capability: int, options: dict[str, int], types: dict[str, str] = TYPES
) -> int:  # fmt: skip
    """Compile as launch.py lets it be compiled; bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in ALIGNED and n not in constants}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_attention_with_new_shares(form, width, capability):
    from headpatch.kernels._triton_segments import attend

    for queries in (1, 1024):
        bm, bn, warps, stages = _tile(queries, width)
        missing = {"M1": None, "SPARED": None} if form == "calibrate" else {}
        constants = {
            "N": 8,
            "G": 4,
            "D": width,
            "DP": width,
            "BM": bm,
            "BN": bn,
            "FORM": form,
            "STRICT": True,
            "EXACT": False,
        }
        options = {"num_warps": warps, "num_stages": stages}
        shared = build(attend, {**constants, "HEADS": None, **missing}, capability, options)
        assert shared <= SHARED[capability] * 1024


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_sums_of_columns(width, capability):
    from headpatch.kernels import _triton_columns
    from headpatch.kernels.columns import block

    size = block(width)
    constants = {"G": 1, "D": width, "DP": width, "BM": size, "BN": size, "EXACT": False}
    for kernel in (_triton_columns.rows, _triton_columns.columns):
        assert build(kernel, constants, capability, {"num_warps": 4, "num_stages": 3}) <= SHARED[capability] * 1024


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kind", ["weights", "forms"])
def test_edits_over_a_paged_cache(kind, width, capability):
    from headpatch.kernels import _triton_paged_segments as source
    from headpatch.kernels.paged_segments import _block, _tile

    tables = dict.fromkeys(["HEADS", "ROW_SLOT", "RANGES", "BOUNDS", "STARTS", "LENGTHS", "TABLE", "MARK_OF"], "*i32")
    types = {
        **TYPES, **tables, **dict.fromkeys(["EDITS", "PARTS"], "*fp32"), "ROW_PROMPT": "*i64", "MARKS": "*u8", "softcap": "fp32",
        **dict.fromkeys(["n_rows", "t_r", "e_s", "e_h", "m_b", "m_h", "l_t", "l_h", "window", "parts"], "i32"),
    }  # fmt: skip
    forms, none = kind == "forms", {} if kind == "forms" else {"MARKS": None, "MARK_OF": None}
    shape = {"G": 4, "SIZE": 16, "D": width, "DP": width}
    of_model = {"WINDOW": True, "SOFTCAP": True, "EXACT": False}
    has = {"HAS_FORM": forms, "HAS_POST": forms}
    for tokens, rows in ((1, 1), (1024, 1)):
        bm, bn, warps, stages = _tile(tokens, rows, width)
        steps, options = (0 if tokens == 1 else 12), {"num_warps": warps, "num_stages": stages}
        constants = {**shape, "BM": bm, "BN": bn, "STEPS": steps, **has, "SPLIT": tokens == 1, **of_model, **none}
        assert build(source.attend, constants, capability, options, types) <= SHARED[capability] * 1024
    usual = {"num_warps": 4, "num_stages": 3}
    build(source.finish, {"D": width, "DP": width, "STEPS": 12, **has}, capability, usual, types)
    constants = {**shape, "BN": _block(width), "STEPS": 12, **of_model}
    assert build(source.find_sinks, constants, capability, usual, types) <= SHARED[capability] * 1024


def test_extreme_tokens():
    from headpatch.kernels._triton_segments import extreme

    assert build(extreme, {"W": 4096, "COUNT": 2, "BLOCK": 4096}, 90, {"num_warps": 4, "num_stages": 3}) <= 4096
