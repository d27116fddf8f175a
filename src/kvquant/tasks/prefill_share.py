"""What share of a prefill quantizing and storing takes, on a model of a 7B's width with random weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.calibration import exact_calibration
from kvquant.measure import Stopwatch
from kvquant.models import model_shape, quantized_kv_cache
from kvquant.models.attention_hook import record_keys_and_values
from kvquant.spec import QuantSpec

BLOCK_SIZE = 64
# Llama-2-7B but for the number of layers.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def measure_prefill_share(
    spec: QuantSpec,
    lengths: Sequence[int],
    *,
    layers: int,
    repeats: int,
    seed: int,
    backend: str,
    device: Any,
) -> dict[str, Any]:
    """Prefill a ragged batch with a quantized and with an exact cache in turns, ``prefill_reads=exact`` in both.

    Args:
        spec: how the quantized cache stores.
        lengths: tokens of each prompt.
        layers: decoder layers of the model.
        repeats: pairs of runs, after one that warms up.
        seed: of weights and tokens.
        backend: name of the kernels.
        device: where the model lives.

    Returns:
        medians, in seconds and in percent of the exact path's time.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    prompts = [torch.randint(0, SHAPE["vocab_size"], (n,)) for n in lengths]
    with record_keys_and_values(model) as recorded, torch.no_grad():
        model(input_ids=torch.cat(prompts)[None].to(device), use_cache=False)
        quantizers = [
            BatchedKVQuantizer.calibrate(spec, keys[0].transpose(0, 1), values[0].transpose(0, 1))
            for keys, values in recorded
        ]
    variants = {"exact": exact_calibration(model_shape(model)), "quantized": quantizers}
    blocks = sum(-(-n // BLOCK_SIZE) for n in lengths)
    ttft: dict[str, list[float]] = {name: [] for name in variants}
    store: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        order = list(variants) if turn % 2 else list(reversed(variants))
        for name in order:
            with quantized_kv_cache(model, variants[name]) as kv:
                cache = kv.new_cache(
                    num_blocks=blocks,
                    max_sequences=len(lengths),
                    block_size=BLOCK_SIZE,
                    prefill_reads="exact",
                    backend=backend,
                )
                cache.stopwatch = Stopwatch(device)
                with (watch := Stopwatch(device)):
                    cache.append(prompts)
            if turn:
                ttft[name].append(watch.total_s)
                store[name].append(cache.stopwatch.total_s)
    overheads = [100 * (q / e - 1) for q, e in zip(ttft["quantized"], ttft["exact"], strict=True)]
    exact_s = statistics.median(ttft["exact"])
    return {
        "layers": layers,
        "prompts": len(lengths),
        "tokens": sum(lengths),
        **{f"ttft_s_{name}": statistics.median(s) for name, s in ttft.items()},
        **{f"store_s_{name}": statistics.median(s) for name, s in store.items()},
        "store_percent_of_exact_ttft": 100 * statistics.median(store["quantized"]) / exact_s,
        "paired_overhead_percent": statistics.median(overheads),
    }
