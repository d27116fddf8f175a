"""One run from its composed configuration to its result.json: what every task has around it."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvquant.config import validate
from kvquant.errors import ConfigError, DeviceError, KVQuantError, PoolExhausted, ResultError
from kvquant.items import ItemStore
from kvquant.provenance import cpu_name
from kvquant.results import RunRecord, config_hash, load_result, one_line
from kvquant.slurm import own_job
from kvquant.sweep_plan import check_submission
from kvquant.tracking import NoTracker, Tracker, open_tracker

if TYPE_CHECKING:
    import torch

    from kvquant.energy import Meter

log = logging.getLogger(__name__)

# Often enough to see a counter wrap or stop, seldom enough to disturb nothing that is timed.
RUN_POLL_S = 1.0
# Items of runs that differ in one of these are never put together.
ITEM_IDENTITY = ("model_hash", "data_hash", "device")


class TaskContext:
    """What a task gets beside its configuration.

    Args:
        run_dir: folder for everything the task leaves behind.
        record: takes metrics, the table, figures and hashes; it is saved for the task.
        console: where progress bars and tables are printed.
        device: the device to run on.
        meter_name: which energy meter to open, see `kvquant.energy.open_meter`.
        grid: whose electricity it is: the other arguments of `open_meter`.
        fresh_items: whether items of an earlier run in this folder are forgotten, because that run had finished.
    """

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        console: Console,
        device: torch.device,
        meter_name: str = "none",
        grid: dict[str, Any] | None = None,
        *,
        fresh_items: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.record = record
        self.console = console
        self.device = device
        self._meter_name = meter_name
        self._grid = grid or {}
        self._fresh_items = fresh_items

    @functools.cached_property
    def meter(self) -> Meter:
        """The energy meter; opening one may take seconds, which happens before the task starts."""
        from kvquant.energy import open_meter

        return open_meter(self._meter_name, use_cuda=self.device.type == "cuda", **self._grid)

    @contextlib.contextmanager
    def metered_run(self) -> Iterator[None]:
        """Put the joules of the whole task into its record as ``run_energy``, also when it fails."""
        window = None
        try:
            with self.meter.window("run", poll_s=RUN_POLL_S) as window:
                yield
        finally:
            if window is not None:
                from kvquant.energy.validity import window_faults

                self.record.metrics["run_energy"] = {**window.as_metrics(), "faults": window_faults(window)}

    @functools.cached_property
    def items(self) -> ItemStore:
        """Finished items of this run, those of before an interruption included.

        Touch it once model and data are loaded: their hashes decide whose items are ours.
        """
        provenance = self.record.provenance
        identity = {key: provenance.get(key) for key in ITEM_IDENTITY}
        store = ItemStore(
            self.run_dir / "items",
            {**identity, "config_hash": config_hash(self.record.config)},
            fresh=self._fresh_items,
        )
        provenance["resumed_items"] = store.resumed
        return store

    def close(self) -> None:
        """Release the meter, if one was opened."""
        if "meter" in self.__dict__:
            self.meter.close()


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the GPU's included."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DeviceError: cuda is asked for and absent; falling back would measure something else than was asked.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        built = f"this torch {torch.__version__} sees no GPU"
        raise DeviceError(f"device must be available, got cuda, but {built}; try device=auto or device=cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def check_kernel(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot run on the device before a model is loaded.

    Raises:
        DeviceError: says why, and which backend works.
    """
    if backend == "triton":
        from kvquant.kernels import get_backend

        try:
            get_backend(backend, device.type)
        except ValueError as error:
            raise DeviceError(str(error)) from None


