"""DuoAttention: retrieval heads keep every token, streaming heads the first and the last ones.

A few KV heads fetch things from anywhere in the context; most look at the first tokens (attention sinks) and at what was said
last. The KV heads listed under ``full_kv_heads`` keep everything; every other KV head of the part keeps the first `sink` and the
last `recent` tokens, so that its cache stays as long as it is. A layer that the list does not name streams entirely. For the
query at position i (positions count a row's real tokens from 0), a streaming head attends to

    V_i = {p : p < sink} + {p : i - recent < p <= i}
    o_i = sum over p in V_i of softmax(q_i k_p / sqrt(d)) v_p              K, V of a streaming head: [min(T, sink + recent), d]

where `recent` counts the token itself and keys keep their original positions. With T <= sink + recent tokens nothing changes.

Source: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819;
code: github.com/mit-han-lab/duo-attention. The defaults are those of its accuracy runs.

Where this differs from the released code:

* There, a prompt's first chunk is dense for all heads, and in later chunks a streaming head also sees the whole chunk: results
  depend on how the prompt is cut. Here the window holds for every query of the prompt, whatever the chunks. (In training the
  released code masks as it is done here.)
* Sinks are the first *real* tokens of each row; the released code puts left padding into them.
* Heads are a list in the recipe, not a threshold on published gates: those hold many ties, which unseeded noise decides.
* The released code permutes the rows of the projections; here weights are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headpatch.policies import WindowMethod


@dataclass(frozen=True)
class DuoAttention(WindowMethod):
    """KV heads that are not listed keep the first `sink` and the last `recent` tokens only."""

    name: ClassVar[str] = "duo_attention"
