"""Each operand of the closed list, asked for by a method of a few lines, against attention written out in full.

The methods only look: they keep what they were given and return outputs as they were, so that the model runs as the naive one does.
Segments and edits are in test_operands_edits.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat import fingerprint, ids, left_padded, logits, quiet_transformers
from naive import Naive, define, field, of, patch, registered
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import HEAD_DIM, HIDDEN, ZOO

import headpatch
from headpatch import EngineError, UnsupportedModelError
from headpatch.operands import OPERANDS
from headpatch.registry import find_adapter

pytestmark = pytest.mark.filterwarnings("error")
LAYERS = 2
LENGTHS = (12, 7, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def silent():
    """transformers has nothing to warn about."""
    with quiet_transformers():
        yield


class Looking:
    """A model with a method on it that keeps what it is given: ``seen`` has one dict per call of the method."""

    def __init__(self, *needs: str, entry: str = "llama", heads: Any = None, model: Any = None, **fields: Any) -> None:
        self.seen: list[dict[str, Any]] = []

        def edit(method: Any, output: Tensor, strength: Tensor, operands: Any) -> Tensor:
            self.seen.append({**operands, "output": output, "strength": strength})
            return output

        given = {name: (type(value), field(value)) for name, value in fields.items()}
        self.method = define("output", "looking", needs=needs, edit=edit, fields=given)
        self.model = ZOO[entry].build(torch.float64) if model is None else model
        self.heads = heads or {"*.*": 2.0}

    def __enter__(self) -> Looking:
        self.known = registered(self.method)
        self.known.__enter__()
        self.handle = headpatch.apply(self.model, of(patch(self.method, self.heads)))
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()
        self.known.__exit__(*error)


def naive_calls(entry: str, *calls: dict[str, Any]) -> Naive:
    """A naive model that ran these forwards."""
    naive = Naive(ZOO[entry])
    for call in calls:
        logits(naive.model, call)
    return naive


def steps(batch: dict[str, Tensor], cache: Any, extra: int = 4) -> Iterator[dict[str, Any]]:
    """A prompt and then token by token, through one cache."""
    mask = batch["attention_mask"]
    yield {**batch, "past_key_values": cache}
    for i in range(extra):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
        yield {"input_ids": ids(len(mask), 1, i), "attention_mask": mask, "past_key_values": cache}


def test_the_adapter_says_of_every_operand_whether_it_has_it():
    supplies = find_adapter(ZOO["llama"].build()).supplies()
    assert supplies.keys() == OPERANDS.keys()
    assert all(supply.exact for supply in supplies.values())


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("entry", ["llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_q_k_v_and_lse(entry, padded):
    """What the kernel gets, and the log-sum-exp of its scores; in prefill and in decoding steps."""
    batch = left_padded(LENGTHS)
    if not padded:
        batch = {"input_ids": ids(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    naive = naive_calls(entry, *steps(batch, DynamicCache()))
    layers = len(naive.taps)
    with Looking("q", "k", "v", "lse", entry=entry) as it:
        for step in steps(batch, DynamicCache()):
            logits(it.model, step)
        assert it.seen and len(it.seen) == 5 * layers
        for i, given in enumerate(it.seen):
            call = naive.calls(i % layers)[i // layers]
            for name in ("q", "k", "v"):
                torch.testing.assert_close(given[name], getattr(call, name), rtol=0, atol=1e-9)
            real = call.seen.any(-1).expand_as(call.lse)
            assert given["lse"].shape == call.lse.shape and given["lse"].dtype == torch.float64
            torch.testing.assert_close(given["lse"][real], call.lse[real], rtol=0, atol=1e-9)
            assert given["lse"][~real].isneginf().all()
            rows = call.seen.any(-1)[:, 0, :, None, None].expand_as(given["output"])
            torch.testing.assert_close(given["output"][rows], call.out()[rows], rtol=0, atol=1e-9)


def test_lse_is_at_least_single_precision():
    """In bfloat16 models too; so are the outputs that a method edits."""
    with Looking("lse", "q", "k", model=ZOO["llama"].build(torch.bfloat16)) as it:
        logits(it.model)
        given = it.seen[0]
        assert given["q"].dtype == torch.bfloat16 and given["lse"].dtype == given["output"].dtype == torch.float32
        scores = given["q"].double() @ given["k"].double().repeat_interleave(2, 1).transpose(2, 3) * HEAD_DIM**-0.5
        exact = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
        torch.testing.assert_close(given["lse"].double(), exact, rtol=0, atol=1e-5)


def test_a_method_gets_its_heads_only():
    """`output`, `strength` and `heads` belong together; tensors that have a head dimension come with all heads."""
    with Looking("lse", heads={"0.3": 5.0, "0.1": 3.0, "1.2": 7.0}) as it:
        logits(it.model)
        first, second = it.seen
        assert first["heads"].tolist() == [1, 3] and first["strength"].tolist() == [3.0, 5.0]
        assert second["heads"].tolist() == [2] and second["strength"].tolist() == [7.0]
        assert first["output"].shape == (2, 12, 2, HEAD_DIM) and first["lse"].shape == (2, 4, 12)
        call = naive_calls("llama", {"input_ids": ids()}).calls(0)[0]
        torch.testing.assert_close(first["output"], call.out()[:, :, [1, 3]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", ["llama", "mistral"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_column_means(entry, padded):
    """Mean attention of each key over the real queries of the call that can see it: not over all, or early keys would win."""
    batch = left_padded(LENGTHS) if padded else {"input_ids": ids(3, 12)}
    mask = batch.get("attention_mask", torch.ones(3, 12)).bool()
    naive = naive_calls(entry, {**batch, "use_cache": False})
    with Looking("column_means", entry=entry) as it:
        logits(it.model, batch, use_cache=False)
        for layer, given in enumerate(it.seen):
            call = naive.calls(layer)[0]
            asked = call.seen & mask[:, None, :, None]
            expected = (call.p * asked).sum(2) / asked.sum(2).clamp_min(1)
            assert given["column_means"].shape == (3, 4, 12)
            torch.testing.assert_close(given["column_means"], expected, rtol=0, atol=1e-9)


def test_column_means_of_long_prompts_are_added_up_in_blocks():
    with Looking("column_means") as it:
        logits(it.model, ids(1, 600), use_cache=False)
        found = it.seen[0]["column_means"]
    call = naive_calls("llama", {"input_ids": ids(1, 600)}).calls(0)[0]
    torch.testing.assert_close(found, call.p.sum(2) / call.seen.sum(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_window_scores(window):
    """Attention of the last queries; the method's field `window` says how many."""
    batch = left_padded(LENGTHS)
    naive = naive_calls("llama", batch)
    with Looking("window_scores", window=window) as it:
        logits(it.model, batch)
        for layer, given in enumerate(it.seen):
            found, expected = given["window_scores"], naive.calls(layer)[0].p[:, :, -window:]
            assert found.shape == (3, 4, min(window, 12), 12)
            real = batch["attention_mask"].bool()[:, None, -window:, None].expand_as(found)
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", ["llama", "gpt2", "whisper"])
def test_layer_input(entry):
    """The residual stream that enters the layer, before its norm."""
    model, kept = ZOO[entry].build(torch.float64), {}
    layers = {"llama": "model.layers", "gpt2": "transformer.h", "whisper": "model.decoder.layers"}[entry]
    for i, layer in enumerate(model.get_submodule(layers)):
        layer.register_forward_pre_hook(lambda m, args, kwargs, i=i: kept.update({i: args[0]}), with_kwargs=True)
    inputs = ZOO[entry].make_inputs().to(torch.float64).kwargs
    with Looking("layer_input", model=model) as it:
        logits(model, inputs)
        assert len(it.seen) == LAYERS
        for layer, given in enumerate(it.seen):
            assert given["layer_input"].shape == (2, 14, HIDDEN)
            assert torch.equal(given["layer_input"], kept[layer])


