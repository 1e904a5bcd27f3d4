"""What keeping LoRA to chosen heads costs: a training step and its memory, against the same LoRA without the restriction.

    python benchmarks/bench_tune.py [--model M] [--device cuda] [--batch 4] [--length 64] [--rank 8] [--checkpointing]

Same modules, layers and rank: LoRA on two heads of each layer, and the same adapter with its restriction switched off, in turn.
Bound: 2 percent of time and of memory. It is one model, because two of a kind differ: the one that was loaded later took one to
four percent longer on a CPU, whichever it was. What noise is left stands beside the ratio. Memory is the peak that torch allocated
on a GPU, and the largest resident size while stepping of a process of its own on a CPU (Linux); there plain PEFT made the
unrestricted adapter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, alternate, machine, timed, write

from headpatch import tune
from headpatch.commands.generate import load
from headpatch.demo_model import SHORT_NAME
from headpatch.tune.guard import ClearGradient, restriction_of

BOUND = 1.02


def adapted(base: Any, restricted: bool, rank: int) -> Any:
    """The base with LoRA on q and o of every layer; on heads 0 and 1 alone where `restricted`."""
    import peft

    tuned = tune.lora(base, "*.0-1", r=rank)
    if restricted:
        return tuned
    targets = list(tuned.peft_config["default"].target_modules)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    return peft.get_peft_model(tuned.unload(), config)


def loaded(given: argparse.Namespace) -> Any:
    """The base."""
    base, _ = load(given.model, given.device, given.dtype)
    if given.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def stepper(model: Any, given: argparse.Namespace) -> Callable[[], None]:
    """A training step of a model with an adapter."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    device = next(model.parameters()).device
    ids = torch.randint(5, 1000, (given.batch, given.length), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def switched(model: Any, step: Callable[[], None], on: bool) -> Callable[[], None]:
    """The step of a restricted model with its restriction, or without: the same tensors in the same places either way."""
    restriction = restriction_of(model)
    place = next(key for key, hook in model._forward_pre_hooks.items() if hook is restriction)

    def run() -> None:
        if on:
            model._forward_pre_hooks[place] = restriction  # which puts the hooks on gradients back
        elif place in model._forward_pre_hooks:
            del model._forward_pre_hooks[place]
            for _, weight, _ in restriction.factors():
                (weight._backward_hooks or {}).clear()
        step()

    return run


def hooks_alone(model: Any, device: torch.device) -> str:
    """What the hooks and the check before a forward take, without a model around them: in milliseconds of a step."""
    factors = [(w.detach().clone().requires_grad_(), m.keep) for _, w, m in restriction_of(model).factors()]

    def backward() -> None:
        torch.stack([w.sum() for w, _ in factors]).sum().backward()
        for w, _ in factors:
            w.grad = None

    def took(run: Callable[[], None]) -> float:
        run()
        return statistics.median(timed(run, device) for _ in range(20))

    without = took(backward)
    for weight, keep in factors:
        weight.register_hook(ClearGradient(keep))
    hooks, check = took(backward) - without, took(restriction_of(model).arm)
    return f"{len(factors)} hooks take {hooks:.2f} ms, the check before a forward {check:.2f} ms"


def memory(given: argparse.Namespace, restricted: bool) -> float:
    """MiB at the peak of a step, in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--peak", "restricted" if restricted else "plain"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def peak(given: argparse.Namespace) -> None:
    base = loaded(given)
    step, device = stepper(adapted(base, given.peak == "restricted", given.rank), given), base.device
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # what loading the model took does not count
    for _ in range(2):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        print(int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHORT_NAME)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--processes", type=int, default=3, help="so often the peak of memory is taken, of either")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", choices=("plain", "restricted"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given)
        return
    torch.manual_seed(0)
    model = adapted(loaded(given), True, given.rank)
    device = next(model.parameters()).device
    step = stepper(model, given)
    off, again, mine = (switched(model, step, on) for on in (False, False, True))
    what = f"{given.batch} x {given.length} tokens, rank {given.rank}" + (
        ", checkpointing" if given.checkpointing else ""
    )
    how = {"pairs": given.pairs, "warm": 2, "turns": given.turns, "notes": what}
    row: Row = alternate("training step", off, mine, device, bound=BOUND, **how)
    null = alternate("the unrestricted one, over itself", off, again, device, **how)
    sizes = [(memory(given, False), memory(given, True)) for _ in range(given.processes)]
    row.memory_ratio = statistics.median(b for _, b in sizes) / statistics.median(a for a, _ in sizes)
    extra = [
        f"peak memory, MiB (plain, restricted), {given.processes} processes each: "
        + json.dumps([[round(x, 1) for x in pair] for pair in sizes]),
        hooks_alone(model, device),
    ]
    write(f"tune_{device.type}", [row, null], machine(device), extra, given.out)


if __name__ == "__main__":
    main()
