"""Schemas of every configuration group; ranges and combinations are checked in `kvquant.validation`.

Values live in YAML under conf/; these dataclasses give them types, so that a misspelt key or a wrong type fails
while the configuration is composed, before torch is imported. A schema is the option ``_schema`` of its group,
or ``_<name>`` where each option of a group has fields of its own (tasks), and an option's file starts with
``defaults: [_schema, _self_]``. A field that some option requires (``path: ???``) defaults to MISSING here, because
a merge never lets ??? replace a value.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from kvquant.errors import ConfigError


def require(ok: bool, key: str, constraint: str, value: Any, fix: str) -> None:
    """Raise a ConfigError that states constraint, value and fix, unless ``ok``."""
    if not ok:
        raise ConfigError(f"{key} must be {constraint}, got {value}; try {fix}")


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
    any_code: bool = False


@dataclass
class ReportConfig:
    """Which run directories a report is made of."""

    runs: Any = MISSING  # a folder or glob, or a list of them


@dataclass
class TaskConfig:
    """What a run does; each task adds its fields in a subclass, and their ranges in `check`."""

    name: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """Raise a ConfigError for a field out of range; ``task`` is the composed node."""


@dataclass
class PrefillTask(TaskConfig):
    """The main job: prefill one batch with and without quantization, compare, decode."""

    name: str = "prefill"
    memory_budget_gib: float = 1.0
    repeats: int = 3
    figures: bool = True

    @staticmethod
    def check(task: Any) -> None:
        """Refuse empty measurements."""
        budget = task.memory_budget_gib
        require(budget > 0, "task.memory_budget_gib", "above 0", budget, "1.0")
        require(task.repeats >= 1, "task.repeats", "1 or more", task.repeats, "3")


@dataclass
class CalibrateTask(TaskConfig):
    """Compute (or find) the calibration alone, before a sweep."""

    name: str = "calibrate"
    overwrite: bool = False


def _check_windows(task: Any) -> None:
    """A window must hold a token and its history; a stride must not skip tokens."""
    window, stride = task.window, task.stride
    for name in ("max_tokens", "window"):
        value = task[name]
        require(value is None or value >= 2, f"task.{name}", "2 or more, or null", value, "null")
    require(stride is None or stride >= 1, "task.stride", "1 or more, or null", stride, "null")
    if window is not None and stride is not None:
        require(stride <= window, "task.stride", f"at most task.window={window}", stride, str(window // 2))
    require(task.part in ("all", "dev", "test"), "task.part", "all, dev or test", task.part, "all")
    require(task.block_windows >= 1, "task.block_windows", "1 or more", task.block_windows, "1")
    require(task.margin_nats > 0, "task.margin_nats", "above 0", task.margin_nats, "0.002")


@dataclass
class PerplexityTask(TaskConfig):
    """Perplexity of held-out text over a sliding window, quantized and not."""

    name: str = "perplexity"
    max_tokens: int | None = MISSING
    window: int | None = None
    stride: int | None = None
    part: str = "all"  # all, dev, test: every other held-out document
    block_windows: int = 1
    margin_nats: float = 0.002

    @staticmethod
    def check(task: Any) -> None:
        """Windows that predict every token once."""
        _check_windows(task)


@dataclass
class CompareTask(TaskConfig):
    """Many variants of the quant group over the same windows and pass keys, in one table with intervals."""

    name: str = "compare"
    variants: list[Any] = field(default_factory=list)
    baseline: list[str] = field(default_factory=list)
    max_tokens: int | None = MISSING
    window: int | None = None
    stride: int | None = None
    part: str = "all"
    block_windows: int = 1
    margin_nats: float = 0.002
    calibration_seeds: list[int] = field(default_factory=lambda: [0])
    passkeys: int = 24
    passkey_length: int = 1024
    batch_size: int = 8
    items_dir: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """Something to compare, windows that predict every token once."""
        _check_windows(task)
        require(
            len(task.variants) >= 1, "task.variants", "at least one row", "none", "[{option: nuq, bits: 3}]"
        )
        require(
            len(task.calibration_seeds) >= 1, "task.calibration_seeds", "at least one seed", "none", "[0]"
        )
        require(task.passkeys >= 0, "task.passkeys", "0 or more", task.passkeys, "24")
        require(task.batch_size >= 1, "task.batch_size", "1 or more", task.batch_size, "8")


@dataclass
class PasskeyTask(TaskConfig):
    """Pass keys and key-value look-ups hidden in real text, by length."""

    name: str = "passkey"
    kinds: list[str] = field(default_factory=lambda: ["passkey", "key_value"])
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024])
    count: int = 24
    batch_size: int = 8
    items_dir: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """At least one question of a kind that exists."""
        for kind in task.kinds:
            require(kind in ("passkey", "key_value"), "task.kinds", "passkey or key_value", kind, "passkey")
        ok = bool(task.lengths) and min(task.lengths) >= 1 and bool(task.kinds)
        require(ok, "task.lengths", "at least one length of 1 or more", list(task.lengths), "[1024]")
        require(task.count >= 1, "task.count", "1 or more", task.count, "24")
        require(task.batch_size >= 1, "task.batch_size", "1 or more", task.batch_size, "8")


_RULER = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")


@dataclass
class RulerTask(TaskConfig):
    """Retrieval in RULER's categories: generated at a length, or read from RULER's own files."""

    name: str = "ruler"
    categories: list[str] = field(default_factory=lambda: list(_RULER))
    length: int | None = 1024
    count: int = 20
    paths: list[str] = field(default_factory=list)
    batch_size: int = 8
    items_dir: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """Categories that exist."""
        require(bool(task.categories), "task.categories", "at least one", "none", "[niah_single]")
        for name in task.categories:
            require(name in _RULER, "task.categories", f"among {', '.join(_RULER)}", name, "niah_single")
        require(
            task.length is None or task.length >= 8, "task.length", "8 or more, or null", task.length, "1024"
        )
        require(task.count >= 1, "task.count", "1 or more", task.count, "20")
        require(task.batch_size >= 1, "task.batch_size", "1 or more", task.batch_size, "8")


@dataclass
class LongbenchTask(TaskConfig):
    """LongBench's English tasks from local jsonl files."""

    name: str = "longbench"
    path: str = MISSING
    suites: list[str] = field(default_factory=list)
    count: int | None = None
    batch_size: int = 4
    items_dir: str = MISSING

    @staticmethod
    def check(task: Any) -> None:
        """At least one suite."""
        require(bool(task.suites), "task.suites", "at least one", "none", "[hotpotqa]")
        require(task.count is None or task.count >= 1, "task.count", "1 or more, or null", task.count, "null")
        require(task.batch_size >= 1, "task.batch_size", "1 or more", task.batch_size, "4")


