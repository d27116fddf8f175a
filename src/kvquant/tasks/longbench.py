"""``task=longbench``: LongBench's English tasks from local jsonl files, with their published metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.data.longbench import FIELDS, WHERE_FROM, Suite, check_answers, hub_file, suite
from kvquant.data.rows import Row, read_rows
from kvquant.errors import DataError
from kvquant.tasks.questions import Item, answer, encode_prompt
from kvquant.tasks.setup import open_workbench


def run(cfg: Any, context: Any) -> None:
    """Answer each row with an exact and with a quantized cache; prompts that are too long lose their middle.

    Args:
        cfg: the composed configuration.
        context: see :class:`kvquant.tasks.run_task.TaskContext`.
    """
    task = cfg.task
    loaded: list[tuple[str, Suite, list[Row], str]] = []
    suites = {name: suite(name) for name in task.suites}
    for name in suites:
        if task.path == "hub":
            path = str(hub_file(name, context.run_dir / "longbench"))
        else:
            given = Path(task.path).expanduser()
            path = str(given / f"{name}.jsonl" if given.is_dir() else given)
        rows = read_rows(path, FIELDS, where_from=f"{WHERE_FROM}, {name}.jsonl", limit=task.count)
        check_answers(rows, path)
        loaded.append((name, suites[name], rows, path))
    bench = open_workbench(cfg, context)
    items = []
    for name, found, rows, path in loaded:
        for number, row in rows:
            what = f"{path}, row {number}"
            if not any(bench.tokenizer.encode(str(a), add_special_tokens=False) for a in row["answers"]):
                raise DataError(
                    f"{what}: an answer must tokenise to at least 1 token, got none; drop the row"
                )
            prompt = found.prompt.format(context=row["context"], input=row["input"])
            room = min(found.answer_tokens, bench.context // 4)
            ids = encode_prompt(bench, prompt, room, what, cut=True)
            items.append(Item(name, ids, room, _scorer(found, row)))
    answer(
        cfg,
        context,
        bench,
        items,
        f"LongBench, {cfg.model.name}, quant={cfg.quant.method} {cfg.quant.bits} bits",
    )


def _scorer(found: Suite, row: dict[str, Any]) -> Any:
    return lambda text: found.score(text, row)
