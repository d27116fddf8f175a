"""Decoding steps that are laid out once and repeated: the tokens of eager decoding, from the same state every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interpreter import interpret
from kvquant.errors import ModelError, NonFiniteActivations
from kvquant.kernels import ERROR_KEY_NOT_FINITE
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.models.decode_graph import DecodeGraph, record_cuda_graph
from small_models import exact, prompts_of, quantized, small_model

STORED = pytest.mark.parametrize("stored", [exact, quantized])
# What waits for the device, or makes a tensor on the host to be copied: a graph can hold neither.
# In inference mode, in which the steps run, an item is seen as such and not as what it is made of.
FORBIDDEN = (
    *("item", "is_nonzero", "_local_scalar_dense", "equal", "allclose"),
    *("nonzero", "masked_select", "_unique2", "lift_fresh"),
)


class Watch(TorchDispatchMode):
    """Collects the forbidden operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in FORBIDDEN:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def repeated(work: Callable[[], None]) -> Callable[[], None]:
    """In place of a graph: recording runs nothing, and the work itself does it again."""
    return work


def outlier_counts(cache: QuantizedCache) -> list[Tensor]:
    """Key outliers of the blocks of each sequence, in order, and the spill chunks left."""
    pools = [pool for pool in cache.pools if pool.layout.chains_outliers]
    counts = [pool.tensors["key_outlier_count"][:, pool.blocks_of(r)] for pool in pools for r in cache.rows]
    return [*counts, *(pool.spill_top.clone() for pool in pools)]


def decoded(
    stored: Any,
    device: str,
    record: Any,
    *,
    backend: str = "auto",
    lengths: Sequence[int] = (33, 64, 70),
    steps: int = 5,
) -> tuple[Any, Any, Any]:
    """Tokens of eager steps, and of two repetitions of recorded ones, with what the pools count after each."""
    model = small_model("llama-gqa-llama3")
    quantizers = stored(model)  # calibrated where its text is
    model = model.to(device)
    with torch.inference_mode(), quantized_kv_cache(model, quantizers) as kv:
        cache = kv.new_cache(num_blocks=20, max_sequences=len(lengths), block_size=64, backend=backend)
        first = cache.append(prompts_of(list(lengths))).argmax(-1)
        eager, tokens = [], first
        for _ in range(steps):
            tokens = cache.append(list(tokens[:, None])).argmax(-1)
            eager.append(tokens)
        counts = outlier_counts(cache)
        cache.crop(-steps)
        graph = DecodeGraph(model, cache, first, steps, record=record)
        again = []
        for _ in range(2):
            graph()
            again.append((graph.tokens.clone(), outlier_counts(cache)))
        assert [cache.length(row) for row in cache.rows] == [n + steps for n in lengths]
        cache.reset()
        assert all(pool.blocks_in_use == 0 for pool in cache.pools)
    return torch.stack(eager, 1), counts, again


def check_repetitions(eager: Any, counts: Any, again: Any) -> None:
    for tokens, found in again:
        assert torch.equal(tokens, eager)
        assert len(found) == len(counts) and all(map(torch.equal, found, counts))


@STORED
def test_every_repetition_generates_what_eager_steps_do(stored) -> None:
    check_repetitions(*decoded(stored, "cpu", repeated))


def test_steps_that_would_fill_a_block_are_refused() -> None:
    model = small_model("llama-gqa-llama3")
    with quantized_kv_cache(model, exact(model)) as kv:
        cache = kv.new_cache(num_blocks=20, max_sequences=3, block_size=64)
        first = cache.append(prompts_of([60])).argmax(-1)
        with pytest.raises(ModelError, match=r"60 of its 64 slots are taken and 4 more.*decode_steps=3"):
            DecodeGraph(model, cache, first, 4, record=repeated)
        assert cache.length(cache.rows[0]) == 60


def test_an_error_of_a_repetition_meets_no_later_call() -> None:
    model = small_model("llama-gqa-llama3")
    with torch.inference_mode(), quantized_kv_cache(model, quantized(model)) as kv:
        cache = kv.new_cache(num_blocks=20, max_sequences=1, block_size=64)
        first = cache.append(prompts_of([9])).argmax(-1)

        def overflows(work: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                work()
                if is_broken:
                    cache.pools[0].error[0, 0] = ERROR_KEY_NOT_FINITE

            return run

        graph = DecodeGraph(model, cache, first, 2, record=overflows)
        is_broken = True
        with pytest.raises(NonFiniteActivations):
            graph()
        is_broken = False
        graph()
        cache.append([[1]])


def watched_steps(stored: Any) -> list[str]:
    """What recorded steps of the GPU's kernels do that a graph cannot hold; in the interpreter."""
    seen: list[str] = []

    def watching(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with Watch() as watch:
                work()
            seen.extend(watch.seen)

        return run

    # Short, because every program of a kernel runs in Python.
    check_repetitions(*decoded(stored, "cpu", watching, backend="triton", lengths=[3], steps=2))
    return seen


@torch.inference_mode()
def test_the_watch_sees_what_a_graph_cannot_hold() -> None:
    with Watch() as watch:
        x = torch.tensor([1, 2])
        x.sum().item()
        bool(x[0] > 0)
        x.unique()
    assert watch.seen == ["lift_fresh", "item", "is_nonzero", "_unique2"]


def test_steps_neither_wait_for_the_device_nor_copy_from_the_host() -> None:
    interpret(__file__)


@pytest.mark.gpu
@STORED
def test_a_graph_generates_what_eager_steps_do(stored) -> None:
    check_repetitions(*decoded(stored, "cuda", record_cuda_graph))


@pytest.mark.gpu
def test_work_that_waits_is_refused() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(ModelError, match="cuda_graph=false"):
        record_cuda_graph(lambda: print(x.sum().item()))


if __name__ == "__main__":
    for kind in (exact, quantized):
        found = watched_steps(kind)
        assert not found, f"{kind.__name__}: {found}"
