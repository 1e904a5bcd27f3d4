"""Speed of the attention and vision methods (ACT, PASTA, VAR, VHR, PAI, PAINT): whole model over whole untouched model.

    python benchmarks/bench_attention_methods.py                           # on the GPU if there is one, else on the CPU
    python benchmarks/bench_attention_methods.py --device cuda --only act,decode:var
    python benchmarks/bench_attention_methods.py --device cpu --quick      # seconds: a very small model, every code path

On a GPU: a LLaVA of 7B shape (CLIP-L/14 at 336 pixels: 576 image tokens; 32 layers of 32 heads) with random weights in bfloat16. On
a CPU: the small vision-language model of examples/tiny_vlm. ACT and PASTA act on a tenth of all heads, drawn over all layers; VAR,
VHR, PAI and PAINT on the layers that their papers name, all heads. Prefill is timed for one prompt of 1,024 tokens, where the host's
launches decide, for four at once, where the GPU does, and (ACT, PASTA) for 4,096 tokens of text. VHR chooses its heads online, in
generate()'s prefill: there, generate() of one token is timed for both. What a prefill costs in the eager form stands beside it:
untouched, and with the edit on the whole softmax map as released code makes it, both over the untouched model on fused kernels.

Decoding is timed in eager on a dynamic cache, and compiled on a static one with CUDA graphs. Compiled models have fewer layers (8 of
the 32) so that their compilation fits into the time, and every layer is patched then. Every case is tried by itself and results are
written after each; cases that would begin after --seconds are left out, and named. Writes benchmarks/results/attention_methods_*.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attention_cases import BEFORE, CASES, Case, Prompt, llava, recipe, tiny_vlm, write_out
from bench_hf import twin
from common import PAIRS, RESULTS, Row, alternate, machine, short_name, timed, write
from transformers import DynamicCache, StaticCache
from where_time_goes import describe, where_time_goes

import headpatch

DECODE_BOUND = 1.10
STEPS = 8


class Bench:
    """One model untouched, a twin of it that recipes are put on, and one that runs the eager form; all on the same weights."""

    def __init__(self, model: Any, name: str, device: torch.device, args: argparse.Namespace) -> None:
        self.plain, self.name, self.device, self.args = model, name, device, args
        self.patched, self.eager = twin(model), twin(model)
        self.text = model.config.text_config
        self.pairs = 3 if args.quick else args.pairs
        self.promised = device.type == "cuda"
        self.compiled: Callable[[], None] | None = None

    def prompt(self, length: int, picture: bool, rows: int = 1) -> Prompt:
        """Random tokens around a picture, or random tokens alone; the span that PASTA is to follow stands near the end."""
        config, generator = self.plain.config, torch.Generator().manual_seed(self.args.seed + 1)
        image, size = config.image_token_id, config.image_seq_length
        ids = torch.randint(5, self.text.vocab_size, (rows, length), generator=generator)
        ids[ids == image] = 5
        pixels = None
        if picture:
            side = config.vision_config.image_size
            before = min(BEFORE, (length - size) // 2)
            ids[:, before : before + size] = image
            pixels = torch.randn(rows, 3, side, side, generator=generator).to(self.device, self.plain.dtype)
        end = length - max(2, length // 32)
        return Prompt(ids.to(self.device), pixels, (end - max(1, length // 32), end), image)

    @contextlib.contextmanager
    def under(self, case: Case, prompt: Prompt, everywhere: bool = False) -> Iterator[None]:
        """The method on the patched twin, with what its calls need."""
        with headpatch.applied(self.patched, recipe(case.method, self.text, everywhere)) as handle:
            given = (
                handle.inputs(spans=[[prompt.span]] * len(prompt.ids))
                if case.method == "pasta"
                else contextlib.nullcontext()
            )
            with given:
                yield

    def generate(self, model: Any, prompt: Prompt, cache: Any = None) -> None:
        """One token, so a prefill, by generate(); fills `cache`."""
        given = {} if cache is None else {"past_key_values": cache}
        model.generate(
            **prompt.arguments(), attention_mask=torch.ones_like(prompt.ids), max_new_tokens=1, do_sample=False, pad_token_id=0,
            eos_token_id=None, **given,
        )  # fmt: skip

    def prefill(self, case: Case, prompt: Prompt, what: str) -> Row:
        """A whole prompt, tower included; short ones several times over, so that a host that hesitates does not decide the ratio."""
        repeats = (
            1 if self.args.quick else max(1, (4096 if self.device.type == "cuda" else 1024) // prompt.ids.numel())
        )

        def run(model: Any) -> Callable[[], None]:
            def many() -> None:
                for _ in range(repeats):
                    if case.method == "vhr":
                        self.generate(model, prompt)
                    else:
                        model(**prompt.arguments(), logits_to_keep=1, use_cache=True)

            return many

        how = "generate() of one token" if case.method == "vhr" else "prefill"
        with self.under(case, prompt):
            row = alternate(
                f"{self.name}, {case.method}: {how}, {what}", run(self.plain), run(self.patched), self.device, per=repeats,
                pairs=self.pairs, bound=case.bound if self.promised else None,
            )  # fmt: skip
            if self.args.profile:
                for whose, model in (("untouched", self.plain), ("patched", self.patched)):
                    print(
                        f"{whose}, {repeats} prompts: {describe(where_time_goes(run(model), self.device))}", flush=True
                    )
        row.notes = f"eager form {self._eager(case, prompt, run, row.untouched * repeats)}"
        return row

    def _eager(self, case: Case, prompt: Prompt, run: Callable[[Any], Callable[[], None]], untouched: float) -> str:
        """Times of the eager form over the untouched model's, without and with the edit written out."""
        written = write_out(case.method, self.text, prompt, self.device)
        words = []
        for name, label in (("eager", "untouched"), *((("published_method", "with the edit"),) if written else ())):
            try:
                self.eager.set_attn_implementation({"text_config": name})
                run(self.eager)()
                took = statistics.median(timed(run(self.eager), self.device) for _ in range(3))
                words.append(f"{label} {took / untouched:.2f}")
            except torch.OutOfMemoryError:
                words.append(f"{label} out of memory")
                free(self.device)
        return ", ".join(words)

    def decode_eager(self, case: Case, prompt: Prompt, what: str) -> Row:
        """Eager steps on a dynamic cache that a prompt filled; reported, nothing promised."""
        token = prompt.ids[:, -1:]
        runs = []
        with self.under(case, prompt):
            for model in (self.plain, self.patched):
                cache = DynamicCache(config=self.text)
                self.generate(model, prompt, cache)

                def run(model: Any = model, cache: DynamicCache = cache) -> None:
                    for _ in range(STEPS):
                        model(input_ids=token, past_key_values=cache)
                    cache.crop(-STEPS)

                runs.append(run)
            return alternate(
                f"{self.name}, {case.method}: decode, {what}, eager, dynamic cache", *runs, self.device, per=STEPS, warm=2,
                pairs=self.pairs, turns=1 if self.args.quick else 4,
            )  # fmt: skip

    def decode_static(self, case: Case, prompt: Prompt, what: str) -> Row:
        """Compiled steps on a static cache that a prompt filled, as generate() does it: CUDA graphs, the mask made outside."""
        if self.compiled is None:  # once for all cases: compiling takes longer than everything else
            torch._dynamo.config.recompile_limit = 64
            self.compiled = self._static(self.plain, prompt)
        with self.under(case, prompt, everywhere=True):
            return alternate(
                f"{self.name}, {case.method}: decode, {what}, static cache, torch.compile", self.compiled,
                self._static(self.patched, prompt), self.device, per=STEPS, warm=3, pairs=self.pairs,
                bound=DECODE_BOUND if self.promised else None,
            )  # fmt: skip

    def _static(self, model: Any, prompt: Prompt) -> Callable[[], None]:
        """Some compiled steps of a model behind a prompt."""
        token, length = prompt.ids[:, -1:], prompt.length
        room = -(-(length + 2 * STEPS) // 64) * 64
        mask = torch.zeros(1, 1, 1, room, dtype=torch.bool, device=self.device)
        mask[..., : length + 1] = True
        position = torch.full((1, 1), length, device=self.device)
        cuda = self.device.type == "cuda"
        how = {"mode": "reduce-overhead"} if cuda else {"backend": "eager" if self.args.quick else "inductor"}
        cache = StaticCache(config=self.text, max_cache_len=room)
        self.generate(model, prompt, cache)
        step = torch.compile(model, fullgraph=True, dynamic=False, **how)

        def run() -> None:
            for _ in range(STEPS):
                torch.compiler.cudagraph_mark_step_begin()
                step(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)

        return run


def free(device: torch.device) -> None:
    """Give back what is no longer needed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Session:
    """Jobs one after the other: each by itself, none begun after the deadline, results written after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.start = time.monotonic()

    def wanted(self, name: str) -> bool:
        words = [w for w in self.args.only.split(",") if w]
        return not words or any(w in (name, *name.split(":")) for w in words)

    def job(self, name: str, run: Callable[[], Row]) -> None:
        """Run one; a failure becomes a note, not the end."""
        if not self.wanted(name):
            return
        took = time.monotonic() - self.start
        if took > self.args.seconds:
            self.notes.append(f"{name} left out: {took:.0f} s had passed")
        else:
            try:
                row = run()
                self.rows.append(row)
                print(f"{row.name}: {row.ratio:.3f} ({row.low:.3f}-{row.high:.3f}) {row.notes}", flush=True)
            except Exception as error:  # a benchmark that stops half-way has measured nothing
                first = (str(error).splitlines() or [""])[0]
                self.notes.append(f"{name} failed: {type(error).__name__}: {first[:300]}")
                print(self.notes[-1], flush=True)
        self.save()
        free(self.device)

    def save(self) -> None:
        about = {**machine(self.device), "seed": self.args.seed, "seconds": round(time.monotonic() - self.start)}
        stem = short_name(about["device"]) if self.device.type == "cuda" else "cpu"
        with contextlib.redirect_stdout(None):
            write(
                f"attention_methods_{stem}{'_quick' if self.args.quick else ''}",
                self.rows,
                about,
                self.notes,
                self.args.out,
            )


def measure(args: argparse.Namespace) -> Session:
    """All jobs, methods with a promised prefill first."""
    session, device = Session(args), torch.device(args.device)
    cuda, small = device.type == "cuda", args.quick and device.type == "cpu"
    if cuda or small:
        model = llava(device, torch.bfloat16 if cuda else torch.float32, args.seed, small)
        bench = Bench(model, "7B shape" if cuda else "very small", device, args)
        short, long = (1024, 4096) if cuda else (64, 160)
    else:
        bench = Bench(tiny_vlm(args.seed), "small VLM", device, args)
        short, long = 96, 448
    gc.freeze()  # what is there stays: collecting garbage before every timing would take longer than the timings
    picture, text, four = bench.prompt(short, True), bench.prompt(long, False), bench.prompt(short, True, 4)
    tokens = bench.plain.config.image_seq_length
    what, beside = f"{short} tokens, {tokens} of them an image's", f"{long} tokens of text"
    promised, others = [c for c in CASES if c.bound is not None], [c for c in CASES if c.bound is None]
    fewer: list[Bench] = []

    def decoding() -> Bench:
        """The models to be compiled, made when they are first needed."""
        if not fewer:
            shallow = llava(device, bench.plain.dtype, args.seed, small, args.compiled_layers if cuda else 0)
            fewer.append(
                Bench(shallow, f"{args.compiled_layers} layers of it" if cuda else "very small", device, args)
            )
        return fewer[0]

    for some in (promised, others):
        for case in some:
            session.job(f"prefill:{case.method}", lambda case=case: bench.prefill(case, picture, what))
        for case in some:
            session.job(f"prefill-four:{case.method}", lambda case=case: bench.prefill(case, four, f"4 x {what}"))
        for case in (c for c in some if c.text_too):
            session.job(f"prefill-text:{case.method}", lambda case=case: bench.prefill(case, text, beside))
        if cuda or small:
            for case in some:
                session.job(f"decode:{case.method}", lambda case=case: decoding().decode_static(case, picture, what))
    for case in CASES:
        session.job(f"decode-eager:{case.method}", lambda case=case: bench.decode_eager(case, picture, what))
    return session


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", default="", help="jobs (prefill:act), methods (act) or kinds (decode), comma-separated"
    )
    parser.add_argument("--quick", action="store_true", help="three pairs; on the CPU a very small model")
    parser.add_argument(
        "--compiled-layers", type=int, default=8, help="language layers of the compiled models (CUDA only)"
    )
    parser.add_argument("--seconds", type=float, default=210, help="nothing new is begun after so many")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="of timings; more where the host has other work to do"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of each prefill goes, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        with torch.no_grad():
            session = measure(args)
    finally:
        gc.unfreeze()
    print(*session.notes, sep="\n")


if __name__ == "__main__":
    main()
