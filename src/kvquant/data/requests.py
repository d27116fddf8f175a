"""Requests to serve: when they arrive, how long their prompts are, how many tokens they want."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kvquant.data.prompts import read_trace
from kvquant.errors import DataError


@dataclasses.dataclass(frozen=True)
class RequestShape:
    """One request of a trace, its lengths scaled to a model's context.

    Attributes:
        arrival_s: seconds after the first request.
        prompt_tokens: tokens of its prompt, at least 1.
        new_tokens: tokens to generate, at least 1.
    """

    arrival_s: float
    prompt_tokens: int
    new_tokens: int


def request_shapes(batch: Any, task: Any, context: int, seed: int) -> list[RequestShape]:
    """The requests of a run.

    Lengths are scaled so that the longest request (of the whole trace, not of the part that is replayed) takes
    ``batch.max_fraction_of_context`` of the context.

    Args:
        batch: the batch group of the configuration; its kind says where lengths come from.
        task: the settings of ``ServeTraceTask``.
        context: tokens the model can take.
        seed: draws what is drawn.

    Raises:
        DataError: the trace cannot be read or is too short, or a request does not fit the context.
    """
    count, draw = task.num_requests, np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(task.mean_gap_s, count))
    if batch.kind in ("single", "uniform"):
        tokens = np.tile([int(batch.prompt_tokens), max(1, int(batch.decode_tokens))], (count, 1))
    else:
        if batch.kind == "trace":
            whole = read_trace(batch.trace_path)
            if len(whole) < count:
                raise DataError(
                    f"the trace must hold task.num_requests={count} requests, {batch.trace_path} holds {len(whole)}; "
                    f"try task.num_requests={len(whole)}"
                )
            tokens, longest = whole[:count], whole.sum(1).max()
            arrivals = _arrivals(batch.trace_path, count)
        else:
            # Drawn independently: the public quantiles do not say how both hang together.
            levels, ends = (
                list(batch.quantile_levels),
                (list(batch.trace_quantiles), list(task.generated_quantiles)),
            )
            if len(levels) != len(ends[1]):
                raise DataError(
                    f"task.generated_quantiles must be as many as batch.quantile_levels ({len(levels)}), got "
                    f"{len(ends[1])}; give one for each level"
                )
            tokens = np.stack([np.interp(draw.random(count), levels, end) for end in ends], 1)
            longest = sum(end[-1] for end in ends)
        tokens = tokens * (batch.max_fraction_of_context * context / longest)
    shapes = [
        RequestShape(float(at) * task.time_scale, max(1, int(prompt)), max(1, int(new)))
        for at, (prompt, new) in zip(arrivals - arrivals[0], tokens, strict=True)
    ]
    most = max(shape.prompt_tokens + shape.new_tokens for shape in shapes)
    if most > context:
        raise DataError(
            f"prompt and generated tokens must fit the model's context of {context}, got {most}; lower "
            "batch.prompt_tokens, batch.decode_tokens or batch.max_fraction_of_context"
        )
    return shapes


def _arrivals(path: str | Path, count: int) -> np.ndarray:
    """Seconds of the first ``count`` requests of a trace, float64 [count]."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            stamps = np.array([next(rows)["TIMESTAMP"] for _ in range(count)], dtype="datetime64[ns]")
        except (KeyError, ValueError) as error:
            raise DataError(
                f"batch.trace_path must have a column TIMESTAMP of dates and times, {path} has not ({error})"
            ) from error
    return stamps.astype(np.int64) / 1e9
