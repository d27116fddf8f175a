"""What reading a meter costs the work beside it, told apart from the noise of a machine that is not one's own.

Seconds with and without a meter differ by percents from one second to the next on a shared machine. A reading is short,
though: the repetitions that it falls on are compared with their neighbours, milliseconds away, and so are repetitions
halfway between two readings, as a placebo. The difference of the two is what a reading costs.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Callable, Sequence

from kvquant.energy.statistics import Interval, mean_interval

Span = tuple[float, float]
"""Start and end, seconds."""

# Repetitions on either side that say how long one takes here and now.
NEIGHBOURS = 12


def repetitions(work: Callable[[], None], seconds: float, now_s: Callable[[], float]) -> list[Span]:
    """Repeat ``work`` and note when each repetition began and ended."""
    marks = [now_s()]
    while marks[-1] - marks[0] < seconds:
        work()
        marks.append(now_s())
    return list(itertools.pairwise(marks))


def reading_cost(repeated: Sequence[Span], reads: Sequence[Span]) -> Interval | None:
    """Share of the work's time that readings cost, with its 95% interval; None for fewer than two readings.

    Args:
        repeated: repetitions of the work, back to back.
        reads: readings meanwhile, in order, further apart than ``2 * NEIGHBOURS`` repetitions last.
    """
    ends = [end for _, end in repeated]
    starts = [start for start, _ in repeated]
    touched = [False] * len(repeated)
    places = []
    for start, end in reads:
        # With the repetition after it, which may find its caches emptied.
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        places.append((first, last + 1))
        for i in range(first, min(last + 1, len(touched))):
            touched[i] = True
    excess = []
    for (first, last), (following, _) in itertools.pairwise(places):
        width = last - first
        between = (last + following - width) // 2
        real, placebo = (_excess(repeated, touched, at, at + width) for at in (first, between))
        if real is not None and placebo is not None:
            excess.append(real - placebo)
    per_read = mean_interval(excess)
    if per_read is None:
        return None
    rate = (len(reads) - 1) / (reads[-1][0] - reads[0][0])
    return Interval(per_read.value * rate, per_read.low * rate, per_read.high * rate, per_read.n)


def _excess(repeated: Sequence[Span], touched: Sequence[bool], first: int, last: int) -> float | None:
    """Seconds that repetitions took beyond as many of their untouched neighbours; None near the ends."""
    if first < NEIGHBOURS or last + NEIGHBOURS > len(repeated):
        return None
    around = [*range(first - NEIGHBOURS, first), *range(last, last + NEIGHBOURS)]
    usual = [end - start for start, end in (repeated[i] for i in around if not touched[i])]
    if len(usual) < NEIGHBOURS:
        return None
    return sum(end - start for start, end in repeated[first:last]) - (last - first) * statistics.median(usual)
