"""Token sequences whose answer is known: passkeys and key-value look-ups in real text, repeated random tokens.

A perplexity hardly notices a lost key; these sequences do, so quantization has something sharp to break. All of it is
deterministic in a seed and needs no torch until a model is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvquant.errors import DataError

TokenIds = npt.NDArray[np.int64]

KEY_DIGITS = 5
_NAMES = [
    "Alice",
    "Arthur",
    "Beatrice",
    "Bernard",
    "Clara",
    "Daniel",
    "Edith",
    "Edward",
    "Eleanor",
    "Frank",
    "George",
    "Grace",
    "Harriet",
    "Harry",
    "Helen",
    "Henry",
    "Isabel",
    "James",
    "Jane",
    "John",
    "Julia",
    "Laura",
    "Louis",
    "Lucy",
    "Margaret",
    "Martin",
    "Mary",
    "Oliver",
    "Paul",
    "Peter",
    "Philip",
    "Robert",
    "Rose",
    "Ruth",
    "Sarah",
    "Simon",
    "Thomas",
    "Walter",
    "William",
]


@dataclass(frozen=True)
class Needle:
    """A fact to hide, the question that asks for it, and the tokens that answer it.

    fact, question, answer (TokenIds): token ids, [n]; `answer` follows `question` directly and occurs in `fact`.
    """

    fact: TokenIds
    question: TokenIds
    answer: TokenIds


class Needles:
    """Makes needles with a tokenizer whose pieces are encoded once.

    tokenizer: a `transformers` tokenizer, or anything whose `encode(text, add_special_tokens=False)` returns a list.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, TokenIds] = {}

    def passkey(self, rng: np.random.Generator) -> Needle:
        """The pass key task of Mohtashami and Jaggi (2023): one random number of `KEY_DIGITS` digits."""
        answer = self._digits(rng)
        fact = self._join("\nThe pass key is", answer, ". Remember it. ", answer, " is the pass key.\n")
        question = self._encode("\nWhat is the pass key? The pass key is")
        return Needle(fact, question, answer)

    def key_value(self, rng: np.random.Generator, count: int) -> list[Needle]:
        """`count` look-ups, each under another name, so that the question has to pick the right one.

        Raises DataError when there are not that many names.
        """
        if count > len(_NAMES):
            raise DataError(f"count must be at most {len(_NAMES)} (one name each), got {count}")
        needles = []
        for index in rng.choice(len(_NAMES), size=count, replace=False):
            name, answer = _NAMES[index], self._digits(rng)
            fact = self._join(f"\nThe number of {name} is", answer, ".\n")
            question = self._encode(f"\nWhat is the number of {name}? The number of {name} is")
            needles.append(Needle(fact, question, answer))
        return needles

    def _digits(self, rng: np.random.Generator) -> TokenIds:
        digits = "".join(str(digit) for digit in rng.integers(0, 10, KEY_DIGITS))
        return np.concatenate([self._encode(" "), *(self._encode(digit) for digit in digits)])

    def _join(self, *parts: str | TokenIds) -> TokenIds:
        return np.concatenate([self._encode(part) if isinstance(part, str) else part for part in parts])

    def _encode(self, text: str) -> TokenIds:
        if text not in self._cache:
            self._cache[text] = np.asarray(
                self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64
            )
        return self._cache[text]


def passkey_prompts(
    tokenizer: Any, filler: TokenIds, length: int, count: int, seed: int = 0
) -> Iterator[tuple[TokenIds, TokenIds]]:
    """Yield (prompt, answer): `length` tokens in all, a pass key hidden at an even spread of depths in real text.

    filler (TokenIds): tokens of real text to cut windows from, [n] with n >= length.
    length (int): tokens of prompt and answer together. count (int): how many. The same arguments give the same prompts.
    Raises DataError when the length cannot hold the fact and the question, or the filler is too short.
    """
    needles = Needles(tokenizer)
    rng = np.random.default_rng([seed, length, count])
    for index in range(count):
        needle = needles.passkey(rng)
        room = length - len(needle.fact) - len(needle.question) - len(needle.answer)
        if room < 0:
            raise DataError(
                f"passkey length must be at least {length - room} tokens, got {length}; try {length - room}"
            )
        if len(filler) < room:
            raise DataError(f"filler must hold at least {room} tokens, got {len(filler)}; give a longer text")
        start = int(rng.integers(0, len(filler) - room + 1))
        text = filler[start : start + room]
        # Stratified depths: every trial count covers the whole context, not the luck of a draw.
        depth = int((index + rng.random()) / count * room)
        yield np.concatenate([text[:depth], needle.fact, text[depth:], needle.question]), needle.answer


