"""Models, recipes and prompts of the vLLM tests, and the comparison with transformers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headpatch

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 4, 6, 2, 32, 256
WITHIN = 1e-4
"""Largest difference in log-probability, float32."""
CLEAR = 2e-4
"""Where the reference's two best tokens differ by more, the chosen token must be the same."""


def recipe(*patches: Mapping[str, Any]) -> dict[str, Any]:
    return {"headpatch": 1, "patches": list(patches)}


def recipes(layers: int, heads: int, seed: int = 5) -> dict[str, dict[str, Any]]:
    """The five recipes of the parity test; the sixth is none."""
    rng = random.Random(seed)
    names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    uniform = {"method": "zerotuning", "heads": {"*.*": 0.4}}
    per_head = {"method": "zerotuning", "heads": {name: round(rng.uniform(0.2, 3.0), 3) for name in names}}
    scaling = {"method": "head_scaling", "heads": {name: round(rng.uniform(0.6, 1.4), 3) for name in names}}
    one_each = [f"{layer}.{rng.randrange(heads)}" for layer in range(layers)]
    ablation = {"method": "head_scaling", "heads": one_each, "scale": 0.0}
    return {
        "uniform": recipe(uniform), "per_head": recipe(per_head), "scaling": recipe(scaling),
        "stacked": recipe(per_head, scaling), "ablation": recipe(ablation),
    }  # fmt: skip


def tiny_recipes() -> dict[str, dict[str, Any]]:
    """Recipes of the main engine: those of the parity test, extreme weights, and one whose edit differs from row to row."""
    rows = {"method": "head_scaling", "heads": {"1.*": 0.3, "3.2": -1.0}, "positions": "decode"}
    extreme = {"method": "zerotuning", "heads": {"0.*": 0.0, "1.0-2": 1e-4, "2.*": 100.0}}
    return {
        **recipes(LAYERS, HEADS), "extreme": recipe(extreme), "rows": recipe(rows),
        "mixed": recipe({"method": "zerotuning", "heads": {"*.1-4": 2.0}}, rows, {"method": "head_scaling", "heads": {"3.*": 1.5}}),
    }  # fmt: skip


def span_recipes() -> dict[str, dict[str, Any]]:
    """Recipes that need spans: constant weights, a target, and one beside first-token weights and scales."""
    steer = {"method": "pasta", "heads": {"1.*": 0.05, "2.0-2": 0.3, "3.5": 0.0}}
    aim = {"method": "pasta", "heads": {"*.1-3": 0.1}, "target_mass": 0.4}
    kept = {"method": "pasta", "heads": {"0-2.2-5": 0.2}, "keep_first": True}
    sinks = {"method": "zerotuning", "heads": {"*.1-4": 2.0}}
    return {
        "steer": recipe(steer), "aim": recipe(aim),
        "steer_mixed": recipe(sinks, {"method": "head_scaling", "heads": {"3.*": 1.5}}, kept),
    }  # fmt: skip


def sink_recipes() -> dict[str, dict[str, Any]]:
    """Recipes that need the whole prompt in one step: sinks found in it, alone and beside other edits."""
    calm = {"method": "act", "heads": {"0-2.*": 0.2, "3.1": 0.0}, "threshold": 1.6, "threshold_per": "prompt_length"}
    first = {"method": "zerotuning", "heads": {"1.*": 1.7}}
    return {
        "calm": recipe(calm),
        "calm_mixed": recipe(
            first, {**calm, "min_queries": 4, "keep_first": False}, {"method": "head_scaling", "heads": {"2.*": 0.7}},
        ),
    }  # fmt: skip


