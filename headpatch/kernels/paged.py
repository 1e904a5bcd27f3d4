"""The paged first-token edit of one layer, for engines that call it in every step.

Under piecewise graphs an engine calls attention from Python, layer by layer, and a small model's step waits for that.
:class:`PagedMerge` does what :func:`headpatch.kernels.first_token.merge_first_token_paged` does in place, and keeps what Triton
finds out about its arguments: that analysis takes longer than the launch. In pure decode it also leaves out the search for each
token's row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headpatch.kernels.first_token import merge_first_token_paged, paged_tile, triton_available

__all__ = ["PagedMerge"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PagedMerge:
    """The edit of one layer, in place.

    Parameters
    ----------
    keys, values
        [blocks, K, block size, d or dv]: views of the engine's cache, at an address that never changes.
    gamma, head_scale
        [slots, H] fp32, rows contiguous, at fixed addresses; `head_scale` None for ones.
    scale, block_slot, row_slot, block_ratio, window, softcap
        As in :func:`~headpatch.kernels.first_token.merge_first_token_paged`.
    rows
        The most rows that a call will have. Kernels depend on it, not on the rows of a call, so that none is compiled while serving.

    Raises
    ------
    ValueError
        If not exactly one of `block_slot` and `row_slot` is given.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, gamma: Tensor, *, scale: float, head_scale: Tensor | None = None,
        block_slot: Tensor | None = None, row_slot: Tensor | None = None, block_ratio: int = 1, window: int = 0,
        softcap: float = 0.0, rows: int = 4095,
    ) -> None:  # fmt: skip
        if (block_slot is None) == (row_slot is None):
            raise ValueError("give one of block_slot and row_slot")
        self.keys, self.values, self.gamma, self.head_scale = keys, values, gamma, head_scale
        self.block_slot, self.row_slot = block_slot, row_slot
        self.steps = -(-rows.bit_length() // 4) * 4
        self.scale, self.block_ratio, self.window, self.softcap = scale, block_ratio, window, softcap
        k, v = keys.stride(), values.stride()
        self._outer = (k[0], k[1], k[3], v[0], v[1], v[3])
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], int, int]] = {}

    def __call__(
        self, q: Tensor, o: Tensor, lse: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor, one: bool = False
    ) -> None:  # fmt: skip
        """Edit `o` in place.

        Parameters
        ----------
        q, o
            [T, H, d] and [T, H, dv].
        lse
            [H, T] fp32.
        block_table, query_start_loc, seq_lens
            [rows, any], [rows + 1] and [rows], int32.
        one
            Whether no row has more than one token; then token t, where there are as many rows as tokens, is row t's.
        """
        if not (triton_available(q.device) and q.dtype in _DTYPES and o.dtype in _DTYPES):
            merge_first_token_paged(
                q, self.keys, self.values, o, lse, self.gamma, scale=self.scale, block_table=block_table,
                query_start_loc=query_start_loc, seq_lens=seq_lens, block_slot=self.block_slot, row_slot=self.row_slot,
                head_scale=self.head_scale, block_ratio=self.block_ratio, window=self.window, softcap=self.softcap,
            )  # fmt: skip
            return
        tokens, rows = q.shape[0], block_table.shape[0]
        if tokens == 0 or rows == 0:
            return
        steps = 0 if one and rows == tokens else self.steps
        q_strides, o_strides, l_t, l_h = q.stride(), o.stride(), lse.stride(1), lse.stride(0)
        b_r = block_table.stride(0)
        aligned = not (q.data_ptr() | o.data_ptr()) & 15
        key = (rows < tokens, steps, aligned, q_strides, o_strides, l_t, b_r)
        head_scale = self.head_scale
        args = (
            q, self.keys, self.values, o, lse, o, block_table, query_start_loc, seq_lens, self.gamma, head_scale,
            self.block_slot, self.row_slot, None, None, None, tokens, rows, self.block_ratio, self.window, self.scale, self.softcap,
            q_strides[0], q_strides[1], *self._outer, o_strides[0], o_strides[1], l_t, l_h, o_strides[0], o_strides[1], b_r,
            self.gamma.stride(0), 0 if head_scale is None else head_scale.stride(0),
        )  # fmt: skip
        index = q.device.index
        if index == torch.cuda.current_device():
            self._launch(key, args)
        else:
            with torch.cuda.device(index):
                self._launch(key, args)

    def _launch(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = self._compile(key, args)
        launch, tail, per, heads = found
        launch[(-(-args[16] // per) * heads, 1, 1)](*args, *tail)

    def _compile(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], int, int]:
        """(what is launched, arguments behind `args`, tokens a program, programs a token) for arguments of this kind."""
        from headpatch.kernels._triton import paged

        many, steps, _, q_strides, o_strides, *_ = key
        q, keys, o = args[0], args[1], args[3]
        H, K, d, dv = q.shape[1], keys.shape[1], q.shape[2], o.shape[2]
        last = (q_strides[2], o_strides[2], self.gamma.stride(1))
        if H % K or any(s != 1 for s in last) or (self.head_scale is not None and self.head_scale.stride(1) != 1):
            raise ValueError("query heads must be divisible by the cache's KV heads, and last strides be 1")
        programs, gb, bt, dp, dvp, warps = paged_tile(H, K, d, dv, many)
        shape = {
            "KH": K, "G": H // K, "D": d, "DV": dv, "DP": dp, "DVP": dvp, "BT": bt, "GB": gb, "COMPLEMENT": False, "INPLACE": True,
            "WINDOW": self.window > 0, "SOFTCAP": self.softcap > 0.0, "STEPS": steps, "SPAN": not many, "SLOTS": self.gamma.shape[0],
        }  # fmt: skip
        compiled = paged.warmup(*args, **shape, num_warps=warps, grid=(1, 1, 1))
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        if hasattr(type(compiled), "__getitem__"):  # a kernel that can be launched as it is
            return compiled, tuple(shape.values()), bt, programs
        return _Jit(paged, {**shape, "num_warps": warps}), (), bt, programs


class _Jit:
    """Launches through Triton's own front end, where compiled kernels cannot be launched by themselves."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel[grid](*args, **self.options)
