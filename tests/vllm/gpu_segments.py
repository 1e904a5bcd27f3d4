"""Edits of attention to segments on a GPU, run by hand there: as ``gpu_parity.py``, for recipes with spans and with column sinks.

    cd /tmp && python .../tests/vllm/gpu_segments.py --model /tmp/smollm2 --out $OUT

The rule is the same: a recipe's answers may be no further from float32 transformers with that recipe than the untouched requests of
the batch are, or than bfloat16 transformers with it are, and a quarter.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parity import HERE, MEMORY, figures, judge, main, outcome, text_prompts

PARTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash_later": {"_later": True},
    "flash_small_steps": {"max_num_batched_tokens": 128},
    "flash_eager": {"enforce_eager": True},
    "flash_v1": {"_env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "preempted": {"_preempt": True},
    "triton": {"attention_backend": "TRITON_ATTN"},
    "flex": {"attention_backend": "FLEX_ATTENTION"},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    "windowed": {"_tiny": "windowed", "max_num_batched_tokens": 128},
    "one_rank": {"_tiny": "1b"},
    "two_ranks": {"_tiny": "1b", "tensor_parallel_size": 2},
    "float32_flex": {
        "_tiny": "llama", "attention_backend": "FLEX_ATTENTION", "dtype": "float32", "enforce_eager": True,
        "max_num_batched_tokens": 128,
    },
    "images": {"_images": True},
    "images_float32": {
        "_images": True, "attention_backend": "FLEX_ATTENTION", "dtype": "float32", "enforce_eager": True,
    },
}  # fmt: skip
"""Engine options by part; names with an underscore are ours. `flash_later`: the recipes come with the requests. `images`: the small
vision-language model of the tests, a picture a prompt; vLLM's LLaVA needs torchvision."""
SPANS = {"steer", "aim", "steer_mixed"}


def recipes(layers: int, backend: str | None) -> dict[str, Any]:
    """Recipes of segments for a model with so many layers, on all of its heads and on some."""
    from engine_cases import recipe

    some = f"{layers // 3}-{2 * layers // 3}.*"
    found = {
        "steer": recipe({"method": "pasta", "heads": {some: 0.1}}),
        "aim": recipe({"method": "pasta", "heads": {"*.1-3": 0.1}, "target_mass": 0.3}),
        "steer_mixed": recipe(
            {"method": "zerotuning", "heads": {"*.1-3": 1.5}}, {"method": "head_scaling", "heads": {"1.*": 1.2}},
            {"method": "pasta", "heads": {some: 0.3}, "keep_first": True},
        ),
    }  # fmt: skip
    if backend != "TRITON_ATTN":
        calm = {"method": "act", "heads": {some: 0.4}, "threshold": 3.0, "threshold_per": "prompt_length"}
        first = {"method": "zerotuning", "heads": {"1.*": 1.5}}
        last = {"method": "zerotuning", "heads": {some: 0.7}}
        found |= {
            "calm": recipe(calm),
            "calm_mixed": recipe(first, {**calm, "min_queries": 4, "keep_first": False}, last),
        }
    return found


def run_part(name: str, model: str, out: Path) -> dict[str, Any]:
    """One engine, one batch of all prompts under all recipes, twice."""
    if "_images" in PARTS[name]:
        return run_images(name, out)
    options = dict(PARTS[name])
    os.environ.update(options.pop("_env", {}))
    sys.path.insert(0, str(HERE))
    import torch
    from engine_cases import (
        VOCABULARY,
        ask,
        load,
        recipe,
        save_tiny,
        spans_of,
        tiny_prompts,
        truth,
        under_spans,
    )
    from vllm import LLM

    tiny, later, preempt = (options.pop(f"_{word}", None) for word in ("tiny", "later", "preempt"))
    if tiny:
        folder = out / f"model-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        model = str(save_tiny(folder, tiny, *((8, 4) if tiny == "1b" else ())))
    config = json.loads((Path(model) / "config.json").read_text())
    given = recipes(config["num_hidden_layers"], options.get("attention_backend"))
    given["plain"] = recipe({"method": "zerotuning", "heads": {"*.*": 0.7}})
    prompts = [ids[:100] for ids in tiny_prompts()] if tiny else text_prompts(model)
    flag = {"allow_inline": True, "segments": True} if later else {"recipes": given}
    started = time.perf_counter()
    llm = LLM(model, **{
        "dtype": "bfloat16", "max_model_len": 1024 if not tiny else 512, "max_num_seqs": 64, **MEMORY,
        "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0, "additional_config": {"headpatch": flag}, **options,
    })  # fmt: skip
    seconds = time.perf_counter() - started
    reference = load(Path(model)).cuda()
    rounded = load(Path(model)).to(torch.float32 if options.get("dtype") == "float32" else torch.bfloat16).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    names: list[str] = ["none", *given]
    marks = [spans_of(ids, i % 2) for i, ids in enumerate(prompts)]

    def field(n: str, spans: Any) -> Any:
        if n == "none":
            return n
        found = given[n] if later else n
        return {"recipe": found, "spans": spans} if n in SPANS else found

    def wanted(of: Any, answers: Any, n: str) -> list[Any]:
        found = (
            under_spans(of, answers, given[n], marks)
            if n in SPANS
            else truth(of, answers, None if n == "none" else given[n])
        )
        return [t.cpu().float() for t in found]

    jobs = [(ids, field(n, spans)) for ids, spans in zip(prompts, marks, strict=True) for n in names]
    rounds = []
    for _ in range(2):
        answers = preempted(llm, jobs, 32) if preempt else ask(llm, jobs, 32)
        found = {}
        for i, n in enumerate(names):
            mine = answers[i :: len(names)]
            exact = wanted(reference, mine, n)
            found[n] = figures(mine, exact, wanted(rounded, mine, n), wanted(reference, mine, "none"))
        rounds.append(found)
    bad, noise = judge(rounds)
    return outcome(llm, name, bad, noise, rounds, seconds, vocabulary=VOCABULARY if tiny else config["vocab_size"])


