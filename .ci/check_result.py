"""Check the main job's result.json: finished, every promised number there and finite. Usage: check_result.py PATH"""

from __future__ import annotations

import math
import sys

from kvquant.results import load_result

PROMISED = (
    "quality.perplexity_exact",
    "quality.perplexity_quantized",
    "quality.perplexity_difference",
    "quality.top1_agreement",
    "quality.kl_mean",
    "memory.quantized.effective_bits",
    "memory.quantized.held_bytes",
    "memory.quantized.key_outlier_fraction",
    "memory.compression",
    "capacity.sequences_ratio",
    "prefill.ttft_s_exact",
    "prefill.ttft_s_quantized",
    "prefill.ttft_overhead_percent",
    "decode.tokens_per_s_exact",
    "decode.tokens_per_s_quantized",
    "decode.append_s_per_token_quantized",
    "energy.quantized.prefill_energy_j",
    "energy.quantized.prefill_carbon_gco2e",
    "run_energy.energy_j",
)


def main(path: str) -> int:
    """Return 0 when the result holds what the main job promises, else 1 with one line per fault."""
    result = load_result(path)
    faults = []
    if result["status"] != "ok":
        faults.append(f"status must be ok, got {result['status']}: {(result['error'] or {}).get('message')}")
    for name in PROMISED:
        value = result["metrics"]
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            faults.append(f"metrics.{name} must be a finite number, got {value}")
    if not result["table"]:
        faults.append("table must be there, got none")
    for name in ("model_hash", "data_hash", "device"):
        if not result["provenance"].get(name):
            faults.append(f"provenance.{name} must be there, got none")
    for fault in faults:
        print(f"{path}: {fault}", file=sys.stderr)
    print(f"{path}: {'bad' if faults else 'good'}, {result['duration_s']} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
