"""One GPU lease for the small vision-language model: trains the seeds, measures methods and controls, and the conditions for sinks.

    python benchmarks/tiny_vlm_gpu.py --work /tmp/tiny_vlm --out $OUT --deadline 560       # call it again until it says: complete

Several processes share the GPU. Whatever is unfinished at the deadline is saved and goes on at the next call; what is left is
printed, and stands in results.json. At most eight files come out, none above 16 MiB: weights of each seed (bfloat16), results.json,
report.md, sinks.json. Afterwards, on any machine:

    python examples/tiny_vlm/train.py --export seed1.safetensors FOLDER         # the checkpoint as an ordinary LLaVA

The conditions alone, on the eyes of seed 1 as it ships, and what came of them added to the other results:

    python benchmarks/tiny_vlm_gpu.py --only sinks --work /tmp/tiny_vlm --out $OUT --parallel 7 --deadline 500
    python benchmarks/tiny_vlm_gpu.py --merge DIR              # DIR holds sinks.json and results.json; writes benchmarks/results

An H100 was planned with 12 minutes: about 5 for the training, 2 for the measurements, 4 for the conditions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import short_name
from tiny_vlm_effects import report, study
from tiny_vlm_sinks import CONDITIONS, condition, table
from train import TINY, Plan, train

SEEDS = (1, 2, 3, 4, 5)


SHIPPED = Path(__file__).parents[1] / "tests" / "data" / "tiny_vlm_seed1.safetensors"


def jobs(seeds: tuple[int, ...], only: str = "") -> list[str]:
    """All jobs, or those of one kind, the more urgent ones first; the longest condition first, which the others do not wait for."""
    longest = sorted(CONDITIONS, key=lambda name: name != "longer")
    every = [*(f"train:{s}" for s in seeds), *(f"study:{s}" for s in seeds), *(f"sinks:{name}" for name in longest)]
    return [job for job in every if not only or job.startswith(f"{only}:")]


def result(job: str, work: Path) -> Path:
    """The file that says that a job is done."""
    kind, name = job.split(":")
    names = {"train": f"seed{name}.safetensors", "study": f"seed{name}.effects.json"}
    return work / names.get(kind, f"{name.replace(' ', '_')}.sinks.json")


def ready(job: str, work: Path) -> bool:
    """Whether what a job needs is there: its own weights, or those whose eyes it takes."""
    kind, name = job.split(":")
    return kind == "train" or (work / f"seed{name if kind == 'study' else SEEDS[0]}.safetensors").is_file()


def run(job: str, work: Path, device: str, toy: bool, until: Callable[[], bool]) -> None:
    """One job, in this process; a job that is cut off leaves no result file, and a training its state."""
    from model import TOY, load

    torch.set_float32_matmul_precision("high")
    kind, name = job.split(":")
    target = result(job, work)
    if kind == "train":
        base = TINY if toy else Plan()
        train(Plan(**{**vars(base), "seed": int(name)}), work, f"seed{name}", device, until)
        return
    found: dict[str, Any] | None
    if kind == "study":
        weights = work / f"seed{name}.safetensors"
        model = load(weights, *([TOY] if toy else [])).to(device)
        small = {"rows": 12, "batches": 1, "steps": 3} if toy else {}
        found = study(model, int(name), device, **small)
        found["device"] = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    else:
        found = condition(name, work / f"seed{SEEDS[0]}.safetensors", work, device, toy, until, 6 if toy else 100)
    if found is not None:
        target.write_text(json.dumps(found) + "\n", encoding="utf-8")


def schedule(todo: list[str], work: Path, end: float, options: argparse.Namespace) -> dict[str, int]:
    """Run jobs in processes of their own, some at a time, until all are done or the deadline comes; gives exit codes of failures."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    waiting = list(todo)
    while waiting or running:
        for job in [j for j, p in running.items() if p.poll() is not None]:
            code = running.pop(job).returncode
            print(
                f"{time.strftime('%X')} {job}: {'done' if result(job, work).is_file() else f'not done, exit {code}'}",
                flush=True,
            )
            if code:
                failed[job] = code
        startable = [j for j in waiting if ready(j, work)]
        if time.time() < end and startable and len(running) < options.parallel:
            job = startable[0]
            waiting.remove(job)
            words = [
                sys.executable,
                __file__,
                "--job",
                job,
                "--work",
                str(work),
                "--until",
                str(end),
                "--device",
                options.device,
            ]
            log = (work / f"{job.replace(':', '_').replace(' ', '_')}.log").open("ab")
            running[job] = subprocess.Popen(
                [*words, *(["--toy"] if options.toy else [])], stdout=log, stderr=subprocess.STDOUT
            )
            continue
        if not running and (time.time() >= end or not startable):
            break
        time.sleep(0.5)
    return failed


