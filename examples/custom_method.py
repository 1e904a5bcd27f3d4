"""A method from outside the package, in thirty lines: no adapter is touched, and every engine that supplies its operands runs it.

    python examples/custom_method.py

`sink_cap` limits the share of attention that goes to the first token: what is above the cap is handed to the other tokens, in
proportion. The script registers it, applies it to one head of a tiny random Llama, and compares that head with plain softmax
arithmetic.

Inside one process, the decorator below is enough. For recipes that use the method to work wherever your package is installed
(in a server's worker processes too), let the package say so itself, in its setup.cfg::

    [options.entry_points]
    headpatch.methods =
        sink_cap = my_package.sink_cap:SinkCap
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import headpatch
from headpatch.methods.base import MassMethod, Operands, strength
from headpatch.operands import Segment, first_token

if TYPE_CHECKING:
    from torch import Tensor


@headpatch.register_method
@dataclass(frozen=True)
class SinkCap(MassMethod):
    """Let the first token have at most `cap` of a row's attention."""

    cap: float = strength(1.0, ge=0.0, le=1.0, help="largest share of attention that the first token may have")

    name: ClassVar[str] = "sink_cap"

    def segments(self) -> tuple[Segment, ...]:
        """The first token; everything else is the rest."""
        return (first_token,)

    def reshare(self, shares: Tensor, strength: Tensor, operands: Operands) -> Tensor:
        """`shares` is [2, b, h, q]: of the first token, and of the rest. A row that sees nothing else stays as it is."""
        import torch

        first, rest = shares
        capped = torch.where(rest > 0, first.minimum(strength[:, None]), first)
        return torch.stack([capped, 1 - capped])


RECIPE = {"headpatch": 1, "patches": [{"method": "sink_cap", "heads": {"1.2": 0.1}}]}


def main() -> None:
    """Apply it, and check it against plain softmax arithmetic."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (2, 12))
    with torch.no_grad():
        untouched = model(ids).logits
        with (
            headpatch.applied(model, RECIPE) as handle,
            headpatch.observe(model, ["q", "k", "v", "output"], "1.2") as seen,
        ):
            patched = model(ids).logits
            print(handle.report())

        q, k, v, output = (seen[name, "1.2"][0].double() for name in ("q", "k", "v", "output"))
        unseen = torch.ones(12, 12, dtype=torch.bool).triu(1)
        p = (q @ k.mT * 16**-0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        first = p[..., :1].clamp(max=0.1)
        edited = torch.cat([first, p[..., 1:] * (1 - first) / (1 - p[..., :1])], -1)
        edited[:, 0] = p[:, 0]  # this row sees nothing but the first token
        assert torch.allclose(edited @ v, output, atol=1e-6), "not what plain arithmetic gives"
        assert not torch.equal(patched, untouched), "nothing changed"
        assert torch.equal(model(ids).logits, untouched), "not bit-equal after removal"
    print("sink_cap equals plain softmax arithmetic, and leaves no trace when removed")


if __name__ == "__main__":
    main()
