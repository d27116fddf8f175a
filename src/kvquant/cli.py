"""What stands between the command line and Hydra: help, checks before anything runs, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kvquant.config import register_schemas
from kvquant.errors import ConfigError, KVQuantError

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
CONFIG_NAME = "config"
FULL_ERROR = "HYDRA_FULL_ERROR"


class _State:
    """What `execute` tells `main` across Hydra, which lies between them.

    Attributes:
        entered: whether a task was reached: before that, a failing write means the output folder.
        error: what ended a single run; raising it through Hydra would print a second line.
    """

    entered = False
    error: Exception | None = None


def conf_dir() -> Path:
    """Return the folder of YAML groups: the checkout's, or the copy inside an installed wheel.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent.parent / "conf", package / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise ConfigError(
        f"conf/ must lie beside src/ or inside {package}, got neither; install the package again"
    )


# What each group decides; its options say for themselves what they are.
GROUPS = {
    "batch": "how many prompts, how long, how many tokens follow",
    "cache": "block size, size of the pool, what prefill reads",
    "data": "the text, and how much of it",
    "experiment": "presets and their sweeps; they combine: experiment=[ablation_bits,smoke]",
    "hydra/launcher": "where a sweep's points run",
    "kernel": "which implementation runs",
    "model": "the language model; all but tiny read a folder on disk",
    "paper": "one run of the paper; experiment=paper sweeps over them",
    "quant": "how keys and values are stored",
    "report": "which run directories task=report reads",
    "sweep": "resuming a sweep, submitting without waiting, several points in a job",
    "task": "what a run does",
    "tracking": "a tracker beside result.json",
}
HELP_INDENT = 25


def _summary(path: Path) -> str:
    """The first sentence of an option's leading comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if "@package" in line:
            continue
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(words), maxsplit=1)[0]


def help_text() -> str:
    """Return the help page: usage, then every group with its options and what each is for."""
    folder, width = conf_dir(), max(80, min(160, shutil.get_terminal_size((120, 0)).columns))
    lines = [
        "usage: python src/run.py [group=option ...] [key=value ...] [-m] [--cfg job]",
        "",
        "  python src/run.py                                    the default job",
        "  python src/run.py quant.bits=2 cache.block_size=128  override anything",
        "  python src/run.py -m quant.bits=2,3,4                a sweep, one run per value",
        "  python src/run.py --cfg job                          print the configuration, run nothing",
        "",
    ]
    for group in sorted({path.parent for path in folder.rglob("*.yaml")} - {folder}):
        name = group.relative_to(folder).as_posix()
        lines.append(f"{name}=".ljust(HELP_INDENT) + GROUPS[name])
        for path in sorted(group.glob("[!_]*.yaml")):
            # A name that is too long for its column stays whole; its text goes on beside it.
            entry = f"  {path.stem:<{HELP_INDENT - 3}} {_summary(path)}"
            lines += textwrap.wrap(
                entry,
                width,
                subsequent_indent=" " * HELP_INDENT,
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines.append("")
    lines += [
        "Every key of `--cfg job` can be overridden.",
        'Tab completion: eval "$(python src/run.py -sc install=bash)"',
        f"exit codes: {EXIT_DONE} done, {EXIT_FAILED} failed or interrupted, {EXIT_USAGE} wrong usage",
    ]
    return "\n".join(lines)


def execute(cfg: DictConfig) -> None:
    """Run one composed configuration (see `kvquant.tasks.run_task.execute`).

    Raises:
        Exception: what the task raised, in a sweep, so that its launcher counts the point as failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from kvquant.tasks import run_task

    _State.entered = True
    try:
        run_task.execute(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _State.error = error


def _explain_failure(error: Exception) -> str:
    """Return the one line a failed run ends with."""
    from kvquant.results import one_line

    if isinstance(error, OSError) and not _State.entered:
        return (
            f"the output folder must be writable, got {error.strerror or error}: {error.filename}; "
            "free some space or choose another folder with hydra.run.dir=<folder>"
        )
    if isinstance(error, KVQuantError | ValueError):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (traceback in the run's result.json)"


class _UsageError(Exception):
    """A ConfigError found before Hydra was entered; the same error later is a failure, not a slip."""


def _check(args: argparse.Namespace) -> None:
    """Check the command line as far as it is ours.

    Raises:
        _UsageError: the first thing wrong, in one line.
    """
    # Somebody who swaps the whole configuration folder, or asks Hydra about itself, gets plain Hydra.
    if args.hydra_help or args.shell_completion or args.config_path or args.experimental_rerun:
        return
    from kvquant.preflight import check_command

    try:
        check_command(args, only_compose=bool(args.cfg or args.info))
    except ConfigError as error:
        raise _UsageError(str(error)) from None


def main(app: Callable[[], Any], argv: Sequence[str]) -> int:
    """Check the command line, hand over to Hydra, and turn what comes back into an exit code.

    Args:
        app: the function decorated with ``hydra.main``; it reads ``sys.argv`` itself.
        argv: the arguments without the program's name.

    Returns:
        0 done, 1 failed or interrupted, 2 wrong usage; each failure has put one line on stderr.
    """
    from hydra._internal.utils import get_args_parser

    # Before torch loads its threads: on a machine that does anything else besides, threads that spin while they wait
    # starve the ones that work, and a run of a minute takes four.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    register_schemas()
    args = get_args_parser().parse_args(list(argv))
    if args.help:
        print(help_text())
        return EXIT_DONE
    # A log file on a full disk must not drown the one line that says so.
    logging.raiseExceptions = False
    full_error = os.environ.get(FULL_ERROR) == "1"
    try:
        _check(args)
        # Makes Hydra pass exceptions on instead of printing its own report and exiting.
        os.environ[FULL_ERROR] = "1"
        _State.entered, _State.error = False, None
        app()
        if _State.error is not None:
            raise _State.error
    except ConfigError as error:
        # Before a task was entered it is a slip: the sweeper composes every point before it starts one.
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED if _State.entered else EXIT_USAGE
    except _UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("error: interrupted; what was finished until then is in the run's folder", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        if full_error:
            traceback.print_exc()
        print(f"error: {_explain_failure(error)}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE
