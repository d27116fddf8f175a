"""pytorch_fused against the plain truth of kernels/reference.py: what is stored is identical, attention agrees."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant import compiled, kernels
from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.errors import NonFiniteActivations
from kvquant.kernels import OPERATIONS, SPILL_ENTRIES, Rope, decode_attention, get_backend
from kvquant.spec import QuantSpec

HEADS = 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCHES = ([1], [63, 64, 65], [1, 130])


def heavy_tailed(num_tokens, head_dim, seed, *, heads=HEADS, spread=1.0):
    """Normal over the root of a uniform (tails like Student's t), channels of different scale and centre."""
    channels = torch.Generator().manual_seed(99)
    scale = torch.randn(heads, head_dim, generator=channels).exp()
    centre = torch.randn(heads, head_dim, generator=channels)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, heads, head_dim, generator=generator)
    tail = torch.rand(num_tokens, heads, head_dim, generator=generator).clamp(min=0.05).sqrt()
    return x / tail * scale * spread + centre


def calibrated(spec, head_dim, *, heads=HEADS, dtype=torch.float32, tokens=512):
    keys, values = (heavy_tailed(tokens, head_dim, seed, heads=heads).to(dtype) for seed in (1, 2))
    return BatchedKVQuantizer.calibrate(spec, keys, values)


def pool_for(quantizer, *, block_size=64, num_blocks=16, dtype=torch.float32, headroom=4.0, sequences=4):
    layout = BlockLayout(
        quantizer.spec, 1, quantizer.num_kv_heads, quantizer.head_dim, dtype, block_size, headroom
    )
    return BlockPool(layout, num_blocks, max_sequences=sequences)


def append(quantizer, pool, rows, lengths, keys, values, backend):
    step = pool.reserve(rows, lengths)
    quantizer.write(keys, values, pool.layers[0], step, backend=backend)
    pool.commit()
    return step


def assert_same_pools(pool, other):
    for name, tensor in pool.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert torch.equal(pool.spill_top, other.spill_top)
    assert torch.equal(pool.block_table, other.block_table)


def relative_rms(x, truth):
    return float((x - truth).float().norm() / truth.float().norm())


