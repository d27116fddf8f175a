"""When a window's joules may be published: every reason why not, in words."""

from __future__ import annotations

from collections.abc import Sequence

from kvquant.energy.traces import AVERAGED_S, MIN_MEANS
from kvquant.energy.windows import ESTIMATED, Window

MIN_WINDOW_S = 5.0
MIN_WINDOWS = 5
# An edge may be wrong by one tick: fifty of them keep that under 2%.
MIN_TICKS = 50
MAX_DISAGREEMENT_PERCENT = 5.0


def judged_field(window: Window) -> str | None:
    """Which field of polled power is held against the counter; None where none was polled.

    The average, where the device has one and the window is long enough for it: it covers all the time. Single
    readings see a quarter of it on A100 and H100 (arXiv 2312.02741), so that fifty of them are off by several percent
    by chance when the work's power varies; they are judged over all windows of a result (:func:`series_faults`).
    """
    if not window.polled_j:
        return None
    if window.duration_s >= MIN_MEANS * AVERAGED_S["average"] and "average" in window.polled_j:
        return "average"
    return min(window.polled_j, key=("instant", "unspecified", "average").index)


def disagreement_percent(window: Window) -> float | None:
    """How far polled power, integrated, is from the counter, by :func:`judged_field`; None without both."""
    field = judged_field(window)
    if field is None or window.energy_j is None or window.energy_j <= 0:
        return None
    return 100 * (window.polled_j[field] / window.energy_j - 1)


def disagreements_together(windows: Sequence[Window]) -> dict[str, float]:
    """Percent by which each field of polled power is off over all windows together, where all have it."""
    counted_j = sum(window.energy_j or 0.0 for window in windows)
    fields = set.intersection(*(set(window.polled_j) for window in windows)) if windows else set()
    if counted_j <= 0 or any(window.energy_j is None for window in windows):
        return {}
    return {f: 100 * (sum(w.polled_j[f] for w in windows) / counted_j - 1) for f in sorted(fields)}


def window_faults(window: Window, *, min_s: float = MIN_WINDOW_S) -> list[str]:
    """Return why a window is not valid; empty when it is."""
    faults = []
    if window.kind == ESTIMATED:
        faults.append(f"estimated, not measured ({window.source})")
    if window.failure is not None:
        faults.append(f"{type(window.failure).__name__}: {window.failure}")
    elif window.energy_j is None:
        faults.append("not metered")
    if window.duration_s < min_s:
        faults.append(f"window shorter than {min_s:g} s")
    if window.tick_s is not None and window.duration_s < MIN_TICKS * window.tick_s:
        faults.append(f"window shorter than {MIN_TICKS} ticks of the counter")
    apart = disagreement_percent(window)
    if apart is not None and abs(apart) > MAX_DISAGREEMENT_PERCENT:
        faults.append(f"integrated power more than {MAX_DISAGREEMENT_PERCENT:g}% from the counter")
    if window.state.get("invalid_slowdowns"):
        faults.append(f"the GPU slowed down: {', '.join(window.state['invalid_slowdowns'])}")
    if window.state.get("gpus_in_use", 1) > 1:
        faults.append("this process used several GPUs and one is metered")
    others = window.state.get("other_processes", 0)
    if others is None:
        faults.append("the driver does not tell whether other processes used the GPU")
    elif others > 0:
        faults.append("other processes used the GPU")
    return faults


def series_faults(windows: Sequence[Window], *, min_s: float = MIN_WINDOW_S, mig: bool = False) -> list[str]:
    """Return why windows of one kind do not make a result: what is wrong with any of them, and with all together."""
    faults = list(dict.fromkeys(f for window in windows for f in window_faults(window, min_s=min_s)))
    for field, percent in disagreements_together(windows).items():
        if abs(percent) > MAX_DISAGREEMENT_PERCENT:
            faults.append(
                f"integrated {field} power more than {MAX_DISAGREEMENT_PERCENT:g}% from the counter over all windows"
            )
    if len(windows) < MIN_WINDOWS:
        faults.append(f"fewer than {MIN_WINDOWS} windows")
    if mig:
        faults.append("the counter is that of a whole GPU cut into MIG slices")
    return faults
