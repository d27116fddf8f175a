"""Load a causal language model through transformers' Auto classes, and say what its attention looks like."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import kvquant
from kvquant.errors import ModelError
from kvquant.models.attention_hook import attention_modules
from kvquant.models.families import check_family, layer_window

SHIPPED_MODEL = Path(kvquant.__file__).parent / "assets" / "tiny"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the cache needs to know of a model: L layers, Hq query heads, H KV heads, D head_dim.

    ``windows`` holds each layer's sliding window in tokens, None where a layer sees everything.
    """

    family: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    windows: tuple[int | None, ...]


def resolve_path(path: str | Path | None) -> Path:
    """Return the folder of a model; None means the one shipped with the package.

    Raises:
        ModelError: the folder does not exist or holds no config.json.
    """
    folder = SHIPPED_MODEL if path is None else Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path must be a folder with config.json, tokenizer and safetensors, got {folder}; "
            "download the model there first, or use model=tiny"
        )
    return folder


def load_model(
    path: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a model for inference from local files.

    Args:
        path: a folder; None: the shipped tiny model.
        dtype: float32, bfloat16, float16, or auto (as stored).
        device: where to put it, unless ``device_map`` does.
        device_map: as in transformers (needs accelerate).
        trust_remote_code: whether to run code that the model's folder brings.
        revision: as in transformers.

    Raises:
        ModelError: files are missing or corrupt, or the family is not supported.
    """
    folder = resolve_path(path)
    # Before any weight is read: the auto class would refuse some families with less to say, and load the others.
    check_family(
        _load(
            lambda: AutoConfig.from_pretrained(
                folder,
                trust_remote_code=trust_remote_code,
                revision=revision or "main",
                local_files_only=True,
            ),
            f"the model in {folder}",
        )
    )
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = _load(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            local_files_only=True,
        ),
        f"the model in {folder}",
    )
    if device_map is None:
        model = model.to(device)
    return model.eval()


def load_tokenizer(
    path: str | Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ModelError: files are missing or corrupt.
    """
    folder = resolve_path(path)
    return _load(
        lambda: AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        ),
        f"the tokenizer in {folder}",
    )


def _load(action: Callable[[], _T], what: str) -> _T:
    """Run a loader without its own progress bar; whatever it raises on broken files becomes one line."""
    had_bar = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        return action()
    # Corrupt files surface as many types: OSError, ValueError, safetensors' and the tokenizer's own exceptions.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{what} cannot be loaded ({lines[0][:200]}); download or export it again"
        ) from error
    finally:
        if had_bar:
            logging.enable_progress_bar()


def model_shape(model: nn.Module) -> ModelShape:
    """Describe a model's attention.

    Raises:
        ModelError: the family is not supported; names it and the reason.
    """
    config: Any = model.config
    family = check_family(config)
    heads = config.num_attention_heads
    return ModelShape(
        family=family,
        num_layers=config.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_length=config.max_position_embeddings,
        windows=tuple(layer_window(module) for module in attention_modules(model)),
    )


def model_fingerprint(path: str | Path | None) -> str:
    """SHA-256 over a model folder's config and weights, safetensors or .bin (names, sizes, bytes of each file).

    Large shards make this the price of one read of the files; it is what ties a calibration to its model.
    """
    folder = resolve_path(path)
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
