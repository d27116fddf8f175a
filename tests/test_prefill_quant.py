"""What a query sees: dequantized keys and values, or a call's own exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import Rope
from kvquant.prefill_quant import PrefillQuantizedAttention, blocks_per_tile
from kvquant.ragged import cumulative_lengths
from kvquant.spec import QuantSpec

H, G, D, BLOCK = 2, 3, 64, 32
LENGTHS = [1, 40, 70]
CHUNKS = {"of 1": [1] * 90, "of 7": [7] * 13, "of 64": [64, 64], "mixed": [1, 13, 40, 2, 1, 43]}


@pytest.fixture(scope="module")
def quantizer() -> BatchedKVQuantizer:
    sample = draw(512, 9, H)
    return BatchedKVQuantizer.calibrate(QuantSpec(bits=2, sink_tokens=2), sample, sample.flip(0))


def draw(tokens: int, seed: int, heads: int) -> Tensor:
    return torch.randn(tokens, heads, D, generator=torch.Generator().manual_seed(seed))


def pool_for(quantizer: BatchedKVQuantizer) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(BlockLayout(quantizer.spec, 1, H, D, torch.float32, BLOCK), 16, max_sequences=3)
    return pool, [pool.add_sequence() for _ in LENGTHS]


def attention(quantizer: BatchedKVQuantizer, reads: str, **settings: float) -> PrefillQuantizedAttention:
    return PrefillQuantizedAttention(quantizer, BLOCK, D**-0.5, prefill_reads=reads, **settings)


def softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention of the last queries of one sequence, grouped heads, in fp64."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, keys, values))
    k, v = k.repeat_interleave(G, 0), v.repeat_interleave(G, 0)
    scores = q @ k.transpose(1, 2) * D**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    past = k.shape[1] - q.shape[1]
    back = torch.arange(q.shape[1])[:, None] + past - torch.arange(k.shape[1])
    hidden = (back < 0) | (back >= (window or k.shape[1]))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def sequences(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x.split(lengths))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("reads", ["quantized", "exact"])
def test_prefill_then_decode(quantizer: BatchedKVQuantizer, reads: str) -> None:
    T = sum(LENGTHS)
    query, keys, values = draw(T, 1, H * G), draw(T, 2, H), draw(T, 3, H)
    offsets = torch.tensor(cumulative_lengths(LENGTHS))
    stored = quantizer.dequantize(quantizer.quantize(keys, values, offsets, block_size=BLOCK))
    pool, rows = pool_for(quantizer)
    out = attention(quantizer, reads)(query, keys, values, pool.layers[0], pool.reserve(rows, LENGTHS), None)
    pool.commit()
    seen = stored if reads == "quantized" else (keys, values)
    parts = zip(*(sequences(x, LENGTHS) for x in (out, query, *seen)), strict=True)
    for actual, q, k, v in parts:
        assert_same(actual, softmax_attention(q, k, v))

    # One more token each: a decode reads its own token, and everything before it, quantized in both modes.
    query, new_keys, new_values = draw(3, 4, H * G), draw(3, 5, H), draw(3, 6, H)
    out = attention(quantizer, reads)(
        query, new_keys, new_values, pool.layers[0], pool.reserve(rows, [1] * 3), None
    )
    pool.commit()
    longer = [n + 1 for n in LENGTHS]

    def appended(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat(
            [torch.cat(pair) for pair in zip(sequences(old, LENGTHS), new.split(1), strict=True)]
        )

    offsets = torch.tensor(cumulative_lengths(longer))
    stored = quantizer.dequantize(
        quantizer.quantize(appended(keys, new_keys), appended(values, new_values), offsets, block_size=BLOCK)
    )
    for index, (k, v) in enumerate(zip(*(sequences(x, longer) for x in stored), strict=True)):
        assert_same(out[index : index + 1], softmax_attention(query[index : index + 1], k, v))


def test_a_chunk_reads_its_own_tokens_exactly_and_earlier_ones_quantized(
    quantizer: BatchedKVQuantizer,
) -> None:
    query, keys, values = draw(100, 1, H * G), draw(100, 2, H), draw(100, 3, H)
    pool, rows = pool_for(quantizer)
    attend = attention(quantizer, "exact")
    for part in (slice(0, 60), slice(60, 100)):
        step = pool.reserve(rows[:1], [part.stop - part.start])
        out = attend(query[part], keys[part], values[part], pool.layers[0], step, None)
        pool.commit()
    stored = quantizer.dequantize(quantizer.quantize(keys, values, torch.tensor([0, 100]), block_size=BLOCK))
    k, v = (torch.cat([old[:60], new[60:]]) for old, new in zip(stored, (keys, values), strict=True))
    assert_same(out, softmax_attention(query[60:], k, v))


@pytest.mark.parametrize("window", [None, 24], ids=["sees all", "window"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunks_equal_the_whole(quantizer: BatchedKVQuantizer, chunks: list[int], window: int | None) -> None:
    T = sum(chunks)
    query, keys, values = draw(T, 1, H * G), draw(T, 2, H), draw(T, 3, H)
    pool, rows = pool_for(quantizer)
    attend, out = attention(quantizer, "quantized", window=window), []
    for part in torch.arange(T).split(chunks):
        step = pool.reserve(rows[:1], [len(part)])
        out.append(attend(query[part], keys[part], values[part], pool.layers[0], step, None))
        pool.commit()
    stored = quantizer.dequantize(quantizer.quantize(keys, values, torch.tensor([0, T]), block_size=BLOCK))
    assert_same(torch.cat(out), softmax_attention(query, *stored, window))


@pytest.mark.parametrize("backend", ["pytorch_fused", "reference"])
def test_one_sequence_decodes_while_another_prefills(quantizer: BatchedKVQuantizer, backend: str) -> None:
    """prefill_reads=exact holds for the prompt alone: the decoding sequence reads its own token as stored."""
    lengths = [1, 40]
    pool, rows = pool_for(quantizer)
    history = draw(33, 7, H), draw(33, 8, H)
    quantizer.write(*history, pool.layers[0], pool.reserve(rows[:1], [33]))
    pool.commit()
    query, keys, values = draw(41, 1, H * G), draw(41, 2, H), draw(41, 3, H)
    step = pool.reserve(rows[:2], lengths)
    attend = attention(quantizer, "exact", backend=backend)
    out = attend(query, keys, values, pool.layers[0], step, None)
    whole = [torch.cat([old, new[:1]]) for old, new in zip(history, (keys, values), strict=True)]
    stored = quantizer.dequantize(quantizer.quantize(*whole, [0, 34], block_size=BLOCK))
    assert_same(out[:1], softmax_attention(query[:1], *stored))
    assert_same(out[1:], softmax_attention(query[1:], keys[1:], values[1:]))


def test_a_decoding_sequence_reads_the_same_whoever_prefills_beside_it() -> None:
    """So too where each query reads its own mix of exact and quantized tokens."""
    calibration = draw(400, 20, H), draw(400, 21, H)
    spec = QuantSpec(bits=2, logit_bias=True)
    quantizer = BatchedKVQuantizer.calibrate(spec, *calibration)
    history = draw(33, 7, H), draw(33, 8, H)
    query, keys, values = draw(41, 1, H * G), draw(41, 2, H), draw(41, 3, H)
    outs = []
    for lengths in ([1], [1, 40]):
        pool, rows = pool_for(quantizer)
        quantizer.write(*history, pool.layers[0], pool.reserve(rows[:1], [33]))
        pool.commit()
        step = pool.reserve(rows[: len(lengths)], lengths)
        n = sum(lengths)
        call = query[:n], keys[:n], values[:n], pool.layers[0], step, None
        outs.append(attention(quantizer, "exact")(*call)[:1])
    assert_same(outs[1], outs[0])


@pytest.mark.parametrize(
    "settings", [{"window": 20}, {"softcap": 0.5}, {"window": 3, "softcap": 1.0}], ids=str
)
def test_window_and_softcap(quantizer: BatchedKVQuantizer, settings: dict[str, float]) -> None:
    T = sum(LENGTHS)
    query, keys, values = draw(T, 1, H * G), draw(T, 2, H), draw(T, 3, H)
    offsets = torch.tensor(cumulative_lengths(LENGTHS))
    stored = quantizer.dequantize(quantizer.quantize(keys, values, offsets, block_size=BLOCK))
    pool, rows = pool_for(quantizer)
    step = pool.reserve(rows, LENGTHS)
    out = attention(quantizer, "quantized", **settings)(query, keys, values, pool.layers[0], step, None)
    for actual, q, k, v in zip(*(sequences(x, LENGTHS) for x in (out, query, *stored)), strict=True):
        assert_same(actual, softmax_attention(q, k, v, **settings))


@pytest.mark.parametrize("rotary_dim", [D, D // 2], ids=["full", "partial"])
def test_keys_are_rotated_as_they_are_read(quantizer: BatchedKVQuantizer, rotary_dim: int) -> None:
    """More than one tile of history, so that tile bases and offsets both matter."""
    T, tile = 1100, blocks_per_tile(BLOCK) * BLOCK
    query, keys, values = draw(T, 1, H * G), draw(T, 2, H), draw(T, 3, H)
    stored = quantizer.dequantize(quantizer.quantize(keys, values, [0, T], block_size=BLOCK))
    frequency = 100.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)

    def rotated(x: Tensor, first: int) -> Tensor:
        """One pair (d, d + R/2) at a time is a complex number times exp(i * position * frequency)."""
        angle = torch.arange(first, first + len(x))[:, None] * frequency
        real, imaginary, rest = x.double().split([rotary_dim // 2, rotary_dim // 2, D - rotary_dim], dim=-1)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag, rest], dim=-1)

    angles = [torch.arange(n)[:, None] * unit * frequency for n, unit in ((tile, 1), (-(-T // tile), tile))]
    rope = Rope(*(table.float() for angle in angles for table in (angle.cos(), angle.sin())))
    pool = BlockPool(BlockLayout(quantizer.spec, 1, H, D, torch.float32, BLOCK), 40, max_sequences=1)
    row, attend = pool.add_sequence(), attention(quantizer, "quantized")
    for part in (slice(0, 1040), slice(1040, T)):
        step = pool.reserve([row], [part.stop - part.start])
        turned = rotated(query[part], part.start).float()
        out = attend(turned, keys[part], values[part], pool.layers[0], step, rope)
        pool.commit()
    assert_same(out, softmax_attention(rotated(query[1040:], 1040), rotated(stored[0], 0), stored[1]))


def test_other_reads_are_refused(quantizer: BatchedKVQuantizer) -> None:
    with pytest.raises(ValueError, match=r"prefill_reads must be one of quantized, exact, got 'both'"):
        attention(quantizer, "both")


class Masks(TorchDispatchMode):
    """Counts tensors that are indexed by a mask, whose places a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(("aten::index", "aten::masked_select", "aten::nonzero")):
            flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            self.count += any(isinstance(x, Tensor) and x.dtype == torch.bool for x in flat)
        return func(*args, **(kwargs or {}))


def test_sinks_are_kept_without_asking_the_device_where_they_are(quantizer: BatchedKVQuantizer) -> None:
    pool, rows = pool_for(quantizer)
    with Masks() as masks:
        torch.arange(3)[torch.tensor([True, False, True])]
    assert masks.count == 1
    kept: list[list[Tensor]] = [[] for _ in rows]
    for lengths in ([1, 3, 1], [1, 1, 5], [4, 1, 1]):
        step = pool.reserve(rows, lengths)
        assert torch.equal(step.first_tokens(2), (step.positions < 2).nonzero().flatten())
        keys, values = (draw(sum(lengths), seed, H) for seed in (1, 2))
        for of_row, new in zip(kept, keys.split(lengths), strict=True):
            of_row.extend(new)
        with Masks() as masks:
            skip = quantizer.write_sinks(keys, values, pool.layers[0], step)
        assert masks.count == 0
        assert skip is None or torch.equal(skip, step.positions < 2)
        pool.commit()
    for row, tokens in zip(rows, kept, strict=True):
        assert torch.equal(pool.layers[0].sink_keys[row], torch.stack(tokens[:2]))
