"""Comparing two sets of logits."""

from __future__ import annotations

import math

import pytest
import torch

from kvquant.measure import Stopwatch, compare_logits


def test_equal_logits_differ_in_nothing() -> None:
    logits, targets = torch.randn(600, 7), torch.randint(0, 7, (600,))
    metrics = compare_logits(logits, logits, targets).metrics()
    assert (
        metrics["kl_mean"] == 0 and metrics["top1_agreement"] == 1 and metrics["perplexity_difference"] == 0
    )
    expected = torch.nn.functional.cross_entropy(logits, targets).exp()
    assert metrics["perplexity_exact"] == pytest.approx(float(expected), rel=1e-5)


def test_a_known_pair() -> None:
    exact = torch.tensor([[0.75, 0.25]]).log()
    other = torch.tensor([[0.25, 0.75]]).log()
    comparison = compare_logits(exact, other, torch.tensor([0]))
    assert float(comparison.kl) == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), rel=1e-5)
    assert not comparison.agrees[0]
    assert comparison.metrics()["perplexity_excess_percent"] == pytest.approx(200, rel=1e-4)


def test_a_stopwatch_adds_up_also_through_exceptions() -> None:
    watch = Stopwatch()
    with watch:
        pass
    with pytest.raises(ValueError), watch:
        raise ValueError
    assert watch.laps == 2 and watch.total_s > 0
