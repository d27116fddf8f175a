"""Models spread over devices: each layer's blocks lie where its attention runs; what is offloaded is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvquant.errors import ModelError, PoolExhausted
from kvquant.models import pools, quantized_kv_cache
from kvquant.models.attention_hook import attention_modules
from small_models import exact, left_padded, prompts_of, quantized, small_model

LENGTHS = [5, 60, 33]


@pytest.fixture(params=["llama-gqa-llama3", "gemma3-two-ropes"])
def model(request) -> PreTrainedModel:
    return small_model(request.param)


class TestTwoNamesOfOneDevice:
    """``cpu`` and ``cpu:0`` are different devices by name, which is all that pools and tables go by."""

    @pytest.fixture
    def spread(self, model, monkeypatch) -> PreTrainedModel:
        devices = [torch.device("cpu"), torch.device("cpu", 0)]
        layers = [devices[i % 2] for i in range(len(attention_modules(model)))]
        for module in ("cache", "context"):
            monkeypatch.setattr(f"kvquant.models.{module}.layer_devices", lambda model: layers)
        return model

    @torch.inference_mode()
    def test_layers_of_one_device_share_a_pool_and_answers_stay(self, spread, model) -> None:
        prompts = prompts_of(LENGTHS)
        stock = torch.stack([model(input_ids=p[None]).logits[0, -1] for p in prompts])
        with quantized_kv_cache(spread, exact(spread)) as kv:
            cache = kv.new_cache(num_blocks=60, max_sequences=4, block_size=8)
            last = cache.append([p[:-3] for p in prompts])
            assert len({pool.device for pool in cache.pools}) == 2
            assert sum(pool.layout.num_layers for pool in cache.pools) == len(attention_modules(model))
            fork = cache.fork(cache.rows[1])
            cache.crop(-1)
            cache.free(fork)
            last = cache.append([p[-4:] for p in prompts])
            assert (last - stock).abs().max() <= 1e-4

    @torch.inference_mode()
    def test_each_device_is_asked_for_its_own_memory(self, spread, monkeypatch) -> None:
        monkeypatch.setattr(pools, "_available_bytes", lambda device: 2**40 if device.index is None else 1000)
        with (
            quantized_kv_cache(spread, exact(spread)) as kv,
            pytest.raises(PoolExhausted, match="which fits"),
        ):
            kv.new_cache(num_blocks=60, max_sequences=4)


def test_offloaded_layers_are_refused_by_number(model) -> None:
    quantizers = exact(model)
    attention_modules(model)[1].to("meta")
    with pytest.raises(ModelError, match="layer 1 is offloaded"), quantized_kv_cache(model, quantizers):
        pass


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_move(x, device) for x in value) if isinstance(value, tuple) else value


def _spread_over(model: PreTrainedModel, devices: list[torch.device]) -> PreTrainedModel:
    """Put the first half of the layers on the first device and the rest on the second, as a device_map does."""
    decoder = model.get_decoder().to(devices[0])
    model.get_output_embeddings().to(devices[1])
    decoder.norm.to(devices[1])
    half = len(decoder.layers) // 2
    homes = {layer: devices[int(i >= half)] for i, layer in enumerate(decoder.layers)}
    for module, device in {
        **homes,
        decoder.norm: devices[1],
        model.get_output_embeddings(): devices[1],
    }.items():

        def move(module: nn.Module, args: Any, kwargs: Any, device: torch.device = device) -> Any:
            return _move(args, device), {name: _move(value, device) for name, value in kwargs.items()}

        module.to(device).register_forward_pre_hook(move, with_kwargs=True)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["exact", "quantized"])
@torch.inference_mode()
def test_a_model_on_two_gpus_answers_as_on_one(model, stored) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    quantizers = exact(model) if stored == "exact" else quantized(model, bits=4)
    prompts, batch = prompts_of(LENGTHS), left_padded(prompts_of(LENGTHS))
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = []
    for devices in ([torch.device("cuda", 0)] * 2, [torch.device("cuda", 0), torch.device("cuda", 1)]):
        spread = _spread_over(small_model_like(model), devices)
        with quantized_kv_cache(spread, quantizers) as kv:
            cache = kv.new_cache(num_blocks=40, max_sequences=3, block_size=32)
            chunks = [cache.append([p[:3] for p in prompts]), cache.append([p[3:] for p in prompts])]
            assert {pool.device for pool in cache.pools} == set(devices)
            on_device = {name: x.to(devices[0]) for name, x in batch.items()}
            text = spread.generate(**on_device, **settings, past_key_values=kv.new_cache(max_length=128))
        found.append(([x.cpu() for x in chunks], text.cpu()))
    (one, one_text), (two, two_text) = found
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(one_text, two_text)


def small_model_like(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights once more, without hooks."""
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh
