"""Python reads this at start when tests/slurm is on PYTHONPATH: what jobs do differently under test.

``kvquant.tasks.quantize`` becomes faults_task; ``kvquant.tasks.perplexity`` is the product's own, PERPLEXITY_ITEM_S
seconds slower per window, so that there is time to stop it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any


class SlowLoader(importlib.machinery.SourceFileLoader):
    """Loads the task and makes each of its windows wait."""

    def exec_module(self, module: Any) -> None:
        """Run the module as it is, then put a pause around what it does per window."""
        super().exec_module(module)
        compare_window, pause_s = module.compare_window, float(os.environ["PERPLEXITY_ITEM_S"])

        def slow(*args: Any) -> Any:
            time.sleep(pause_s)
            return compare_window(*args)

        module.compare_window = slow


class Finder(importlib.abc.MetaPathFinder):
    """Answers for two modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return where faults_task.py lies, or the real task with its slow loader."""
        if name == "kvquant.tasks.quantize":
            return importlib.util.spec_from_file_location(name, Path(__file__).with_name("faults_task.py"))
        if name == "kvquant.tasks.perplexity" and "PERPLEXITY_ITEM_S" in os.environ:
            file = str(Path(path[0]) / "perplexity.py")
            return importlib.util.spec_from_file_location(name, file, loader=SlowLoader(name, file))
        return None


sys.meta_path.insert(0, Finder())
