"""BlockPool: blocks come and go in any order, nothing leaks or overlaps, and a failed call changes nothing."""

from __future__ import annotations

import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvquant import block_pool
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.errors import NonFiniteActivations, PoolExhausted
from kvquant.kernels import SPILL_ENTRIES
from kvquant.spec import QuantSpec

LAYERS, HEADS, HEAD_DIM, BLOCK = 2, 2, 16, 8
NUM_BLOCKS, MAX_SEQUENCES = 10, 4
SPEC = QuantSpec(bits=3, outlier_fraction=0.05, sink_tokens=2)


@functools.cache
def token_bank():
    """Keys and values [LAYERS, tokens, H, D]; runs of 32 calm tokens alternate with runs that are all outliers."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, LAYERS, 256, HEADS, HEAD_DIM, generator=generator)
    wild = torch.arange(256) // 32 % 2 == 1
    return torch.where(wild[:, None, None], keys * 20, keys), values


@functools.cache
def quantizers():
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(LAYERS, 2, 400, HEADS, HEAD_DIM, generator=generator)
    return [BatchedKVQuantizer.calibrate(SPEC, keys, values) for keys, values in draws]


@functools.lru_cache(maxsize=4096)
def fresh_content(layer, tokens):
    """Keys and values of one sequence quantized by itself in a pool of its own."""
    keys, values = (x[layer, list(tokens)] for x in token_bank())
    quantizer = quantizers()[layer]
    packed = quantizer.quantize(keys, values, [0, len(tokens)], block_size=BLOCK, spill_headroom=20)
    return quantizer.dequantize(packed)


def make_pool(num_blocks=NUM_BLOCKS, *, chunks=None, sequences=MAX_SEQUENCES, spec=SPEC):
    layout = BlockLayout(spec, LAYERS, HEADS, HEAD_DIM, torch.float32, BLOCK, spill_headroom=1.0)
    few = {} if chunks is None else {"_MIN_CHUNKS": chunks}
    with mock.patch.multiple(block_pool, **few):
        return BlockPool(layout, num_blocks, max_sequences=sequences)


def write(pool, step, tokens, *, spoil=None):
    """Quantize bank tokens into the slots of a step; ``spoil`` = (layer, channel) that becomes NaN."""
    for layer, (store, quantizer) in enumerate(zip(pool.layers, quantizers(), strict=True)):
        keys, values = (x[layer, tokens].clone() for x in token_bank())
        if spoil is not None and spoil[0] == layer:
            keys.view(-1, HEADS * HEAD_DIM)[-1, spoil[1]] = torch.nan
        quantizer.write(keys, values, store, step)


def append(pool, row, tokens):
    write(pool, pool.reserve([row], [len(tokens)]), tokens)
    pool.commit()


def content(pool, layer, row):
    """Dequantized keys and values of a stored sequence, [n, H, D] each."""
    store, length = pool.layers[layer], pool.length(row)
    if not length:
        return torch.empty(2, 0, HEADS, HEAD_DIM).unbind()
    ids = torch.tensor([pool.blocks_of(row)])
    out = [tile[0, :, :length].transpose(0, 1).clone() for tile in quantizers()[layer].reader(store)(ids)]
    for x, sink in zip(out, (store.sink_keys, store.sink_values), strict=True):
        count = min(SPEC.sink_tokens, length)
        x[:count] = sink[row, :count]
    return out


def chains(pool, layer, block):
    """Chunk ids behind each head of a block."""
    keys = pool.layers[layer].keys
    found = []
    for head in range(HEADS):
        beyond = int(keys.outlier_count[block, head]) - pool.layout.key_outlier_base
        chunk = int(keys.spill_head[block, head])
        for _ in range(-(-max(beyond, 0) // SPILL_ENTRIES)):
            found.append(chunk)
            chunk = int(keys.spill_next[chunk])
    return found


def free_chunks(pool, layer):
    keys = pool.layers[layer].keys
    return keys.spill_free[: int(keys.spill_top)].tolist()


def snapshot(pool):
    """All that a failed call must leave as it was."""
    return {
        "blocks": {row: pool.blocks_of(row) for row in pool.sequences},
        "lengths": {row: pool.length(row) for row in pool.sequences},
        "free blocks": list(pool._free_blocks),
        "references": list(pool._references),
        "rows": sorted(pool._free_rows),
        "chunks": [free_chunks(pool, layer) for layer in range(LAYERS)],
        "chains": [[chains(pool, layer, b) for b in held_blocks(pool)] for layer in range(LAYERS)],
        "bytes": (pool.bytes_held, pool.bytes_free),
        "content": [
            [x.tolist() for x in content(pool, layer, row)]
            for layer in range(LAYERS)
            for row in pool.sequences
        ],
    }


def held_blocks(pool):
    return sorted({block for row in pool.sequences for block in pool.blocks_of(row)})


class PoolMachine(RuleBasedStateMachine):
    """Random verbs on a small pool, against a plain model: the list of bank tokens of every sequence."""

    @initialize(chunks=st.sampled_from([8, 24, 80]))
    def start(self, chunks):
        self.pool = make_pool(chunks=chunks)
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.before_pending = {}

    def settled(self):
        """What the pool holds, a call that was left pending not counted."""
        return self.before_pending if self.pool._pending is not None else snapshot(self.pool)

    # ---- verbs --------------------------------------------------------------------------------------------------

    @rule()
    def add(self):
        if len(self.tokens) == MAX_SEQUENCES:
            with pytest.raises(PoolExhausted, match="at most 4 sequences"):
                self.pool.add_sequence()
        else:
            row = self.pool.add_sequence()
            assert row not in self.tokens
            self.tokens[row] = ()

    def reserve_and_write(self, data, spoil=None):
        """One call over some of the sequences up to (not including) its end; None if the blocks ran out."""
        rows = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True), "rows")
        lengths = [data.draw(st.integers(1, 20), "length") for _ in rows]
        first = [data.draw(st.integers(0, 230), "first token") for _ in rows]
        new = [tuple(range(f, f + n)) for f, n in zip(first, lengths, strict=True)]
        needed = sum(
            self.pool.layout.blocks_for(len(self.tokens[row]) + n)
            - self.pool.layout.blocks_for(len(self.tokens[row]))
            for row, n in zip(rows, lengths, strict=True)
        )
        before = self.settled()  # a call left pending is rolled back first
        free = len(before["free blocks"])
        if needed > free:
            with pytest.raises(PoolExhausted, match=rf"\({needed - free} missing\)"):
                self.pool.reserve(rows, lengths)
            assert snapshot(self.pool) == before
            return None
        write(self.pool, self.pool.reserve(rows, lengths), list(itertools.chain(*new)), spoil=spoil)
        return dict(zip(rows, new, strict=True))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        before = self.settled()
        new = self.reserve_and_write(data)
        if new is None:
            return
        try:
            self.pool.commit()
        except PoolExhausted as error:
            assert "spill" in str(error)
            assert snapshot(self.pool) == before
        else:
            for row, tokens in new.items():
                self.tokens[row] += tokens

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), channel=st.integers(0, HEADS * HEAD_DIM - 1), layer=st.integers(0, LAYERS - 1))
    def append_nan(self, data, channel, layer):
        before = self.settled()
        if self.reserve_and_write(data, spoil=(layer, channel)) is not None:
            with pytest.raises((NonFiniteActivations, PoolExhausted)):
                self.pool.commit()
            assert snapshot(self.pool) == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), explicitly=st.booleans())
    def abandon(self, data, explicitly):
        """A call that raised between reserve and commit: rolled back by its caller, or by the next verb."""
        self.before_pending = self.settled()
        if self.reserve_and_write(data) is not None and explicitly:
            self.pool.rollback()
            assert snapshot(self.pool) == self.before_pending

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)), "row")
        self.pool.free(row)
        del self.tokens[row]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)), "row")
        before = self.settled()
        try:
            new = self.pool.fork(row)
        except PoolExhausted as error:
            assert snapshot(self.pool) == before
            if "spill" not in str(error):
                has_tail = len(self.tokens[row]) % BLOCK > 0
                no_block = has_tail and len(held_blocks(self.pool)) == NUM_BLOCKS
                assert no_block or len(self.tokens) == MAX_SEQUENCES
        else:
            assert new not in self.tokens
            self.tokens[new] = self.tokens[row]
            full = len(self.tokens[row]) // BLOCK
            assert self.pool.blocks_of(new)[:full] == self.pool.blocks_of(row)[:full]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def crop(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)), "row")
        length = data.draw(st.integers(0, len(self.tokens[row])), "length")
        before = self.settled()
        try:
            self.pool.crop(row, length)
        except PoolExhausted:
            assert snapshot(self.pool) == before
        else:
            self.tokens[row] = self.tokens[row][:length]

    # ---- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def the_model_and_the_pool_agree(self):
        pool = self.pool
        if pool._pending is not None:
            return
        assert sorted(pool.sequences) == sorted(self.tokens)
        for row, tokens in self.tokens.items():
            assert pool.length(row) == len(tokens)
            assert len(pool.blocks_of(row)) == pool.layout.blocks_for(len(tokens))
            assert pool.block_table[row, : len(pool.blocks_of(row))].tolist() == pool.blocks_of(row)
            for layer in range(LAYERS if tokens else 0):
                for x, truth in zip(content(pool, layer, row), fresh_content(layer, tokens), strict=True):
                    assert torch.equal(x, truth)

    @invariant()
    def only_full_blocks_are_shared(self):
        if self.pool._pending is not None:
            return
        holders = [0] * NUM_BLOCKS
        for row, tokens in self.tokens.items():
            blocks = self.pool.blocks_of(row)
            assert len(set(blocks)) == len(blocks)
            for block in blocks:
                holders[block] += 1
            if len(tokens) % BLOCK:
                assert self.pool._references[blocks[-1]] == 1
        assert holders == self.pool._references

    @invariant()
    def nothing_leaks(self):
        pool = self.pool
        if pool._pending is not None:
            return
        held = held_blocks(pool)
        assert sorted([*held, *pool._free_blocks]) == list(range(NUM_BLOCKS))
        assert pool.blocks_in_use == len(held)
        for layer in range(LAYERS):
            reachable = [chunk for block in held for chunk in chains(pool, layer, block)]
            assert sorted([*reachable, *free_chunks(pool, layer)]) == list(range(pool.num_chunks))

    @invariant()
    def bytes_add_up(self):
        pool = self.pool
        tensors = [*pool.tensors.values(), pool.block_table, pool.spill_top, pool.error]
        assert pool.bytes_held + pool.bytes_free == pool.bytes_total
        assert pool.bytes_total == sum(t.untyped_storage().nbytes() for t in tensors)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


class TestWindow:
    """A pool whose layers see only the last tokens."""

    WINDOW = 20

    def books(self, pool: BlockPool) -> dict:
        """All but the content, whose reader starts at position 0."""
        return {name: what for name, what in snapshot(pool).items() if name != "content"}

    def grown(self, length: int) -> tuple[BlockPool, int]:
        windowed = BlockPool(
            make_pool(chunks=80).layout,
            NUM_BLOCKS,
            max_sequences=MAX_SEQUENCES,
            max_blocks_per_sequence=32,
            window=self.WINDOW,
        )
        row = windowed.add_sequence()
        for start in range(0, length, 8):
            new = list(range(start, min(start + 8, length)))
            write(windowed, windowed.reserve([row], [len(new)]), new)
            windowed.commit()
        return windowed, row

    @pytest.mark.parametrize("length", [1, 19, 20, 37, 64, 200])
    def test_holds_exactly_the_blocks_that_the_next_token_can_see(self, length) -> None:
        pool, row = self.grown(length)
        first_seen = max(0, length - self.WINDOW + 1)
        assert pool.length(row) == length
        assert len(pool.blocks_of(row)) == pool.layout.blocks_for(length) - first_seen // BLOCK
        assert pool.tokens_held(row) == length - first_seen // BLOCK * BLOCK
        assert pool.blocks_in_use == len(pool.blocks_of(row))
        pool.free(row)
        assert pool.blocks_in_use == 0

    def test_forks_crops_and_rollbacks_keep_counting_from_the_start(self) -> None:
        pool, row = self.grown(69)
        fork = pool.fork(row)
        held = len(pool.blocks_of(row))
        assert pool.blocks_of(fork)[:-1] == pool.blocks_of(row)[:-1]
        before = self.books(pool)
        write(pool, pool.reserve([fork], [9]), list(range(9)))
        pool.rollback()
        assert self.books(pool) == before
        with pytest.raises(ValueError, match="sliding window of 20 tokens"):
            pool.crop(fork, 40)
        assert self.books(pool) == before
        pool.crop(fork, 68)
        step = pool.reserve([row, fork], [1, 1])
        assert step.past == (69, 68) and len(pool.blocks_of(row)) == held
        table = pool.block_table[row].tolist()
        passed = pool.layout.blocks_for(69) - held
        assert table[:passed] == [0] * passed and table[passed : passed + held] == pool.blocks_of(row)
        pool.rollback()
        pool.free(row)
        pool.free(fork)
        assert pool.blocks_in_use == 0
