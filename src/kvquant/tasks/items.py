"""Results of single items (a window, a question), kept by content, so that a killed run goes on where it was.

A finished item lies in a file of its own, written whole. Its folder is named by the hash of everything the result
depends on - code, model, text, settings - so that nothing of another kind is ever found; ``key.json`` says what.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import kvquant
from kvquant.errors import ResultError


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """SHA-256 over the package's own sources: another version's items are not trusted."""
    root, digest = Path(kvquant.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def short_hash(value: Any) -> str:
    """Sixteen hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ItemStore:
    """Items that share one key.

    Args:
        directory: holds the folders of all keys.
        key: what every item depends on, as JSON; the code is added.

    Attributes:
        found: items that were there.
        computed: items that were put.
    """

    def __init__(self, directory: str | Path, key: dict[str, Any]) -> None:
        key = {**key, "source": source_hash()}
        self.folder = Path(directory).expanduser() / short_hash(key)
        self.found = self.computed = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "key.json").exists():
                _write(self.folder / "key.json", key)
        except OSError as error:
            raise ResultError(
                f"task.items_dir must be writable, {directory} is not ({error}); set another folder"
            ) from error

    def get(self, name: str) -> dict[str, Any] | None:
        """A finished item, or None."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            item: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultError(f"{path} cannot be read ({error}); delete it and run again") from error
        self.found += 1
        return item

    def put(self, name: str, item: dict[str, Any]) -> None:
        """Keep a finished item."""
        _write(self.folder / f"{name}.json", item)
        self.computed += 1


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
