"""Tokenizer and token streams for training: made once per run folder, then read back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvquant.data.corpus import load_corpus, read_text, split_documents
from kvquant.data.curriculum import Tokens

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# A BPE of a few thousand entries settles on far less text than the model sees.
_TOKENIZER_CHARACTERS = 12_000_000
_CHUNK_CHARACTERS = 20_000


def load_tokenizer(work_dir: Path, task: Any) -> PreTrainedTokenizerFast:
    """The run's byte-level BPE of `task.vocab_size` entries, trained on its text when it is not there yet."""
    folder = work_dir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        texts = [text for documents in _texts(task) for text in _sample(documents, _TOKENIZER_CHARACTERS)]
        train_tokenizer(texts, task.vocab_size, task.context).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True
    )
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; every digit is a token of its own, so that numbers are copied digit by digit.

    texts (Sequence[str]): training text. context (int): the model's context, tokens, kept as `model_max_length`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_text(
    work_dir: Path, tokenizer: PreTrainedTokenizerFast, task: Any
) -> tuple[list[Tokens], list[float]]:
    """Token streams (uint16, [n] each; documents end with end-of-text) and the share of training drawn from each."""
    folder = work_dir / "tokens"
    folder.mkdir(exist_ok=True)
    streams = []
    for index, documents in enumerate(_texts(task)):
        path = folder / f"{index}.npy"
        if not path.exists():
            aside = path.with_suffix(".tmp.npy")
            np.save(aside, encode_documents(tokenizer, documents))
            os.replace(aside, path)
        streams.append(np.load(path, mmap_mode="r"))
    rest = len(streams) - 1
    shares = [task.stdlib_share if rest else 1.0] + [(1.0 - task.stdlib_share) / rest] * rest
    return streams, shares


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tokens:
    """All documents as one stream of token ids, uint16 [n], an end-of-text after each."""
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    parts: list[Tokens] = []
    for document in documents:
        # Cut at line ends: one call on a whole book holds all its offsets in memory.
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(
            list(_chunks(document)), add_special_tokens=False
        )
        parts += [np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings] + [end]
    return np.concatenate(parts)


def _texts(task: Any) -> Iterator[list[str]]:
    """Documents per source: the standard library's train split first, then each file of `task.text_paths`."""
    yield [document.text for document in load_corpus("stdlib").train]
    for path in task.text_paths:
        yield split_documents(read_text(Path(path)))


def _sample(documents: Sequence[str], characters: int) -> list[str]:
    """The same number of characters from the middle of every document, at most `characters` in all."""
    share = characters // max(1, len(documents))
    return [document[max(0, (len(document) - share) // 2) :][:share] for document in documents]


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end
