"""One fused kernel a layer for constant first-token weights and constant head scales.

An attention kernel gave outputs and their log-sum-exp; what is left is to change the first token's share of each row and to
scale each head, in one pass that reads q and the outputs once and writes the result once. With s0 = scale * <q, k0> (softcapped
and with its mask value where there is one), g the head's weight and c its scale, everything in fp32:

* complement: `o`, `lse` of all keys *but* the first token,
  ``out = c * lerp(o, v0, sigmoid(s0 + log g - lse))``: stable for every g >= 0, 0 included;
* correction: `o`, `lse` of *all* keys, ``a = (g - 1) exp(s0 - lse)``, ``out = c * (o + a v0) / (1 + a)``: loses digits as g -> 0
  (rule of thumb: g >= 0.05), but works on what any attention kernel has just written, in place.

Three rules hold in both. A row that sees nothing but the first token gets v0 (its attention cannot go elsewhere); a row that does
not see the first token stays as it is; a sink logit takes its share of the row but has no value.

Rows with nothing to attend to are recognised by an `lse` that is not finite or not above -3e4 (what finfo.min masks leave).

:func:`merge_first_token` reads keys and values as [b, K, n, d] tensors, :func:`merge_first_token_paged` reads them from a paged
cache with a block table. Both pick the Triton kernel on CUDA and plain torch elsewhere; both can be captured in a CUDA graph (no
synchronisation, no data-dependent shape) and traced by torch.compile(fullgraph=True), where the kernel is inlined.

Source of the formulas: Han et al., arXiv 2505.11739 (the edit); the merge of two attention segments by their log-sum-exp is that
of FlashAttention and flash-decoding. First-token weights are ZeroTuning's, but nothing here knows methods.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headpatch.kernels import plain

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["merge_first_token", "merge_first_token_paged", "tile", "triton_available"]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # somebody's placeholder module, without a spec
        return False


_HAS_TRITON = _installed("triton")
_KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
# AOT autograd's cache does not look into lazily imported kernels; an argument that follows their source makes it notice changes.
_SOURCE = zlib.crc32(Path(__file__).with_name("_triton.py").read_bytes())


def triton_available(device: torch.device) -> bool:
    """Say whether the fused kernel runs on `device` (a CUDA or ROCm device, with Triton installed)."""
    return _HAS_TRITON and device.type == "cuda"


def merge_first_token(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, *, scale: float, complement: bool,
    head_scale: Tensor | None = None, first: Tensor | None = None, kv_offset: int = 0, mask: Tensor | None = None,
    window: int = 0, q_start: int | None = None, softcap: float = 0.0, sink: Tensor | None = None,
    inplace: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Change the first token's share of every row, scale every head, and lay the result out for the output projection.

    Parameters
    ----------
    q
        [b, H, lq, d] queries as the attention kernel got them; any strides, the last 1.
    k, v
        [b, K, lk, d] and [b, K, lk, dv], H a multiple of K: *all* keys and values, the first token included; any strides, the
        last 1. Only the first token's are read.
    o
        [b, H, lq, dv] outputs of the attention kernel; any strides, the last 1. [b, H, lq - 1, dv] says that query 0 saw nothing
        but the first token and was left out (a causal prompt in complement mode): it gets v0, and ``o[:, :, i]`` is query i + 1.
    lse
        [b, H, >= o.shape[2]] fp32, natural logarithm, of the same scores as `o`; any strides, padding at the end is not read.
    gamma
        [H] fp32, contiguous: factor on the first token's attention, >= 0; 1 leaves the share alone.
    scale
        Softmax scale.
    complement
        True: `o` and `lse` are over all keys but the first token. False: over all keys.
    head_scale
        [H] fp32, contiguous, or None for ones.
    first
        int [b] (or [b, lq] where rows are packed): index of the row's first token. None: 0.
    kv_offset
        What `first` (or 0) is counted from: ``k[:, :, first - kv_offset]`` is the key. An index outside of k: not seen.
    mask
        The layer's own mask [b or 1, H or 1, lq or 1, >= lk], bool (True: seen) or additive; only the first token's column is
        read, so pass it as it is. None: every query sees the first token, `window` apart.
    window
        Sliding window: query i sees the first token if ``q_start + i - index < window``. 0: no window.
    q_start
        Index in k of query 0's own key; None: lk - lq. Read only with `window`.
    softcap
        Soft cap on the scores (tanh), 0 for none.
    sink
        [H] sink logits that `lse` does *not* contain yet; the result is normalised with them. None: none, or already in `lse`.
    inplace
        Write into `o`. Needs as many rows in `o` as in `q`. In correction mode heads with gamma 1 and scale 1 are not touched.
    backend
        "triton" or "torch"; None picks.

    Returns
    -------
    Tensor
        [b, lq, H, dv] in o's dtype: contiguous, or ``o.transpose(1, 2)`` if `inplace`.

    Raises
    ------
    ValueError
        If `o` has neither lq nor lq - 1 rows, or heads do not divide.
    """
    b, H, lq, _ = q.shape
    shift = lq - o.shape[2]
    if shift not in (0, 1) or (shift and (inplace or not complement)) or H % k.shape[1]:
        raise ValueError(f"o {tuple(o.shape)} does not fit q {tuple(q.shape)} and k {tuple(k.shape)} here")
    start = 0 if window <= 0 else k.shape[2] - lq if q_start is None else q_start  # read with a window only
    if backend == "torch" or (backend is None and not _kernel_can(q, o, gamma)):
        return plain.merge_dense(
            q, k, v, o, lse, gamma, head_scale, first, mask, sink, scale, complement, kv_offset, window, start, softcap, inplace,
        )  # fmt: skip
    if torch.compiler.is_compiling():
        args = (q, k, v, o, lse, gamma, head_scale, first, _narrow(mask), sink)
        numbers = (scale, complement, kv_offset, window, start, softcap, _SOURCE)
        if inplace:
            torch.ops.headpatch.merge_first_token_(*args, *numbers)
            return o.transpose(1, 2)
        return torch.ops.headpatch.merge_first_token(*args, *numbers)
    out = o.transpose(1, 2) if inplace else q.new_empty((b, lq, H, o.shape[3]), dtype=o.dtype)
    _on_device(
        q, _launch_dense, _kernels().dense, q, k, v, o, lse, gamma, head_scale, first, mask, sink, out, scale, complement,
        kv_offset, window, start, softcap, inplace,
    )  # fmt: skip
    return out


