"""The one table of the main job: exact cache, quantized cache, difference."""

from __future__ import annotations

from typing import Any

from kvquant.energy.windows import MEASURED

Row = list[str]


def prefill_table(metrics: dict[str, Any], cfg: Any) -> tuple[str, list[str], list[Row]]:
    """Return title, columns and rows.

    Args:
        metrics: what :func:`kvquant.tasks.prefill.run` measured.
        cfg: the composed configuration.
    """
    batch, model = metrics["batch"], metrics["model"]
    title = (
        f"{cfg.model.name} ({model['dtype']}), {batch['prompts']} prompts of {min(batch['lengths'])} to "
        f"{max(batch['lengths'])} tokens, {batch['tokens']} in all; quant={cfg.quant.method}"
    )
    rows = [*_quality(metrics["quality"]), *_memory(metrics), *_time(metrics), *_energy(metrics["energy"])]
    return title, ["", "exact cache", "quantized cache", "difference"], rows


def _quality(q: dict[str, Any]) -> list[Row]:
    if "skipped" in q:
        return [["quality of the prompt", "", "", f"not measured: {q['skipped']}"]]
    n = q["prompts_compared"]
    return [
        [
            f"perplexity of the prompts (95% intervals over n = {n})",
            f"{q['perplexity_exact']:.3f}",
            f"{q['perplexity_quantized']:.3f}",
            f"{q['perplexity_excess_percent']:+.2f}%{_range(q, 'perplexity_excess_percent', '+.2f')}",
        ],
        ["next-token KL (nats)", "0", f"{q['kl_mean']:.2e}", _range(q, "kl_mean", ".2e").strip()],
        [
            "top-1 agreement",
            "100%",
            f"{100 * q['top1_agreement']:.2f}%",
            _range(q, "top1_agreement", ".2%").strip(),
        ],
    ]


def _range(q: dict[str, Any], name: str, form: str) -> str:
    """`` [low, high]``, or nothing where a single prompt gives no interval."""
    if f"{name}_low" not in q:
        return ""
    return f" [{format(q[f'{name}_low'], form)}, {format(q[f'{name}_high'], form)}]"


def _memory(metrics: dict[str, Any]) -> list[Row]:
    memory, capacity = metrics["memory"], metrics["capacity"]
    exact, quantized = memory["exact"], memory["quantized"]
    return [
        [
            "effective bits, all in",
            f"{exact['effective_bits']:.2f}",
            f"{quantized['effective_bits']:.2f}",
            f"{memory['compression']:.2f}x smaller than fp16",
        ],
        [
            f"cache held (fp16 numbers alone: {_mib(memory['fp16_bytes'])})",
            _mib(exact["held_bytes"]),
            _mib(quantized["held_bytes"]),
            "",
        ],
        ["key outliers kept", "", f"{100 * quantized['key_outlier_fraction']:.2f}%", ""],
        [
            f"such sequences in {capacity['budget_bytes'] / 2**30:g} GiB",
            str(capacity["sequences_exact"]),
            str(capacity["sequences_quantized"]),
            f"{capacity['sequences_ratio']:.2f}x",
        ],
    ]


def _time(metrics: dict[str, Any]) -> list[Row]:
    prefill, decode = metrics["prefill"], metrics["decode"]
    rows = [
        [
            "time to first token of the batch",
            f"{prefill['ttft_s_exact']:.3f} s",
            f"{prefill['ttft_s_quantized']:.3f} s",
            f"{prefill['ttft_overhead_percent']:+.1f}%",
        ],
        [
            "of it, storing K and V",
            f"{prefill['store_s_exact']:.3f} s",
            f"{prefill['store_s_quantized']:.3f} s",
            f"{prefill['store_percent_of_exact_ttft']:.1f}% of exact TTFT",
        ],
    ]
    if decode:
        exact, quantized = decode["tokens_per_s_exact"], decode["tokens_per_s_quantized"]
        rows += [
            [
                "decode, tokens/s",
                f"{exact:.1f}",
                f"{quantized:.1f}",
                f"{100 * (quantized / exact - 1):+.1f}%",
            ],
            [
                "append to the cache, per token",
                f"{1e6 * decode['append_s_per_token_exact']:.0f} us",
                f"{1e6 * decode['append_s_per_token_quantized']:.0f} us",
                "",
            ],
        ]
    return rows


def _energy(energy: dict[str, Any]) -> list[Row]:
    exact, quantized = energy["exact"], energy["quantized"]
    how = f"{quantized['energy_kind']} ({quantized['energy_source']})"
    rows = []
    for phase in ("prefill", "decode"):
        key = f"{phase}_energy_j"
        if key not in exact or key not in quantized:
            continue
        joules, grams = ([e[k] for e in (exact, quantized)] for k in (key, f"{phase}_carbon_gco2e"))
        if quantized["energy_kind"] != MEASURED:
            # Mostly seconds times a constant: side by side the two would look like a finding.
            both = f"{sum(joules):.1f} J, {1000 * sum(grams):.1f} mgCO2e for both"
            rows.append([f"energy of {phase}", "", "", f"{both}, {how}"])
            continue
        pair = [f"{j:.1f} J, {1000 * g:.1f} mgCO2e" for j, g in zip(joules, grams, strict=True)]
        faulty = exact[f"{phase}_faults"] or quantized[f"{phase}_faults"]
        rows.append([f"energy of {phase}", *pair, f"{how}; not valid, see task=energy" if faulty else how])
    return rows or [["energy", "", "", "not metered"]]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"
