"""The algebra of attention masses, without an engine: against edits of full softmax rows in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import edit_rows
from torch import Tensor

from headpatch.segments import augment, cell_log_weights, cells, include_sink, log_sum_exp, merge

B, H, Q, N, D = 2, 3, 5, 7, 4


def problem(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scores [b, H, q, n] (causal; one row sees nothing) and values [b, H, n, d]."""
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(B, H, Q, N, generator=g, dtype=dtype)
    seen = torch.ones(Q, N, dtype=torch.bool).tril(N - Q)
    scores = scores.masked_fill(~seen, -math.inf)
    scores[1, :, 2] = -math.inf
    return scores, torch.randn(B, H, N, D, generator=g, dtype=dtype)


def segments(count: int, seed: int) -> list[Tensor]:
    """Overlapping segments of the shapes that adapters serve; the last is empty in row 0."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, 1, 1, N), (B, 1, 1, N), (B, H, 1, N), (B, 1, Q, N)]
    found = [torch.rand(shapes[i % 4], generator=g) < 0.45 for i in range(count)]
    found[-1] = found[-1].expand(B, *found[-1].shape[1:]).clone()
    found[-1][0] = False
    return found


def attend(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(o, L) over the keys of a mask, as a kernel returns them: any finite output where a row sees no key."""
    inside = scores.masked_fill(~mask, -math.inf)
    lse = log_sum_exp(inside)
    blind = torch.isneginf(lse).unsqueeze(-1)
    weights = torch.exp(inside - lse.unsqueeze(-1).masked_fill(blind, 0.0))
    return torch.where(blind, 0.25, weights) @ v, lse


# --------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cells_are_a_partition(count):
    """Every key of every row lies in exactly one cell, and the cell says in which segments it lies."""
    masks = segments(count, count)
    found = cells(masks)
    assert len(found) == 2**count
    assert found[-1][0] == (), "the last cell is the rest"
    assert len({inside for inside, _ in found}) == 2**count
    whole = torch.zeros(B, H, Q, N, dtype=torch.long)
    for inside, cell in found:
        whole += cell.expand(B, H, Q, N)
        for i, mask in enumerate(masks):
            overlap = cell & mask
            assert torch.equal(overlap.expand(B, H, Q, N), cell.expand(B, H, Q, N) & torch.tensor(i in inside))
    assert (whole == 1).all()


def test_cells_need_a_segment():
    with pytest.raises(ValueError, match="at least one segment"):
        cells([])


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merging_cells_without_weights_gives_attention(count):
    scores, v = problem(1)
    parts = [attend(scores, v, cell) for _, cell in cells(segments(count, count))]
    found = merge([o for o, _ in parts], [lse for _, lse in parts])
    real = ~scores.isneginf().all(-1)
    torch.testing.assert_close(found[real], (torch.softmax(scores, -1) @ v)[real], rtol=0, atol=1e-12)
    assert found.isfinite().all()


def test_merge_with_weights_rescales_keys():
    """Weights multiply attention before one normalisation, whatever they are per cell, row and head."""
    scores, v = problem(2)
    masks = segments(2, 5)
    w = torch.rand(4, B, H, Q, dtype=torch.float64) * 3
    parts = [attend(scores, v, cell) for _, cell in cells(masks)]
    found = merge([o for o, _ in parts], [lse for _, lse in parts], w.log())
    by_key = sum(torch.where(c, w[i][..., None], 0.0) for i, (_, c) in enumerate(cells(masks)))
    row = torch.softmax(scores, -1) * by_key
    expected = row / row.sum(-1, keepdim=True) @ v
    real = ~scores.isneginf().all(-1)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-12)


def test_merge_leaves_rows_that_see_only_emptied_cells():
    scores, v = problem(3)
    mask = torch.zeros(1, 1, 1, N, dtype=torch.bool)
    mask[..., :3] = True  # all that query 0 sees
    parts = [attend(scores, v, cell) for _, cell in cells([mask])]
    log_w = torch.tensor([-math.inf, 0.0], dtype=torch.float64)[:, None, None, None]
    found = merge([o for o, _ in parts], [lse for _, lse in parts], log_w)
    plain = torch.softmax(scores, -1) @ v
    torch.testing.assert_close(found[:, :, 0], plain[:, :, 0], rtol=0, atol=1e-12)
    rest = torch.softmax(scores.masked_fill(mask, -math.inf), -1) @ v
    torch.testing.assert_close(found[:, :, 3:], rest[:, :, 3:], rtol=0, atol=1e-12)
    assert found.isfinite().all()


