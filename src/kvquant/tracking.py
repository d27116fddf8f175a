"""Experiment trackers beside result.json; a run never fails because tracking did."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells a tracker."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send numbers while the run goes on."""

    def finish(self, metrics: Mapping[str, Any], status: str) -> None:
        """Send the final numbers and close."""


class NoTracker:
    """Tracks nothing."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Do nothing."""

    def finish(self, metrics: Mapping[str, Any], status: str) -> None:
        """Do nothing."""


class WandbTracker:
    """Weights & Biases, writing locally unless told otherwise (``wandb sync`` sends it later).

    Args:
        settings: the ``tracking`` group: mode, project, entity, group.
        run_dir: folder of the run; wandb's files go below it.
        config: the resolved configuration.
    """

    def __init__(self, settings: Mapping[str, Any], *, run_dir: Path, config: Mapping[str, Any]) -> None:
        # Offline means that nothing is sent, wandb's own error reports included; on a node without internet their
        # retries would also hold up the end of the run.
        if settings["mode"] != "online":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            group=settings["group"],
            mode=settings["mode"],
            # A point of a sweep is called what its folder is called.
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            # Quiet: the run's own table is what a terminal should show. No code, no console: they are in the run dir.
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send numbers; a failure is logged and forgotten."""
        try:
            self._run.log(flatten(metrics), step=step)
        except Exception as error:
            log.warning("wandb did not take %d metrics: %s", len(metrics), error)

    def finish(self, metrics: Mapping[str, Any], status: str) -> None:
        """Send the final numbers and close; a failure is logged and forgotten."""
        try:
            self._run.summary.update({**flatten(metrics), "status": status})
            self._run.finish(exit_code=0 if status == "ok" else 1)
        except Exception as error:
            log.warning("wandb did not finish: %s", error)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested metrics into one level, ``a.b`` by ``a.b``."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def open_tracker(settings: Mapping[str, Any], *, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Return the tracker the configuration names; one that does not start is logged and replaced by none.

    Args:
        settings: the ``tracking`` group.
        run_dir: folder of the run.
        config: the resolved configuration.
    """
    if settings["name"] == "none":
        return NoTracker()
    try:
        return WandbTracker(settings, run_dir=run_dir, config=config)
    except Exception as error:
        log.warning("tracking=%s did not start, going on without: %s", settings["name"], error)
        return NoTracker()
