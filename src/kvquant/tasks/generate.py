"""``task=generate``: continue prompts from an exact and from a quantized cache, side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvquant.calibration import Calibration, exact_calibration
from kvquant.data.prompts import token_stream
from kvquant.errors import DataError
from kvquant.models import quantized_kv_cache
from kvquant.statistics import mean_interval, share_interval
from kvquant.tasks.questions import save_json
from kvquant.tasks.setup import Workbench, open_workbench, progress


def run(cfg: Any, context: Any) -> None:
    """Greedy continuations through transformers' own ``generate()``; where the two part says more than an average.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    task = cfg.task
    prompts = _prompts(bench, task)
    variants = {"exact": exact_calibration(bench.shape), "quantized": bench.calibration()}

    def measure(index: int) -> dict[str, Any]:
        ids = prompts[index]
        if not 1 <= len(ids) <= bench.context - task.max_new_tokens:
            raise DataError(
                f"prompt and new tokens must be 1 to {bench.context} (the model's context), got {len(ids)} + "
                f"{task.max_new_tokens}; shorten task.prompt or task.max_new_tokens"
            )
        tokens, bits = {}, {}
        for name, calibration in variants.items():
            tokens[name], bits[name] = _continue(bench, calibration, ids, task.max_new_tokens)
        same = equal_length(tokens["exact"], tokens["quantized"])
        return {
            "prompt_tokens": len(ids),
            "equal_tokens": same,
            "diverged": tokens["exact"] != tokens["quantized"],
            # What each would say next where they part; null when one has ended or they never do.
            "first_diverging": [_text_at(bench, tokens[name], same) for name in variants],
            "effective_bits": bits,
            "tokens": tokens,
            "texts": {name: bench.tokenizer.decode(tokens[name]) for name in variants},
        }

    # An item is a prompt: greedy, so that one that was cut short begins anew with the same tokens.
    numbers = progress(context.console)(range(len(prompts)), "generate", len(prompts))
    records = [item.values for item in context.items.run(numbers, measure)]
    save_json(context.run_dir / "items.json", records)
    equal = mean_interval([r["equal_tokens"] for r in records], [1] * len(records))
    whole = share_interval(sum(not r["diverged"] for r in records), len(records))
    first = records[0]
    context.record.metrics.update(
        {
            **{
                name: first[name]
                for name in ("prompt_tokens", "equal_tokens", "effective_bits", "texts", "tokens")
            },
            "prompts": len(records),
            "equal_tokens_mean": dataclasses.asdict(equal) if len(records) > 1 else None,
            "identical": dataclasses.asdict(whole),
        }
    )
    title = f"the same for {first['equal_tokens']} tokens"
    if len(records) > 1:
        title = (
            f"{len(records)} prompts, {task.max_new_tokens} tokens each: the same for {equal.text(1)} tokens on average, "
            f"throughout in {sum(not r['diverged'] for r in records)}; the first:"
        )
    rows = [[name, f"{first['effective_bits'][name]:.2f}", first["texts"][name]] for name in variants]
    context.record.set_table(title, ["cache", "bits", "continuation"], rows)


def equal_length(first: list[int], second: list[int]) -> int:
    """Tokens until two continuations part."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _prompts(bench: Workbench, task: Any) -> list[Tensor]:
    if task.prompt is not None:
        return [torch.tensor(bench.tokenizer.encode(task.prompt, add_special_tokens=True), dtype=torch.int64)]
    starts = [
        token_stream(bench.tokenizer, [document], task.prompt_tokens) for document in bench.corpus.heldout
    ]
    long_enough = [ids for ids in starts if len(ids) == task.prompt_tokens][: task.count]
    if not long_enough:
        raise DataError(
            f"a held-out document must hold a prompt of {task.prompt_tokens} tokens, the longest has "
            f"{max(map(len, starts))}; lower task.prompt_tokens or choose a longer data.path"
        )
    return long_enough


def _continue(
    bench: Workbench, calibration: Calibration, ids: Tensor, max_new_tokens: int
) -> tuple[list[int], float]:
    settings = bench.quality_settings([len(ids) + max_new_tokens])
    with torch.inference_mode(), quantized_kv_cache(bench.model, calibration) as kv:
        cache = kv.new_cache(max_sequences=1, **settings)
        out = bench.model.generate(
            input_ids=ids[None].to(bench.model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=bench.model.device),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return out[0, len(ids) :].tolist(), cache.effective_bits


def _text_at(bench: Workbench, tokens: list[int], index: int) -> str | None:
    return str(bench.tokenizer.decode(tokens[index : index + 1])) if index < len(tokens) else None