def save_tasks(
    folder: Path, count: int = 16, layers: int = LAYERS, heads: int = HEADS, dim: int = DIM, scale: float = 1.0
) -> dict[str, str]:  # fmt: skip
    """Write so many injected tasks with random vectors, recipe and arrays beside each other; by name, where the recipe lies.

    Most are soft injections, one in four a function vector; among these some act on generated tokens, too, and some are scaled after.
    """
    import hashlib

    import safetensors.torch

    found = {}
    for i in range(count):
        rng, generator = random.Random(i), torch.Generator().manual_seed(i)
        names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        chosen = rng.sample(names, max(3, len(names) // 3))
        word, method = ("v", "function_vector") if i % 4 == 3 else ("t", "soft_injection")
        patch: dict[str, Any] = {"method": method, "heads": {name: round(rng.random(), 3) for name in chosen}}
        patches: list[Mapping[str, Any]] = [patch]
        if i % 8 == 7:
            patch["positions"] = "last"
            patches.append({"method": "head_scaling", "heads": {"*.0-1": 1.3}})
        data = safetensors.torch.save(
            {f"{word}.{name}": torch.randn(dim, generator=generator) * scale for name in chosen}
        )
        (folder / f"task{i}.safetensors").write_bytes(data)
        arrays = {"file": f"task{i}.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
        made = headpatch.Recipe.from_dict({**recipe(*patches), "tensors": arrays}, folder=folder)
        found[f"task{i}"] = str(made.save(folder / f"task{i}.yaml"))
    return found


def save_tiny(folder: Path, kind: str, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Path:
    """Write a small random checkpoint whose attention matters, so that recipes do.

    `kind`: ``llama``; ``windowed`` (soft caps, every other layer with a window); ``1b`` (a llama of a billion parameters, bfloat16).
    """
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": LAYERS,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": DIM, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    cls: Any = transformers.LlamaForCausalLM
    dtype = torch.float32
    if kind == "1b":
        dtype = torch.bfloat16
        shared |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 128}
    if kind == "windowed":
        types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        config: Any = transformers.Gemma2Config(
            **{**shared, "tie_word_embeddings": True}, sliding_window=32,
            layer_types=types, query_pre_attn_scalar=DIM, attn_logit_softcapping=20.0,
            final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh",
        )  # fmt: skip
        cls = transformers.Gemma2ForCausalLM
    else:
        config = transformers.LlamaConfig(**shared)
    generator = torch.random.get_rng_state()
    torch.manual_seed(11)
    # A billion random numbers take minutes on a CPU that is busy with other engines.
    with torch.device("cuda" if kind == "1b" and torch.cuda.is_available() else "cpu"):
        model = cls(config).to(dtype)
    # Width 96 is where these deviations were found; a wider layer adds up more numbers.
    narrow = (96 / shared["hidden_size"]) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, narrow * (0.25 if "q_proj" in name or "k_proj" in name else 0.12))
    torch.random.set_rng_state(generator)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Token i is the word ``ti``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="t0")


def tiny_prompts(count: int = 8, shared: int = 70, seed: int = 3) -> list[list[int]]:
    """Token ids: most share a long beginning, so that the prefix cache is hit across prompts and recipes; one is a single token."""
    rng = random.Random(seed)
    start = [rng.randrange(VOCABULARY) for _ in range(shared)]
    prompts = [
        start[: rng.randrange(40, shared)] + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(3, 40))]
        for _ in range(count - 2)
    ]
    return [*prompts, [rng.randrange(VOCABULARY) for _ in range(90)], [7]]


@dataclass(frozen=True)
class Answer:
    """One request's result: its tokens, and per token the log-probabilities that the engine reported."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]


def ask(llm: Any, requests: Sequence[tuple[list[int], Any]], tokens: int = 12, **options: Any) -> list[Answer]:
    """Send (prompt, headpatch field) pairs as one batch; greedy, with the four best log-probabilities of each step."""
    params = [
        headpatch.sampling_params(field, temperature=0.0, max_tokens=tokens, logprobs=4, ignore_eos=True, **options)
        for _, field in requests
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def answer_of(output: Any) -> Answer:
    done = output.outputs[0]
    seen = tuple({token: float(entry.logprob) for token, entry in step.items()} for step in done.logprobs)
    return Answer(tuple(output.prompt_token_ids), tuple(done.token_ids), seen)


def truth(model: Any, answers: Sequence[Answer], applied: Any) -> list[Tensor]:
    """Log-probabilities [tokens, vocabulary] of each answer's steps from transformers, with `applied` (None: nothing) on."""
    with torch.no_grad():
        if applied is None:
            return [_logprobs(model, answer) for answer in answers]
        with headpatch.applied(model, applied) as handle:
            found = []
            for answer in answers:
                with handle.inputs(prompt_len=[len(answer.prompt)]):
                    found.append(_logprobs(model, answer))
            return found


