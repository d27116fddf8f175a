"""Schemas of the tasks around measuring: calibration, training, reports, a look at a cluster."""

from dataclasses import dataclass, field
from typing import Any

from kvquant.config.checks import require
from kvquant.config.task_base import TaskConfig


@dataclass
class CalibrateTask(TaskConfig):
    """Compute (or find) the calibration alone, before a sweep."""

    name: str = "calibrate"
    overwrite: bool = False


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