@pytest.mark.parametrize(
    ("entry", "path", "name"),
    [("llama", "model.layers.1.self_attn", "o_proj"), ("gpt2", "transformer.h.1.attn", "c_proj"),
     ("opt", "model.decoder.layers.1.self_attn", "out_proj"), ("gpt_neox", "gpt_neox.layers.1.attention", "dense"),
     ("vit", "layers.1.attention", "o_proj"), ("whisper", "model.decoder.layers.1.self_attn", "out_proj"),
     ("gemma2", "model.layers.1.self_attn", "o_proj")],
)  # fmt: skip
def test_o_proj(entry, path, name):
    """[H, d, D]: what each head writes adds up to what the projection returns, for Linear and Conv1D weights alike."""
    model, kept = ZOO[entry].build(torch.float64), []
    projection = model.get_submodule(f"{path}.{name}")
    projection.register_forward_hook(lambda m, args, out: kept.append(out))
    with Looking("o_proj", model=model, heads={"1.*": 2.0}) as it:
        logits(model, ZOO[entry].make_inputs().to(torch.float64).kwargs)
        given = it.seen[0]
        heads, width = given["output"].shape[2:]
        assert given["o_proj"].shape == (heads, width, HIDDEN)
        written = torch.einsum("bqhd,hdD->bqD", given["output"], given["o_proj"])
        bias = 0.0 if projection.bias is None else projection.bias
        torch.testing.assert_close((written + bias).view_as(kept[0]), kept[0], rtol=0, atol=1e-9)


