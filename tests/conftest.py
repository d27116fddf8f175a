"""What every test process starts with, before anything imports torch."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

# One thread per process, subprocesses included: workers of `pytest -n 2` would otherwise each take every core, and
# threads that wait by spinning burn minutes of a machine that somebody else uses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# What may stand behind `pytest` for it to be the whole suite: how to report, and nothing about what to run or how.
REPORTING = re.compile(r"-q+|-v+|--durations=\d+|--tb=\w+")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes; a part, with -x, -s, --pdb or a marker, stays in one that can be watched."""
    given = config.invocation_params
    is_whole = given.dir == config.rootpath and all(REPORTING.fullmatch(str(arg)) for arg in given.args)
    is_worker = hasattr(config, "workerinput")
    if (
        not is_whole
        or is_worker
        or os.environ.get("PYTEST_ADDOPTS")
        or not config.pluginmanager.hasplugin("xdist")
    ):
        return
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) > 1:
        # Two whatever the machine: each takes up to 1.5 GB.
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Whole processes that take up to a minute go first: the other worker takes the short tests meanwhile."""
    items.sort(key=lambda item: "interpreter" not in item.name)
