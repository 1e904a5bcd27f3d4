"""What a cache under a policy takes, in allocated storage, spare slots included."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from compat import ids, logits, quiet_transformers
from kv_cases import duo, full_heads
from transformers import DynamicCache, QuantizedCache
from zoo import ZOO

import headpatch

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def silent():
    with quiet_transformers():
        yield


@pytest.fixture
def model():
    return ZOO["llama"].build()


def storages() -> dict[int, int]:
    """Bytes of every tensor storage that is alive, by address."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}


@pytest.mark.parametrize("tokens", [100, 2000, 2049])
def test_memory_is_what_arithmetic_says(model, tokens):
    """All tensors that a prompt and some steps leave behind, spare slots included, and nothing else."""
    sink, recent, b, d, size = 16, 64, 2, 16, 4
    model.config.max_position_embeddings = 4096
    with headpatch.applied(model, duo("llama", sink, recent)) as handle, torch.no_grad():
        prompt = ids(b, tokens)
        model(prompt, use_cache=False)  # masks that are made once
        before = storages()
        cache = DynamicCache()
        model(prompt, past_key_values=cache)
        for _ in range(3):
            model(prompt[:, :1], past_key_values=cache)
        found = sum(n for at, n in storages().items() if at not in before and n > 4096)
        total = tokens + 3
        exact = slots = 0
        for heads in full_heads("llama").values():
            exact += len(heads) * total + (2 - len(heads)) * min(total, sink + recent)
            slots += len(heads) * -(-total // 256) * 256 + (2 - len(heads)) * min(
                -(-total // 256) * 256, sink + recent
            )
        per_slot = 2 * b * d * size
        assert slots - exact <= 256 * 3
        assert found == slots * per_slot
        held = handle.report().cache
        assert (held.columns, held.stored, held.untouched) == (total, found, 2 * 2 * total * per_slot)
        assert held.saved == held.untouched - found
        assert f"{held.untouched / found:.2f} times less" in str(handle.report())


def test_growth_is_by_blocks_and_rarely(model):
    with headpatch.applied(model, duo("llama")), torch.no_grad():
        cache = DynamicCache()
        model(ids(1, 250), past_key_values=cache)
        places, slots = set(), set()
        for _ in range(20):
            model(ids(1, 1), past_key_values=cache)
            places.add(cache.layers[0].full[0].data_ptr())
            slots.add(cache.layers[0].full[0].shape[2])
        assert slots == {256, 512}
        assert len(places) == 2
        assert math.gcd(*slots) == 256


def test_a_quantised_cache_keeps_the_full_group(model):
    """Through transformers' own quantised layers; streaming heads, which are few tokens, stay exact."""
    pytest.importorskip("optimum.quanto", reason="no backend of quantised caches is installed")
    with headpatch.applied(model, duo("llama")):
        cache = QuantizedCache("quanto", model.config, nbits=4, residual_length=8)
        assert logits(model, past_key_values=cache).isfinite().all()
