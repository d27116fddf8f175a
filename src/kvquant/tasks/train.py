"""`task=train`: train a small Llama on real text with retrieval mixed in, and leave it as a Hugging Face folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from kvquant.data.curriculum import KIND_NAMES, UNKNOWABLE, Batch, Curriculum, Stage
from kvquant.tasks.model_card import evaluate, write_card
from kvquant.tasks.run_task import device_name
from kvquant.tasks.train_setup import build_model, build_optimizers, export_model, learning_rate_factor
from kvquant.tasks.train_state import LossLog, TrainState, load_checkpoint, save_checkpoint
from kvquant.tasks.train_text import load_text, load_tokenizer

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run(cfg: Any, context: Any) -> None:
    """Train, measure the result on held-out text and write its card.

    Args:
        cfg: the composed configuration; the settings are those of `kvquant.config.TrainTask`.
        context: see `kvquant.tasks.run_task.TaskContext`.
    """
    task = cfg.task
    work_dir = Path(task.work_dir) if task.work_dir else context.run_dir
    training = train(task, cfg.seed, work_dir, context.device, context.console)
    model_dir = Path(training["model_dir"])
    with context.console.status("measuring perplexity and pass keys"):
        measured = evaluate(model_dir, dict(task.heldout_texts), task.heldout_characters)
    training["settings"] = OmegaConf.to_container(task, resolve=True)
    training["device"] = f"{device_name(context.device)}, {torch.get_num_threads()} threads"
    write_card(model_dir, training, measured, work_dir / "losses.csv")
    record = context.record
    record.metrics.update({key: value for key, value in training.items() if key != "settings"})
    record.metrics.update(measured)
    record.provenance["data_hash"] = measured["stdlib_sha256"]
    rows = [
        [label, f"{m['perplexity']:.2f}", f"{m['bits_per_byte']:.3f}", f"{m['tokens']:,}"]
        for label, m in measured["perplexity"].items()
    ]
    record.set_table("Held-out text", ["text", "perplexity", "bits per byte", "tokens"], rows)


def train(
    task: Any, seed: int, work_dir: Path, device: torch.device | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train, or go on training, and export the model.

    Everything a continuation needs lies in ``work_dir``: tokenizer, token streams, checkpoint, losses.csv. Time spent
    between two calls does not count, so a run can be stopped and its learning rate still ends at zero.

    Args:
        task: the settings, see `kvquant.config.TrainTask`.
        seed: seeds initial weights and batches.
        work_dir: made if missing.
        device: the CPU by default.
        console: where the progress bar goes; none by default.

    Returns:
        parameters, tokens_seen, steps, train_s, losses (the last step's, nats per kind of token), model_dir.

    Raises:
        ConfigError: this torch lacks the optimizer asked for.
        DataError: a text is missing or too short, or the checkpoint is another model's.
    """
    device = device or torch.device("cpu")
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(work_dir, task)
    sources, shares = load_text(work_dir, tokenizer, task)
    curriculum = Curriculum(tokenizer, sources, shares, seed)
    model = build_model(task).to(device)
    optimizers = build_optimizers(model, task)
    state = load_checkpoint(work_dir, model, optimizers) or TrainState()
    model_dir = Path(task.model_dir) if task.model_dir else work_dir / "model"

    def keep() -> None:
        save_checkpoint(work_dir, model, optimizers, state)
        export_model(model, tokenizer, model_dir)

    with LossLog(work_dir / "losses.csv", state.step) as log:
        _loop(task, curriculum, model, optimizers, state, log, keep, console)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": state.tokens,
        "steps": state.step,
        "train_s": state.elapsed_s,
        "losses": state.losses,
        "model_dir": str(model_dir),
    }


def _loop(
    task: Any,
    curriculum: Curriculum,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    state: TrainState,
    log: LossLog,
    keep: Callable[[], None],
    console: Console | None,
) -> None:
    kind_weights = np.array([0.0, 1.0, 1.0, task.answer_weight], dtype=np.float32)
    loss_of = _loss_function(model, task)
    started = time.monotonic() - state.elapsed_s
    kept_s = state.elapsed_s
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None, transient=True) as bar:
        shown = bar.add_task("train", total=1.0, note="")
        while (progress := _progress(task, state)) < 1.0:
            stage: Stage = next(stage for stage in task.stages if progress < stage.until)
            factor = learning_rate_factor(task, state.step, progress)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = task.learning_rate * factor
            batch = curriculum.batch(state.step, stage)
            state.losses = _step(model, optimizers, loss_of, batch, kind_weights, task.bfloat16)
            state.step += 1
            state.tokens += batch.kinds.size
            state.elapsed_s = time.monotonic() - started
            log.write(state, stage.length, factor)
            note = f"step {state.step}, text {state.losses.get('text', math.nan):.3f} nats"
            bar.update(shown, completed=progress, note=note)
            if state.elapsed_s - kept_s > 60 * task.checkpoint_minutes:
                keep()
                kept_s = state.elapsed_s
    keep()


def _progress(task: Any, state: TrainState) -> float:
    """Share of the budget that is spent, by steps or by seconds of training."""
    if task.max_steps is not None:
        return state.step / float(task.max_steps)
    return state.elapsed_s / (60.0 * float(task.max_minutes))


def _loss_function(model: LlamaForCausalLM, task: Any) -> Loss:
    """(input_ids [B, T], targets [B, T], weights [B, T]) -> weighted mean loss, and loss per token [B * T], in nats."""

    def loss(input_ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=input_ids, use_cache=False).logits
        per_token = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (per_token * weights.flatten()).sum() / weights.sum().clamp_min(1.0), per_token.detach()

    if not task.compile:
        return loss
    # One graph per sequence length is faster than one for all; a curriculum has more lengths than the default limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(task.stages) + 2)
    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


def _step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Loss,
    batch: Batch,
    kind_weights: npt.NDArray[np.float32],
    bfloat16: bool,
) -> dict[str, float]:
    """Update the model once; returns the mean loss of every kind of token in the batch, in nats."""
    device = model.device
    ids = torch.from_numpy(batch.input_ids).to(device)
    weights = torch.from_numpy(kind_weights[batch.kinds]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        loss, per_token = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    values = per_token.float().cpu().numpy()
    kinds = batch.kinds.reshape(-1)
    return {
        name: float(values[kinds == kind].mean())
        for kind, name in enumerate(KIND_NAMES)
        if kind != UNKNOWABLE and (kinds == kind).any()
    }