def merge_first_token_paged(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, *, scale: float,
    block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_slot: Tensor | None = None,
    row_slot: Tensor | None = None, head_scale: Tensor | None = None, block_ratio: int = 1, window: int = 0,
    softcap: float = 0.0, sink: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    complement: bool = False, out: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Do the same over packed rows and a paged cache, with one table row of weights and scales per slot.

    Parameters
    ----------
    q, o
        [T, H, d] and [T, H, dv], the rows' queries one after the other; any strides, the last 1.
    key_cache, value_cache
        [blocks, K, block size, d or dv], any strides: views of the engine's cache. Only the first key of a row's first block is
        read. fp8 caches come with `k_scale` and `v_scale`.
    lse
        [H, T] fp32, natural logarithm (pass a transposed view of [T, H]); any strides.
    gamma, head_scale
        [slots, H] fp32, rows contiguous; `head_scale` None for ones.
    scale, softcap, sink, complement, backend
        As in :func:`merge_first_token`.
    block_table
        [rows, any] int32: blocks of each row; block 0 is the null block, which says that the first token is out of reach.
    query_start_loc
        [rows + 1] int32: where each row's tokens begin in q; tokens from the last entry on are padding.
    seq_lens
        [rows] int32: tokens of the row including this call's; 0 for padding rows.
    block_slot, row_slot
        Exactly one of them, int32: slot of the recipe by ``block_slot[first block // block_ratio]`` or ``row_slot[row]``; a
        negative slot is nobody's. Rows without a slot, with length 0, and (found by block) with the null block stay as they are.
    window
        Sliding window: position p sees the first token if ``p < window``. 0: no window.
    k_scale, v_scale
        Scalar tensors that keys and values of a quantised cache are multiplied by.
    out
        Where to write, [T, H, dv], any strides, the last 1; None: into `o`, where heads with nothing to do are not touched.

    Returns
    -------
    Tensor
        `out`, or `o`. Tokens with an `lse` that is not finite stay as they are (in complement mode they get v0).

    Raises
    ------
    ValueError
        If not exactly one of `block_slot` and `row_slot` is given, or heads do not divide.
    """
    if (block_slot is None) == (row_slot is None) or q.shape[1] % key_cache.shape[1]:
        raise ValueError("give one of block_slot and row_slot, and query heads divisible by the cache's KV heads")
    tables = (block_table, query_start_loc, seq_lens, gamma, head_scale, block_slot, row_slot, sink, k_scale, v_scale)
    numbers = (scale, complement, block_ratio, window, softcap)
    target = o if out is None else out
    if backend == "torch" or (backend is None and not _kernel_can(q, o, gamma)):
        plain.merge_paged(q, key_cache, value_cache, o, lse, target, *tables, *numbers)
    elif torch.compiler.is_compiling():
        source = None if out is None else o
        tensors = (q, key_cache, value_cache, source, lse, target)
        torch.ops.headpatch.merge_first_token_paged_(*tensors, *tables, *numbers, _SOURCE)
    else:
        tensors = (q, key_cache, value_cache, o, lse, target)
        _on_device(q, _launch_paged, _kernels().paged, *tensors, *tables, *numbers, out is None)
    return target


# --- launching ----------------------------------------------------------------------------------------------------------


def _narrow(mask: Tensor | None) -> Tensor | None:
    """A mask without its expanded dimensions: a compiler might lay them out in full."""
    if mask is None:
        return None
    for dim in range(3):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


@functools.cache
def _kernels() -> Any:
    from headpatch.kernels import _triton

    return _triton


def _kernel_can(q: Tensor, o: Tensor, gamma: Tensor) -> bool:
    if not (_HAS_TRITON and q.is_cuda and o.dtype in _KERNEL_DTYPES and q.dtype in _KERNEL_DTYPES):
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or o.requires_grad or gamma.requires_grad))


def _on_device(q: Tensor, launch: Callable[..., None], *args: Any) -> None:
    """Triton launches on the current device; a layer may live on another."""
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        launch(*args)
    else:
        with torch.cuda.device(q.device):
            launch(*args)


@functools.cache
def tile(H: int, K: int, d: int, dv: int, many: bool) -> tuple[int, int, int, int, int, int]:
    """(head blocks of a group, heads a program GB, tokens a program BT, d and dv to the next power of two, warps)."""
    G = H // K
    dp, dvp = (max(16, 1 << (n - 1).bit_length()) for n in (d, dv))
    widest = max(dp, dvp)
    gb = max(1, min(1 << (G - 1).bit_length(), _TILE // widest))
    bt = max(1, _TILE // (gb * widest)) if many else 1
    warps = max(1, min(8, bt * gb * widest // (32 * _PER_THREAD)))
    return -(-G // gb), gb, bt, dp, dvp, warps


@functools.cache
def decode_tile(H: int, d: int, dv: int) -> tuple[int, int, int, int, int]:
    """(programs a token, heads a program, d and dv to the next power of two, warps) where a row has one token.

    Nothing is shared between heads then but their row's numbers, and time goes by waiting: small programs, and no thread with more
    than one load of each kind.
    """
    dp, dvp = (max(16, 1 << (n - 1).bit_length()) for n in (d, dv))
    widest = max(dp, dvp)
    gb = max(1, min(8, 1 << (H - 1).bit_length(), _TILE // widest))
    return -(-H // gb), gb, dp, dvp, max(1, min(8, gb * widest // (32 * _ONE_LOAD)))


def paged_tile(H: int, K: int, d: int, dv: int, many: bool) -> tuple[int, int, int, int, int, int]:
    """(programs a token, heads and tokens a program, d and dv to the next power of two, warps) of the paged kernel."""
    if not many:
        programs, gb, dp, dvp, warps = decode_tile(H, d, dv)
        return programs, gb, 1, dp, dvp, warps
    head_blocks, gb, bt, dp, dvp, warps = tile(H, K, d, dv, many)
    return K * head_blocks, gb, bt, dp, dvp, warps


_ONE_LOAD = 8  # elements of 16 bits that a thread loads at once
_TILE = 4096  # elements of q (and of o) a program
_PER_THREAD = 32  # of which each thread holds so many


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of the first dims of x, 0 where it is broadcast."""
    if x is None:
        return (0,) * dims
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride()[:dims], x.shape, strict=False))


