"""``task=generate``: continue a prompt from an exact and from a quantized cache, side by side."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.calibration import exact_calibration
from kvquant.errors import DataError
from kvquant.models import quantized_kv_cache
from kvquant.tasks.setup import open_workbench, progress

DEFAULT_PROMPT_TOKENS = 256


def run(cfg: Any, context: Any) -> None:
    """Greedy continuation through transformers' own ``generate()``.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    bench = open_workbench(cfg, context)
    task = cfg.task
    if task.prompt is None:
        ids = bench.heldout(DEFAULT_PROMPT_TOKENS)
    else:
        ids = torch.tensor(bench.tokenizer.encode(task.prompt, add_special_tokens=True))
    if not 1 <= len(ids) <= bench.context - task.max_new_tokens:
        raise DataError(
            f"prompt and new tokens must be 1 to {bench.context} (the model's context), got {len(ids)} + "
            f"{task.max_new_tokens}; shorten task.prompt or task.max_new_tokens"
        )
    settings = bench.cache_settings()
    if settings["num_blocks"] is None and settings["memory_budget_gib"] is None:
        settings["num_blocks"] = -(-(len(ids) + task.max_new_tokens) // settings["block_size"])
    texts, tokens, bits = {}, {}, {}
    variants = {"exact": exact_calibration(bench.shape), "quantized": bench.calibration()}
    for name in progress(context.console)(variants, "generate", len(variants)):
        with torch.inference_mode(), quantized_kv_cache(bench.model, variants[name]) as kv:
            cache = kv.new_cache(max_sequences=1, **settings)
            out = bench.model.generate(
                input_ids=ids[None].to(bench.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=bench.model.device),
                past_key_values=cache,
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
            )
            bits[name] = cache.effective_bits
        tokens[name] = out[0, len(ids) :].tolist()
        texts[name] = bench.tokenizer.decode(tokens[name])
    same = 0
    for a, b in zip(tokens["exact"], tokens["quantized"], strict=False):
        if a != b:
            break
        same += 1
    context.record.metrics.update(
        {
            "prompt_tokens": len(ids),
            "equal_tokens": same,
            "effective_bits": bits,
            "texts": texts,
            "tokens": tokens,
        }
    )
    rows = [[name, f"{bits[name]:.2f}", texts[name]] for name in variants]
    context.record.set_table(f"the same for {same} tokens", ["cache", "bits", "continuation"], rows)
