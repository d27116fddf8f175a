"""Which program of a decode call takes which blocks: shares of about one size, whatever the lengths of a batch.

A fixed number of programs per sequence leaves most of a ragged batch's to sequences of a few blocks, while the longest
one's take all the time. So the number of blocks that a program takes is chosen on the device, from the lengths, as the
smallest with which all sequences get by with the programs there are; a sequence's blocks are then shared evenly among
as many as it needs. The largest shares start first and the small ones fill what they leave. A program still serves one
(sequence, KV head), so that its loop over blocks knows nothing of this.

Blocks take unequally long, by their outliers, and programs start and end on their own: rounds of short ones, as many at
once as a device has places, end more evenly than a single round of long ones. But every program costs a start and a
part to merge, so that there are few rounds where blocks are few, and few programs where they do not fill one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# See store_tiers.
Tiers = tuple[tuple[int, int], ...]

# Rounds of programs that are asked for: what they take has evened out by then.
_MOST_ROUNDS = 4


@triton.jit
def _visible_blocks(
    i, kv_lengths, sequences, window, sink_tokens, BS: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """The first block of sequences ``i`` that is looked at, and how many there are from it on."""
    length = tl.load(kv_lengths + i, mask=i < sequences, other=0)
    first_visible = tl.minimum(length, sink_tokens)
    if HAS_WINDOW:
        first_visible = tl.maximum(first_visible, length - window)
    start = first_visible // BS
    return start, tl.cdiv(length, BS) - start


@triton.jit
def _store_run(shares, b, order, part, begin, size, end, count):
    """``count`` shares of sequence ``b``, of ``size`` blocks each from ``begin`` on, as programs ``order`` and on."""
    n = tl.arange(0, 64)
    for s in range(0, count, 64):
        first = begin + (s + n) * size
        at = shares + (order + s + n) * 4
        inside = s + n < count
        tl.store(at, tl.zeros_like(n) + b, mask=inside)
        tl.store(at + 1, first, mask=inside)
        tl.store(at + 2, tl.minimum(first + size, end), mask=inside)
        tl.store(at + 3, part + s + n, mask=inside)


@triton.jit
def _own(x, own):
    return tl.sum(tl.where(own, x, 0), 0)


@triton.jit
def store_shares(
    b, kv_lengths, shares, parts, sequences, programs, at_once, window, sink_tokens,
    BS: tl.constexpr, SEQUENCES: tl.constexpr, FEWEST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Write the shares of sequence ``b``, one program's work; each looks at the lengths of all.

    Where lengths are far below those that ``programs`` was chosen for, not all programs get blocks: shares have FEWEST
    at least, unless it takes smaller ones to keep ``at_once`` of them busy.

    ``shares``, int32 [programs, 4]: sequence, first block, block behind the last one of each program, and its part.
    ``parts``, int32 [sequences + 1, 2]: first part, number of parts of each sequence; then 0, from which a kernel may
    count, and how many programs have got blocks.
    """
    i = tl.arange(0, SEQUENCES)
    start, blocks = _visible_blocks(i, kv_lengths, sequences, window, sink_tokens, BS, HAS_WINDOW)
    # Halving between what all programs together need, and what certainly does: sequences round up to a program each.
    every = tl.sum(blocks, 0)
    least = tl.maximum(tl.minimum(tl.cdiv(every, at_once), FEWEST), 1)
    fewest = tl.maximum(tl.cdiv(every, programs), least)
    certain = tl.where(programs > sequences, tl.cdiv(every, tl.maximum(programs - sequences, 1)), every)
    enough = tl.maximum(tl.minimum(tl.max(blocks, 0), certain), fewest)
    while fewest < enough:
        middle = (fewest + enough) // 2
        fits = tl.sum(tl.cdiv(blocks, middle), 0) <= programs
        enough = tl.where(fits, middle, enough)
        fewest = tl.where(fits, fewest, middle + 1)
    share = tl.cdiv(blocks, tl.maximum(tl.cdiv(blocks, enough), 1))
    count = tl.cdiv(blocks, tl.maximum(share, 1))
    own = i == b
    own_share, own_count, own_start = _own(share, own), _own(count, own), _own(start, own)
    before = (share > own_share) | ((share == own_share) & (i < b))
    first = tl.sum(tl.where(before, count, 0), 0)
    tl.store(parts + b * 2, first)
    tl.store(parts + b * 2 + 1, own_count)
    _store_run(shares, b, first, first, own_start, own_share, own_start + _own(blocks, own), own_count)
    if b == 0:
        used = tl.sum(count, 0)
        tl.store(parts + sequences * 2, 0)
        tl.store(parts + sequences * 2 + 1, used)
        # Programs that nobody needs have no block.
        n = tl.arange(0, 64)
        for s in range(used, programs, 64):
            at = shares + (s + n) * 4
            for field in tl.static_range(3):
                tl.store(at + field, tl.zeros_like(n), mask=s + n < programs)