def _check_strides(gamma: Tensor, head_scale: Tensor | None, *dense: Tensor) -> None:
    """The kernels step by one along the last dimension; anything else would be silently wrong."""
    last = (*dense, gamma) if head_scale is None else (*dense, gamma, head_scale)
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in last):
        raise ValueError("the last dimension of q, k, v, o, gamma and head_scale must have stride 1")


def _launch_dense(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, head_scale: Tensor | None,
    first: Tensor | None, mask: Tensor | None, sink: Tensor | None, out: Tensor, scale: float, complement: bool, kv_offset: int,
    window: int, q_start: int, softcap: float, inplace: bool,
) -> None:  # fmt: skip
    """`out` is [b, lq, H, dv]; `kernel` is the Triton kernel or torch's wrapping of it."""
    _check_strides(gamma, head_scale, q, k, v, o)
    (b, _, lq, _), lk = q.shape, k.shape[2]
    # A compiler may have symbols for these; they are constants of the kernel.
    H, K, d, dv = (int(n) for n in (q.shape[1], k.shape[1], q.shape[3], o.shape[3]))
    head_blocks, gb, bt, dp, dvp, warps = tile(H, K, d, dv, bool(lq > 1))
    per_query = first is not None and first.dim() == 2
    f_b, f_t = _strides(first, 2) if per_query else (*_strides(first, 1), 0)
    y_b, y_t, y_h, _ = out.stride()
    kernel[((lq + bt - 1) // bt * (K * head_blocks), b)](
        q, k, v, o, lse, out, gamma, head_scale, first, mask, sink,
        lq, lk, kv_offset, q_start, window, scale, softcap,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *lse.stride(), y_b, y_h, y_t,
        *_strides(mask, 4), f_b, f_t,
        KH=K, G=H // K, D=d, DV=dv, DP=dp, DVP=dvp, BT=bt, GB=gb, SHIFT=lq - o.shape[2], COMPLEMENT=complement,
        INPLACE=inplace, PER_QUERY=per_query, WINDOW=bool(window > 0), SOFTCAP=bool(softcap > 0.0),
        MASK_BOOL=mask is not None and mask.dtype == torch.bool, num_warps=warps,
    )  # fmt: skip


def _launch_paged(
    kernel: Any, q: Tensor, key_cache: Tensor, value_cache: Tensor, o: Tensor, lse: Tensor, out: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, gamma: Tensor, head_scale: Tensor | None, block_slot: Tensor | None,
    row_slot: Tensor | None, sink: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, scale: float,
    complement: bool, block_ratio: int, window: int, softcap: float, inplace: bool,
) -> None:  # fmt: skip
    T, rows = q.shape[0], block_table.shape[0]
    H, d, K, dv = (int(n) for n in (q.shape[1], q.shape[2], key_cache.shape[1], o.shape[2]))
    if T == 0 or rows == 0:
        return
    _check_strides(gamma, head_scale, q, o, out)
    many = bool(rows < T)
    programs, gb, bt, dp, dvp, warps = paged_tile(H, K, d, dv, many)
    kernel[((T + bt - 1) // bt * programs,)](
        q, key_cache, value_cache, o, lse, out, block_table, query_start_loc, seq_lens, gamma, head_scale, block_slot, row_slot,
        sink, k_scale, v_scale,
        T, rows, block_ratio, window, scale, softcap,
        *q.stride()[:2], *_outer(key_cache), *_outer(value_cache), *o.stride()[:2], lse.stride(1), lse.stride(0),
        *out.stride()[:2], block_table.stride(0), gamma.stride(0), 0 if head_scale is None else head_scale.stride(0),
        KH=K, G=H // K, D=d, DV=dv, DP=dp, DVP=dvp, BT=bt, GB=gb, COMPLEMENT=complement, INPLACE=inplace,
        WINDOW=bool(window > 0), SOFTCAP=bool(softcap > 0.0), STEPS=-(-int(rows).bit_length() // 4) * 4, SPAN=not many,
        SLOTS=int(gamma.shape[0]), num_warps=warps,
    )  # fmt: skip


def _outer(cache: Tensor) -> tuple[int, int, int]:
    """Strides of block, head and channel: the first key of a block has offset 0 in it."""
    return cache.stride(0), cache.stride(1), cache.stride(3)


# --- what torch.compile sees --------------------------------------------------------------------------------------------
# triton_op: traced through, so that Inductor launches the kernel itself. `source` only enters cache keys. Registered on GPU builds
# only: registration imports Triton, and logs a warning where there is none.


def _op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, head_scale: Tensor | None, first: Tensor | None,
    mask: Tensor | None, sink: Tensor | None, scale: float, complement: bool, kv_offset: int, window: int, q_start: int,
    softcap: float, source: int,
) -> Tensor:  # fmt: skip
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], o.shape[3]), dtype=o.dtype)
    _launch_dense(
        torch.library.wrap_triton(_kernels().dense), q, k, v, o, lse, gamma, head_scale, first, mask, sink, out, scale,
        complement, kv_offset, window, q_start, softcap, False,
    )  # fmt: skip
    return out


