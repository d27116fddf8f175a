"""Clocks, and what two sets of logits have in common."""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of logits compared at once: 512 rows of a 128K vocabulary are 256 MiB in fp32.
_ROWS = 512


class Stopwatch:
    """Adds up the wall-clock seconds of ``with`` blocks, the device's work included.

    Args:
        device: whose queue is waited for at both edges.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.total_s = 0.0
        self.laps = 0

    def _now_s(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self._start_s = self._now_s()
        return self

    def __exit__(self, *exc: object) -> None:
        self.total_s += self._now_s() - self._start_s
        self.laps += 1


@dataclasses.dataclass
class LogitComparison:
    """How a model with a quantized cache differs from itself with an exact one, over the same tokens.

    Attributes:
        exact_nll: negative log-likelihood of each next token, nats, fp32 [n].
        quantized_nll: the same with the quantized cache.
        kl: KL(exact || quantized) of each next-token distribution, nats, [n].
        agrees: whether both have the same most likely token, bool [n].
    """

    exact_nll: Tensor
    quantized_nll: Tensor
    kl: Tensor
    agrees: Tensor

    def metrics(self) -> dict[str, float]:
        """Means over all tokens; intervals are for who knows which tokens belong together."""
        n = len(self.kl)
        delta = (self.quantized_nll - self.exact_nll).double()
        exact_ppl = math.exp(self.exact_nll.double().mean())
        quantized_ppl = math.exp(self.quantized_nll.double().mean())
        return {
            "compared_tokens": n,
            "perplexity_exact": exact_ppl,
            "perplexity_quantized": quantized_ppl,
            "perplexity_difference": quantized_ppl - exact_ppl,
            "perplexity_excess_percent": 100 * (quantized_ppl / exact_ppl - 1),
            "nll_difference": float(delta.mean()),
            "kl_mean": float(self.kl.double().mean()),
            "kl_p99": float(torch.quantile(self.kl.double(), 0.99)),
            "top1_agreement": float(self.agrees.double().mean()),
        }


def compare_logits(exact: Tensor, quantized: Tensor, targets: Tensor) -> LogitComparison:
    """Compare next-token logits row by row.

    Args:
        exact: [n, V].
        quantized: [n, V].
        targets: the tokens that came next, int64 [n].
    """
    parts: list[list[Tensor]] = [[], [], [], []]
    for a, b, t in zip(exact.split(_ROWS), quantized.split(_ROWS), targets.split(_ROWS), strict=True):
        p, q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
        rows = (
            F.nll_loss(p, t, reduction="none"),
            F.nll_loss(q, t, reduction="none"),
            (p.exp() * (p - q)).sum(-1).clamp(min=0),  # rounding alone can make it negative
            a.argmax(-1) == b.argmax(-1),
        )
        for part, row in zip(parts, rows, strict=True):
            part.append(row.cpu())
    return LogitComparison(*(torch.cat(part) for part in parts))