def test_o_proj_of_a_lora_layer_is_that_of_its_base():
    import peft

    model = ZOO["llama"].build(torch.float64)
    base = model.model.layers[0].self_attn.o_proj.weight.clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with Looking("o_proj", model=wrapped) as it:
        logits(wrapped)
        assert torch.equal(it.seen[0]["o_proj"], base.t().reshape(4, HEAD_DIM, HIDDEN))


def test_o_proj_of_a_quantised_layer_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    model = ZOO["llama"].build()
    old = model.model.layers[1].self_attn.o_proj
    new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    model.model.layers[1].self_attn.o_proj = new.to("cpu")
    try:
        logits(model)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit kernel for this CPU: {error}")
    with Looking("o_proj", model=model) as it, pytest.raises(EngineError, match=r"layer text\.1: operand 'o_proj': .*quantised"):
        logits(it.model)


def test_all_heads():
    """Outputs of every head of the layer, whichever heads the patch names."""
    naive = naive_calls("llama", {"input_ids": ids()})
    with Looking("all_heads", heads={"*.2": 2.0}) as it:
        logits(it.model)
        for layer, given in enumerate(it.seen):
            assert given["all_heads"].shape == (2, 12, 4, HEAD_DIM) and given["output"].shape == (2, 12, 1, HEAD_DIM)
            torch.testing.assert_close(given["all_heads"], naive.calls(layer)[0].out(), rtol=0, atol=1e-9)


