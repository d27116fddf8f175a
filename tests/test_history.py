"""Long histories through the product: a chunk's memory does not follow them, and the pool is the only limit."""

from __future__ import annotations

import psutil
import pytest
import torch

from kvquant.calibration import exact_calibration
from kvquant.errors import DataError, PoolExhausted
from kvquant.models import load_model, model_shape, quantized_kv_cache
from kvquant.peak_memory import PeakMemory
from small_models import long_model, prompts_of, quantized, small_model

MIB = 2**20


@pytest.mark.parametrize("name", ["llama-gqa-llama3", "gemma3-two-ropes"])
@torch.inference_mode()
def test_a_models_chunk_over_6k_tokens_takes_what_it_takes_over_1k(name) -> None:
    model = small_model(name)
    history, chunk = [1024, 6144], 64
    extra = {}
    with quantized_kv_cache(model, quantized(model, bits=3, outlier_fraction=0.01)) as kv:
        cache = kv.new_cache(num_blocks=100, max_sequences=1, max_length=6400, spill_headroom=8.0)
        for tokens in history:
            for piece in prompts_of([tokens - cache.get_seq_length()])[0].split(1024):
                cache.append([piece])
            with PeakMemory() as peak:
                cache.append(prompts_of([chunk]))
            extra[tokens] = peak.extra_bytes
    short, long = extra.values()
    shape = model_shape(model)
    layer = history[-1] * 2 * shape.num_kv_heads * shape.head_dim * 4
    assert long - short < 0.05 * layer and long < layer


@torch.inference_mode()
def test_past_the_models_context_the_pool_is_the_limit_and_refuses_cleanly() -> None:
    model = load_model(None, dtype="float32")
    more, fits = prompts_of([200, 40], seed=1)
    with quantized_kv_cache(model, exact_calibration(model_shape(model))) as kv:
        cache = kv.new_cache(num_blocks=40, max_sequences=1, max_length=10**6)
        for piece in prompts_of([2500])[0].split(512):
            cache.append([piece])
        (pool,) = cache.pools
        before = (cache.bytes_held, pool.blocks_of(cache.rows[0]))
        with pytest.raises(PoolExhausted, match=r"missing.*cache.num_blocks"):
            cache.append([more])
        assert (cache.bytes_held, pool.blocks_of(cache.rows[0]), cache.length(cache.rows[0])) == (
            *before,
            2500,
        )
        after = cache.append([fits])
        fresh = kv.new_cache(num_blocks=40, max_sequences=1, max_length=10**6)
        fresh.append([prompts_of([2500])[0]])
        torch.testing.assert_close(after, fresh.append([fits]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_128k_tokens_are_prefilled_in_chunks_and_the_last_takes_what_the_second_took() -> None:
    tokens, chunk = 131072, 2048
    model, process = long_model(), psutil.Process()
    shape = model_shape(model)
    token_elements = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    with quantized_kv_cache(model, quantized(model, bits=3, outlier_fraction=0.01)) as kv:
        cache = kv.new_cache(max_sequences=1, max_length=tokens, spill_headroom=8.0)
        pieces, extra, resident = prompts_of([tokens])[0].split(chunk), [], []
        for i, piece in enumerate(pieces):
            # Between the measured chunks, because what measures keeps memory of its own.
            if i in (2, len(pieces) - 1):
                resident.append(process.memory_info().rss)
            if i not in (1, len(pieces) - 1):
                cache.append([piece])
                continue
            with PeakMemory() as peak:
                logits = cache.append([piece])
            extra.append(peak.extra_bytes)
            assert logits.isfinite().all()
        assert cache.length(cache.rows[0]) == tokens
        # Well below the numbers alone in fp16: 3 bits, ranges and outliers.
        assert cache.bytes_held < tokens * token_elements * 2 / 3
        assert extra[1] - extra[0] < 0.05 * tokens * token_elements * 4
        assert resident[1] - resident[0] < cache.pools[0].bytes_total + 512 * MIB
        with pytest.raises(DataError, match=f"{tokens} tokens"):
            cache.append([torch.tensor([5])])
