"""``task=largest_batch``: how many prompts a memory holds, by filling it: exact blocks against quantized ones.

The keys and values of all layers of a model are stored through the real pools and kernels, prompt after prompt, until
the pool refuses one; then one token of every sequence attends over all of it. Weights are stood in for by memory.
"""

from __future__ import annotations

import bisect
import time
from typing import Any

import psutil
import torch

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.bench.shapes import SHAPES, LayerShape
from kvquant.bench.steps import Steps
from kvquant.bench.stored import MadeUpKV, kept_exactly, quantizers_of, rope_tables
from kvquant.block_layout import BlockLayout
from kvquant.block_pool import BlockPool
from kvquant.errors import PoolExhausted
from kvquant.measure import Stopwatch
from kvquant.prefill_quant import PrefillQuantizedAttention
from kvquant.ragged import RaggedStep
from kvquant.spec import QuantSpec
from kvquant.tasks.setup import progress

# A layer's tokens start elsewhere in the drawn ones than the layer before's.
STRIDE = 389


def run(cfg: Any, context: Any) -> None:
    """Fill the memory once with exact blocks and once for each width.

    Args:
        cfg: the composed configuration; the settings are those of ``LargestBatchTask``.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.

    Raises:
        PoolExhausted: not even one prompt fits; says what would.
    """
    task, device, metrics = cfg.task, context.device, context.record.metrics
    shape, steps = SHAPES[task.shape], Steps()
    dtype: torch.dtype = getattr(torch, task.dtype)
    weights = torch.zeros(int(task.weights_gib * 2**30), dtype=torch.uint8, device=device)
    with steps.step("drawing keys and values"):
        data = MadeUpKV(shape, task.prompt_tokens + STRIDE * task.layers, dtype, device, cfg.seed)
    quantizers = {"exact": BatchedKVQuantizer.exact(shape.kv_heads, shape.head_dim)}
    with steps.step(f"calibrating on {cfg.calibration.tokens} tokens"):
        sample = data.sample(cfg.calibration.tokens)
        for bits, quantizer in quantizers_of(QuantSpec(**dict(cfg.quant)), task.bits, sample).items():
            quantizers[f"nuq{bits}"] = quantizer.to(device)
    budget = _budget_bytes(task, device)
    metrics |= {
        "budget_bytes": budget,
        "weights_bytes": weights.nbytes,
        "layers": task.layers,
        "calibration_tokens": cfg.calibration.tokens,
        "steps": steps.taken,
    }
    title = f"prompts of {task.prompt_tokens} tokens of {task.layers} {task.shape} layers in {budget / 2**30:.2f} GiB"
    columns = ["", "prompts", "of exact", "held", "bits", "stored in", "attention of a step"]
    rows = []
    for name in progress(context.console)(list(quantizers), "filling the memory", len(quantizers)):
        with torch.no_grad(), steps.step(f"filling the memory, {name}"):
            found = _fill(quantizers[name], shape, data, budget, cfg)
        ratio = found["sequences"] / metrics.get("exact_sequences", found["sequences"])
        metrics |= {f"{name}_{key}": value for key, value in found.items()}
        metrics[f"{name}_times_exact"] = ratio
        rows.append(
            [
                name,
                str(found["sequences"]),
                f"{ratio:.2f}x",
                f"{found['held_bytes'] / 2**30:.2f} GiB",
                f"{found['effective_bits']:.2f}",
                f"{found['fill_s']:.1f} s",
                f"{1e3 * found['attend_s']:.1f} ms",
            ]
        )
        context.record.set_table(title, columns, rows)
        context.record.save()  # a run that is cut short leaves what it has


def _budget_bytes(task: Any, device: torch.device) -> int:
    """Bytes for blocks: what was asked for, or the share of what is free once the weights are there."""
    if task.memory_budget_gib is not None:
        return int(task.memory_budget_gib * 2**30)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(task.memory_share * torch.cuda.mem_get_info(device)[0])
    return int(task.memory_share * psutil.virtual_memory().available)