def _op_inplace(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gamma: Tensor, head_scale: Tensor | None, first: Tensor | None,
    mask: Tensor | None, sink: Tensor | None, scale: float, complement: bool, kv_offset: int, window: int, q_start: int,
    softcap: float, source: int,
) -> None:  # fmt: skip
    _launch_dense(
        torch.library.wrap_triton(_kernels().dense), q, k, v, o, lse, gamma, head_scale, first, mask, sink, o.transpose(1, 2),
        scale, complement, kv_offset, window, q_start, softcap, True,
    )  # fmt: skip


def _op_paged(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, o: Tensor | None, lse: Tensor, out: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, gamma: Tensor, head_scale: Tensor | None, block_slot: Tensor | None,
    row_slot: Tensor | None, sink: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, scale: float,
    complement: bool, block_ratio: int, window: int, softcap: float, source: int,
) -> None:  # fmt: skip
    _launch_paged(
        torch.library.wrap_triton(_kernels().paged), q, key_cache, value_cache, out if o is None else o, lse, out, block_table,
        query_start_loc, seq_lens, gamma, head_scale, block_slot, row_slot, sink, k_scale, v_scale, scale, complement,
        block_ratio, window, softcap, o is None,
    )  # fmt: skip


if _HAS_TRITON and (torch.version.cuda or torch.version.hip):
    torch.library.triton_op("headpatch::merge_first_token", _op, mutates_args=())
    torch.library.triton_op("headpatch::merge_first_token_", _op_inplace, mutates_args=("o",))
    torch.library.triton_op("headpatch::merge_first_token_paged_", _op_paged, mutates_args=("out",))
