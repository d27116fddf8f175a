"""Checkpoints of a training run: safetensors and JSON, each written aside and renamed, no pickle."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvquant.data.curriculum import KIND_NAMES
from kvquant.errors import DataError


@dataclass
class TrainState:
    """How far a run has come.

    step (int): updates done. tokens (int): tokens predicted, weighted or not. elapsed_s (float): seconds spent training,
    pauses left out. losses (dict): the last step's mean loss per kind of token, in nats.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    run_dir: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: TrainState
) -> None:
    """Write checkpoint.safetensors (weights, optimizer moments and, in its metadata, the state) atomically."""
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for slot, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer.{index}.{slot}.{name}"] = torch.as_tensor(value)
    path = run_dir / "checkpoint.safetensors"
    aside = path.with_suffix(".tmp")
    # One file holds weights and counters, so that no crash can leave the two out of step.
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, aside, metadata={"state": json.dumps(asdict(state))}
    )
    os.replace(aside, path)


def load_checkpoint(
    run_dir: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> TrainState | None:
    """Restore model and optimizers in place from `run_dir`; None when there is no checkpoint.

    Raises DataError when the checkpoint is of a model of another shape.
    """
    path = run_dir / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        state = TrainState(**json.loads(file.metadata()["state"]))
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = tensors.get(f"model.{name}")
            if stored is None or stored.shape != parameter.shape:
                raise DataError(
                    f"{path} must hold {name} of shape {tuple(parameter.shape)}, got "
                    f"{None if stored is None else tuple(stored.shape)}; use another run folder or the old settings"
                )
            parameter.copy_(stored)
    for index, optimizer in enumerate(optimizers):
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{index}."):
                _, _, slot, name = key.split(".", 3)
                moments.setdefault(int(slot), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return state


class LossLog:
    """losses.csv, one row per step; rows past the checkpoint that a continued run starts from are dropped.

    Args:
        path: the file. step: steps already done.
    """

    columns = ("step", "tokens", "elapsed_s", "length", "rate", *KIND_NAMES[1:])

    def __init__(self, path: Path, step: int) -> None:
        kept: list[list[str]] = []
        if step and path.exists():
            with path.open(newline="") as old:
                kept = [row for row in csv.reader(old) if row and row[0].isdigit() and int(row[0]) <= step]
        self._file = path.open("w", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerows([list(self.columns), *kept])

    def write(self, state: TrainState, length: int, rate: float) -> None:
        """Add a step: its sequence length, its share of the full learning rate, its losses in nats (empty: no such token)."""
        losses = [f"{state.losses[name]:.5f}" if name in state.losses else "" for name in KIND_NAMES[1:]]
        self._writer.writerow(
            [state.step, state.tokens, f"{state.elapsed_s:.2f}", length, f"{rate:.4f}", *losses]
        )

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