def _fill(
    quantizer: BatchedKVQuantizer, shape: LayerShape, data: MadeUpKV, budget: int, cfg: Any
) -> dict[str, Any]:
    """Store prompts until one is refused; returns how many there are and what they take."""
    task, cache = cfg.task, cfg.cache
    keys, _ = data.take(1)
    layout = quantizer.layout(task.layers, keys.dtype, cache.block_size, cache.spill_headroom)
    columns = layout.blocks_for(task.prompt_tokens)
    pool = _pool(layout, budget, columns, keys.device)
    rows: list[int] = []
    start_s = time.perf_counter()
    while True:
        try:
            row = pool.add_sequence()
            step = pool.reserve([row], [task.prompt_tokens])
            for layer, store in enumerate(pool.layers):
                tokens = data.take(task.prompt_tokens, STRIDE * layer + len(rows))
                quantizer.write(*tokens, store, step, backend=cfg.kernel.backend)
            pool.commit()
        except PoolExhausted as error:
            refusal = str(error)
            break
        rows.append(row)
    fill_s = time.perf_counter() - start_s
    if not rows:
        raise PoolExhausted(
            f"task.memory_budget_gib must hold a prompt of {task.prompt_tokens} tokens, {budget / 2**30:.3f} GiB do not "
            f"({refusal}); lower task.prompt_tokens or task.layers"
        )
    numbers = 2 * len(rows) * task.prompt_tokens * task.layers * shape.channels
    return {
        "sequences": len(rows),
        "held_bytes": pool.bytes_held,
        "pool_bytes": pool.bytes_total,
        "effective_bits": 8 * pool.bytes_held / numbers,
        **kept_exactly(pool),
        "fill_s": fill_s,
        "attend_s": _attend_s(quantizer, shape, data, pool, rows, cfg),
        "refusal": refusal,
    }


def _pool(layout: BlockLayout, budget: int, columns: int, device: torch.device) -> BlockPool:
    """The pool with most blocks whose tensors take at most ``budget`` bytes."""

    def sequences(blocks: int) -> int:
        return blocks // columns + 1  # one more than fit, so that it is blocks that run out

    most = budget // layout.block_bytes
    blocks = bisect.bisect_right(
        range(1, most + 1), budget, key=lambda n: layout.pool_bytes(n, sequences(n), columns)
    )
    return BlockPool(
        layout,
        blocks,
        max_sequences=sequences(blocks),
        max_blocks_per_sequence=columns,
        device=device,
    )


def _attend_s(
    quantizer: BatchedKVQuantizer,
    shape: LayerShape,
    data: MadeUpKV,
    pool: BlockPool,
    rows: list[int],
    cfg: Any,
) -> float:
    """Seconds in which the last token of every sequence attends over everything, in all layers."""
    task, BS = cfg.task, cfg.cache.block_size
    row_ids = torch.tensor(rows, device=pool.device)
    past = [task.prompt_tokens - 1] * len(rows)
    step = RaggedStep.build(past, [1] * len(rows), row_ids, pool.block_table[row_ids], BS)
    rope = rope_tables(shape, BS, task.prompt_tokens, pool.device)
    attention = PrefillQuantizedAttention(quantizer, BS, shape.head_dim**-0.5, backend=cfg.kernel.backend)
    query = data.query(len(rows))
    nothing = query.new_empty(0)

    def attend() -> list[torch.Tensor]:
        return [attention.attend(query, nothing, nothing, store, step, rope) for store in pool.layers]

    attention.attend(query, nothing, nothing, pool.layers[0], step, rope)  # compiles
    with (watch := Stopwatch(pool.device)):
        seen = attend()
    assert all(bool(x.isfinite().all()) for x in seen), "attention over stored tokens must be finite"
    return watch.total_s