def test_merge_keeps_the_dtype_and_computes_in_single_precision():
    scores, v = problem(4)
    parts = [attend(scores, v, cell) for _, cell in cells(segments(2, 6))]
    found = merge([o.bfloat16() for o, _ in parts], [lse.float() for _, lse in parts])
    assert found.dtype == torch.bfloat16
    real = ~scores.isneginf().all(-1)
    expected = (torch.softmax(scores, -1) @ v)[real]
    torch.testing.assert_close(found[real].double(), expected, rtol=0.02, atol=0.02)


# -------------------------------------------------------------------------------------------------------- several edits

Reshare = Callable[[Tensor], Tensor]


def constant(*weights: float) -> Reshare:
    """Constant weights of the segments, then one normalisation."""
    w = torch.tensor([*weights, 1.0], dtype=torch.float64)[:, None, None, None]

    def fn(shares: Tensor) -> Tensor:
        new = shares * w
        total = new.sum(0)
        return torch.where(total > 0, new / torch.where(total > 0, total, 1.0), shares)

    return fn


def gated(part: float) -> Reshare:
    """The first segment gives part of its share to the rest, where it has more than a third; the second keeps its own."""

    def fn(shares: Tensor) -> Tensor:
        moved = (part * shares[0]).where((shares[0] > 1 / 3) & (shares[-1] > 0), 0.0)
        return torch.cat([(shares[0] - moved)[None], shares[1:-1], (shares[-1] + moved)[None]])

    return fn


def edited(
    scores: Tensor, v: Tensor, masks: Sequence[Tensor], patches: Sequence[tuple[Sequence[int], Reshare]]
) -> Tensor:
    """One pass over cells."""
    split = cells(masks)
    parts = [attend(scores, v, cell) for _, cell in split]
    lses = [lse for _, lse in parts]
    return merge([o for o, _ in parts], lses, cell_log_weights(lses, [inside for inside, _ in split], patches))


def one_after_the_other(
    scores: Tensor, v: Tensor, masks: Sequence[Tensor], patches: Sequence[tuple[Sequence[int], Reshare]]
) -> Tensor:
    """Full rows, edited in sequence and normalised each time."""
    row = torch.softmax(scores, -1).nan_to_num(0.0)
    for names, fn in patches:
        taken = torch.zeros(B, H, Q, N, dtype=torch.bool)
        disjoint = []
        for i in names:  # a key in two segments of one patch belongs to the first
            disjoint.append(masks[i] & ~taken)
            taken = taken | masks[i]
        new = edit_rows(row, disjoint, fn)
        total = new.sum(-1, keepdim=True)
        row = torch.where(total > 0, new / torch.where(total > 0, total, 1.0), row)
    return row @ v


CHAINS: dict[str, list[tuple[Sequence[int], Reshare]]] = {
    "constant": [((0,), constant(5.0))],
    "two_segments": [((0, 1), constant(5.0, 0.1))],
    "constant_then_gated": [((0,), constant(5.0)), ((1,), gated(0.6))],
    "gated_then_constant": [((1,), gated(0.6)), ((0,), constant(5.0))],
    "gated_twice": [((0,), gated(0.5)), ((0,), gated(0.5))],
    "three": [((2,), constant(0.0)), ((0, 1), gated(0.7)), ((1, 2), constant(3.0, 0.5))],
    "emptied_then_reshared": [((0,), constant(0.0)), ((0,), constant(7.0)), ((1,), gated(0.3))],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("seed", range(3))
def test_several_edits_act_one_after_the_other(chain, seed):
    scores, v = problem(seed)
    masks = segments(3, seed)
    found = edited(scores, v, masks, CHAINS[chain])
    real = ~scores.isneginf().all(-1)
    torch.testing.assert_close(
        found[real], one_after_the_other(scores, v, masks, CHAINS[chain])[real], rtol=0, atol=1e-12
    )
    assert found.isfinite().all()


def test_order_matters_only_where_it_should():
    """Constant weights commute; gates do not."""
    scores, v = problem(0)
    masks = segments(3, 0)
    one, two = ((0,), constant(5.0)), ((1,), constant(0.2))
    torch.testing.assert_close(
        edited(scores, v, masks, [one, two]), edited(scores, v, masks, [two, one]), rtol=0, atol=1e-12
    )
    gate = ((1,), gated(0.9))
    assert not torch.allclose(edited(scores, v, masks, [one, gate]), edited(scores, v, masks, [gate, one]), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 3),
    chain=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.03, 1.0, 20.0]), st.booleans()), min_size=1, max_size=4
    ),
)
def test_any_chain_of_edits(seed, count, chain):
    scores, v = problem(seed)
    masks = segments(count, seed)
    patches = [((i % count,), gated(min(w, 1.0)) if gate else constant(w)) for i, w, gate in chain]
    found = edited(scores, v, masks, patches)
    real = ~scores.isneginf().all(-1)
    torch.testing.assert_close(found[real], one_after_the_other(scores, v, masks, patches)[real], rtol=0, atol=1e-10)