def chain_length(pool):
    """Most spill chunks behind one (block, head)."""
    base = pool.layout.key_outlier_base
    return -(-(int(pool.tensors["key_outlier_count"].max()) - base) // SPILL_ENTRIES)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backends_take_the_same_arguments(operation):
    ours, truth = (
        inspect.signature(getattr(get_backend(b), operation)) for b in ("pytorch_fused", "reference")
    )
    assert ours == truth


@pytest.mark.parametrize(
    ("name", "message"), [("triton", "must run on an NVIDIA GPU"), ("trition", "must be one of auto")]
)
def test_other_backends_are_refused(name, message):
    with pytest.raises(ValueError, match=f"{message}.* try auto|{message}.*kernel=pytorch_fused"):
        get_backend(name)


def test_an_old_triton_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.2.0")
    kernels.triton_refusal.cache_clear()
    with pytest.raises(ValueError, match=r"needs triton 3.6 or later, got 3.2.0; try kernel=pytorch_fused"):
        get_backend("triton", "cuda")
    assert get_backend("auto", "cuda").__name__.endswith("pytorch_fused")
    kernels.triton_refusal.cache_clear()


# -- quantize and dequantize ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    bits: int
    fraction: float
    dtype: str
    lengths: list[int]
    groups: int
    sinks: int
    head_dim: int

    def __str__(self):
        lengths = "+".join(map(str, self.lengths))
        return (
            f"{self.bits}bit-{self.fraction:.0%}-{self.dtype}-{lengths}-groups{self.groups}"
            f"-sinks{self.sinks}-D{self.head_dim}"
        )


def cases():
    """Every (bits, fraction, dtype) and, over these, every other setting in turn; wide codes once each."""
    # Periods that share no factor with the product's, so that no two settings always come together.
    groups, sinks, head_dim = (
        itertools.cycle(x) for x in ((1, 4, 4, 1), (5, 0, 5, 0, 0), (64, 80, 64, 80, 80))
    )
    narrow = list(itertools.product((2, 3, 4), (0.0, 0.01, 0.05), DTYPES))
    found = []
    for i, (bits, fraction, dtype) in enumerate([*narrow, (5, 0.05, "bf16"), (8, 0.01, "fp32")]):
        lengths = BATCHES[(i + i // 3 + i // 9) % 3]
        found.append(Case(bits, fraction, dtype, lengths, next(groups), next(sinks), next(head_dim)))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_backends_store_and_read_identically(case):
    dtype, total = DTYPES[case.dtype], sum(case.lengths)
    spec = QuantSpec(
        case.bits, outlier_fraction=case.fraction, value_groups=case.groups, sink_tokens=case.sinks
    )
    quantizer = calibrated(spec, case.head_dim, dtype=dtype)
    # Wider than the calibration draw, so that rows overflow into spill chunks.
    keys, values = (heavy_tailed(total, case.head_dim, seed, spread=1.5).to(dtype) for seed in (3, 4))
    pools = {}
    for backend in ("reference", "pytorch_fused"):
        pool = pools[backend] = pool_for(quantizer, dtype=dtype)
        rows = [pool.add_sequence() for _ in case.lengths]
        append(quantizer, pool, rows, case.lengths, keys, values, backend)
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    if case.fraction == 0.01 and total > 100:
        assert chain_length(pool) >= 1, "the draw must reach the spill chunks"
    ids = pool.block_table[: len(case.lengths)].long()[:, :3]
    for tile, truth in zip(
        quantizer.reader(pool.layers[0], backend="pytorch_fused")(ids),
        quantizer.reader(pool.layers[0], backend="reference")(ids),
        strict=True,
    ):
        assert torch.equal(tile, truth)


@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_head_dim(bits, head_dim):
    # Three heads, so that no count of channels is a power of two; a dtype and a share of outliers for each in turn.
    dtype = list(DTYPES.values())[(bits + head_dim // 16) % 3]
    fraction = (0.0, 0.01, 0.05)[(bits + head_dim // 32) % 3]
    quantizer = calibrated(
        QuantSpec(bits, outlier_fraction=fraction), head_dim, heads=3, dtype=dtype, tokens=96
    )
    keys, values = (heavy_tailed(11, head_dim, seed, heads=3).to(dtype) for seed in (3, 4))
    pools = {}
    for backend in ("reference", "pytorch_fused"):
        pool = pools[backend] = pool_for(quantizer, block_size=8, num_blocks=3, dtype=dtype, headroom=30.0)
        append(quantizer, pool, [pool.add_sequence(), pool.add_sequence()], [2, 9], keys, values, backend)
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    for x, truth in zip(
        dequantized(quantizer, pool, 1), dequantized(quantizer, pool, 1, backend="reference"), strict=True
    ):
        assert torch.equal(x, truth)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_ties_and_zeros_of_either_sign_are_stored_identically(dtype, fraction):
    quantizer = calibrated(QuantSpec(2, outlier_fraction=fraction, value_groups=2), 64, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    few = torch.randint(-2, 3, (2, 40, HEADS, 64), generator=generator) * torch.tensor(0.5)
    keys, values = torch.where(torch.rand(few.shape, generator=generator) < 0.5, -few, few).to(dtype)
    zero, scale = quantizer.constants.key_zero, quantizer.constants.key_scale
    keys[0] = (zero + scale * quantizer.constants.key_midpoints[1]).to(
        dtype
    )  # on a boundary, or just beside it
    if fraction:
        keys[1], keys[2] = quantizer.constants.key_lower.to(dtype), quantizer.constants.key_upper.to(dtype)
    values[3] = 0.5  # a range of width zero
    pools = {}
    for backend in ("reference", "pytorch_fused"):
        pool = pools[backend] = pool_for(quantizer, dtype=dtype, headroom=30.0)
        append(quantizer, pool, [pool.add_sequence()], [40], keys, values, backend)
    assert_same_pools(pools["pytorch_fused"], pools["reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_tokens_are_stored_as_few_are(dtype):
    # Several chunks, and several of them sorted together; the reference would take minutes.
    quantizer = calibrated(
        QuantSpec(3, outlier_fraction=0.02, sink_tokens=2, value_groups=2), 64, dtype=dtype
    )
    lengths = [700, 200]
    keys, values = (heavy_tailed(900, 64, seed, spread=1.5).to(dtype) for seed in (3, 4))
    together, alone = (pool_for(quantizer, num_blocks=16, dtype=dtype, headroom=8.0) for _ in range(2))
    rows = [together.add_sequence(), together.add_sequence()]
    append(quantizer, together, rows, lengths, keys, values, "pytorch_fused")
    for row, first in zip([alone.add_sequence(), alone.add_sequence()], (0, 700), strict=True):
        for start in range(first, first + lengths[row], 50):
            part = slice(start, start + 50)
            append(quantizer, alone, [row], [50], keys[part], values[part], "pytorch_fused")
    assert_same_content(quantizer, together, alone)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "tokens"),
    [(1, 128, 512, 300), (260, 128, 8, 3)],
    ids=["keys of a long block", "values of many heads"],
)
def test_indices_use_all_sixteen_bits(heads, head_dim, block_size, tokens):
    spec = QuantSpec(2, outlier_fraction=0.002)
    quantizer = calibrated(spec, head_dim, heads=heads, tokens=64)
    keys, values = (heavy_tailed(tokens, head_dim, seed, heads=heads) for seed in (3, 4))
    pools = {}
    for backend in ("reference", "pytorch_fused"):
        pool = pools[backend] = pool_for(quantizer, block_size=block_size, num_blocks=1, headroom=20.0)
        append(quantizer, pool, [pool.add_sequence()], [tokens], keys, values, backend)
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    names = ("key_outlier_index", "spill_index", "value_outlier_index")
    assert min(int(pool.tensors[name].min()) for name in names) < 0, "the draw must set the sign bit"
    for x, truth in zip(
        dequantized(quantizer, pool, 0), dequantized(quantizer, pool, 0, backend="reference"), strict=True
    ):
        assert torch.equal(x, truth)


# -- appends that grow a chain -----------------------------------------------------------------------------------

SMALL_BLOCK, SMALL_DIM = 16, 32


@pytest.fixture(scope="module")
def small():
    """A quantizer whose blocks are so small that calls of a few tokens already grow chains."""
    return calibrated(QuantSpec(3, outlier_fraction=0.05, sink_tokens=2), SMALL_DIM)


def spilling(num_tokens):
    """Keys of which about a third are outliers, so that a block's chain has several links, and values."""
    keys = heavy_tailed(num_tokens, SMALL_DIM, 5, spread=4.0)
    return keys, heavy_tailed(num_tokens, SMALL_DIM, 6)


def small_pool(quantizer):
    return pool_for(quantizer, block_size=SMALL_BLOCK, num_blocks=24, headroom=12.0)


def append_in_calls(quantizer, calls, keys, values, backend):
    """Append ``calls`` (each: tokens of every sequence, 0 to leave it out) from one run of tokens per sequence."""
    pool, width = small_pool(quantizer), len(calls[0])
    rows, done = [pool.add_sequence() for _ in range(width)], [0] * width
    per_sequence = len(keys) // width
    for lengths in calls:
        named = [s for s in range(width) if lengths[s]]
        tokens = [s * per_sequence + done[s] + i for s in named for i in range(lengths[s])]
        append(
            quantizer,
            pool,
            [rows[s] for s in named],
            [lengths[s] for s in named],
            keys[tokens],
            values[tokens],
            backend,
        )
        done = [d + n for d, n in zip(done, lengths, strict=True)]
    return pool


def dequantized(quantizer, pool, row, backend="pytorch_fused"):
    ids = torch.tensor([pool.blocks_of(row)])
    return [tile[0, :, : pool.length(row)] for tile in quantizer.reader(pool.layers[0], backend=backend)(ids)]


def assert_same_content(quantizer, pool, other):
    assert pool.sequences == other.sequences
    for row in filter(pool.length, pool.sequences):
        mine, theirs = pool.blocks_of(row), other.blocks_of(row)
        for name in ("key_codes", "value_codes", "key_outlier_count"):
            assert torch.equal(pool.tensors[name][:, mine], other.tensors[name][:, theirs]), name
        for x, truth in zip(
            dequantized(quantizer, pool, row), dequantized(quantizer, other, row), strict=True
        ):
            assert torch.equal(x, truth)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 40, [7] * 5 + [5], [16, 16, 8], [33, 7], [15, 1, 1, 23]],
    ids=["token by token", "chunks of 7", "blocks", "33 then 7", "around a block's end"],
)
def test_successive_appends_equal_one_call(small, chunks):
    keys, values = spilling(80)
    calls = [[n, n] for n in chunks]
    pools = {b: append_in_calls(small, calls, keys, values, b) for b in ("reference", "pytorch_fused")}
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    assert chain_length(pools["reference"]) >= 3, "the draw must grow chains of several links"
    whole = append_in_calls(small, [[40, 40]], keys, values, "pytorch_fused")
    assert_same_content(small, pools["pytorch_fused"], whole)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 19)] * 3).filter(any), min_size=1, max_size=4))
def test_any_interleaving_of_appends_is_stored_identically(small, calls):
    keys, values = spilling(240)
    pools = {b: append_in_calls(small, calls, keys, values, b) for b in ("reference", "pytorch_fused")}
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    total = [sum(lengths) for lengths in zip(*calls, strict=True)]
    assert_same_content(
        small, pools["pytorch_fused"], append_in_calls(small, [total], keys, values, "pytorch_fused")
    )


def test_exact_storage_is_identical():
    quantizer = BatchedKVQuantizer.exact(HEADS, 64)
    keys, values = (heavy_tailed(131, 64, seed).bfloat16() for seed in (3, 4))
    pools = {}
    for backend in ("reference", "pytorch_fused"):
        pool = pools[backend] = pool_for(quantizer, dtype=torch.bfloat16)
        append(quantizer, pool, [pool.add_sequence(), pool.add_sequence()], [1, 130], keys, values, backend)
    assert_same_pools(pools["pytorch_fused"], pools["reference"])
    assert torch.equal(
        dequantized(quantizer, pool, 1)[0],
        dequantized(quantizer, pool, 1, backend="reference")[0],
    )


# -- what the error word says ------------------------------------------------------------------------------------


def error_word(quantizer, keys, values, backend, *, headroom=4.0, num_blocks=16):
    pool = pool_for(quantizer, num_blocks=num_blocks, headroom=headroom)
    step = pool.reserve([pool.add_sequence()], [len(keys)])
    quantizer.write(keys, values, pool.layers[0], step, backend=backend)
    return pool.error[0].tolist()


@pytest.mark.parametrize("backend", ["reference", "pytorch_fused"])
@pytest.mark.parametrize("fraction", [0.0, 0.01])
@pytest.mark.parametrize(
    ("side", "number", "token", "kind"),
    [
        ("key", torch.nan, 0, 1),
        ("key", torch.inf, 6, 1),
        ("value", torch.nan, 6, 2),
        ("value", -torch.inf, 0, 2),
        ("value", 3e5, 6, 2),
    ],
    ids=["nan key in a sink", "infinite key", "nan value", "infinite value in a sink", "value beyond fp16"],
)
def test_error_word_names_kind_and_channel(side, number, token, kind, fraction, backend):
    quantizer = calibrated(QuantSpec(3, outlier_fraction=fraction, sink_tokens=2), 64)
    keys, values = heavy_tailed(9, 64, 3), heavy_tailed(9, 64, 4)
    {"key": keys, "value": values}[side][token, 1, 5] = number
    assert error_word(quantizer, keys, values, backend) == [kind, 64 + 5]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [9, 300], ids=["few tokens", "many tokens"])
