"""What every test process starts with, before anything imports torch."""

from __future__ import annotations

import os
from typing import Any

# One thread per process, subprocesses included: workers of `pytest -n 2` would otherwise each take every core, and
# threads that wait by spinning burn minutes of a machine that somebody else uses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Whole processes that take up to a minute go first: the other worker takes the short tests meanwhile."""
    items.sort(key=lambda item: "interpreter" not in item.name)
