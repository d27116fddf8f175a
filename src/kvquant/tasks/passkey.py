"""``task=passkey``: pass keys hidden in real text at even depths, by length, exact cache against quantized.

A forward pass over prompt and answer tells whether greedy decoding would emit the answer: every token of it must be
the most likely one after the true ones before it. With quantized reads that is what decoding would see.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.data.synthetic import key_value_prompts, passkey_prompts
from kvquant.items import ItemStore, short_hash
from kvquant.statistics import holm, share_interval, sign_test
from kvquant.tasks.quality import run_cache
from kvquant.tasks.questions import item_key, save_json
from kvquant.tasks.setup import Workbench, open_workbench, progress


def run(cfg: Any, context: Any) -> None:
    """Measure exact-match accuracy at every length, with one key and with several of which one is asked for.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    task = cfg.task
    for length in task.lengths:
        bench.length("task.lengths", length)
    calibrations = {"exact": exact_calibration(bench.shape), "quantized": bench.calibration()}
    stores = {n: ItemStore(task.items_dir, item_key(bench, c)) for n, c in calibrations.items()}
    filler = bench.heldout(None).numpy()
    kinds = {"passkey": passkey_prompts, "key_value": key_value_prompts}
    cells = [(kind, length) for kind in task.kinds for length in task.lengths]
    records = []
    for kind, length in progress(context.console)(cells, "pass keys", len(cells)):
        pairs = list(kinds[kind](bench.tokenizer, filler, length, task.count, cfg.seed))
        right = {n: _right(bench, c, stores[n], pairs, task.batch_size) for n, c in calibrations.items()}
        records.append({"kind": kind, "length": length, **right})
    p_values = holm([sign_test(r["exact"], r["quantized"]) for r in records])
    lines, metrics = [], []
    for record, p in zip(records, p_values, strict=True):
        shares = {n: share_interval(sum(record[n]), len(record[n])) for n in calibrations}
        metrics.append(
            {
                "kind": record["kind"],
                "length": record["length"],
                "p_holm": p,
                **{n: dataclasses.asdict(shares[n]) for n in calibrations},
            }
        )
        text = [f"{100 * s.estimate:.0f}% [{100 * s.low:.0f}, {100 * s.high:.0f}]" for s in shares.values()]
        lines.append([f"{record['kind']}, {record['length']} tokens", str(task.count), *text, f"{p:.3f}"])
    save_json(context.run_dir / "items.json", records)
    context.record.metrics.update(
        cells=metrics,
        items_found=sum(s.found for s in stores.values()),
        items_computed=sum(s.computed for s in stores.values()),
    )
    context.record.set_table(
        f"pass keys, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits",
        ["", "n", "exact cache", "quantized cache", "p (sign test, Holm)"],
        lines,
    )


def _right(
    bench: Workbench,
    calibration: Calibration,
    store: ItemStore,
    pairs: list[tuple[Any, Any]],
    batch_size: int,
) -> list[bool]:
    out: list[bool] = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        ids = [torch.from_numpy(np.concatenate(pair)) for pair in batch]
        names = [f"passkey-{short_hash(x.tolist())}" for x in ids]
        compute = functools.partial(correctness, bench, calibration, ids, len(batch[0][1]))
        out += [bool(item["correct"]) for item in store.batch(names, compute)]
    return out


def correctness(
    bench: Workbench, calibration: Calibration, ids: list[Tensor], answer_tokens: int
) -> list[dict[str, bool]]:
    """`answered` as items."""
    return [{"correct": right} for right in answered(bench, calibration, ids, answer_tokens)]


def answered(bench: Workbench, calibration: Calibration, ids: list[Tensor], answer_tokens: int) -> list[bool]:
    """Whether greedy decoding would emit the last ``answer_tokens`` tokens of each sequence."""
    logits = run_cache(bench, calibration, ids, answer_tokens + 1).logits
    predicted = logits.view(len(ids), answer_tokens + 1, -1)[:, :-1].argmax(-1).cpu()
    right: list[bool] = (predicted == torch.stack([x[-answer_tokens:] for x in ids])).all(1).tolist()
    return right
