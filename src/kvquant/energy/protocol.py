"""How energy is measured: cool down, idle, then windows filled with repeated work in a counterbalanced random order."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvquant.energy.validity import MIN_TICKS, MIN_WINDOW_S
from kvquant.energy.windows import Meter, Window

# Two idle pieces this close together are a stable idle.
STABLE_PERCENT = 2.0
IDLE_PIECE_S = 2.0
# Windows start at any phase of the counter and of the power reading, which samples a quarter of the time on A100 and
# H100 (arXiv 2312.02741): a tenth of a second covers their periods.
MAX_PHASE_DELAY_S = 0.1
# How well a counter's tick is known.
TICK_MARGIN = 1.02
_T = TypeVar("_T")
Sleep = Callable[[float], None]


@dataclasses.dataclass
class Idle:
    """What the machine draws when it waits, the model loaded.

    Attributes:
        power_w: None where nothing meters.
        cooldown_s: how long it took to get there.
        stable: whether the last two pieces of the cooldown agreed.
        window: the idle window itself.
    """

    power_w: float | None
    cooldown_s: float
    stable: bool
    window: Window


def long_enough_s(meter: Meter, asked_s: float) -> float:
    """``asked_s``, or what a valid window takes where a counter's slow tick makes that a little more.

    A length that no tick could make valid stays: it was asked for knowing that its result will be marked.
    """
    if asked_s < MIN_WINDOW_S:
        return asked_s
    return max(asked_s, TICK_MARGIN * MIN_TICKS * meter.tick_s)


def measure_idle(meter: Meter, *, cooldown_s: float, idle_s: float, sleep: Sleep = time.sleep) -> Idle:
    """Wait until idle power is stable, then measure it.

    Args:
        meter: reads it.
        cooldown_s: longest wait.
        idle_s: length of the window.
        sleep: waits; a replay advances its clock instead.
    """
    start_s, before_w, stable = meter.now_s(), None, False
    while meter.now_s() - start_s < cooldown_s and not stable:
        with meter.window("cooldown") as piece:
            sleep(IDLE_PIECE_S)
        if piece.energy_j is None:
            break
        power_w = piece.energy_j / piece.duration_s
        stable = before_w is not None and abs(power_w - before_w) <= STABLE_PERCENT / 100 * before_w
        before_w = power_w
    waited_s = meter.now_s() - start_s
    with meter.window("idle") as window:
        sleep(long_enough_s(meter, idle_s))
    power = None if window.energy_j is None else window.energy_j / window.duration_s
    return Idle(power, waited_s, stable, window)


@dataclasses.dataclass
class FilledWindow:
    """A window, how often the work fitted into it, and the idle power of the process it was measured in, if known."""

    window: Window
    repetitions: int
    idle_w: float | None = None


def fill_window(
    meter: Meter,
    name: str,
    work: Callable[[], None],
    *,
    window_s: float,
    delay_s: float = 0.0,
    sleep: Sleep = time.sleep,
) -> FilledWindow:
    """Repeat ``work`` until at least ``window_s`` have passed, inside one window.

    Args:
        meter: measures it.
        name: the window's key.
        work: one repetition; it must have waited for its device now and then, or the clock runs ahead of it.
        window_s: the least length, seconds.
        delay_s: wait before, so that windows meet the counter at any phase.
        sleep: waits; a replay advances its clock instead.
    """
    if delay_s > 0:
        sleep(delay_s)
    repetitions = 0
    with meter.window(name) as window:
        start_s, least_s = meter.now_s(), long_enough_s(meter, window_s)
        while repetitions == 0 or meter.now_s() - start_s < least_s:
            work()
            repetitions += 1
    return FilledWindow(window, repetitions)


def counterbalanced_rounds(variants: Sequence[_T], rounds: int, rng: random.Random) -> list[list[_T]]:
    """Orders of ``variants``, one per round: random, each second one the reverse of the one before (ABBA).

    A drift that is linear over two rounds hits all variants alike.
    """
    out: list[list[_T]] = []
    for index in range(rounds):
        if index % 2 == 0:
            out.append(rng.sample(list(variants), len(variants)))
        else:
            out.append(out[-1][::-1])
    return out