def _logprobs(model: Any, answer: Answer) -> Tensor:
    ids = torch.tensor([[*answer.prompt, *answer.tokens]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(answer.prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


@dataclass
class Difference:
    """Worst difference in log-probability, and tokens that differ although the reference is clear."""

    worst: float = 0.0
    wrong: int = 0
    steps: int = 0

    def __bool__(self) -> bool:
        return self.worst > WITHIN or self.wrong > 0


def differ(answers: Sequence[Answer], wanted: Sequence[Tensor]) -> Difference:
    """Compare what the engine reported with the reference for the same tokens."""
    found = Difference()
    for answer, table in zip(answers, wanted, strict=True):
        for step, (token, seen) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            best = table[step].topk(2)
            if float(best.values[0] - best.values[1]) > CLEAR and int(best.indices[0]) != token:
                found.wrong += 1
            found.steps += 1
            for other, logprob in seen.items():
                found.worst = max(found.worst, abs(logprob - float(table[step, other])))
    return found


def compare(
    llm: Any, model: Any, prompts: list[list[int]], given: Mapping[str, Any], tokens: int = 12
) -> dict[str, Difference]:
    """All prompts under all of `given` (name -> recipe or None) as one mixed batch; the difference by name."""
    names = list(given)
    answers = ask(llm, [(ids, name) for ids in prompts for name in names], tokens)
    found = {}
    for i, name in enumerate(names):
        mine = answers[i :: len(names)]
        found[name] = differ(mine, truth(model, mine, given[name]))
    return found


def spans_of(prompt: Sequence[int], which: int) -> list[tuple[int, int]]:
    """Two spans of a prompt; one in short ones."""
    n = len(prompt)
    return [(n // 3 * which, n // 3 * which + 5), (n // 2, n // 2 + 1)] if n > 12 else [(0, 1)]


def under_spans(model: Any, answers: Sequence[Answer], applied: Any, spans: Sequence[Any]) -> list[Tensor]:
    """As :func:`truth`, each answer under its own spans."""
    found = []
    with torch.no_grad(), headpatch.applied(model, applied) as handle:
        for answer, mine in zip(answers, spans, strict=True):
            with handle.inputs(spans=[mine], prompt_len=[len(answer.prompt)]):
                found.append(_logprobs(model, answer))
    return found


def compare_spans(
    llm: Any, model: Any, prompts: list[list[int]], given: Mapping[str, Any], tokens: int = 12
) -> tuple[dict[str, Difference], dict[str, list[Answer]]]:
    """As :func:`compare`; recipes of :func:`span_recipes` get spans, with the answers."""
    names, marks = list(given), [spans_of(ids, i % 2) for i, ids in enumerate(prompts)]
    takes = {name for name in names if name in span_recipes()}
    jobs = [
        (ids, {"recipe": name, "spans": mark} if name in takes else name)
        for ids, mark in zip(prompts, marks, strict=True)
        for name in names
    ]
    answers, found, mine = ask(llm, jobs, tokens), {}, {}
    for i, name in enumerate(names):
        mine[name] = answers[i :: len(names)]
        applied = given[name]
        wanted = under_spans(model, mine[name], applied, marks) if name in takes else truth(model, mine[name], applied)
        found[name] = differ(mine[name], wanted)
    return found, mine


def load(folder: Path) -> Any:
    """The same checkpoint in transformers, float32."""
    from transformers import AutoModelForCausalLM

    # Soft caps exist in its own attention only; fused kernels of torch leave them out.
    capped = "attn_logit_softcapping" in (folder / "config.json").read_text()
    options = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
