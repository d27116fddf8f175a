"""A small random model of every supported family, with everything switched on that sets its attention apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.models import model_shape, record_keys_and_values
from kvquant.spec import QuantSpec

VOCAB, WINDOW, CONTEXT = 97, 24, 512
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_THREE_LAYERS = {**_SIZE, "num_hidden_layers": 3}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


def phi3(original: int) -> PreTrainedConfig:
    """Phi-3 whose long rope changes frequencies past ``original`` tokens."""
    rotated = 18  # pairs of the 0.75 * 48 channels that are rotated
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(rotated)],
        "long_factor": [2.0 + 0.5 * i for i in range(rotated)],
        "original_max_position_embeddings": original,
        "attention_factor": 1.19,  # that of 4,096 tokens stretched to 131,072
    }
    return Phi3Config(
        **{**_SIZE, "hidden_size": 192},
        rope_parameters=rope,
        original_max_position_embeddings=original,
        sliding_window=None,
        tie_word_embeddings=False,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-gqa-llama3": lambda: LlamaConfig(**_SIZE, head_dim=64, rope_parameters=_LLAMA3),
    "llama-mha-128": lambda: LlamaConfig(**{**_SIZE, "num_key_value_heads": 4}, head_dim=128),
    "llama-mqa-tied": lambda: LlamaConfig(
        **{**_SIZE, "num_key_value_heads": 1}, head_dim=64, tie_word_embeddings=True
    ),
    "mistral-window": lambda: MistralConfig(**_SIZE, head_dim=64, sliding_window=WINDOW),
    "qwen2-biases": lambda: Qwen2Config(**_SIZE, head_dim=64, tie_word_embeddings=True),
    "qwen2-mixed": lambda: Qwen2Config(
        **_THREE_LAYERS, head_dim=64, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3-norm": lambda: Qwen3Config(**_SIZE, head_dim=128),
    "gemma2-softcap": lambda: Gemma2Config(
        **_THREE_LAYERS,
        head_dim=256,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        query_pre_attn_scalar=100,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=10.0,
        attn_implementation="eager",
        tie_word_embeddings=False,
    ),
    "gemma3-two-ropes": lambda: Gemma3TextConfig(
        **_THREE_LAYERS,
        head_dim=64,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        query_pre_attn_scalar=100,
        rope_parameters=_GEMMA3_ROPE,
        tie_word_embeddings=False,
    ),
    "phi3-long": lambda: phi3(4),
    "phi3-short": lambda: phi3(CONTEXT),
}

# One layer of one head: attention over 128K tokens is a minute's work then.
_LONG = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


def long_model() -> PreTrainedModel:
    """A model whose context is 131,072 tokens."""
    return model_of(LlamaConfig(**{**_SIZE, **_LONG, "max_position_embeddings": 131072}, head_dim=64))


def tiny_llama(vocab_size: int, head_dim: int = 64) -> LlamaForCausalLM:
    """Two layers of one KV head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def small_model(name: str) -> PreTrainedModel:
    return model_of(FAMILIES[name]())


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start as constants, which would hide them
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if not model.config.tie_word_embeddings:
            # Or the last token alone decides the next one, and equal tokens say nothing about attention.
            model.get_input_embeddings().weight.mul_(0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def exact(model: PreTrainedModel) -> list[BatchedKVQuantizer]:
    shape = model_shape(model)
    return [BatchedKVQuantizer.exact(shape.num_kv_heads, shape.head_dim)] * shape.num_layers


def quantized(model: PreTrainedModel, **spec: Any) -> list[BatchedKVQuantizer]:
    """Quantizers calibrated on random tokens.

    With some noise: the same few tokens come again later, and a threshold that is one of their values would be a coin
    toss for each of them.
    """
    torch.manual_seed(2)
    with torch.inference_mode(), record_keys_and_values(model) as recorded:
        model(input_ids=prompts_of([256], seed=1)[0][None], use_cache=False)
        layers = [[x[0].transpose(0, 1) for x in layer] for layer in recorded]
    noisy = [[x + 0.02 * x.std() * torch.randn_like(x) for x in layer] for layer in layers]
    return [BatchedKVQuantizer.calibrate(QuantSpec(**spec), keys, values) for keys, values in noisy]


def prompts_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}
