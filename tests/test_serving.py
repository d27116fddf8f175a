"""Continuous batching: who is admitted, preempted and served, and that nobody is lost; on random and real requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import DataError, PoolExhausted
from kvquant.models import model_shape, quantized_kv_cache, record_keys_and_values
from kvquant.serving.replay import Replay, Request, replay
from kvquant.serving.scheduler import AdmissionRules, Scheduler, ServedRequest
from kvquant.spec import QuantSpec
from small_models import exact, prompts_of, small_model

RULES = AdmissionRules(max_sequences=8, step_tokens=24, spare_fraction=0.05)


def clock() -> Iterator[float]:
    """Every reading is half a second later: a step takes as long."""
    return (0.5 * i for i in itertools.count())


def requests_of(lengths: list[tuple[int, int]], gap_s: float = 0.0) -> list[Request]:
    prompts = prompts_of([prompt for prompt, _ in lengths])
    return [Request(i * gap_s, p, new) for i, (p, (_, new)) in enumerate(zip(prompts, lengths, strict=True))]


class Blocks:
    """A cache that is nothing but a count of blocks of 4 tokens."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.held, self._rows = num_blocks, {}, itertools.count()

    def open(self, num_sequences: int) -> list[int]:
        rows = [next(self._rows) for _ in range(num_sequences)]
        self.held.update(dict.fromkeys(rows, 0))
        return rows

    def free(self, row: int) -> None:
        del self.held[row]

    def has_room(self, claims, *, in_steps: bool, spare_fraction: float) -> bool:
        now = dict(self.held)
        for i, (row, n) in enumerate(claims):
            key = ("new", i) if row is None else row
            now[key] = now.get(key, 0) + n
        needed = sum(-(-n // 4) for n in now.values())
        return needed + spare_fraction * self.num_blocks <= self.num_blocks


class TestScheduler:
    def test_nobody_overtakes_and_the_spare_blocks_stay_free(self) -> None:
        scheduler = Scheduler(Blocks(10), AdmissionRules(8, 100, 0.2))
        waiting = [ServedRequest(i, tokens, 5) for i, tokens in enumerate([16, 17, 4])]
        scheduler.waiting.extend(waiting)
        # 4 + 5 blocks would fit ten, but not beside the two that must stay free; the small one waits behind.
        assert [(r.number, n) for r, n in scheduler.plan()] == [(0, 16)]
        assert list(scheduler.waiting) == waiting[1:] and scheduler.memory_bound

    def test_spare_blocks_do_not_keep_out_a_request_that_is_alone(self) -> None:
        scheduler = Scheduler(Blocks(4), AdmissionRules(8, 100, 0.5))
        scheduler.waiting.append(ServedRequest(0, 16, 1))
        assert len(scheduler.plan()) == 1

    def test_decoding_sequences_go_before_prompts_and_prompts_come_in_chunks(self) -> None:
        scheduler = Scheduler(Blocks(100), AdmissionRules(3, 10, 0.0))
        scheduler.waiting.extend(ServedRequest(i, tokens, 5) for i, tokens in enumerate([25, 1, 30, 1]))
        assert [(r.number, n) for r, n in scheduler.plan()] == [(0, 10)]
        scheduler.running[0].stored = 20
        assert [(r.number, n) for r, n in scheduler.plan()] == [(1, 1), (0, 5), (2, 4)]
        assert [r.number for r in scheduler.waiting] == [3]  # three sequences are the most
        assert not scheduler.memory_bound

    def test_the_newest_is_sent_back_to_the_front_with_what_it_had_generated(self) -> None:
        store = Blocks(4)
        scheduler = Scheduler(store, AdmissionRules(8, 100, 0.0))
        scheduler.waiting.extend(ServedRequest(i, 8, 5) for i in range(3))
        for request, count in scheduler.plan():
            request.stored += count
            store.held[request.row] += count
            request.generated.append(7)
        assert [(r.number, n) for r, n in scheduler.plan()] == [(0, 1)]
        back = scheduler.waiting[0]
        assert (back.number, back.pending, back.preemptions, back.recomputed_tokens) == (1, 9, 1, 8)
        assert [r.number for r in scheduler.waiting] == [1, 2] and list(store.held) == [0]

    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
        st.integers(15, 40),
        st.integers(4, 30),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_request_is_served_once_whatever_the_budget(self, lengths, num_blocks, step_tokens) -> None:
        store = Blocks(num_blocks)
        scheduler = Scheduler(store, AdmissionRules(4, step_tokens, 0.05))
        scheduler.waiting.extend(ServedRequest(i, *pair) for i, pair in enumerate(lengths))
        finished = []
        for _ in range(10_000):
            if not scheduler.waiting and not scheduler.running:
                break
            shares = scheduler.plan()
            assert shares and sum(n for _, n in shares) <= step_tokens
            for request, count in shares:
                request.stored += count
                store.held[request.row] += count
            assert sum(-(-n // 4) for n in store.held.values()) <= num_blocks
            for request, _ in shares:
                if not request.pending:
                    request.generated.append(0)
                    if request.is_finished:
                        assert request.stored == request.most_stored
                        scheduler.finish(request)
                        finished.append(request.number)
        assert sorted(finished) == list(range(len(lengths))) and not store.held


@pytest.fixture(scope="module", params=["llama-gqa-llama3", "gemma3-two-ropes", "mistral-window"])
def model(request):
    return small_model(request.param)


LENGTHS = [(30, 6), (5, 14), (70, 4), (1, 1), (44, 8), (12, 9), (60, 2), (9, 12)]


def serve(model, quantizers: list[BatchedKVQuantizer], **size: float) -> Replay:
    ticks = clock()
    with torch.inference_mode(), quantized_kv_cache(model, quantizers) as kv:
        cache = kv.new_cache(
            block_size=8, max_sequences=RULES.max_sequences, call_tokens=RULES.step_tokens, **size
        )
        result = replay(cache, requests_of(LENGTHS), RULES, clock_s=lambda: next(ticks))
        assert cache.rows == [] and [pool.blocks_in_use for pool in cache.pools] == [0] * len(cache.pools)
    return result


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """What the stock model answers to each request by itself."""
    return [
        model.generate(r.prompt[None], max_new_tokens=r.new_tokens, do_sample=False)[
            0, len(r.prompt) :
        ].tolist()
        for r in requests_of(LENGTHS)
    ]


class TestReplay:
    @pytest.mark.parametrize("num_blocks", [12, 200], ids=["queueing", "roomy"])
    def test_answers_are_those_of_each_request_alone(self, model, alone, num_blocks) -> None:
        result = serve(model, exact(model), num_blocks=num_blocks)
        assert sorted(o.number for o in result.outcomes) == list(range(len(LENGTHS)))
        assert [o.tokens for o in sorted(result.outcomes, key=lambda o: o.number)] == alone
        assert (sum(o.preemptions for o in result.outcomes) > 0) == (num_blocks == 12)

    def test_outlier_chunks_that_run_out_send_the_newest_back(self) -> None:
        """Their number is known only afterwards: calibrated on quiet text, served loud keys."""
        model = small_model("llama-gqa-llama3")
        shape = model_shape(model)
        quiet = torch.randn(
            300, shape.num_kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(0)
        )
        with record_keys_and_values(model) as recorded, torch.inference_mode():
            model(input_ids=prompts_of([300])[0][None], use_cache=False)
            scale = [float(k.std()) for k, _ in recorded]
        spec = QuantSpec(bits=4, outlier_fraction=0.02)
        quantizers = [BatchedKVQuantizer.calibrate(spec, 0.55 * s * quiet, quiet) for s in scale]
        result = serve(model, quantizers, num_blocks=60, spill_headroom=1.0)
        assert sorted(o.number for o in result.outcomes) == list(range(len(LENGTHS)))
        assert sum(o.preemptions for o in result.outcomes) > 0

    def test_times_are_the_clocks_and_idle_time_is_skipped(self) -> None:
        model, ticks = small_model("llama-gqa-llama3"), clock()
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=40, max_sequences=8, block_size=8, call_tokens=24)
            asked = requests_of([(30, 3), (3, 1)], gap_s=100.0)
            result = replay(cache, asked, RULES, clock_s=lambda: next(ticks))
        first, second = result.outcomes
        # 30 tokens take two calls of at most 24; each call takes half a second.
        assert (first.ttft_s, first.token_s) == (1.0, [1.0, 1.5, 2.0])
        assert (second.ttft_s, second.token_s) == (0.5, [100.5])
        assert [(s.held, s.new_tokens, s.held_tokens) for s in result.steps][:3] == [
            (1, 24, 24),
            (1, 6, 30),
            (1, 1, 31),
        ]

    def test_a_request_that_cannot_fit_is_refused_before_anything_runs(self) -> None:
        model = small_model("llama-gqa-llama3")
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=8, max_sequences=8, block_size=8, call_tokens=24)
            with pytest.raises(PoolExhausted, match=r"60 \+ 9 tokens do not fit"):
                replay(cache, requests_of([(5, 5), (60, 9)]), RULES)
            assert cache.rows == []

    def test_more_tokens_than_call_tokens_are_refused(self) -> None:
        model = small_model("mistral-window")
        with quantized_kv_cache(model, exact(model)) as kv:
            cache = kv.new_cache(num_blocks=8, max_sequences=2, block_size=8, call_tokens=24)
            with pytest.raises(DataError, match="24 new tokens"):
                cache.append(prompts_of([25]))
            assert cache.rows == [] and cache.append(prompts_of([12, 12])).shape[0] == 2