def key_value_prompts(
    tokenizer: Any, filler: TokenIds, length: int, count: int, seed: int = 0, pairs: int = 4
) -> Iterator[tuple[TokenIds, TokenIds]]:
    """Yield (prompt, answer) as `passkey_prompts` does, with `pairs` facts hidden and one of them asked for.

    Raises DataError when the length cannot hold the facts and the question, or the filler is too short.
    """
    needles = Needles(tokenizer)
    rng = np.random.default_rng([seed, length, count, pairs])
    for _ in range(count):
        facts = needles.key_value(rng, pairs)
        asked = facts[int(rng.integers(pairs))]
        room = length - sum(len(needle.fact) for needle in facts) - len(asked.question) - len(asked.answer)
        if room < 0:
            raise DataError(
                f"key-value length must be at least {length - room} tokens for {pairs} pairs, got {length}"
            )
        if len(filler) < room:
            raise DataError(f"filler must hold at least {room} tokens, got {len(filler)}; give a longer text")
        start = int(rng.integers(0, len(filler) - room + 1))
        cuts = np.sort(rng.integers(0, room + 1, pairs))
        pieces: list[TokenIds] = []
        for text, needle in zip(np.split(filler[start : start + room], cuts), facts, strict=False):
            pieces += [text, needle.fact]
        pieces.append(filler[start + (int(cuts[-1]) if pairs else 0) : start + room])
        yield np.concatenate([*pieces, asked.question]), asked.answer


def repeated_tokens(rng: np.random.Generator, pool: npt.NDArray[Any], length: int) -> tuple[TokenIds, int]:
    """Tokens without order, repeated until `length` are full, [length], and their period (a third to half of it).

    pool (integer array): tokens are drawn from it one by one, [n]. A stream of real text gives them the frequencies of
        text: the embeddings of rare tokens mean nothing early in training, and nothing is learned from copying them.
    """
    period = int(rng.integers(max(2, length // 3), max(3, length // 2 + 1)))
    return np.resize(rng.choice(pool, period), length).astype(np.int64), period


def passkey_accuracy(
    model: Any,
    tokenizer: Any,
    filler: TokenIds,
    lengths: Sequence[int],
    trials: int = 24,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, float]:
    """Share of pass keys that greedy decoding would reproduce exactly, by length in tokens, in [0, 1].

    One forward pass over prompt and answer per batch: greedy decoding emits the answer exactly when every one of its
    tokens is the most likely one after the true ones before it. Prompts of one length need no padding.

    model: a causal language model of transformers. filler (TokenIds): real text, [n].
    """
    import torch

    accuracy: dict[int, float] = {}
    for length in lengths:
        pairs = list(passkey_prompts(tokenizer, filler, length, trials, seed))
        hits = 0
        for first in range(0, trials, batch_size):
            chunk = pairs[first : first + batch_size]
            input_ids = torch.from_numpy(np.stack([np.concatenate(pair) for pair in chunk])).to(model.device)
            answer_length = len(chunk[0][1])
            with torch.inference_mode():
                logits = model(
                    input_ids=input_ids, use_cache=False, logits_to_keep=answer_length + 1
                ).logits  # [B, answer + 1, vocabulary]
            predicted = logits[:, :-1].argmax(-1)
            hits += int((predicted == input_ids[:, -answer_length:]).all(1).sum())
        accuracy[length] = hits / trials
    return accuracy