def test_arrays(tmp_path):
    """The recipe's own tensors, by name, on the model's device; from the recipe's folder only."""
    import hashlib

    arrays = {"direction": torch.arange(HEAD_DIM, dtype=torch.float32), "table": torch.ones(2, 3, dtype=torch.int64)}
    save_file(arrays, tmp_path / "task.safetensors")
    sha = hashlib.sha256((tmp_path / "task.safetensors").read_bytes()).hexdigest()

    def edit(method: Any, output: Tensor, strength: Tensor, operands: Any) -> Tensor:
        assert operands["arrays"].keys() == arrays.keys()
        assert torch.equal(operands["arrays"]["table"], arrays["table"])
        return output + strength[:, None] * operands["arrays"]["direction"]

    method = define("output", "adding", needs=("arrays",), edit=edit)
    model = ZOO["llama"].build(torch.float64)
    with registered(method):
        data = of(patch(method, {"0.1": 0.5, "1.0": 1.0})) | {"tensors": {"file": "task.safetensors", "sha256": sha}}
        recipe = headpatch.Recipe.from_dict(data, folder=tmp_path)
        with headpatch.applied(model, recipe):
            found = logits(model)
        naive = Naive(ZOO["llama"])

        def add(call: Any) -> Tensor:
            out = call.out()
            out[:, :, 1] += 0.5 * arrays["direction"]
            return out

        with naive.edited({0: add}) as other:
            torch.testing.assert_close(found, logits(other), rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- rows


def _positions(it: Looking) -> list[tuple[list[Any], list[int]]]:
    """Positions and prompt lengths that layer 0 was given, call by call."""
    return [(given["position"].tolist(), given["prompt_len"].tolist()) for given in it.seen[::LAYERS]]


@pytest.mark.parametrize("entry", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_config", "static", "own"])
def test_position_and_prompt_len_of_left_padded_rows(entry, kind):
    """Positions count from the row's first real token; the prompt's length stays what it was when tokens are added."""
    batch = left_padded(LENGTHS)
    with Looking("position", "prompt_len", entry=entry, heads={"0-1.*": 2.0}) as it:
        config = it.model.config
        cache = {
            "dynamic": DynamicCache(), "dynamic_config": DynamicCache(config=config), "own": None,
            "static": StaticCache(config=config, max_cache_len=20),
        }[kind]  # fmt: skip
        for step in steps(batch, cache):
            if kind == "own":
                step["past_key_values"] = cache
                with torch.no_grad():
                    cache = it.model(**step, use_cache=True).past_key_values
            else:
                logits(it.model, step)
        found = _positions(it)
    assert found[0][0] == [list(range(n - 12, n)) for n in LENGTHS], "negative where there is padding"
    for i, (position, length) in enumerate(found[1:]):
        assert position == [[n + i] for n in LENGTHS]
        assert length == list(LENGTHS)
    assert found[0][1] == list(LENGTHS)


def test_position_and_prompt_len_of_right_padded_and_unpadded_rows():
    batch = left_padded(LENGTHS)
    right = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    for given, lengths in ((right, list(LENGTHS)), ({"input_ids": ids(2, 5)}, [5, 5])):
        with Looking("position", "prompt_len") as it:
            logits(it.model, given)
            width = given["input_ids"].shape[1]
            assert _positions(it) == [([list(range(width))] * len(lengths), lengths)]
            assert it.seen[0]["position"].dtype == it.seen[0]["prompt_len"].dtype == torch.int64


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}], ids=str)
def test_position_and_prompt_len_through_generate(more):
    """Chunks of a prompt know how long all of it is."""
    with Looking("position", "prompt_len") as it:
        it.model.generate(**left_padded(LENGTHS), max_new_tokens=4, do_sample=False, **more)
        found = _positions(it)
    assert all(length == list(LENGTHS) for _, length in found)
    columns = [sum((call[0][row] for call in found), []) for row in range(3)]
    assert [c[12 - n :] for c, n in zip(columns, LENGTHS, strict=True)] == [list(range(n + 3)) for n in LENGTHS]
    assert len(found) == (6 if "prefill_chunk_size" in more else 4)


def test_position_and_prompt_len_under_beams():
    with Looking("position", "prompt_len") as it:
        it.model.generate(**left_padded(LENGTHS), max_new_tokens=3, do_sample=False, num_beams=2)
        found = _positions(it)
    assert all(length == [n for n in LENGTHS for _ in range(2)] for _, length in found)
    assert found[-1][0] == [[n + 1] for n in LENGTHS for _ in range(2)]


def test_prompt_len_given_by_hand():
    """Chunks fed by hand: the caller says how long the prompt is, and the rest of the request remembers it."""
    with Looking("position", "prompt_len") as it:
        cache = DynamicCache()
        with it.handle.inputs(prompt_len=torch.tensor([9, 9])):  # a list will do as well
            for i in range(0, 9, 3):
                logits(it.model, ids(2, 9)[:, i : i + 3], past_key_values=cache)
        logits(it.model, ids(2, 1), past_key_values=cache)
        assert _positions(it) == [([[0, 1, 2]] * 2, [9, 9]), ([[3, 4, 5]] * 2, [9, 9]), ([[6, 7, 8]] * 2, [9, 9]),
                                  ([[9]] * 2, [9, 9])]  # fmt: skip


def test_prompt_len_of_a_prompt_that_was_not_seen_is_refused():
    """A cache that was filled before the recipe was applied is refused as such; here it was filled under the same recipe elsewhere."""
    with Looking("prompt_len") as it:
        cache = DynamicCache()
        logits(it.model, past_key_values=cache)
        del cache.headpatch_state
        with pytest.raises(EngineError, match=r"layer text\.0: operand 'prompt_len' is derived from the prompt, which came in"):
            logits(it.model, ids(2, 1), past_key_values=cache)


