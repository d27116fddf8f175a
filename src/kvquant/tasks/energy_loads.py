"""What is repeated inside an energy window: a prefill, some decoding steps, or a known matrix product."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.tasks.setup import Workbench

PREFILL, DECODE = "prefill", "decode"


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell of the sweep: B sequences of so many prompt tokens."""

    phase: str
    batch: int
    prompt_tokens: int

    def tokens(self, decode_steps: int) -> int:
        """Tokens one repetition processes: prompt tokens, or generated ones."""
        return self.batch * (self.prompt_tokens if self.phase == PREFILL else decode_steps)


def uniform_prompts(stream: Tensor, batch: int, length: int) -> list[Tensor]:
    """Prompts of one length, cut from a stream that starts anew where it ends; energy does not depend on meaning."""
    needed = batch * length
    repeats = -(-needed // len(stream))
    return list(stream.repeat(repeats)[:needed].split(length))


@contextlib.contextmanager
def model_load(
    bench: Workbench, calibration: Calibration, point: Point, prompts: list[Tensor], decode_steps: int
) -> Iterator[Callable[[], None]]:
    """Yield one repetition of the point's work, everything around it done: cache allocated, kernels compiled.

    A prefill fills an emptied cache. Decoding starts from a filled one, whose new tokens are dropped afterwards, so
    that every repetition sees the same lengths.

    Raises:
        PoolExhausted: the caches do not fit the memory.
    """
    with quantized_kv_cache(bench.model, calibration) as kv:
        settings = bench.cache_settings()
        if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
            per_sequence = -(-(point.prompt_tokens + decode_steps) // settings["block_size"])
            settings["num_blocks"] = point.batch * per_sequence
        cache: QuantizedCache = kv.new_cache(max_sequences=point.batch, **settings)
        # Ids go to the device once: moving them is no part of the work.
        device = next(bench.model.parameters()).device
        ids = [prompt.to(device) for prompt in prompts]

        def prefill() -> None:
            cache.reset()
            cache.append(ids)

        def decode() -> None:
            tokens = first
            for _ in range(decode_steps):
                tokens = cache.append(list(tokens[:, None])).argmax(-1)
            cache.crop(-decode_steps)

        if point.phase == PREFILL:
            prefill()
            yield prefill
        else:
            first = cache.append(ids).argmax(-1)
            decode()
            yield decode


def matrix_load(device: torch.device, size: int) -> Callable[[], None]:
    """One product of two square matrices, bf16 on a GPU and fp32 elsewhere: work whose repetitions are all alike."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)
    # Random numbers, because zeros draw less power.
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return multiply


def is_too_large(error: Exception) -> bool:
    """Whether a point failed because its cache, or the model's work on it, does not fit the memory."""
    return type(error).__name__ in ("PoolExhausted", "OutOfMemoryError")


def release(device: Any) -> None:
    """Give freed memory back, so that the next point starts from the same state."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
