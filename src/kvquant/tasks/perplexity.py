"""``task=perplexity``: perplexity of held-out text, every key and value quantized, against the exact cache."""

from __future__ import annotations

from typing import Any

from kvquant.spec import QuantSpec
from kvquant.tasks.compare_table import Row, summarise
from kvquant.tasks.quality import compare_window, exact_logits, run_cache, windows_of
from kvquant.tasks.questions import save_json
from kvquant.tasks.setup import open_workbench, progress


def run(cfg: Any, context: Any) -> None:
    """Measure perplexity over windows of the held-out text.

    Without ``task.window`` windows are contiguous and as long as the model's context (KVQuant's protocol); with a
    ``task.stride`` below the window each window predicts only its last ``stride`` tokens.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    task = cfg.task
    length = bench.length("task.window", task.window)
    windows = windows_of(
        bench.heldout(task.max_tokens, task.part), length, task.stride or length, bench.heldout_name
    )
    calibration = bench.calibration()
    # Numbered, because text that repeats makes windows of one name.
    by_name = {f"{index:06d}-{window.name}": window for index, window in enumerate(windows)}

    def measure(name: str) -> dict[str, Any]:
        window = by_name[name]
        exact = exact_logits(bench, [window.token_ids])
        return compare_window(window, exact, run_cache(bench, calibration, [window.token_ids]))

    names = progress(context.console)(list(by_name), "perplexity", len(by_name))
    # Every window is committed: a job that is stopped and queued again goes on behind its last one.
    records = [item.values for item in context.items.run(names, measure)]
    save_json(context.run_dir / "windows.json", records)

    none = [{**r, "quantized_nll_sum": r["exact_nll_sum"], "kl_sum": 0.0, "flips": 0} for r in records]
    rows = [
        Row("exact", QuantSpec(method="none"), [none], [[]]),
        Row("quantized", bench.spec(), [records], [[]]),
    ]
    summary, _, _ = summarise(rows, [], task.block_windows, task.margin_nats)
    entry, exact_ppl = summary["variants"]["quantized"], summary["perplexity_exact"]
    n_tokens = sum(r["n_tokens"] for r in records)
    context.record.metrics.update(
        {
            "compared_tokens": n_tokens,
            "perplexity_exact": exact_ppl,
            "perplexity_quantized": entry["perplexity"],
            "perplexity_difference": entry["perplexity"] - exact_ppl,
            "nll_difference": entry["nll_difference"]["estimate"],
            "kl_mean": entry["kl"]["estimate"],
            "top1_agreement": 1 - entry["flips"]["estimate"],
            "effective_bits": entry["effective_bits"],
            "intervals": {
                name: entry[name] for name in ("nll_difference", "perplexity_excess_percent", "kl", "flips")
            },
            "equivalence": entry["equivalence"],
            "perplexity_excess_percent": entry["perplexity_excess_percent"]["estimate"],
            "window_tokens": length,
            "windows": len(windows),
        }
    )

    def ends(name: str, factor: float, digits: int) -> str:
        found = entry[name]
        return f"[{factor * found['low']:.{digits}f}, {factor * found['high']:.{digits}f}]"

    context.record.set_table(
        f"perplexity of {cfg.data.name}, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits",
        ["", "exact cache", "quantized cache", f"95% interval, n = {len(windows)}"],
        [
            ["perplexity", f"{exact_ppl:.4f}", f"{entry['perplexity']:.4f}", ""],
            [
                "excess",
                "",
                f"{entry['perplexity_excess_percent']['estimate']:+.3f}%",
                ends("perplexity_excess_percent", 1, 3),
            ],
            ["KL (mean, nats)", "", f"{entry['kl']['estimate']:.3e}", ends("kl", 1, 5)],
            ["changed top-1", "", f"{100 * entry['flips']['estimate']:.2f}%", ends("flips", 100, 2)],
            ["effective bits, all in", "", f"{entry['effective_bits']:.2f}", ""],
            ["tokens predicted", str(n_tokens), str(n_tokens), ""],
        ],
    )
