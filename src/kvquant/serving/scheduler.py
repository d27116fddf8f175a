"""Who is served next: first come, first served, admission by blocks, preemption of the newest.

Host arithmetic alone. The rules know block counts and lengths and nothing of what a block holds, so that a quantized
and an exact cache are served by the same ones.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from kvquant.errors import PoolExhausted


@dataclasses.dataclass(frozen=True)
class AdmissionRules:
    """What bounds a step, apart from memory.

    Attributes:
        max_sequences: sequences held at once.
        step_tokens: new tokens of one forward call, decoding sequences first; a prompt longer than what is left of
            them is prefilled in chunks.
        spare_fraction: share of the blocks that must stay free when a request is admitted beside others, so that
            those can grow for a while; admitted requests may use it.
    """

    max_sequences: int
    step_tokens: int
    spare_fraction: float


class SequenceStore(Protocol):
    """What the rules ask of a cache."""

    def open(self, num_sequences: int) -> list[int]:
        """Open empty sequences; returns their rows."""

    def free(self, row: int) -> None:
        """Close a sequence and give its blocks back."""

    def has_room(
        self, claims: Sequence[tuple[int | None, int]], *, in_steps: bool, spare_fraction: float
    ) -> bool:
        """Whether sequences (None: new ones) could take so many tokens each."""


@dataclasses.dataclass
class ServedRequest:
    """A request on its way through the loop.

    Attributes:
        number: of the request.
        prompt_tokens: tokens of its prompt.
        new_tokens: tokens it wants.
        row: its sequence in the cache; None: it waits.
        stored: tokens in the cache.
        generated: tokens so far.
        preemptions: how often it was sent back to wait.
        recomputed_tokens: stored tokens lost by that.
    """

    number: int
    prompt_tokens: int
    new_tokens: int
    row: int | None = None
    stored: int = 0
    generated: list[int] = dataclasses.field(default_factory=list)
    preemptions: int = 0
    recomputed_tokens: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are known and not stored: the rest of the prompt, or the last generated token."""
        return self.prompt_tokens + len(self.generated) - self.stored

    @property
    def most_stored(self) -> int:
        """Tokens in the cache when it finishes; the last generated one is never stored."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether all tokens it wanted are there."""
        return len(self.generated) == self.new_tokens


class Scheduler:
    """The queue and the running sequences.

    Args:
        store: the cache.
        rules: see :class:`AdmissionRules`.

    Attributes:
        waiting: in order of arrival, preempted ones first.
        running: in order of admission.
        memory_bound: whether the last plan left requests waiting for blocks, not for tokens of the call.
    """

    def __init__(self, store: SequenceStore, rules: AdmissionRules) -> None:
        self._store, self._rules = store, rules
        self.waiting: collections.deque[ServedRequest] = collections.deque()
        self.running: list[ServedRequest] = []
        self.memory_bound = False

    def check(self, request: ServedRequest) -> None:
        """Refuse a request that the empty cache could not take; such a one would block the queue for ever.

        Raises:
            PoolExhausted: as said.
        """
        if not self._fits([(None, request.most_stored)], in_steps=True, spare_fraction=0.0):
            raise PoolExhausted(
                f"the memory budget must hold the longest request, {request.prompt_tokens} + {request.new_tokens} tokens "
                "do not fit; raise task.memory_budget_gib or lower batch.max_fraction_of_context"
            )

    def plan(self, *, admit: bool = True) -> list[tuple[ServedRequest, int]]:
        """Preempt and (with ``admit``) admit, then say which running sequences get how many pending tokens next."""
        while not self._fits([(r.row, n) for r, n in self._share()]):
            self.preempt()
        self.memory_bound = False
        while (
            admit
            and self.waiting
            and len(self.running) < self._rules.max_sequences
            and self._tokens_left() > 0
        ):
            # All that is pending, not only what the next call takes: a prompt is admitted whole or not at all.
            claims = [(r.row, r.pending) for r in [*self.running, self.waiting[0]]]
            spare = self._rules.spare_fraction if self.running else 0.0
            if not self._fits(claims, in_steps=True, spare_fraction=spare):
                self.memory_bound = True
                break  # nobody overtakes
            request = self.waiting.popleft()
            (request.row,) = self._store.open(1)
            self.running.append(request)
        return self._share()

    def preempt(self) -> None:
        """Send the newest running sequence back to wait; its tokens are computed anew later."""
        assert len(self.running) > 1, "any request fits alone, see check()"
        request = self.running.pop()
        self._release(request)
        request.preemptions += 1
        request.recomputed_tokens += request.stored
        request.stored = 0
        self.waiting.appendleft(request)

    def finish(self, request: ServedRequest) -> None:
        """Give a finished request's blocks back at once."""
        self.running.remove(request)
        self._release(request)

    def _release(self, request: ServedRequest) -> None:
        assert request.row is not None, "only running requests hold a sequence"
        self._store.free(request.row)
        request.row = None

    def _share(self) -> list[tuple[ServedRequest, int]]:
        """Divide a call's tokens: one for every decoding sequence, then prompts in order of admission."""
        left, shares = self._rules.step_tokens, []
        for request in sorted(self.running, key=lambda r: r.pending > 1):  # stable
            count = min(request.pending, left)
            if count:
                shares.append((request, count))
                left -= count
        return shares

    def _tokens_left(self) -> int:
        return self._rules.step_tokens - sum(count for _, count in self._share())

    def _fits(
        self,
        claims: Sequence[tuple[int | None, int]],
        *,
        in_steps: bool = False,
        spare_fraction: float = 0.0,
    ) -> bool:
        return self._store.has_room(claims, in_steps=in_steps, spare_fraction=spare_fraction)
