"""Greedy decoding as one CUDA graph: the host lays every step out once, the device then repeats them at its own pace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant.errors import ModelError
from kvquant.models.cache import QuantizedCache

Record = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on the device, and returns what does it again."""


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], object]:
    """Capture ``work`` in a CUDA graph.

    Raises:
        ModelError: it waits for the device or copies from the host, which a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"decoding must neither wait for the device nor copy from the host to be captured, got {error}; try "
            "task.cuda_graph=false"
        ) from error
    return graph.replay


class DecodeGraph:
    """A run of greedy decoding steps that can be repeated from the same stored tokens, again and again.

    Eager steps of a small model or batch take as long as Python needs to launch them. A repetition takes what the
    device needs: reserving blocks is done once, and the error word is read once per repetition.

    The cache's sequences are ``steps`` tokens longer from then on; nothing else may use it before its ``reset``.

    Args:
        model: whose attention the cache replaces now; it must have decoded with the cache before, so that kernels are
            compiled.
        cache: its open sequences are the batch, B.
        first: the token that each is continued with, int64 [B].
        steps: tokens to generate per sequence.
        record: what captures the steps.

    Attributes:
        tokens: those of the last repetition, int64 [B, steps].

    Raises:
        ModelError: a block would be full before the last step, or the model's steps cannot be captured.
        PoolExhausted: no room for the steps.
    """

    tokens: Tensor

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        cache: QuantizedCache,
        first: Tensor,
        steps: int,
        *,
        record: Record = record_cuda_graph,
    ) -> None:
        block_size = cache.pools[0].layout.block_size
        longest = max(cache.length(row) % block_size for row in cache.rows)
        # A block that is full is put in order by the host, between two steps.
        if longest + steps >= block_size:
            raise ModelError(
                f"captured steps must leave the last block open: {longest} of its {block_size} slots are taken and "
                f"{steps} more asked for; try task.decode_steps={max(1, block_size - longest - 1)} or "
                "task.cuda_graph=false"
            )
        self._model, self._cache = model, cache
        self._first = first.clone()
        calls = []
        for _ in range(steps):
            calls.append(cache.lay_out([1] * len(cache.rows)))
            cache.finish()
        self._calls = calls
        # What a step adds to instead of overwriting it. Recording runs nothing: this is the state before the first.
        changing = [pool.spill_top for pool in cache.pools]
        changing += [p.tensors["key_outlier_count"] for p in cache.pools if p.layout.chains_outliers]
        self._before = [(tensor, tensor.clone()) for tensor in changing]
        self._replay = record(self._steps)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Generate the tokens anew, and wait for them.

        Raises:
            NonFiniteActivations: NaN, infinity or overflow in a key or value.
            PoolExhausted: outlier chunks ran out.
        """
        for tensor, before in self._before:
            tensor.copy_(before)
        try:
            self._replay()
            for pool in self._cache.pools:
                pool.check()
        except BaseException:
            # Nothing is pending that it could be rolled back with: the word must not meet a later call.
            for pool in self._cache.pools:
                pool.error.zero_()
            raise

    def _steps(self) -> None:
        chosen = [self._first]
        for call in self._calls:
            with self._cache.laid_out(call):
                out = self._model(
                    input_ids=chosen[-1][None],
                    position_ids=call.positions[None],
                    past_key_values=self._cache,
                    use_cache=True,
                    # Of every token, each being its sequence's last: a list of places would be copied from the host.
                    logits_to_keep=0,
                )
            chosen.append(out.logits[0].argmax(-1))
        self.tokens = torch.stack(chosen[1:], 1)
