"""The kernel that edits attention over a paged cache, by the size of its programs and by how many share a row's keys.

    python benchmarks/paged_segments_probe_gpu.py      # a CUDA device with Triton; a minute

Three of 32 heads are edited, 8 KV heads, 128 wide, bfloat16, blocks of 16. Microseconds of a launch in a CUDA graph.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from headpatch.kernels import paged_segments
from headpatch.kernels.paged_segments import RANGES, SCALARS, WIDTH, PagedSegments, scratch_numbers

HEADS, KV, DIM, SIZE = 32, 8, 128, 16
EDITED = (3, 14, 29)
PROMPTS = [(1, 7680), (4, 2048)]
STEPS = [(1, 640), (1, 8192), (32, 640), (256, 640), (4, 32768)]
PROMPT_TILES = [
    (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3),
    (128, 32, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2),
]  # fmt: skip
STEP_TILES = [
    (16, 64, 4, 2),
    (16, 64, 4, 3),
    (16, 32, 4, 3),
    (16, 128, 4, 2),
    (16, 64, 2, 3),
    (16, 32, 2, 4),
    (16, 128, 8, 2),
]
SHARED = [256, 512, 1024, 2048, 4096]


class Case:
    """So many rows of `length` tokens, of which the last, or all, are this call's."""

    def __init__(self, rows: int, length: int, whole: bool, forms: bool) -> None:
        count, per_row = (length if whole else 1), -(-length // SIZE)
        self.device = torch.device("cuda")
        self.cache = torch.randn(rows * per_row + 1, KV, SIZE, 2 * DIM, device="cuda", dtype=torch.bfloat16)
        self.q = torch.randn(rows * count, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.out, self.one = torch.empty_like(self.q), not whole
        self.lse = torch.full((HEADS, rows * count), 8.0, device="cuda")
        place = torch.randperm(rows * per_row, device="cuda") + 1
        self.table = place.view(rows, per_row).int()
        self.starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * count
        self.lengths = torch.full((rows,), length, device="cuda", dtype=torch.int32)
        edits = torch.zeros(1, HEADS, WIDTH)
        for head in EDITED:
            for name, value in {"live": 1.0, "strength": 0.4, "amplify_from": -1e9}.items():
                edits[0, head, SCALARS[name]] = value
            edits[0, head, 2:6] = -3.0
            if forms:
                for name, value in {"form": 1.0, "marked": 1.0, "threshold": 1e-3, "min_queries": 1.0}.items():
                    edits[0, head, SCALARS[name]] = value
                edits[0, head, 80:96] = 1.0
        ranges = torch.tensor([[0, 2, 2, 0, 0, 0, 0, 0]], dtype=torch.int32).repeat(rows, 1)
        marks = (torch.rand(len(self.cache), len(EDITED), SIZE) < 0.02).to("cuda", torch.uint8) if forms else None
        mark_of = torch.zeros(HEADS, dtype=torch.int32)
        mark_of[list(EDITED)] = torch.arange(len(EDITED), dtype=torch.int32)
        assert ranges.shape[1] == RANGES
        self.kernel = PagedSegments(
            self.cache[..., :DIM], self.cache[..., DIM:], edits.cuda(), heads=torch.tensor(EDITED, dtype=torch.int32).cuda(),
            row_slot=torch.zeros(rows, dtype=torch.int32).cuda(), row_prompt=torch.full((rows,), length).cuda(), ranges=ranges.cuda(),
            bounds=torch.tensor([10, 60], dtype=torch.int32).cuda(), scratch=torch.zeros(scratch_numbers(DIM)).cuda(),
            scale=DIM**-0.5, marks=marks, mark_of=mark_of.cuda() if forms else None, forms=forms, after=False,
        )  # fmt: skip

    def attend(self) -> None:
        self.kernel(self.q, self.out, self.table, self.starts, self.lengths, self.one)

    def mark(self) -> None:
        self.kernel.mark(self.q, self.lse, self.table, self.starts, self.lengths)


def microseconds(run: Any, times: int = 20) -> float:
    """Of one call among many in a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1000 / (3 * times)


def tiles(case: Case, found: list[tuple[int, int, int, int]]) -> str:
    cells = []
    for tile in found:
        with mock.patch.object(paged_segments, "_tile", lambda *_, tile=tile: tile):
            case.kernel.key = (*case.kernel.key[:17], tile)  # compiled anew
            try:
                cells.append(f"{tile} {microseconds(case.attend):.0f}")
            except Exception as error:  # too large for this card: say so and go on
                cells.append(f"{tile} {type(error).__name__}")
    return "; ".join(cells)


def main() -> None:
    """Print a line a case."""
    print(torch.cuda.get_device_name(), torch.__version__)
    for forms in (False, True):
        words = "act" if forms else "weights"
        for rows, length in PROMPTS:
            case = Case(rows, length, True, forms)
            extra = f"mark {microseconds(case.mark):.0f}; " if forms else ""
            print(f"prompts {rows} x {length}, {words}: {extra}{tiles(case, PROMPT_TILES)}", flush=True)
        for rows, length in STEPS:
            case = Case(rows, length, False, forms)
            cells = []
            for most in SHARED:
                with mock.patch.object(paged_segments, "ENTRIES", most):
                    case.kernel.scratch = torch.zeros(scratch_numbers(DIM), device="cuda")
                    cells.append(f"shared by {case.kernel.parts(rows)}: {microseconds(case.attend):.0f}")
            print(
                f"step {rows} x {length}, {words}: {'; '.join(dict.fromkeys(cells))} | {tiles(case, STEP_TILES)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