def test_without_image():
    """Each row's companion without the image, as given with the call."""
    with Looking("without_image") as it:
        with it.handle.inputs(without_image=[2, None, None]):
            logits(it.model, ids(3))
        assert it.seen[0]["without_image"].tolist() == [2, -1, -1]
        with pytest.raises(EngineError, match=r"layer text\.0: operand 'without_image' is needed; .*inputs\(without_image="):
            logits(it.model, ids(3))
        with it.handle.inputs(without_image=[1, None]), pytest.raises(EngineError, match="names 2 rows, the batch has 3"):
            logits(it.model, ids(3))


@pytest.mark.parametrize("wrong", [[3, None, None], [-2, None, None], [0, None, None]], ids=["beyond", "negative", "itself"])
def test_a_companion_must_be_another_row_of_the_batch(wrong):
    with Looking("without_image") as it, pytest.raises(headpatch.HeadpatchError, match="without_image"):  # noqa: SIM117
        with it.handle.inputs(without_image=wrong):
            logits(it.model, ids(3))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "operand", ["first_token", "spans", "image_tokens", "column_sinks", "residual_sinks", "lse", "column_means", "window_scores"]
)
@pytest.mark.parametrize("part", ["decoder", "encoder", "cross"])
def test_position_bias_is_refused_by_name(operand, part):
    """T5 adds a bias to scores inside its attention, after what a patch would see."""
    model = ZOO["t5"].build()
    before = fingerprint(model)
    method = define("output", "asking", needs=(operand,))
    with registered(method), pytest.raises(
        UnsupportedModelError,
        match=rf"patches\[0\] \(asking\) on layer {part}\.0 \(T5Attention\): operand '{operand}' cannot be had with position_bias",
    ):
        headpatch.apply(model, of(patch(method, {"*.1": 2.0}, part=part)))
    assert fingerprint(model) == before


def test_what_position_bias_does_not_touch_is_supplied():
    """Queries, outputs and projections are what they are."""
    with Looking("q", "k", "v", "o_proj", "all_heads", "layer_input", "position", entry="t5") as it:
        logits(it.model, ZOO["t5"].make_inputs().to(torch.float64).kwargs)
        assert len(it.seen) == LAYERS


def test_a_forward_that_branches_on_the_implementation_is_refused_by_name():
    """GPT-2 with reordered upcasting asks whether it runs eagerly: another name would change it."""
    model = ZOO["gpt2"].build(attn="eager")
    assert headpatch.apply(model, of({"method": "head_scaling", "heads": {"0.1": 0.0}})).remove() is None
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    for name, heads in (("head_scaling", {"0.1": 0.0}), ("zerotuning", {"1.1": 2.0})):
        layer = next(iter(heads))[0]
        with pytest.raises(
            UnsupportedModelError, match=rf"\({name}\) on layer text\.{layer} \(GPT2Attention\): .*compares the implementation's"
        ):
            headpatch.apply(model, of({"method": name, "heads": heads}))


def test_tensor_parallel_models_are_refused_by_name():
    model = ZOO["llama"].build()
    model._tp_size = 2
    for name in ("head_scaling", "zerotuning"):
        with pytest.raises(UnsupportedModelError, match="heads are sharded over ranks"):
            headpatch.apply(model, of({"method": name, "heads": {"0.1": 3.0}}))


def test_cache_methods_are_refused_by_name():
    import dataclasses

    from headpatch.methods.base import CacheMethod

    @dataclasses.dataclass(frozen=True)
    class Keeping(CacheMethod):
        """Test method keeping."""

        name = "keeping"

    model = ZOO["llama"].build()
    before = fingerprint(model)
    with registered(Keeping), pytest.raises(
        UnsupportedModelError, match=r"patches\[0\]: cache policies \(keeping\) are not supplied by the transformers adapter"
    ):
        headpatch.apply(model, of({"method": "keeping", "kv_heads": ["0.1"]}))
    assert fingerprint(model) == before


def test_what_is_refused_for_one_layer_leaves_all_layers_alone():
    """Patch 0 would be possible, patch 1 is not: nothing is patched."""
    model = ZOO["t5"].build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"patches\[1\] \(zerotuning\)"):
        headpatch.apply(
            model,
            of({"method": "head_scaling", "heads": {"0.1": 0.0}}, {"method": "zerotuning", "heads": {"0.1": 3.0}}),
        )
    assert fingerprint(model) == before and headpatch.handles(model) == []
