"""Ranges and combinations that types cannot express; each failure names the key, its value and a fix."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvquant.config import Config, TaskConfig, require
from kvquant.errors import ConfigError
from kvquant.kernel_limits import TRITON_BITS, spec_refusal
from kvquant.spec import NUQ_FAMILY, QuantSpec

# Tasks whose figures are about quality: with exact reads a prompt's own keys and values would not be quantized.
QUALITY_TASKS = ("perplexity", "compare", "passkey", "ruler", "longbench", "lm_eval")
# Outlier indices are 16 bits, token*D + channel within a block and head: 1,024 tokens is the most at D = 64.
MAX_BLOCK_SIZE = 1024
BLOCK_SIZE_STEP = 32


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like ``word``, None when nothing is similar."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    fix = nearest(value, choices) or choices[0]
    require(value in choices, key, f"one of {', '.join(choices)}", value, fix)


def _at_least(key: str, value: float | None, low: float, fix: str, *, optional: bool = False) -> None:
    if optional:
        require(value is None or value >= low, key, f"{low} or more, or null", value, fix)
    else:
        require(value is not None and value >= low, key, f"{low} or more", value, fix)


def _check_known_keys(cfg: DictConfig) -> None:
    """Refuse keys added by force (``+a.b=1``): nobody would read them, and the run would look as if somebody had."""
    groups = {field.name for field in dataclasses.fields(Config)}
    for key in cfg:
        if key not in groups:
            close = nearest(str(key), groups)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(sorted(groups))}"
            raise ConfigError(f"unknown key {key!s}; {hint}")
        node = cfg[key]
        schema = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        if schema is None or not dataclasses.is_dataclass(schema):
            continue
        known = {field.name for field in dataclasses.fields(schema)}
        for name in set(node) - known:
            close = nearest(str(name), known)
            raise ConfigError(
                f"unknown key {key!s}.{name}; did you mean {key!s}.{close or sorted(known)[0]}?"
            )


def _check_model(model: Any) -> None:
    _one_of("model.dtype", model.dtype, ("auto", "float32", "bfloat16", "float16"))
    _at_least("model.max_length", model.max_length, 2, "null", optional=True)
    require(model.path != "", "model.path", "a checkpoint folder", "an empty string", "./models/my-model")


def _check_quant(quant: Any) -> None:
    try:
        spec = QuantSpec(**quant)
        # The default methods have nothing further to check, and theirs are the runs that must start at once.
        if spec.method not in (*NUQ_FAMILY, "none") or spec.options:
            from kvquant.methods import method_class

            method_class(spec.method).check(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_cache(cache: Any) -> None:
    size = cache.block_size
    packable = BLOCK_SIZE_STEP <= size <= MAX_BLOCK_SIZE and size % BLOCK_SIZE_STEP == 0
    nearest_size = min(max(round(size / 64) * 64, BLOCK_SIZE_STEP), MAX_BLOCK_SIZE)
    constraint = f"a multiple of {BLOCK_SIZE_STEP} from {BLOCK_SIZE_STEP} to {MAX_BLOCK_SIZE}"
    require(packable, "cache.block_size", constraint, size, str(nearest_size))
    _at_least("cache.num_blocks", cache.num_blocks, 1, "null", optional=True)
    budget = cache.memory_budget_gib
    require(budget is None or budget > 0, "cache.memory_budget_gib", "above 0, or null", budget, "null")
    if cache.num_blocks is not None and budget is not None:
        raise ConfigError(
            f"cache.num_blocks={cache.num_blocks} and cache.memory_budget_gib={budget} both size the pool; "
            "set one of them to null"
        )
    _at_least("cache.spill_headroom", cache.spill_headroom, 1, "2")
    _one_of("cache.prefill_reads", cache.prefill_reads, ("quantized", "exact"))


def _check_kernel(cfg: Any) -> None:
    _one_of("kernel.backend", cfg.kernel.backend, ("auto", "reference", "pytorch_fused", "triton"))
    if cfg.kernel.backend != "triton":
        return
    reason = "must run on an NVIDIA GPU, got device=cpu" if cfg.device == "cpu" else None
    reason = reason or _triton_refusal(QuantSpec(**cfg.quant), cfg.cache.block_size)
    others = (
        set(cfg.task.get("bits") or []) - set(TRITON_BITS)
        if cfg.task.name in ("kernels", "largest_batch", "energy")
        else ()
    )
    if reason is None and others:
        reason = (
            f"decodes codes of {', '.join(map(str, TRITON_BITS))} bits, got task.bits={list(cfg.task.bits)}"
        )
    if reason is not None:
        raise ConfigError(f"kernel.backend=triton {reason}; try kernel=pytorch_fused")
    if cfg.task.name == "compare":
        from kvquant.tasks.variants import expand

        for variant in expand(cfg.task.variants):
            reason = _triton_refusal(variant.spec, cfg.cache.block_size)
            if reason is not None:
                raise ConfigError(
                    f"kernel.backend=triton {reason}, in the row {variant.label} of task.variants; try kernel=auto, which "
                    "takes triton for the rows that it runs"
                )


def _triton_refusal(spec: QuantSpec, block_size: int) -> str | None:
    """Say why no Triton kernel reads what is stored by a spec, whatever the model; None: one does."""
    if spec.method not in (*NUQ_FAMILY, "none"):
        from kvquant.methods import method_class

        if method_class(spec.method).own_store:
            return f"reads the blocks of the nuq family, got quant={spec.method}"
    return spec_refusal(spec, block_size)


def _check_batch(batch: Any) -> None:
    _one_of("batch.kind", batch.kind, ("single", "uniform", "ragged", "trace"))
    _at_least("batch.num_prompts", batch.num_prompts, 1, "8")
    _at_least("batch.prompt_tokens", batch.prompt_tokens, 1, "512", optional=True)
    _at_least("batch.decode_tokens", batch.decode_tokens, 0, "64")
    fraction = batch.max_fraction_of_context
    require(0 < fraction <= 1, "batch.max_fraction_of_context", "above 0 and at most 1", fraction, "0.9")
    if batch.kind == "single":
        require(
            batch.num_prompts == 1,
            "batch.num_prompts",
            "1 with batch=single",
            batch.num_prompts,
            "batch=uniform",
        )
    if batch.kind in ("single", "uniform"):
        has_length = batch.prompt_tokens is not None
        require(has_length, "batch.prompt_tokens", f"given with batch={batch.kind}", "null", "512")
    if batch.kind == "ragged":
        _check_quantiles(list(batch.quantile_levels), list(batch.trace_quantiles))


def _check_quantiles(levels: list[float], lengths: list[int]) -> None:
    require(
        len(lengths) >= 1,
        "batch.trace_quantiles",
        "at least one length with batch=ragged",
        lengths,
        "[512,2048]",
    )
    require(
        len(levels) == len(lengths),
        "batch.quantile_levels",
        f"as many as batch.trace_quantiles ({len(lengths)})",
        len(levels),
        "giving both lists together",
    )
    rising = all(a < b for a, b in itertools.pairwise(levels))
    require(
        rising and min(levels) >= 0 and max(levels) <= 1,
        "batch.quantile_levels",
        "rising from 0 to 1",
        levels,
        "[0.5,0.99]",
    )
    growing = all(a <= b for a, b in itertools.pairwise(lengths))
    require(growing and min(lengths) >= 1, "batch.trace_quantiles", "growing from 1", lengths, "[512,2048]")


def _check_data(data: Any, calibration: Any) -> None:
    _one_of("data.name", data.name, ("stdlib", "wikitext2", "text_file"))
    _at_least("data.calibration_tokens", data.calibration_tokens, 16, "8192")
    _at_least("data.heldout_tokens", data.heldout_tokens, 2, "null", optional=True)
    _at_least("data.window", data.window, 2, "null", optional=True)
    _at_least("data.questions", data.questions, 1, "24")
    _at_least("calibration.tokens", calibration.tokens, 16, "8192")
    for key, length in (
        ("data.sequence_length", data.sequence_length),
        ("calibration.sequence_length", calibration.sequence_length),
    ):
        _at_least(key, length, 2, "null", optional=True)
    timeout_s = calibration.lock_timeout_s
    require(timeout_s > 0, "calibration.lock_timeout_s", "above 0 seconds", timeout_s, "1800")


def _check_surroundings(cfg: Any) -> None:
    _one_of("device", cfg.device, ("auto", "cpu", "cuda"))
    graph = bool(cfg.task.get("cuda_graph"))
    require(not (graph and cfg.device == "cpu"), "task.cuda_graph", "false with device=cpu", graph, "false")
    require(0 <= cfg.seed < 2**32, "seed", "0 to 4294967295", cfg.seed, "0")
    _at_least("sweep.points_per_job", cfg.sweep.points_per_job, 1, "1")
    _one_of("tracking.name", cfg.tracking.name, ("none", "wandb"))
    _one_of("tracking.mode", cfg.tracking.mode, ("offline", "online", "disabled"))
    _one_of("energy.meter", cfg.energy.meter, ("auto", "nvml", "rapl", "codecarbon", "constant", "none"))
    country = cfg.energy.country
    is_code = len(country) == 3 and country.isalpha() and country.isupper()
    require(is_code, "energy.country", "an ISO 3166 code of three capital letters", country, "POL")
    grams, pue = cfg.energy.g_per_kwh, cfg.energy.pue
    require(grams is None or grams >= 0, "energy.g_per_kwh", "0 or more, or null", grams, "null")
    require(pue >= 1, "energy.pue", "1 or more (1: the computer alone)", pue, "1.0")


def _check_report(report: Any) -> None:
    runs = [report.runs] if isinstance(report.runs, str) else report.runs
    named = isinstance(runs, Sequence) and bool(runs) and all(isinstance(r, str) and r for r in runs)
    require(named, "report.runs", "a folder, a glob or a list of them", report.runs, "multirun/*")
    require(report.paper_dir != "", "report.paper_dir", "a folder, or null", "nothing", "paper/generated")


def _check_task(cfg: Any) -> None:
    tasks = {task.name: task for task in TaskConfig.__subclasses__()}
    _one_of("task.name", cfg.task.name, tuple(tasks))
    tasks[cfg.task.name].check(cfg.task)
    if cfg.task.name == "quantize" and cfg.quant.method == "none":
        raise ConfigError("quant.method must quantize with task=quantize, got none; try quant=nuq")
    if cfg.task.name in ("kernels", "largest_batch") and cfg.quant.method not in NUQ_FAMILY:
        raise ConfigError(
            f"quant.method must be {', '.join(NUQ_FAMILY)} with task={cfg.task.name}, whose operations are theirs, got "
            f"{cfg.quant.method}; try quant=nuq"
        )
    if cfg.quant.method == "hf_quantized" and cfg.task.name not in ("perplexity", "compare"):
        raise ConfigError(
            f"quant.method must keep blocks with task={cfg.task.name}, got hf_quantized, which has a cache of its own; try "
            "task=perplexity or task=compare"
        )
    if cfg.task.name == "serve_trace":
        for key in ("num_blocks", "memory_budget_gib"):
            constraint = "null with task=serve_trace (both caches get the same bytes)"
            require(
                cfg.cache[key] is None, f"cache.{key}", constraint, cfg.cache[key], "task.memory_budget_gib"
            )
    if cfg.task.name in QUALITY_TASKS and cfg.cache.prefill_reads == "exact":
        raise ConfigError(
            f"cache.prefill_reads must be quantized with task={cfg.task.name}, got exact, which would show no "
            "difference at all; try cache.prefill_reads=quantized"
        )


def check_config(cfg: DictConfig) -> None:
    """Check a composed configuration (see `kvquant.config.validate`).

    Raises:
        ConfigError: the first setting that cannot work, with key, value and fix.
    """
    _check_known_keys(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} must be given: it has no default; try {missing[0]}=<value>")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the configuration'}: {str(error).splitlines()[0]}") from None
    _check_model(cfg.model)
    _check_quant(cfg.quant)
    _check_cache(cfg.cache)
    _check_kernel(cfg)
    _check_batch(cfg.batch)
    _check_data(cfg.data, cfg.calibration)
    _check_surroundings(cfg)
    _check_report(cfg.report)
    _check_task(cfg)
