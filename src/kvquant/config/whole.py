"""The whole configuration: its schema, its registration with Hydra, its checks."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from kvquant.config.groups import (
    BatchConfig,
    CacheConfig,
    CalibrationConfig,
    DataConfig,
    EnergyConfig,
    KernelConfig,
    ModelConfig,
    QuantConfig,
    ReportConfig,
    SweepConfig,
    TrackingConfig,
)
from kvquant.config.task_base import TaskConfig


@dataclass
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = MISSING
    quant: QuantConfig = MISSING
    cache: CacheConfig = MISSING
    kernel: KernelConfig = MISSING
    batch: BatchConfig = MISSING
    data: DataConfig = MISSING
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    task: TaskConfig = MISSING
    tracking: TrackingConfig = MISSING
    report: ReportConfig = MISSING
    sweep: SweepConfig = MISSING
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda


def register_schemas() -> None:
    """Make the schemas known to Hydra; calling it again changes nothing."""
    store = ConfigStore.instance()
    store.store(name="_schema", node=Config)
    groups: dict[str, Any] = {
        "model": ModelConfig,
        "quant": QuantConfig,
        "cache": CacheConfig,
        "kernel": KernelConfig,
        "batch": BatchConfig,
        "data": DataConfig,
        "tracking": TrackingConfig,
        "report": ReportConfig,
        "sweep": SweepConfig,
    }
    for group, schema in groups.items():
        store.store(group=group, name="_schema", node=schema)
    for task in TaskConfig.__subclasses__():
        store.store(group="task", name=f"_{task.name}", node=task)


def validate(cfg: DictConfig) -> None:
    """Check ranges and combinations of a composed configuration.

    Raises:
        ConfigError: the first setting that cannot work, with key, value and fix.
    """
    # Imported here because the checks know the schemas, not the other way round.
    from kvquant.validation import check_config

    check_config(cfg)
