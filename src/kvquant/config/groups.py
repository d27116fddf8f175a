"""Schemas of the configuration groups that every task shares."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """A causal language model, loaded through transformers' Auto classes."""

    name: str = MISSING
    path: str | None = MISSING  # None: the model shipped with the package
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    device_map: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    max_length: int | None = None


@dataclass
class QuantConfig:
    """How keys and values are stored; the fields of `kvquant.spec.QuantSpec`."""

    method: str = MISSING
    bits: int = 3
    key_bits: int | None = None
    value_bits: int | None = None
    outlier_fraction: float = 0.01
    value_outlier_fraction: float | None = None
    sink_tokens: int = 0
    value_groups: int = 1
    fisher_weight: str = "fisher"
    qnorm: bool = False
    key_outliers: str = "channel"
    sink_rule: str = "position"
    recent_tokens: int = 0
    logit_bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # the method's own; its file says which


@dataclass
class CacheConfig:
    """The block pool and what attention reads from it."""

    block_size: int = 64
    num_blocks: int | None = None
    memory_budget_gib: float | None = None
    prefill_reads: str = "quantized"  # quantized, exact
    spill_headroom: float = 2.0


@dataclass
class KernelConfig:
    """Which implementation of the kernels runs."""

    backend: str = MISSING


@dataclass
class BatchConfig:
    """The shape of a batch of prompts: how many, how long, how many tokens follow."""

    kind: str = MISSING  # single, uniform, ragged, trace
    num_prompts: int = 8
    prompt_tokens: int | None = None
    quantile_levels: list[float] = field(default_factory=list)
    trace_quantiles: list[int] = field(default_factory=list)
    trace_path: str | None = MISSING
    decode_tokens: int = 64
    max_fraction_of_context: float = 0.9


@dataclass
class DataConfig:
    """A text corpus and how much of it calibrates."""

    name: str = MISSING
    path: str | None = MISSING
    calibration_tokens: int = 8192
    sequence_length: int | None = None
    heldout_tokens: int | None = 16384
    window: int | None = None
    questions: int = 24


@dataclass
class CalibrationConfig:
    """Where calibrations are kept and how they are made."""

    dir: str = MISSING
    tokens: int = MISSING
    sequence_length: int | None = MISSING
    lock_timeout_s: float = 1800.0


@dataclass
class EnergyConfig:
    """Which meter reads joules and whose grid turns them into CO2."""

    meter: str = "auto"  # auto, nvml, rapl, codecarbon, constant, none
    country: str = "POL"
    g_per_kwh: float | None = None
    pue: float = 1.0


@dataclass
class TrackingConfig:
    """An experiment tracker beside result.json."""

    name: str = MISSING  # none, wandb
    mode: str = "offline"
    project: str = "kvquant"
    entity: str | None = None
    group: str | None = None


@dataclass
class SweepConfig:
    """What a sweep does beside running its points."""

    resume: bool = False
    detach: bool = False
    points_per_job: int = 1
    any_code: bool = False


@dataclass
class ReportConfig:
    """Which run directories a report is made of."""

    runs: Any = MISSING  # a folder or glob, or a list of them
    paper_dir: str | None = None
