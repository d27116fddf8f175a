"""Training batches for the small model: real text with retrieval mixed in, short copies first.

Batch number `step` depends on (seed, step, stage) alone, so a resumed run sees what an uninterrupted one would have seen
and a checkpoint need not store a position in the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvquant.data.synthetic import Needle, Needles, TokenIds, repeated_tokens

Tokens = npt.NDArray[np.uint16]
Kinds = npt.NDArray[np.int8]

# What a predicted token is; a trainer gives each kind its weight.
UNKNOWABLE, TEXT, COPY, ANSWER = range(4)
KIND_NAMES = ("unknowable", "text", "copy", "answer")


class Stage(Protocol):
    """One part of a curriculum: up to which share of the run it lasts, and what its sequences hold."""

    until: float
    length: int
    batch_tokens: int
    copy_share: float
    retrieval_share: float


@dataclass(frozen=True)
class Batch:
    """Training sequences and what every predicted token is.

    input_ids (int64): [B, T + 1]; position t predicts t + 1.
    kinds (int8): [B, T]; kind of input_ids[:, t + 1], an index into `KIND_NAMES`.
    """

    input_ids: TokenIds
    kinds: Kinds


class Curriculum:
    """Builds the batch of any step.

    tokenizer: see `Needles`.
    sources (Sequence[Tokens]): token streams of real text, uint16, [n] each. shares: how often each is drawn from.
    """

    def __init__(
        self,
        tokenizer: Any,
        sources: Sequence[Tokens],
        shares: Sequence[float],
        seed: int,
    ) -> None:
        self._needles = Needles(tokenizer)
        self._sources = sources
        self._shares = np.asarray(shares, dtype=np.float64) / sum(shares)
        self._seed = seed

    def batch(self, step: int, stage: Stage) -> Batch:
        """The batch of `step`: about `stage.batch_tokens` tokens in sequences of `stage.length`."""
        rng = np.random.default_rng([self._seed, step])
        rows = max(1, round(stage.batch_tokens / stage.length))
        input_ids = np.empty((rows, stage.length + 1), dtype=np.int64)
        kinds = np.full((rows, stage.length + 1), TEXT, dtype=np.int8)
        # Stratified with one offset, so that few long rows still hold their share of each kind over the steps.
        offset = rng.random()
        for row in range(rows):
            share = (row + offset) / rows
            if share < stage.copy_share:
                self._copies(rng, input_ids[row], kinds[row])
            elif share < stage.copy_share + stage.retrieval_share:
                self._retrieval(rng, input_ids[row], kinds[row])
            else:
                input_ids[row] = self._text(rng, stage.length + 1)
        return Batch(input_ids, kinds[:, 1:])

    def _source(self, rng: np.random.Generator) -> Tokens:
        return self._sources[int(rng.choice(len(self._sources), p=self._shares))]

    def _text(self, rng: np.random.Generator, length: int) -> TokenIds:
        source = self._source(rng)
        start = int(rng.integers(0, len(source) - length + 1))
        return source[start : start + length].astype(np.int64)

    def _copies(self, rng: np.random.Generator, ids: TokenIds, kinds: Kinds) -> None:
        """Shuffled tokens repeated; or, always in long rows, a shuffled run that comes back after real text, at any distance."""
        T = len(ids)
        if T <= 300 and rng.random() < 0.7:
            ids[:], period = repeated_tokens(rng, self._source(rng), T)
            kinds[: period + 1] = UNKNOWABLE  # the first token of a repeat cannot be told from more noise
            kinds[period + 1 :] = COPY
            return
        ids[:] = self._text(rng, T)
        run = int(rng.integers(min(16, T // 4), min(128, T // 4) + 1))
        # Uniform in distance first: two uniform positions would make long distances rare.
        distance = int(rng.integers(run, T - run + 1))
        first = int(rng.integers(0, T - run - distance + 1))
        second = first + distance
        tokens = rng.choice(self._source(rng), run)
        ids[first : first + run] = ids[second : second + run] = tokens
        kinds[first : first + run] = UNKNOWABLE
        kinds[second : second + run] = COPY
        kinds[second] = UNKNOWABLE

    def _retrieval(self, rng: np.random.Generator, ids: TokenIds, kinds: Kinds) -> None:
        """Facts early, their questions later, real text around them; the digits first met are unknowable."""
        T = len(ids)
        if rng.random() < 0.6:
            needles = [self._needles.passkey(rng)]
        else:
            needles = self._needles.key_value(rng, int(rng.integers(1, max(1, min(6, T // 90)) + 1)))
        while needles and sum(map(_cost, needles)) > T:
            needles.pop()
        text = self._text(rng, T - sum(map(_cost, needles)))
        position = used = 0
        for depth, needle, asks in _arranged(rng, needles, len(text)):
            take = depth - used
            ids[position : position + take] = text[used:depth]
            position, used = position + take, depth
            tokens = np.concatenate([needle.question, needle.answer]) if asks else needle.fact
            end = position + len(tokens)
            ids[position:end] = tokens
            if asks:
                kinds[end - len(needle.answer) : end] = ANSWER
            else:
                kinds[position:end] = UNKNOWABLE
            position = end
        ids[position:] = text[used:]


def _cost(needle: Needle) -> int:
    return len(needle.fact) + len(needle.question) + len(needle.answer)


def _arranged(rng: np.random.Generator, needles: list[Needle], room: int) -> list[tuple[int, Needle, bool]]:
    """(depth in the text, needle, asks?) by depth, every fact before its question."""
    pieces = []
    for needle in needles:
        distance = int(rng.integers(0, room + 1))
        start = int(rng.integers(0, room - distance + 1))
        pieces += [(start, needle, False), (start + distance, needle, True)]
    return sorted(pieces, key=lambda piece: (piece[0], piece[2]))
