"""``task=serve_trace``: how many requests a memory budget serves at once, with the quantized and the exact cache.

Both caches get the same bytes and the same rules: first come, first served, admitted by blocks, the newest preempted
when blocks run out, finished sequences gone at once. Times are those of this machine; idle time is skipped.

How many sequences a budget holds shows only while memory is what binds: ``memory_bound_steps`` counts the steps at
which blocks alone kept others waiting. The defaults see to it for both caches, by settings that neither can profit
from alone: all requests are there at the start, there are several times as many as the larger cache holds, and a step
takes a few prompts (with 256 tokens a step, the first of them would be answered before the larger cache is full).
``held_max`` is the largest number, which short requests that happen to meet raise for the smaller cache more than for
the larger; ``held_mean_memory_bound`` is the mean over those steps.

An item is the replay for one cache: requests share steps and blocks, so a replay that was cut short begins anew.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from rich.progress import Progress

from kvquant.calibration import Calibration, exact_calibration
from kvquant.data.prompts import cut_prompts
from kvquant.data.requests import request_shapes
from kvquant.models import QuantizedCache, quantized_kv_cache
from kvquant.report.serve_figures import draw_serve_figure, serve_curves
from kvquant.serving.replay import Replay, Request, replay
from kvquant.serving.scheduler import AdmissionRules
from kvquant.tasks.serve_table import serve_table
from kvquant.tasks.setup import Workbench, open_workbench

EXACT, QUANTIZED = "exact", "quantized"
PERCENTILES = (50, 90, 99)


def run(cfg: Any, context: Any) -> None:
    """Replay one list of requests against both caches, one after the other.

    Args:
        cfg: the composed configuration; the settings are those of ``ServeTraceTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    requests = _requests(bench)
    rules = AdmissionRules(cfg.task.max_sequences, cfg.task.step_tokens, cfg.task.spare_fraction)
    variants = {EXACT: exact_calibration(bench.shape), QUANTIZED: bench.calibration()}
    metrics, meter = context.record.metrics, context.meter
    metrics["requests"] = {
        "count": len(requests),
        "prompt_tokens": sum(len(r.prompt) for r in requests),
        "new_tokens": sum(r.new_tokens for r in requests),
        "longest_tokens": max(len(r.prompt) + r.new_tokens for r in requests),
        "last_arrival_s": requests[-1].arrival_s,
    }
    metrics["rules"] = dataclasses.asdict(rules)
    with Progress(console=context.console, transient=True) as progress:

        def measure(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            with quantized_kv_cache(bench.model, variants[name]) as kv:
                # Code that runs for the first time is slow, and only the first cache would pay for it.
                replay(_new_cache(bench, kv, rules), [_short(r) for r in requests[:2]], rules)
                cache = _new_cache(bench, kv, rules)
                bar = progress.add_task(f"serving, {name} cache", total=len(requests))
                with meter.window("serve") as window:
                    result = replay(
                        cache, requests, rules, on_finish=functools.partial(progress.advance, bar)
                    )
                measured = {
                    **_memory(cache, variants[name]),
                    **_served(result, requests),
                    **window.as_metrics(),
                }
            return measured, serve_curves(result)

        replays = dict(zip(variants, context.items.run(variants, measure), strict=True))
    metrics.update({name: item.values for name, item in replays.items()})
    metrics["concurrency_ratio"] = _ratio(metrics, "held_mean_memory_bound")
    metrics["concurrency_max_ratio"] = _ratio(metrics, "held_max")
    context.record.set_table(*serve_table(metrics, cfg))
    if cfg.task.figures:
        context.record.add_figure(
            draw_serve_figure(
                {name: item.arrays for name, item in replays.items()}, context.run_dir / "serving.png"
            )
        )


def _requests(bench: Workbench) -> list[Request]:
    shapes = request_shapes(bench.cfg.batch, bench.cfg.task, bench.context, bench.cfg.seed)
    lengths = [shape.prompt_tokens for shape in shapes]
    prompts = cut_prompts(bench.heldout(sum(lengths)), lengths)
    return [
        Request(shape.arrival_s, prompt, shape.new_tokens)
        for shape, prompt in zip(shapes, prompts, strict=True)
    ]


def _short(request: Request) -> Request:
    return Request(0.0, request.prompt[:64], min(4, request.new_tokens))


def _new_cache(bench: Workbench, kv: Any, rules: AdmissionRules) -> QuantizedCache:
    settings = {**bench.cache_settings(), "memory_budget_gib": bench.cfg.task.memory_budget_gib}
    cache: QuantizedCache = kv.new_cache(
        max_sequences=rules.max_sequences, call_tokens=rules.step_tokens, **settings
    )
    return cache


def _memory(cache: QuantizedCache, calibration: Calibration) -> dict[str, Any]:
    """What the budget bought, and what is left in the pool when everybody has gone."""
    return {
        "method": calibration.spec.method,
        "pool_bytes": sum(pool.bytes_total for pool in cache.pools),
        "num_blocks": [pool.num_blocks for pool in cache.pools],
        "blocks_left": sum(pool.blocks_in_use for pool in cache.pools),
        "chunks_left": sum(
            pool.num_chunks * pool.layout.num_layers - int(pool.spill_top.sum()) for pool in cache.pools
        ),
        "sequences_left": len(cache.rows),
    }


def _served(result: Replay, requests: list[Request]) -> dict[str, Any]:
    outcomes, steps = result.outcomes, result.steps
    finished = [outcome.number for outcome in outcomes]
    asked = {i: request.new_tokens for i, request in enumerate(requests)}
    duration = np.array([step.duration_s for step in steps])
    held = np.array([step.held for step in steps])
    # While blocks keep somebody waiting, as many sequences are held as the budget allows.
    full = np.array([step.memory_bound for step in steps])
    gaps = np.concatenate([np.diff(outcome.token_s) for outcome in outcomes])
    ttft = np.array([outcome.ttft_s for outcome in outcomes])
    end_s, busy_s = steps[-1].end_s, float(duration.sum())
    new_tokens = sum(len(outcome.tokens) for outcome in outcomes)
    return {
        "finished": len(set(finished)),
        "lost": len(set(asked) - set(finished)),
        "duplicated": len(finished) - len(set(finished)),
        "wrong_token_count": sum(len(outcome.tokens) != asked[outcome.number] for outcome in outcomes),
        "steps": len(steps),
        "makespan_s": end_s,
        "busy_s": busy_s,
        "requests_per_s": len(outcomes) / busy_s,
        "new_tokens_per_s": new_tokens / busy_s,
        "held_max": int(held.max()),
        "held_mean": float(np.average(held, weights=duration)),
        "memory_bound_steps": int(full.sum()),
        "held_mean_memory_bound": float(held[full].mean()) if full.any() else None,
        "held_tokens_max": max(step.held_tokens for step in steps),
        "waiting_max": max(step.waiting for step in steps),
        "preemptions": sum(outcome.preemptions for outcome in outcomes),
        "recomputed_tokens": sum(outcome.recomputed_tokens for outcome in outcomes),
        **{f"ttft_s_p{p}": float(np.percentile(ttft, p)) for p in PERCENTILES},
        **{f"inter_token_s_p{p}": float(np.percentile(gaps, p)) if len(gaps) else None for p in PERCENTILES},
    }


def _ratio(metrics: dict[str, Any], key: str) -> float | None:
    """Quantized over exact; None where one of them never had anybody waiting."""
    exact, quantized = metrics[EXACT][key], metrics[QUANTIZED][key]
    return None if exact is None or quantized is None else quantized / exact
