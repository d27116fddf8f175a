"""One number of the text: its name, its source, its place in result.json and its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

WORDS = {2: "Two", 3: "Three", 4: "Four", 8: "Eight"}


@dataclasses.dataclass(frozen=True)
class Where:
    """Stands in a path for the first entry of a list that has these values."""

    values: tuple[tuple[str, Any], ...]

    def find(self, entries: Any) -> int | None:
        """Index of the first such entry; None where there is none."""
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict) and all(entry.get(key) == value for key, value in self.values):
                return index
        return None

    def __str__(self) -> str:
        return "{" + ",".join(f"{key}={value}" for key, value in self.values) + "}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """A number of the text.

    Attributes:
        name: without the backslash, letters only.
        source: of `kvquant.report.paper.sources`.
        path: keys from the top of result.json; `Where` picks an entry of a list.
        spec: format of the number; text is taken as it is.
        factor: for its unit.
        is_interval: the place holds an estimate with its ends.
        compute: what is made of the value there, for counts and extremes; `compute_words` says it in the manifest.
    """

    name: str
    source: str
    path: tuple[Any, ...]
    spec: str = ".2f"
    factor: float = 1.0
    is_interval: bool = False
    compute: Callable[[Any], Any] | None = None
    compute_words: str = ""
