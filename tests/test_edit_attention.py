"""Mass edits on attention itself say what they say on scores, for some heads or, as compilers like it, for all at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headpatch.adapters.huggingface.plan import Edit
from headpatch.methods.act import AttentionCalibration
from headpatch.methods.base import Method
from headpatch.methods.pai import PayAttentionToImage
from headpatch.methods.pasta import Pasta
from headpatch.scores import attention_of, edit_attention, edit_scores

B, H, Q, N = 2, 5, 7, 11


def edit(method: Method, strengths: dict[int, float], at: int) -> Edit:
    made = Edit(
        method,
        torch.tensor(list(strengths)),
        torch.tensor(list(strengths.values()), dtype=torch.float64),
        ("test", at),
    )
    made.prepare(H)
    return made


def masks() -> tuple[Tensor, Tensor]:
    """Some keys, the first among them, in all heads; and others, which overlap, that each head has of its own."""
    column = torch.arange(N)
    return (column % 4 == 0).view(1, 1, 1, N), torch.rand(B, H, 1, N, generator=torch.Generator().manual_seed(2)) < 0.4


def causal_scores() -> Tensor:
    scores = torch.randn(B, H, Q, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    hidden = torch.arange(N) > torch.arange(Q)[:, None]
    return scores.masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("heads", [(1, 3), tuple(range(H))], ids=["some", "all"])
def test_attention_says_what_scores_say(heads: tuple[int, ...], fused: bool) -> None:
    some, own = masks()
    # The first query sees nothing but the first token, which is emptied in one head: that row stays.
    first = edit(AttentionCalibration(), {h: (0.0, 0.4, 0.9)[h % 3] for h in heads}, 0)
    second = edit(Pasta(target_mass=0.6), dict.fromkeys(heads[::2], 0.1), 1)
    acting = [(first, [some], {}), (second, [own], {})]
    scores = causal_scores()
    wanted = attention_of(edit_scores(scores, acting))
    found = edit_attention(attention_of(scores), acting, fused)
    assert (found - wanted).abs().max() < 1e-12
    others = [h for h in range(H) if h not in heads]
    assert torch.equal(found[:, others], attention_of(scores)[:, others])
    assert (found[:, list(heads)] - attention_of(scores)[:, list(heads)]).abs().max() > 0.01


def test_scores_of_all_heads_with_the_others_put_back_are_those_of_some() -> None:
    some, _ = masks()
    image = edit(PayAttentionToImage(queries="all"), {1: 0.5, 3: 0.2}, 0)
    assert image.dense is not None
    acting, scores = [(image, [some], {})], causal_scores()
    assert torch.equal(edit_scores(scores, acting, True), edit_scores(scores, acting))


def test_what_needs_numbers_of_single_heads_is_not_done_to_all() -> None:
    trained = Edit(
        Pasta(), torch.tensor([1]), torch.tensor([0.5], dtype=torch.float64, requires_grad=True), ("test", 0)
    )
    trained.prepare(H)
    assert trained.dense is None
