"""Calibration in two stages, kept by content: what a model does on a text, then what a spec makes of it.

Stage 1 (``activations-<hash>/``) runs the model with its loss and keeps every layer's pre-RoPE keys and values and
their Fisher information (the squared gradient of the loss, KVQuant section 3.2); no bit width changes it. Stage 2
(``codebooks-<hash>.safetensors``) holds thresholds and codebooks for one spec. Only where ``quant.sink_rule`` asks for
it, ``attention-<hash>.safetensors`` holds what attention the tokens of a few sequences draw. The hash of a name is that
of a fingerprint that also lies inside; a file whose inside says otherwise is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvquant.batched_quant import BatchedKVQuantizer
from kvquant.errors import CalibrationError
from kvquant.methods import method_class
from kvquant.models import ModelShape, model_shape, record_keys_and_values
from kvquant.models.attention_mass import attention_mass
from kvquant.spec import QuantSpec

FORMAT = 2
# Sequences whose attention weights are looked at: a layer has sinks or not, whatever the text.
_MASS_SEQUENCES = 4
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, description, total) -> the same items


def _no_track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return items


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """The tokens to calibrate on and the fingerprint of where they come from.

    Args:
        token_ids: one stream, int64 [T]; it is cut into sequences.
        sequence_length: tokens per sequence.
        model_hash: of the model's files.
        data_hash: of the corpus.
    """

    token_ids: Tensor
    sequence_length: int
    model_hash: str
    data_hash: str

    def fingerprint(self, dtype: torch.dtype) -> dict[str, str]:
        """Everything stage 1 depends on, as text."""
        return {
            "format": str(FORMAT),
            "model": self.model_hash,
            "data": self.data_hash,
            "tokens": str(len(self.token_ids)),
            "token_ids": hashlib.sha256(self.token_ids.numpy().tobytes()).hexdigest(),
            "sequence_length": str(self.sequence_length),
            "dtype": str(dtype),
        }


@dataclasses.dataclass
class Calibration:
    """A fitted quantizer for every layer of a model.

    Attributes:
        spec: what was asked for.
        quantizers: one per layer.
        fingerprint: model, data and settings it was made from.
        from_cache: whether it was found on disk.
    """

    spec: QuantSpec
    quantizers: list[BatchedKVQuantizer]
    fingerprint: dict[str, str]
    from_cache: bool = False


def exact_calibration(shape: ModelShape) -> Calibration:
    """The calibration of ``quant=none``: nothing to fit."""
    quantizers = [
        BatchedKVQuantizer.exact(shape.num_kv_heads, shape.head_dim) for _ in range(shape.num_layers)
    ]
    return Calibration(QuantSpec(method="none"), quantizers, {})


def calibrate(
    model: PreTrainedModel,
    text: CalibrationText,
    spec: QuantSpec,
    directory: str | Path,
    *,
    lock_timeout_s: float = 1800.0,
    overwrite: bool = False,
    track: Track = _no_track,
) -> Calibration:
    """Return the calibration of a model for a spec, from disk if it is there.

    Of several processes that need the same one, one computes and the others wait.

    Args:
        model: a supported model.
        text: what to calibrate on.
        spec: the settings.
        directory: where both stages are kept.
        lock_timeout_s: how long to wait for another process.
        overwrite: compute anew what is there.
        track: wraps loops in a progress bar.

    Raises:
        CalibrationError: a file is corrupt or was made for something else, the text is too short, memory is too
            small, or the wait was in vain.
    """
    method = method_class(spec.method)
    method.check(spec)
    if not method.calibrated:
        shape = model_shape(model)
        quantizers = [
            method.uncalibrated(spec, shape.num_kv_heads, shape.head_dim) for _ in range(shape.num_layers)
        ]
        return Calibration(spec, quantizers, {})
    folder = Path(directory).expanduser()
    # Resolved bits, so that bits=3 and key_bits=value_bits=3 share one file.
    settings = dataclasses.asdict(dataclasses.replace(spec, bits=spec.key_bits or spec.bits))
    fingerprint = {**text.fingerprint(model.dtype), "spec": json.dumps(settings, sort_keys=True)}
    path = folder / f"codebooks-{_short_hash(fingerprint)}.safetensors"
    if path.exists() and not overwrite:
        return Calibration(spec, _load_codebooks(path, fingerprint, spec), fingerprint, from_cache=True)
    with _only_one(path, lock_timeout_s):
        if path.exists() and not overwrite:
            return Calibration(spec, _load_codebooks(path, fingerprint, spec), fingerprint, from_cache=True)
        activations = activation_statistics(
            model, text, folder, lock_timeout_s=lock_timeout_s, overwrite=overwrite, track=track
        )
        num_layers = model_shape(model).num_layers
        drawn: list[Tensor | None] = [None] * num_layers
        if spec.sink_tokens and spec.sink_rule == "attention_mass":
            drawn = list(_attention_mass(model, text, folder, lock_timeout_s, overwrite, track))
        quantizers = []
        for layer in track(
            range(num_layers), f"codebooks, {spec.key_bits}/{spec.value_bits} bits", num_layers
        ):
            tensors = _load(activations / _layer_file(layer), text.fingerprint(model.dtype))
            quantizers.append(
                BatchedKVQuantizer.calibrate(
                    spec,
                    tensors["keys"],
                    tensors["values"],
                    key_fisher=tensors["key_fisher"],
                    value_fisher=tensors["value_fisher"],
                    positions=tensors["positions"],
                    attention_mass=drawn[layer],
                )
            )
        _save(path, _codebook_tensors(quantizers), fingerprint)
    return Calibration(spec, quantizers, fingerprint)


def activation_statistics(
    model: PreTrainedModel,
    text: CalibrationText,
    directory: str | Path,
    *,
    lock_timeout_s: float = 1800.0,
    overwrite: bool = False,
    track: Track = _no_track,
) -> Path:
    """Run stage 1 if it has not been run; returns its folder, one file per layer.

    Raises:
        CalibrationError: as :func:`calibrate`.
    """
    fingerprint = text.fingerprint(model.dtype)
    path = Path(directory).expanduser() / f"activations-{_short_hash(fingerprint)}"
    if path.exists() and not overwrite:
        return path
    with _only_one(path, lock_timeout_s):
        if path.exists() and not overwrite:
            return path
        _check_text_and_memory(model, text)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.mkdir(parents=True)
            for layer, tensors in enumerate(_record(model, text, track)):
                save_file(tensors, temporary / _layer_file(layer), metadata=fingerprint)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        except OSError as error:
            raise CalibrationError(_unwritable(path, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _attention_mass(
    model: PreTrainedModel,
    text: CalibrationText,
    folder: Path,
    lock_timeout_s: float,
    overwrite: bool,
    track: Track,
) -> list[Tensor]:
    """What the tokens of the first sequences draw in each layer, from disk if it is there."""
    fingerprint = {**text.fingerprint(model.dtype), "sequences": str(_MASS_SEQUENCES)}
    path = folder / f"attention-{_short_hash(fingerprint)}.safetensors"
    with _only_one(path, lock_timeout_s):
        if overwrite or not path.exists():
            sequences = text.token_ids.split(text.sequence_length)[:_MASS_SEQUENCES]
            drawn = attention_mass(model, track(sequences, "attention mass", len(sequences)))
            _save(path, {_layer_name(i): mass for i, mass in enumerate(drawn)}, fingerprint)
        tensors = _load(path, fingerprint)
    return [tensors[name] for name in sorted(tensors)]


def _record(model: PreTrainedModel, text: CalibrationText, track: Track) -> list[dict[str, Tensor]]:
    """Keys, values and squared gradients of every layer over the text, on the CPU."""
    sequences = text.token_ids.split(text.sequence_length)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(model_shape(model).num_layers)]
    device = next(model.parameters()).device
    with _parameters_frozen(model), record_keys_and_values(model) as recorded, torch.enable_grad():
        for ids in track(sequences, "Fisher information", len(sequences)):
            # Gradients flow from the embeddings: no parameter needs one, and none is touched.
            embeddings = model.get_input_embeddings()(ids[None].to(device)).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:].to(device), reduction="sum")
            loss.backward()
            for layer, (keys, values) in enumerate(recorded):
                assert keys.grad is not None and values.grad is not None
                # [1, H, S, D] -> [S, H, D]. bf16 squares: weights span many orders of magnitude, not many digits.
                rows = (keys, values, keys.grad.float().square(), values.grad.float().square())
                kept = [x.detach()[0].transpose(0, 1).cpu() for x in rows]
                parts[layer].append((kept[0], kept[1], kept[2].bfloat16(), kept[3].bfloat16()))
            recorded.clear()
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    names = ("keys", "values", "key_fisher", "value_fisher")
    out: list[dict[str, Tensor]] = []
    for layer_parts in parts:
        joined = {
            n: torch.cat(c).contiguous() for n, c in zip(names, zip(*layer_parts, strict=True), strict=True)
        }
        layer_parts.clear()
        for name in names[:2]:
            if not bool(torch.isfinite(joined[name]).all()):
                raise CalibrationError(
                    f"layer {len(out)} has NaN or infinity in its {name} on the calibration text; check model.dtype"
                )
        out.append({**joined, "positions": positions.clone()})
    return out


@contextlib.contextmanager
def _parameters_frozen(model: PreTrainedModel) -> Iterator[None]:
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_text_and_memory(model: PreTrainedModel, text: CalibrationText) -> None:
    shape, T = model_shape(model), len(text.token_ids)
    if min(T, text.sequence_length) < 2:
        raise CalibrationError(
            f"calibration needs sequences of at least 2 tokens, got {T} tokens in sequences of {text.sequence_length}"
        )
    if text.sequence_length > shape.max_length:
        raise CalibrationError(
            f"calibration.sequence_length must be at most the model's context of {shape.max_length}, "
            f"got {text.sequence_length}; try {shape.max_length}"
        )
    per_token = shape.num_layers * shape.num_kv_heads * shape.head_dim * 2 * (model.dtype.itemsize + 2)
    available = psutil.virtual_memory().available
    # Twice: the parts and their concatenation live side by side for a moment.
    if 2 * T * per_token > available:
        raise CalibrationError(
            f"calibration.tokens={T} needs {2 * T * per_token / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are "
            f"free; try calibration.tokens={available // (2 * per_token)}"
        )


@contextlib.contextmanager
def _only_one(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a file that is about to be made."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise CalibrationError(
            f"another process has been making {path.name} for {timeout_s:.0f} s; wait for it or raise "
            "calibration.lock_timeout_s"
        ) from error
    except OSError as error:
        raise CalibrationError(_unwritable(path, error)) from error
    try:
        yield
    finally:
        lock.release()


def _layer_name(layer: int) -> str:
    return f"layer_{layer:03d}"


def _layer_file(layer: int) -> str:
    return f"{_layer_name(layer)}.safetensors"


def _short_hash(fingerprint: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _codebook_tensors(quantizers: list[BatchedKVQuantizer]) -> dict[str, Tensor]:
    tensors = {}
    for layer, quantizer in enumerate(quantizers):
        state = {**quantizer.state(), "shape": torch.tensor([quantizer.num_kv_heads, quantizer.head_dim])}
        for name, tensor in state.items():
            # A copy each: safetensors refuses tensors that share memory, as codebook and midpoints may.
            tensors[f"{layer:03d}.{name}"] = tensor.clone().contiguous()
    return tensors


def _load_codebooks(path: Path, fingerprint: dict[str, str], spec: QuantSpec) -> list[BatchedKVQuantizer]:
    tensors = _load(path, fingerprint)
    layers = sorted({name.split(".")[0] for name in tensors})
    quantizers = []
    for layer in layers:
        state = {n.split(".")[1]: t for n, t in tensors.items() if n.split(".")[0] == layer}
        H, D = state.pop("shape").tolist()
        quantizers.append(method_class(spec.method).from_state(spec, H, D, state))
    return quantizers


def _load(path: Path, fingerprint: dict[str, str]) -> dict[str, Tensor]:
    """Read a safetensors file whose metadata must equal the fingerprint."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            wrong = sorted(k for k in {*found, *fingerprint} if found.get(k) != fingerprint.get(k))
            if wrong:
                raise CalibrationError(
                    f"{path} was made for another {', '.join(wrong)}; delete it, or set another calibration.dir"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError) as error:
        raise CalibrationError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); delete it and run again"
        ) from error


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(_unwritable(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> str:
    return f"calibration.dir must be writable, {path.parent} is not ({error}); set calibration.dir to another folder"
