"""A Llama of a realistic shape with random weights: ``python -m kvquant.models.random_llama FOLDER``.

For times and joules, which do not depend on what weights mean, on machines that have no checkpoint. Text goes through
the shipped model's tokenizer.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvquant.models.loading import SHIPPED_MODEL, load_tokenizer


def write_random_llama(folder: Path, *, num_layers: int, seed: int = 0, **shape: int) -> None:
    """Write a model folder with the layers of Llama 3.1 8B (hidden 4096, 32 heads, 8 KV heads of 128) in bf16.

    Args:
        folder: made if missing.
        num_layers: 32 is the whole model; fewer are as good for energy per layer.
        seed: of the weights.
        shape: overrides of transformers' LlamaConfig, for tests.
    """
    tokenizer = load_tokenizer()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "dtype": "bfloat16",
            **shape,
        }
    )
    torch.manual_seed(seed)
    # On a GPU billions of normal numbers take a moment, on a CPU a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED_MODEL / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a Llama with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    write_random_llama(given.folder, num_layers=given.layers)
