"""Peaks of allocation: temporaries count while they live, and what was there before the mark does not."""

from __future__ import annotations

import torch

from kvquant.peak_memory import PeakMemory

MIB = 1 << 20


def mib(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_peak_is_what_was_alive_at_once() -> None:
    with PeakMemory() as peak:
        first = mib(3)
        del first
        second = mib(2)
        third = torch.cat([second, second])
        del second, third
    assert peak.extra_bytes == 6 * MIB


def test_what_is_replaced_counts_once() -> None:
    with PeakMemory() as peak:
        grown = mib(5)
        peak.mark()
        grown = torch.cat([grown, mib(1)])
        del grown
    # The old one is alive until the new one, 6 MiB, is there; so is the appended one.
    assert peak.extra_bytes == 7 * MIB


def test_temporaries_inside_an_operation_count() -> None:
    x = torch.randn(1 << 18)
    with PeakMemory() as peak:
        torch.softmax(x.half(), 0)
    assert peak.extra_bytes >= 2 * 2 * x.numel()
