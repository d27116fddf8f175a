import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from kvquant.config import TrainStage, TrainTask
from kvquant.errors import ConfigError, DataError
from kvquant.results import RunRecord
from kvquant.tasks import train as train_task
from kvquant.tasks import train_text
from kvquant.tasks.model_card import loss_curve
from kvquant.tasks.train_setup import build_optimizers, learning_rate_factor

DEFAULTS = {
    "stdlib_share": 0.5,
    "vocab_size": 512,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "context": 128,
    "stages": [TrainStage(0.5, 64, 256, 0.5, 0.25), TrainStage(1.0, 128, 256, 0.1, 0.5)],
    "warmup_steps": 4,
    "max_minutes": None,
    "max_steps": 10,
    "compile": False,
    "bfloat16": False,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with tokenizer and token streams, so that only the first test pays for them."""
    folder = tmp_path_factory.mktemp("prepared")
    book = folder / "book.txt"
    book.write_text("It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 200)
    task = TrainTask(text_paths=[str(book)], **DEFAULTS)
    monkey = pytest.MonkeyPatch()
    text = "def add(first, second):\n    return first + second  # the sum of 12 and 345\n" * 400
    monkey.setattr(train_text, "_texts", lambda task: iter([[text], [book.read_text()]]))
    tokenizer = train_text.load_tokenizer(folder, task)
    train_text.load_text(folder, tokenizer, task)
    yield folder, task
    monkey.undo()


def _run(prepared, work_dir: Path, **changes):
    folder, task = prepared
    for name in ("tokenizer", "tokens"):
        if not (work_dir / name).exists():
            work_dir.mkdir(exist_ok=True)
            (work_dir / name).symlink_to(folder / name)
    return train_task.train(TrainTask(**{**vars(task), **changes}), 0, work_dir)


def _losses(work_dir: Path):
    with (work_dir / "losses.csv").open() as file:
        return [(row["step"], row["text"], row["copy"], row["answer"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_continued_run_equals_an_uninterrupted_one(prepared, tmp_path, monkeypatch, optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    whole = _run(prepared, tmp_path / "whole", optimizer=optimizer)
    assert whole["steps"] == 10 and whole["tokens_seen"] == 10 * 256

    # Checkpoint at every step and stop, as a job that runs out of time does, in the middle of step 7.
    real_step, calls = train_task._step, []

    def step(*args):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(None)
        return real_step(*args)

    monkeypatch.setattr(train_task, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        _run(prepared, tmp_path / "parts", optimizer=optimizer, checkpoint_minutes=0.0)
    monkeypatch.setattr(train_task, "_step", real_step)
    parts = _run(prepared, tmp_path / "parts", optimizer=optimizer)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert parts["losses"] == whole["losses"]


def test_the_exported_folder_loads_as_any_other(prepared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = Path(_run(prepared, tmp_path)["model_dir"])
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    assert model.dtype == torch.bfloat16
    text = "def naïve(x):\n    return 1234  # 'ünïcode'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4
    inputs = tokenizer("It was the", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert "/" not in (model_dir / "tokenizer_config.json").read_text()


def test_the_card_holds_what_was_measured(prepared, tmp_path, monkeypatch):
    from kvquant.tasks import model_card

    monkeypatch.setattr(model_card, "SEQUENCE_TOKENS", 64)
    monkeypatch.setattr(model_card, "PASSKEY_TRIALS", 2)
    monkeypatch.setattr(model_card, "PASSKEY_LENGTHS", (96, 4096))
    folder, task = prepared
    settings = {
        "work_dir": str(folder),
        "heldout_texts": {"book": str(folder / "book.txt")},
        "heldout_characters": 8000,
    }
    cfg = OmegaConf.create({"seed": 0, "task": OmegaConf.structured(TrainTask(**{**vars(task), **settings}))})
    record = RunRecord(tmp_path, task="train", config={})
    context = SimpleNamespace(
        run_dir=tmp_path, record=record, console=Console(quiet=True), device=torch.device("cpu")
    )
    train_task.run(cfg, context)
    measured, model_dir = record.metrics, Path(record.metrics["model_dir"])
    card = (model_dir / "README.md").read_text()
    assert f"{measured['parameters']:,} parameters" in card
    assert str(folder) not in card + (model_dir / "training.json").read_text()
    assert [row[0] for row in record.table.rows] == ["stdlib held-out", "book"]
    for label in ("stdlib held-out", "book"):
        assert f"| {label} | {measured['perplexity'][label]['perplexity']:.2f} |" in card
        assert list(measured["passkey_accuracy"][label]) == [96]  # longer than the context is left out
    assert len(loss_curve(folder / "losses.csv", points=5)) == 5


def test_a_checkpoint_of_another_shape_is_refused(prepared, tmp_path):
    _run(prepared, tmp_path, max_steps=1)
    with pytest.raises(DataError, match=r"must hold .* of shape"):
        _run(prepared, tmp_path, hidden_size=96)


def test_settings_that_cannot_work_are_refused():
    good = {**DEFAULTS}
    TrainTask.check(TrainTask(**good))
    for change, key in (
        ({"max_minutes": 3.0}, "max_minutes"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"stages": [TrainStage(until=0.5, length=64)]}, "stages"),
        ({"stages": [TrainStage(length=4096)]}, "stages"),
    ):
        with pytest.raises(ConfigError, match=f"task.{key} must be"):
            TrainTask.check(TrainTask(**{**good, **change}))


def test_muon_is_refused_where_torch_has_none(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match="muon"):
        build_optimizers(torch.nn.Linear(4, 4), TrainTask(**DEFAULTS))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_learning_rate_ends_at_zero(schedule):
    task = TrainTask(**{**DEFAULTS, "schedule": schedule})
    rates = [learning_rate_factor(task, 1000, progress) for progress in np.linspace(0, 1, 11)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate_factor(task, 0, 0.0) == 0.25


def test_the_bar_is_drawn_and_the_task_reports(prepared, tmp_path, monkeypatch):
    console = Console(record=True, force_terminal=False)
    folder, task = prepared
    for name in ("tokenizer", "tokens"):
        (tmp_path / name).symlink_to(folder / name)
    result = train_task.train(TrainTask(**{**vars(task), "max_steps": 2}), 0, tmp_path, console=console)
    assert result["steps"] == 2
