"""Retrieval questions in RULER's categories (Hsieh et al. 2024, arXiv:2404.06654), of any length, fixed by a seed.

Questions are RULER's own sentences around text of the corpus at hand; a length counts prompt and answer together.
RULER's generated files (jsonl with ``input`` and ``outputs``) are read as they are.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvquant.data.rows import Kinds, Row
from kvquant.errors import DataError

WHERE_FROM = "generate it with github.com/NVIDIA/RULER (scripts/data/prepare.py), or leave task.paths=[]"
FIELDS: dict[str, Kinds] = {"input": (str,), "outputs": (list,)}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, what its answer must contain, and how many tokens the answer may take.

    ``alternatives``: one of the outputs is enough (RULER's qa), instead of a share of the score for each.
    """

    category: str
    prompt: str
    outputs: tuple[str, ...]
    answer_tokens: int
    alternatives: bool = False

    def score(self, prediction: str) -> float:
        """RULER's string match: the share of outputs that the prediction contains, whatever their case, in [0, 1]."""
        lower = prediction.lower()
        found = [output.lower() in lower for output in self.outputs]
        return float(any(found)) if self.alternatives else sum(found) / len(found)


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A question before its haystack: facts to hide, in their order, and what stands around them."""

    before: str
    facts: list[str]
    after: str
    outputs: tuple[str, ...]


_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_NEEDLE_BEFORE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)
_NEEDLE_AFTER = (
    "\nWhat are all the special magic numbers for {query} mentioned in the provided text? The special magic numbers for "
    "{query} mentioned in the provided text are"
)
_TRACK_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_TRACK_AFTER = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {n} variables are assigned the value {value}, they are: "
)
_COMMON_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_COMMON_AFTER = (
    "\nQuestion: What are the {n} most common words in the above list? Answer: The top {n} words that appear most often "
    "in the list are:"
)
_FREQUENT_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_FREQUENT_AFTER = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
# Tokens that RULER allows an answer of each kind; qa's files are read, not generated.
ANSWER_TOKENS = {
    "niah_single": 128,
    "niah_multikey": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa": 32,
}
CATEGORIES = tuple(name for name in ANSWER_TOKENS if name != "qa")
_NAMED = re.compile(rf"(?<![a-z])({'|'.join(ANSWER_TOKENS)})(_\d)?(?![a-z])")


def generate(
    category: str, count_tokens: Callable[[str], int], text: str, length: int, count: int, seed: int
) -> list[Question]:
    """Make questions of one category.

    Args:
        category: one of `CATEGORIES`.
        count_tokens: tokens of a text.
        text: the haystack, and the words of the word lists.
        length: tokens of prompt and answer together; the answer takes at most a quarter.
        count: how many questions.
        seed: the same one gives the same questions.

    Raises:
        DataError: the length cannot hold the question, or the text has too few words or sentences.
    """
    rng = np.random.default_rng([seed, length, CATEGORIES.index(category)])
    words = _words(text)
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if 20 <= len(s.strip()) <= 300]
    answer_tokens = min(ANSWER_TOKENS[category], length // 4)
    room = length - answer_tokens
    out = []
    for _ in range(count):
        if category in ("cwe", "fwe"):
            prompt, outputs = _word_list(category, rng, words, count_tokens, room)
        else:
            draft = _variables(rng) if category == "vt" else _needles(category, rng, words)
            prompt, outputs = _hide(draft, rng, sentences, count_tokens, room, category), draft.outputs
        out.append(Question(category, prompt, outputs, answer_tokens))
    return out


def _words(text: str) -> list[str]:
    found = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    if len(found) < 100:
        raise DataError(
            f"the text must hold 100 different words, got {len(found)}; choose a longer data.path"
        )
    return found


def _needles(category: str, rng: np.random.Generator, words: list[str]) -> _Draft:
    # No word twice: two needles of one key would have two right answers.
    keys = ["-".join(pair) for pair in rng.choice(words, (6, 2), replace=False)]
    numbers = [str(n) for n in rng.choice(9_000_000, 8, replace=False) + 1_000_000]
    if category == "niah_single":
        facts, asked, outputs = [(keys[0], numbers[0])], [keys[0]], numbers[:1]
    elif category == "niah_multikey":
        facts, asked, outputs = list(zip(keys[:4], numbers, strict=False)), [keys[0]], numbers[:1]
    elif category == "niah_multivalue":
        facts, asked, outputs = [(keys[0], n) for n in numbers[:4]], [keys[0]], numbers[:4]
    else:
        facts, asked, outputs = list(zip(keys[:4], numbers, strict=False)), keys[:4], numbers[:4]
    lines = [_NEEDLE.format(key=key, value=value) for key, value in facts]
    order = rng.permutation(len(lines))
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    return _Draft(
        _NEEDLE_BEFORE, [lines[i] for i in order], _NEEDLE_AFTER.format(query=query), tuple(outputs)
    )


def _variables(rng: np.random.Generator, hops: int = 4) -> _Draft:
    letters = list(string.ascii_uppercase)
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(rng.choice(letters, 5))
        if name not in names:
            names.append(name)
    value = str(int(rng.integers(10_000, 100_000)))
    facts = [f"VAR {names[0]} = {value}"]
    facts += [f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(hops)]
    return _Draft(_TRACK_BEFORE, facts, _TRACK_AFTER.format(value=value, n=hops + 1), tuple(names))


def _hide(
    draft: _Draft,
    rng: np.random.Generator,
    sentences: list[str],
    count_tokens: Callable[[str], int],
    room: int,
    category: str,
) -> str:
    """Put the facts, in order, between as many sentences of the haystack as fit; a short text repeats, as RULER's does."""
    if not sentences:
        raise DataError(
            "the text must hold a sentence of 20 to 300 characters, got none; choose another data.path"
        )
    start = int(rng.integers(0, len(sentences)))
    turned = sentences[start:] + sentences[:start]
    depths = np.sort(rng.random(len(draft.facts)))

    def prompt(n: int) -> str:
        parts = [turned[i % len(turned)] for i in range(n)]
        for depth, fact in reversed(list(zip(depths, draft.facts, strict=True))):
            parts.insert(round(float(depth) * n), fact)
        return draft.before + " ".join(parts) + draft.after

    _check_room(count_tokens(prompt(0)), room, category)
    return prompt(_largest(lambda n: count_tokens(prompt(n)), room))


