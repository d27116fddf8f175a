"""Replay requests against a cache, step by step, on a clock that counts work and skips idle time."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvquant.errors import PoolExhausted
from kvquant.models import QuantizedCache
from kvquant.serving.scheduler import AdmissionRules, Scheduler, ServedRequest


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: its arrival in seconds after the first, its prompt (int64 [P]) and the tokens it wants.

    All of them are generated, whether or not one ends the text: the trace says how long its answers were.
    """

    arrival_s: float
    prompt: Tensor
    new_tokens: int


@dataclasses.dataclass
class Outcome:
    """What became of a request; ``token_s`` are the times at which its tokens were there."""

    number: int
    arrival_s: float
    tokens: list[int]
    token_s: list[float]
    preemptions: int
    recomputed_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to first token, waiting included."""
        return self.token_s[0] - self.arrival_s


@dataclasses.dataclass(frozen=True)
class StepSample:
    """One forward call: when it ended, how long it took, and who was there.

    ``held`` and ``waiting`` count sequences, ``held_tokens`` the tokens stored when the call was over and before
    finished sequences left; ``memory_bound`` says that blocks, not tokens of the call, kept the others waiting.
    """

    end_s: float
    duration_s: float
    held: int
    waiting: int
    memory_bound: bool
    new_tokens: int
    held_tokens: int


@dataclasses.dataclass
class Replay:
    """All that a replay saw; outcomes in order of completion."""

    outcomes: list[Outcome]
    steps: list[StepSample]


def replay(
    cache: QuantizedCache,
    requests: Sequence[Request],
    rules: AdmissionRules,
    *,
    clock_s: Callable[[], float] = time.perf_counter,
    on_finish: Callable[[], None] = lambda: None,
) -> Replay:
    """Serve requests until all are finished, greedily decoded.

    Args:
        cache: an empty cache, made with ``call_tokens=rules.step_tokens`` and ``max_sequences`` of the rules.
        requests: in order of arrival.
        rules: the same for every cache that is compared.
        clock_s: reads a clock; idle time is skipped, not waited for.
        on_finish: called after each request.

    Raises:
        PoolExhausted: a request does not fit the cache even alone.
    """
    scheduler = Scheduler(cache, rules)
    served = [ServedRequest(i, len(r.prompt), r.new_tokens) for i, r in enumerate(requests)]
    for request in served:
        scheduler.check(request)
    arriving = collections.deque(served)
    token_s: list[list[float]] = [[] for _ in requests]
    outcomes: list[Outcome] = []
    steps: list[StepSample] = []
    now_s = 0.0
    while arriving or scheduler.waiting or scheduler.running:
        if not scheduler.waiting and not scheduler.running:
            now_s = max(now_s, requests[arriving[0].number].arrival_s)
        while arriving and requests[arriving[0].number].arrival_s <= now_s:
            scheduler.waiting.append(arriving.popleft())
        start_s = clock_s()
        shares, tokens = _step(cache, scheduler, requests)
        duration_s = clock_s() - start_s
        now_s += duration_s
        held, held_tokens = len(scheduler.running), sum(r.stored for r in scheduler.running)
        waiting, new_tokens = len(scheduler.waiting), sum(count for _, count in shares)
        steps.append(
            StepSample(now_s, duration_s, held, waiting, scheduler.memory_bound, new_tokens, held_tokens)
        )
        for (request, _), token in zip(shares, tokens, strict=True):
            if request.pending:
                continue  # the prompt goes on in the next call
            request.generated.append(token)
            token_s[request.number].append(now_s)
            if request.is_finished:
                scheduler.finish(request)
                outcomes.append(_outcome(request, requests[request.number], token_s[request.number]))
                on_finish()
    return Replay(outcomes, steps)


def _step(
    cache: QuantizedCache, scheduler: Scheduler, requests: Sequence[Request]
) -> tuple[list[tuple[ServedRequest, int]], list[int]]:
    """Run one forward call; returns who got how many tokens stored, and the most likely next token of each."""
    admit = True
    while True:
        shares = scheduler.plan(admit=admit)
        ids = [_next_ids(r, requests[r.number].prompt, count) for r, count in shares]
        rows = [r.row for r, _ in shares if r.row is not None]
        try:
            tokens: list[int] = cache.append(ids, rows).argmax(-1).tolist()
        except PoolExhausted:
            # Outlier chunks, whose number no plan can know; the cache is as it was before the call.
            if len(scheduler.running) == 1:
                raise
            scheduler.preempt()
            admit = False  # its blocks would fit at once, and its chunks would not again
            continue
        for request, count in shares:
            request.stored += count
        return shares, tokens


def _next_ids(request: ServedRequest, prompt: Tensor, count: int) -> Tensor:
    """The next ``count`` tokens to store: of the prompt, then of what was generated (again, after a preemption)."""
    start, known = request.stored, len(prompt)
    if start >= known:  # decoding, the common case
        return prompt.new_tensor(request.generated[start - known : start - known + count])
    return torch.cat([prompt, prompt.new_tensor(request.generated)])[start : start + count]


def _outcome(request: ServedRequest, asked: Request, token_s: list[float]) -> Outcome:
    return Outcome(
        request.number,
        asked.arrival_s,
        request.generated,
        token_s,
        request.preemptions,
        request.recomputed_tokens,
    )
