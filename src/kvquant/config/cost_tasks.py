"""Schemas of the tasks that measure time, memory and energy."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from kvquant.bench.shapes import SHAPES
from kvquant.config.checks import require
from kvquant.config.task_base import TaskConfig


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


KERNEL_OPERATIONS = ("write_keys", "write_values", "dequantize", "decode", "prefill", "layer_share")
KERNEL_BASELINES = ("sdpa", "varlen", "flex", "flash_attn")


@dataclass
class KernelsTask(TaskConfig):
    """Time, bytes and rivals of each operation, by shape, length, batch and bits."""

    name: str = "kernels"
    operations: list[str] = field(default_factory=lambda: list(KERNEL_OPERATIONS))
    shapes: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    bits: list[int] = field(default_factory=lambda: [4, 3, 2])
    step_tokens: int | None = None
    ragged_context: int | None = None
    layer_tokens: list[int] = field(default_factory=list)
    write_tokens: int = 131072
    baselines: list[str] = field(default_factory=lambda: list(KERNEL_BASELINES))
    dtype: str = "bfloat16"
    graph: bool = True
    seconds: float = 0.2
    figures: bool = True

    @staticmethod
    def check(task: Any) -> None:
        """Names that exist, numbers that can be measured."""
        for key, known, fix in (
            ("operations", KERNEL_OPERATIONS, "[decode]"),
            ("shapes", tuple(SHAPES), "[llama31_8b]"),
            ("baselines", KERNEL_BASELINES, "[sdpa]"),
        ):
            named = set(task[key]) <= set(known) and len(set(task[key])) == len(task[key])
            require(named, f"task.{key}", f"of {', '.join(known)}, once each", list(task[key]), fix)
        require(bool(task.operations), "task.operations", "at least one operation", [], "[decode]")
        within = bool(task.bits) and all(1 <= b <= 8 for b in task.bits)
        require(within, "task.bits", "widths from 1 to 8", list(task.bits), "[4,3,2]")
        for key, fix in (("tokens", "[8192]"), ("batches", "[8]"), ("layer_tokens", "[8192]")):
            require(all(n >= 1 for n in task[key]), f"task.{key}", "1 or more each", list(task[key]), fix)
        step = task.step_tokens
        require(step is None or step >= 16, "task.step_tokens", "16 or more, or null", step, "4096")
        ragged = task.ragged_context
        require(ragged is None or ragged >= 0, "task.ragged_context", "0 or more, or null", ragged, "8192")
        require(task.write_tokens >= 1, "task.write_tokens", "1 or more", task.write_tokens, "131072")
        dtypes = ("bfloat16", "float16", "float32")
        require(task.dtype in dtypes, "task.dtype", f"one of {', '.join(dtypes)}", task.dtype, "bfloat16")
        require(task.seconds > 0, "task.seconds", "above 0", task.seconds, "0.2")


@dataclass
class HistoryTask(TaskConfig):
    """Peak extra memory and time of one prefilled chunk over histories of growing length."""

    name: str = "history"
    lengths: list[int] = field(default_factory=list)
    chunk_tokens: int = 512
    fill_tokens: int = 2048
    compare_up_to: int = 32768
    figures: bool = True

    @staticmethod
    def check(task: Any) -> None:
        """Lengths and pieces hold tokens."""
        lengths = list(task.lengths)
        some = bool(lengths) and min(lengths) >= 1 and len(set(lengths)) == len(lengths)
        require(some, "task.lengths", "1 or more each, once each", lengths, "[1024,32768]")
        for key, fix in (("chunk_tokens", "512"), ("fill_tokens", "2048")):
            require(task[key] >= 1, f"task.{key}", "1 or more", task[key], fix)
        require(task.compare_up_to >= 0, "task.compare_up_to", "0 or more", task.compare_up_to, "32768")


@dataclass
class LargestBatchTask(TaskConfig):
    """How many prompts a memory holds, by filling it: exact blocks against quantized ones."""

    name: str = "largest_batch"
    shape: str = "llama31_8b"
    layers: int = 32
    prompt_tokens: int = 16384
    bits: list[int] = field(default_factory=lambda: [4, 3, 2])
    memory_budget_gib: float | None = None
    memory_share: float = 0.9
    weights_gib: float = 15.0
    dtype: str = "bfloat16"

    @staticmethod
    def check(task: Any) -> None:
        """Shapes that exist, and some memory."""
        known = ", ".join(SHAPES)
        require(task.shape in SHAPES, "task.shape", f"one of {known}", task.shape, "llama31_8b")
        for key, low, fix in (("layers", 1, "32"), ("prompt_tokens", 2, "16384")):
            require(task[key] >= low, f"task.{key}", f"{low} or more", task[key], fix)
        bits = list(task.bits)
        within = bool(bits) and all(1 <= b <= 8 for b in bits) and len(set(bits)) == len(bits)
        require(within, "task.bits", "widths from 1 to 8, once each", bits, "[4,3,2]")
        budget, share = task.memory_budget_gib, task.memory_share
        require(budget is None or budget > 0, "task.memory_budget_gib", "above 0, or null", budget, "null")
        require(0 < share <= 1, "task.memory_share", "above 0 and at most 1", share, "0.9")
        require(task.weights_gib >= 0, "task.weights_gib", "0 or more", task.weights_gib, "15")
        dtypes = ("bfloat16", "float16", "float32")
        require(task.dtype in dtypes, "task.dtype", f"one of {', '.join(dtypes)}", task.dtype, "bfloat16")


@dataclass
class EnergyTask(TaskConfig):
    """Joules per token of prefill and decode, by method, batch and length, with their uncertainty."""

    name: str = "energy"
    phases: list[str] = field(default_factory=lambda: ["prefill", "decode"])
    bits: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    prompt_tokens: list[int] = field(default_factory=lambda: [512])
    decode_steps: int = 16
    cuda_graph: bool = False
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
class ServeTraceTask(TaskConfig):
    """Replay requests through continuous batching at one memory budget, quantized and not."""

    name: str = "serve_trace"
    num_requests: int = 128
    memory_budget_gib: float = 2**-7
    max_sequences: int = 64
    step_tokens: int = 1024
    spare_fraction: float = 0.02
    time_scale: float = 0.0
    mean_gap_s: float = 0.181
    generated_quantiles: list[int] = field(default_factory=list)
    figures: bool = True

    @staticmethod
    def check(task: Any) -> None:
        """A step must have a token for every sequence; lengths and times must be possible."""
        require(task.num_requests >= 1, "task.num_requests", "1 or more", task.num_requests, "128")
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
