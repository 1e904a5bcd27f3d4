"""Fine-tune chosen heads on sums, and compare them with random heads and with all heads at equal trainable numbers.

    python examples/tune_heads.py                          # SmolLM2-135M-Instruct, fetched on first use
    python examples/tune_heads.py MODEL --heads 24 --steps 60 --save adapters/sums

Heads are ranked by the loss's gradient at a factor on each head's output: one backward pass per batch. The problems are written
by the script; those that are tested are not among those that are trained on. `--save` writes the adapter of the chosen heads, which
plain PEFT loads, and `vllm serve MODEL --enable-lora --lora-modules sums=adapters/sums` serves.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from torch import Tensor

from headpatch import tune
from headpatch.demo_model import SHORT_NAME
from headpatch.registry import find_adapter

Batch = dict[str, Tensor]


def problems(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different sums of two numbers of two digits: question and answer."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [(f"Q: What is {a} plus {b}?\nA:", f" {a + b}") for a, b in random.Random(seed).sample(pairs, count)]  # noqa: S311


def encode(tokenizer: Any, rows: list[tuple[str, str]], device: torch.device) -> Batch:
    """One batch, padded on the right; only the answer's tokens are labels."""
    found = []
    for question, answer in rows:
        start, whole = tokenizer(question).input_ids, tokenizer(question + answer).input_ids
        if whole[: len(start)] != start:
            raise ValueError("the answer merges with the question in this tokenizer")
        found.append((whole, len(start)))
    width = max(len(ids) for ids, _ in found)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
    }
    for row, (ids, start) in enumerate(found):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, start : len(ids)] = torch.tensor(ids[start:])
    return {name: value.to(device) for name, value in batch.items()}


def accuracy(model: Any, batches: list[Batch]) -> float:
    """Share of answers whose every token would be chosen: what greedy decoding gets right."""
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            guess = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
            )
            labels = batch["labels"][:, 1:]
            right += int(((guess == labels) | (labels == -100)).all(1).sum())
            total += len(labels)
    return right / total


def rank(model: Any, batches: list[Batch]) -> dict[str, float]:
    """How fast the loss changes with a factor on each head's output, by ``layer.head``."""
    with tune.HeadVectors(model, kind="scale", std=0.0) as factors:
        for batch in batches:
            model(**batch).loss.backward()
        return {
            f"{layer}.{head}": abs(float(slope))
            for layer, heads in factors.heads.items()
            for head, slope in zip(heads, factors.values[layer].grad.flatten(), strict=True)
        }


def train(model: Any, batches: list[Batch], steps: int, lr: float) -> float:
    """AdamW; the mean loss of the last quarter of the steps, in nats per token."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(1, steps // 4) :]
    return sum(last) / len(last)


def main(arguments: list[str] | None = None) -> None:
    """Rank, tune three ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=SHORT_NAME)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save")
    given = parser.parse_args(arguments)

    from headpatch.commands.generate import load

    model, tokenizer = load(given.model, given.device, "float32")
    rows = problems(given.test + given.steps * given.batch, given.seed)
    batches = [
        encode(tokenizer, rows[i : i + given.batch], model.device)
        for i in range(0, len(rows) - given.batch + 1, given.batch)
    ]
    held = -(-given.test // given.batch)
    test, data = batches[:held], batches[held:]
    print(f"untouched: {accuracy(model, test):.1%} of {held * given.batch} sums right")

    ranking = rank(model, data[:4])
    best = sorted(ranking, key=lambda head: -ranking[head])[: given.heads]
    others = sorted(ranking.keys() - set(best))
    chance = random.Random(given.seed).sample(others, min(given.heads, len(others)))  # noqa: S311
    print(f"chosen: {' '.join(best)}")
    budget = 0
    for name, heads in (("chosen heads", best), ("random heads", chance), ("all heads", "*.*")):
        torch.manual_seed(given.seed)
        r = given.rank
        if heads == "*.*":  # at about as many trainable numbers
            stack = find_adapter(model).shape(model).parts["text"]
            wide = sum(h * d for h, d in zip(stack.num_heads, stack.head_dim, strict=True))
            r = max(1, round(budget / (2 * (wide + stack.num_layers * model.config.hidden_size))))
        tuned = tune.lora(model, heads, r=r)
        started = time.perf_counter()
        loss = train(tuned, data, given.steps, given.lr)
        took = (time.perf_counter() - started) / given.steps
        tune.check(tuned)
        trainable = tune.report(tuned).trainable
        budget = budget or trainable
        print(
            f"{name}: {accuracy(tuned, test):.1%} right, loss {loss:.3f}, rank {r}, {trainable:,} trainable numbers, "
            f"{took * 1000:.0f} ms per step"
        )
        if given.save and name == "chosen heads":
            print(f"saved in {tune.save(tuned, given.save)}")
        model = tuned.unload()


if __name__ == "__main__":
    main()
