"""StreamingLLM: every KV head keeps the first and the last tokens only.

For the query at position i (positions count a row's real tokens from 0), every head of the part attends to

    V_i = {p : p < sink} + {p : i - recent < p <= i}                        K, V: [K, min(T, sink + recent), d]

where `recent` counts the token itself. The cache stays as long as it is, and nothing between the first and the last tokens can be
recalled: this is a baseline, and what an endless stream needs.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453; code:
github.com/mit-han-lab/streaming-llm. 4 and 2000 are what its example script keeps.

Where this differs from the released code: that stores keys before the rotary embedding and numbers positions inside the cache, so
that a stream may be longer than the model was trained for. Here keys keep their original positions, as in DuoAttention: equal
within the trained length up to the distances that the model is shown, and not meant for longer streams. The window holds for every
query of the prompt, too; the released code prefills densely.

There is nothing to list: a recipe's patch has no list of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headpatch.methods.base import param
from headpatch.policies import WindowMethod


@dataclass(frozen=True)
class StreamingLLM(WindowMethod):
    """Every KV head keeps the first `sink` and the last `recent` tokens only."""

    sink: int = param(
        4, ge=0, le=2**20, help="first tokens that every KV head keeps, counted from a row's first real one"
    )
    recent: int = param(2000, ge=1, le=2**24, help="last tokens that every KV head keeps, the current one included")

    name: ClassVar[str] = "streaming_llm"
    heads_key: ClassVar[str | None] = None
