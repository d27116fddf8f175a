"""Schemas of the tasks that ask what quantizing costs in quality."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from kvquant.config.checks import require
from kvquant.config.task_base import TaskConfig


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
