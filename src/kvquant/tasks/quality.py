"""What quality tasks share: windows of a text, the model over one of them with any cache, and what differs.

Keys and values are always read as they are stored (``prefill_reads=exact`` is refused for these tasks): a prompt's own
tokens would otherwise be compared with themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration
from kvquant.errors import DataError
from kvquant.measure import compare_logits
from kvquant.methods import method_class
from kvquant.models import quantized_kv_cache
from kvquant.tasks.setup import Workbench


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of text.

    Attributes:
        token_ids: int64 [n].
        context: tokens at its start that are only read; the next ones are predicted.
    """

    token_ids: Tensor
    context: int

    @property
    def name(self) -> str:
        """The hash of what it holds."""
        digest = hashlib.sha256(self.token_ids.numpy().tobytes())
        digest.update(str(self.context).encode())
        return digest.hexdigest()[:16]


def windows_of(stream: Tensor, window: int, stride: int, text: str = "the held-out text") -> list[Window]:
    """Cut a stream into windows that together predict every token but the first, or the first of each.

    Args:
        stream: int64 [n].
        window: tokens of a window.
        stride: tokens that each window predicts; equal to ``window``: contiguous windows, each of which predicts all
            but its first token (KVQuant's protocol).
        text: what the stream comes from, for errors.

    Raises:
        DataError: fewer than 2 tokens, or less than one window.
    """
    if len(stream) < 2:
        raise DataError(f"{text} must hold at least 2 tokens, got {len(stream)}; choose a longer data.path")
    if len(stream) < window:
        raise DataError(
            f"{text} must hold a window of {window} tokens, got {len(stream)}; try task.window={len(stream)}, "
            "a larger task.max_tokens or a longer data.path"
        )
    out = [Window(stream[:window], 0)]
    end = window
    while end + 1 < len(stream):
        new_end = min(end + stride, len(stream))
        begin = max(0, new_end - window) if stride < window else end
        # Contiguous windows predict all but their first token; overlapping ones what the last did not reach.
        first = end - begin - 1 if stride < window else 0
        if new_end - begin >= 2:
            out.append(Window(stream[begin:new_end], first))
        end = new_end
    return out


@dataclasses.dataclass(frozen=True)
class CacheRun:
    """Logits of a call and the bytes that its sequences took.

    Attributes:
        logits: [rows, V].
        held_bytes: everything the cache held for them.
        elements: numbers of K and V stored.
    """

    logits: Tensor
    held_bytes: int
    elements: int


def run_cache(
    bench: Workbench, calibration: Calibration, batch: list[Tensor], logits: str | int = "all"
) -> CacheRun:
    """Read token sequences into a fresh cache; see :meth:`QuantizedCache.append` for ``logits``."""
    method = method_class(calibration.spec.method)
    if method.outside:
        held, elements, rows = 0, 0, []
        for ids in batch:
            part, part_bytes, part_elements = method.run(bench.model, calibration.spec, ids)  # type: ignore[attr-defined]
            rows.append(part if logits == "all" else part[-(1 if logits == "last" else int(logits)) :])
            held, elements = held + part_bytes, elements + part_elements
        return CacheRun(torch.cat(rows), held, elements)
    settings = bench.quality_settings([len(ids) for ids in batch])
    with quantized_kv_cache(bench.model, calibration) as kv:
        cache = kv.new_cache(max_sequences=len(batch), **settings)
        out = cache.append(batch, logits=logits)
        held = cache.bytes_held
        elements = round(8 * held / cache.effective_bits)
    return CacheRun(out, held, elements)


def compare_window(window: Window, exact: Tensor, run: CacheRun) -> dict[str, Any]:
    """Sums over the predicted tokens of one window: what every interval and every mean is made of.

    Args:
        window: the text.
        exact: logits with the exact cache, [n, V].
        run: the quantized cache's.

    Returns:
        ``n_tokens``, ``exact_nll_sum``, ``quantized_nll_sum`` and ``kl_sum`` (nats), ``flips`` (changed most likely
        tokens), ``held_bytes``, ``elements``.
    """
    rows = slice(window.context, len(window.token_ids) - 1)
    targets = window.token_ids[window.context + 1 :].to(exact.device)
    part = compare_logits(exact[rows], run.logits[rows].to(exact.device), targets)
    return {
        "n_tokens": len(part.kl),
        "exact_nll_sum": float(part.exact_nll.double().sum()),
        "quantized_nll_sum": float(part.quantized_nll.double().sum()),
        "kl_sum": float(part.kl.double().sum()),
        "flips": int((~part.agrees).sum()),
        "held_bytes": run.held_bytes,
        "elements": run.elements,
    }


def exact_logits(bench: Workbench, batch: list[Tensor], logits: str | int = "all") -> Tensor:
    """Logits with an exact cache, through the same attention."""
    from kvquant.calibration import exact_calibration

    return run_cache(bench, exact_calibration(bench.shape), batch, logits).logits