def _word_list(
    category: str, rng: np.random.Generator, words: list[str], count_tokens: Callable[[str], int], room: int
) -> tuple[str, tuple[str, ...]]:
    if category == "cwe":
        # RULER's counts from 4K tokens on; short lists hold fewer common words, less often.
        common_count, often, rare = (10, 30, 3) if room >= 3000 else (4, 8, 2)
        drawn = [str(w) for w in rng.permutation(words)]
        common, others = drawn[:common_count], drawn[common_count:]
        noise = int(rng.integers(2**31))

        def prompt(n: int) -> str:
            # Where the words run out, all of them come more often, in the same proportion.
            rounds, rest = divmod(n, len(others))
            items = common * (often * max(1, -(-n // len(others)))) + (others * rounds + others[:rest]) * rare
            order = np.random.default_rng([noise, n]).permutation(len(items))
            lines = " ".join(f"{i}. {items[j]}" for i, j in enumerate(order, 1))
            return _COMMON_BEFORE + lines + _COMMON_AFTER.format(n=common_count)

        _check_room(count_tokens(prompt(0)), room, category)
        return prompt(_largest(lambda n: count_tokens(prompt(n)), room)), tuple(common)
    coded = ["".join(rng.choice(list(string.ascii_lowercase), 6)) for _ in range(200)]
    # Zipf with RULER's exponent of 2; the three most frequent stay apart by construction.
    weights = 1 / np.arange(1, len(coded) + 1) ** 2.0

    def frequent(n: int) -> str:
        times = np.maximum(np.floor(weights / weights.sum() * n), 0).astype(int)
        times[:3] += np.array([3, 2, 1])
        items = [w for w, k in zip(coded, times, strict=True) for _ in range(k)]
        order = np.random.default_rng(n).permutation(len(items))
        return _FREQUENT_BEFORE + " .... ".join(items[j] for j in order) + _FREQUENT_AFTER

    _check_room(count_tokens(frequent(0)), room, category)
    return frequent(_largest(lambda n: count_tokens(frequent(n)), room)), tuple(coded[:3])


def _check_room(needed: int, room: int, category: str) -> None:
    if needed > room:
        # The answer takes a quarter of a short length.
        raise DataError(
            f"task.length must hold the question of {category} ({needed} tokens) and its answer, got room for {room}; try "
            f"{-(-needed * 4 // 3)}"
        )


def _largest(count: Callable[[int], int], room: int) -> int:
    """The largest n, 0 at least, with ``count(n) <= room``; count grows with n, and nearly in proportion.

    A guess by proportion takes a few counts where bisection takes thirty: each reads the whole prompt.
    """
    low, at_low, high, guess = 0, count(0), None, 8
    while high is None or high - low > 1:
        tokens = count(guess)
        per_step = max(1.0, (tokens - at_low) / (guess - low))
        if tokens <= room:
            low, at_low = guess, tokens
        else:
            high = guess
        guess = low + max(1, int((room - at_low) / per_step))
        guess = guess if high is None else max(low + 1, min(guess, high - 1))
    return low


def category_of(path: Path) -> str:
    """The category of one of RULER's files (``<task>/validation.jsonl``) or of one that is named after its task."""
    for name in (path.stem, path.parent.name):
        if found := _NAMED.search(name):
            return found[0]
    return path.stem


def questions_of_rows(rows: Sequence[Row], path: str) -> list[Question]:
    """Questions of one of RULER's own files; what its path does not name is scored and cut as a needle.

    Raises:
        DataError: a row without an answer; names the file and the row.
    """
    out = []
    category = category_of(Path(path))
    kind = next((name for name in ANSWER_TOKENS if category.startswith(name)), "niah_single")
    for number, row in rows:
        outputs = tuple(str(x) for x in row["outputs"])
        if not outputs or not all(x.strip() for x in outputs):
            raise DataError(
                f"{path}, row {number} must have an answer in outputs, got {list(outputs)}; drop the row"
            )
        prompt = str(row["input"]) + str(row.get("answer_prefix", ""))
        out.append(Question(category, prompt, outputs, ANSWER_TOKENS[kind], alternatives=kind == "qa"))
    return out