def test_bad_numbers_stay_in_their_token(tokens, dtype, number):
    quantizer = calibrated(QuantSpec(3, outlier_fraction=0.02), 64, dtype=dtype)
    keys, values = heavy_tailed(tokens, 64, 3).to(dtype), heavy_tailed(tokens, 64, 4).to(dtype)
    good, bad = (pool_for(quantizer, dtype=dtype) for _ in range(2))
    # Not committed: closing blocks would order the entries of one pool and not the other's.
    step = good.reserve([good.add_sequence()], [tokens])
    quantizer.write(keys, values, good.layers[0], step, backend="pytorch_fused")
    step = bad.reserve([bad.add_sequence()], [tokens])
    keys[5, 1, 7] = values[5, 0, 9] = number
    quantizer.write(keys, values, bad.layers[0], step, backend="pytorch_fused")
    assert bad.error[0, 0] != 0
    others = torch.ones(bad.num_blocks, 64, dtype=torch.bool)
    others[bad.blocks_of(0)[0], 5] = False
    for name in ("key_codes", "value_codes"):
        mine, theirs = (p.tensors[name][0].transpose(1, 2)[others] for p in (bad, good))
        assert torch.equal(mine, theirs), name
    for name in ("value_zero", "value_scale", "value_outlier_index", "value_outlier_value"):
        assert torch.equal(bad.tensors[name][0][others], good.tensors[name][0][others]), name
    with pytest.raises(NonFiniteActivations):
        bad.commit()
    assert bad.length(0) == 0 and bad.spill_top.equal(torch.full_like(bad.spill_top, bad.num_chunks))


