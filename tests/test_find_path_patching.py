"""Path patching and knock-out against the same model run whole, with everything held by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import ZOO

from headpatch.errors import HeadpatchError
from headpatch.find.path_patching import Contrast, knocked_out, last_outputs, path_effects
from headpatch.tune.engine import last_tokens


class Numbers:
    chat_template = None
    eos_token_id = 1

    def __len__(self) -> int:
        return 96


CONTRASTS = [Contrast((1, 7, 8, 9, 4), (1, 7, 30, 9, 4), 50), Contrast((1, 60, 8), (1, 61, 8), 51)]
CANDIDATES = (50, 51, 52, 53)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Any:
    return ZOO[request.param].build()


def layers(base: Any) -> list[Any]:
    name = "model.layers.{}.self_attn.o_proj" if hasattr(base, "model") else "transformer.h.{}.attn.c_proj"
    return [base.get_submodule(name.format(i)) for i in range(2)]


def run(base: Any, ids: tuple[int, ...], change: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits behind the last token of a whole prompt, and head outputs there; `change(layer, z)` edits them in place."""
    kept: list[torch.Tensor] = []

    def hook(layer: int) -> Any:
        def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            z = x[:, -1].view(1, 4, -1)
            if change is not None:
                change(layer, z)
            kept.append(z.clone())
            return (x, *args[1:])

        return before

    hooks = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(layers(base))]
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0, -1].double()
    for one in hooks:
        one.remove()
    return logits, kept


def test_each_head_alone_with_all_others_held(base):
    found = path_effects(last_tokens(base, Numbers()), CONTRASTS, CANDIDATES)
    for head in found.change:
        layer, h = map(int, head.split("."))
        change, relative = [], []
        for c in CONTRASTS:
            before, z = run(base, c.prompt)
            _, other = run(base, c.other)

            def hold(at, now, z=z, other=other, layer=layer, h=h):
                now.copy_(z[at])
                if at == layer:
                    now[:, h] = other[at][:, h]

            after, _ = run(base, c.prompt, hold)
            rest = [t for t in CANDIDATES if t != c.answer]
            change.append((after[c.answer] - after[rest].mean()) - (before[c.answer] - before[rest].mean()))
            relative.append((after[c.answer] - before[c.answer]) / before[c.answer])
        assert found.change[head] == pytest.approx(float(sum(change)) / 2, abs=2e-5)
        assert found.relative[head] == pytest.approx(float(sum(relative)) / 2, abs=2e-4)
    assert found.prompts == 2 and max(map(abs, found.change.values())) > 0.01
    assert found.ranking()["0.1"] == -found.change["0.1"]


def test_the_same_prompt_has_no_effects(base):
    same = [Contrast(c.prompt, c.prompt, c.answer) for c in CONTRASTS]
    done = []
    found = path_effects(last_tokens(base, Numbers()), same, CANDIDATES, progress=lambda i, n: done.append((i, n)))
    assert max(map(abs, found.change.values())) < 1e-4 and done == [(1, 2), (2, 2)]


def test_knock_out(base):
    model = last_tokens(base, Numbers())
    begun = model.begin([c.prompt for c in CONTRASTS])
    means = [z.mean(0) for z in last_outputs(model, begun, range(2))]
    found = model.run(begun, [0, 1], knocked_out(["0.2", "1.0", "1.3"], means))

    def mean(layer, now):
        for h in {0: (2,), 1: (0, 3)}[layer]:
            now[:, h] = means[layer][h]

    for row, c in enumerate(CONTRASTS):
        torch.testing.assert_close(found[row].double().detach(), run(base, c.prompt, mean)[0], rtol=0, atol=1e-4)


def test_what_is_wrong_is_said(base):
    with pytest.raises(HeadpatchError, match="they must be as long"):
        Contrast((1, 2), (1, 2, 3), 4)
    model = last_tokens(base, Numbers())
    with pytest.raises(HeadpatchError, match="at least one contrast"):
        path_effects(model, [], CANDIDATES)
    with pytest.raises(HeadpatchError, match="candidates beside"):
        path_effects(model, CONTRASTS[:1], [50])
