"""``task=compare``: many ways of storing keys and values over the same tokens, with intervals, bytes and pass keys.

One process: the exact model reads every window once, and all methods are compared with it and, paired, with each
other. Finished items are kept (`kvquant.items`): a killed run started again computes only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.data.synthetic import passkey_prompts
from kvquant.items import ItemStore
from kvquant.report.compare_figure import draw_quality
from kvquant.spec import QuantSpec
from kvquant.tasks.compare_table import Row, summarise
from kvquant.tasks.passkey import correctness
from kvquant.tasks.quality import Window, compare_window, exact_logits, run_cache, windows_of
from kvquant.tasks.questions import item_key, save_json
from kvquant.tasks.setup import Workbench, open_workbench, progress
from kvquant.tasks.variants import Variant, expand


def run(cfg: Any, context: Any) -> None:
    """Measure every variant on every window and every pass key, then make the table.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task = cfg.task
    # Expanded first: a wrong row costs no model.
    variants = [Variant("exact", QuantSpec(method="none")), *expand(task.variants)]
    bench = open_workbench(cfg, context)
    for variant in variants:
        bench.check_kernel(variant.spec)
    window = bench.length("task.window", task.window)
    bench.length("task.passkey_length", task.passkey_length if task.passkeys else None)
    stream = bench.heldout(task.max_tokens, task.part)
    windows = windows_of(stream, window, task.stride or window, bench.heldout_name)
    prompts = list(_passkeys(bench, task, cfg.seed))
    rows = []
    for variant in progress(context.console)(variants, "calibrations", len(variants)):
        seeds = list(task.calibration_seeds) if _is_calibrated(variant.spec) else [0]
        calibrations = [
            exact_calibration(bench.shape)
            if variant.spec.is_exact
            else bench.calibration(variant.spec, seed=seed)
            for seed in seeds
        ]
        rows.append(_Row(variant, [_Source(bench, c, task.items_dir) for c in calibrations]))
    work = [*windows, *_batches(prompts, task.batch_size)]
    for item in progress(context.console)(work, f"{len(rows)} variants", len(work)):
        if isinstance(item, Window):
            _measure_window(bench, item, rows)
        else:
            _measure_passkeys(bench, item, rows)
    table = [
        Row(
            row.variant.label,
            row.variant.spec,
            [s.windows for s in row.sources],
            [s.passkeys for s in row.sources],
            sum(quantizer.constants_bytes for quantizer in row.sources[0].calibration.quantizers),
        )
        for row in rows
    ]
    save_json(context.run_dir / "items.json", [dataclasses.asdict(row) for row in table])
    metrics, columns, lines = summarise(table, list(task.baseline), task.block_windows, task.margin_nats)
    stores = [source.store for row in rows for source in row.sources]
    context.record.metrics.update(
        {
            **metrics,
            "windows": len(windows),
            "window_tokens": window,
            "passkeys": len(prompts),
            "items_found": sum(store.found for store in stores),
            "items_computed": sum(store.computed for store in stores),
        }
    )
    if any(entry["kl"]["estimate"] > 0 for entry in metrics["variants"].values()):
        context.record.add_figure(draw_quality(metrics["variants"], context.run_dir / "quality.png"))
    n = sum(item["n_tokens"] for item in rows[0].sources[0].windows)
    context.record.set_table(
        f"{cfg.model.name} on {cfg.data.name}: {len(windows)} windows of {window} tokens ({n} predicted), "
        f"{len(prompts)} pass keys of {task.passkey_length} tokens, 95% intervals",
        columns,
        lines,
    )


class _Source:
    """One calibration of one variant, its item store and what was collected from it."""

    def __init__(self, bench: Workbench, calibration: Calibration, directory: str) -> None:
        self.calibration = calibration
        self.store = ItemStore(directory, item_key(bench, calibration))
        self.windows: list[dict[str, Any]] = []
        self.passkeys: list[bool] = []


@dataclasses.dataclass
class _Row:
    variant: Variant
    sources: list[_Source]


def _is_calibrated(spec: QuantSpec) -> bool:
    from kvquant.methods import method_class

    return method_class(spec.method).calibrated


def _measure_window(bench: Workbench, window: Window, rows: list[_Row]) -> None:
    exact: Tensor | None = None
    for row in rows:
        for source in row.sources:
            item = source.store.get(f"window-{window.name}")
            if item is None:
                if exact is None:
                    exact = exact_logits(bench, [window.token_ids])
                run = run_cache(bench, source.calibration, [window.token_ids])
                item = source.store.commit(f"window-{window.name}", compare_window(window, exact, run))
            source.windows.append(item.values)


def _passkeys(bench: Workbench, task: Any, seed: int) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tokens (prompt and answer) and length of the answer."""
    if not task.passkeys:
        return
    filler = bench.heldout(None, task.part).numpy()
    pairs = passkey_prompts(bench.tokenizer, filler, task.passkey_length, task.passkeys, seed)
    for prompt, answer in pairs:
        ids = torch.from_numpy(np.concatenate([prompt, answer]))
        yield f"passkey-{Window(ids, 0).name}", ids, len(answer)


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _measure_passkeys(bench: Workbench, batch: list[tuple[str, Tensor, int]], rows: list[_Row]) -> None:
    """Greedy decoding emits an answer iff each of its tokens is the most likely after the true ones before it."""
    names, ids, answer = [name for name, _, _ in batch], [ids for _, ids, _ in batch], batch[0][2]
    for row in rows:
        for source in row.sources:
            compute = functools.partial(correctness, bench, source.calibration, ids, answer)
            source.passkeys += [bool(item["correct"]) for item in source.store.batch(names, compute)]
