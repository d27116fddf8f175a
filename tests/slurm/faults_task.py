"""Stands in for ``task=quantize`` inside jobs: each value of ``task.tokens`` is a way to end. Needs no torch."""

from __future__ import annotations

import os
import signal
import time
import types
from typing import Any

import kvquant.tasks.run_task as run_task

OK, RAISES, KILLED, MEMORY, SLOW, ONCE = 1, 2, 3, 4, 5, 6
ITEMS = 12
ITEM_S = float(os.environ.get("FAULTS_ITEM_S", "1"))

run_task.seed_everything = lambda seed: None
run_task.resolve_device = lambda name: types.SimpleNamespace(type="cpu")


class TwoArguments(Exception):
    """Cannot be rebuilt from its pickle: a launcher that reads pickled errors dies of it."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def run(cfg: Any, context: Any) -> None:
    """End in the way ``task.tokens`` names."""
    way = cfg.task.tokens
    context.record.metrics["bits"] = cfg.quant.bits
    context.record.metrics["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if way == RAISES:
        raise TwoArguments("this point", "raises")
    if way == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if way == MEMORY:
        held = [bytearray(b"x" * 2**26) for _ in range(40)]
        time.sleep(60)
        del held
    if way == ONCE and not (context.run_dir / "tried").exists():
        (context.run_dir / "tried").touch()
        raise RuntimeError("only the second try works")
    if way == SLOW:
        total = sum(
            item.values["value"] for item in context.items.run(range(ITEMS), lambda k: slow(k, context))
        )
        context.record.metrics["sum"] = total


def slow(key: int, context: Any) -> dict[str, float]:
    """One item, and a mark that it was computed."""
    time.sleep(ITEM_S)
    with open(context.run_dir / "computed", "a") as file:
        file.write(f"{key}\n")
    return {"value": 0.1 * key}