@pytest.mark.parametrize("backend", ["reference", "pytorch_fused"])
def test_finite_sink_tokens_of_any_size_are_no_error(backend):
    # A sink token keeps the model's dtype, so that a massive activation beyond fp16 is stored as it is.
    quantizer = calibrated(QuantSpec(3, outlier_fraction=0.01, sink_tokens=2), 64)
    keys, values = heavy_tailed(9, 64, 3), heavy_tailed(9, 64, 4)
    keys[1, 0, 3] = values[1, 0, 3] = 1e5
    assert error_word(quantizer, keys, values, backend) == [0, 0]


@pytest.mark.parametrize("backend", ["reference", "pytorch_fused"])
def test_spill_exhaustion_is_an_error(small, backend):
    pool = small_pool(small)
    pool.spill_top.fill_(2)
    step = pool.reserve([pool.add_sequence()], [16])
    small.write(*spilling(16), pool.layers[0], step, backend=backend)
    assert pool.error[0, 0] == 3


# -- attention ---------------------------------------------------------------------------------------------------

BLOCK, DIM = 16, 64


@dataclasses.dataclass(frozen=True)
class Attention:
    past: tuple[int, ...] = (0, 0, 0)
    new: tuple[int, ...] = (1, 63, 70)
    groups: int = 4
    rotary_dim: int | None = DIM
    window: int | None = None
    softcap: float | None = None
    exact: bool = False
    spec: QuantSpec = QuantSpec(4, outlier_fraction=0.01)  # noqa: RUF009 (frozen)
    blocks_per_tile: int = 2


