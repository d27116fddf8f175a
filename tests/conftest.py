"""What every test process starts with, before anything imports torch."""

from __future__ import annotations

import os

# One thread per process, subprocesses included: workers of `pytest -n 2` would otherwise each take every core, and
# threads that wait by spinning burn minutes of a machine that somebody else uses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
