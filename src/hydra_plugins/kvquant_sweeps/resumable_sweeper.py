"""A sweeper whose points keep their folders: readable, addressed by what affects the result, resumable."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


@dataclasses.dataclass
class ResumableSweeperConf:
    """Settings of the sweeper: those of Hydra's basic one."""

    _target_: str = "hydra_plugins.kvquant_sweeps.resumable_sweeper.ResumableSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="resumable", node=ResumableSweeperConf, provider="kvquant"
)


class ResumableSweeper(BasicSweeper):  # type: ignore[misc]
    """Expands a grid as Hydra's basic sweeper does, and writes it down before anything is submitted.

    Everything is decided in `setup`, because a launcher reads ``hydra.sweep.dir`` when it is made.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Compose and check every point, find the sweep to resume, then make the launcher.

        Raises:
            ConfigError: a point cannot work, or the folder belongs to another sweep or another code version.
        """
        from kvquant.errors import ConfigError
        from kvquant.sweep_plan import open_sweep

        self.hydra_context, self.config = hydra_context, config
        points = self._points(list(config.hydra.overrides.task))
        explicit = any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)
        self._dir, self._sweep = open_sweep(
            Path(str(config.hydra.sweep.dir)),
            points,
            launcher=str(OmegaConf.select(config, "hydra.runtime.choices.hydra/launcher")),
            resume=config.sweep.resume,
            any_code=config.sweep.any_code,
            explicit_dir=explicit,
        )
        with open_dict(config):
            config.hydra.sweep.dir = str(self._dir)
        try:
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        except Exception as error:
            raise ConfigError(f"hydra.launcher: {' '.join(str(error).split())}") from error
        if config.sweep.points_per_job > 1 and not hasattr(self.launcher, "points_per_job"):
            raise ConfigError(
                f"sweep.points_per_job must be 1 with a launcher that starts no jobs, got {config.sweep.points_per_job}; "
                "try hydra/launcher=athena or hydra/launcher=local"
            )

    def _points(self, arguments: Sequence[str]) -> list[Any]:
        from kvquant.cli import CONFIG_NAME
        from kvquant.config import validate
        from kvquant.errors import ConfigError
        from kvquant.preflight import Composer, explain
        from kvquant.sweep_plan import apart, plan_points

        assert self.hydra_context is not None and self.config is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (expanded,) = self.split_arguments(overrides, None)
        composed: list[Any] = []
        for point, swept in zip(expanded, apart(expanded), strict=True):
            try:
                cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(point))
                with open_dict(cfg):
                    cfg.pop("hydra")
                validate(cfg)
            except ConfigError as error:
                where = f" (in the sweep's point {' '.join(swept)})" if swept else ""
                raise ConfigError(f"{error}{where}") from None
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(explain(Composer(CONFIG_NAME, None), error, overrides)) from None
            composed.append(OmegaConf.to_container(cfg, resolve=True))
        return plan_points(expanded, composed)

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the points without a result, wait, and print one table of them all.

        Raises:
            LaunchError: some points did not end well (exit code 1); the table names each.
        """
        from kvquant.sweep_plan import cut_off, finish_sweep, started_at, todo

        assert self.config is not None and self.launcher is not None
        settings = self.config.sweep
        self._dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self._dir / "multirun.yaml")
        self._sweep.save(self._dir)
        pending = todo(self._dir, self._sweep)
        returns, overhead_s, num_jobs = [], 0.0, 0
        size = self.max_batch_size or max(1, len(pending))
        for start in range(0, len(pending), size):
            batch = pending[start : start + size]
            while batch:
                before = {point.folder: started_at(self._dir, point) for point in batch}
                returns.append(self._launch(batch, start))
                overhead_s += getattr(self.launcher, "overhead_s", None) or 0.0
                num_jobs += getattr(self.launcher, "num_jobs", 0)
                packed = settings.points_per_job > 1 and not settings.detach
                batch = cut_off(self._dir, self._sweep, batch, before) if packed else []
        waited = num_jobs and not settings.detach
        self._sweep.overhead_s_per_job = overhead_s / num_jobs if waited else None
        finish_sweep(self._dir, self._sweep, detached=settings.detach)
        return returns

    def _launch(self, batch: list[Any], first: int) -> Any:
        """Launch points and write down the number of each one's job."""
        assert self.config is not None
        # Hydra's basic launcher ignores what ours read.
        launcher: Any = self.launcher

        def submitted(ids: dict[int, str]) -> None:
            for number, job_id in ids.items():
                batch[number - first].job_id, batch[number - first].ended = job_id, None
            self._sweep.save(self._dir)

        launcher.on_submit, launcher.detach = submitted, self.config.sweep.detach
        launcher.points_per_job = self.config.sweep.points_per_job
        launcher.run_dirs = [self._dir / point.folder for point in batch]
        jobs = [
            [*p.overrides, f"hydra.sweep.dir='{self._dir}'", f"hydra.sweep.subdir='{p.folder}'"]
            for p in batch
        ]
        return launcher.launch(jobs, initial_job_idx=first)
