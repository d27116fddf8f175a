from types import SimpleNamespace

import numpy as np
import pytest

from kvquant.data.curriculum import ANSWER, COPY, TEXT, UNKNOWABLE, Curriculum
from kvquant.data.synthetic import key_value_prompts, passkey_accuracy, passkey_prompts, repeated_tokens
from kvquant.errors import DataError

FILLER = np.arange(300, 800, dtype=np.int64)


class ByteTokenizer:
    """One token per byte: enough to see where things end up."""

    def encode(self, text, add_special_tokens=False):
        assert not add_special_tokens
        return list(text.encode())


def _text(ids):
    return "".join(chr(i) if i < 256 else "." for i in ids)


@pytest.mark.parametrize("length", [160, 301, 480])
def test_passkey_has_the_length_asked_for_and_holds_its_answer(length):
    for prompt, answer in passkey_prompts(ByteTokenizer(), FILLER, length, count=6, seed=3):
        assert len(prompt) + len(answer) == length
        assert _text(answer).strip().isdigit()
        assert _text(prompt).count(_text(answer).strip()) == 2
        assert _text(prompt).endswith("The pass key is")


def test_passkeys_are_deterministic_and_differ_by_seed():
    def draw(seed):
        return [np.concatenate(p).tolist() for p in passkey_prompts(ByteTokenizer(), FILLER, 300, 4, seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_depths_cover_the_context():
    depths = [
        _text(prompt).index("\nThe pass key") / len(prompt)
        for prompt, _ in passkey_prompts(ByteTokenizer(), FILLER, 480, 8)
    ]
    assert depths == sorted(depths) and depths[0] < 0.15 and depths[-1] > 0.5


def test_key_value_asks_for_one_of_several():
    for prompt, answer in key_value_prompts(ByteTokenizer(), FILLER, 450, count=5, pairs=4):
        text = _text(prompt)
        assert len(prompt) + len(answer) == 450
        assert text.count("The number of") == 5
        name = text.rsplit("The number of ", 1)[1].removesuffix(" is")
        assert f"The number of {name} is{_text(answer)}." in text


def test_too_short_a_length_says_what_would_do():
    with pytest.raises(DataError, match="at least"):
        next(passkey_prompts(ByteTokenizer(), FILLER, 20, 1))
    with pytest.raises(DataError, match="filler"):
        next(passkey_prompts(ByteTokenizer(), FILLER[:10], 400, 1))


def test_repeated_tokens_repeat():
    tokens, period = repeated_tokens(np.random.default_rng(0), FILLER.astype(np.uint16), 97)
    assert len(tokens) == 97 and tokens.dtype == np.int64 and np.isin(tokens, FILLER).all()
    np.testing.assert_array_equal(tokens[period:], tokens[:-period])


@pytest.mark.parametrize("length", [48, 96, 257, 700])
def test_curriculum_rows_are_full_and_marked(length):
    sources = [np.arange(1000, 3000, dtype=np.uint16), np.arange(3000, 9000, dtype=np.uint16)]
    curriculum = Curriculum(ByteTokenizer(), sources, [0.25, 0.75], seed=5)
    stage = SimpleNamespace(
        until=1.0, length=length, batch_tokens=32 * length, copy_share=0.4, retrieval_share=0.3
    )
    batch = curriculum.batch(7, stage)
    assert batch.input_ids.shape == (32, length + 1) and batch.kinds.shape == (32, length)
    for row, kinds in zip(batch.input_ids, batch.kinds, strict=True):
        for position in np.flatnonzero(kinds == COPY) + 1:
            assert row[position] in row[:position]  # what is called a copy occurred before
    assert (batch.kinds == UNKNOWABLE).any() and (batch.kinds == COPY).any()
    assert (batch.kinds == TEXT).any()
    # With one token per byte a row of 48 holds no needle: it is left as plain text.
    assert (batch.kinds == ANSWER).any() == (length >= 96)
    np.testing.assert_array_equal(batch.input_ids, curriculum.batch(7, stage).input_ids)
    assert not np.array_equal(batch.input_ids, curriculum.batch(8, stage).input_ids)


class Copier:
    """A model that answers the pass key rightly, or with a wrong last digit."""

    device = "cpu"

    def __init__(self, right):
        self.right = right

    def __call__(self, input_ids, use_cache, logits_to_keep):
        import torch

        targets = input_ids[:, -logits_to_keep + 1 :].clone()
        if not self.right:
            targets[::2, -1] += 1
        logits = torch.nn.functional.one_hot(targets, 1000).float()
        return SimpleNamespace(logits=torch.cat([logits, logits[:, -1:]], dim=1))


@pytest.mark.parametrize(("right", "share"), [(True, 1.0), (False, 0.5)])
def test_accuracy_counts_whole_answers(right, share):
    accuracy = passkey_accuracy(Copier(right), ByteTokenizer(), FILLER, [200, 300], trials=8, batch_size=4)
    assert accuracy == {200: share, 300: share}
