"""What a training run starts from and ends with: model, optimizers, learning rate, and the exported folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvquant.errors import ConfigError

# The order that `kvquant.tasks.train_text.train_tokenizer` gives them.
END_OF_TEXT_ID, PADDING_ID = 0, 1


def build_model(task: Any) -> LlamaForCausalLM:
    """Return a freshly initialised Llama in fp32 with tied embeddings, of the sizes in ``task``."""
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.hidden_size,
        intermediate_size=task.intermediate_size,
        num_hidden_layers=task.num_layers,
        num_attention_heads=task.num_heads,
        num_key_value_heads=task.num_kv_heads,
        head_dim=task.head_dim,
        max_position_embeddings=task.context,
        rope_parameters={"rope_type": "default", "rope_theta": task.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=PADDING_ID,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Residual branches start small, so that depth does not raise the variance of the stream (GPT-2).
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * task.num_layers))
    return model


def build_optimizers(model: nn.Module, task: Any) -> list[torch.optim.Optimizer]:
    """Return AdamW for everything, or Muon for the layers' matrices and AdamW for embeddings and norms.

    Muon's update is scaled to AdamW's size (Liu et al. 2025, "Muon is scalable"), so both take one learning rate.

    Raises:
        ConfigError: this torch has no Muon.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    betas = (0.9, 0.95)
    if task.optimizer == "adamw":
        groups = [
            {"params": matrices, "weight_decay": task.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=task.learning_rate, betas=betas)]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"task.optimizer=muon must have torch 2.9 or later, got {torch.__version__}; try adamw"
        )
    muon = torch.optim.Muon(
        matrices, lr=task.learning_rate, weight_decay=task.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=task.learning_rate, betas=betas, weight_decay=0.0)]


def learning_rate_factor(task: Any, step: int, progress: float) -> float:
    """Return the share of the full learning rate at ``progress`` in [0, 1]: warm-up by steps, decay by progress."""
    warmup = min(1.0, (step + 1) / max(1, task.warmup_steps))
    if task.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * min(1.0, max(0.0, 1.0 - progress) / task.decay_share)


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Write the model in bf16 and its tokenizer where ``from_pretrained`` finds them."""
    model_dir.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    _drop_traces(model_dir / "tokenizer_config.json", ("is_local", "local_files_only"))
    _drop_traces(model_dir / "config.json", ("_name_or_path",))
    for path in model_dir.iterdir():
        # safetensors writes for its owner alone; what is shipped is for everyone.
        path.chmod(0o644)


def _drop_traces(path: Path, keys: tuple[str, ...]) -> None:
    """Remove how a file was loaded last from what it says."""
    content = json.loads(path.read_text(encoding="utf-8"))
    aside = path.with_suffix(".tmp")
    aside.write_text(
        json.dumps({k: v for k, v in content.items() if k not in keys}, indent=2) + "\n", encoding="utf-8"
    )
    os.replace(aside, path)