# Blocks of a large share that smaller ones are worth their starts and ends for. H200, eight sequences of 8K tokens, large
# shares of five blocks: 82 us with smaller ones and 65 without (of a form before); of 32K tokens, with 19, it pays.
# Nothing between was measured.
_FEWEST_OF_LARGE = tl.constexpr(12)


@triton.jit
def _of_tier(
    blocks,
    rest,
    large,
    fewest,
    of_one_size,
    SIXTEENTHS: tl.constexpr,
    SMALLER: tl.constexpr,
    LAST: tl.constexpr,
):
    """Blocks of a share, and shares of each sequence, of ``blocks`` in all and ``rest`` that are left."""
    size = tl.minimum(tl.maximum(tl.cdiv(large, SMALLER), fewest), large)
    if LAST:
        return size, tl.cdiv(rest, size)
    else:
        return size, tl.minimum(rest, tl.where(of_one_size, blocks, blocks * SIXTEENTHS // 16)) // size


@triton.jit
def store_tiers(
    b, kv_lengths, shares, parts, sequences, at_once, window, sink_tokens,
    BS: tl.constexpr, SEQUENCES: tl.constexpr, FEWEST: tl.constexpr, HAS_WINDOW: tl.constexpr, TIERS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Write shares as :func:`store_shares` does, for programs that take the next one as they end: large ones first, up to
    ``at_once``, then ever smaller ones, which end evenly.

    Each of the COUNT TIERS is (sixteenths of a sequence's blocks, how many of its shares make a large one); the last one
    takes what is left. Shares have FEWEST blocks at least, but for a sequence's last. Where blocks are few, all shares
    are of one size, and what is left of sequences comes last. They are :func:`programs_of_tiers` at most.
    """
    i = tl.arange(0, SEQUENCES)
    start, blocks = _visible_blocks(i, kv_lengths, sequences, window, sink_tokens, BS, HAS_WINDOW)
    own = i == b
    large = tl.cdiv(tl.sum(blocks, 0) * TIERS[0][0], at_once * 16)
    of_one_size = large < _FEWEST_OF_LARGE
    large = tl.where(of_one_size, tl.maximum(tl.cdiv(tl.sum(blocks, 0), at_once), 1), large)
    fewest = tl.where(of_one_size, large, FEWEST)
    every, rest = tl.zeros_like(blocks), blocks
    for tier in tl.static_range(COUNT):
        size, count = _of_tier(
            blocks, rest, large, fewest, of_one_size, TIERS[tier][0], TIERS[tier][1], tier == COUNT - 1
        )
        every += count
        rest -= count * size
    first = _own(every, i < b)
    tl.store(parts + b * 2, first)
    tl.store(parts + b * 2 + 1, _own(every, own))
    own_end = _own(start + blocks, own)
    order = 0
    begin = _own(start, own)
    rest = blocks
    for tier in tl.static_range(COUNT):
        size, count = _of_tier(
            blocks, rest, large, fewest, of_one_size, TIERS[tier][0], TIERS[tier][1], tier == COUNT - 1
        )
        own_count = _own(count, own)
        _store_run(shares, b, order + _own(count, i < b), first, begin, size, own_end, own_count)
        order += tl.sum(count, 0)
        first += own_count
        begin += own_count * size
        rest -= count * size
    if b == 0:
        tl.store(parts + sequences * 2, 0)
        tl.store(parts + sequences * 2 + 1, order)


@triton.jit(do_not_specialize=["sequences", "programs", "at_once", "window", "sink_tokens"])
def _shares_kernel(
    kv_lengths, shares, parts, sequences, programs, at_once, window, sink_tokens,
    BS: tl.constexpr, SEQUENCES: tl.constexpr, FEWEST: tl.constexpr, HAS_WINDOW: tl.constexpr, TIERS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    if COUNT > 0:
        store_tiers(
            tl.program_id(0), kv_lengths, shares, parts, sequences, at_once, window, sink_tokens,
            BS, SEQUENCES, FEWEST, HAS_WINDOW, TIERS, COUNT,
        )  # fmt: skip
    else:
        store_shares(
            tl.program_id(0), kv_lengths, shares, parts, sequences, programs, at_once, window, sink_tokens,
            BS, SEQUENCES, FEWEST, HAS_WINDOW,
        )  # fmt: skip


def empty_shares(sequences: int, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``shares`` and ``parts`` for :func:`store_shares` to fill."""
    shares = torch.empty(programs, 4, dtype=torch.int32, device=device)
    return shares, torch.empty(sequences + 1, 2, dtype=torch.int32, device=device)


def share_blocks(
    kv_lengths: Tensor,
    programs: int,
    block_size: int,
    *,
    at_once: int,
    fewest_blocks: int,
    window: int | None = None,
    sink_tokens: int = 0,
    tiers: Tiers = (),
) -> tuple[Tensor, Tensor]:
    """Share the blocks of a batch among programs: shares and parts, int32.

    Args:
        kv_lengths: tokens of each sequence, int32 [B].
        programs: for each KV head, at least one per sequence.
        block_size: tokens of a block.
        at_once, fewest_blocks: see :func:`store_shares`.
        window: sliding window in tokens, or None.
        sink_tokens: first tokens that are kept apart.
        tiers: if any, see :func:`store_tiers`, which ``programs`` must be enough for.
    """
    sequences = kv_lengths.shape[0]
    shares, parts = empty_shares(sequences, programs, kv_lengths.device)
    _shares_kernel[(sequences,)](
        kv_lengths, shares, parts, sequences, programs, at_once, window or 0, sink_tokens,
        BS=block_size, SEQUENCES=padded(sequences), FEWEST=fewest_blocks, HAS_WINDOW=window is not None,
        TIERS=tiers, COUNT=len(tiers), num_warps=1,
    )  # fmt: skip
    return shares, parts


def padded(sequences: int) -> int:
    """Lengths that a program looks at at once; the same for most batches, so that these share a compiled kernel."""
    return max(64, triton.next_power_of_2(sequences))


def places_of(resident: int, device: torch.device) -> int:
    """Programs that a device holds at once, ``resident`` on each multiprocessor."""
    if device.type != "cuda":
        return resident
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def programs_for(
    sequences: int, heads: int, columns: int, places: int, fewest_blocks: int, most_rounds: int = _MOST_ROUNDS
) -> int:
    """Programs for each KV head of a call over ``sequences`` of up to ``columns`` blocks.

    A whole number of rounds of ``places`` programs, or just below it: 1.03 rounds take the time of two (measured), so
    that of the first few numbers of rounds the smallest is chosen that sequences of one length nearly fill. Several
    rounds of short programs end more evenly than one of long ones, which outliers make unequal; a program has
    ``fewest_blocks`` at least, or a start and a part to merge cost more than that gains. More than ``most_rounds`` are
    only for batches of more sequences than that serves.
    """
    blocks = sequences * heads * columns / places
    fewest = max(1, min(most_rounds, int(blocks / fewest_blocks)))
    # Two for each sequence where they are long, or lengths that differ could not even out.
    each_gets = 2 if columns >= 2 * fewest_blocks else 1
    fewest = max(fewest, -(-each_gets * sequences * heads // places))
    most = sequences * columns

    def filled(rounds: int) -> float:
        each = min(rounds * places // heads, most) // sequences
        return each * sequences * heads / (rounds * places)

    rounds = range(fewest, fewest + 4)
    best = max(map(filled, rounds))
    chosen = next(n for n in rounds if filled(n) >= 0.95 * best)
    return max(sequences, min(chosen * places // heads, most))


def programs_of_tiers(sequences: int, at_once: int, tiers: Tiers) -> int:
    """Programs for each KV head that :func:`store_tiers` may take.

    There are ``at_once`` large ones at most, which hold at least as many sixteenths of all blocks as the first tier has.
    What a tier leaves of a sequence, less than a share of its own and a block that it rounds down, goes to the last tier.
    """
    (most, _), (_, smallest) = tiers[0], tiers[-1]
    evenly = sum(-(-at_once * sixteenths * smaller // most) for sixteenths, smaller in tiers)
    return evenly + sequences * (1 + sum(smallest // smaller + 2 for _, smaller in tiers[:-1]))
