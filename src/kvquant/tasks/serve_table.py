"""The table of ``task=serve_trace``: exact cache, quantized cache, ratio."""

from __future__ import annotations

from typing import Any

Row = list[str]


def serve_table(metrics: dict[str, Any], cfg: Any) -> tuple[str, list[str], list[Row]]:
    """Return title, columns and rows.

    Args:
        metrics: what :func:`kvquant.tasks.serve_trace.run` measured.
        cfg: the composed configuration.
    """
    requests, model = metrics["requests"], metrics["model"]
    title = (
        f"{cfg.model.name} ({model['dtype']}), {requests['count']} requests of {requests['prompt_tokens']} + "
        f"{requests['new_tokens']} tokens in {cfg.task.memory_budget_gib * 1024:g} MiB of cache; quant={cfg.quant.method}"
    )
    rows = [
        _row(
            metrics, "blocks that the budget holds", "num_blocks", lambda blocks: "+".join(map(str, blocks))
        ),
        _row(metrics, "sequences held at once, most", "held_max", str, ratio=True),
        _row(
            metrics,
            "the same, mean while blocks keep others waiting",
            "held_mean_memory_bound",
            _number,
            ratio=True,
        ),
        _row(metrics, "requests waiting, most", "waiting_max", str),
        _row(metrics, "preemptions", "preemptions", str),
        _row(metrics, "tokens computed again after them", "recomputed_tokens", str),
        _row(metrics, "requests finished", "finished", str),
        _row(metrics, "forward calls", "steps", str, ratio=True),
        _row(metrics, "generated tokens/s", "new_tokens_per_s", _number, ratio=True),
    ]
    for key, text in (("ttft_s", "time to first token"), ("inter_token_s", "time between tokens")):
        rows += [_row(metrics, f"{text}, p{p}", f"{key}_p{p}", _seconds, ratio=True) for p in (50, 90, 99)]
    return title, ["", "exact cache", "quantized cache", "ratio"], rows


def _row(metrics: dict[str, Any], text: str, key: str, form: Any, *, ratio: bool = False) -> Row:
    exact, quantized = metrics["exact"][key], metrics["quantized"][key]
    row = [text, *("-" if value is None else form(value) for value in (exact, quantized))]
    return [*row, f"{quantized / exact:.2f}x" if ratio and exact and quantized else ""]


def _number(value: float) -> str:
    return f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"
