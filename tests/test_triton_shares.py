"""How the blocks of a batch are shared among the programs of a decode call: each once, none too many, evenly.

Triton's interpreter must be chosen before triton is imported: the cases run in a process of their own (this file as a
script), and compiled on a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from interpreter import interpret

FEWEST_BLOCKS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    programs: int
    block_size: int = 64
    window: int | None = None
    sink_tokens: int = 0
    at_once: int = 1 << 20


CASES = {
    "a program each": Case((1, 64, 65, 1000), 4),
    "ragged": Case((32768, 300, 16384, 512, 4096, 1024), 99),
    "one length": Case((2048,) * 8, 24),
    "one sequence, more programs than blocks": Case((130,), 70),
    "more than 64 programs for one": Case((64 * 200, 5), 150),
    "a window": Case((9, 4000, 1100, 700), 31, window=1000),
    "sinks": Case((2, 65, 640, 129), 9, block_size=32, sink_tokens=40),
    "more sequences than lengths looked at once": Case(tuple(range(1, 700, 7)), 130, block_size=16),
    "nothing but sinks": Case((2, 30), 4, sink_tokens=64),
    "nothing stored beside": Case((0, 130, 0), 5),
    "more programs than at once": Case((1000, 130, 70, 4), 64, at_once=6),
    "enough for a few blocks each": Case((64 * 40, 64 * 5), 45, at_once=20),
}

TIERS = {
    "one length": Case((2048,) * 8, 1 << 10, at_once=20),
    "ragged": Case((32768, 300, 16384, 512, 4096, 1024), 1 << 10, at_once=40),
    "few blocks": Case((2048, 70, 1), 1 << 10, at_once=198),
    "a large one for each": Case((64 * 21, 64 * 20, 1), 1 << 10, at_once=4),
    "a window": Case((9, 40000, 11000, 700), 1 << 10, window=10000, at_once=10),
    "nothing stored beside": Case((0, 13000, 0), 1 << 10, at_once=5),
}
SIZES = ((12, 1), (2, 3), (2, 6))  # of a large one, a third and a sixth


def check_tiers(case: Case, device: str) -> None:
    from kvquant.kernels.triton_kernels.shares import programs_of_tiers, share_blocks

    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    made = share_blocks(
        lengths, case.programs, case.block_size, at_once=case.at_once, fewest_blocks=FEWEST_BLOCKS,
        window=case.window, sink_tokens=case.sink_tokens, tiers=SIZES,
    )  # fmt: skip
    shares, parts = (x.tolist() for x in made)
    zero, used = parts.pop()
    assert zero == 0 and used <= programs_of_tiers(len(case.lengths), case.at_once, SIZES)
    by_part = {row[3]: row for row in shares[:used]}
    assert sorted(by_part) == list(range(used))
    every = 0
    for b, (length, (first, count)) in enumerate(zip(case.lengths, parts, strict=True)):
        rows = [by_part[part] for part in range(first, first + count)]
        assert all(row[0] == b and row[2] > row[1] for row in rows)
        seen = 0 if case.window is None else max(0, length - case.window) // case.block_size
        found = [column for _, begin, end, _ in rows for column in range(begin, end)]
        assert found == list(range(seen, -(-length // case.block_size)))
        every += len(found)
    sizes = [end - begin for _, begin, end, _ in shares[:used]]
    large, fewest = -(-12 * every // (16 * case.at_once)), FEWEST_BLOCKS
    if large < 12:  # all of one size
        large = fewest = max(1, -(-every // case.at_once))
    allowed = [min(large, max(-(-large // smaller), fewest)) for _, smaller in SIZES]
    # In the order in which they are taken, each size is one of these, but for the last share of a sequence.
    assert sizes[: sizes.count(large)] == [large] * sizes.count(large)
    rests = [size for size in sizes if size not in allowed]
    assert len(rests) <= len(case.lengths) and all(size < allowed[-1] for size in rests)
    assert [size for size in sizes if size in allowed] == sorted(
        (s for s in sizes if s in allowed), reverse=True
    )
    assert allowed[0] == allowed[-1] or sizes.count(large) <= case.at_once
    # Tiers have what they are for, less than a share of each sequence beside.
    for (sixteenths, _), size in zip(SIZES[:-1], allowed[:-1], strict=True):
        if allowed.count(size) == 1:
            assert abs(sizes.count(size) * size - every * sixteenths / 16) <= len(case.lengths) * (size + 1)


def check(case: Case, device: str) -> None:
    from kvquant.kernels.triton_kernels.shares import share_blocks

    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    made = share_blocks(
        lengths, case.programs, case.block_size, at_once=case.at_once, fewest_blocks=FEWEST_BLOCKS,
        window=case.window, sink_tokens=case.sink_tokens,
    )  # fmt: skip
    shares, parts = (x.tolist() for x in made)
    visible = []
    for length in case.lengths:
        first = max(min(length, case.sink_tokens), 0 if case.window is None else length - case.window)
        visible.append(range(first // case.block_size, -(-length // case.block_size)))
    zero, expected = parts.pop()
    assert zero == 0  # from which a kernel counts
    used = 0
    for b, (first, count) in enumerate(parts):
        rows = shares[first : first + count]
        assert all(row[0] == b for row in rows)
        assert [row[3] for row in rows] == list(range(first, first + count))
        assert [column for _, begin, end, _ in rows for column in range(begin, end)] == list(visible[b])
        assert all(end > begin for _, begin, end, _ in rows)
        used += count
    assert used == expected <= case.programs
    assert all(row[1] == row[2] for row in shares[used:])
    sizes = [end - begin for _, begin, end, _ in shares[:used]]
    # The largest go first, the last one of a sequence alone may be smaller.
    leaders = sorted((first, shares[first][2] - shares[first][1]) for first, count in parts if count)
    assert [size for _, size in leaders] == sorted((size for _, size in leaders), reverse=True)
    # With one block less for each program there would not be enough of them, or they would not be worth a start.
    largest = max(sizes, default=1)
    worth = min(FEWEST_BLOCKS, -(-sum(map(len, visible)) // case.at_once))
    assert largest <= max(1, worth) or sum(-(-len(v) // (largest - 1)) for v in visible) > case.programs
    assert max(map(len, visible)) < worth or largest >= worth


def test_every_block_has_one_program_and_large_shares_go_first_in_the_interpreter() -> None:
    interpret(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_block_has_one_program_on_a_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", TIERS.values(), ids=TIERS)
def test_large_shares_go_first_on_a_gpu(case: Case) -> None:
    check_tiers(case, "cuda")


def test_programs_fill_whole_rounds_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kvquant.kernels.triton_kernels.shares import places_of, programs_for

    class Device:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device())
    places = places_of(6, torch.device("cuda"))
    assert places == 792
    # Sequences, KV heads and columns to rounds: none with less than three blocks a program, four at most.
    for sequences, heads, columns, rounds in (
        (8, 8, 512, 4),
        (32, 8, 32, 3),
        (1, 8, 512, 1),
        (8, 8, 32, 1),
    ):
        programs = programs_for(sequences, heads, columns, places, FEWEST_BLOCKS)
        even = programs // sequences * sequences * heads
        assert 0.9 * rounds * places <= even <= rounds * places
    # Never more than blocks, never less than sequences.
    assert programs_for(2, 8, 3, places, FEWEST_BLOCKS) == 6
    assert 2 * 4096 <= programs_for(4096, 8, 512, places, FEWEST_BLOCKS) < 3 * 4096


if __name__ == "__main__":
    for name, one in CASES.items():
        print(name)
        check(one, "cpu")
    for name, one in TIERS.items():
        print("tiers:", name)
        check_tiers(one, "cpu")
