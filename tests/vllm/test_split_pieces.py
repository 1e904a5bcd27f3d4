"""What one operator of a cut layer does with its pieces, on implementations that note what they are asked: no engine, no GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headpatch.adapters.vllm import split_layer
from headpatch.adapters.vllm.split import FULL, WINDOW
from headpatch.adapters.vllm.split_layer import PiecesImpl

TOKENS, D = 3, 4
PARTS = {"a": (FULL, (0, 2, 0, 1)), "b": (FULL, (2, 4, 1, 2)), "w": (WINDOW, (4, 8, 2, 4))}


class Impl:
    """Attention whose output says whose it is and which queries came in."""

    def __init__(self, name: str, number: int, log: list[Any]) -> None:
        self.name, self.number, self.log = name, number, log

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Any, slots: Any) -> None:
        assert (cache, slots) == (f"cache {self.name}", f"slots {self.name}")
        self.log.append(("write", self.name, key.shape[1], value[0, 0, 0].item()))

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, out: Tensor) -> None:
        assert (cache, metadata) == (f"cache {self.name}", f"metadata {self.name}")
        self.log.append(("attend", self.name))
        out.copy_(q + 100 * self.number)


class Stream:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


@pytest.mark.parametrize("capturing", [True, False])
@pytest.mark.parametrize("names", ["abw", "a", "w"])
def test_pieces_are_written_and_run_in_order(names: str, capturing: bool, monkeypatch: Any) -> None:
    log: list[Any] = []
    backend = SimpleNamespace(forward_includes_kv_cache_update=False)
    runs = []
    for number, name in enumerate(names):
        kind, heads = PARTS[name]
        piece = SimpleNamespace(
            layer_name=name, attn_backend=backend, piece=SimpleNamespace(kind=kind), impl=Impl(name, number, log)
        )
        runs.append((piece, heads))
    main, side = Stream("main", log), Stream("side", log)

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        log.append(("on", stream.name))
        yield
        log.append(("off", stream.name))

    monkeypatch.setattr(
        split_layer, "get_attention_context", lambda name: (f"metadata {name}", None, f"cache {name}", f"slots {name}")
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    impl = PiecesImpl(runs, runs[0][0].impl, side)  # type: ignore[arg-type]
    q = torch.arange(TOKENS * 8 * D, dtype=torch.float32).view(TOKENS, 8, D)
    kv = torch.arange(TOKENS * 4 * D, dtype=torch.float32).view(TOKENS, 4, D)
    out = torch.full_like(q, -1)
    impl.do_kv_cache_update(None, kv, kv, None, None)
    assert not log  # the operator before attention writes nothing
    assert impl.forward(None, q, kv, kv, None, None, out) is out

    for number, name in enumerate(names):
        a, b, c, d = PARTS[name][1]
        assert torch.equal(out[:, a:b], q[:, a:b] + 100 * number)
        assert ("write", name, d - c, kv[0, c, 0].item()) in log
    done = [entry[:2] for entry in log]
    if names == "abw" and capturing:
        assert log[2] == ("side", "waits for", "main")  # behind the full pieces' keys, which are written first
        assert [x[:2] for x in log[:2]] == [("write", "a"), ("write", "b")]
        assert done[3:5] == [("attend", "a"), ("attend", "b")]
        assert done[5:9] == [("on", "side"), ("write", "w"), ("attend", "w"), ("off", "side")]
        assert log[9] == ("main", "waits for", "side")
    else:
        assert not any("waits for" in entry for entry in log)
        assert all(done.index(("write", name)) < done.index(("attend", name)) for name in names)


def test_what_is_asked_beside_attention_the_first_piece_answers() -> None:
    first = SimpleNamespace(scale=0.5, fused_output_quant_supported=lambda *_: True)
    piece = SimpleNamespace(piece=SimpleNamespace(kind=FULL), impl=first)
    impl = PiecesImpl([(piece, (0, 1, 0, 1))], first, None)  # type: ignore[list-item]
    assert impl.scale == 0.5
    assert impl.fused_output_quant_supported() is impl.fused_rope_kvcache_supported() is False
    with pytest.raises(AttributeError, match="sinks"):
        _ = impl.sinks
