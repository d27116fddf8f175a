"""Value outliers by token in open blocks, by head in closed ones: the same entries, both ways, on every backend."""

from __future__ import annotations

import pytest
import torch

from kvquant import value_order
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.kernels import get_backend
from kvquant.spec import QuantSpec

BLOCK = 16
FIELDS = ("value_outlier_index", "value_outlier_value", "value_outlier_end")


def filled_pool(tokens, *, heads=3, head_dim=8, fraction=0.3, close=True):
    values = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(tokens))
    quantizer = BatchedKVQuantizer.calibrate(QuantSpec(3, outlier_fraction=fraction), values, values)
    layout = BlockLayout(quantizer.spec, 1, heads, head_dim, torch.float32, BLOCK)
    pool = BlockPool(layout, 8, max_sequences=2)
    row = pool.add_sequence()
    step = pool.reserve([row], [tokens])
    quantizer.write(values, values, pool.layers[0], step)
    if close:
        pool.commit()
    return quantizer, pool, row, values


def test_a_block_closes_when_its_last_token_is_committed():
    _, pool, row, _ = filled_pool(2 * BLOCK + 5)
    ends = pool.tensors["value_outlier_end"][0, pool.blocks_of(row)]
    per_block = BLOCK * pool.layout.value_outliers
    assert ends[:, -1].tolist() == [per_block, per_block, 0]


def test_entries_of_a_closed_block_lie_head_by_head():
    _, before, row, _ = filled_pool(BLOCK, close=False)
    _, after, _, _ = filled_pool(BLOCK)
    (block,) = before.blocks_of(row)
    channels = before.tensors["value_outlier_index"][0, block]
    ends = [0, *after.tensors["value_outlier_end"][0, block].tolist()]
    numbers = after.tensors["value_outlier_index"][0, block].flatten().tolist()
    for h in range(3):
        own = [
            slot * 8 + c - h * 8
            for slot, row in enumerate(channels.tolist())
            for c in row
            if h * 8 <= c < h * 8 + 8
        ]
        assert numbers[ends[h] : ends[h + 1]] == own


@pytest.mark.parametrize("backend", ["reference", "pytorch_fused"])
def test_closing_is_the_same_on_every_backend_and_reads_the_same(backend):
    quantizer, pool, row, _ = filled_pool(2 * BLOCK, close=False)
    ids = torch.tensor([pool.blocks_of(row)])
    open_tile = quantizer.reader(pool.layers[0], backend=backend)(ids)[1]
    index, value, end = (pool.tensors[name] for name in FIELDS)
    get_backend(backend).close_values(index, value, end, ids[0], head_dim=8)
    _, expected, _, _ = filled_pool(2 * BLOCK)
    for name in FIELDS:
        assert torch.equal(pool.tensors[name], expected.tensors[name]), name
    assert torch.equal(quantizer.reader(pool.layers[0], backend=backend)(ids)[1], open_tile)


def test_reopening_undoes_closing():
    _, before, row, _ = filled_pool(BLOCK, close=False)
    _, pool, _, _ = filled_pool(BLOCK)
    value_order.reopen(pool.tensors, pool.blocks_of(row)[0], 8)
    for name in FIELDS:
        assert torch.equal(pool.tensors[name], before.tensors[name]), name


@pytest.mark.parametrize("keep", [BLOCK, BLOCK + 3, 2 * BLOCK])
def test_tokens_join_a_block_that_was_closed_and_cropped(keep):
    quantizer, pool, row, values = filled_pool(2 * BLOCK)
    fork = pool.fork(row)  # its blocks are shared, so that cropping copies the one it ends in
    pool.crop(row, keep)
    if keep < 2 * BLOCK:
        step = pool.reserve([row], [2 * BLOCK - keep])
        quantizer.write(values[keep:], values[keep:], pool.layers[0], step)
        pool.commit()
    read = quantizer.reader(pool.layers[0])
    ours, untouched = (read(torch.tensor([pool.blocks_of(r)]))[1] for r in (row, fork))
    assert torch.equal(ours, untouched)
