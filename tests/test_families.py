"""Every supported family through our blocks, unquantized, against the stock model; and those that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DeepseekV3Config, PreTrainedModel, T5Config

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, ModelError
from kvquant.models import load_model, model_shape, quantized_kv_cache, record_keys_and_values
from kvquant.models.families import check_family
from kvquant.spec import QuantSpec
from small_models import FAMILIES, WINDOW, exact, left_padded, model_of, phi3, prompts_of, small_model

LENGTHS = [5, 90, 41]
STEPS = 10


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> PreTrainedModel:
    return small_model(request.param)


class TestFamily:
    @torch.inference_mode()
    def test_ragged_logits_and_greedy_tokens_equal_the_stock_models(self, model) -> None:
        prompts = prompts_of(LENGTHS)
        stock = torch.cat([model(input_ids=p[None]).logits[0] for p in prompts])
        greedy = [
            model.generate(p[None], max_new_tokens=STEPS, do_sample=False)[0, len(p) :] for p in prompts
        ]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=60, max_sequences=3, block_size=8)
            ours = cache.append(prompts, logits="all")
            last = torch.tensor(LENGTHS).cumsum(0) - 1
            tokens = [ours[last].argmax(-1)]
            for _ in range(STEPS - 1):
                tokens.append(cache.append(list(tokens[-1][:, None])).argmax(-1))
        assert (ours - stock).abs().max() <= 1e-4
        assert torch.equal(torch.stack(tokens, 1), torch.stack(greedy))

    @torch.inference_mode()
    def test_generate_on_a_left_padded_batch_equals_the_stock_cache(self, model) -> None:
        batch = left_padded(prompts_of(LENGTHS))
        settings = {"max_new_tokens": STEPS, "do_sample": False}
        stock = model.generate(**batch, **settings)
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(block_size=16, max_length=128)
            assert torch.equal(model.generate(**batch, **settings, past_key_values=cache), stock)

    @torch.inference_mode()
    def test_bf16_error_is_at_most_twice_the_stock_models(self, model) -> None:
        half, ids = copy.deepcopy(model).bfloat16(), prompts_of([150])[0]
        truth = model(input_ids=ids[None]).logits[0]
        stock = (half(input_ids=ids[None]).logits[0].float() - truth).square().mean()
        with quantized_kv_cache(half, exact(half)) as kv:
            ours = (kv.new_cache(max_length=150).append([ids], logits="all") - truth).square().mean()
        assert ours.sqrt() <= 2 * stock.sqrt()

    @torch.inference_mode()
    def test_recording_changes_nothing_and_what_it_records_calibrates(self, model) -> None:
        ids = prompts_of([120])[0][None]
        stock = model(input_ids=ids).logits[0]
        with record_keys_and_values(model) as recorded:
            logits = model(input_ids=ids, use_cache=False).logits[0]
            assert (logits - stock).abs().max() <= 1e-4
            assert len(recorded) == model_shape(model).num_layers
            quantizers = [
                BatchedKVQuantizer.calibrate(QuantSpec(bits=8), k[0].transpose(0, 1), v[0].transpose(0, 1))
                for k, v in recorded
            ]
        with quantized_kv_cache(model, quantizers) as kv:
            ours = kv.new_cache(block_size=16, max_length=128).append([ids[0]], logits="all")
        assert (ours - stock).norm() < 0.05 * stock.norm()


def test_fp16_is_as_close_as_the_stock_model() -> None:
    model, ids = small_model("gemma3-two-ropes"), prompts_of([60])[0]
    half = copy.deepcopy(model).half()
    with torch.inference_mode():
        truth = model(input_ids=ids[None]).logits[0]
        stock = (half(input_ids=ids[None]).logits[0].float() - truth).square().mean()
        with quantized_kv_cache(half, exact(half)) as kv:
            ours = (kv.new_cache(max_length=64).append([ids], logits="all") - truth).square().mean()
    assert ours.sqrt() <= 2 * stock.sqrt()


class TestWindows:
    def test_layers_of_one_window_share_a_pool(self) -> None:
        assert model_shape(small_model("qwen2-mixed")).windows == (None, WINDOW, WINDOW)
        model = small_model("gemma3-two-ropes")
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=8, max_sequences=1)
            assert [pool.window for pool in cache.pools] == [WINDOW, None]
            assert [pool.layout.num_layers for pool in cache.pools] == [2, 1]

    @torch.inference_mode()
    def test_blocks_that_have_passed_come_back_and_a_text_may_outgrow_its_pool(self) -> None:
        model, (prompt,) = small_model("mistral-window"), prompts_of([400])
        stock = model(input_ids=prompt[None]).logits[0, -1]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=6, max_sequences=1, block_size=8)
            for chunk in prompt.split(16):
                last = cache.append([chunk])
                (pool,) = cache.pools
                assert pool.blocks_in_use <= WINDOW // 8 + 1
                for name in ("keys", "values"):  # the table points to block 0 for what has passed
                    pool.tensors[name][:, list(pool._ids.free)] = torch.nan
        assert cache.length(cache.rows[0]) == 400
        assert (last[0] - stock).abs().max() <= 1e-4

    @torch.inference_mode()
    def test_crop_into_what_was_given_back_is_refused_and_changes_nothing(self) -> None:
        model, (prompt,) = small_model("gemma2-softcap"), prompts_of([60])
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=10, max_sequences=1, block_size=8)
            first = cache.append([prompt])
            with pytest.raises(ValueError, match="sliding window of 24 tokens"):
                cache.crop(-30)
            cache.crop(-1)
            assert [pool.length(cache.rows[0]) for pool in cache.pools] == [59, 59]
            torch.testing.assert_close(cache.append([prompt[-1:]]), first, rtol=1e-4, atol=1e-4)


class TestLongRope:
    @torch.inference_mode()
    def test_generate_across_the_switch_equals_the_stock_model(self) -> None:
        model, (prompt,) = model_of(phi3(40)), prompts_of([35])
        settings = {"max_new_tokens": 12, "do_sample": False}
        stock = model.generate(prompt[None], **settings)
        if not torch.equal(stock, model.generate(prompt[None], **settings, use_cache=False)):
            pytest.skip(
                "this transformers forgets the text at the switch: it drops the cache and keeps one token"
            )
        with quantized_kv_cache(model, exact(model)) as kv:
            ours = model.generate(prompt[None], **settings, past_key_values=kv.new_cache())
        assert torch.equal(ours, stock)

    @torch.inference_mode()
    def test_one_length_for_all_lets_chunks_cross_the_switch(self) -> None:
        model, (prompt,) = model_of(phi3(40)), prompts_of([60])
        stock = model(input_ids=prompt[None]).logits[0, -1]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(rope_length=60)
            for chunk in prompt.split(13):
                last = cache.append([chunk])
            assert (last[0] - stock).abs().max() <= 1e-4
            cache = kv.new_cache(max_sequences=2)
            with pytest.raises(DataError, match="one side of 40 tokens.*rope_length"):
                cache.append([prompt, prompt[:9]])
            assert cache.rows == []
            cache.append([prompt[:30]])
            with pytest.raises(DataError, match="may not grow past 40 tokens"):
                cache.append([prompt[30:]], rows=cache.rows[:1])


class _Config:
    def __init__(self, **settings) -> None:
        self.__dict__.update(settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3: latent attention"),
        ({"model_type": "something_new", "kv_lora_rank": 64}, "something_new: latent attention"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5: an encoder-decoder"),
        ({"model_type": "qwen3_next"}, "qwen3_next: linear-attention"),
        ({"model_type": "mamba"}, "mamba: linear-attention"),
        ({"model_type": "jamba"}, "jamba: linear-attention"),
        ({"model_type": "other", "layer_types": ["linear_attention"]}, "other: linear-attention"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "sees later ones"),
        ({"model_type": "cohere"}, "cohere: it rotates neighbouring channels"),
        ({"model_type": "opt"}, "opt: its attention has not been fitted"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_what_cannot_run_is_refused_by_name_with_the_reason(settings, reason) -> None:
    with pytest.raises(ModelError, match=reason):
        check_family(_Config(**settings))


@pytest.mark.parametrize(
    ("config", "reason"),
    [(T5Config(), "t5: an encoder-decoder"), (DeepseekV3Config(), "deepseek_v3: latent attention")],
    ids=["t5", "deepseek"],
)
def test_a_checkpoint_is_refused_before_its_weights_are_read(config, reason, tmp_path) -> None:
    config.save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ModelError, match=reason):
        load_model(tmp_path)
