"""Measures each operation over one stored history and returns plain rows of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from kvquant.bench.full_precision import fastest
from kvquant.bench.stored import StoredHistory, angles
from kvquant.bench.timing import Clock, Timing, Way
from kvquant.kernels import KeyStore, ValueStore
from kvquant.kernels.decode_attention import rotate
from kvquant.ragged import RaggedStep

OPERATIONS = ("write_keys", "write_values", "dequantize", "decode", "prefill")
Row = dict[str, Any]
# Numbers dequantized in one call when the whole history is: 1 GiB in fp32 for keys and for values each.
_DENSE_ELEMENTS = 1 << 28
# Attention over blocks and over the same dequantized numbers must agree to this relative RMS, or the time is of
# something else. Rounding alone is some 1% in bf16.
MOST_DIFFERENCE = 0.1


class WrongResult(Exception):
    """An operation ran and gave something else than what it is for."""


def measure_writes(history: StoredHistory, clock: Clock, most_tokens: int) -> list[Row]:
    """Quantize, pack and store the keys, and the values, of the history's prompts into an empty pool.

    Args:
        history: nothing stored yet, and nothing after.
        clock: measures.
        most_tokens: of one call; longer prompts are cut, later ones left out.
    """
    lengths, left = [], most_tokens
    for n in history.lengths:
        if left:
            lengths.append(min(n, left))
            left -= lengths[-1]
    step = history.pool.reserve(history.rows[: len(lengths)], lengths)
    tokens, C = sum(lengths), history.shape.channels
    kernels, spec = history.kernels, history.quantizer.spec
    target = torch.empty(tokens, C, dtype=history.dtype, device=history.device)

    def write(side: str) -> Way:
        def way(copy: int) -> None:
            arguments, runs = history.write_arguments(copy, step)
            keys, values = history.own(copy, step)
            store = history.store(copy)
            if side == "keys":
                kernels.write_keys(keys, store.keys, *arguments, bits=spec.key_bits, **runs)
            else:
                kernels.write_values(values, store.values, *arguments, bits=spec.value_bits, **runs)

        return way

    copied = clock.measure(
        lambda copy: target.copy_(history.own(copy, step)[0].view(tokens, C)), history.copies
    )
    rows: list[Row] = []
    for side, row_bits in (("keys", spec.key_bits), ("values", spec.value_bits)):
        prepare = history.forget_outliers if side == "keys" else None
        timing = clock.measure(write(side), history.copies, prepare=prepare)
        history.pool.check()
        moved = tokens * C * history.dtype.itemsize + _written_bytes(history, step, side)
        rows.append(
            {
                "operation": f"write_{side}",
                "tokens_of_call": tokens,
                "side_bits": row_bits,
                **_times(timing),
                "bytes": moved,
                "us_per_1k_tokens": 1e9 * timing.median_s / tokens,
                "full_precision_way": "copy",
                **_against("full_precision", copied, timing),
            }
        )
    history.pool.rollback()
    return rows


def _written_bytes(history: StoredHistory, step: RaggedStep, side: str) -> int:
    """Bytes of codes, ranges and outliers that a call stores; the blocks were empty before it."""
    keys, values, tokens = history.store(0).keys, history.store(0).values, sum(step.lengths)
    assert isinstance(keys, KeyStore) and isinstance(values, ValueStore)
    codes = keys.codes if side == "keys" else values.codes
    stored = tokens * codes.shape[1] * codes.shape[3]
    entry = 2 + values.outlier_value.element_size()
    if side == "keys":
        return stored + int(keys.outlier_count.sum()) * entry
    ranges = 2 * values.zero.shape[-1] * values.zero.element_size()
    return stored + tokens * (ranges + values.outlier_index.shape[-1] * entry)


def measure_dequantize(history: StoredHistory, clock: Clock) -> Row:
    """Turn blocks into dense keys and values, as many whole sequences (or blocks of one) as fit one call."""
    step = history.pool.reserve(history.rows, [1] * len(history.rows))
    history.write(step)
    C, BS = history.shape.channels, history.block_size
    P = max(1, min(min(step.kv_lengths) // BS, _DENSE_ELEMENTS // (C * BS)))
    S = max(1, min(len(history.rows), _DENSE_ELEMENTS // (C * BS * P)))
    ids = step.block_table[:S, :P].long()
    readers = [_reader(history, copy) for copy in range(history.copies)]
    timing = clock.measure(lambda copy: readers[copy](ids), history.copies)
    keys, values = readers[0](ids)
    share = S * P * BS / sum(step.kv_lengths)
    dense = torch.empty(2, S * P * BS * C, dtype=history.dtype, device=history.device)
    target = torch.empty_like(dense)
    copied = clock.measure(lambda _: target.copy_(dense))
    row = {
        "operation": "dequantize",
        "tokens_of_call": S * P * BS,
        **_times(timing),
        "bytes": round(share * history.read_bytes(step)) + keys.nbytes + values.nbytes,
        "full_precision_way": "copy",
        **_against("full_precision", copied, timing),
    }
    history.pool.rollback()
    return row


def _reader(history: StoredHistory, copy: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return history.quantizer.reader(history.store(copy), backend=history.backend)


def measure_attention(
    history: StoredHistory,
    clock: Clock,
    new: int,
    prefill_reads: str,
    full_precision: dict[str, Timing | str],
    *,
    in_graph: dict[str, Timing | str] | None,
    slow_clock: Clock,
) -> Row:
    """Attention of ``new`` tokens of each sequence over its history and themselves.

    Args:
        history: filled.
        clock: measures.
        new: 1 decodes; more are a chunk of prefill.
        prefill_reads: what a chunk reads of itself, see ``PrefillQuantizedAttention``.
        full_precision: what `FullPrecision.measure` found for the same lengths.
        in_graph: what `FullPrecision.measure_graph` found, if the calls are to be captured in a CUDA graph too.
        slow_clock: measures dequantize-then-attend on a GPU; on a CPU the two take turns.
    """
    B = len(history.rows)
    step = history.pool.reserve(history.rows, [new] * B)
    history.write(step)
    attention = history.attention(prefill_reads)
    cos, sin = angles(history.shape, step.positions)
    query = rotate(history.data.query(B * new).float(), cos[:, None], sin[:, None]).to(history.dtype)

    def attend(copy: int) -> Tensor:
        keys, values = history.own(copy, step)
        return attention.attend(query, keys, values, history.store(copy), step, history.rope)

    dense = DequantizeThenAttend(history, step, query, own_exact=new > 1 and prefill_reads == "exact")
    difference = _relative_rms(attend(0), dense(0))
    if not difference < MOST_DIFFERENCE:
        raise WrongResult(
            f"attention over blocks must give what attention over the dequantized numbers gives, got a relative "
            f"difference of {difference:.3g}; kernel={history.backend} is broken here, try kernel=pytorch_fused"
        )
    if clock.is_cuda:
        timing, dense_timing = (
            each.measure(way, history.copies) for each, way in ((clock, attend), (slow_clock, dense))
        )
    else:
        # A processor has other users, and one after the other the two were seen at 0.2 and at 28 times each other.
        timing, dense_timing = clock.in_turns((attend, dense), history.copies)
    row: Row = {
        "operation": "decode" if new == 1 else "prefill",
        "tokens_of_call": B * new,
        **_times(timing),
        "bytes": history.read_bytes(step) + 2 * query.nbytes,
        "difference": difference,
        **_against("dequantize_then_attend", dense_timing, timing),
        "eager_us": 1e6 * clock.eager_s(attend, history.copies, 20 if timing.median_s < 0.01 else 3),
    }
    if new > 1:
        row["tflop_per_s"] = _operations(history, step, new) / timing.median_s / 1e12
    best = fastest(full_precision)
    if best is not None:
        row |= {"full_precision_way": best[0], **_against("full_precision", best[1], timing)}
    if in_graph is not None:
        try:
            graph = clock.graph(attend, history.copies)
            row |= {"graph_us": 1e6 * graph.median_s}
            rival = fastest(in_graph)
            if rival is not None:
                row["full_precision_graph_us"] = 1e6 * rival[1].median_s
        except RuntimeError as error:
            row["graph_refused"] = " ".join(str(error).split())[:200]
    history.pool.rollback()
    return row


def _relative_rms(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def _operations(history: StoredHistory, step: RaggedStep, new: int) -> float:
    """Multiplications and additions of the two products, masked ones left out."""
    seen = sum(n * p + n * (n + 1) / 2 for p, n in zip(step.past, step.lengths, strict=True))
    return 4.0 * history.shape.query_heads * history.shape.head_dim * seen


class DequantizeThenAttend:
    """Make histories dense in the model's dtype, rotate their keys, attend with torch: what there is without kernels.

    A few sequences at a time, so that what is dense fits the memory whatever the batch.

    Args:
        history: whose blocks are read.
        step: its pending call, the same number of new tokens for each sequence.
        query: rotated, [B * new, Hq, D].
        own_exact: whether the call's own keys and values are read as they came.
    """

    def __init__(self, history: StoredHistory, step: RaggedStep, query: Tensor, *, own_exact: bool) -> None:
        self._history, self._step, self._own_exact = history, step, own_exact
        (self._new,) = set(step.lengths)
        T, Hq, D = query.shape
        self._query = query.view(T // self._new, self._new, Hq, D).transpose(1, 2)  # [B, Hq, new, D]
        self._readers = [_reader(history, copy) for copy in range(history.copies)]
        self._together = max(1, _DENSE_ELEMENTS // (max(step.kv_lengths) * history.shape.channels))
        self._cos, self._sin = angles(history.shape, torch.arange(max(step.kv_lengths), device=query.device))

    def __call__(self, copy: int) -> Tensor:
        """[B * new, Hq, D]."""
        lengths, out, first = self._step.kv_lengths, [], 0
        while first < len(lengths):
            # Sequences of one length together; a ragged batch goes one by one.
            last = first + 1
            while last < len(lengths) and lengths[last] == lengths[first] and last - first < self._together:
                last += 1
            out.append(self._attend(copy, slice(first, last), lengths[first]))
            first = last
        B, Hq, new, D = self._query.shape
        return torch.cat(out).transpose(1, 2).reshape(B * new, Hq, D)

    def _attend(self, copy: int, part: slice, length: int) -> Tensor:
        query, new = self._query[part], self._new
        S, Hq, _, D = query.shape
        ids = self._step.block_table[part, : self._history.layout.blocks_for(length)].long()
        keys, values = (x[:, :, :length] for x in self._readers[copy](ids))
        H = keys.shape[1]
        if self._own_exact:
            own = slice(part.start * new, part.stop * new)
            for x, exact in zip((keys, values), self._history.own(copy, self._step), strict=True):
                x[:, :, length - new :] = exact[own].view(S, new, H, D).transpose(1, 2).to(x.dtype)
        keys = rotate(keys, self._cos[:length], self._sin[:length]).to(query.dtype)
        values = values.to(query.dtype)
        if new == 1:  # the heads of a group are queries of one head
            return F.scaled_dot_product_attention(query.reshape(S, H, Hq // H, D), keys, values).view(
                S, Hq, 1, D
            )
        mask = causal_lower_right(new, length)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=Hq > H)


def _times(timing: Timing) -> Row:
    return {
        "us": 1e6 * timing.median_s,
        "low_us": 1e6 * timing.low_s,
        "high_us": 1e6 * timing.high_s,
        "repeats": timing.repeats,
    }


def _against(name: str, theirs: Timing, ours: Timing) -> Row:
    """Their time, and how many times as long as ours it is: above 1, ours is faster."""
    return {
        f"{name}_us": 1e6 * theirs.median_s,
        f"speedup_over_{name}": theirs.median_s / ours.median_s,
    }
