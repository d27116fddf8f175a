"""When a window's joules may be published: every reason why not, in words."""

from __future__ import annotations

from collections.abc import Sequence

from kvquant.energy.windows import ESTIMATED, Window

MIN_WINDOW_S = 5.0
MIN_WINDOWS = 5
# An edge may be wrong by one tick: fifty of them keep that under 2%.
MIN_TICKS = 50
MAX_DISAGREEMENT_PERCENT = 5.0


def disagreement_percent(window: Window) -> float | None:
    """How far polled power, integrated, is from the counter; None without both.

    The field of single readings is compared where there is one: an average over the last second lags behind.
    """
    if window.energy_j is None or not window.polled_j or window.energy_j <= 0:
        return None
    field = min(window.polled_j, key=("instant", "unspecified", "average").index)
    return 100 * (window.polled_j[field] / window.energy_j - 1)


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
    if window.state.get("other_processes"):
        faults.append("other processes used the GPU")
    return faults


def series_faults(windows: Sequence[Window], *, min_s: float = MIN_WINDOW_S, mig: bool = False) -> list[str]:
    """Return why windows of one kind do not make a result: what is wrong with any of them, and with all together."""
    faults = list(dict.fromkeys(f for window in windows for f in window_faults(window, min_s=min_s)))
    if len(windows) < MIN_WINDOWS:
        faults.append(f"fewer than {MIN_WINDOWS} windows")
    if mig:
        faults.append("the counter is that of a whole GPU cut into MIG slices")
    return faults
