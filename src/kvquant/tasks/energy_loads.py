"""What is repeated inside an energy window: a prefill, some decoding steps, or a known matrix product."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvquant.calibration import Calibration
from kvquant.energy.fleet import PREFILL
from kvquant.errors import PoolExhausted
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.models.decode_graph import DecodeGraph
from kvquant.tasks.setup import Workbench

# What a point raises whose cache, or the model's work on it, does not fit the memory.
TOO_LARGE = (PoolExhausted, torch.OutOfMemoryError)
# Prompts to decode from are stored in calls of about so many tokens: what a call needs beside the cache grows with it.
FILL_TOKENS = 65_536


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


class ModelLoad:
    """One point's work for one method, everything around it done: cache allocated and, for decoding, filled.

    A prefill fills an emptied cache. Decoding starts from a filled one, whose new tokens are dropped afterwards, so
    that every repetition sees the same lengths. It can be kept and used for several windows.

    Args:
        bench: the loaded model.
        calibration: of the method.
        point: batch, length and phase.
        prompts: one per sequence.
        decode_steps: tokens per sequence in one repetition of decoding.
        cuda_graph: whether decoding is captured once and replayed, see :class:`DecodeGraph`.

    Raises:
        PoolExhausted: the cache does not fit the memory.
    """

    def __init__(
        self,
        bench: Workbench,
        calibration: Calibration,
        point: Point,
        prompts: list[Tensor],
        decode_steps: int,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self._model, self._calibration, self._steps = bench.model, calibration, decode_steps
        # Ids go to the device once: moving them is no part of the work.
        device = next(bench.model.parameters()).device
        self._ids = [prompt.to(device) for prompt in prompts]
        with quantized_kv_cache(bench.model, calibration) as kv:
            settings = bench.cache_settings()
            if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
                per_sequence = -(-(point.prompt_tokens + decode_steps) // settings["block_size"])
                settings["num_blocks"] = point.batch * per_sequence
            self._cache: QuantizedCache = kv.new_cache(max_sequences=point.batch, **settings)
            at_once = point.batch
            if point.phase != PREFILL:
                at_once = max(1, FILL_TOKENS // point.prompt_tokens)
            self._first = self._fill(at_once)
        self._repetition = self._prefill if point.phase == PREFILL else self._decode
        self._capture = cuda_graph and point.phase != PREFILL

    def _fill(self, at_once: int) -> Tensor:
        """Store the prompts, so many in a call; returns the token that follows each, int64 [B]."""
        rows = self._cache.open(len(self._ids))
        pieces = range(0, len(rows), at_once)
        logits = (self._cache.append(self._ids[i : i + at_once], rows[i : i + at_once]) for i in pieces)
        return torch.cat([of_piece.argmax(-1) for of_piece in logits])

    def _prefill(self) -> None:
        self._cache.reset()
        self._cache.append(self._ids)

    def _decode(self) -> None:
        tokens = self._first
        for _ in range(self._steps):
            tokens = self._cache.append(list(tokens[:, None])).argmax(-1)
        self._cache.crop(-self._steps)

    @contextlib.contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """Yield one repetition of the work, kernels compiled and device warm, the model hooked meanwhile."""
        with quantized_kv_cache(self._model, self._calibration):
            self._repetition()
            if self._capture:
                self._repetition = DecodeGraph(self._model, self._cache, self._first, self._steps)
                self._capture = False
                self._repetition()
            yield self._repetition


class LoadShelf:
    """Loads of one point, one per method, kept from window to window as long as all fit the memory.

    Filling a cache of a large batch takes as long as a prefill: once per method instead of once per window.

    Args:
        make: makes one method's load.
        device: whose memory they take.
    """

    def __init__(self, make: Callable[[str], ModelLoad], device: torch.device) -> None:
        self._make, self._device = make, device
        self._loads: dict[str, ModelLoad] = {}
        self._keep = True

    @contextlib.contextmanager
    def ready(self, name: str) -> Iterator[Callable[[], None]]:
        """Yield one repetition of a method's work, see :meth:`ModelLoad.ready`.

        Raises:
            PoolExhausted, torch.OutOfMemoryError: it does not fit the memory, not even alone.
        """
        with contextlib.ExitStack() as stack:
            work = None
            try:
                work = self._enter(stack, name)
            except TOO_LARGE:
                if not self._loads.keys() - {name}:
                    raise
            # Outside of the handler, whose traceback would keep the failed attempt's tensors alive.
            if work is None:
                self._keep = False
                self.clear()
                work = self._enter(stack, name)
            yield work
        if not self._keep:
            self.clear()

    def _enter(self, stack: contextlib.ExitStack, name: str) -> Callable[[], None]:
        if name not in self._loads:
            self._loads[name] = self._make(name)
        return stack.enter_context(self._loads[name].ready())

    def clear(self) -> None:
        """Give all memory back, so that what comes next starts from the same state."""
        self._loads.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


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
