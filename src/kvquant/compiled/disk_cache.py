"""numba's cache on disk, made safe for several processes and for loops that call loops of other files.

numba's own looks only at the file that a function is in, although machine code holds what it calls; and it rewrites its
index without a lock, so that of two processes that compile at once one may later be given the other's code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

log = logging.getLogger(__name__)


class SharedCache(FunctionCache):  # type: ignore[misc]
    """Entries belong to the sources of all loops, and are read and written under a lock.

    Where a file cannot be locked or written, nothing is read or kept: loops are compiled again in every process.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _SOURCES)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What an earlier process compiled for these types; None: nothing."""
        try:
            with self._locked():
                return super().load_overload(sig, target_context)
        except OSError as error:
            log.debug("not read from the cache: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled."""
        try:
            with self._locked():
                super().save_overload(sig, data)
        except OSError as error:
            log.warning("compiled again in every process: %s", error)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        folder = Path(self.cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "loops.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _hash_of_sources() -> str:
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


_SOURCES = _hash_of_sources()
