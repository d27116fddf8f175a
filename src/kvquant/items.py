"""What a task has finished so far, item by item, so that a run that is stopped goes on where it was.

A line of items.<fingerprint>.jsonl is one finished item (a prompt, a document, a batch of windows). The line is the
commit: one that a kill cut short is dropped when the file is read again, and large arrays lie in a file of their own
that is whole before its line is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvquant.errors import ResultError

if TYPE_CHECKING:
    import numpy as np


class Item(NamedTuple):
    """A finished item: plain numbers and text, and arrays by name (empty where there are none)."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


class ItemStore:
    """Finished items of one run directory, kept across interruptions.

    An item must not depend on what items before it left behind (a random state, a cache): seed by its key, then a run
    that was stopped ends with the same numbers as one that was not.

    Args:
        run_dir: folder of the run.
        identity: what makes items of two runs comparable: hashes of configuration, code, model and data, the device.
            Items of another identity lie in files of their own and are left alone.
        fresh: whether to forget items of the same identity (the run that made them had finished).

    Raises:
        ResultError: the folder cannot be read or written.
    """

    def __init__(self, run_dir: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        canonical = json.dumps(identity, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        self.path = Path(run_dir) / f"items.{self.fingerprint}.jsonl"
        self._arrays_dir = Path(run_dir) / f"items.{self.fingerprint}"
        self._lines: dict[str, dict[str, Any]] = {}
        try:
            if fresh:
                self.path.unlink(missing_ok=True)
            self._read()
        except OSError as error:
            raise self._unwritable(error) from error
        # How many were there already: what a resumed run saved.
        self.resumed = len(self._lines)

    def _read(self) -> None:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole, newline, cut = text.rpartition(b"\n")
        for line in whole.splitlines():
            entry = json.loads(line)
            self._lines[entry["key"]] = entry
        if cut:
            # The next commit would otherwise be glued to half a line.
            with open(self.path, "r+b") as file:
                file.truncate(len(whole) + len(newline))

    def __contains__(self, key: object) -> bool:
        return str(key) in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, key: str | int) -> Item | None:
        """Return a finished item, None when it is not finished."""
        entry = self._lines.get(str(key))
        if entry is None:
            return None
        return Item(entry["values"], self._load_arrays(entry["arrays"]))

    def commit(
        self, key: str | int, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Item:
        """Store a finished item; when this returns it survives a kill.

        Args:
            key: what the item is called in this run.
            values: plain JSON; floats come back bit by bit, NaN and infinity too.
            arrays: NumPy arrays too large for text.

        Returns:
            The item as `get` would return it, so that a run that was not stopped computes with the same numbers.

        Raises:
            ResultError: the key is taken, or the folder is full or read-only.
        """
        key = str(key)
        if key in self._lines:
            raise ResultError(f"an item must be committed once, got {key!r} again; ask `key in items` first")
        entry: dict[str, Any] = {"key": key, "values": values, "arrays": None}
        try:
            if arrays:
                entry["arrays"] = self._save_arrays(arrays)
            line = json.dumps(entry, separators=(",", ":"))
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._lines[key] = json.loads(line)
        return Item(self._lines[key]["values"], dict(arrays or {}))

    def run(
        self,
        keys: Iterable[Any],
        compute: Callable[[Any], Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, np.ndarray]]],
    ) -> Iterator[Item]:
        """Yield the item of every key in order, computing and committing those that are not finished.

        Args:
            keys: numbers or text.
            compute: from a key to the item's values, or to a pair of values and arrays.
        """
        for key in keys:
            item = self.get(key)
            if item is None:
                made = compute(key)
                item = self.commit(key, *made) if isinstance(made, tuple) else self.commit(key, made)
            yield item

    def _save_arrays(self, arrays: Mapping[str, np.ndarray]) -> str:
        import numpy as np
        from safetensors.numpy import save_file

        self._arrays_dir.mkdir(parents=True, exist_ok=True)
        path = self._arrays_dir / f"{len(self._lines):06d}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        os.replace(temporary, path)
        return path.name

    def _load_arrays(self, name: str | None) -> dict[str, np.ndarray]:
        if name is None:
            return {}
        from safetensors.numpy import load_file

        return dict(load_file(self._arrays_dir / name))

    def _unwritable(self, error: OSError) -> ResultError:
        return ResultError(
            f"{self.path} must be writable, got {error.strerror or error}; free some space and run again in the "
            "same folder"
        )
