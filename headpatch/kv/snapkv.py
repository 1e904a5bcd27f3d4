"""SnapKV: each KV head keeps the tokens of the prompt that its last queries attend to.

The last w queries of a prompt, the observation window, show what a head will look for. With their attention A = softmax(Q_w K^T /
sqrt(d) + causal), [H, w, n], and C tokens to keep per KV head,

    s_h[j] = pool_5(mean over the w rows of A_h[:, j]),  j < n - w            averaged over the query heads that share a KV head
    keep     the w tokens of the window, the first `sink`, and the C - w - sink best of the others by s

and every generated token. Pooling spreads a high score over its neighbours, so that a fact is not kept in shreds.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469; code:
github.com/FasterDecoding/SnapKV.

Where this differs from the released code:

* Scores are averaged over the query heads of a group, and one KV head keeps one set. The released code repeats keys first and so
  keeps a set, and a copy, per query head.
* `sink` is new, and 0 by default, as there. Another patch that names the first token needs it to be at least 1.
* No budget below the window and the sinks; a prompt that is no longer than the budget stays whole.

The question must stand in the prompt's last tokens for this to work well: scores from other text say little about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headpatch.kv.choosing import ObservationWindow


@dataclass(frozen=True)
class SnapKV(ObservationWindow):
    """KV heads keep the tokens of the prompt that its last queries attend to most."""

    name: ClassVar[str] = "snapkv"
