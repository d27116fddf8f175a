"""Finished items of a task (a window, a question, a repeat), so that work that was stopped goes on where it was.

An item is a file of its own that is whole or absent. The folder around it is named by a hash of everything the item
depends on - code, settings, model, text, device - so that nothing of another kind is ever found; ``identity.json``
says what it was. A run keeps items of its own in its folder (`TaskContext.items`); tasks whose items mean the same in
any run share one folder, ``task.items_dir``. Several processes may commit to one folder: items of one key are equal.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from kvquant.errors import ResultError
from kvquant.provenance import code_hash

if TYPE_CHECKING:
    import numpy as np

_SUFFIX = ".item.json"


@functools.cache
def _code() -> str:
    """The code in memory: what lies on the disk may be edited while a task runs."""
    return code_hash()


def short_hash(value: Any) -> str:
    """Sixteen hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Item(NamedTuple):
    """A finished item: plain JSON, and arrays by name (empty where there are none)."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


class ItemStore:
    """Finished items of one identity.

    An item must not depend on what items before it left behind (a random state, a cache): seed by its key, then work
    that was stopped ends with the same numbers as work that was not.

    Args:
        directory: holds a folder per identity.
        identity: what every item depends on, as JSON; a hash of this package's sources is added.
        fresh: whether to forget items of this identity (the run that made them had finished).

    Attributes:
        folder: where the items lie.
        resumed: how many were there at first.
        found: how many were asked for and there.
        computed: how many were committed here.

    Raises:
        ResultError: the folder cannot be written.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        identity = {**identity, "code": _code()}
        self.folder = Path(directory).expanduser() / short_hash(identity)
        self.found = self.computed = 0
        try:
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists():
                self._write("identity.json", identity)
        except OSError as error:
            raise self._unwritable(error) from error
        self.resumed = len(self)

    def __contains__(self, key: object) -> bool:
        return self._path(key).exists()

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob(f"*{_SUFFIX}"))

    def get(self, key: str | int) -> Item | None:
        """Return a finished item, None when it is not finished.

        Raises:
            ResultError: its file was damaged by something else.
        """
        path = self._path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            item = Item(entry["values"], self._load_arrays(entry["arrays"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path} must be an item, got {error}; delete it and run again") from error
        self.found += 1
        return item

    def commit(
        self, key: str | int, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Item:
        """Store a finished item; when this returns it survives a kill.

        Args:
            key: what the item is called among those of its identity.
            values: plain JSON; floats come back bit by bit, NaN and infinity too.
            arrays: NumPy arrays too large for text.

        Returns:
            The item as `get` would return it, so that work that was not stopped computes with the same numbers.

        Raises:
            ResultError: the folder is full or read-only.
        """
        name = self._path(key).name
        entry = {"key": str(key), "values": values, "arrays": None}
        try:
            if arrays:
                # First, so that whoever finds the item finds its arrays.
                entry["arrays"] = self._save_arrays(name.removesuffix(_SUFFIX), arrays)
            text = self._write(name, entry)
        except OSError as error:
            raise self._unwritable(error) from error
        self.computed += 1
        return Item(json.loads(text)["values"], dict(arrays or {}))

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

    def batch(
        self, keys: Sequence[str], compute: Callable[[], Iterable[Mapping[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Return the values of items that are computed together, all of them anew when one is not finished.

        Args:
            keys: of the batch.
            compute: returns the values of every key, in order.
        """
        if not all(key in self for key in keys):
            return [self.commit(key, values).values for key, values in zip(keys, compute(), strict=True)]
        found = [self.get(key) for key in keys]
        return [item.values for item in found if item is not None]

    def _path(self, key: object) -> Path:
        return self.folder / f"{quote(str(key), safe='')}{_SUFFIX}"

    def _write(self, name: str, value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"))
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        return text

    def _save_arrays(self, stem: str, arrays: Mapping[str, np.ndarray]) -> str:
        import numpy as np
        from safetensors.numpy import save_file

        name = f"{stem}.safetensors"
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
        os.replace(temporary, self.folder / name)
        return name

    def _load_arrays(self, name: str | None) -> dict[str, np.ndarray]:
        if name is None:
            return {}
        from safetensors.numpy import load_file

        return dict(load_file(self.folder / name))

    def _unwritable(self, error: OSError) -> ResultError:
        return ResultError(
            f"{self.folder} must be writable, got {error.strerror or error}; free some space or choose another folder, "
            "and run again"
        )