ATTENTION = {
    "one query head per KV head": Attention(groups=1),
    "four query heads per KV head": Attention(),
    "chunked prefill": Attention(past=(64, 1, 0), new=(7, 40, 33)),
    "one slot short of a tile": Attention(past=(0, 30, 33), new=(31, 1, 30)),
    "decode": Attention(past=(1, 15, 130), new=(1, 1, 1)),
    "decode, one query head per KV head": Attention(past=(1, 15, 130), new=(1, 1, 1), groups=1),
    "decode, seven query heads per KV head": Attention(past=(1, 15, 130), new=(1, 1, 1), groups=7),
    "decode of first tokens": Attention(past=(0, 0, 0), new=(1, 1, 1)),
    "decode, sliding window": Attention(past=(64, 3, 130), new=(1, 1, 1), window=20),
    "decode, window of one token": Attention(past=(64, 15, 130), new=(1, 1, 1), window=1),
    "decode, softcap": Attention(past=(1, 15, 130), new=(1, 1, 1), softcap=5.0),
    "decode, partial rotary": Attention(past=(1, 15, 130), new=(1, 1, 1), rotary_dim=DIM // 4),
    "decode, no rope": Attention(past=(1, 15, 130), new=(1, 1, 1), rotary_dim=None),
    "decode, sinks over several blocks": Attention(
        spec=QuantSpec(2, sink_tokens=40), past=(1, 15, 130), new=(1, 1, 1)
    ),
    "decode, unquantized": Attention(spec=QuantSpec(method="none"), past=(1, 15, 130), new=(1, 1, 1)),
    "one large tile": Attention(past=(64, 1, 0), new=(7, 40, 33), blocks_per_tile=32),
    "sliding window": Attention(past=(64, 1, 0), new=(7, 40, 70), window=20),
    "window of one token": Attention(past=(64, 1, 0), new=(7, 40, 33), window=1),
    "softcap": Attention(softcap=5.0),
    "partial rotary": Attention(rotary_dim=DIM // 4, past=(64, 1, 0), new=(7, 40, 33)),
    "no rope": Attention(rotary_dim=None, past=(64, 1, 0), new=(7, 40, 33)),
    "exact reads": Attention(exact=True, past=(64, 1, 0), new=(7, 40, 33)),
    "exact reads of first chunks": Attention(exact=True, past=(0, 0, 0), new=(1, 40, 133)),
    "exact reads of first chunks with sinks": Attention(
        exact=True, past=(0, 0, 32), new=(1, 40, 70), spec=QuantSpec(2, sink_tokens=5)
    ),
    "sinks": Attention(spec=QuantSpec(2, sink_tokens=5), past=(64, 3, 0), new=(7, 40, 3)),
    "sinks over several tiles": Attention(
        spec=QuantSpec(2, sink_tokens=40), past=(64, 3, 0), new=(7, 40, 33), blocks_per_tile=1
    ),
    "unquantized": Attention(spec=QuantSpec(method="none"), past=(64, 1, 0), new=(7, 40, 33)),
    "everything": Attention(
        spec=QuantSpec(3, outlier_fraction=0.05, sink_tokens=5, value_groups=4),
        past=(64, 3, 0),
        new=(7, 40, 33),
        rotary_dim=DIM // 2,
        window=30,
        softcap=20.0,
        exact=True,
    ),
}


def rope_tables(tile, tiles, rotary_dim):
    frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    offset, base = torch.arange(tile)[:, None] * frequency, torch.arange(tiles)[:, None] * tile * frequency
    return Rope(offset.cos(), offset.sin(), base.cos(), base.sin())


def attention_pool(case):
    if case.spec.is_exact:
        quantizer = BatchedKVQuantizer.exact(HEADS, DIM)
    else:
        quantizer = calibrated(case.spec, DIM)
    pool = pool_for(quantizer, block_size=BLOCK, num_blocks=40)
    return quantizer, pool, [pool.add_sequence() for _ in case.past]


def attend(case, quantizer, pool, step, query, own, backend):
    store = pool.layers[0]
    tile = BLOCK * case.blocks_per_tile
    tiles = -(-max(step.kv_lengths) // tile)
    sinks = None
    if store.sink_keys.shape[1]:
        sinks = (store.sink_keys[step.rows], store.sink_values[step.rows])
    return get_backend(backend).attend(
        query,
        step,
        quantizer.reader(store, backend=backend),
        None if case.rotary_dim is None else rope_tables(tile, tiles, case.rotary_dim),
        own if case.exact else None,
        sinks,
        block_size=BLOCK,
        blocks_per_tile=case.blocks_per_tile,
        softmax_scale=DIM**-0.5,
        window=case.window,
        softcap=case.softcap,
    )


def stored_history(case):
    """A pool that holds the case's history and its new tokens; returns all that attend needs."""
    quantizer, pool, rows = attention_pool(case)
    for row, past in zip(rows, case.past, strict=True):
        if past:
            keys, values = (heavy_tailed(past, DIM, seed + row) for seed in (10, 20))
            append(quantizer, pool, [row], [past], keys, values, "pytorch_fused")
    total = sum(case.new)
    own = heavy_tailed(total, DIM, 30), heavy_tailed(total, DIM, 31)
    step = append(quantizer, pool, rows, case.new, *own, "pytorch_fused")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(total, HEADS * case.groups, DIM, generator=generator)
    return quantizer, pool, step, query, own


@pytest.mark.parametrize("numba", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_tiled_attention_agrees_with_reference(case, numba, monkeypatch):
    monkeypatch.setattr(compiled, "has_numba", lambda: numba)
    arguments = stored_history(case)
    truth = attend(case, *arguments, "reference")
    assert torch.isfinite(truth).all()
    assert relative_rms(attend(case, *arguments, "pytorch_fused"), truth) < 1e-5


def test_decode_applies_a_long_ropes_scaling_once():
    case = ATTENTION["decode"]
    quantizer, pool, step, query, _ = stored_history(case)
    tile = BLOCK * case.blocks_per_tile
    plain = rope_tables(tile, 5, DIM)
    scaled = plain._replace(offset_cos=plain.offset_cos * 1.2, offset_sin=plain.offset_sin * 1.2)
    outputs = [
        get_backend(backend).attend(
            query,
            step,
            quantizer.reader(pool.layers[0], backend=backend),
            scaled,
            None,
            None,
            block_size=BLOCK,
            blocks_per_tile=case.blocks_per_tile,
            softmax_scale=DIM**-0.5,
        )
        for backend in ("pytorch_fused", "reference")
    ]
    assert relative_rms(*outputs) < 1e-5


@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_decode_in_pieces_of_any_size_agrees_with_reference(blocks, monkeypatch):
    case = dataclasses.replace(ATTENTION["everything"], past=(64, 3, 130), new=(1, 1, 1), exact=False)
    arguments = stored_history(case)
    truth = attend(case, *arguments, "reference")
    monkeypatch.setattr(compiled, "has_numba", lambda: False)
    monkeypatch.setattr(decode_attention, "_PIECE_ELEMENTS", blocks * HEADS * BLOCK * DIM)
    assert relative_rms(attend(case, *arguments, "pytorch_fused"), truth) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["decode", "chunked prefill"])
def test_attention_is_as_exact_as_its_inputs_type(name, dtype):
    case = ATTENTION[name]
    quantizer, pool, step, query, own = stored_history(case)
    query = query.to(dtype)
    ours = attend(case, quantizer, pool, step, query, own, "pytorch_fused")

    def dense(precision):
        """The same computation on the dequantized history, every product in one type."""
        rows, start = [], 0
        for s, (past, new) in enumerate(zip(case.past, case.new, strict=True)):
            keys, values = (x.to(dtype).to(precision) for x in dequantized(quantizer, pool, s))
            position = torch.arange(past + new, dtype=torch.float64)
            angle = position[:, None] * 1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
            cos, sin = angle.cos().to(precision), angle.sin().to(precision)
            a, b = keys.chunk(2, -1)
            keys = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).repeat_interleave(case.groups, 0)
            values = values.repeat_interleave(case.groups, 0)
            q = query[start : start + new].to(precision).transpose(0, 1)
            scores = q @ keys.transpose(1, 2) * DIM**-0.5
            hidden = torch.arange(past + new) > torch.arange(past, past + new)[:, None]
            rows.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
            start += new
        return torch.cat(rows)

    truth = dense(torch.float64)
    assert relative_rms(ours.double(), truth) <= 2 * relative_rms(dense(dtype).double(), truth)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(
    "name", ["four query heads per KV head", "sliding window", "sinks", "partial rotary", "unquantized"]
)
def test_chunked_equals_whole(name, chunk):
    lengths = (3, 90)
    case = dataclasses.replace(ATTENTION[name], past=(0, 0), new=lengths)
    quantizer, pool, step, query, own = stored_history(case)
    whole = attend(case, quantizer, pool, step, query, own, "pytorch_fused")
    _, pool, rows = attention_pool(case)
    parts: list[list[torch.Tensor]] = [[], []]
    for first in range(0, max(lengths), chunk):
        named = [s for s, n in enumerate(lengths) if n > first]
        sizes = [min(chunk, lengths[s] - first) for s in named]
        tokens = [s * lengths[0] + first + i for s, n in zip(named, sizes, strict=True) for i in range(n)]
        keys, values = own[0][tokens], own[1][tokens]
        step = append(quantizer, pool, [rows[s] for s in named], sizes, keys, values, "pytorch_fused")
        out = attend(case, quantizer, pool, step, query[tokens], (keys, values), "pytorch_fused")
        for s, part in zip(named, out.split(sizes), strict=True):
            parts[s].append(part)
    assert relative_rms(torch.cat([*parts[0], *parts[1]]), whole) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "chunked prefill",
        "one slot short of a tile",
        "sinks",
        "everything",
        "unquantized",
        "decode",
        "decode, sliding window",
        "decode, unquantized",
    ],
)
def test_slots_never_written_do_not_matter(name):
    case = ATTENTION[name]
    arguments = stored_history(case)
    pool = arguments[1]
    before = attend(case, *arguments, "pytorch_fused")
    used = [(block, slot) for row in pool.sequences for slot, block in enumerate(pool.blocks_of(row))]
    written = torch.zeros(pool.num_blocks, BLOCK, dtype=torch.bool)
    for row in pool.sequences:
        for position in range(pool.length(row)):
            written[pool.blocks_of(row)[position // BLOCK], position % BLOCK] = True
    assert used and not written.all()
    if case.spec.is_exact:
        for name in ("keys", "values"):
            pool.tensors[name][0].transpose(1, 2)[~written] = torch.nan
    else:
        for name in ("value_zero", "value_scale", "value_outlier_value"):
            pool.tensors[name][0, ~written] = torch.nan
        counts = pool.tensors["key_outlier_count"][0, ..., None]
        absent = torch.arange(pool.layout.key_outlier_base) >= counts
        pool.tensors["key_outlier_value"][0][absent] = torch.nan
        for row in pool.sequences:
            for name in ("sink_keys", "sink_values"):
                pool.tensors[name][0, row, pool.length(row) :] = torch.nan
    assert torch.equal(attend(case, *arguments, "pytorch_fused"), before)