@dataclass
class LmEvalTask(TaskConfig):
    """Tasks of the lm-evaluation-harness."""

    name: str = "lm_eval"
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8

    @staticmethod
    def check(task: Any) -> None:
        """At least one task."""
        require(bool(task.tasks), "task.tasks", "at least one", "none", "[arc_easy]")
        require(task.limit is None or task.limit >= 1, "task.limit", "1 or more, or null", task.limit, "null")
        require(task.batch_size >= 1, "task.batch_size", "1 or more", task.batch_size, "8")


@dataclass
class GenerateTask(TaskConfig):
    """Continue a prompt from a quantized and from an exact cache, side by side."""

    name: str = "generate"
    prompt: str | None = None
    prompt_tokens: int = 256
    count: int = 1
    max_new_tokens: int = 128

    @staticmethod
    def check(task: Any) -> None:
        """A prompt of zero tokens has nothing to continue."""
        require(task.prompt != "", "task.prompt", "at least one token long", "an empty string", "null")
        for name, fix in (("max_new_tokens", "128"), ("prompt_tokens", "256"), ("count", "1")):
            require(task[name] >= 1, f"task.{name}", "1 or more", task[name], fix)


@dataclass
class AllocationTask(TaskConfig):
    """Cost of appending one token against growing tensors by concatenation."""

    name: str = "allocation"
    lengths: list[int] = field(default_factory=lambda: [1024, 8192, 32768, 131072])
    channels: int = 1024
    head_dim: int = 128
    repeats: int = 50

    @staticmethod
    def check(task: Any) -> None:
        """Channels are whole heads; a length is a number of stored tokens."""
        lengths, head_dim = list(task.lengths), task.head_dim
        require(bool(lengths) and min(lengths) >= 1, "task.lengths", "1 or more each", lengths, "[1024,8192]")
        require(head_dim >= 1, "task.head_dim", "1 or more", head_dim, "128")
        whole_heads = task.channels >= 1 and task.channels % head_dim == 0
        require(
            whole_heads, "task.channels", f"a multiple of task.head_dim={head_dim}", task.channels, "1024"
        )
        require(task.repeats >= 1, "task.repeats", "1 or more", task.repeats, "50")


