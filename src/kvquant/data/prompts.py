"""From documents to token streams, and from a batch's description to prompts of given lengths."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvquant.data.corpus import Document
from kvquant.errors import DataError

BATCH_KINDS = ("single", "uniform", "ragged", "trace")


def token_stream(tokenizer: Any, documents: Sequence[Document], max_tokens: int | None = None) -> Tensor:
    """Tokenize documents one after the other until enough tokens are there.

    Args:
        tokenizer: a transformers tokenizer.
        documents: in their fixed order.
        max_tokens: where to stop; None: take everything.

    Returns:
        int64 [at most max_tokens].

    Raises:
        DataError: there is no text at all.
    """
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer.encode(document.text, add_special_tokens=False, verbose=False))
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if not ids:
        raise DataError("the text must hold at least 1 token, got none; choose another data.path")
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def calibration_stream(
    tokenizer: Any, documents: Sequence[Document], max_tokens: int, length: int, seed: int = 0
) -> Tensor:
    """Cut sequences of ``length`` tokens from documents spread evenly over the corpus.

    One sequence per document before any gives a second: thresholds fitted on a few long files let a third more keys
    of other files fall outside (1.6% instead of 1.2% at a nominal 1%, measured on the standard library).

    Args:
        tokenizer: a transformers tokenizer.
        documents: in their fixed order.
        max_tokens: tokens to collect, rounded down to whole sequences.
        length: tokens per sequence.
        seed: another one draws other documents and other places in them; 0 keeps the fixed order.

    Returns:
        int64, the sequences one after the other; shorter than asked for if the text is.

    Raises:
        DataError: no document is as long as one sequence, nor are all of them together.
    """
    wanted = max(1, max_tokens // length)
    if seed:
        rng = np.random.default_rng(seed)
        documents = [documents[i] for i in rng.permutation(len(documents))]
    step = max(1.0, len(documents) / wanted)
    chosen = [documents[int(i * step)] for i in range(min(wanted, len(documents)))]
    encoded = [
        torch.tensor(tokenizer.encode(d.text, add_special_tokens=False, verbose=False)) for d in chosen
    ]
    if seed:
        # A start of its own in each, as long as a sequence still fits behind it.
        encoded = [ids[int(rng.integers(0, max(1, len(ids) - length))) :] for ids in encoded]
    sequences: list[Tensor] = []
    for turn in range(wanted):
        pieces = [ids[turn * length : (turn + 1) * length] for ids in encoded]
        pieces = [piece for piece in pieces if len(piece) == length]
        sequences += pieces
        if len(sequences) >= wanted or not pieces:
            break
    if not sequences:
        joined = torch.cat(encoded)[:length]
        if len(joined) < length:
            raise DataError(
                f"the calibration text must hold a sequence of {length} tokens, got {len(joined)} in all; "
                "lower calibration.sequence_length or choose a longer data.path"
            )
        sequences = [joined]
    return torch.cat(sequences[:wanted]).to(torch.int64)


def prompt_lengths(batch: Any, context: int, seed: int) -> list[int]:
    """Lengths in tokens of a batch of prompts.

    Args:
        batch: the batch group of the configuration.
        context: tokens the model can take.
        seed: draws the requests of ``kind=trace``.

    Raises:
        DataError: prompts and decoded tokens do not fit the context, or the trace cannot be read.
    """
    if batch.kind in ("single", "uniform"):
        lengths = [int(batch.prompt_tokens)] * batch.num_prompts
    else:
        longest = int(batch.max_fraction_of_context * context)
        if batch.kind == "ragged":
            # The middles of num_prompts equal parts of the distribution: the same spread for any number.
            levels = (np.arange(batch.num_prompts) + 0.5) / batch.num_prompts
            drawn = np.interp(levels, list(batch.quantile_levels), list(batch.trace_quantiles))
            scale = longest / max(batch.trace_quantiles)
        else:
            requests = read_trace(batch.trace_path)[:, 0]
            drawn = np.random.default_rng(seed).choice(requests, size=batch.num_prompts)
            scale = longest / requests.max()
        lengths = [max(1, round(float(x) * scale)) for x in drawn]
    if max(lengths) + batch.decode_tokens > context:
        raise DataError(
            f"prompt and decoded tokens must fit the model's context of {context}, got {max(lengths)} + "
            f"{batch.decode_tokens}; lower batch.prompt_tokens, batch.max_fraction_of_context or batch.decode_tokens"
        )
    return lengths


def read_trace(path: str | Path) -> np.ndarray:
    """Read a request trace: a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Returns:
        int64 [requests, 2], context and generated tokens, in the file's order.

    Raises:
        DataError: the file is missing or is no such trace.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"batch.trace_path must be a CSV with ContextTokens and GeneratedTokens, {path} is not ({error})"
        ) from error
    if not rows:
        raise DataError(f"batch.trace_path must hold at least 1 request, {path} holds none")
    return np.asarray(rows, dtype=np.int64)


def cut_prompts(stream: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Cut consecutive prompts of the given lengths from a stream.

    Raises:
        DataError: the stream is too short.
    """
    if len(stream) < sum(lengths):
        raise DataError(
            f"the held-out text must hold {sum(lengths)} tokens for these prompts, got {len(stream)}; "
            "lower batch.num_prompts or choose a longer data.path"
        )
    return list(stream[: sum(lengths)].split(list(lengths)))
