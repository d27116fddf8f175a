"""Shapes of use against the stock model, unquantized: beams, several returns, chunks, turns, crops, shared prefixes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, PoolExhausted
from kvquant.models import model_shape, quantized_kv_cache
from kvquant.spec import QuantSpec
from small_models import exact, left_padded, prompts_of, small_model

LENGTHS = [5, 70, 33]


@pytest.fixture(scope="module", params=["llama-gqa-llama3", "gemma3-two-ropes"])
def model(request) -> PreTrainedModel:
    return small_model(request.param)


def close(ours: torch.Tensor, stock: torch.Tensor) -> bool:
    return bool((ours - stock).abs().max() <= 1e-4)


class TestGenerate:
    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 3, "do_sample": False},
            {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
            {"num_return_sequences": 3, "do_sample": True, "temperature": 0.8, "top_k": 20},
            {"prefill_chunk_size": 7, "do_sample": False},
            {"prefill_chunk_size": 1, "do_sample": False},
        ],
        ids=["beams", "returned beams", "samples", "chunks of 7", "chunks of 1"],
    )
    @torch.inference_mode()
    def test_equals_the_stock_cache(self, model, settings) -> None:
        batch = left_padded(prompts_of(LENGTHS))
        settings = {"max_new_tokens": 10, **settings}
        torch.manual_seed(3)
        stock = model.generate(**batch, **{**settings, "prefill_chunk_size": None})
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(block_size=8, max_length=128)
            torch.manual_seed(3)
            ours = model.generate(**batch, **settings, past_key_values=cache)
            assert torch.equal(ours, stock)
            cache.reset()
            assert [pool.blocks_in_use for pool in cache.pools] == [0] * len(cache.pools)

    @torch.inference_mode()
    def test_turns_of_a_chat_on_one_cache(self, model) -> None:
        settings = {"max_new_tokens": 6, "do_sample": False}
        with quantized_kv_cache(model, exact(model)) as kv:
            cache, turns = kv.new_cache(block_size=8, max_length=128), []
            said = torch.empty(1, 0, dtype=torch.int64)
            for turn in prompts_of([20, 1, 37]):
                said = torch.cat([said, turn[None]], 1)
                turns.append(said)
                said = model.generate(said, **settings, past_key_values=cache)
                turns.append(said)
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            assert torch.equal(model.generate(asked, **settings), answered)

    @torch.inference_mode()
    def test_turns_of_a_padded_batch_on_one_cache(self, model) -> None:
        settings = {"max_new_tokens": 5, "do_sample": False}
        first, second = (
            left_padded(prompts_of(lengths, seed)) for lengths, seed in (([30, 9], 1), ([4, 12], 2))
        )

        def chat(cache) -> torch.Tensor:
            said = model.generate(**first, **settings, past_key_values=cache)
            grown = torch.ones(2, said.shape[1] - first["input_ids"].shape[1], dtype=torch.int64)
            mask = torch.cat([first["attention_mask"], grown, second["attention_mask"]], 1)
            ids = torch.cat([said, second["input_ids"]], 1)
            return model.generate(ids, attention_mask=mask, **settings, past_key_values=cache)

        stock = chat(DynamicCache())
        with quantized_kv_cache(model, exact(model)) as kv:
            assert torch.equal(chat(kv.new_cache(block_size=8, max_length=128)), stock)


class TestAppend:
    @pytest.mark.parametrize("chunk", [1, 7, 64], ids=lambda n: f"chunks of {n}")
    @torch.inference_mode()
    def test_chunks_equal_the_whole(self, model, chunk) -> None:
        (prompt,) = prompts_of([100])
        stock = model(input_ids=prompt[None]).logits[0]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=16, max_sequences=1, block_size=8)
            ours = torch.cat([cache.append([part], logits="all") for part in prompt.split(chunk)])
        assert close(ours, stock)

    @torch.inference_mode()
    def test_sequences_at_different_points_share_a_call(self, model) -> None:
        prompts = prompts_of([50, 80, 30])
        stock = torch.stack([model(input_ids=p[None]).logits[0, -1] for p in prompts])
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=40, max_sequences=3, block_size=8)
            rows = cache.open(3)
            cache.append([prompts[1][:60]], rows=rows[1:2])
            cache.append([prompts[0][:1], prompts[1][60:63]], rows=rows[:2])
            assert close(cache.append([prompts[0][1:], prompts[1][63:], prompts[2]], rows=rows), stock)

    @torch.inference_mode()
    def test_a_prefix_stored_once_serves_several_sequences(self, model) -> None:
        prefix, *ends = prompts_of([45, 3, 20, 11])
        stock = torch.stack([model(input_ids=torch.cat([prefix, e])[None]).logits[0, -1] for e in ends])
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=40, max_sequences=3, block_size=8)
            cache.append([prefix])
            used = [pool.blocks_in_use for pool in cache.pools]
            rows = [cache.rows[0], cache.fork(cache.rows[0]), cache.fork(cache.rows[0])]
            # Full blocks are shared; each fork copies the one that is still open.
            assert [pool.blocks_in_use for pool in cache.pools] == [n + 2 for n in used]
            assert close(cache.append(ends, rows=rows), stock)
            for row in rows:
                cache.free(row)
            assert [pool.blocks_in_use for pool in cache.pools] == [0] * len(cache.pools)

    @torch.inference_mode()
    def test_a_cropped_tail_may_be_written_again(self, model) -> None:
        prompt, wrong = prompts_of([44, 4])
        stock = model(input_ids=prompt[None]).logits[0, -1]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=16, max_sequences=1, block_size=8)
            cache.append([prompt[:40]])
            cache.append([wrong])
            cache.crop(0)
            cache.crop(-4)
            assert cache.length(cache.rows[0]) == cache.get_seq_length() == 40
            assert close(cache.append([prompt[40:]])[0], stock)
            with pytest.raises(ValueError, match=r"try crop\(-3\)"):
                cache.crop(3)

    @torch.inference_mode()
    def test_generate_continues_what_append_began(self, model) -> None:
        batch = left_padded(prompts_of(LENGTHS))
        stock = model.generate(**batch, max_new_tokens=6, do_sample=False)
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(block_size=8, max_length=128)
            cache.append([p[:-1] for p in prompts_of(LENGTHS)])
            ours = model.generate(**batch, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert torch.equal(ours, stock)


class TestRows:
    def test_selecting_needs_no_spare_rows_and_keeps_what_is_chosen(self, model) -> None:
        prompts = prompts_of([10, 20, 30])
        with torch.inference_mode(), quantized_kv_cache(model, _quantizers(model)) as kv:
            cache = kv.new_cache(num_blocks=16, max_sequences=3, block_size=8)
            cache.append(prompts)
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            assert [cache.length(row) for row in cache.rows] == [30, 30, 10]
            cache.batch_select_indices(torch.tensor([True, False, True]))
            assert [cache.length(row) for row in cache.rows] == [30, 10]
            with pytest.raises(PoolExhausted, match="max_sequences"):
                cache.batch_repeat_interleave(2)

    def test_too_many_sequences_open_none(self, model) -> None:
        with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=16, max_sequences=2, block_size=8)
            with pytest.raises(PoolExhausted, match="at most 2 sequences, got 0 and 3 more"):
                cache.append(prompts_of([3, 3, 3]))
            assert cache.rows == [] and cache.append(prompts_of([3, 3])).shape[0] == 2

    def test_masks_that_are_not_a_tokenizers_are_refused(self, model) -> None:
        ids = prompts_of([6])[0][None]
        with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(max_length=64)
            with pytest.raises(DataError, match="tokenizer's own mask"):
                model.get_decoder()(
                    input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6), past_key_values=cache
                )


def _quantizers(model: PreTrainedModel) -> list[BatchedKVQuantizer]:
    shape = model_shape(model)
    x = torch.randn(200, shape.num_kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(0))
    return [BatchedKVQuantizer.calibrate(QuantSpec(bits=4), x, x)] * shape.num_layers