@dataclass
class TrainStage:
    """A part of a training run: until which share of it, and what its sequences hold; the rest is plain text."""

    until: float = 1.0
    length: int = 512
    batch_tokens: int = 8192
    copy_share: float = 0.05
    retrieval_share: float = 0.15


@dataclass
class TrainTask(TaskConfig):
    """Train a small Llama on real text with retrieval mixed in, and leave it as a Hugging Face folder."""

    name: str = "train"
    work_dir: str | None = None
    model_dir: str | None = None
    text_paths: list[str] = field(default_factory=list)
    text_note: str | None = None
    stdlib_share: float = 0.25
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    context: int = 2048
    rope_theta: float = 10000.0
    stages: list[TrainStage] = field(default_factory=lambda: [TrainStage()])
    answer_weight: float = 4.0
    optimizer: str = "muon"  # muon, adamw
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    schedule: str = "wsd"  # wsd, cosine
    warmup_steps: int = 50
    decay_share: float = 0.4
    max_minutes: float | None = 80.0
    max_steps: int | None = None
    checkpoint_minutes: float = 5.0
    bfloat16: bool = True
    compile: bool = True
    heldout_texts: dict[str, str] = field(default_factory=dict)
    heldout_characters: int | None = 1_000_000

    @staticmethod
    def check(task: Any) -> None:
        """One budget, stages that fill it within the context, heads that group."""
        budgets = (task.max_minutes, task.max_steps)
        one_budget = budgets.count(None) == 1 and all(b is None or b > 0 for b in budgets)
        require(
            one_budget,
            "task.max_minutes",
            "the only budget, or null with task.max_steps",
            budgets,
            "[80, null]",
        )
        require(
            task.optimizer in ("muon", "adamw"), "task.optimizer", "muon or adamw", task.optimizer, "adamw"
        )
        require(task.schedule in ("wsd", "cosine"), "task.schedule", "wsd or cosine", task.schedule, "wsd")
        require(
            0 < task.decay_share <= 1, "task.decay_share", "above 0 and at most 1", task.decay_share, "0.4"
        )
        require(0 <= task.stdlib_share <= 1, "task.stdlib_share", "from 0 to 1", task.stdlib_share, "0.25")
        groups = task.num_kv_heads >= 1 and task.num_heads % task.num_kv_heads == 0
        require(
            groups,
            "task.num_kv_heads",
            f"a divisor of task.num_heads={task.num_heads}",
            task.num_kv_heads,
            "1",
        )
        # 256 bytes and the special tokens; ids are kept as 16 bits.
        require(258 < task.vocab_size <= 65536, "task.vocab_size", "259 to 65536", task.vocab_size, "4096")
        until = [stage.until for stage in task.stages]
        rising = bool(until) and until == sorted(until) and until[-1] == 1.0
        require(rising, "task.stages", "stages whose until rises to 1.0", until, "until: 1.0 in the last")
        for stage in task.stages:
            fits = 32 <= stage.length <= task.context
            require(
                fits,
                "task.stages",
                f"of length 32 to task.context={task.context}",
                stage.length,
                "a shorter one",
            )
            share = stage.copy_share + stage.retrieval_share
            require(
                0 <= share <= 1, "task.stages", "of shares that add up to 1 at most", share, "smaller shares"
            )


