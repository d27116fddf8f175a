"""Every family in every shape of use against the stock model, unquantized; what quantized chunks and batches change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, PoolExhausted
from kvquant.models import KVHandle, QuantizedCache, quantized_kv_cache
from kvquant.models.rotary import rope_switch
from kvquant.ragged import RaggedStep
from small_models import FAMILIES, exact, left_padded, prompts_of, quantized, small_model

LENGTHS = [5, 70, 33]
CHUNKS = {
    "chunks of 1": [1] * 70,
    "chunks of 7": [7] * 10,
    "chunks of 64": [64, 6],
    "mixed": [1, 13, 20, 2, 1, 33],
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> PreTrainedModel:
    return small_model(request.param)


def new_cache(kv: KVHandle, **settings: Any) -> QuantizedCache:
    """A cache of small blocks; long frequencies throughout for the long rope that switches at 4 tokens."""
    switch = rope_switch(kv.model.get_decoder().rotary_emb)
    return kv.new_cache(block_size=8, rope_length=128 if switch == 4 else None, **settings)


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
        ],
        ids=["beams", "returned beams", "samples", "chunks of 7"],
    )
    @torch.inference_mode()
    def test_equals_the_stock_cache(self, model, settings) -> None:
        batch = left_padded(prompts_of(LENGTHS))
        settings = {"max_new_tokens": 10, **settings}
        torch.manual_seed(3)
        stock = model.generate(**batch, **{**settings, "prefill_chunk_size": None})
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, max_length=128)
            torch.manual_seed(3)
            ours = model.generate(**batch, **settings, past_key_values=cache)
            assert torch.equal(ours, stock)
            cache.reset()
            assert [pool.blocks_in_use for pool in cache.pools] == [0] * len(cache.pools)

    @torch.inference_mode()
    def test_turns_of_a_chat_on_one_cache(self, model) -> None:
        settings = {"max_new_tokens": 6, "do_sample": False}
        with quantized_kv_cache(model, exact(model)) as kv:
            cache, turns = new_cache(kv, max_length=128), []
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

        with quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, max_length=128)
            said = model.generate(**first, **settings, past_key_values=cache)
            grown = torch.ones(2, said.shape[1] - first["input_ids"].shape[1], dtype=torch.int64)
            mask = torch.cat([first["attention_mask"], grown, second["attention_mask"]], 1)
            ids = torch.cat([said, second["input_ids"]], 1)
            answers = model.generate(ids, attention_mask=mask, **settings, past_key_values=cache)
        # Each chat alone and without padding: over padding between turns the stock model's sliding windows count
        # columns, not tokens, so that a padded row sees less than the same row alone.
        for row, answer in enumerate(answers):
            alone = ids[row][mask[row].bool()][None]
            mask_alone = torch.ones_like(
                alone
            )  # else padding would be inferred from answers that hold its token
            stock = model.generate(alone, attention_mask=mask_alone, **settings)
            assert torch.equal(stock[0, -5:], answer[-5:])


class TestAppend:
    @pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
    @torch.inference_mode()
    def test_chunks_equal_the_whole(self, model, chunks) -> None:
        (prompt,) = prompts_of([70])
        stock = model(input_ids=prompt[None]).logits[0]
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, num_blocks=16, max_sequences=1)
            ours = torch.cat([cache.append([part], logits="all") for part in prompt.split(chunks)])
        assert close(ours, stock)

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.inference_mode()
    def test_padded_batches_equal_each_prompt_alone(self, model, side) -> None:
        prompts = prompts_of(LENGTHS)
        batch = left_padded(prompts)
        if side == "right":
            batch = {
                name: torch.stack([row.roll(n) for row, n in zip(x, LENGTHS, strict=True)])
                for name, x in batch.items()
            }
        with quantized_kv_cache(model, exact(model)) as kv:
            ours = model(**batch, past_key_values=new_cache(kv, max_length=128)).logits
        for row, prompt in enumerate(prompts):
            assert close(
                ours[row][batch["attention_mask"][row].bool()], model(input_ids=prompt[None]).logits[0]
            )

    @torch.inference_mode()
    def test_bf16_error_is_at_most_twice_the_stock_models_through_chunks_crops_and_forks(self, model) -> None:
        half, (prefix, *ends) = copy.deepcopy(model).bfloat16(), prompts_of([40, 9, 30])
        texts = [torch.cat([prefix, end])[None] for end in ends]
        truth = torch.cat([model(input_ids=text).logits[0, 40:] for text in texts])
        stock = torch.cat([half(input_ids=text).logits[0, 40:].float() for text in texts])
        with quantized_kv_cache(half, exact(half)) as kv:
            cache = new_cache(kv, num_blocks=40, max_sequences=2)
            for part in prefix.split([25, 1, 1, 13]):
                cache.append([part])
            cache.append(prompts_of([3], seed=5))
            cache.crop(-3)
            cache.fork(cache.rows[0])
            ours = [cache.append([end[i : i + 3] for end in ends], logits="all") for i in (0, 3, 6)]
            first, second = zip(*(part.split(3) for part in ours), strict=True)
            rest = [cache.append([token], cache.rows[1:], logits="all") for token in ends[1][9:].split(1)]
        error = (torch.cat([*first, *second, *rest]) - truth).square().mean()
        assert error.sqrt() <= 2 * (stock - truth).square().mean().sqrt()

    @torch.inference_mode()
    def test_sequences_at_different_points_share_a_call(self, model) -> None:
        prompts = prompts_of([50, 80, 30])
        stock = torch.stack([model(input_ids=p[None]).logits[0, -1] for p in prompts])
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, num_blocks=40, max_sequences=3)
            rows = cache.open(3)
            cache.append([prompts[1][:60]], rows=rows[1:2])
            cache.append([prompts[0][:1], prompts[1][60:63]], rows=rows[:2])
            assert close(cache.append([prompts[0][1:], prompts[1][63:], prompts[2]], rows=rows), stock)

    @torch.inference_mode()
    def test_a_prefix_stored_once_serves_several_sequences(self, model) -> None:
        prefix, *ends = prompts_of([45, 3, 20, 11])
        stock = torch.stack([model(input_ids=torch.cat([prefix, e])[None]).logits[0, -1] for e in ends])
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, num_blocks=40, max_sequences=3)
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
            cache = new_cache(kv, num_blocks=16, max_sequences=1)
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
            cache = new_cache(kv, max_length=128)
            cache.append([p[:-1] for p in prompts_of(LENGTHS)])
            ours = model.generate(**batch, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    "model", ["llama-gqa-llama3", "mistral-window", "gemma2-softcap", "gemma3-two-ropes"], indirect=True
)
class TestQuantized:
    """nuq, fp32, ``prefill_reads=quantized``: what is stored does not depend on how the tokens came.

    Up to summation order, that is, which moves a few elements in a million across a decision boundary; later layers and
    tokens then see that. One attention layer alone, whose inputs are the same bits, is in test_prefill_quant.py.
    """

    @torch.inference_mode()
    def test_chunks_equal_the_whole(self, model) -> None:
        (prompt,) = prompts_of([70])
        stock = model(input_ids=prompt[None]).logits[0]
        with quantized_kv_cache(model, quantized(model, **SPEC)) as kv:
            whole = _Stored(kv, [prompt], [70])
            for chunks in CHUNKS.values():
                whole.check(0, _Stored(kv, [prompt], chunks), 0, stock)

    @torch.inference_mode()
    def test_a_batch_equals_each_alone(self, model) -> None:
        prompts = prompts_of([70, 5, 33, 64], seed=2)
        stock = [model(input_ids=prompt[None]).logits[0] for prompt in prompts]
        with quantized_kv_cache(model, quantized(model, **SPEC)) as kv:
            batches = [_Stored(kv, prompts, chunks) for chunks in ([70], [3, 1, 29])]
            for place, prompt in enumerate(prompts):
                alone = _Stored(kv, [prompt], [70])
                for batch in batches:
                    alone.check(0, batch, place, stock[place])


SPEC = {"bits": 3, "outlier_fraction": 0.01, "sink_tokens": 2}


class _Stored:
    """Prompts that advance together by the next of ``chunks``, then by all that is left: their logits and codes."""

    def __init__(self, kv: KVHandle, prompts: list[torch.Tensor], chunks: list[int]) -> None:
        self.cache = new_cache(kv, num_blocks=60, max_sequences=len(prompts), spill_headroom=8.0)
        # By sequence, layer and side: what each call stored. A window gives blocks back, so they are read as they come.
        self._written: dict[int, dict[int, list[torch.Tensor]]] = {}
        rows, parts, start = self.cache.open(len(prompts)), [[] for _ in prompts], 0
        with mock.patch.object(BatchedKVQuantizer, "write", self._recorded(BatchedKVQuantizer.write)):
            for size in [*chunks, 1000]:
                left = [i for i, prompt in enumerate(prompts) if start < len(prompt)]
                if left:
                    new = [prompts[i][start : start + size] for i in left]
                    out = self.cache.append(new, [rows[i] for i in left], logits="all").split(
                        [len(x) for x in new]
                    )
                    for i, logits in zip(left, out, strict=True):
                        parts[i].append(logits)
                start += size
        self.logits = [torch.cat(part) for part in parts]

    def _recorded(self, write: Callable[..., None]) -> Callable[..., None]:
        def recording(
            quantizer: Any, keys: Any, values: Any, store: Any, step: RaggedStep, **options: Any
        ) -> None:
            write(quantizer, keys, values, store, step, **options)
            for side in (store.keys, store.values):
                stored = side.codes[step.slot_block, :, step.slot_offset]  # [T, H, bytes]
                for row, codes in zip(step.rows.tolist(), stored.split(step.lengths), strict=True):
                    of_row = self._written.setdefault(row, {})
                    of_row.setdefault(side.codes.data_ptr(), []).append(codes)

        return recording

    def codes(self, place: int) -> torch.Tensor:
        """All codes that one sequence ever stored, keys and values of every layer."""
        found = [torch.cat(parts).flatten() for parts in self._written[self.cache.rows[place]].values()]
        assert found
        return torch.cat(found)

    def check(self, place: int, other: _Stored, its_place: int, stock: torch.Tensor) -> None:
        """Assert that a sequence was stored as in another cache; ``stock`` are its logits without quantizing."""
        moved = (self.codes(place) != other.codes(its_place)).float().mean()
        difference = self.logits[place] - other.logits[its_place]
        if moved == 0:
            assert (
                difference.abs().max() <= 5e-4
            )  # ranges and outliers are rounded to 16 bits, this way or that
        else:
            quantizing = self.logits[place] - stock
            assert moved < 0.01 and difference.norm() < 0.05 * quantizing.norm()


@pytest.mark.parametrize("model", ["llama-gqa-llama3"], indirect=True)
class TestRows:
    def test_selecting_needs_no_spare_rows_and_keeps_what_is_chosen(self, model) -> None:
        prompts = prompts_of([10, 20, 30])
        with torch.inference_mode(), quantized_kv_cache(model, quantized(model, bits=4)) as kv:
            cache = new_cache(kv, num_blocks=16, max_sequences=3, spill_headroom=8.0)
            cache.append(prompts)
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            assert [cache.length(row) for row in cache.rows] == [30, 30, 10]
            cache.batch_select_indices(torch.tensor([True, False, True]))
            assert [cache.length(row) for row in cache.rows] == [30, 10]
            with pytest.raises(PoolExhausted, match="max_sequences"):
                cache.batch_repeat_interleave(2)

    def test_too_many_sequences_open_none(self, model) -> None:
        with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, num_blocks=16, max_sequences=2)
            with pytest.raises(PoolExhausted, match="at most 2 sequences, got 0 and 3 more"):
                cache.append(prompts_of([3, 3, 3]))
            assert cache.rows == [] and cache.append(prompts_of([3, 3])).shape[0] == 2

    def test_masks_that_are_not_a_tokenizers_are_refused(self, model) -> None:
        ids = prompts_of([6])[0][None]
        with torch.inference_mode(), quantized_kv_cache(model, exact(model)) as kv:
            cache = new_cache(kv, max_length=64)
            with pytest.raises(DataError, match="tokenizer's own mask"):
                model.get_decoder()(
                    input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6), past_key_values=cache
                )