def collect(work: Path, out: Path, seeds: tuple[int, ...], failed: dict[str, int], only: str = "") -> bool:
    """Copy results; whether everything is there."""
    out.mkdir(parents=True, exist_ok=True)
    everything = jobs(seeds, only)
    left = [job for job in everything if not result(job, work).is_file()]
    tails = {job: _tail(work / f"{job.replace(':', '_').replace(' ', '_')}.log") for job in failed}
    studies = [json.loads(p.read_text(encoding="utf-8")) for s in seeds if (p := result(f"study:{s}", work)).is_file()]
    sinks = [
        json.loads(p.read_text(encoding="utf-8")) for n in CONDITIONS if (p := result(f"sinks:{n}", work)).is_file()
    ]
    trained = [
        p
        for p in sorted(work.glob("*.json"))
        if p.stem.startswith(("seed", "sinks-")) and not p.stem.endswith(".effects")
    ]
    logs = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in trained}
    (out / "results.json").write_text(
        json.dumps({"left": left, "failed": tails, "training": logs, "studies": studies}) + "\n"
    )
    (out / "sinks.json").write_text(json.dumps(sinks, indent=1) + "\n")
    lines = report(studies, str(studies[0]["device"])) if studies else ["no study is done"]
    (out / "report.md").write_text(
        "\n".join([*lines, "", "## Sinks", "", *(table(sinks) if sinks else ["none trained"])]) + "\n"
    )
    for seed in () if only == "sinks" else seeds:
        if (weights := result(f"train:{seed}", work)).is_file():
            shutil.copyfile(weights, out / weights.name)
    print("complete" if not left else f"left: {', '.join(left)}; call this again", flush=True)
    for job, tail in tails.items():
        print(f"--- {job}\n{tail}", flush=True)
    return not left


def merge(folder: Path, results: Path) -> None:
    """Add conditions for sinks that were trained by themselves to the results of the seeds."""
    new = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("sinks", "results")}
    device = next(str(one["device"]) for one in new["sinks"])
    target = results / f"tiny_vlm_{short_name(device)}"
    old = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    names = {one["name"] for one in new["sinks"]}
    sinks = sorted(
        [*(s for s in old.get("sinks", []) if s["name"] not in names), *new["sinks"]],
        key=lambda s: [*CONDITIONS].index(s["name"]),
    )
    done = {f"sinks:{one['name']}" for one in sinks}
    whole = {
        **old, "left": [job for job in old["left"] if job not in done],
        "training": {**old["training"], **{k: v for k, v in new["results"]["training"].items() if k.startswith("sinks-")}},
        "sinks": sinks,
    }  # fmt: skip
    target.with_suffix(".json").write_text(json.dumps(whole) + "\n", encoding="utf-8")
    said = target.with_suffix(".md").read_text(encoding="utf-8").split("\n## Sinks\n")[0]
    target.with_suffix(".md").write_text("\n".join([said, "## Sinks", "", *table(sinks)]) + "\n", encoding="utf-8")


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="kept between calls")
    parser.add_argument(
        "--merge", type=Path, metavar="DIR", help="add the conditions for sinks in DIR to benchmarks/results"
    )
    parser.add_argument("--only", choices=("train", "study", "sinks"), default="", help="jobs of one kind")
    parser.add_argument("--out", type=Path, help="what comes back")
    parser.add_argument("--deadline", type=float, default=560, help="seconds after which nothing new is begun")
    parser.add_argument("--parallel", type=int, default=6, help="jobs that share the GPU")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="seconds on a CPU; measures nothing")
    parser.add_argument("--inline", action="store_true", help="all jobs in this process, one after the other")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        return merge(options.merge, Path(__file__).parent / "results")
    if options.work is None:
        parser.error("--work is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.job:
        return run(options.job, options.work, options.device, options.toy, lambda: time.time() > options.until)
    seeds = tuple(int(s) for s in options.seeds.split(","))
    end = time.time() + options.deadline
    eyes = options.work / f"seed{SEEDS[0]}.safetensors"
    if options.only == "sinks" and not eyes.is_file() and not options.toy:
        shutil.copyfile(SHIPPED, eyes)
    todo = [job for job in jobs(seeds, options.only) if not result(job, options.work).is_file()]
    failed: dict[str, int] = {}
    if options.inline:
        for job in todo:
            if time.time() < end and ready(job, options.work):
                run(job, options.work, options.device, options.toy, lambda: time.time() > end)
    else:
        failed = schedule(todo, options.work, end, options)
    collect(options.work, options.out or options.work / "out", seeds, failed, options.only)
    return None


if __name__ == "__main__":
    main()
