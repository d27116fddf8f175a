"""Which model families run over our blocks, and why the others do not.

A family fits if its decoder hands ``position_embeddings`` to attention modules by keyword, rotates half-split, and
reaches its attention through transformers' AttentionInterface. Scale, soft-capping, window and rotary tables are read
from the modules themselves, so that adding a family is one line here and one row in tests/test_families.py.
"""

from __future__ import annotations

from typing import Any

from kvquant.errors import ModelError

# model_type -> what sets its attention apart.
FAMILIES = {
    "llama": "plain, linear or llama3 rope scaling",
    "mistral": "one sliding window for all layers, or none",
    "qwen2": "biases on queries, keys and values",
    "qwen3": "normalised queries and keys",
    "gemma2": "soft-capped scores, alternating windows, a scale of its own",
    "gemma3_text": "normalised keys, alternating windows, rotary tables per layer type",
    "phi3": "fused projections, partial rotary, long rope",
}
_LATENT = "latent attention caches one compressed vector per token instead of keys and values per head"
_HYBRID = "linear-attention or state-space layers keep a recurrent state instead of keys and values"
_ENCODER = "an encoder-decoder has cross-attention, whose keys do not grow with the text"
_REASONS = {
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "longcat_flash"], _LATENT),
    **dict.fromkeys(["qwen3_next", "qwen3_5", "jamba", "zamba2", "bamba", "falcon_h1", "lfm2"], _HYBRID),
    **dict.fromkeys(["mamba", "mamba2", "rwkv", "recurrent_gemma", "kimi_linear", "minimax"], _HYBRID),
    **dict.fromkeys(
        ["cohere", "cohere2", "glm", "glm4"], "it rotates neighbouring channels, not halves of a head"
    ),
    "gemma3": "its image tokens attend in both directions; load the text model, Gemma3ForCausalLM",
    "gemma3n": "its last layers share the cache of earlier ones",
    "gpt_oss": "attention sinks are a learned term of its softmax",
    "llama4": "chunked attention is not a sliding window",
    "gpt2": "its positions are learned embeddings, not rotations",
}
_RECURRENT_LAYERS = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}


def check_family(config: Any) -> str:
    """Return the family of a model's config.

    Raises:
        ModelError: it is not supported; names the family, the reason and what is supported.
    """
    family = str(config.model_type)
    reason = _why_not(config, family)
    if reason is None:
        return family
    raise ModelError(
        f"model family must be one of {', '.join(FAMILIES)}, got {family}: {reason}; try a model of one of these families"
    )


def layer_window(module: Any) -> int | None:
    """Sliding window of one attention module in tokens, or None if it sees everything."""
    # Families that alternate keep it on the module, those with one window for all layers in the config.
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))


def _why_not(config: Any, family: str) -> str | None:
    if family in FAMILIES:
        if getattr(config, "use_bidirectional_attention", False):
            return "with use_bidirectional_attention a token sees later ones"
        return None
    if family in _REASONS:
        return _REASONS[family]
    if getattr(config, "is_encoder_decoder", False):
        return _ENCODER
    if getattr(config, "kv_lora_rank", None):
        return _LATENT
    if _RECURRENT_LAYERS & set(getattr(config, "layer_types", None) or ()):
        return _HYBRID
    return "its attention has not been fitted to the blocks yet"
