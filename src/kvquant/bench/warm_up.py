"""Kernels compiled before they are measured, those of several widths at once.

A decode kernel takes Triton some ten seconds, nearly all of them in a compiler pass that other threads need not wait
for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kvquant.bench.stored import StoredHistory

log = logging.getLogger(__name__)


def compile_ahead(histories: Sequence[StoredHistory], new: Sequence[int], prefill_reads: str) -> None:
    """Run every operation once on each history, in a thread of its own.

    What fails beside others is tried again alone, since Triton does not promise to compile in several threads; what
    fails then is left to where it is measured, which reports it.

    Args:
        histories: short ones of at least two blocks; nothing stored yet.
        new: new tokens of each sequence in calls of attention; there is room for them.
        prefill_reads: see ``PrefillQuantizedAttention``.
    """
    threads = torch.get_num_threads()
    run = functools.partial(_run, new=new, prefill_reads=prefill_reads)
    try:
        with ThreadPoolExecutor(len(histories)) as pool:
            failed = [
                history for history, done in zip(histories, pool.map(run, histories), strict=True) if not done
            ]
        for history in failed:
            run(history)
    finally:
        torch.set_num_threads(threads)  # operations that set it for themselves have met others that did


def _run(history: StoredHistory, *, new: Sequence[int], prefill_reads: str) -> bool:
    try:
        with torch.no_grad():  # of each thread
            history.fill()
            read = history.quantizer.reader(history.store(0), backend=history.backend)
            attention = history.attention(prefill_reads)
            for count in new:
                step = history.pool.reserve(history.rows, [count] * len(history.rows))
                history.write(step)
                read(step.block_table[:, :1].long())
                keys, values = history.own(0, step)
                query = history.data.query(sum(step.lengths))
                attention.attend(query, keys, values, history.store(0), step, history.rope)
                history.pool.rollback()
    except Exception as error:  # whatever it is, measuring the same will raise it again
        log.info("compiling ahead failed: %s", error, exc_info=True)
        history.pool.rollback()
        return False
    return True
