"""LongBench (Bai et al. 2024, arXiv:2308.14508): its English tasks from local jsonl, with their published metrics.

Prompts and metrics follow github.com/THUDM/LongBench (config/dataset2prompt.json, metrics.py); the files are those of
its data.zip, one jsonl per task.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
import string
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvquant.data.rows import Kinds, Row
from kvquant.errors import DataError

WHERE_FROM = "huggingface.co/datasets/THUDM/LongBench, data.zip"
FIELDS: dict[str, Kinds] = {
    "input": (str,),
    "context": (str,),
    "answers": (list,),
    "all_classes": (list, type(None)),
}


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that prediction and answer share, case, punctuation and articles aside (SQuAD's)."""
    return _f1(_normalized(prediction), _normalized(answer))


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of summaries (Lin 2004, 3.2) as LongBench has it from the package rouge 1.0: F1 of distinct words.

    What matches is the union, over pairs of sentences, of the words of their longest common subsequence; a sentence ends
    at every full stop.
    """
    a, b = ([" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (prediction, answer))
    if not a or not b:
        return 0.0
    matched = set().union(*(_common_subsequence(theirs, ours) for theirs in b for ours in a))
    return 2 * len(matched) / (len(set().union(*a)) + len(set().union(*b)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """One over the number of classes that the prediction names, if the right one is among them."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the paragraph's."""
    wanted = re.findall(r"Paragraph (\d+)", answer)
    numbers = re.findall(r"\d+", prediction)
    return sum(n == wanted[0] for n in numbers) / len(numbers) if numbers and wanted else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return sum(n == answer for n in numbers) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Ratio of matching characters between the first line that is code and the answer."""
    lines = [line for line in prediction.lstrip("\n").split("\n") if not re.search(r"[`#]|//", line)]
    return round(100 * difflib.SequenceMatcher(None, lines[0] if lines else "", answer).ratio()) / 100


@dataclasses.dataclass(frozen=True)
class Suite:
    """One LongBench task: its prompt, its metric, how many tokens an answer may take, whether one line is kept."""

    prompt: str
    metric: Callable[[str, str, Sequence[str]], float]
    answer_tokens: int
    first_line: bool = False

    def score(self, prediction: str, row: dict[str, Any]) -> float:
        """The best score over the row's answers, in [0, 1]."""
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        classes = row["all_classes"] or ()
        return max(self.metric(prediction, str(answer), classes) for answer in row["answers"])


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
# Word for word, slips included (narrativeqa's "asconcisely"): published scores answered these prompts.
SUITES = {
    "narrativeqa": Suite(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not "
        "provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        qa_f1,
        128,
    ),
    "qasper": Suite(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single "
        "phrase or sentence if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
        "explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, "
        "using a single phrase or sentence if possible. If the question cannot be answered based on the information in "
        'the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        qa_f1,
        128,
    ),
    "multifieldqa_en": Suite(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
        "text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        qa_f1,
        64,
    ),
    "hotpotqa": Suite(_PASSAGES, qa_f1, 32),
    "2wikimqa": Suite(_PASSAGES, qa_f1, 32),
    "musique": Suite(_PASSAGES, qa_f1, 32),
    "gov_report": Suite(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:",
        rouge_l,
        512,
    ),
    "qmsum": Suite(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
        "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one "
        "or more sentences.\n\nQuery: {input}\nAnswer:",
        rouge_l,
        512,
    ),
    "multi_news": Suite(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a "
        "one-page summary of all the news.\n\nSummary:",
        rouge_l,
        512,
    ),
    "trec": Suite(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        classification,
        64,
        first_line=True,
    ),
    "triviaqa": Suite(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
        "following are some examples.\n\n{context}\n\n{input}",
        qa_f1,
        32,
        first_line=True,
    ),
    "samsum": Suite(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        rouge_l,
        128,
        first_line=True,
    ),
    "passage_count": Suite(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how "
        "many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
        "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
        "on.\n\nThe final answer is: ",
        count,
        32,
    ),
    "passage_retrieval_en": Suite(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
        "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
        'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        retrieval,
        32,
    ),
    "lcc": Suite(
        "Please complete the code given below. \n{context}Next line of code:\n", code_similarity, 64
    ),
    "repobench-p": Suite(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", code_similarity, 64
    ),
}
# The six that the issue of long-context quality is usually decided on.
ENGLISH_QA = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")


def suite(name: str) -> Suite:
    """The task of that name, ``_e`` for LongBench-E aside.

    Raises:
        DataError: there is no such task here.
    """
    found = SUITES.get(name.removesuffix("_e"))
    if found is None:
        raise DataError(f"task.suites must be among {', '.join(SUITES)}, got {name}; try hotpotqa")
    return found


def hub_file(name: str, folder: Path) -> Path:
    """One task's jsonl out of LongBench's data.zip in the hub's cache (downloaded if there is internet).

    Args:
        name: the task.
        folder: where to unpack it.

    Raises:
        DataError: neither in the cache nor reachable, or without such a task.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        archive = hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"task.path=hub needs LongBench in the hub's cache, which cannot be reached from here; download {WHERE_FROM} "
            "where there is internet, and set task.path to the folder it unpacks to"
        ) from error
    try:
        with zipfile.ZipFile(archive) as file:
            return Path(file.extract(f"data/{name}.jsonl", folder))
    except KeyError as error:
        raise DataError(f"{archive} must hold data/{name}.jsonl, it does not; check task.suites") from error


def check_answers(rows: Sequence[Row], path: str) -> None:
    """Refuse rows that nothing could be right for.

    Raises:
        DataError: names the file and the row.
    """
    for number, row in rows:
        if not any(str(answer).strip() for answer in row["answers"]):
            raise DataError(
                f"{path}, row {number} must have an answer that is not empty, got {row['answers']!r}; drop the row"
            )


def _common_subsequence(x: list[str], y: list[str]) -> set[str]:
    """Words of one longest common subsequence, the one that a backward walk preferring ``x`` finds."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            above, left = length[i - 1][j], length[i][j - 1]
            length[i][j] = length[i - 1][j - 1] + 1 if word == other else max(above, left)
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _normalized(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((collections.Counter(prediction) & collections.Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)
