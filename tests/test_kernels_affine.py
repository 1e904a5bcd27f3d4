"""Constant edits at some positions of packed rows, plain torch and Triton, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import backends, device_of

from headpatch.kernels.affine import ALWAYS, affine_rows

SPANS = ((-1, 0), (-1, ALWAYS), (0, ALWAYS), (-ALWAYS, 0), (0, 0))


class World:
    """Rows in all stages: in their prompt, on its last token, behind it, one token of speculation, nobody's, and padding."""

    def __init__(
        self, H: int = 5, d: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = 12
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.counts = torch.randint(1, 6, (rows,), generator=g)
        self.lengths = self.counts + torch.randint(0, 9, (rows,), generator=g)
        self.prompt = (self.lengths + torch.randint(-4, 4, (rows,), generator=g)).clamp_min(1)
        self.slot = torch.randint(-1, len(SPANS), (rows,), generator=g)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.counts.cumsum(0)])
        tokens = int(self.starts[-1]) + 3
        self.out = torch.randn(tokens, H, d + 8, generator=g).to(dtype)[..., :d]
        self.factor = torch.randn(len(SPANS), H, generator=g)
        self.shift = torch.randn(len(SPANS), H, d, generator=g)
        self.factor[:, 1], self.shift[:, 1] = 1.0, 0.0  # a head that nobody names

    def expected(self, shifted: bool) -> torch.Tensor:
        out = self.out.clone()
        for r in range(len(self.counts)):
            for i in range(int(self.counts[r])):
                t = int(self.starts[r]) + i
                position = int(self.lengths[r] - self.counts[r]) + i
                s = int(self.slot[r])
                if s < 0 or not SPANS[s][0] <= position - int(self.prompt[r]) < SPANS[s][1]:
                    continue
                new = self.out[t].double() * self.factor[s][:, None].double()
                out[t] = (new + self.shift[s].double() if shifted else new).to(out.dtype)
        return out

    def run(self, backend: str, shifted: bool) -> torch.Tensor:
        device = device_of(backend)
        whole = torch.zeros(*self.out.shape[:2], self.out.shape[2] + 8, dtype=self.out.dtype)
        out = whole.to(device)[..., : self.out.shape[2]]
        out.copy_(self.out)
        padded = torch.cat([self.starts, self.starts[-1:].repeat(2)]).int()
        affine_rows(
            out, self.factor.to(device), self.shift.to(device) if shifted else None,
            torch.tensor([a for a, _ in SPANS]).to(device), torch.tensor([b for _, b in SPANS]).to(device),
            row_slot=torch.cat([self.slot, torch.tensor([0, -1, 3])]).int().to(device),
            row_prompt=torch.cat([self.prompt, torch.zeros(3, dtype=torch.long)]).to(device),
            query_start_loc=padded.to(device), seq_lens=torch.cat([self.lengths, torch.zeros(2)]).int().to(device), backend=backend,
        )  # fmt: skip
        return out.cpu()


@backends
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_rows(backend, shifted, seed):
    world = World(seed=seed)
    expected, found = world.expected(shifted), world.run(backend, shifted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found == world.out, expected == world.out)  # what is not named comes back bit for bit
    assert not torch.equal(expected, world.out)


@backends
def test_half_precision_and_wide_heads(backend):
    for H, d in ((3, 128), (17, 16)):
        world = World(H, d, torch.bfloat16)
        torch.testing.assert_close(world.run(backend, True), world.expected(True), rtol=8e-3, atol=1e-2)


@backends
def test_one_row_and_nothing(backend):
    world = World(rows=1, seed=4)
    torch.testing.assert_close(world.run(backend, True), world.expected(True), rtol=0, atol=1e-6)
    world.out = world.out[:0]
    assert world.run(backend, True).shape[0] == 0
