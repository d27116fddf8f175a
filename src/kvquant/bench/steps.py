"""Where the time of a long run goes: each step's seconds, logged as it ends and kept for its result."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)


class Steps:
    """Seconds of steps, in order.

    Args:
        wait: called at a step's end, so that what it gave a device to do counts as its own.

    Attributes:
        taken: name, seconds, and seconds from the first step's start to the end of each.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait, self._start_s = wait, time.perf_counter()
        self.taken: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what happens inside, whether it succeeds or not; steps may contain each other."""
        start_s = time.perf_counter()
        try:
            yield
            self._wait()
        finally:
            end_s = time.perf_counter()
            seconds, at = round(end_s - start_s, 3), round(end_s - self._start_s, 3)
            self.taken.append({"step": name, "seconds": seconds, "at_s": at})
            log.info("%.1f s: %s took %.1f s", at, name, seconds)