def run_images(name: str, out: Path) -> dict[str, Any]:
    """One engine with a vision-language model, pictures under recipes that act on image tokens."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "tiny_vlm"), str(HERE.parents[1] / "examples" / "tiny_vlm")]
    import contextlib

    import model as small
    import torch
    from engine_cases import answer_of, recipe
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vllm import LLM
    from world import MEAN, STD, World

    import headpatch

    options = {key: value for key, value in PARTS[name].items() if not key.startswith("_")}
    weights = small.load(HERE.parent / "data" / "tiny_vlm_seed1.safetensors")
    folder = str(small.export(weights, out / f"model-{name}", torch.float32))
    given = {
        "bias": recipe({"method": "image_bias", "heads": {"1-4.*": 2.0}}),
        "text": recipe({"method": "image_bias", "heads": {"1-4.*": 1.0}, "queries": "text"}),
        "pai": recipe({"method": "pai", "heads": {"2-5.*": 0.5}}),
        "both": recipe(
            {"method": "pai", "heads": {"2-5.*": 0.4}, "queries": "all"},
            {"method": "zerotuning", "heads": {"3.*": 2.0}},
        ),
    }
    world = World(3)
    asked = ("is there a star ?", "describe the image .", "what colour is moon ?", "is there a moon ?")
    pixels = world.render(world.scenes(len(asked)))
    shown = [Image.fromarray(((p * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    texts = [small.prompt(question) for question in asked]
    started = time.perf_counter()
    llm = LLM(folder, **{
        "dtype": "bfloat16", "max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 32, **MEMORY, "seed": 0,
        "limit_mm_per_prompt": {"image": 1}, "additional_config": {"headpatch": {"recipes": given}}, **options,
    })  # fmt: skip
    seconds = time.perf_counter() - started
    processor = AutoProcessor.from_pretrained(folder)
    exact = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().cuda()
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    rough = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().cuda()
    torch.backends.cuda.matmul.allow_tf32 = False

    def tables(of: Any, answers: Any, n: str) -> list[Any]:
        found = []
        for answer, text, image in zip(answers, texts, shown, strict=True):
            inputs = processor(text=text, images=image, return_tensors="pt").to(of.device)
            assert inputs["input_ids"][0].tolist() == list(answer.prompt)
            more = torch.tensor([answer.tokens], device=of.device)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["pixel_values"] = inputs["pixel_values"].to(of.dtype)
            inputs.pop("token_type_ids", None)
            where = headpatch.applied(of, given[n]) if n != "none" else contextlib.nullcontext()
            with torch.no_grad(), where as handle:
                marked = contextlib.nullcontext() if handle is None else handle.inputs(prompt_len=[len(answer.prompt)])
                with marked:
                    logits = of(**inputs, use_cache=False).logits
            found.append(logits[0, len(answer.prompt) - 1 : -1].float().log_softmax(-1).cpu())
        return found

    rounds = []
    for _ in range(2):
        found = {}
        jobs = [(n, text, image) for n in ("none", *given) for text, image in zip(texts, shown, strict=True)]
        params = [
            headpatch.sampling_params(n, temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)
            for n, _, _ in jobs
        ]
        prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for _, text, image in jobs]
        answers = [answer_of(output) for output in llm.generate(prompts, params, use_tqdm=False)]
        for i, n in enumerate(("none", *given)):
            mine = answers[i * len(texts) : (i + 1) * len(texts)]
            found[n] = figures(mine, tables(exact, mine, n), tables(rough, mine, n), tables(exact, mine, "none"))
        rounds.append(found)
    bad, noise = judge(rounds, 1e-4)
    return outcome(llm, name, bad, noise, rounds, seconds)


def preempted(llm: Any, jobs: Any, tokens: int) -> list[Any]:
    """As ``ask``, but all requests are taken off in the middle of their answers, and come again."""
    from engine_cases import answer_of

    import headpatch

    core = llm.llm_engine
    for i, (ids, field) in enumerate(jobs):
        params = headpatch.sampling_params(field, temperature=0.0, max_tokens=tokens, logprobs=4, ignore_eos=True)
        core.add_request(str(i), {"prompt_token_ids": ids}, params)
    for _ in range(tokens // 2):
        core.step()
    if not llm.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("running requests were not taken off")
    done = {}
    while core.has_unfinished_requests():
        done |= {int(output.request_id): answer_of(output) for output in core.step() if output.finished}
    return [done[i] for i in range(len(jobs))]


if __name__ == "__main__":
    sys.exit(main(PARTS, run_part, __file__, __doc__))