@dataclass
class QuantizeTask(TaskConfig):
    """Speed of quantizing into blocks and attending over them, against the usual ways."""

    name: str = "quantize"
    tokens: int = 8192
    channels: int = 4096
    repeats: int = 3
    lengths: list[int] = field(default_factory=list)
    length_channels: int = 1024
    decode_tokens: int = 0
    prefill_lengths: list[int] = field(default_factory=list)
    prefill_layers: int = 2

    @staticmethod
    def check(task: Any) -> None:
        """Channels are whole heads of 128."""
        require(task.tokens >= 1, "task.tokens", "1 or more", task.tokens, "2048")
        for key in ("channels", "length_channels"):
            whole_heads = task[key] >= 128 and task[key] % 128 == 0
            require(whole_heads, f"task.{key}", "a multiple of 128", task[key], "4096")
        for key in ("lengths", "prefill_lengths"):
            require(all(n >= 1 for n in task[key]), f"task.{key}", "1 or more each", task[key], "[1024]")
        require(task.decode_tokens != 1, "task.decode_tokens", "0, or 2 or more", task.decode_tokens, "8192")
        require(task.decode_tokens >= 0, "task.decode_tokens", "0, or 2 or more", task.decode_tokens, "8192")
        require(task.prefill_layers >= 1, "task.prefill_layers", "1 or more", task.prefill_layers, "2")
        require(task.repeats >= 1, "task.repeats", "1 or more", task.repeats, "5")


@dataclass
class EnergyTask(TaskConfig):
    """Joules per token of prefill and decode, by method, batch and length, with their uncertainty."""

    name: str = "energy"
    phases: list[str] = field(default_factory=lambda: ["prefill", "decode"])
    bits: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    prompt_tokens: list[int] = field(default_factory=lambda: [512])
    decode_steps: int = 16
    windows: int = 5
    window_s: float = 5.0
    cooldown_s: float = 60.0
    idle_s: float = 10.0
    warmup_s: float = 30.0
    load_check: bool = True
    load_size: int | None = None
    fleet_requests_per_day: int = 1_000_000
    fleet_levels: list[float] = field(default_factory=list)
    fleet_context_tokens: list[int] = field(default_factory=list)
    fleet_generated_tokens: list[int] = field(default_factory=list)

    @staticmethod
    def check(task: Any) -> None:
        """Ranges alone: windows too short or too few run, and are marked invalid in the result."""
        phases = list(task.phases)
        known = bool(phases) and set(phases) <= {"prefill", "decode"} and len(set(phases)) == len(phases)
        require(known, "task.phases", "prefill, decode or both, once each", phases, "[prefill,decode]")
        bits = list(task.bits)
        within = all(1 <= b <= 8 for b in bits) and len(set(bits)) == len(bits)
        require(within, "task.bits", "widths from 1 to 8, once each", bits, "[4,3,2]")
        for key, fix in (("batch_sizes", "[1,8]"), ("prompt_tokens", "[512]")):
            values = list(task[key])
            fits = bool(values) and min(values) >= 1 and len(set(values)) == len(values)
            require(fits, f"task.{key}", "1 or more each, once each", values, fix)
        for key, low, fix in (
            ("decode_steps", 1, "16"),
            ("windows", 2, "5"),
            ("fleet_requests_per_day", 1, "1000000"),
        ):
            require(task[key] >= low, f"task.{key}", f"{low} or more", task[key], fix)
        for key, fix in (("window_s", "5"), ("idle_s", "10"), ("warmup_s", "30")):
            require(task[key] > 0, f"task.{key}", "above 0 seconds", task[key], fix)
        require(task.cooldown_s >= 0, "task.cooldown_s", "0 seconds or more", task.cooldown_s, "60")
        size = task.load_size
        require(size is None or size >= 16, "task.load_size", "16 or more, or null", size, "null")
        levels = list(task.fleet_levels)
        rising = bool(levels) and all(a < b for a, b in itertools.pairwise(levels))
        inside = rising and min(levels) >= 0 and max(levels) <= 1
        require(inside, "task.fleet_levels", "rising from 0 to 1", levels, "[0.5,0.99]")
        for key in ("fleet_context_tokens", "fleet_generated_tokens"):
            count = len(task[key])
            require(
                count == len(levels),
                f"task.{key}",
                f"as long as task.fleet_levels ({len(levels)})",
                count,
                "giving all three lists together",
            )


