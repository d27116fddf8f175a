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

from kvquant import block_layout
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
    """Keys and values [LAYERS, tokens, H, D]; every fourth 16 tokens are calm, the others mostly outliers."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, LAYERS, 256, HEADS, HEAD_DIM, generator=generator)
    wild = torch.arange(256) // 16 % 4 > 0
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


def make_pool(num_blocks=NUM_BLOCKS, *, chunks=64, sequences=MAX_SEQUENCES, spec=SPEC, window=None):
    """A pool with as many spill chunks as its layout provides (20 for 10 blocks), but at least ``chunks``."""
    layout = BlockLayout(spec, LAYERS, HEADS, HEAD_DIM, torch.float32, BLOCK, spill_headroom=1.0)
    with mock.patch.object(block_layout, "MIN_CHUNKS", chunks):
        pool = BlockPool(
            layout, num_blocks, max_sequences=sequences, max_blocks_per_sequence=64, window=window
        )
        assert pool.bytes_total == layout.pool_bytes(num_blocks, sequences, 64)
    return pool


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
    """Dequantized keys and values of the tokens that a sequence holds, [n, H, D] each."""
    store, held = pool.layers[layer], pool.tokens_held(row)
    if not held:
        return torch.empty(2, 0, HEADS, HEAD_DIM).unbind()
    ids = torch.tensor([pool.blocks_of(row)])
    out = [tile[0, :, :held].transpose(0, 1).clone() for tile in quantizers()[layer].reader(store)(ids)]
    if held == pool.length(row):  # else the sink tokens have passed out of the window
        for x, sink in zip(out, (store.sink_keys, store.sink_values), strict=True):
            count = min(SPEC.sink_tokens, held)
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
        "free blocks": list(pool._ids.free),
        "references": list(pool._ids.references),
        "rows": sorted(pool._free_rows),
        "chunks": [free_chunks(pool, layer) for layer in range(LAYERS)],
        "chains": [[chains(pool, layer, b) for b in held_blocks(pool)] for layer in range(LAYERS)],
        "bytes": (pool.bytes_held, pool.bytes_free),
        "content": [
            [x.numpy().tobytes() for x in content(pool, layer, row)]
            for layer in range(LAYERS)
            for row in pool.sequences
        ],
    }


def held_blocks(pool):
    return sorted({block for row in pool.sequences for block in pool.blocks_of(row)})


class PoolMachine(RuleBasedStateMachine):
    """Random verbs on a small pool, against a plain model: the list of bank tokens of every sequence."""

    @initialize(chunks=st.sampled_from([1, 40, 80]), window=st.sampled_from([None, None, 12, 1]))
    def start(self, chunks, window):
        self.pool = make_pool(chunks=chunks, window=window)
        self.tokens: dict[int, tuple[int, ...]] = {self.pool.add_sequence(): (), self.pool.add_sequence(): ()}
        # Blocks that each sequence has given back to the window, once and for all.
        self.passed = dict.fromkeys(self.tokens, 0)
        self.before_pending = {}

    def settled(self):
        """What the pool holds, a call that was left pending not counted."""
        return self.before_pending if self.pool._pending is not None else snapshot(self.pool)

    def passed_at(self, length):
        """Blocks of which the next token of a sequence of ``length`` tokens sees nothing."""
        window = self.pool.window
        seen = range(length + 1) if window is None else range(length + 1)[-window:]
        return seen[0] // BLOCK

    # ---- verbs --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tokens) < MAX_SEQUENCES)
    @rule()
    def add(self):
        row = self.pool.add_sequence()
        assert row not in self.tokens
        self.tokens[row], self.passed[row] = (), 0

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
        before = self.settled()
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
                self.passed[row] = max(self.passed[row], self.passed_at(len(self.tokens[row])))

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

    @precondition(lambda self: len(self.tokens) > 1)
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
            self.tokens[new], self.passed[new] = self.tokens[row], self.passed[row]
            full = len(self.tokens[row]) // BLOCK - self.passed[row]
            assert self.pool.blocks_of(new)[:full] == self.pool.blocks_of(row)[:full]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def crop(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)), "row")
        drop = data.draw(st.integers(0, min(3 * BLOCK, len(self.tokens[row]))), "drop")
        length = len(self.tokens[row]) - drop
        before = self.settled()
        try:
            self.pool.crop(row, length)
        except PoolExhausted:
            assert snapshot(self.pool) == before
        except ValueError as error:
            assert "sliding window" in str(error) and self.passed_at(length) < self.passed[row]
            assert snapshot(self.pool) == before
        else:
            assert self.passed_at(length) >= self.passed[row]
            self.tokens[row] = self.tokens[row][:length]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def select(self, data):
        """What check_select lets through is done to the end; what it refuses has changed nothing."""
        rows = sorted(self.tokens)
        chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=MAX_SEQUENCES + 1), "chosen")
        before = self.settled()
        try:
            self.pool.check_select(rows, chosen)
        except PoolExhausted:
            assert snapshot(self.pool) == before
            return
        for row in set(rows) - set(chosen):
            self.pool.free(row)
            del self.tokens[row]
        for row in set(chosen):
            for _ in range(chosen.count(row) - 1):
                new = self.pool.fork(row)
                self.tokens[new], self.passed[new] = self.tokens[row], self.passed[row]

    # ---- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def the_model_and_the_pool_agree(self):
        pool = self.pool
        if pool._pending is not None:
            return
        assert sorted(pool.sequences) == sorted(self.tokens)
        for row, tokens in self.tokens.items():
            assert pool.length(row) == len(tokens)
            first, last = self.passed[row], pool.layout.blocks_for(len(tokens))
            assert len(pool.blocks_of(row)) == last - first
            assert pool.block_table[row, first:last].tolist() == pool.blocks_of(row)
            for layer in range(LAYERS if tokens else 0):
                for x, truth in zip(content(pool, layer, row), fresh_content(layer, tokens), strict=True):
                    assert torch.equal(x, truth[first * BLOCK :])

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
                assert self.pool._ids.references[blocks[-1]] == 1
        assert holders == self.pool._ids.references

    @invariant()
    def nothing_leaks(self):
        pool = self.pool
        if pool._pending is not None:
            return
        held = held_blocks(pool)
        assert sorted([*held, *pool._ids.free]) == list(range(NUM_BLOCKS))
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
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# -- one thing at a time -------------------------------------------------------------------------------------------


@pytest.fixture
def pool():
    """Three sequences: a fork pair of 20 tokens with spill chains, and one of 8."""
    pool = make_pool(chunks=40)
    first, other = pool.add_sequence(), pool.add_sequence()
    append(pool, first, range(28, 48))
    append(pool, other, range(8))
    pool.fork(first)
    assert all(chains(pool, layer, pool.blocks_of(first)[-1]) for layer in range(LAYERS))
    return pool


def test_too_few_blocks_raise_before_anything_changes(pool):
    before = snapshot(pool)
    # 5 of 10 blocks are held (2 shared, 2 open, 1); 28 + 36 more tokens need 3 + 5 blocks beyond the open one.
    with pytest.raises(
        PoolExhausted, match=r"needs 8 more blocks and has 5 of 10 free \(3 missing\)"
    ) as error:
        pool.reserve([0, 1], [28, 36])
    assert "cache.num_blocks" in str(error.value) and "cache.memory_budget_gib" in str(error.value)
    assert snapshot(pool) == before


def test_a_sequence_longer_than_its_row_of_the_table_is_refused():
    layout = BlockLayout(SPEC, LAYERS, HEADS, HEAD_DIM, torch.float32, BLOCK)
    pool = BlockPool(layout, 10, max_sequences=2, max_blocks_per_sequence=2)
    row = pool.add_sequence()
    before = snapshot(pool)
    with pytest.raises(PoolExhausted, match="a sequence may hold 16 tokens here, got 17"):
        pool.reserve([row], [17])
    assert snapshot(pool) == before


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("layer", "channel"), [(0, 0), (1, 21)])
def test_nan_is_named_by_layer_and_channel_and_changes_nothing(pool, side, layer, channel):
    before = snapshot(pool)
    step = pool.reserve([0, 1], [13, 9])
    for index, (store, quantizer) in enumerate(zip(pool.layers, quantizers(), strict=True)):
        sides = {"key": token_bank()[0][index, :22].clone(), "value": token_bank()[1][index, :22].clone()}
        if index == layer:
            sides[side].view(22, -1)[17, channel] = torch.nan
        quantizer.write(sides["key"], sides["value"], store, step)
    where = f"{side} activations .* layer {layer}, channel {channel} \\(head {channel // HEAD_DIM}\\)"
    with pytest.raises(NonFiniteActivations, match=where):
        pool.commit()
    assert snapshot(pool) == before
    append(pool, 0, range(48, 60))
    for x, truth in zip(content(pool, 0, 0), fresh_content(0, tuple(range(28, 60))), strict=True):
        assert torch.equal(x, truth)


def test_spill_exhaustion_changes_nothing_and_says_what_to_raise():
    pool = make_pool(chunks=1)
    row = pool.add_sequence()
    append(pool, row, range(30, 36))
    before = snapshot(pool)
    with pytest.raises(
        PoolExhausted, match=r"layer 0 has more key outliers .* cache.spill_headroom \(now 1.0\)"
    ):
        append(pool, row, range(32, 60))
    assert snapshot(pool) == before
    append(pool, row, range(8))
    assert pool.length(row) == 14


def test_pools_hand_out_rows_in_step_after_a_fork_that_failed_in_one():
    pools = [make_pool(num_blocks) for num_blocks in (4, 2, 2)]
    for pool in pools:
        append(pool, pool.add_sequence(), range(12))
    other = pools[0].fork(0)
    with pytest.raises(PoolExhausted, match="needs 1 more blocks and has 0 of 2 free"):
        pools[1].fork(0)
    pools[0].free(other)
    assert {pool.add_sequence() for pool in pools} == {1}


def test_crop_of_a_shared_block_needs_a_block_for_the_copy():
    pool = make_pool(2)
    row = pool.add_sequence()
    append(pool, row, range(16))
    other = pool.fork(row)
    before = snapshot(pool)
    with pytest.raises(PoolExhausted, match="1 missing"):
        pool.crop(other, 12)
    assert snapshot(pool) == before
    pool.crop(other, 8)
    assert pool.blocks_in_use == 2 and pool.length(row) == 16


def test_crop_of_a_shared_block_behind_a_window_is_written_where_the_table_counts_from():
    pool = make_pool(window=8)
    row = pool.add_sequence()
    append(pool, row, range(24))
    other = pool.fork(row)
    pool.crop(other, 23)
    assert pool.tokens_held(other) == 7 and pool.blocks_of(other) != pool.blocks_of(row)
    assert pool.block_table[other, :3].tolist() == [0, 0, *pool.blocks_of(other)]
    assert pool.block_table[row, :3].tolist() == [0, 0, *pool.blocks_of(row)]
    for x, truth in zip(content(pool, 1, other), fresh_content(1, tuple(range(23))), strict=True):
        assert torch.equal(x, truth[16:])


@pytest.mark.parametrize("length", [-1, 21])
def test_crop_beyond_the_sequence_is_refused(pool, length):
    with pytest.raises(ValueError, match=f"0 to 20 .* got {length}"):
        pool.crop(0, length)


def test_more_sequences_than_rows_are_refused():
    pool = make_pool(sequences=1)
    row = pool.add_sequence()
    append(pool, row, range(4))
    before = snapshot(pool)
    for refused in (pool.add_sequence, lambda: pool.fork(row)):
        with pytest.raises(PoolExhausted, match="at most 1 sequences and all are in use"):
            refused()
    assert snapshot(pool) == before


def test_a_copy_without_spill_chunks_left_is_refused():
    pool = make_pool(chunks=1)
    row = pool.add_sequence()
    append(pool, row, range(16, 31))
    other = pool.fork(row)
    append(pool, other, range(31, 32))
    before = snapshot(pool)
    with pytest.raises(PoolExhausted, match="no spill chunk is left .* raise cache.spill_headroom"):
        pool.fork(row)
    assert snapshot(pool) == before
    shared = pool.fork(other)
    before = snapshot(pool)
    with pytest.raises(PoolExhausted, match="no spill chunk is left .* raise cache.spill_headroom"):
        pool.crop(shared, 12)
    assert snapshot(pool) == before


def test_a_call_may_name_a_sequence_once(pool):
    with pytest.raises(ValueError, match="once"):
        pool.reserve([0, 0], [1, 1])


def test_forks_part_ways(pool):
    append(pool, 0, range(48, 53))
    append(pool, 2, range(100, 108))
    for row, tokens in ((0, range(28, 53)), (2, [*range(28, 48), *range(100, 108)])):
        for layer in range(LAYERS):
            for x, truth in zip(content(pool, layer, row), fresh_content(layer, tuple(tokens)), strict=True):
                assert torch.equal(x, truth)


@pytest.mark.parametrize("how", ["one by one", "all at once"])
def test_everything_freed_is_as_good_as_new(pool, how):
    empty = make_pool(chunks=40)
    assert pool.bytes_held > empty.bytes_held
    if how == "all at once":
        pool.reserve(list(pool.sequences)[:1], [3])  # a call that was begun is given up
        pool.free_all()
    else:
        for row in list(pool.sequences):
            pool.free(row)
    assert pool.sequences == [] and sorted(pool._free_rows) == sorted(empty._free_rows)
    for layer in range(LAYERS):
        assert sorted(free_chunks(pool, layer)) == sorted(free_chunks(empty, layer))
        assert not pool.layers[layer].keys.outlier_count.any()
    tokens = list(range(20))
    row = pool.add_sequence()
    append(pool, row, tokens)
    for layer in range(LAYERS):
        for x, truth in zip(content(pool, layer, row), fresh_content(layer, tuple(tokens)), strict=True):
            assert torch.equal(x, truth)
    pool.free(row)
    assert (pool.bytes_held, pool.bytes_free) == (empty.bytes_held, empty.bytes_free)
    # What cannot be given back: the tables and counters themselves.
    assert empty.bytes_held == sum(t.nbytes for t in (empty.block_table, empty.spill_top, empty.error))


def test_exact_blocks_are_kept_copied_and_cropped():
    pool = make_pool(spec=QuantSpec(method="none"))
    quantizer = BatchedKVQuantizer.exact(HEADS, HEAD_DIM)
    keys, values = (x[0, :20] for x in token_bank())
    row = pool.add_sequence()
    step = pool.reserve([row], [20])
    for store in pool.layers:
        quantizer.write(keys, values, store, step)
    pool.commit()
    fork = pool.fork(row)
    pool.crop(fork, 5)
    pool.free(row)
    for tile, x in zip(
        quantizer.reader(pool.layers[1])(torch.tensor([pool.blocks_of(fork)])), (keys, values), strict=True
    ):
        assert torch.equal(tile[0, :, :5].transpose(0, 1), x[:5])
    assert pool.blocks_in_use == 1 and pool.bytes_held + pool.bytes_free == pool.bytes_total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 60}, "multiple of 8, got 60; try 64"),
        ({"block_size": 0}, "multiple of 8, got 0"),
        ({"head_dim": 256, "block_size": 512}, "at most 65536 .* got 512 \\* 256; try 256"),
        ({"num_kv_heads": 1024, "head_dim": 128}, "KV heads"),
        ({"spec": QuantSpec(value_groups=5)}, "value_groups must divide the layer's 32"),
        ({"spill_headroom": 0.5}, "at least 1, got 0.5"),
    ],
    ids=["block size", "no block", "index of a key", "index of a value", "value groups", "headroom"],
)
def test_layouts_that_cannot_be(changes, message):
    arguments = {
        "spec": SPEC,
        "num_layers": 1,
        "num_kv_heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": torch.float32,
        "block_size": BLOCK,
    }
    with pytest.raises(ValueError, match=message):
        BlockLayout(**{**arguments, **changes})


@pytest.mark.parametrize(("num_blocks", "sequences"), [(0, 1), (1, 0)])
def test_a_pool_of_nothing_is_refused(num_blocks, sequences):
    with pytest.raises(PoolExhausted, match="at least 1 block and 1 sequence"):
        make_pool(num_blocks, sequences=sequences)
