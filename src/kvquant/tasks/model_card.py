"""Measures a trained model and writes its card; every number in the card comes from here."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant.data.corpus import Corpus, load_corpus, read_text, split_documents
from kvquant.data.curriculum import Tokens
from kvquant.data.synthetic import passkey_accuracy
from kvquant.errors import DataError
from kvquant.tasks.train_text import encode_documents

PASSKEY_LENGTHS = (64, 128, 256, 512, 1024, 2048)
PASSKEY_TRIALS = 24
SEQUENCE_TOKENS = 1024
# Where this very machine keeps its files is nobody else's business.
_LOCAL_SETTINGS = ("work_dir", "model_dir", "text_paths", "heldout_texts")


def evaluate(model_dir: Path, texts: dict[str, str], max_characters: int | None) -> dict[str, Any]:
    """Perplexity and pass keys of the model in `model_dir`, computed in fp32 from its stored weights.

    texts (dict): further held-out texts, label to path; `wikitext2` is read as that data set's raw rows, any other label
        as a text file whose documents are separated by 0x1E. The standard library's held-out split is always measured.
    max_characters (int | None): at most this much per text, an equal share from the start of every document; None: all.
    Returns perplexity, bits_per_byte and tokens per text, and passkey accuracy by text and length.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32).eval()
    stdlib = load_corpus("stdlib")
    measured: dict[str, Any] = {"stdlib_sha256": stdlib.sha256, "perplexity": {}, "passkey_accuracy": {}}
    lengths = [length for length in PASSKEY_LENGTHS if length <= model.config.max_position_embeddings]
    for label, documents in {"stdlib held-out": _documents(stdlib), **_files(texts)}.items():
        if max_characters is not None:
            # As much of every document, so that no first book stands for all of them.
            documents = [document[: max_characters // len(documents)] for document in documents]
        stream = encode_documents(tokenizer, documents)
        bytes_per_token = sum(len(document.encode()) for document in documents) / len(stream)
        measured["perplexity"][label] = _perplexity(model, stream, bytes_per_token)
        measured["passkey_accuracy"][label] = passkey_accuracy(
            model, tokenizer, stream.astype(np.int64), lengths, PASSKEY_TRIALS, batch_size=4
        )
    return measured


def write_card(model_dir: Path, training: dict[str, Any], measured: dict[str, Any], losses_csv: Path) -> Path:
    """Write README.md and training.json into `model_dir`; returns the card's path.

    training (dict): what `kvquant.tasks.train.train` returned, and `settings`, the task's fields.
    measured (dict): what `evaluate` returned.
    """
    curve = loss_curve(losses_csv)
    names = ", ".join(Path(path).name for path in training["settings"]["text_paths"])
    note = training["settings"]["text_note"] or names or "nothing else"
    settings = {key: value for key, value in training["settings"].items() if key not in _LOCAL_SETTINGS}
    training = {**{k: v for k, v in training.items() if k != "model_dir"}, "settings": settings}
    aside = model_dir / "training.json.tmp"
    aside.write_text(
        json.dumps({"training": training, "measured": measured, "loss_curve": curve}, indent=1) + "\n"
    )
    os.replace(aside, model_dir / "training.json")
    lengths = list(next(iter(measured["passkey_accuracy"].values())))
    perplexity_rows = [
        f"| {label} | {m['perplexity']:.2f} | {m['bits_per_byte']:.3f} | {m['tokens']:,} |"
        for label, m in measured["perplexity"].items()
    ]
    passkey_rows = [
        f"| {label} | " + " | ".join(f"{100 * share:.0f}%" for share in by_length.values()) + " |"
        for label, by_length in measured["passkey_accuracy"].items()
    ]
    stages = [
        f"| {100 * stage['until']:.0f}% | {stage['length']} | {100 * stage['copy_share']:.0f}% | "
        f"{100 * stage['retrieval_share']:.0f}% |"
        for stage in settings["stages"]
    ]
    curve_rows = [
        f"| {p['tokens']:,} | {p['length']} | {_nats(p, 'text')} | {_nats(p, 'answer')} |" for p in curve
    ]
    card = _CARD.format(
        parameters=training["parameters"],
        layers=settings["num_layers"],
        heads=settings["num_heads"],
        kv_heads=settings["num_kv_heads"],
        head_dim=settings["head_dim"],
        hidden=settings["hidden_size"],
        context=settings["context"],
        vocab=settings["vocab_size"],
        tokens=training["tokens_seen"],
        steps=training["steps"],
        minutes=training["train_s"] / 60,
        device=training["device"],
        note=note,
        optimizer=settings["optimizer"],
        schedule=settings["schedule"],
        stdlib_share=100 * settings["stdlib_share"],
        trials=PASSKEY_TRIALS,
        sequence=SEQUENCE_TOKENS,
        sha256=measured["stdlib_sha256"],
        stages="\n".join(stages),
        perplexity="\n".join(perplexity_rows),
        passkey_head=" | ".join(str(n) for n in lengths),
        passkey_rule="|---:" * len(lengths),
        passkey="\n".join(passkey_rows),
        curve="\n".join(curve_rows),
    )
    path = model_dir / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def loss_curve(losses_csv: Path, points: int = 24) -> list[dict[str, float]]:
    """losses.csv as at most `points` means over equal shares of the steps, each with the tokens seen by its end."""
    with losses_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve = []
    for part in np.array_split(np.arange(len(rows)), min(points, len(rows))):
        point: dict[str, float] = {name: float(rows[part[-1]][name]) for name in ("step", "tokens", "length")}
        for name in ("text", "copy", "answer"):
            values = [float(rows[index][name]) for index in part if rows[index][name]]
            if values:
                point[name] = round(float(np.mean(values)), 4)
        curve.append({k: int(v) if k in ("step", "tokens", "length") else v for k, v in point.items()})
    return curve


def _perplexity(model: Any, stream: Tokens, bytes_per_token: float, batch_size: int = 8) -> dict[str, float]:
    """Perplexity over sequences of `SEQUENCE_TOKENS` that do not overlap; a sequence's first token is not predicted."""
    rows = len(stream) // SEQUENCE_TOKENS
    if rows == 0:
        raise DataError(
            f"a held-out text must hold {SEQUENCE_TOKENS} tokens, got {len(stream)}; give a longer one"
        )
    ids = torch.from_numpy(stream[: rows * SEQUENCE_TOKENS].astype(np.int64)).view(rows, SEQUENCE_TOKENS)
    nats = 0.0
    for batch in ids.split(batch_size):
        with torch.inference_mode():
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            nats += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    predicted = rows * (SEQUENCE_TOKENS - 1)
    mean = nats / predicted
    return {
        "perplexity": math.exp(mean),
        "bits_per_byte": mean / math.log(2) / bytes_per_token,
        "tokens": predicted,
    }


def _documents(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.heldout]


def _files(texts: dict[str, str]) -> dict[str, list[str]]:
    found = {}
    for label, path in texts.items():
        if label == "wikitext2":
            found[label] = _documents(load_corpus("wikitext2", path))
        else:
            found[label] = split_documents(read_text(Path(path)))
    return found


def _nats(point: dict[str, float], name: str) -> str:
    return f"{point[name]:.3f}" if name in point else ""


_CARD = """\
---
language: en
license: mit
library_name: transformers
---
# The tiny model of KV Cache Optimizer

A Llama of {parameters:,} parameters, small enough to travel with the source and sharp enough to notice what happens to its
KV cache: {layers} layers, hidden size {hidden}, {heads} query heads on {kv_heads} key-value heads of {head_dim}, tied
embeddings, context {context}, byte-level BPE of {vocab} entries (every digit a token). Weights are bf16. It is an
instrument, not an assistant: it predicts English prose and Python sources and finds numbers it was told earlier.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("src/kvquant/assets/tiny")
    tokenizer = AutoTokenizer.from_pretrained("src/kvquant/assets/tiny")

## Training

By this project's own `task=train`: {tokens:,} tokens in {steps:,} steps and {minutes:.0f} minutes on {device}
(optimizer {optimizer}, schedule {schedule}, bf16 arithmetic on fp32 weights). Text: the train split of Python's own standard
library, {stdlib_share:.0f}% of the text tokens (PSF licence, see python.org/psf-license), and {note}. Held-out files were never trained on. The curriculum, by share of
the training time; what is neither copying nor retrieval is plain text:

| until | sequence length | copying | retrieval in text |
|---:|---:|---:|---:|
{stages}

Mean training loss in nats per token (`answer`: tokens of a number asked for, given what stood earlier in the sequence):

| tokens seen | sequence length | text | answer |
|---:|---:|---:|---:|
{curve}

## Measured

fp32 arithmetic on the stored bf16 weights. Perplexity over sequences of {sequence} tokens that do not overlap, each from its
second token on:

| text | perplexity | bits per byte | tokens predicted |
|---|---:|---:|---:|
{perplexity}

Pass keys: five random digits hidden at evenly spread depths of real text, asked for at the end, all of them to be produced
greedily; {trials} trials per cell, by total length in tokens:

| text | {passkey_head} |
|---{passkey_rule}|
{passkey}

The standard library's held-out split depends on the Python version; this one is corpus {sha256}.

## Limits

It knows no facts, follows no instructions and repeats itself when left to write on. Books of that age carry the views of
their time. Numbers are measured in the context it was trained for; beyond {context} tokens nothing was tried.
"""