def device_name(device: torch.device) -> str:
    """Return what a reader would call the device: the GPU's or the processor's name."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a task as Ctrl-C does, so that its result says so.

    Where somebody has a handler already it is left alone: submitit ignores the SIGTERM that announces a preemption.
    """
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not ours:
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_requeue(error: BaseException) -> bool:
    """Whether Slurm took the job away while submitit's handler was asking for that very thing.

    ``scontrol requeue`` is a process of the job's own step: on a busy node Slurm ends the step, and scontrol in it,
    before scontrol has returned, and the handler raises out of whatever the task was doing.
    """
    command = (
        error.cmd if isinstance(error, subprocess.CalledProcessError | subprocess.TimeoutExpired) else ()
    )
    return list(command[:2]) == ["scontrol", "requeue"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run ended because host, GPU or block pool had no room left."""
    if isinstance(error, MemoryError | PoolExhausted) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def memory_sizes() -> dict[str, int]:
    """Bytes this process had at most, and what its GPU holds and has, for a run that found no room."""
    import resource
    import sys

    # Linux counts in KiB.
    sizes = {"host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        sizes |= {"gpu_free_bytes": free, "gpu_total_bytes": total}
        sizes["gpu_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    return sizes


def print_table(console: Console, record: RunRecord) -> None:
    """Print the record's table, if the task set one."""
    if record.table is None:
        return
    # Escaped, because rich would take the unit in "TTFT [s]" for markup.
    table = Table(title=escape(record.table.title), title_justify="left")
    for index, column in enumerate(record.table.columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right")
    for row in record.table.rows:
        table.add_row(*("-" if entry is None else escape(str(entry)) for entry in row))
    console.print(table)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Stop the garbage collector while much is imported: it takes a fifth of the time that torch and transformers take."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load_task(name: str) -> Any:
    try:
        with collector_off():
            return importlib.import_module(f"kvquant.tasks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"kvquant.tasks.{name}":
            raise
        raise ConfigError(f"task={name} is not part of this version; try task=prefill") from error


def execute(cfg: DictConfig, run_dir: Path | None = None, console: Console | None = None) -> RunRecord:
    """Run the configured task and leave a complete result.json, whatever happens.

    Args:
        cfg: the composed configuration, without Hydra's own node.
        run_dir: folder of the run; by default the one Hydra made.
        console: where to print; by default standard output.

    Raises:
        KVQuantError: what the task raised, or the folder cannot be written.
        Exception: anything else a task raises, so that a launcher counts the point as failed; the record has
            status ``failed``, ``out_of_memory`` or ``interrupted`` by then.
    """
    run_dir = run_dir or Path(HydraConfig.get().runtime.output_dir)
    console = console or Console()
    # Again here although run.py has checked: a queued Slurm job composes its configuration anew.
    validate(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    finished_before = _status_before(run_dir) == "ok"
    record = RunRecord(run_dir, task=cfg.task.name, config=config, seed=cfg.seed)
    if HydraConfig.initialized():
        record.provenance["overrides"] = list(HydraConfig.get().overrides.task)
    record.provenance["slurm_job"] = own_job()
    # Before anything heavy: a folder that cannot be written costs a second, not an hour.
    record.save()
    tracker: Tracker = NoTracker()
    try:
        sweep = check_submission(run_dir, config)
        record.provenance["sweep"] = sweep
        tracking = {**config["tracking"], "group": config["tracking"]["group"] or sweep}
        tracker = open_tracker(tracking, run_dir=run_dir, config=config)
        task = _load_task(cfg.task.name)
        device = resolve_device(cfg.device)
        record.provenance["device"] = device_name(device)
        check_kernel(cfg.kernel.backend, device)
        seed_everything(cfg.seed)
        grid = {key: value for key, value in config["energy"].items() if key != "meter"}
        context = TaskContext(
            run_dir, record, console, device, cfg.energy.meter, grid, fresh_items=finished_before
        )
        with contextlib.closing(context), sigterm_interrupts(), context.metered_run():
            task.run(cfg, context)
    except BaseException as error:
        status, requeued = "failed", is_requeue(error)
        # SystemExit is how submitit's own handler ends a job before it is queued again.
        if requeued or isinstance(error, KeyboardInterrupt | SystemExit):
            status = "interrupted"
        elif is_out_of_memory(error):
            status = "out_of_memory"
            record.metrics["at_out_of_memory"] = memory_sizes()
        _finish(record, status, error)
        tracker.finish(record.metrics, status)
        if requeued:
            # As the handler would have ended it: any other exception is a result, which ends the wait for the job.
            raise SystemExit(-1) from error
        raise
    record.finish("ok")
    tracker.finish(record.metrics, "ok")
    print_table(console, record)
    console.print(f"result: {record.path}", soft_wrap=True, highlight=False, markup=False)
    return record


def _status_before(run_dir: Path) -> str | None:
    """Status of an earlier run in the same folder; None where there was none, or nothing that can be read."""
    try:
        return str(load_result(run_dir)["status"])
    except ResultError:
        return None


def _finish(record: RunRecord, status: str, error: BaseException) -> None:
    try:
        record.finish(status, error)
    except KVQuantError as second:
        # The task's own error matters more than a folder that became unwritable meanwhile.
        log.error("%s", one_line(second))
    log.info(
        "%s: %s",
        status,
        one_line(error),
        exc_info=not isinstance(error, KVQuantError | KeyboardInterrupt | SystemExit),
    )