@dataclass
class ReportTask(TaskConfig):
    """Collect run directories into tables and figures; its settings are the group ``report``."""

    name: str = "report"


@dataclass
class SlurmCheckTask(TaskConfig):
    """Check a cluster from its login node before the first sweep; submits nothing."""

    name: str = "slurm_check"
    points: int = 24
    minutes_per_point: float | None = None

    @staticmethod
    def check(task: Any) -> None:
        """A sweep has points, and each takes time."""
        require(task.points >= 1, "task.points", "1 or more", task.points, "24")
        minutes = task.minutes_per_point
        require(minutes is None or minutes > 0, "task.minutes_per_point", "above 0, or null", minutes, "null")


@dataclass
class ServeTraceTask(TaskConfig):
    """Replay requests through continuous batching at one memory budget, quantized and not."""

    name: str = "serve_trace"
    num_requests: int = 64
    memory_budget_gib: float = 2**-7
    max_sequences: int = 64
    step_tokens: int = 512
    spare_fraction: float = 0.02
    time_scale: float = 0.0
    mean_gap_s: float = 0.181
    generated_quantiles: list[int] = field(default_factory=list)
    figures: bool = True

    @staticmethod
    def check(task: Any) -> None:
        """A step must have a token for every sequence; lengths and times must be possible."""
        require(task.num_requests >= 1, "task.num_requests", "1 or more", task.num_requests, "64")
        budget = task.memory_budget_gib
        require(budget > 0, "task.memory_budget_gib", "above 0", budget, "0.0078125")
        require(task.max_sequences >= 1, "task.max_sequences", "1 or more", task.max_sequences, "64")
        most = task.max_sequences
        enough = task.step_tokens >= most
        require(
            enough, "task.step_tokens", f"at least task.max_sequences={most}", task.step_tokens, str(most)
        )
        spare = task.spare_fraction
        require(0 <= spare < 1, "task.spare_fraction", "at least 0 and below 1", spare, "0.02")
        require(task.time_scale >= 0, "task.time_scale", "0 or more", task.time_scale, "1.0")
        require(task.mean_gap_s >= 0, "task.mean_gap_s", "0 or more", task.mean_gap_s, "0.181")
        lengths = list(task.generated_quantiles)
        growing = bool(lengths) and lengths == sorted(lengths) and lengths[0] >= 1
        require(growing, "task.generated_quantiles", "growing from 1", lengths, "[54,601]")


# --- Further tasks go here: a dataclass <Name>Task(TaskConfig) with `name: str = "<name>"` and, for its ranges, a
# --- `check`; beside it conf/task/<name>.yaml starting with `defaults: [_<name>, _self_]`. Nothing else needs to
# --- change: every subclass of TaskConfig is registered below.


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
