"""``task=calibrate``: make (or find) the calibration alone, so that a sweep's jobs need not wait for each other."""

from __future__ import annotations

import time
from typing import Any

from kvquant.tasks.setup import open_workbench


def run(cfg: Any, context: Any) -> None:
    """Calibrate the configured model for the configured spec.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    start_s = time.perf_counter()
    calibration = bench.calibration(overwrite=cfg.task.overwrite)
    metrics = {
        "calibration_s": time.perf_counter() - start_s,
        "calibration_tokens": int(calibration.fingerprint.get("tokens", 0)),
        "found_on_disk": calibration.from_cache,
        "layers": len(calibration.quantizers),
    }
    context.record.metrics.update(metrics)
    context.record.set_table("calibration", ["what", "value"], [[k, str(v)] for k, v in metrics.items()])
