"""Triton source of a kernel that rearranges block tables. Imports triton: imported when first needed.

What it computes is :func:`headpatch.kernels.tables.arrange` for rows that were not cut: one launch a step in place of two dozen.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "columns", "sinks", "recent", "size"])
def arrange(
    TABLE, STARTS, LENGTHS, NEW, NEW_LENGTHS, blocks, columns, sinks, recent, size, t_r, o_r, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    length = tl.load(LENGTHS + row)
    begin = length - (tl.load(STARTS + row + 1) - tl.load(STARTS + row))
    first = tl.maximum(tl.maximum(begin - (recent - 1), 0) // size, sinks)
    own = tl.maximum(begin // size, sinks)
    before = own - first
    gap = first - sinks
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.where(j < before, j + first, tl.where(j < before + sinks, j - before, j + gap))
    at = tl.minimum(at, blocks - 1)
    inside = j < columns
    found = tl.load(TABLE + row.to(tl.int64) * t_r + at, mask=inside, other=0)
    tl.store(NEW + row.to(tl.int64) * o_r + j, found, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(NEW_LENGTHS + row, length - gap * size)