def test_gradients_of_cells_without_mass():
    """Segment 2 is empty in row 0 and some rows see nothing: gradients are those of the full rows."""
    grads = []
    for fn in (edited, one_after_the_other):
        scores, v = problem(5)
        scores.requires_grad_()
        out = fn(scores, v, segments(3, 5), CHAINS["constant_then_gated"])
        real = ~scores.isneginf().all(-1)
        (out[real] * torch.arange(D, dtype=out.dtype)).sum().backward()
        grads.append(scores.grad)
    assert grads[0].isfinite().all()
    assert not grads[0][~real].any()  # the plain rows' own gradients are NaN there
    torch.testing.assert_close(grads[0][real], grads[1][real], rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- sinks


def test_a_learned_sink_is_a_key_without_value():
    scores, v = problem(6)
    sink = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64)
    o, lse = torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)
    found, both = include_sink(o, lse, sink)
    wide = torch.cat([scores, sink[None, :, None, None].expand(B, H, Q, 1)], -1)
    torch.testing.assert_close(found, torch.softmax(wide, -1)[..., :-1] @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(both, torch.logsumexp(wide, -1), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- augment


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.03)], ids=str
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_augmented_heads_add_to_the_scores_of_segments(dtype, bound, kv_heads):
    """Extra head dimensions, exact under any kernel; three of them in low precision, where one number cannot hold log g."""
    g = torch.Generator().manual_seed(0)
    heads, n, d, scale = 4, 9, 16, 0.37
    q, k, v = (
        torch.randn(2, h, n, d, generator=g, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)
    )
    weights = torch.tensor([[0.5, 3.0], [100.0, 1.0], [1.0, 0.02], [7.3, 0.9]], dtype=torch.float64)
    members = torch.zeros(2, n, 2, dtype=torch.bool)
    members[0, 0, 0] = members[1, 2, 0] = members[:, 4:6, 1] = True
    q2, k2, v2 = augment(q, k, v, weights.log().to(torch.promote_types(dtype, torch.float32)), members, scale)
    assert q2.shape[-1] == k2.shape[-1] == v2.shape[-1] and q2.shape[-1] % 8 == 0
    assert torch.equal(q2[..., :d], q) and torch.equal(k2[..., :d], k) and torch.equal(v2[..., :d], v)
    out = torch.nn.functional.scaled_dot_product_attention(q2, k2, v2, is_causal=True, scale=scale, enable_gqa=True)
    assert not out[..., d:].any()
    kk, vv = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = (q.double() @ kk.transpose(2, 3) * scale).masked_fill(
        torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf
    )
    row = torch.softmax(scores, -1)
    for s in range(2):
        row = torch.where(members[:, None, None, :, s], row * weights[None, :, s, None, None], row)
    expected = row / row.sum(-1, keepdim=True) @ vv
    torch.testing.assert_close(out[..., :d].double(), expected, rtol=0, atol=bound)


def test_augmented_heads_carry_gradients_of_the_weights():
    g = torch.Generator().manual_seed(1)
    n, d, scale = 6, 8, 0.5
    q, k, v = (torch.randn(1, 2, n, d, generator=g, dtype=torch.float64) for _ in range(3))
    members = torch.zeros(1, n, 1)
    members[0, 0] = 1

    def fused(weights: Tensor) -> Tensor:
        q2, k2, v2 = augment(q, k, v, weights.log()[:, None], members, scale)
        return torch.nn.functional.scaled_dot_product_attention(q2, k2, v2, scale=scale)[..., :d]

    def full(weights: Tensor) -> Tensor:
        row = torch.softmax(q @ k.transpose(2, 3) * scale, -1)
        row = torch.cat([row[..., :1] * weights[None, :, None, None], row[..., 1:]], -1)
        return row / row.sum(-1, keepdim=True) @ v

    found = []
    for fn in (fused, full):
        weights = torch.tensor([0.3, 8.0], dtype=torch.float64, requires_grad=True)
        (fn(weights) * torch.arange(d, dtype=torch.float64)).sum().backward()
        found.append(weights.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_augment_turns_weight_zero_into_a_bias_that_no_softmax_sees_through():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 5, 8, generator=g) for _ in range(3))
    members = torch.zeros(1, 5, 1)
    members[0, 1] = 1
    q2, k2, v2 = augment(q, k, v, torch.full((1, 1), -math.inf), members, 0.5)
    assert q2.isfinite().all()
    out = torch.nn.functional.scaled_dot_product_attention(q2, k2, v2, scale=0.5)[..., :8]
    keep = [0, 2, 3, 4]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, keep], v[:, :, keep], scale=0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
