"""Prompt lengths and texts: what a batch's description turns into."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvquant.data.corpus import Document
from kvquant.data.prompts import calibration_stream, cut_prompts, prompt_lengths, read_trace, token_stream
from kvquant.errors import DataError


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text: str, **kwargs: object) -> list[int]:
        return [ord(c) for c in text]


def batch(**changes: object) -> SimpleNamespace:
    fields = {
        "kind": "ragged",
        "num_prompts": 4,
        "prompt_tokens": 100,
        "quantile_levels": [0.1, 0.5, 0.9],
        "trace_quantiles": [100, 500, 1000],
        "trace_path": None,
        "decode_tokens": 8,
        "max_fraction_of_context": 0.5,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_ragged_lengths_follow_the_quantiles_and_scale_to_the_context() -> None:
    # Levels 1/8, 3/8, 5/8, 7/8 of the trace, scaled by 1000/1000.
    assert prompt_lengths(batch(), 2000, 0) == [125, 375, 656, 969]


@pytest.mark.parametrize("kind", ["single", "uniform"])
def test_equal_lengths(kind) -> None:
    count = 1 if kind == "single" else 3
    assert prompt_lengths(batch(kind=kind, num_prompts=count), 2000, 0) == [100] * count


def test_lengths_beyond_the_context_name_the_setting() -> None:
    with pytest.raises(DataError, match=r"context of 104, got 100 \+ 8; lower batch.prompt_tokens"):
        prompt_lengths(batch(kind="uniform"), 104, 0)


def test_a_trace_is_drawn_from_and_scaled(tmp_path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,7\n1,400,9\n")
    assert read_trace(trace).tolist() == [[100, 7], [400, 9]]
    drawn = prompt_lengths(batch(kind="trace", trace_path=trace, num_prompts=50), 800, 3)
    assert set(drawn) == {100, 400}
    assert drawn == prompt_lengths(batch(kind="trace", trace_path=trace, num_prompts=50), 800, 3)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n0,x,1\n"])
def test_other_files_are_no_traces(tmp_path, content) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    with pytest.raises(DataError, match=r"batch.trace_path"):
        read_trace(trace)


def test_streams_stop_where_asked() -> None:
    documents = [Document("a", "abc"), Document("b", "defg")]
    assert token_stream(Letters(), documents, 5).tolist() == [ord(c) for c in "abcde"]
    with pytest.raises(DataError, match="at least 1 token"):
        token_stream(Letters(), [], 5)


def test_calibration_takes_one_sequence_of_every_document_first() -> None:
    documents = [Document(name, name * 10) for name in "abcd"]
    stream = calibration_stream(Letters(), documents, 12, 3)
    assert "".join(map(chr, stream.tolist())) == "aaabbbcccddd"
    assert len(calibration_stream(Letters(), documents, 24, 3)) == 24
    spread = calibration_stream(Letters(), documents, 6, 3)
    assert "".join(map(chr, spread.tolist())) == "aaaccc"


def test_calibration_on_too_little_text() -> None:
    documents = [Document("a", "ab"), Document("b", "cd")]
    assert len(calibration_stream(Letters(), documents, 100, 4)) == 4
    with pytest.raises(DataError, match="sequence of 5 tokens, got 4"):
        calibration_stream(Letters(), documents, 100, 5)


def test_prompts_are_consecutive_and_must_fit() -> None:
    assert [p.tolist() for p in cut_prompts(torch.arange(6), [1, 3])] == [[0], [1, 2, 3]]
    with pytest.raises(DataError, match="must hold 7 tokens"):
        cut_prompts(torch.arange(6), [7])
