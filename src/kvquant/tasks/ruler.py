"""``task=ruler``: retrieval questions in RULER's categories, generated at any length or read from RULER's own files."""

from __future__ import annotations

from typing import Any

from kvquant.data.rows import read_rows
from kvquant.data.ruler import FIELDS, WHERE_FROM, Question, generate, questions_of_rows
from kvquant.errors import DataError
from kvquant.tasks.questions import Item, answer, encode_prompt
from kvquant.tasks.setup import Workbench, open_workbench


def run(cfg: Any, context: Any) -> None:
    """Ask each question with an exact and with a quantized cache; scores are RULER's string match.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task = cfg.task
    read: list[tuple[Question, str]] = []
    for path in task.paths:
        # Read before the model: a broken file costs a second.
        rows = read_rows(path, FIELDS, where_from=WHERE_FROM, limit=task.count)
        found = questions_of_rows(rows, str(path))
        read += [(q, f"{path}, row {row.number}") for q, row in zip(found, rows, strict=True)]
    bench = open_workbench(cfg, context)
    questions = read or [(q, f"task.categories={q.category}") for q in _generated(bench, task, cfg.seed)]
    items = []
    for question, what in questions:
        for output in question.outputs:
            if not bench.tokenizer.encode(output, add_special_tokens=False):
                raise DataError(
                    f"{what}: the answer must tokenise to at least 1 token, got none; drop the row"
                )
        ids = encode_prompt(bench, question.prompt, question.answer_tokens, what)
        items.append(Item(question.category, ids, question.answer_tokens, question.score))
    answer(
        cfg, context, bench, items, f"RULER, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits"
    )


def _generated(bench: Workbench, task: Any, seed: int) -> list[Question]:
    length = bench.length("task.length", task.length)
    text = "\n".join(document.text for document in bench.corpus.heldout)

    def count_tokens(text: str) -> int:
        return len(bench.tokenizer.encode(text, verbose=False))

    return [
        question
        for category in task.categories
        for question in generate(category, count_tokens, text, length, task.count, seed)
    ]
